"""The CPU platform of megatron.core, and deadlines that name the missing ranks."""

from __future__ import annotations

import datetime
import os
import re
import socket
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from unittest import mock

import pytest
import torch.distributed as dist

from etr_megatron import train
from etr_megatron.errors import UserError
from etr_megatron.platform import cpu_shim
from etr_megatron.platform.phases import PhaseBarriers
from etr_megatron.rollout.sglang import update_group
from etr_megatron.weights.transport import wire
from tests import warm
from tests.nursery import ROOT

WAITED, LOST = "rank 0 waited 10 s at the save for", "rank 0 lost its connection to"
RANK_0 = "rank 0, which may have lost another"


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> str:
    """What a process prints that prepares megatron.core, on a machine with packages that cannot be imported without a GPU."""
    folder = tmp_path_factory.mktemp("packages")
    for package in ("transformer_engine", "apex"):
        (folder / f"{package}.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')\n")
    return python(
        f"import sys; sys.path.append({str(folder)!r})\n"
        "import torch; before = (torch.cuda.current_device, torch.zeros, torch.Tensor.cuda, torch.get_rng_state)\n"
        "from etr_megatron import platform; platform.prepare_megatron()\n"
        "import megatron.core.pipeline_parallel.schedules as s\n"
        "assert s.torch is torch\n"
        "assert before == (torch.cuda.current_device, torch.zeros, torch.Tensor.cuda, torch.get_rng_state)\n"
        "print('untouched')\n"
        "import os; from torch.utils import cpp_extension; os.environ['CUDA_HOME'] = '/usr/local'\n"
        "print('found', cpp_extension._find_cuda_home())\n"  # builds of torch for CUDA call it at import
        "from importlib.util import find_spec; from megatron.core import optimizer\n"
        "print('by', optimizer.Adam.__module__, find_spec('transformer_engine'), find_spec('apex'))\n"
    )


@pytest.mark.slow
def test_torch_itself_stays_untouched_and_reports_no_cuda_toolkit_without_a_gpu(prepared):
    assert prepared.startswith("untouched\nfound /usr/local\n")


def test_on_cpu_installed_packages_for_gpus_are_not_looked_at(prepared):
    assert prepared.endswith("by torch.optim.adamw None None\n")


@pytest.mark.slow
def test_megatron_imported_before_the_platform_is_ready_is_an_error_not_a_surprise():
    printed = python("import megatron.core; from etr_megatron import platform; platform.prepare_megatron()")
    assert "RuntimeError: megatron.core was imported before" in printed


@pytest.mark.slow
def test_no_cuda_name_is_left_in_a_rewritten_module():
    printed = python(
        "import ast, pathlib, megatron; from etr_megatron.platform.cpu_shim import _Rewrite, _is_torch_cuda\n"
        "root = pathlib.Path(list(megatron.__path__)[0]) / 'core'\n"
        "seen = left = 0\n"
        "for file in root.rglob('*.py'):\n"
        "    source = file.read_text()\n"
        "    if 'cuda' not in source:\n"
        "        continue\n"
        "    seen += sum(_is_torch_cuda(n) for n in ast.walk(ast.parse(source)))\n"
        "    left += sum(_is_torch_cuda(n) for n in ast.walk(_Rewrite().visit(ast.parse(source))))\n"
        "print(seen > 100, left)"
    )
    assert printed.strip() == "True 0"


def test_a_rewritten_module_is_compiled_once_and_other_programs_never_read_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    source = tmp_path / "module.py"
    source.write_text("device = 'cuda'\n")

    def device(loader: type[SourceFileLoader]) -> str:
        found: dict[str, str] = {}
        exec(loader("module", str(source)).get_code("module"), found)
        return found["device"]

    assert device(cpu_shim._Loader) == "cpu"
    assert device(SourceFileLoader) == "cuda"
    with monkeypatch.context() as patch:
        patch.setattr(cpu_shim, "_Rewrite", None)
        assert device(cpu_shim._Loader) == "cpu"
    source.write_text("device = 'cuda:0' if False else 'cuda'; a_changed = 'file'\n")
    assert device(cpu_shim._Loader) == "cpu"


