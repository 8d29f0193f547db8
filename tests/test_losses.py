"""Every policy loss: values and gradients against NumPy, splits and chunks, and extremes."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from etr_megatron.config import LOSSES, PRESETS
from etr_megatron.errors import UserError
from etr_megatron.objective import (
    PASS_RATE_BINS,
    LossOutputs,
    LossSettings,
    diagnostic_sums,
    loss_names,
    losses,
    read_sums,
    resolve_loss,
)
from etr_megatron.policy import PolicyBatch
from etr_megatron.policy.loss_inputs import loss_inputs
from etr_megatron.policy.microbatch_plan import plan_microbatches
from etr_megatron.policy.packing import Microbatch, pack
from tests.loss_cases import Case, random_case, reference
from tests.policy_jobs import make_batch

SETTINGS = {
    "plain": LossSettings(),
    "entropy": LossSettings(entropy_coef=0.1),
    "k1": LossSettings(kl_coef=0.3, kl_estimator="k1"),
    "k2": LossSettings(kl_coef=0.3, kl_estimator="k2"),
    "k3_and_entropy": LossSettings(kl_coef=0.3, kl_estimator="k3", entropy_coef=0.2),
}
LOCAL = [name for name in LOSSES if resolve_loss(name).token_local]


def evaluate(name: str, case: Case, logp: np.ndarray, entropy: np.ndarray) -> tuple[LossOutputs, np.ndarray, np.ndarray]:
    """Outputs, and the derivatives with respect to log-probs and entropies."""
    x, h = (torch.tensor(values, requires_grad=True) for values in (logp, entropy))
    outputs = resolve_loss(name)(case.inputs(x, h))
    d_logp, d_entropy = torch.autograd.grad(outputs.loss, (x, h), allow_unused=True)
    return outputs, d_logp.numpy(), np.zeros_like(entropy) if d_entropy is None else d_entropy.numpy()


def assert_equals_reference(name: str, case: Case, logp: np.ndarray, entropy: np.ndarray) -> None:
    outputs, *gradients = evaluate(name, case, logp, entropy)
    loss, *wanted = reference(name, case, logp, entropy)
    assert outputs.loss.item() == pytest.approx(loss, abs=1e-12, rel=1e-12)
    for found, expected in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-12, rtol=1e-12)


def test_the_configs_and_the_presets_losses_are_the_registrys() -> None:
    assert tuple(sorted(LOSSES)) == loss_names()
    assert {values["loss"] for values in PRESETS.values()} == set(LOSSES)
    assert all(resolve_loss(name).name == name for name in LOSSES)
    assert LOCAL == ["clipped", "cispo", "reinforce"]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("which", SETTINGS)
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradients_equal_the_numpy_reference(name: str, which: str, seed: int) -> None:
    assert_equals_reference(name, *random_case(seed, SETTINGS[which]))


@pytest.mark.parametrize("seed", range(3))
def test_dual_clip_bounds_the_loss_of_exploding_ratios(seed: int) -> None:
    case, logp, entropy = random_case(seed, LossSettings(dual_clip=1.5), spread=1.5)
    case.rows["advantage"][case.index == 2] = 0.0  # no bound stops the gradient here
    assert_equals_reference("clipped", case, logp, entropy)
    stopped = evaluate("clipped", case, logp, entropy)[0].rows["dual_clip"].numpy()
    ratio = np.exp(logp - case.rows["old_logp"])
    np.testing.assert_array_equal(stopped, (case.rows["advantage"] < 0) & (ratio > 1.5))
    assert stopped.any() and (ratio[case.index == 2] > 1.5).any()


# CISPO holds its ratio constant, which finite differences do not: tested below.
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "cispo"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    case, logp, entropy = random_case(4, LossSettings(kl_coef=0.3, entropy_coef=0.2), lengths=(3, 2, 4))
    x, h = (torch.tensor(values, requires_grad=True) for values in (logp, entropy))
    assert torch.autograd.gradcheck(lambda a, b: resolve_loss(name)(case.inputs(a, b)).loss, (x, h))


def test_cispos_gradient_is_that_of_finite_differences_with_its_factor_frozen() -> None:
    case, logp, entropy = random_case(4, LossSettings(kl_coef=0.3, entropy_coef=0.2), lengths=(3, 2, 4))
    _, gradient, _ = evaluate("cispo", case, logp, entropy)
    ratio = torch.tensor(np.exp(logp - case.rows["old_logp"]))
    assert (ratio > 1 + torch.tensor(case.rows["clip_high"])).any()
    step, found = 1e-6, np.zeros_like(logp)
    with mock.patch.object(losses, "importance_ratio", lambda *_: ratio):
        for row in range(len(logp)):
            there, back = (
                resolve_loss("cispo")(case.inputs(torch.tensor(logp + by * np.eye(len(logp))[row]), torch.tensor(entropy)))
                for by in (step, -step)
            )
            found[row] = (there.loss - back.loss).item() / (2 * step)
    np.testing.assert_allclose(gradient, found, atol=1e-8)


def test_at_ratio_one_no_bound_is_active_and_the_gradient_is_plain_policy_gradient() -> None:
    case, _, entropy = random_case(0)
    logp = case.rows["old_logp"]
    plain = -case.rows["weight"] * case.rows["correction"] * case.rows["advantage"]
    for name in LOSSES:
        outputs, gradient, _ = evaluate(name, case, logp, entropy)
        if name == "gspo":  # every token moves the ratio of its whole sequence
            means = [plain[case.index == i].mean() for i in range(len(case.lengths))]
            plain_here = np.array(means)[case.index]
        else:
            plain_here = plain
        np.testing.assert_allclose(gradient, plain_here, atol=1e-12)
        rows = case.inputs(torch.tensor(logp), torch.tensor(entropy))
        sums = read_sums([diagnostic_sums(rows, outputs, torch.zeros(len(logp), dtype=torch.long))])
        assert sums["clip_upper"] == sums["clip_lower"] == 0 and sums["ratio"] == pytest.approx(sums["tokens"])


@pytest.mark.parametrize("name", ["clipped", "gspo"])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_rounding_of_the_ratio_does_not_decide_what_a_radius_of_zero_lets_through(name: str, advantage: float) -> None:
    case, _, entropy = random_case(0, lengths=(1, 1, 1))
    case.rows |= {key: np.zeros(3) for key in ("old_logp", "clip_low", "clip_high")}
    case.rows |= {"weight": np.full(3, 0.5), "correction": np.ones(3), "advantage": np.full(3, advantage)}
    x = torch.tensor([-5e-5, 0.0, 5e-5], requires_grad=True)  # due to low precision or another layout
    inputs = case.inputs(x, torch.tensor(entropy).float(), torch.float32)
    outputs = resolve_loss(name)(inputs)
    (gradient,) = torch.autograd.grad(outputs.loss, x)
    torch.testing.assert_close(gradient, torch.full((3,), -0.5 * advantage), atol=1e-4, rtol=0)
    sums = read_sums([diagnostic_sums(inputs, outputs, torch.zeros(3, dtype=torch.long))])
    assert sums["clip_upper"] == sums["clip_lower"] == 0
    away = torch.full((3,), 2e-4 * advantage, requires_grad=True)  # in the direction of the advantage
    inputs = case.inputs(away, torch.tensor(entropy).float(), torch.float32)
    outputs = resolve_loss(name)(inputs)
    sums = read_sums([diagnostic_sums(inputs, outputs, torch.zeros(3, dtype=torch.long))])
    assert not torch.autograd.grad(outputs.loss, away)[0].any() and sums["clip_upper"] + sums["clip_lower"] == 3


@settings(max_examples=25, deadline=None)
@given(name=st.sampled_from(LOSSES), seed=st.integers(0, 10_000), order=st.permutations(range(5)), cut=st.integers(1, 4))
def test_nothing_depends_on_sample_order_or_on_the_split_over_microbatches(name, seed, order, cut) -> None:
    case, logp, entropy = random_case(seed, LossSettings(kl_coef=0.3, entropy_coef=0.2))
    whole, gradient, _ = evaluate(name, case, logp, entropy)
    total, found = 0.0, np.zeros_like(gradient)
    for samples in (list(order[:cut]), list(order[cut:])):
        rows = np.concatenate([np.flatnonzero(case.index == sample) for sample in samples])
        part, found[rows], _ = evaluate(name, case.part(samples), logp[rows], entropy[rows])
        total += part.loss.item()
    assert total == pytest.approx(whole.loss.item(), abs=1e-12)
    np.testing.assert_allclose(found, gradient, atol=1e-14)


VOCAB, WIDTH = 11, 6


def packed_loss(name: str, batch: PolicyBatch, microbatches: list[Microbatch]) -> tuple[float, list[torch.Tensor]]:
    """Float64 loss over all microbatches and its gradients; the policy is token and position embeddings and a head."""
    generator = torch.Generator().manual_seed(0)
    sizes = (VOCAB, 64, VOCAB)
    embedding, places, head = (torch.randn(n, WIDTH, generator=generator, dtype=torch.float64).requires_grad_() for n in sizes)
    options = LossSettings(kl_coef=0.3, entropy_coef=0.2, dual_clip=2.0)
    total = 0.0
    for micro in microbatches:
        states = torch.tanh(embedding[micro.tokens[0]] + places[micro.positions[0]])
        log_p = torch.log_softmax(0.5 * states[micro.rows] @ head.t(), -1)
        logp, entropy = log_p.gather(1, micro.targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
        total = total + resolve_loss(name)(loss_inputs(batch, micro, options).at(slice(None), logp, entropy)).loss
    return total.item(), list(torch.autograd.grad(total, (embedding, places, head)))


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(LOSSES),
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 6)), min_size=1, max_size=7),
    ranks=st.integers(1, 3),
    budget=st.integers(1, 40),
    multiple=st.integers(1, 50),
    seed=st.integers(0, 1000),
)
def test_padding_and_the_split_over_microbatches_change_neither_loss_nor_gradient(name, sizes, ranks, budget, multiple, seed):
    """sizes: tokens of each prompt and response; multiple: microbatches are padded to a multiple of it."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(0, VOCAB, (sum(size),), generator=generator).tolist() for size in sizes]
    sequences = [(ids[:prompt], ids[prompt:]) for ids, (prompt, _) in zip(tokens, sizes, strict=True)]
    responses = [response for _, response in sizes]
    assume(sum(responses))

    def near() -> tuple[torch.Tensor, ...]:
        return tuple(-2.4 + 0.5 * torch.randn(n, generator=generator) for n in responses)

    correction = tuple(2 * torch.rand(n, generator=generator) for n in responses)
    batch = replace(make_batch(sequences, seed), old_logp=near(), ref_logp=near(), correction=correction)
    cpu = torch.device("cpu")
    plan = plan_microbatches([sum(size) for size in sizes], dp=ranks, token_budget=budget)
    split = [pack(sequences, numbers, multiple=multiple, device=cpu) for rank in plan for numbers in rank]
    wanted, gradients = packed_loss(name, batch, [pack(sequences, range(len(sizes)), multiple=1, device=cpu)])
    loss, found = packed_loss(name, batch, split)
    assert loss == pytest.approx(wanted, abs=1e-12, rel=1e-12)
    for one, expected in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, expected, atol=1e-12, rtol=1e-12)


