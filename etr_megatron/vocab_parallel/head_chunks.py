"""The chunk loop that all passes through the LM head share: logits of only one chunk of rows at a time (two with overlap).

One packed all-gather per chunk, 16 bytes per row and rank; on CUDA it overlaps with computing the next chunk's logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from etr_megatron.vocab_parallel import gemm, torch_rows, triton_rows
from etr_megatron.vocab_parallel.shard import VocabShard

_CHUNK_ROWS = {"cpu": (128, 384), "cuda": (1024, 1024)}
"""Default rows per chunk: a quarter of all, within these limits. Every chunk reads and writes the whole weight gradient once,
so the overhead beyond the GEMMs falls with the rows per chunk, whatever the size of the shard."""

_COLUMNS = 8192
"""Columns of the logits' gradient computed at a time on CPU, and consumed while they are in the cache."""

Backend = Literal["auto", "torch", "triton"]


@dataclass(frozen=True)
class HeadConfig:
    """Settings of a head. temperature: divides the logits. chunk_rows: None chooses by device.

    backend: of the row-wise passes; `auto` is `triton` on a CUDA device that it supports, else `torch`.
    overlap: whether the all-gather of a chunk's statistics overlaps with computing the next chunk's logits, which takes memory
    for a second chunk of logits; None overlaps on CUDA, where waiting costs more than on CPU.
    """

    shard: VocabShard
    temperature: float = 1.0
    chunk_rows: int | None = None
    backend: Backend = "auto"
    overlap: bool | None = None

    def kernels_on(self, device: torch.device) -> ModuleType:
        """The module with `row_statistics` and `row_gradient`. Raises ValueError if Triton is requested and cannot run."""
        if self.backend == "torch" or (self.backend == "auto" and device.type != "cuda"):
            return torch_rows
        if triton_rows.is_available(device):
            return triton_rows
        if self.backend == "triton":
            raise ValueError(f"Triton cannot run on {device}: it needs CUDA of capability 8.0 or more, and to be installed")
        return torch_rows

    def rows_of_chunk(self, rows: int, device: torch.device) -> int:
        """Rows per chunk for `rows` rows in all, equal on every rank: chunks of nearly equal size, in multiples of `gemm.ROWS`
        within the limit; the last may be smaller."""
        least, most = _CHUNK_ROWS["cpu" if device.type == "cpu" else "cuda"]
        limit = self.chunk_rows or min(most, max(least, gemm.round_up_rows(-(-rows // 4))))
        chunks = max(1, -(-rows // limit))
        return max(1, min(rows, limit, gemm.round_up_rows(-(-rows // chunks))))

    def buffers_on(self, device: torch.device) -> int:
        """Chunks of logits that are alive at the same time."""
        overlap = self.overlap if self.overlap is not None else device.type == "cuda"
        return 2 if overlap and self.shard.group is not None else 1


@dataclass(frozen=True)
class Chunk:
    """A chunk of rows with its results, fp32 [rows] each.

    logits: fp32 [rows, real], divided by the temperature; the consumer may overwrite them until it takes the next chunk.
    columns: int64 [rows], see `VocabShard.columns`.
    """

    rows: slice
    logits: Tensor
    columns: Tensor
    logp: Tensor
    entropy: Tensor
    log_sum: Tensor


class _PendingChunk:
    """A chunk whose all-gather of statistics is in flight."""

    def __init__(self, head: HeadConfig, rows: slice, logits: Tensor, targets: Tensor) -> None:
        shard, columns = head.shard, head.shard.columns(targets)
        self._rows, self._logits, self._columns = rows, logits, columns
        local = _statistics(head, logits, columns)
        self._work: Any = None
        if shard.group is None:
            self._all = local[None]
        else:
            stacked = local.new_empty(shard.ranks * len(local), local.shape[1])
            self._work = dist.all_gather_into_tensor(stacked, local, group=shard.group, async_op=True)
            self._all = stacked.view(shard.ranks, *local.shape)

    def wait(self) -> Chunk:
        if self._work is not None:
            self._work.wait()
        return Chunk(self._rows, self._logits, self._columns, *_combine(self._all))


def _statistics(head: HeadConfig, logits: Tensor, columns: Tensor) -> Tensor:
    """This shard's row statistics, fp32 [4, rows] (see `row_statistics`); neutral values if the shard has only padding."""
    if logits.shape[1] == 0:
        nothing = logits.new_zeros(4, len(logits))
        nothing[0] = -torch.inf
        return nothing
    return head.kernels_on(logits.device).row_statistics(logits, columns)


def _combine(statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log-prob, entropy and log-sum-exp, [rows] each, from the [TP, 4, rows] statistics of all shards."""
    top, total, target, weighted = statistics.unbind(1)
    peak = top.max(dim=0).values
    # All sums are relative to the maximum, because a common offset of the logits would cost precision. A shard with only
    # padding has a maximum of -inf.
    below = (top - peak).clamp(min=torch.finfo(top.dtype).min)
    scale = below.exp()
    weighted = ((weighted + total * below) * scale).sum(0)
    total = (total * scale).sum(0)
    log_total = total.log()
    return target.sum(0) - peak - log_total, log_total - weighted / total, peak + log_total


def columns_at_a_time(real: int, device: torch.device) -> int:
    """Columns whose gradient `add_gradients` computes and consumes at a time: all on CUDA."""
    return max(1, min(real, _COLUMNS)) if device.type == "cpu" else max(1, real)


def chunk_logits(head: HeadConfig, hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Write the logits of the shard's real columns to `out` [rows, real]; padded columns are not computed and need no mask."""
    return gemm.logits_into(out, hidden, weight[: head.shard.real], 1 / head.temperature)


def row_slices(head: HeadConfig, hidden: Tensor) -> list[slice]:
    """The chunks' rows, in order."""
    count = len(hidden)
    step = head.rows_of_chunk(count, hidden.device)
    return [slice(begin, min(begin + step, count)) for begin in range(0, count, step)]


def chunk_buffers(head: HeadConfig, slices: list[slice], count: int, device: torch.device) -> Tensor:
    """fp32 [count, rows of the largest chunk, real], uninitialized, for the logits of the chunks `slices`."""
    return torch.empty(count, slices[0].stop if slices else 0, head.shard.real, dtype=torch.float32, device=device)


def iterate_chunks(head: HeadConfig, hidden: Tensor, weight: Tensor, targets: Tensor) -> Iterator[Chunk]:
    """All chunks in order. A collective over the shards; every rank must consume every chunk."""
    slices, count = row_slices(head, hidden), head.buffers_on(hidden.device)
    buffers = chunk_buffers(head, slices, count, hidden.device)
    waiting: _PendingChunk | None = None
    for number, rows in enumerate(slices):
        out = buffers[number % count, : rows.stop - rows.start]
        logits = chunk_logits(head, hidden[rows], weight, out)
        now = _PendingChunk(head, rows, logits, targets[rows])
        if count == 1:
            yield now.wait()
            continue
        if waiting is not None:
            yield waiting.wait()
        waiting = now
    if waiting is not None:
        yield waiting.wait()


def add_gradients(
    head: HeadConfig,
    chunk: Chunk,
    g_logp: Tensor,
    g_entropy: Tensor | None,
    *,
    hidden: Tensor,
    weight: Tensor,
    grad_hidden: Tensor,
    grad_weight: Tensor | None,
) -> None:
    """Compute the gradient of a chunk's logits, and from it the gradients of its hidden rows and of the weight.

    g_logp, g_entropy: d loss / d log-prob and d entropy, fp32 [rows]. hidden: all rows, [R, H]. grad_hidden [R, H] (only the
    chunk's rows) and grad_weight [Vp/TP, H] or None: fp32, owned by the caller and updated in place.
    In fp32 the gradient overwrites the chunk's logits; in bf16 it is a separate tensor of `columns_at_a_time` columns.
    """
    scale, passes = 1 / head.temperature, head.kernels_on(hidden.device)
    g_logp, g_entropy = g_logp * scale, None if g_entropy is None else g_entropy * scale
    step = columns_at_a_time(head.shard.real, hidden.device)
    operand = None
    if weight.dtype != torch.float32:
        operand = torch.empty(len(chunk.logits), step, dtype=weight.dtype, device=weight.device)
    for begin in range(0, head.shard.real, step):
        part = slice(begin, min(begin + step, head.shard.real))
        logits, here = chunk.logits[:, part], (chunk.columns >= begin) & (chunk.columns < part.stop)
        grad = passes.row_gradient(
            logits,
            torch.where(here, chunk.columns - begin, -1),
            chunk.log_sum,
            chunk.entropy,
            g_logp,
            g_entropy,
            logits if operand is None else operand[:, : logits.shape[1]],
        )
        total = None if grad_weight is None else grad_weight[part]
        gemm.add_gradients(grad_hidden[chunk.rows], total, grad, hidden[chunk.rows], weight[part])