def test_a_missing_rank_is_named_with_the_phase(gangs):
    replies = gangs(2).run("tests.platform_jobs:meet_without", missing=1)
    assert re.fullmatch(r"rank 0 waited ([2-9]|[1-5]\d) s at the rollout of step 7 for rank 1", replies[0])
    assert replies[1] == "absent"


@pytest.mark.parametrize(("changed", "rank"), [("data.train", 1), ("data.eval.aime24", 1), ("data.train", 0)])
def test_a_rank_that_reads_other_problems_than_rank_0_stops_all(gangs, changed, rank):
    told = f"{changed}: HOST reads different problems from HOST, the machine of rank 0; give both the same "
    told = f"{told}data and tokenizer files"
    told = told.replace("HOST", socket.gethostname())
    assert gangs(2).run("tests.platform_jobs:other_problems", changed=changed, rank=rank) == [told] * 2


def test_ranks_with_the_same_problems_go_on(gangs):
    assert gangs(2).run("tests.platform_jobs:other_problems", changed="", rank=1) == [""] * 2


def test_where_one_rank_is_told_to_stop_all_leave_the_same_meeting_and_meet_again_to_save(gangs):
    wanted = ["met", "told to stop (SIGTERM) before the step 1", "met", "met"]
    assert gangs(2).run("tests.platform_jobs:stopped_once", told=1) == [wanted] * 2


@pytest.mark.parametrize(
    ("waited_s", "said", "wanted"),
    [
        (10.0, "Ranks 1, 3 failed to pass monitoredBarrier in 10000 ms", TimeoutError(f"{WAITED} rank 1, 3")),
        (9.95, "Rank 2 failed to pass monitoredBarrier", TimeoutError(f"{WAITED} rank 2")),
        (10.0, "Timed out waiting for recv", TimeoutError(f"{WAITED} rank 0 or another")),
        (3.0, "Rank 2 failed to pass", ConnectionError(f"{LOST} rank 2 at the save, after 3 s")),
        (10.0, "Connection closed by peer", ConnectionError(f"{LOST} {RANK_0} at the save, after 10 s")),
        (10.0, "Connection reset by peer", ConnectionError(f"{LOST} {RANK_0} at the save, after 10 s")),
    ],
)
def test_who_is_missing_and_whether_he_is_waited_for_or_lost_is_read_from_what_gloo_says(monkeypatch, waited_s, said, wanted):
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    found = object.__new__(PhaseBarriers)._failure("save", waited_s, datetime.timedelta(seconds=10), said)
    assert (type(found), str(found)) == (type(wanted), str(wanted))


MEETING = """
import datetime, os, sys, time
import torch.distributed as dist
from etr_megatron.platform.phases import PhaseBarriers
rank, store, dying = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
phases = PhaseBarriers(timeout_s=900)
phases.barrier("resume")
if rank == dying:
    time.sleep(1.5)  # the other one waits already
    os._exit(1)
try:
    phases.barrier("rollout of step 7")
except (TimeoutError, ConnectionError) as error:
    print(f"{type(error).__name__}: {error}", flush=True)
os._exit(0)
"""