@settings(max_examples=25, deadline=None)
@given(name=st.sampled_from(LOCAL), seed=st.integers(0, 10_000), ends=st.sets(st.integers(1, 17)))
def test_chunks_of_a_token_local_loss_add_up(name, seed, ends) -> None:
    case, logp, entropy = random_case(seed, LossSettings(kl_coef=0.3, entropy_coef=0.2, dual_clip=2.0))
    whole, gradient, _ = evaluate(name, case, logp, entropy)
    known = case.inputs(torch.tensor(logp), torch.tensor(entropy))
    total, pieces = 0.0, []
    for start, end in zip([0, *sorted(ends)], [*sorted(ends), len(logp)], strict=True):
        x = torch.tensor(logp[start:end], requires_grad=True)
        outputs = resolve_loss(name)(known.at(slice(start, end), x, torch.tensor(entropy[start:end])))
        pieces.append(torch.autograd.grad(outputs.loss, x)[0].numpy())
        total += outputs.loss.item()
    assert total == pytest.approx(whole.loss.item(), abs=1e-12)
    np.testing.assert_array_equal(np.concatenate(pieces), gradient)


def test_a_chunk_has_no_sequences_to_sum() -> None:
    case, logp, entropy = random_case(0)
    known = case.inputs(torch.tensor(logp), torch.tensor(entropy))
    chunk = known.at(slice(0, 3), known.logp[:3], known.entropy[:3])
    for rows in (chunk, chunk.at(slice(None), chunk.logp, chunk.entropy)):
        with pytest.raises(UserError, match="marked token-local uses sums over sequences"):
            resolve_loss("gspo")(rows)


