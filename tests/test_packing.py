"""The microbatch plan's invariants, and what a packed microbatch holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etr_megatron.policy.packing import pack, plan_microbatches

CPU = torch.device("cpu")


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=40),
    dp=st.integers(1, 5),
    budget=st.integers(20, 200),
)
def test_plan_places_every_sample_once_keeps_the_budget_and_counts_alike(lengths, dp, budget):
    plan = plan_microbatches(lengths, dp=dp, token_budget=budget)
    assert len(plan) == dp
    assert len({len(rank) for rank in plan}) == 1
    placed = [sample for rank in plan for micro in rank for sample in micro]
    assert sorted(placed) == list(range(len(lengths)))
    for micro in (micro for rank in plan for micro in rank):
        assert len(micro) == 1 or sum(lengths[i] for i in micro) <= budget
    assert plan == plan_microbatches(lengths, dp=dp, token_budget=budget)


def test_rows_predict_exactly_the_response_tokens():
    sequences = [([7, 8, 9], [1, 2]), ([5], [3]), ([4, 4], [6, 6, 6])]
    batch = pack(sequences, [2, 0], multiple=1, device=CPU)
    assert batch.tokens.tolist() == [[4, 4, 6, 6, 6, 7, 8, 9, 1, 2]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]
    assert batch.offsets.tolist() == [0, 5, 10] and batch.longest == 5
    # Each row's successor in the packed tokens is its target.
    assert batch.tokens[0, batch.rows + 1].tolist() == batch.targets.tolist() == [6, 6, 6, 1, 2]
    assert batch.row_sample.tolist() == [2, 2, 2, 0, 0]


@pytest.mark.parametrize("numbers", [[0], []])
def test_padding_is_a_sequence_of_its_own_without_loss_rows(numbers):
    batch = pack([([7, 8, 9], [1, 2])], numbers, multiple=4, device=CPU)
    assert batch.tokens.shape[1] % 4 == 0 and batch.tokens.shape[1] > 0
    assert batch.offsets[-1] == batch.tokens.shape[1]
    assert len(batch.rows) == 2 * len(numbers)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="sample 1 has an empty prompt"):
        pack([([1], [2]), ([], [3])], [0, 1], multiple=1, device=CPU)
