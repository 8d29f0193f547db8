"""The policy's gradients against autograd through transformers, for every way into Megatron's buffers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from etr_megatron.types import TokenSequence
from tests.hf_models import by_published_names, random_sequences
from tests.policy_jobs import build, make_batch

TEMPERATURE, ENTROPY_COEF = 0.8, 0.05
BASE = [
    # With these Adam's step is lr g / (|g| + 1) in every update, so the weights show the gradients one to one.
    *("train.lr=1", "train.adam_eps=1", "train.adam_beta1=0", "train.adam_beta2=0", "train.clip_grad=0"),
    *("train.head_chunk_rows=7", "train.tokens_per_microbatch=90"),
    *(f"rollout.temperature={TEMPERATURE}", f"objective.entropy_coef={ENTROPY_COEF}"),
]
LAYOUTS = {
    "tp1": (1, ["parallel.tp=1"]),
    "tp2_sp": (2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    "pp2": (2, ["parallel.tp=1", "parallel.pp=2"]),
    "dp2_overlapped_reduction": (2, ["parallel.tp=1", "train.overlap_grad_reduce=true"]),
    "dp2_overlapped_distributed_optimizer": (
        2,
        ["parallel.tp=1", "train.overlap_grad_reduce=true", "train.distributed_optimizer=true"],
    ),
    "pp2_vpp2_overlapped_reduction": (
        2,
        [
            *("parallel.tp=1", "parallel.pp=2", "parallel.vpp=2", "train.tokens_per_microbatch=40"),
            "train.overlap_grad_reduce=true",
        ],
    ),
    "pp2_uneven": (2, ["parallel.tp=1", "parallel.pp=2", "parallel.first_stage_layers=3"]),
    "cp2": (2, ["parallel.tp=1", "parallel.cp=2"]),
    "tp2_pp2_overlapped_reduction": (4, ["parallel.tp=2", "parallel.pp=2", "train.overlap_grad_reduce=true"]),
}


def step(model: str, sequences: list, old_logp: list, overrides: list[str], whole_sequences: bool) -> dict[str, torch.Tensor]:
    """Adam's step by HF name. whole_sequences: the loss counts as one that needs whole sequences, so the head recomputes."""
    policy = build(model, [*BASE, *overrides])
    if whole_sequences:
        policy._policy_loss = replace(policy._policy_loss, token_local=False)
    batch = replace(make_batch(sequences), old_logp=tuple(old_logp))
    before = {name: tensor.clone() for name, tensor in policy.export()}
    if policy.config.train.overlap_grad_reduce:
        # Megatron overlaps nothing in its first update, during which it learns when a bucket is complete.
        policy.update(replace(batch, weight=torch.zeros_like(batch.weight)))
        assert all(torch.equal(before[name], tensor) for name, tensor in policy.export())
    policy.update(batch)
    return {name: before[name] - tensor for name, tensor in policy.export()}