def test_what_sums_sequences_over_ranks_is_kept_when_the_policys_values_are_filled_in() -> None:
    case, logp, entropy = random_case(0)
    whole = case.inputs(torch.tensor(logp), torch.tensor(entropy))
    of_three = replace(whole, sequences=replace(whole.sequences, reduce=lambda sums: 3 * sums))
    found = of_three.at(slice(None), whole.logp, whole.entropy).sequences.mean(whole.logp)
    torch.testing.assert_close(found, 3 * whole.sequences.mean(whole.logp))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_log_ratio_is_bounded_and_has_no_gradient_beyond(name: str, estimator: str) -> None:
    options = LossSettings(log_ratio_bound=2.0, kl_coef=0.3, kl_estimator=estimator)
    log_ratios = np.array([-5.0, -2.0, -0.5, 0.5, 2.0, 5.0])
    for sign in (-1.0, 1.0):
        case, _, entropy = random_case(0, options, lengths=(1,) * 6)
        case.rows["old_logp"] = np.full(6, -8.0)
        case.rows["ref_logp"] = case.rows["old_logp"] + np.roll(log_ratios, 2)
        case.rows["advantage"] = sign * np.abs(case.rows["advantage"])
        assert_equals_reference(name, case, case.rows["old_logp"] + log_ratios, entropy)
    if name in ("clipped", "gspo"):
        plain = replace(case, settings=LossSettings(log_ratio_bound=2.0), rows={**case.rows, "clip_low": np.full(6, 0.9)})
        _, gradient, _ = evaluate(name, plain, plain.rows["old_logp"] + log_ratios, entropy)
        assert (gradient != 0).tolist() == [False, True, True, False, False, False]


