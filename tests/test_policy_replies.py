"""Responses with replies between the model's turns: log-probs, losses and gradients are of what the model drew, in every
layout, against transformers and against the same policy with the replies' terms set to zero."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from etr_megatron.types import TokenSequence
from tests import test_policy_gradients, test_policy_logprobs
from tests.hf_models import by_published_names, random_sequences
from tests.policy_jobs import build, make_batch, with_replies
from tests.test_policy_gradients import BASE, TEMPERATURE

LAYOUTS = {
    "tp1": (1, ["parallel.tp=1"]),
    "tp2_sp": (2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    "pp2": (2, ["parallel.tp=1", "parallel.pp=2"]),
    "dp2": (2, ["parallel.tp=1"]),
    "cp2": (2, ["parallel.tp=1", "parallel.cp=2"]),
    "tp2_sp_cp2": (4, ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.cp=2"]),
}


def drawn(one: TokenSequence) -> torch.Tensor:
    return torch.tensor(one.loss_mask or [1] * len(one.response)).bool()


def sequences() -> list[TokenSequence]:
    return with_replies(random_sequences())


def test_the_cases_have_long_and_short_turns_and_a_response_that_context_parallel_ranks_share():
    masks = ["".join(map(str, one.loss_mask)) for one in sequences()]
    assert any(mask.count("10") > 2 for mask in masks) and masks[0].strip("0") == "" and masks[1][0] == "0"
    assert 0.3 < sum(one.rows for one in sequences()) / sum(len(one.response) for one in sequences()) < 0.8


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprobs_and_entropies_are_transformers_where_the_model_drew(gangs, hf_models, layout):
    world, overrides = LAYOUTS[layout]
    pairs = [one[:2] for one in sequences()]
    wanted = [
        [values[drawn(one)] for values, one in zip(of, sequences(), strict=True)]
        for of in test_policy_logprobs.reference(hf_models["llama"], pairs, temperature=0.7)
    ]
    overrides = [*overrides, "rollout.temperature=0.7", "train.tokens_per_microbatch=64", "train.head_chunk_rows=5"]
    job = dict(model=hf_models["llama"], sequences=sequences(), overrides=overrides)
    for found in gangs(world).run("tests.policy_jobs:logprobs", **job):
        for of, of_transformers in zip(found, wanted, strict=True):
            test_policy_logprobs.assert_close(of, of_transformers)


@pytest.fixture(scope="module")
def clipped(hf_models):
    return test_policy_gradients.reference(hf_models["llama"], sequences())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "way"),
    [*((layout, "single_pass") for layout in LAYOUTS), ("pp2", "recompute"), ("tp2_sp_cp2", "recompute")],
)
def test_gradients_are_of_what_the_model_drew(gangs, hf_models, clipped, layout, way):
    test_policy_gradients.check(gangs, hf_models["llama"], clipped, LAYOUTS[layout], way, sequences())


def test_gradients_of_experts_are_of_what_the_model_drew(gangs, hf_models):
    model = hf_models["qwen3_moe"]
    wanted = test_policy_gradients.reference(model, sequences())
    layout = (2, ["parallel.tp=1", "parallel.ep=2"])
    test_policy_gradients.check(gangs, model, wanted, layout, "single_pass", sequences())


def gspo_reference(model: str, samples: list[TokenSequence]) -> tuple[list[torch.Tensor], float, dict[str, torch.Tensor], int]:
    """(old log-probs, GSPO's loss, its gradients by HF name, number of clipped sequences), by its formula in float64."""
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    batch = make_batch(samples)
    loss, olds, stopped = torch.zeros((), dtype=torch.float64), [], 0
    for i, one in enumerate(samples):
        ids = torch.tensor([*one.prompt, *one.response])
        log_p = torch.log_softmax(hf(ids[None]).logits[0] / TEMPERATURE, -1)
        places = [len(one.prompt) + place for place in drawn(one).nonzero()[:, 0].tolist()]
        logp = torch.stack([log_p[place - 1, ids[place]] for place in places]) if places else torch.zeros(0)
        advantage = batch.advantage[i].double()
        beyond = 0.5 * advantage.sign() if i % 3 == 1 else 0.0  # such that the ratio is outside of its bounds
        olds.append((logp.detach() + 0.15 * (batch.old_logp[i] + 4) - beyond).float())
        if not places:
            continue
        ratio = (sum(logp - olds[-1].double()) / len(places)).exp()
        bounded = ratio.clamp(1 - batch.clip_low[i].double(), 1 + batch.clip_high[i].double())
        stopped += int(ratio * advantage > bounded * advantage)
        loss = loss - len(places) * batch.weight[i].double() * torch.minimum(ratio * advantage, bounded * advantage)
    loss.backward()
    gradients = by_published_names({name: parameter.grad for name, parameter in hf.named_parameters()})
    return olds, loss.item(), gradients, stopped


def gspo_step(model: str, samples: list, old_logp: list, overrides: list[str]) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and Adam's step by HF name."""
    policy = build(model, [*BASE, "objective.preset=gspo", "objective.entropy_coef=0", *overrides])
    before = {name: tensor.clone() for name, tensor in policy.export()}
    loss = policy.update(replace(make_batch(samples), old_logp=tuple(old_logp))).loss
    return loss, {name: before[name] - tensor for name, tensor in policy.export()}


@pytest.mark.parametrize("layout", ["tp1", "pp2", "dp2", "tp2_sp_cp2"])
def test_ratios_of_whole_sequences_are_means_over_what_the_model_drew(gangs, hf_models, layout):
    samples = sequences()
    olds, loss, gradients, stopped = gspo_reference(hf_models["llama"], samples)
    assert 0 < stopped < len(samples)
    world, overrides = LAYOUTS[layout]
    job = dict(model=hf_models["llama"], samples=samples, old_logp=olds, overrides=overrides)
    for found, change in gangs(world).run("tests.test_policy_replies:gspo_step", **job):
        assert found == pytest.approx(loss, rel=1e-5)
        for name, gradient in gradients.items():
            wanted = gradient / (gradient.abs() + 1)
            torch.testing.assert_close(change[name].double(), wanted, atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def loss_and_weights(policy_arguments: tuple[str, list[str]], batches: list) -> list[tuple[float, dict, dict]]:
    """Of an update with each batch, from the same weights: loss, metric sums, weights by HF name."""
    found = []
    for batch in batches:
        policy = build(*policy_arguments)
        update = policy.update(batch)
        found.append((update.loss, update.sums, {name: tensor.clone() for name, tensor in policy.export()}))
    return found


@pytest.mark.parametrize("layout", ["tp1", "cp2"])
def test_it_is_as_if_the_terms_of_replies_were_zero(gangs, hf_models, layout):
    """A weight for off-policy correction of 0 takes a token out of a loss without entropy and KL terms."""
    world, overrides = LAYOUTS[layout]
    masked = make_batch(sequences())

    def spread(values: tuple[torch.Tensor, ...], of_replies: float) -> tuple[torch.Tensor, ...]:
        every = [torch.full((len(one.response),), of_replies) for one in sequences()]
        return tuple(a.masked_scatter(drawn(one), b) for a, one, b in zip(every, sequences(), values, strict=True))

    by_hand = replace(
        masked,
        sequences=tuple(one[:2] for one in sequences()),
        old_logp=spread(masked.old_logp, -3.0),
        rollout_logp=spread(masked.rollout_logp, -2.0),
        correction=spread(tuple(map(torch.ones_like, masked.old_logp)), 0.0),
    )
    arguments = hf_models["llama"], [*BASE, *overrides, "objective.entropy_coef=0"]
    job = dict(policy_arguments=arguments, batches=[masked, by_hand])
    for (loss, sums, weights), (wanted, of_all, others) in gangs(world).run(f"{__name__}:loss_and_weights", **job):
        assert loss == pytest.approx(wanted, rel=1e-6)
        assert sums["tokens"] == sum(one.rows for one in sequences()) < of_all["tokens"]
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, others[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("layout", ["tp1", "cp2"])
def test_without_replies_nothing_changes_bit_for_bit(gangs, hf_models, layout):
    world, overrides = LAYOUTS[layout]
    plain = make_batch(random_sequences())
    ones = replace(plain, sequences=tuple(one._replace(loss_mask=[1] * len(one.response)) for one in plain.sequences))
    assert make_batch(list(ones.sequences)).old_logp[0].equal(plain.old_logp[0])
    job = dict(policy_arguments=(hf_models["llama"], [*BASE, *overrides]), batches=[plain, ones])
    for (loss, sums, weights), (wanted, of_plain, others) in gangs(world).run(f"{__name__}:loss_and_weights", **job):
        assert loss == wanted and sums == of_plain
        assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())


def error_of_an_update(model: str, samples: list) -> str:
    """The error of an update whose sixth sample has an old log-prob that is not a number."""
    batch = make_batch(samples)
    batch.old_logp[5][2] = float("nan")
    with pytest.raises(FloatingPointError) as error:
        build(model, ["parallel.tp=1"]).update(batch)
    return str(error.value)


def test_a_value_that_is_not_finite_is_named_by_its_place_in_the_whole_response(gangs, hf_models):
    samples = [([5], [6, 7])] * 5 + [TokenSequence([5], [6, 7, 8, 9, 10, 11], [1, 0, 0, 1, 0, 1])]
    (message,) = gangs(1).run(f"{__name__}:error_of_an_update", model=hf_models["llama"], samples=samples)
    assert message == "old_logp is nan at an active token: position 5 in the response of sample g2/1, on rank 0"
