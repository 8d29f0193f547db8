"""The images, as far as they can be tested without a container engine."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from functools import reduce
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from etr_megatron.errors import UserError
from etr_megatron.preflight import image

REPO = Path(__file__).resolve().parents[1]
DOCKERFILES = ("docker/Dockerfile", "docker/Dockerfile.cpu")
SCRIPTS = sorted(
    str(path.relative_to(REPO))
    for pattern in ("docker/*.sh", "tools/*.sh", "examples/*.sh", "examples/*.sbatch")
    for path in REPO.glob(pattern)
)


def tool(name: str) -> str:
    """A linter of the test extra, installed next to the interpreter."""
    return str(Path(sys.executable).with_name(name))


def instructions(dockerfile: str) -> list[tuple[str, list[str]]]:
    """(instruction, words) in order, with continuation lines joined and comments left out."""
    text = re.sub(r"^#.*\n", "", (REPO / dockerfile).read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [(name, shlex.split(rest)) for name, rest in lines]


def closure(requirements: list[str]) -> dict[str, metadata.Distribution]:
    """Distributions of the tests' environment that meet these requirements and, without those of extras that no one asks for,
    the requirements of these."""
    found: dict[str, metadata.Distribution] = {}
    asked = [(Requirement(text), "") for text in requirements]
    seen = set()
    while asked:
        requirement, extra = asked.pop()
        is_needed = not requirement.marker or requirement.marker.evaluate({"extra": extra})
        if (requirement, extra) in seen or not is_needed:
            continue
        seen.add((requirement, extra))
        try:
            distribution = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:  # pip will fetch it
            continue
        found[distribution.name] = distribution
        texts = distribution.requires or []
        asked += [(Requirement(text), name) for text in texts for name in ("", *requirement.extras)]
    return found


def base_image(folder: Path, *requirements: str) -> dict[str, str]:
    """The environment variables of a new Python in which pip finds itself and what meets these requirements.

    These files are links to those of the tests' environment, where tools/setup_env.sh had pip put them: to have it fetch and
    unpack them again would take minutes.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python3*/site-packages")
    for distribution in closure(["pip", *requirements]).values():
        for file in distribution.files or []:
            if ".." in file.parts:  # a command, whose first line names another interpreter
                continue
            target = packages / file
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file.locate(), target)
            except OSError:  # another file system
                shutil.copy2(file.locate(), target)
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return env | {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_hadolint_has_nothing_to_say(dockerfile):
    done = subprocess.run([tool("hadolint"), dockerfile], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


def test_shellcheck_has_nothing_to_say():
    # examples/run_etr.sh is Python too; shellcheck reports its strings as odd quoting.
    shell_only = [script for script in SCRIPTS if script != "examples/run_etr.sh"]
    done = subprocess.run([tool("shellcheck"), *shell_only, ".ci/run"], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_what_is_copied_is_there_and_what_is_run_is_a_script_of_the_repository(dockerfile):
    found = instructions(dockerfile)
    for name, words in found:
        if name == "COPY":
            assert all((REPO / source).exists() for source in words[:-1]), words
        if name == "RUN" and words[0] != "useradd":
            assert words[0] == "bash" and (REPO / words[1].removeprefix("/opt/etr_megatron/")).is_file(), words
    last = dict(found)
    assert last["USER"] == ["10001"] and last["WORKDIR"] == ["/workspace"]
    assert ":latest" not in (REPO / dockerfile).read_text()
    entry = re.search(r'"bash", "/opt/etr_megatron/(.+?)"', (REPO / dockerfile).read_text())
    assert entry and (REPO / entry[1]).is_file()


def test_nothing_that_is_copied_is_left_out_of_what_a_builder_is_sent():
    ignored = [line for line in (REPO / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    copied = [words[:-1] for file in DOCKERFILES for name, words in instructions(file) if name == "COPY"]
    sources = {source.split("/")[0] for words in copied for source in words}
    assert {"etr_megatron", "configs", "pyproject.toml"} <= sources
    assert not [source for source in sources for pattern in ignored if fnmatch(source, pattern)]
    assert [pattern for pattern in ignored if fnmatch(".venv-sglang", pattern)]


@pytest.mark.slow
def test_the_steps_of_the_cpu_image_run_in_a_clean_environment(tmp_path):
    """Every COPY and install step of Dockerfile.cpu, with a new Python as the base image, followed by its command. The product
    finds what it declares, without what only the tests need."""
    root, workspace = tmp_path / "opt", tmp_path / "workspace"
    workspace.mkdir()
    env = base_image(tmp_path / "python", *tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["dependencies"])
    values = {"/opt/etr_megatron": str(root), "${TORCH_INDEX_URL}": os.environ.get("TORCH_INDEX_URL", "")}
    command: list[str] = []
    for name, words in instructions("docker/Dockerfile.cpu"):
        here = [reduce(lambda text, item: text.replace(*item), values.items(), word) for word in words]
        if name == "COPY":
            for source in words[:-1]:
                target = Path(here[-1]) / Path(source).name if here[-1].endswith("/") else Path(here[-1])
                target.parent.mkdir(parents=True, exist_ok=True)
                if (REPO / source).is_dir():
                    shutil.copytree(REPO / source, target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(REPO / source, target)
        elif name == "RUN" and words[0] == "bash":
            done = subprocess.run(here, env=env, capture_output=True, text=True, timeout=900)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        elif name in ("ENTRYPOINT", "CMD"):
            command += [word.strip("[],") for word in here]
    quick = [
        "run.steps=1",
        "train.lr_warmup_updates=0",
        "tiny.warm_start_steps=5",
        "tiny.layers=1",
        "rollout.prompts_per_step=2",
        "rollout.samples_per_prompt=2",
        "rollout.max_response_tokens=8",
        "eval.every=0",
    ]
    done = subprocess.run([*command, *quick], cwd=workspace, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "etr_megatron image: etr-megatron 0.1.0, torch 2.13" in done.stderr
    assert (workspace / "runs" / "cpu_tiny" / "metrics.jsonl").read_text().count("\n") == 1


FAKE_PYTHON = """#!/usr/bin/env bash
# Stands for the base image's python3: says versions, and "installs" by doing to them what the test wants.
if [ "$1" = -c ]; then cat "$VERSIONS"; exit; fi
echo "$* ${NVTE_PYTORCH_FORCE_BUILD:-}" >>"$CALLS"
[ -z "$AFTER" ] || echo "$AFTER" >"$VERSIONS"
"""


@pytest.fixture
def gpu_step(tmp_path):
    """Runs a step of install_gpu.sh on a fake base image: (exit code, stderr, calls of pip)."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python3"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    versions, calls = tmp_path / "versions", tmp_path / "calls"

    def run(*step: str, after: str = "") -> tuple[int, str, str]:
        versions.write_text("torch==2.11.0\nsglang==0.5.17\n")
        calls.write_text("")
        env = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "VERSIONS": str(versions), "CALLS": str(calls), "AFTER": after}
        done = subprocess.run(["bash", "docker/install_gpu.sh", *step], cwd=REPO, env=env, capture_output=True, text=True)
        return done.returncode, done.stderr, calls.read_text()

    return run


def test_a_step_that_would_change_torch_fails(gpu_step):
    code, said, called = gpu_step("transformer-engine", "2.11.0", "8")
    assert (code, said) == (0, "")
    tools, built = called.splitlines()
    assert "--constraint" in tools and " wheel" in tools
    assert "--no-build-isolation" in built and "transformer-engine[pytorch]==2.11.0 TRUE" in built  # no prebuilt wheel
    code, said, _ = gpu_step("transformer-engine", "2.11.0", "8", after="torch==2.13.0")
    assert code == 2 and "changed torch or sglang" in said


def test_apex_comes_from_git_at_a_commit(gpu_step):
    args = next(
        words for name, words in instructions("docker/Dockerfile") if name == "ARG" and words[0].startswith("APEX_COMMIT")
    )
    commit = args[0].partition("=")[2]
    assert re.fullmatch(r"[0-9a-f]{40}", commit)
    code, _, called = gpu_step("apex", commit, "9.0", "4")
    assert code == 0 and f"git+https://github.com/NVIDIA/apex.git@{commit}" in called and "--cuda_ext" in called


@pytest.mark.slow
def test_servers_of_the_gpu_image_run_in_the_environment_of_the_product(tmp_path):
    """The base image's Python may be in a virtual environment; a link to it would not run in that environment."""
    base, workspace = tmp_path / "base", tmp_path / "workspace"
    env = base_image(base) | {"PIP_NO_DEPS": "1"}
    (packages,) = base.glob("lib/python3*/site-packages")
    for name, version in {"torch": "2.11.0", "sglang": "0.5.17"}.items():
        (packages / f"{name}.py").touch()
        (packages / f"{name}-{version}.dist-info").mkdir()
        (packages / f"{name}-{version}.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
    copy = shutil.copytree(REPO, tmp_path / "opt", ignore=shutil.ignore_patterns(".*", "runs", "__pycache__", "*.egg-info"))
    step = ["bash", str(copy / "docker" / "install_gpu.sh"), "product", str(copy), str(workspace)]
    done = subprocess.run(step, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    asked = [workspace / ".venv-sglang" / "bin" / "python", "-c", "import sys, sglang, etr_megatron; print(sys.prefix)"]
    said = subprocess.run(asked, cwd=workspace, capture_output=True, text=True, check=True)
    assert said.stdout == f"{base}\n"


def test_an_unknown_step_is_refused(gpu_step):
    assert gpu_step("nothing")[:2] == (2, "error: unknown step nothing\n")


def test_a_gpu_image_without_a_gpu_is_refused(tmp_path):
    with pytest.raises(UserError, match="the container sees none; start it with --gpus all"):
        image.check(tmp_path, gpus=0, wants_gpu=True)
    assert image.check(tmp_path, gpus=0, wants_gpu=False) == []


def test_a_small_shared_memory_is_warned_of_where_several_gpus_need_it(tmp_path, monkeypatch):
    monkeypatch.setattr(image.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(64 << 20, 0, 64 << 20))
    assert image.check(tmp_path, gpus=1, wants_gpu=True) == []
    (warning,) = image.check(tmp_path, gpus=8, wants_gpu=True)
    assert "/dev/shm has 0.1 GiB" in warning and "--ipc host" in warning


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(image.os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match="cannot be written by uid"):
        image.check(tmp_path, gpus=0, wants_gpu=False)