@pytest.mark.parametrize("name", LOSSES)
def test_huge_log_ratios_and_no_rows_stay_finite(name: str) -> None:
    far = LossSettings(kl_coef=1.0, entropy_coef=0.1)
    case, _, entropy = random_case(0, far, lengths=(1, 1, 1, 1))
    case.rows["old_logp"] = np.array([-2000.0, 0.0, -2000.0, 0.0])
    case.rows["ref_logp"] = np.array([0.0, -2000.0, -2000.0, 0.0])
    case.rows["advantage"] = np.array([1.0, 1.0, -1.0, -1.0])
    logp = np.array([0.0, -2000.0, 0.0, -2000.0])
    outputs, gradient, _ = evaluate(name, case, logp, entropy)
    assert torch.isfinite(outputs.loss) and np.isfinite(gradient).all()
    assert_equals_reference(name, case, logp, entropy)
    outputs, gradient, _ = evaluate(name, *random_case(0, far, lengths=(0,)))
    assert outputs.loss.item() == 0 and len(gradient) == 0


def test_sequences_without_tokens_have_mean_zero() -> None:
    case, logp, entropy = random_case(0, lengths=(3, 0, 2))
    outputs, gradient, _ = evaluate("gspo", case, logp, entropy)
    assert torch.isfinite(outputs.loss) and np.isfinite(gradient).all()
    means = case.inputs(torch.tensor(logp), torch.tensor(entropy)).sequences.mean(torch.tensor(logp))
    np.testing.assert_allclose(means.numpy(), [logp[:3].mean(), 0.0, logp[3:].mean()])


