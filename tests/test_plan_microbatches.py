"""The microbatch plan: its invariants, and its balance against the exact optimum by brute force."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etr_megatron.flops import sequence_flops
from etr_megatron.policy import microbatch_plan as planning
from etr_megatron.policy.microbatch_plan import plan_microbatches
from etr_megatron.weights import read_architecture


def cost(length: int) -> int:
    """A linear and a quadratic part, equal at 40 tokens."""
    return 40 * length + length * length


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=40),
    dp=st.integers(1, 5),
    budget=st.integers(20, 200),
    multiple=st.integers(1, 4),
)
def test_every_sample_once_the_budget_kept_and_as_many_microbatches_on_every_rank(lengths, dp, budget, multiple):
    costs = [cost(n) for n in lengths]
    plan = plan_microbatches(lengths, dp=dp, token_budget=budget, costs=costs, multiple=multiple)
    assert len(plan) == dp
    (count,) = {len(rank) for rank in plan}
    assert count % multiple == 0
    placed = [sample for rank in plan for micro in rank for sample in micro]
    assert sorted(placed) == list(range(len(lengths)))
    for micro in (micro for rank in plan for micro in rank):
        assert len(micro) == 1 or sum(lengths[i] for i in micro) <= budget
    assert plan == plan_microbatches(lengths, dp=dp, token_budget=budget, costs=costs, multiple=multiple)


@pytest.mark.parametrize(
    ("lengths", "budget", "count"),
    [
        ([5, 5], 10, 1),  # exactly the budget
        ([2] * 9, 5, 5),  # 18 / 5 rounds up to 4, which leaves no room for one sample
        ([2] * 19, 5, 10),
        ([8, 5, 5, 2, 1, 1] * 3, 11, 6),  # a part without room for 2 has room for 1
        ([], 5, 1),
    ],
)
def test_there_are_no_more_microbatches_than_are_needed(lengths, budget, count):
    (plan,) = plan_microbatches(lengths, dp=1, token_budget=budget, costs=[n * n for n in lengths])
    assert len(plan) == count


def test_parts_of_one_cost_that_have_room_for_other_samples_are_told_apart():
    lengths = [3, 3, 5, 5, 7, 7]
    (plan,) = plan_microbatches(lengths, dp=1, token_budget=10, costs=[1] * 6)
    assert [sum(lengths[i] for i in micro) for micro in plan] == [10, 10, 10]


def test_a_search_is_cut_off_after_so_many_partial_assignments(monkeypatch):
    most, looked_at = 16 + 300 + 16, []  # greedy, then search, over five ranks; then greedy over each rank's microbatches

    class Counted(planning._Search):
        def _put(self, sample, part):
            looked_at.append(sample)
            assert len(looked_at) <= most
            super()._put(sample, part)

    monkeypatch.setattr(planning, "_Search", Counted)
    monkeypatch.setattr(planning, "_SEARCH_STEPS", 300)
    plan = plan_microbatches([n * n for n in range(31, 79, 3)], dp=5, token_budget=10**6)
    assert sorted(itertools.chain(*itertools.chain(*plan))) == list(range(16)) and len(looked_at) == most


def test_a_ranks_microbatches_come_costliest_first():
    (plan,) = plan_microbatches([1, 2, 9, 3, 8], dp=1, token_budget=9)
    assert [sum([1, 2, 9, 3, 8][i] for i in micro) for micro in plan] == [9, 8, 6]


def optimum(costs: list[int], parts: int, lengths: list[int] | None = None, budget: int = 0) -> float:
    """The lowest possible cost of the costliest part over all assignments of items to parts; infinite if none keeps the budget.

    Dynamic programming over subsets: of all ways to fill the first parts with a subset, only the best matters.
    """
    subsets = range(1 << len(costs))
    price = [sum(c for i, c in enumerate(costs) if some >> i & 1) for some in subsets]
    if lengths is not None:
        for some in subsets:
            if some.bit_count() > 1 and sum(n for i, n in enumerate(lengths) if some >> i & 1) > budget:
                price[some] = float("inf")
    best = list(price)
    for _ in range(parts - 1):
        found = []
        for some in subsets:
            least, part = float("inf"), some
            while True:
                least = min(least, max(price[part], best[some ^ part]))
                if part == 0:
                    break
                part = (part - 1) & some
            found.append(least)
        best = found
    return best[-1]


HARD = [
    ([83, 97, 98, 61, 74, 92, 80], 3, 274),
    ([118, 96, 106, 82, 116, 67, 65, 82, 69, 71], 3, 231),
    ([71, 86, 80, 72, 74, 91, 82], 2, 303),
    ([98, 94, 106, 79, 60, 108, 101, 67, 107, 68, 90, 90], 2, 270),
]
"""Cases in which greedy assignment, longest first into the cheapest part, is 10% off or needs a microbatch more."""


def instances(count: int) -> list[tuple[list[int], int, int]]:
    """(lengths, dp, token budget): up to 12 samples, some far longer than others."""
    generator = torch.Generator().manual_seed(7)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    def length() -> int:
        return number(100, 400) if number(0, 4) == 0 else number(1, 100)

    sizes = [8, 9, 10, 11, 12] * count
    return [([length() for _ in range(sizes[i])], number(1, 5), number(150, 500)) for i in range(count)]


@pytest.mark.parametrize(("lengths", "dp", "budget"), [*instances(10), *HARD])
def test_ranks_and_microbatches_are_within_five_percent_of_the_exact_optimum(lengths, dp, budget):
    costs = [cost(n) for n in lengths]
    plan = plan_microbatches(lengths, dp=dp, token_budget=budget, costs=costs)

    def total(samples) -> int:
        return sum(costs[i] for i in samples)

    assert max(total(itertools.chain(*rank)) for rank in plan) <= 1.05 * optimum(costs, dp)
    fewer = []
    for rank in plan:
        own = sorted(itertools.chain(*rank))
        problem = [costs[i] for i in own], [lengths[i] for i in own]
        assert max(map(total, rank)) <= 1.05 * optimum(problem[0], len(rank), problem[1], budget)
        fewer.append(optimum(problem[0], len(rank) - 1, problem[1], budget) if len(rank) > 1 else float("inf"))
    # At least one rank needs all of its microbatches.
    assert max(fewer) == float("inf")


def test_a_step_of_two_thousand_long_samples_is_planned_in_seconds():
    # Every rank plans all of them, once for the old log-probs and again for every minibatch.
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1000, 9000, (2048,), generator=generator).tolist()
    start = time.process_time()
    plan = plan_microbatches(lengths, dp=2, token_budget=9216, costs=[n * (n + 20_000) for n in lengths])
    assert time.process_time() - start < 3
    assert len(plan[0]) <= 1.2 * sum(lengths) / 2 / 9216


def test_attention_makes_a_long_sequence_costlier_than_short_ones_of_as_many_tokens(hf_models):
    arch = read_architecture(hf_models["qwen3"])
    long, short = sequence_flops(arch, 96, 0), 4 * sequence_flops(arch, 24, 0)
    # Causal attention: two products of 2 n (n + 1) / 2 heads x width each, for 96 tokens and for four times 24.
    assert long - short == arch.layers * 2 * arch.heads * arch.head_dim * (96 * 97 - 4 * 24 * 25)


def test_flops_are_those_of_the_parameters_that_a_token_meets(hf_models):
    for family in ("qwen3", "qwen3_moe_dense"):
        arch = read_architecture(hf_models[family])
        # By hand: q, k, v and o of 4, 2, 2 and 4 heads of 16, the gated MLP of 80, three of six experts of 28 and their router.
        attention, dense, experts = 48 * 16 * 12, 3 * 48 * 80, 3 * 3 * 48 * 28 + 6 * 48
        layers = 4 * attention + (4 * dense if family == "qwen3" else 3 * dense + experts)
        assert sequence_flops(arch, 1, 1) == 2 * layers + 4 * 4 * 4 * 16 + 2 * 48 * 301
