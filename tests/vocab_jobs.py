"""Jobs that gang ranks run for the vocabulary tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from etr_megatron.vocab_parallel import VocabShard, gemm, head_chunks, vocab_parallel_logprob, vocab_parallel_loss
from tests.vocab_cases import Case


@contextmanager
def pieces(small: bool) -> Iterator[None]:
    """Sizes of the CPU's blocks: if `small`, a vocabulary of these tests has several groups of columns of several blocks."""
    if not small:
        yield
        return
    with mock.patch.object(gemm, "_BLOCK_ROWS", 10), mock.patch.object(head_chunks, "_COLUMNS", 37):
        yield


def sharded(hidden, weight, targets, upstream, temperature, small_pieces) -> dict[str, torch.Tensor]:
    """This rank's results over equal shards, padded to a multiple of 128 rows."""
    world, rank = dist.get_world_size(), dist.get_rank()
    vocab = weight.shape[0]
    size = 128 * -(-vocab // (128 * world))
    own = torch.full((size, weight.shape[1]), 7.0)
    real = weight[rank * size : (rank + 1) * size]
    own[: len(real)] = real
    shard = VocabShard(size, vocab, dist.group.WORLD)
    h, w = hidden.clone().requires_grad_(), own.clone().requires_grad_()
    with pieces(small_pieces):
        logp, entropy = vocab_parallel_logprob(h, w, targets, shard=shard, temperature=temperature, chunk_rows=3)
        (upstream[0] * logp + upstream[1] * entropy).sum().backward()
    return {"hidden_grad": h.grad, "logp": logp.detach(), "entropy": entropy.detach(), "weight_grad": w.grad}


def single_pass(
    case: Case, already: float, overlap: bool, backend: str = "auto", small_pieces: bool = False
) -> dict[str, torch.Tensor]:
    """This rank's share of the single-pass loss, with its gradient added to a buffer filled with `already`."""
    world, rank = dist.get_world_size(), dist.get_rank()
    vocab = case.weight.shape[0]
    size = 128 * -(-vocab // (128 * world))
    weight = torch.full((size, case.weight.shape[1]), 7.0)
    real = case.weight[rank * size : (rank + 1) * size]
    weight[: len(real)] = real
    weight.requires_grad_()
    weight.main_grad = torch.full_like(weight, already)
    hidden = case.hidden.clone().requires_grad_()
    with pieces(small_pieces):
        loss, logp, entropy = vocab_parallel_loss(
            hidden,
            weight,
            case.targets,
            case.token_loss,
            shard=VocabShard(size, vocab, dist.group.WORLD),
            temperature=case.temperature,
            chunk_rows=3,
            overlap=overlap,
            backend=backend,
        )
    loss.backward()
    return {
        "loss": loss.detach(),
        "logp": logp,
        "entropy": entropy,
        "hidden_grad": hidden.grad,
        "weight_grad": weight.main_grad - already,
    }


class _Watched:
    """A collective under way that records when it is waited for."""

    def __init__(self, work: Any, events: list[str]) -> None:
        self._work, self._events = work, events

    def wait(self) -> None:
        self._events.append("wait")
        self._work.wait()


def events_of_the_chunks(case: Case, overlap: bool) -> list[str]:
    """Events of `single_pass` by chunk: "logits" computed, a "gather" of so many bytes started, a "wait" for one."""
    events: list[str] = []
    gather, logits = dist.all_gather_into_tensor, head_chunks.chunk_logits

    def watched_gather(out: torch.Tensor, own: torch.Tensor, **options: Any) -> _Watched:
        events.append(f"gather {own.nbytes}")
        return _Watched(gather(out, own, **options), events)

    def watched_logits(*arguments: Any) -> torch.Tensor:
        events.append("logits")
        return logits(*arguments)

    with (
        mock.patch.object(head_chunks.dist, "all_gather_into_tensor", watched_gather),
        mock.patch.object(head_chunks, "chunk_logits", watched_logits),
    ):
        single_pass(case, 0.0, overlap)
    return events
