"""Jobs that gang ranks and separate processes run for the tests of the conversion."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from etr_megatron.convert import Ranks, to_adapter, to_hf, to_megatron, verify
from etr_megatron.convert.comparison import Verification
from etr_megatron.status import run_and_exit
from tests.hf_models import random_sequences
from tests.reads import bytes_read_by


def convert(hf: str, megatron: str, back: str) -> None:
    """Convert to Megatron and back, each rank its share."""
    ranks = Ranks()
    to_megatron(Path(hf), Path(megatron), ranks)
    to_hf(Path(megatron), Path(back), ranks, max_file_bytes=100_000)


def merge(step: str, out: str) -> None:
    """Convert a checkpoint of adapters, merged and as it is, each rank its share."""
    ranks = Ranks()
    to_hf(Path(step), Path(out) / "merged", ranks, max_file_bytes=100_000)
    to_adapter(Path(step), Path(out) / "adapter", ranks)


def refused(out: str) -> str:
    """The error of a conversion whose output only rank 0 refuses."""
    try:
        to_megatron(Path(out).parent / "model", Path(out), Ranks())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def full_on_rank_1() -> int | None:
    """errno of the OSError that every rank gets."""
    ranks = Ranks()

    def write() -> None:
        if ranks.rank == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    try:
        ranks.on_all_ranks(write)
    except OSError as error:
        return error.errno


def train_and_save(model: str, out: str, overrides: list[str]) -> dict[str, torch.Tensor]:
    """Save a checkpoint of a policy after one update; returns the policy's export."""
    from tests.policy_jobs import build, make_batch

    policy = build(model, ["train.lr=0.01", *overrides])
    policy.update(make_batch(random_sequences()))

    from etr_megatron import checkpoint  # after the policy, which makes megatron.core importable

    checkpoint.save(Path(out), 3, policy, {}, keep=1)
    return {name: tensor.clone() for name, tensor in policy.export()}


def load_by_megatron(model: str, overrides: list[str]) -> list[str]:
    """Names of this rank's parameters for which megatron's `load` of a full sharded state dict differs from what the policy
    loads from HF files. `model` is the HF directory; the converted one is in `model`/../megatron."""
    from tests.policy_jobs import build

    chunks = build(model, overrides).chunks

    from megatron.core import dist_checkpointing

    parameters = [(f"{number}.{name}", p) for number, chunk in enumerate(chunks) for name, p in chunk.named_parameters()]
    wanted = {name: parameter.clone() for name, parameter in parameters}
    with torch.no_grad():
        for _, parameter in parameters:
            parameter.fill_(float("nan"))
    sharded = {number: chunk.sharded_state_dict() for number, chunk in enumerate(chunks)}
    state = dist_checkpointing.load(sharded, str(Path(model).parent / "megatron"))
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(state[number])
    return [name for name, parameter in parameters if not torch.equal(parameter, wanted[name])]


def kill_after(writes: int, argv: list[str]) -> int:
    """Run the tool in this process and kill it with SIGKILL in the middle of its write number `writes`."""
    from etr_megatron.convert import copying, torch_dist_writer
    from tools.convert_hf import main

    left = writes

    def count(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    for module in (copying, torch_dist_writer):
        module.start_writeback = count
    return main(argv)


def _kill_at(moment: str) -> None:
    """Make this process kill itself with SIGKILL just before it does `moment`; everything before is done."""
    from etr_megatron.convert import hf_files, safetensors_writer, torch_dist_writer

    owner, name = {
        "metadata": (torch_dist_writer._Writer, "finish"),
        "common": (torch_dist_writer, "_write_common"),
        "values": (safetensors_writer.SafetensorsWriter, "copy"),
        "copies": (shutil, "copyfile"),
        "config": (hf_files, "write_atomically"),
        "rename": (os, "rename"),
    }[moment]
    plain = getattr(owner, name)

    def kill(*arguments: Any, **options: Any) -> Any:
        if moment != "rename" or str(arguments[0]).endswith(".unfinished"):
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*arguments, **options)

    setattr(owner, name, kill)


def killed_at(moments: list[str], argv: list[str]) -> list[int]:
    """Exit codes of processes that run the tool, each until its moment and with its own output, `<out>_<moment>`."""
    import etr_megatron.convert.torch_dist_writer  # noqa: F401  once for all of them
    from tools.convert_hf import main

    codes = []
    for moment in moments:
        process = os.fork()
        if process == 0:
            _kill_at(moment)
            os._exit(main([*argv[:-1], f"{argv[-1]}_{moment}"]))
        codes.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
    return codes


def reads(hf: str, out: str) -> list[int]:
    """Bytes that this process reads in a conversion to Megatron, one back and one back with a cast; each of the second time,
    when all modules are imported."""
    ranks = Ranks()

    def three(there: Path) -> list[int]:
        return [
            bytes_read_by(lambda: to_megatron(Path(hf), there, ranks)),
            bytes_read_by(lambda: to_hf(there, Path(f"{there}_back"), ranks)),
            bytes_read_by(lambda: to_hf(there, Path(f"{there}_cast"), ranks, dtype=torch.bfloat16)),
        ]

    three(Path(f"{out}_first"))
    return three(Path(out))


def memory_of(argv: list[str]) -> int:
    """Bytes by which the process's peak memory grows while the tool runs; modules are imported before."""
    from etr_megatron.convert import torch_dist_writer  # noqa: F401
    from tools.convert_hf import main

    before = _peak(anew=True)
    if main(argv):
        raise RuntimeError("the conversion failed")
    return _peak() - before


def _peak(*, anew: bool = False) -> int:
    """Peak bytes of this process's memory. anew: give back what is free, and reset the peak to the current value first.

    Not `ru_maxrss`, which starts from the parent's peak.
    """
    if anew:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def verified(hf: str, megatron: str, **options: Any) -> Verification:
    """The result of `verify`."""
    return verify(Path(hf), Path(megatron), Ranks(), **options)


def main() -> int:
    """Run the job of the command line."""
    what, *arguments = sys.argv[1:]
    if what == "memory":
        print(memory_of(arguments))
    elif what == "killed-at":
        print(killed_at(arguments[0].split(","), arguments[1:]))
    else:
        return kill_after(int(what), arguments)
    return 0


if __name__ == "__main__":
    run_and_exit(main)
