"""Sequence-level ratios when two ranks hold parts of the same sequences, as under context parallelism."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable

from etr_megatron.objective import LossSettings, Sequences, resolve_loss
from tests.loss_cases import LENGTHS, random_case, reference

SETTINGS = LossSettings(kl_coef=0.3, entropy_coef=0.2)


def rows_of(rank: int, index: np.ndarray) -> np.ndarray:
    """An uneven cut: rank 1 has the last two thirds of every sequence, and all of sequences shorter than three tokens."""
    position = np.concatenate([np.arange(n) for n in LENGTHS])
    behind = position >= np.array(LENGTHS)[index] // 3
    return np.flatnonzero(behind if rank else ~behind)


def part_of_the_loss(name: str, seed: int) -> tuple[float, torch.Tensor]:
    """This rank's share of the loss, and its gradient for this rank's rows."""
    case, logp, entropy = random_case(seed, SETTINGS)
    rows = torch.tensor(rows_of(dist.get_rank(), case.index))
    whole = case.inputs(torch.tensor(logp), torch.tensor(entropy))
    sequences = Sequences(whole.sequences.index[rows], whole.sequences.lengths, differentiable.all_reduce)
    held = {key: values[rows] for key, values in whole.row_tensors().items()}
    held["logp"].requires_grad_()
    loss = resolve_loss(name)(type(whole)(**held, sequences=sequences, settings=SETTINGS)).loss
    loss.backward()
    return loss.item(), held["logp"].grad


@pytest.mark.parametrize("name", ["gspo", "clipped"])
@pytest.mark.parametrize("seed", [0, 1, 8])
def test_two_ranks_with_parts_of_each_sequence_make_the_loss_of_one(gangs, name, seed):
    case, logp, entropy = random_case(seed, SETTINGS)
    loss, gradient, _ = reference(name, case, logp, entropy)
    parts = gangs(2).run("tests.test_losses_on_ranks:part_of_the_loss", name=name, seed=seed)
    assert sum(part for part, _ in parts) == pytest.approx(loss, abs=1e-12)
    for rank, (_, found) in enumerate(parts):
        np.testing.assert_allclose(found.numpy(), gradient[rows_of(rank, case.index)], atol=1e-12)