@pytest.mark.parametrize(("dying", "whose"), [(1, "rank 1"), (0, "rank 0, which may have lost another")])
def test_a_rank_that_died_is_not_said_to_have_been_waited_for_until_the_deadline(tmp_path, dying, whose):
    command = [sys.executable, "-c", MEETING]
    ranks = [warm.start([*command, str(rank), f"file://{tmp_path}/store", str(dying)], {**os.environ}) for rank in range(2)]
    try:
        printed = ranks[1 - dying].communicate(timeout=600)[0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    left = 1 - dying
    assert re.fullmatch(
        rf"ConnectionError: rank {left} lost its connection to {whose} at the rollout of step 7, after \d\d? s\n", printed
    )


@pytest.mark.parametrize("world", [1, 2])
def test_ranks_that_all_arrive_go_on(gangs, world):
    assert gangs(world).run("tests.platform_jobs:meet_without", missing=-1) == ["met"] * world


@pytest.mark.parametrize(("given", "wanted"), [(None, "1"), ("8", "8")])
def test_a_rank_has_kernels_start_in_the_order_of_their_launches_unless_told_otherwise(monkeypatch, given, wanted):
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    monkeypatch.setenv(name, given or "")
    if given is None:
        monkeypatch.delenv(name)
    with pytest.raises(UserError):
        train._run(["no_such.key=1"])
    assert os.environ[name] == wanted


@pytest.mark.parametrize("given", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_a_ranks_memory_grows_in_segments_that_can_be_merged_unless_told_otherwise(monkeypatch, given):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    if given is not None:
        monkeypatch.setenv(given, "max_split_size_mb:64")
    with pytest.raises(UserError):
        train._run(["no_such.key=1"])
    found = {name: os.environ[name] for name in names if name in os.environ}
    assert found == ({given: "max_split_size_mb:64"} if given else {names[0]: "expandable_segments:True"})


@pytest.mark.parametrize("name", ["NCCL_CUMEM_ENABLE", "TORCH_NCCL_DUMP_ON_TIMEOUT"])
@pytest.mark.parametrize(
    ("overrides", "given", "wanted"),
    [
        ([], None, "0"),
        ([], "1", "1"),
        (["sglang.sync=sharded"], None, "0"),
        (["sglang.sync=disk"], None, None),
        (["sglang.placement=colocated"], None, None),
        (["rollout.backend=embedded"], None, None),
    ],
)
def test_a_rank_that_syncs_over_process_groups_outlives_servers(monkeypatch, name, overrides, given, wanted):
    for one in ("NCCL_CUMEM_ENABLE", "TORCH_NCCL_DUMP_ON_TIMEOUT"):
        monkeypatch.setenv(one, "")  # is set as well
        monkeypatch.delenv(one)
    if given is not None:
        monkeypatch.setenv(name, given)
    monkeypatch.setenv("ETR_PLATFORM", "cpu")  # is set as well
    monkeypatch.setattr(train, "node_role", mock.Mock(side_effect=UserError("far enough")))
    with pytest.raises(UserError, match="far enough"):
        train._run(["rollout.backend=sglang", *overrides])
    assert os.environ.get(name) == wanted


@pytest.mark.parametrize("own", [None, "3"])
def test_a_group_with_servers_outlives_them_and_other_groups_keep_their_own_settings(monkeypatch, own):
    names = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC")
    for name in names:
        monkeypatch.setenv(name, own or "")
        if own is None:
            monkeypatch.delenv(name)
    seen = []

    def formed(*_arguments, **_options):
        seen.append([os.environ.get(name) for name in names])
        raise RuntimeError("not here")

    monkeypatch.setattr(dist, "ProcessGroupNCCL", formed, raising=False)
    with pytest.raises(RuntimeError, match="not here"):
        wire._open_group("nccl", dist.HashStore(), 0, 2, 1.0)
    monkeypatch.setattr(update_group.c10d, "_new_process_group_helper", formed)
    for backend in ("nccl", "gloo"):
        with pytest.raises(RuntimeError, match="not here"):
            update_group.UpdateGroup(1, host="127.0.0.1", backend=backend, timeout_s=5).join()
    assert seen == [["0", "250"], ["0", "250"], [own, own]]
    assert [os.environ.get(name) for name in names] == [own, own]


@pytest.mark.parametrize(("backend", "ended"), [("nccl", "aborted"), ("gloo", "destroyed")])
def test_a_group_with_servers_is_left_without_waiting_for_them(monkeypatch, backend, ended):
    """torch's orderly end of an NCCL group waits for operations under way and for the other processes of the machine."""
    done = []
    group = update_group.UpdateGroup(1, host="127.0.0.1", backend=backend, timeout_s=5)
    monkeypatch.setattr(update_group.c10d, "_abort_process_group", lambda it: done.append(("aborted", it)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda it: done.append(("destroyed", it)))
    group.close()  # nobody has joined
    group._group = "the group"
    group.close()
    group.close()
    assert done == [(ended, "the group")]
