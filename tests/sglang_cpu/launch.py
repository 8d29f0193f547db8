"""`sglang.launch_server` on a CPU build of torch: `python launch.py SGLANG_ARGUMENTS...`

SGLang spawns its scheduler and its detokenizer, as a process that has used CUDA must. Without CUDA they can be forked, and
share what is already imported: a server then starts in half the time. Nothing is compiled, as that takes longer than all that
a small model computes. It also looks more often than every five seconds whether it was told to end.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path

gc.disable()  # during imports, collections take a fifth of a server's start; in a test it makes little garbage
_HERE = str(Path(__file__).resolve().parent)
sys.path.insert(0, _HERE)  # for the stand-in of sgl_kernel and for `served`, here and in spawned processes


def set_environment() -> None:
    """Environment variables of SGLang and torch, those that a user has set excepted."""
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    os.environ.setdefault("SGLANG_EXTERNAL_MODEL_PACKAGE", "served")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_HERE, os.environ.get("PYTHONPATH"))))


set_environment()

import torch  # noqa: E402

if not torch.cuda.is_available():
    # torchvision's own operators are built for CUDA; importing torchvision requires these two.
    _operators = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def end_soon() -> None:
    """Make a server look ten times a second whether it was sent SIGTERM."""
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    then = TokenizerManager.sigterm_watchdog

    async def watch(manager: TokenizerManager) -> None:
        while not manager.gracefully_exit:
            await asyncio.sleep(0.1)
        await then(manager)

    TokenizerManager.sigterm_watchdog = watch


def prepare() -> None:
    """Import what all processes of a server need, before they are forked, and mend it."""
    from dp_attention import pad_batches, scatter_sums_without_nccl, wait_for_requests
    from experts import leave_host_memory_unpinned, skip_experts_of_other_ranks
    from latent import attend_to_latents
    from sglang import launch_server  # noqa: F401
    from sglang.srt.entrypoints import http_server  # noqa: F401
    from sglang.srt.model_executor import model_runner  # noqa: F401
    from sglang.srt.models import registry  # noqa: F401

    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda method, force=False: None  # SGLang would set "spawn"
    skip_experts_of_other_ranks()
    leave_host_memory_unpinned()
    attend_to_latents()
    pad_batches()
    scatter_sums_without_nccl()
    wait_for_requests()
    end_soon()


def serve(arguments: Sequence[str]) -> None:
    """Be a server until it ends."""
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    if "--tp-size" in arguments:  # unless given cores for each rank, SGLang needs a NUMA node for each
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
        ranks = range(int(arguments[arguments.index("--tp-size") + 1]))
        if len(ranks) > 1:
            os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(str(cores[i % len(cores)]) for i in ranks))
    try:
        run_server(prepare_server_args([*arguments]))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    prepare()
    serve(sys.argv[1:])
