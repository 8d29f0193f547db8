"""The shell scripts: set-up, the script that is both bash and Python, and what a user sees of them."""

from __future__ import annotations

import fcntl
import os
import py_compile
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
RUN = REPO / "examples" / "run_etr.sh"
SETUP = REPO / "tools" / "setup_env.sh"
SCRIPTS = [RUN, SETUP, REPO / "tools" / "run_tests.sh", REPO / ".ci" / "run"]


def run(arguments: list[str], **settings: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=600, **settings)  # type: ignore[call-overload]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_valid_bash_and_executable(script: Path) -> None:
    done = run(["bash", "-n", str(script)])
    assert (done.returncode, done.stderr) == (0, "")
    assert os.access(script, os.X_OK) and script.read_text().startswith("#!/usr/bin/env bash\n")


def test_run_etr_is_valid_python(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        py_compile.compile(str(RUN), cfile=str(tmp_path / "run_etr.pyc"), doraise=True)


# run_etr.sh as Python

# A single write, because two ranks share the pipe and print() would write in parts.
FAKE_TRAIN = """
import os, sys
from pathlib import Path

def main():
    os.write(1, f"train got {sys.argv[1:]} from {Path(__file__).parents[1].name}\\n".encode())
    return 7
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the script beside a package whose train only prints its arguments."""
    for folder in ("examples", "etr_megatron"):
        (tmp_path / "checkout" / folder).mkdir(parents=True)
    (tmp_path / "checkout" / "etr_megatron" / "__init__.py").write_text("")
    (tmp_path / "checkout" / "etr_megatron" / "train.py").write_text(FAKE_TRAIN)
    for module in ("status", "errors"):
        shutil.copy(REPO / "etr_megatron" / f"{module}.py", tmp_path / "checkout" / "etr_megatron")
    shutil.copy(RUN, tmp_path / "checkout" / "examples" / RUN.name)
    return tmp_path / "checkout"


def test_as_python_it_trains_from_its_checkout_when_the_package_is_not_installed(checkout: Path, tmp_path: Path) -> None:
    # -S excludes site-packages, so nothing is installed.
    script = checkout / "examples" / RUN.name
    done = run([sys.executable, "-S", str(script), "a.yaml", "run.seed=3"], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout == "train got ['a.yaml', 'run.seed=3'] from checkout\n"


def test_torchrun_runs_it_as_python(checkout: Path) -> None:
    script = checkout / "examples" / RUN.name
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run([*torchrun, str(script), "run.seed=3"], env={**os.environ, "PYTHONPATH": str(checkout)})
    assert done.stdout.count("train got ['run.seed=3'] from checkout") >= 1
    assert "exitcode  : 7" in done.stderr


def test_children_that_import_it_again_do_not_train() -> None:
    module = runpy.run_path(str(RUN), run_name="__mp_main__")
    assert "main" not in module


# run_etr.sh as bash, through the real launcher


@pytest.fixture(scope="module")
def is_set_up() -> None:
    if run(["bash", str(SETUP), "--check"]).returncode != 0:
        pytest.skip("tools/setup_env.sh has not been run on this checkout")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train.learnin_rate=1"], ["train.learnin_rate"]),
        (["--no-such-option"], ["--no-such-option"]),
    ],
    ids=["unknown key", "unknown option"],
)
def test_bad_input_through_bash_is_one_message_and_exit_code_2(
    is_set_up: None, tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    (tmp_path / "job.yaml").write_text("run:\n  platform: cpu\n")
    before = sorted(tmp_path.iterdir())
    done = run(["bash", str(RUN), "job.yaml", *arguments], cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert [part for part in parts if part not in done.stderr] == []
    assert sorted(tmp_path.iterdir()) == before


def test_help_through_bash(is_set_up: None) -> None:
    done = run(["bash", str(RUN), "--help"])
    usage = "usage: bash examples/run_etr.sh [--nproc N] [--rollout-only | --dry-run] [[--config] CONFIG]"
    assert done.returncode == 0 and done.stdout.startswith(usage)


@pytest.mark.slow
def test_a_mistake_of_a_dry_run_through_bash_is_one_sentence(is_set_up: None) -> None:
    wrong = run(["bash", str(RUN), "--dry-run", "--gpus", "some"])
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert wrong.stderr.startswith("error: --dry-run: argument --gpus: invalid int value")


# tools/setup_env.sh, with a Python that only pretends to install

FAKE_PYTHON = """#!/usr/bin/env bash
case "$1 $2" in
    "-c "*) exit 0 ;;
    "- "*) exec {python} "$@" ;;
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip")
        sleep 0.2
        echo "${{@:3}}" >>"{log}"
        if [ -n "${{PIP_BREAKS:-}}" ]; then echo "no matching distribution" >&2; exit 1; fi ;;
esac
"""


class FakeCheckout:
    """A checkout with only the set-up script; `installs` lists what pip was asked to install."""

    def __init__(self, root: Path) -> None:
        self.root = root / "checkout"
        (self.root / "tools").mkdir(parents=True)
        (root / "bin").mkdir()
        shutil.copy(SETUP, self.root / "tools")
        self.project = self.root / "pyproject.toml"
        self.project.write_text("[project]\n")
        self.stamp = self.root / ".venv" / ".etr_setup_stamp"
        self._log = root / "pip.log"
        python = root / "bin" / "python3.11"
        python.write_text(FAKE_PYTHON.format(python=sys.executable, log=self._log))
        python.chmod(0o755)
        environment = {key: value for key, value in os.environ.items() if key != "ETR_TORCH_SPEC"}
        self.environment = environment | {"PATH": f"{root / 'bin'}:{os.environ['PATH']}"}

    @property
    def command(self) -> list[str]:
        return ["bash", str(self.root / "tools" / SETUP.name)]

    def set_up(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return run([*self.command, *arguments], env=self.environment | variables)

    def installs(self) -> list[str]:
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        self._log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def fake(tmp_path: Path) -> FakeCheckout:
    return FakeCheckout(tmp_path)


def everything(fake: FakeCheckout, torch: str = "torch==2.13.*") -> list[str]:
    return [f"install {torch}", f"install -e {fake.root}[test]"]


def test_set_up_installs_torch_first_and_is_a_no_op_afterwards(fake: FakeCheckout) -> None:
    assert fake.set_up("--check").returncode == 1
    first = fake.set_up()
    assert (first.returncode, first.stdout) == (0, "")
    assert fake.installs() == everything(fake)
    second = fake.set_up()
    assert (second.returncode, second.stdout, second.stderr, fake.installs()) == (0, "", "", [])
    assert fake.set_up("--check").returncode == 0


def test_a_changed_pyproject_is_installed_again(fake: FakeCheckout) -> None:
    fake.set_up()
    fake.installs()
    fake.project.write_text("[project]\nname = 'other'\n")
    assert fake.set_up("--check").returncode == 1
    assert fake.set_up().returncode == 0
    assert fake.installs() == everything(fake)


def test_a_moved_checkout_is_installed_again(fake: FakeCheckout, tmp_path: Path) -> None:
    fake.set_up()
    fake.root = fake.root.rename(tmp_path / "moved")
    assert fake.set_up("--check").returncode == 1


def test_a_link_to_another_disk_is_kept_and_one_to_the_environment_of_another_checkout_is_refused(
    fake: FakeCheckout, tmp_path: Path
) -> None:
    disk = tmp_path / "disk" / "venv"
    (fake.root / ".venv").symlink_to(disk)
    for _ in range(2):
        assert fake.set_up().returncode == 0
    assert (fake.root / ".venv").is_symlink() and (disk / "bin" / "python").exists() and fake.installs() == everything(fake)
    first, stamp = fake.root, fake.stamp.read_text()
    fake.root = Path(shutil.copytree(first, tmp_path / "second", symlinks=True))
    assert fake.set_up("--check").returncode == 1
    refused = fake.set_up()
    assert (refused.returncode, refused.stdout, refused.stderr) == (
        2,
        "",
        f"error: {fake.root}/.venv is a link to {disk}, the environment of {first}; remove the link to set up an environment "
        "here\n",
    )
    assert fake.stamp.read_text() == stamp and fake.installs() == []
    shutil.rmtree(first)
    assert fake.set_up().returncode == 0 and fake.installs() == everything(fake)


def test_another_torch_is_taken_and_kept(fake: FakeCheckout) -> None:
    fake.set_up(ETR_TORCH_SPEC="torch==2.11.*")
    assert fake.installs() == everything(fake, "torch==2.11.*")
    assert fake.set_up().returncode == 0 and fake.installs() == []
    fake.set_up(ETR_TORCH_SPEC="torch==2.12.*")
    assert fake.installs() == everything(fake, "torch==2.12.*")


def test_a_failed_set_up_shows_why_and_is_tried_again(fake: FakeCheckout) -> None:
    failed = fake.set_up(PIP_BREAKS="1")
    assert failed.returncode == 2 and not fake.stamp.exists()
    assert "no matching distribution" in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("error: the set-up failed; the whole log is")
    fake.installs()
    assert fake.set_up().returncode == 0
    assert fake.installs() == everything(fake)


def test_two_set_ups_at_once_install_once(fake: FakeCheckout) -> None:
    both = [subprocess.Popen(fake.command, env=fake.environment, stderr=subprocess.PIPE) for _ in range(2)]
    assert [process.wait(600) for process in both] == [0, 0]
    for process in both:
        process.communicate()
    assert fake.installs() == everything(fake)


def test_a_set_up_that_waits_for_another_says_so(fake: FakeCheckout) -> None:
    (fake.root / ".venv").mkdir()
    with (fake.root / ".venv" / ".setup_lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = subprocess.Popen(fake.command, env=fake.environment, stderr=subprocess.PIPE, text=True)
        assert waiting.stderr is not None
        log = fake.root / ".venv" / "setup.log"
        assert waiting.stderr.readline() == f"waiting for another set-up of .venv (log: {log})\n" and fake.installs() == []
    assert waiting.wait(600) == 0 and fake.installs() == everything(fake)
    waiting.stderr.close()


def test_no_python_is_a_clear_message(fake: FakeCheckout, tmp_path: Path) -> None:
    tools = tmp_path / "bare"
    tools.mkdir()
    for name in ("bash", "dirname"):
        found = shutil.which(name)
        assert found is not None
        (tools / name).symlink_to(found)
    done = fake.set_up(PATH=str(tools))
    assert done.returncode == 2 and done.stderr.startswith("error: no Python >= 3.11 is on the PATH")


def test_what_keeps_the_environment_from_being_made_and_unknown_options_are_one_sentence(fake):
    venv = fake.root / ".venv"
    venv.touch()
    for path in ("file", "loop"):
        done = fake.set_up()
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), path
        assert done.stderr.startswith(f"error: {venv} cannot be made or written (")
        venv.unlink()
        venv.symlink_to(".venv")
    done = fake.set_up("--sglan")
    assert (done.returncode, done.stderr) == (2, "error: unknown option --sglan; known are --check and --sglang\n")
    assert not fake.installs()
