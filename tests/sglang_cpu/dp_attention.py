"""What SGLang's data-parallel attention lacks on CPU: padded batches for `torch_native`, a scatter of sums without NCCL, and
rest for the process that gives requests to ranks."""

from __future__ import annotations

from typing import Any


def pad_batches() -> None:
    """Give `torch_native` the length of a sequence that pads a batch.

    Its method for CUDA graphs says 1. On CPU, SGLang asks for that of CPU graphs, which this backend does not have
    (`model_executor/forward_batch_info.py`, 0.5.21).
    """
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value = lambda backend: 1


def scatter_sums_without_nccl() -> None:
    """Make ranks that each have their own experts and tokens sum and scatter outputs by SGLang's deterministic path.

    The other path needs NCCL (`reduce_scatterv` of `distributed/parallel_state.py`, 0.5.21).
    """
    from sglang.srt.distributed.parallel_state import GroupCoordinator

    GroupCoordinator.reduce_scatterv = GroupCoordinator._deterministic_reduce_scatterv


def wait_for_requests() -> None:
    """Make the process that gives requests to ranks wait for them. It would look for them without a pause, and so keep a core
    busy (`managers/data_parallel_controller.py`, 0.5.21)."""
    from sglang.srt.managers import data_parallel_controller

    receive = data_parallel_controller.sock_recv

    def wait(socket: Any, **options: Any) -> Any:
        socket.poll(100)  # ms
        return receive(socket, **options)

    data_parallel_controller.sock_recv = wait
