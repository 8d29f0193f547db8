"""`sglang.launch_server` on a CPU build of torch: `python launch.py SGLANG_ARGUMENTS...`

SGLang spawns its scheduler and its detokenizer, as a process that has used CUDA must. Without CUDA they can be forked, and
share what is already imported: a server then starts in half the time. It also looks more often than every five seconds whether
it was told to end.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import sys
from pathlib import Path

gc.disable()  # during imports, collections take a fifth of a server's start; in a test it makes little garbage
os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
_HERE = str(Path(__file__).resolve().parent)
sys.path.insert(0, _HERE)  # for the stand-in of sgl_kernel, here and in spawned processes
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_HERE, os.environ.get("PYTHONPATH"))))

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


if __name__ == "__main__":
    if "--tp-size" in sys.argv:  # unless given cores for each rank, SGLang needs a NUMA node for each
        _cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
        _ranks = range(int(sys.argv[sys.argv.index("--tp-size") + 1]))
        if len(_ranks) > 1:
            os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(str(_cores[i % len(_cores)]) for i in _ranks))
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda method, force=False: None  # SGLang would set "spawn"
    from dp_attention import pad_batches, scatter_sums_without_nccl, wait_for_requests
    from experts import leave_host_memory_unpinned, skip_experts_of_other_ranks
    from latent import attend_to_latents
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    skip_experts_of_other_ranks()
    leave_host_memory_unpinned()
    attend_to_latents()
    pad_batches()
    scatter_sums_without_nccl()
    wait_for_requests()
    end_soon()
    try:
        run_server(prepare_server_args(sys.argv[1:]))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
