"""Files of another user that may not be used give one sentence and exit code 2, before anything starts.

The tests run as root, which may access everything. The commands they start own root's files but lack its privileges, so another
user's files are closed to them as to anyone else.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from etr_megatron.rollout.record import write_record
from tests import warm
from tests.runs import REPO, SMALL
from tests.test_rollout_records import group

ANOTHER = 65534
UNPRIVILEGED = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]


def _why_not() -> str:
    if os.geteuid() != 0:
        return "only root can give files to another user"
    if shutil.which("setpriv") is None:
        return "there is no setpriv"
    done = subprocess.run([*UNPRIVILEGED, "true"], capture_output=True, text=True)
    return done.stderr if done.returncode else ""


pytestmark = pytest.mark.skipif(bool(why := _why_not()), reason=why)


def unprivileged(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Python with `command`, run without the privilege to access other users' files."""
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    python = [sys.executable, *map(str, command)]
    if not warm.IS_POSSIBLE:
        return subprocess.run([*UNPRIVILEGED, *python], cwd=REPO, env=environment, capture_output=True, text=True)
    process = warm.start(python, environment, privileged=False)
    out, err = process.communicate()
    return subprocess.CompletedProcess(python, process.returncode, out, err)


def told(*command: str | Path) -> str:
    """The one-sentence error with which `command` ends."""
    done = unprivileged(*command)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    (line,) = done.stderr.splitlines()
    return line.removeprefix("error: ")


def give_away(path: Path, mode: int) -> None:
    """Make another user the owner of `path` and everything in it."""
    for one in (path, *path.rglob("*")):
        os.chown(one, ANOTHER, ANOTHER)
    path.chmod(mode)


def make_run(root: Path) -> Path:
    """A run with a checkpoint, in a world-writable directory."""
    for file in ("metrics.jsonl", "status.json", "lock", "config.yaml", "checkpoints/step_000001/trainer.json"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text('{"step": 1, "state": "failed"}\n')
    for folder in ("rollouts", "tensorboard", "servers"):
        (root / folder).mkdir()
    write_record(root / "recorded", 1, [group()], {}, None)
    root.chmod(0o777)
    return root


def launch(tmp_path: Path, *overrides: str) -> tuple[str | Path, ...]:
    (tmp_path / "small.yaml").write_text(SMALL)
    folders = (f"run.dir={tmp_path}/runs", f"tiny.cache_dir={tmp_path}/cache")
    return "-m", "etr_megatron.launch", tmp_path / "small.yaml", *folders, "parallel.tp=1", *overrides


PARTS = [
    ("", 0o755, "written"),
    ("", 0o700, "written"),
    ("checkpoints", 0o755, "written"),
    ("checkpoints", 0o700, "written"),
    ("checkpoints/step_000001", 0o755, "written"),
    ("checkpoints/step_000001/trainer.json", 0o600, "read"),
    ("recorded", 0o755, "written"),
    ("tensorboard", 0o755, "written"),
    ("lock", 0o644, "written"),
    ("metrics.jsonl", 0o600, "read"),
    ("status.json", 0o600, "read"),
]
LOOK = """
import sys
from pathlib import Path
from etr_megatron.errors import UserError
from etr_megatron.observe import RunDirectory
for run in sys.argv[1:]:
    try:
        RunDirectory(Path(run)).refuse_if_unwritable()
        print("usable")
    except UserError as error:
        print(error)
"""


def test_a_run_that_is_another_users_in_part_is_told_by_that_part(tmp_path):
    runs = [make_run(tmp_path / str(number)) for number, _ in enumerate(PARTS)]
    mine, shared = make_run(tmp_path / "mine"), make_run(tmp_path / "shared")
    for run, (part, mode, _) in zip(runs, PARTS, strict=True):
        give_away(run / part, mode)
    for part in ("config.yaml", "metrics.jsonl", "status.json", "checkpoints/step_000001/trainer.json"):
        give_away(shared / part, 0o644)  # readable by all, and only read or replaced
    done = unprivileged("-c", LOOK, *runs, mine, shared)
    said = [
        f"{run / part}: cannot be {what} (Permission denied); choose another run.dir or run.name"
        for run, (part, _, what) in zip(runs, PARTS, strict=True)
    ]
    assert done.stdout.splitlines() == [*said, "usable", "usable"], done.stderr


def test_a_job_in_a_run_directory_of_another_user_is_refused_before_it_is_started(tmp_path):
    run = make_run(tmp_path / "runs" / "small")
    give_away(run / "checkpoints", 0o700)
    said = f"{run / 'checkpoints'}: cannot be written (Permission denied); choose another run.dir or run.name"
    assert told(*launch(tmp_path)) == said


@pytest.mark.slow
@pytest.mark.parametrize("mode", [0o755, 0o700])
def test_a_cache_of_another_user_without_the_policy_is_one_sentence(tmp_path, mode):
    (tmp_path / "cache").mkdir()
    give_away(tmp_path / "cache", mode)
    said = f"tiny.cache_dir '{tmp_path}/cache' cannot hold the tiny policy (Permission denied): name another directory"
    assert told(*launch(tmp_path)) == said


@pytest.mark.slow
def test_a_record_of_another_user_is_not_taken_for_none(tmp_path):
    run = make_run(tmp_path / "runs" / "small")
    give_away(run / "recorded", 0o700)
    replay = ("run.name=again", f"rollout.replay={run}", "eval.every=0", "run.steps=1")
    assert told(*launch(tmp_path, *replay)) == f"{run / 'recorded'}: Permission denied"
    assert told("-m", "etr_megatron.observe", "rollout", run, "--step", "1").endswith(": Permission denied")
    give_away(run / "metrics.jsonl", 0o600)
    assert told("-m", "etr_megatron.observe", run) == f"{run / 'metrics.jsonl'}: Permission denied"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "mode", "said"),
    [
        ("", 0o755, "--out OUT: OUT.unfinished cannot be created (Permission denied)"),
        ("out", 0o700, "OUT: Permission denied"),
        ("out.unfinished", 0o755, "--out OUT cannot be written (Permission denied)"),
        ("out.unfinished", 0o700, "--out OUT cannot be written (Permission denied)"),
        (
            "out.unfinished/left",
            0o755,
            "--out OUT: what is left in OUT.unfinished cannot be removed (Permission denied); remove it or choose another "
            "--out",
        ),
    ],
)
def test_an_output_of_another_user_is_one_sentence(tmp_path, hf, part, mode, said):
    parent = tmp_path / "theirs"
    parent.mkdir()
    (parent / part).mkdir(parents=True, exist_ok=True)
    if part.startswith("out.unfinished"):
        (parent / "out.unfinished" / ".conversion").touch()
        (parent / "out.unfinished" / "left").mkdir(exist_ok=True)
        (parent / "out.unfinished" / "left" / "file").touch()
    give_away(parent / part, mode)
    out = parent / "out"
    assert told("tools/convert_hf.py", "to-megatron", "--hf", hf, "--out", out) == said.replace("OUT", str(out))


@pytest.mark.slow
def test_a_checkpoint_of_another_user_is_named(tmp_path, hf):
    for file in ("model.safetensors", "config.json"):
        give_away(hf / file, 0o600)
        said = told("tools/convert_hf.py", "to-megatron", "--hf", hf, "--out", tmp_path / "out")
        assert said == f"{hf / file} cannot be read (Permission denied)"
        assert not (tmp_path / "out").exists()
