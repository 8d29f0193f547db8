from __future__ import annotations

import gc
import os
import shutil
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from tests.environments import USER_ENVIRONMENT
from tests.gang import Gangs
from tests.graders import USER_REWARDS


def pytest_collection_finish():
    """Exclude objects of imported test modules from later garbage collections."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # else Triton's bindings report all remaining objects as leaked


@pytest.fixture(scope="session")
def gangs():
    running = Gangs()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def hf_models(tmp_path_factory):
    """family -> directory of a small random HuggingFace checkpoint; every dimension is distinct."""
    from tests.hf_models import ALIKE, FAMILIES, write_model

    root = tmp_path_factory.mktemp("hf")
    return {name: write_model(name, root / name) for name in FAMILIES | ALIKE}


@pytest.fixture
def deadline():
    """Fails a test after ten minutes, so that one that hangs does not block all others."""

    def fail(number, frame):
        raise AssertionError("no end after ten minutes")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, 600, 30)  # again every 30 s, in case its clean-up hangs as well
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def only_what_hangs_is_late(monkeypatch):
    """Other calls of a pool may take as long as a busy machine needs for them."""
    from etr_megatron.platform.workers import WorkerPool

    deadline = WorkerPool._deadline

    def of(self, worker):
        is_late = not worker.ready or any(b"hang" in job.line for job in [*worker.inflight.values()][:1])
        return deadline(self, worker) if is_late else None

    monkeypatch.setattr(WorkerPool, "_deadline", of)


@pytest.fixture
def hf(hf_models, tmp_path):
    """A copy of a small Qwen3 checkpoint, which tests may change."""
    return Path(shutil.copytree(hf_models["qwen3"], tmp_path / "hf"))


@pytest.fixture
def megatron(hf, tmp_path):
    """`hf` converted to a torch_dist checkpoint."""
    from etr_megatron.convert import Ranks, to_megatron

    to_megatron(hf, tmp_path / "megatron", Ranks())
    return tmp_path / "megatron"


@pytest.fixture(scope="session")
def _tiny_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny_cache")


@pytest.fixture
def runs(tmp_path, _tiny_cache):
    """Runs of a small job in the test's own directory."""
    from tests.runs import Runs

    return Runs(tmp_path, _tiny_cache)


@pytest.fixture
def user_rewards(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(USER_REWARDS)
    monkeypatch.chdir(tmp_path)
    return "my_rewards:by_command"


@pytest.fixture
def user_environment(tmp_path, monkeypatch):
    (tmp_path / "my_environment.py").write_text(USER_ENVIRONMENT)
    monkeypatch.chdir(tmp_path)
    return "my_environment:by_command"