def test_correction_leaves_kl_and_entropy_alone() -> None:
    case, logp, entropy = random_case(0, LossSettings(kl_coef=0.3, entropy_coef=0.2))
    case.rows["correction"] = np.zeros_like(logp)
    loss, d_logp, d_entropy = reference("clipped", case, logp, entropy)
    assert np.abs(d_logp).min() > 0 and np.abs(d_entropy).min() > 0
    assert_equals_reference("clipped", case, logp, entropy)
    without = replace(case, rows={**case.rows, "advantage": np.zeros_like(logp)})
    assert evaluate("clipped", without, logp, entropy)[0].loss.item() == pytest.approx(loss)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_diagnostics_are_sums_over_rows_overall_and_by_bin(name: str, estimator: str) -> None:
    options = LossSettings(kl_estimator=estimator, log_ratio_bound=0.7)
    case, logp, entropy = random_case(93, options, lengths=(5, 1, 7, 3, 2, 6, 4))
    r, bins = case.rows, np.array([-1, 2, 0, 0, 3, 2, 3])[case.index]
    r["advantage"][np.isin(case.index, (2, 5))] = 0.0  # no bound stops their gradient
    inputs = case.inputs(torch.tensor(logp), torch.tensor(entropy))
    sums = read_sums([diagnostic_sums(inputs, resolve_loss(name)(inputs), torch.tensor(bins))])
    ratio = np.exp(np.clip(logp - r["old_logp"], -0.7, 0.7))
    if name == "gspo":
        means = np.array([(logp - r["old_logp"])[case.index == i].mean() for i in range(len(case.lengths))])
        ratio = np.exp(np.clip(means, -0.7, 0.7))[case.index]
    above, below = ratio > 1 + r["clip_high"], ratio < 1 - r["clip_low"]
    gains, loses = r["advantage"] > 0, r["advantage"] < 0
    assert all((rows & sign).any() for rows in (above, below) for sign in (gains, loses, ~(gains | loses)))
    if name in ("clipped", "gspo"):
        above, below = above & gains, below & loses
    if name == "reinforce":
        above, below = np.zeros_like(above), np.zeros_like(below)
    x = r["ref_logp"] - logp
    bounded, off = (np.clip(log_ratio, -0.7, 0.7) for log_ratio in (x, logp - r["rollout_logp"]))
    assert (x != bounded).any()
    rows = {
        "tokens": np.ones_like(logp),
        "entropy": entropy,
        "ratio": ratio,
        "ratio_squared": ratio**2,
        "clip_upper": above,
        "clip_lower": below,
        "clip_radius": (r["clip_low"] + r["clip_high"]) / 2,
        "kl": {"k1": -x, "k2": x**2 / 2, "k3": np.exp(bounded) - 1 - bounded}[estimator],
        "gap": np.abs(logp - r["rollout_logp"]),
        "mismatch": np.exp(off) - 1 - off,
    }
    wanted = {key: values.sum() for key, values in rows.items()}
    for place, bin_name in enumerate(PASS_RATE_BINS):
        wanted |= {f"{key}_{bin_name}": values[bins == place].sum() for key, values in rows.items()}
    assert sums == pytest.approx(wanted)
    alone = replace(inputs, ref_logp=None)
    assert read_sums([diagnostic_sums(alone, resolve_loss(name)(alone), torch.tensor(bins))])["kl"] == 0.0