def reference(
    model: str, sequences: list, aux_coef: float = 0.0, apart: bool = False
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor], float]:
    """(old log-probs near the model's own, gradients of the clipped loss by HF name, share of clipped tokens).

    aux_coef: weight of the experts' balancing loss over the tokens of all sequences; apart: over those of each sequence,
    weighted by its tokens.
    """
    # The grouped matrix products of transformers do not support float64.
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, experts_implementation="eager")
    batch = make_batch(sequences)
    routed: dict[str, list[torch.Tensor]] = {}
    for name, module in hf.named_modules():
        if type(module).__name__ == "Qwen3MoeTopKRouter":
            module.register_forward_hook(lambda _m, _i, out, name=name: routed.setdefault(name, []).append(out[0]))
    loss, olds, clipped = 0.0, [], 0
    for i, (prompt, response, mask) in enumerate(TokenSequence(*one) for one in sequences):
        drawn = torch.tensor(mask or [1] * len(response)).bool()
        logits = hf(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1][drawn] / TEMPERATURE
        log_p = torch.log_softmax(logits, -1)
        logp = log_p.gather(1, torch.tensor(response)[drawn][:, None])[:, 0]
        entropy = -(log_p.exp() * log_p).sum(-1)
        olds.append((logp.detach() + 0.15 * (batch.old_logp[i] + 4)).float())
        ratio, advantage = (logp - olds[-1].double()).exp(), batch.advantage[i].double()
        bounded = ratio.clamp(1 - batch.clip_low[i].double(), 1 + batch.clip_high[i].double())
        surrogate = torch.minimum(ratio * advantage, bounded * advantage)
        clipped += int((ratio * advantage > bounded * advantage).sum())
        loss = loss - (batch.weight[i].double() * (surrogate + ENTROPY_COEF * entropy)).sum()
    tokens = sum(len(one[0]) + len(one[1]) for one in sequences)
    balanced = (logits for parts in routed.values() for logits in (parts if apart else [torch.cat(parts)]))
    for logits in balanced if aux_coef else ():
        chosen = logits.topk(hf.config.num_experts_per_tok).indices
        share = torch.nn.functional.one_hot(chosen, logits.shape[1]).double().mean((0, 1))
        unevenness = logits.shape[1] * (share * logits.softmax(-1).mean(0)).sum()
        loss = loss + aux_coef * len(logits) / tokens * unevenness
    loss.backward()
    gradients = by_published_names({name: parameter.grad for name, parameter in hf.named_parameters()})
    return olds, gradients, clipped / sum(len(old) for old in olds)


@pytest.fixture(scope="module")
def references(hf_models):
    done = {}

    def get(family: str) -> tuple:
        if family not in done:
            done[family] = reference(hf_models[family], random_sequences())
        return done[family]

    return get


MIXTURES = {
    "tp1": (1, ["parallel.tp=1"]),
    "ep2": (2, ["parallel.tp=1", "parallel.ep=2"]),
    "ep2_distributed_optimizer": (2, ["parallel.tp=1", "parallel.ep=2", "train.distributed_optimizer=true"]),
    "tp2_sp": (2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    # Both tensor-parallel ranks have whole experts but see different tokens.
    "tp2_sp_etp1": (2, ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.etp=1"]),
    "tp2_sp_ep2_etp1": (2, ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.ep=2", "parallel.etp=1"]),
    "pp2": (2, ["parallel.tp=1", "parallel.pp=2"]),
    "tp2_sp_ep2_overlapped_distributed_optimizer": (
        4,
        [
            *("parallel.tp=2", "parallel.sequence_parallel=true", "parallel.ep=2"),
            *("train.overlap_grad_reduce=true", "train.distributed_optimizer=true"),
        ],
    ),
}


def check(gangs, model: str, reference: tuple, layout: tuple[int, list[str]], way: str, sequences: list | None = None) -> None:
    world, overrides = layout
    olds, gradients, clipped = reference
    assert 0.2 < clipped < 0.8
    for found in gangs(world).run(
        "tests.test_policy_gradients:step",
        model=model,
        sequences=sequences or random_sequences(),
        old_logp=olds,
        overrides=overrides,
        whole_sequences=way == "recompute",
    ):
        assert gradients.keys() <= found.keys()
        for name, gradient in gradients.items():
            wanted = gradient / (gradient.abs() + 1)
            torch.testing.assert_close(found[name].double(), wanted, atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("family", "layout", "way"),
    [
        *(("qwen3_tied", layout, "single_pass") for layout in LAYOUTS),
        *(("llama", layout, "single_pass") for layout in ("tp1", "tp2_sp", "cp2", "pp2_vpp2_overlapped_reduction")),
        *(("qwen3_tied", layout, "recompute") for layout in ("tp2_sp", "cp2", "pp2_vpp2_overlapped_reduction")),
        ("llama", "dp2_overlapped_distributed_optimizer", "recompute"),
        ("llama", "tp2_pp2_overlapped_reduction", "recompute"),
    ],
)
def test_gradients_equal_autograd_through_transformers(gangs, hf_models, references, family, layout, way):
    check(gangs, hf_models[family], references(family), LAYOUTS[layout], way)


@pytest.mark.parametrize("model", ["mistral", "qwen3_yarn"])  # qwen3_yarn: a context extended by YaRN
def test_gradients_of_other_models_equal_autograd_through_transformers(gangs, hf_models, references, model):
    check(gangs, hf_models[model], references(model), LAYOUTS["tp1"], "single_pass")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "layout"),
    [
        *zip(("qwen3_moe", "qwen3_moe_dense", "glm4_moe", "qwen3_moe") * 2, MIXTURES, strict=True),
        # Latents are split in a way of their own.
        *(("deepseek_v3", layout) for layout in ("ep2_distributed_optimizer", "tp2_sp", "tp2_sp_ep2_etp1", "pp2")),
    ],
)
def test_gradients_of_experts_and_router_equal_autograd_through_transformers(gangs, hf_models, references, family, layout):
    gradients = references(family)[1]
    assert all(gradient.abs().max() > 1e-4 for name, gradient in gradients.items() if ".mlp." in name)
    check(gangs, hf_models[family], references(family), MIXTURES[layout], "single_pass")


AUX = 0.3
BALANCED = {
    "tp2_sp_etp1": (2, ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.etp=1"]),
    "cp2_ep2": (2, ["parallel.tp=1", "parallel.cp=2", "parallel.ep=2"]),
    "pp2_cp2": (4, ["parallel.tp=1", "parallel.cp=2", "parallel.pp=2"]),
}


def without_padding(count: int) -> list[tuple[list[int], list[int]]]:
    """Sequences of 16 tokens, which no layout here pads: padding would be routed and counted like any token."""
    return [((prompt * 4)[:4], (response * 12)[:12]) for prompt, response in random_sequences(count)]


@pytest.fixture(scope="module")
def balanced(hf_models):
    sequences = without_padding(6)
    plain, wanted = (reference(hf_models["qwen3_moe"], sequences, coef) for coef in (0.0, AUX))
    router = "model.layers.1.mlp.gate.weight"
    assert (wanted[1][router] - plain[1][router]).abs().max() > 1e-3
    return sequences, wanted


@pytest.mark.parametrize("layout", BALANCED)
def test_the_experts_balancing_loss_of_one_microbatch_equals_its_definition(gangs, hf_models, balanced, layout):
    sequences, wanted = balanced
    world, overrides = BALANCED[layout]
    overrides = [*overrides, f"train.moe_aux_loss_coef={AUX}", "train.tokens_per_microbatch=1000"]
    check(gangs, hf_models["qwen3_moe"], wanted, (world, overrides), "single_pass", sequences)


def test_the_experts_balancing_loss_is_a_mean_over_microbatches(gangs, hf_models):
    # The mean over equal microbatches equals the loss of all in one microbatch.
    sequences = without_padding(2)[:1] * 4
    wanted = reference(hf_models["qwen3_moe"], sequences, AUX)
    overrides = ["parallel.tp=1", f"train.moe_aux_loss_coef={AUX}", "train.tokens_per_microbatch=16"]
    check(gangs, hf_models["qwen3_moe"], wanted, (2, overrides), "single_pass", sequences)


UNEVEN = {
    "tp1": (1, ["parallel.tp=1"]),
    "dp2_tp2_sp_etp1": (4, ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.etp=1"]),
}


@pytest.mark.parametrize("layout", UNEVEN)
def test_microbatches_and_ranks_of_uneven_lengths_count_by_their_tokens_in_the_balancing_loss(gangs, hf_models, layout):
    # No two fit into one microbatch, and two replicas get 28 and 24 tokens.
    lengths = (12, 12, 8, 4)
    sequences = [(prompt, response[:n]) for (prompt, response), n in zip(without_padding(4), lengths, strict=True)]
    wanted = reference(hf_models["qwen3_moe"], sequences, AUX, apart=True)
    router = "model.layers.1.mlp.gate.weight"
    together = reference(hf_models["qwen3_moe"], sequences, AUX)
    assert (wanted[1][router] - together[1][router]).abs().max() > 1e-3
    world, overrides = UNEVEN[layout]
    overrides = [*overrides, f"train.moe_aux_loss_coef={AUX}", "train.tokens_per_microbatch=16"]
    check(gangs, hf_models["qwen3_moe"], wanted, (world, overrides), "single_pass", sequences)


def balance(model: str, sequences: list, overrides: list[str]) -> dict[str, float]:
    """What an update reports about the experts; an earlier one of fewer sequences and log-prob passes must not count."""
    policy = build(model, [*BASE, "train.lr=1e-9", *overrides])  # the earlier one leaves the choice of experts as it is
    for some in (sequences[:2], sequences):
        found = policy.update(replace(make_batch(some), old_logp=policy.logprobs(some).logp)).balance
    return found


SPREAD = {
    "pp2_recomputed": (2, ["parallel.tp=1", "parallel.pp=2", "train.recompute=full"]),
    "tp2_sp_etp1": BALANCED["tp2_sp_etp1"],
    "cp2_ep2": BALANCED["cp2_ep2"],
}


@pytest.mark.parametrize(
    ("family", "layout"), [*(("qwen3_moe", layout) for layout in SPREAD), ("qwen3_moe_dense", "pp2_recomputed")]
)
def test_an_update_says_how_evenly_the_experts_were_chosen_in_every_layout(gangs, hf_models, family, layout):
    # Sequences of two lengths do not share a microbatch: the loss is a mean over tokens, not over microbatches.
    sequences = [(prompt, response[: 12 - 4 * (i % 2)]) for i, (prompt, response) in enumerate(without_padding(4))]
    hf = AutoModelForCausalLM.from_pretrained(hf_models[family], dtype=torch.float64, experts_implementation="eager")
    routed: list[torch.Tensor] = []
    for module in hf.modules():
        if type(module).__name__ == "Qwen3MoeTopKRouter":
            module.register_forward_hook(lambda _m, _i, out: routed.append(out[0].detach()))
    mixtures = {"qwen3_moe": 4, "qwen3_moe_dense": 1}[family]
    chosen, losses = torch.zeros(mixtures, hf.config.num_experts, dtype=torch.float64), []
    for prompt, response in sequences:
        routed.clear()
        hf(torch.tensor([prompt + response]))
        for layer, logits in enumerate(routed):
            share = torch.zeros(logits.shape).scatter(1, logits.topk(hf.config.num_experts_per_tok).indices, 1.0).double()
            chosen[layer] += share.sum(0)
            even = hf.config.num_experts / hf.config.num_experts_per_tok
            losses.append(len(logits) * even * (share.mean(0) * logits.softmax(-1).mean(0)).sum() / len(chosen))
    wanted = {
        "expert_load_imbalance": (chosen.max(1).values / chosen.mean(1)).mean().item(),
        "load_balancing_loss": float(sum(losses)) / sum(len(prompt) + len(response) for prompt, response in sequences),
    }
    world, overrides = SPREAD[layout]
    overrides = [*overrides, f"train.moe_aux_loss_coef={AUX}", "train.tokens_per_microbatch=16"]
    for found in gangs(world).run(
        "tests.test_policy_gradients:balance", model=hf_models[family], sequences=sequences, overrides=overrides
    ):
        assert found == pytest.approx(wanted, rel=1e-5)


def test_without_a_balancing_loss_an_update_reports_none(gangs, hf_models):
    arguments = {"model": hf_models["qwen3_moe"], "sequences": without_padding(2), "overrides": ["parallel.tp=1"]}
    (found,) = gangs(1).run("tests.test_policy_gradients:balance", **arguments)
    assert set(found) == {"expert_load_imbalance"}
