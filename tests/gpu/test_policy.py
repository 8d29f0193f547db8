"""The policy with Transformer Engine's layers: log-probs against transformers, an update in bf16 and in every FP8 recipe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.gpu_device import RECIPES, recipes_left_out
from benchmarks.gpu_policy import make_batch
from tests.gpu.conftest import DEVICE
from tests.gpu.policies import build, sequences, write_model
from tests.rollout_jobs import gaps_of_experts

LEFT_OUT = recipes_left_out(DEVICE)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("qwen3") / "model", tied=request.param)


def by_transformers(model: str, pairs: list, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Log-probs of all response tokens, one unpadded sequence at a time."""
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval()
    found = []
    with torch.no_grad():
        for prompt, response in pairs:
            logits = hf(torch.tensor([prompt + response], device=device)).logits[0, len(prompt) - 1 : -1].double()
            found.append(torch.log_softmax(logits, -1).gather(1, torch.tensor(response, device=device)[:, None])[:, 0].cpu())
    return torch.cat(found)


def padded_logprobs(policy, pairs: list, device: torch.device) -> torch.Tensor:
    """The same with the policy's layers on a right-padded batch, without packing."""
    longest = max(len(prompt) + len(response) for prompt, response in pairs)
    tokens = torch.tensor([[*p, *r, *[0] * (longest - len(p) - len(r))] for p, r in pairs], device=device)
    (chunk,) = policy.chunks
    with torch.no_grad():
        hidden = chunk(tokens, torch.arange(longest, device=device).expand_as(tokens), None).transpose(0, 1)
        logits = (hidden @ chunk.head_weight().t())[..., : policy.arch.vocab_size].double()
    found = []
    for row, (prompt, response) in zip(torch.log_softmax(logits, -1).cpu(), pairs, strict=True):
        here = row[len(prompt) - 1 : len(prompt) + len(response) - 1]
        found.append(here.gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(found)


def test_logprobs_are_as_near_to_float32_as_those_of_transformers_in_bf16(world, device, model):
    pairs = sequences()
    exact = by_transformers(model, pairs, torch.float32, torch.device("cpu"))
    limit = 2 * (by_transformers(model, pairs, torch.bfloat16, device) - exact).abs().mean()
    assert 0 < limit < 0.1
    found = {
        "packed": torch.cat(build(model, "train.tokens_per_microbatch=600").logprobs(pairs).logp),
        "one sequence a microbatch": torch.cat(build(model, "train.tokens_per_microbatch=1").logprobs(pairs).logp),
        "padded": padded_logprobs(build(model), pairs, device),
    }
    for name, logp in found.items():
        gap = (logp.double() - exact).abs()
        assert gap.mean() < limit, f"{name}: mean gap {gap.mean():.2e}, limit {limit:.2e}"
        assert gap.max() < 20 * limit, f"{name}: largest gap {gap.max():.2e}"


@pytest.mark.parametrize(("family", "layers"), [("qwen3_moe", 3), ("glm4_moe", 2), ("deepseek_v3", 2)])
def test_a_mixture_of_experts_has_the_maps_names_and_logprobs_as_near_to_float32_as_transformers(
    world, device, tmp_path, family, layers
):
    """Building it compares all names and shapes with the weight map, also for Transformer Engine's grouped experts."""
    model, pairs = write_model(tmp_path / "model", family), sequences()
    exact = by_transformers(model, pairs, torch.float32, torch.device("cpu"))
    limit = 2 * (by_transformers(model, pairs, torch.bfloat16, device) - exact).abs().mean()
    assert 0 < limit < 0.2
    policy = build(model)
    names = [name for chunk in policy.chunks for name, _ in chunk.named_parameters() if ".experts." in name]
    assert len(names) >= layers * 2 * (5 if device.type == "cuda" else 1)  # matrices, and experts if grouped
    gap = (torch.cat(policy.logprobs(pairs).logp).double() - exact).abs().mean()
    assert gap < limit, f"mean gap {gap:.2e}, limit {limit:.2e}"


def test_with_the_engines_experts_logprobs_are_nearer_to_the_engines(world, device, tmp_path):
    model, prompts = write_model(tmp_path / "model", "qwen3_moe"), [prompt for prompt, _ in sequences()]
    own, replayed = gaps_of_experts(build(model), model, prompts, device)
    print(f"gaps with experts of their own {own}, with the engine's {replayed}")
    assert 0 < replayed["mean"] < own["mean"] and replayed["p99"] < own["p99"]


def test_layers_are_transformer_engines(world, device, model):
    if device.type != "cuda":
        pytest.skip("Transformer Engine needs a GPU")
    (chunk,) = build(model).chunks
    kinds = {type(module).__module__ for module in chunk.modules()}
    assert any("transformer_engine" in kind for kind in kinds)


def test_the_memory_of_an_update_is_the_peak_since_the_last_one(world, device, model):
    if device.type != "cuda":
        pytest.skip("only GPU memory is counted")
    policy, pairs = build(model), sequences()
    batch = promote_all(pairs, policy.logprobs(pairs).logp)
    policy.update(batch)
    held = torch.empty(8 << 30, dtype=torch.uint8, device=device)
    del held
    before, after = (policy.update(batch).memory for _ in range(2))
    assert before["memory_allocated_gib"] > 8 > after["memory_allocated_gib"] > 0
    assert all(each["memory_allocated_gib"] <= each["memory_reserved_gib"] for each in (before, after))


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "glm4_moe", "deepseek_v3"])
@pytest.mark.parametrize("recipe", ["none", *RECIPES])
def test_updates_lower_the_loss_and_logprobs_stay_near_those_of_bf16(world, device, tmp_path, recipe, family):
    if recipe in LEFT_OUT:
        pytest.skip(f"{recipe}: {LEFT_OUT[recipe]}")
    if device.type != "cuda" and family != "qwen3_moe":
        pytest.skip("on CPU one family shows that the test works; tests/test_policy_training.py has the others")
    model, pairs = write_model(tmp_path / "model", family), sequences()
    baseline = torch.cat(build(model).logprobs(pairs).logp)
    # The first update has learning rate 0: delayed scaling needs one step to see the largest values.
    policy = build(
        model, f"fp8.recipe={recipe}", "train.lr=1e-4", "train.lr_warmup_updates=1", "train.tokens_per_microbatch=600"
    )
    first = policy.update(promote_all(pairs, policy.logprobs(pairs).logp))
    assert first.lr == 0 and first.grad_norm > 0
    old = policy.logprobs(pairs).logp
    gap = (torch.cat(old) - baseline).abs().mean()
    # A gap of exactly 0 would mean that it is bf16 after all.
    assert gap < 0.3 and (recipe == "none" or gap > 0)
    batch = promote_all(pairs, old)
    losses = [policy.update(batch).loss for _ in range(6)]
    assert all(abs(loss) < 100 for loss in losses)
    assert losses[-1] < losses[0] - 0.05, losses
    assert torch.isfinite(torch.cat(policy.logprobs(pairs).logp)).all()


@pytest.mark.parametrize(("family", "offloaded"), [("qwen3", False), ("qwen3_moe", True), ("deepseek_v3", True)])
@pytest.mark.parametrize("recipe", ["none", "blockwise"])
def test_updates_of_adapters_lower_the_loss_and_change_only_what_they_adapt(world, device, tmp_path, recipe, family, offloaded):
    if recipe in LEFT_OUT:
        pytest.skip(f"{recipe}: {LEFT_OUT[recipe]}")
    if device.type != "cuda" and family != "qwen3":
        pytest.skip("on CPU one family shows that the test works; tests/test_policy_adapters.py has the others")
    model, pairs = write_model(tmp_path / "model", family), sequences()
    overrides = [f"fp8.recipe={recipe}", "train.lr=3e-3", "train.tokens_per_microbatch=600", "lora.rank=8"]
    overrides.append(f"lora.offload_base={str(offloaded).lower()}")
    policy = build(model, "objective.kl_coef=0.01", *overrides)
    before = {name: tensor.cpu() for name, tensor in policy.export()}
    batch = promote_all(pairs, policy.logprobs(pairs).logp)
    with experts_in_order():
        first = policy.logprobs(pairs, reference=True).logp
    losses = [policy.update(replace(batch, ref_logp=first)).loss for _ in range(3)]
    assert losses[-1] < losses[0] - 0.05, losses
    with experts_in_order():
        again = policy.logprobs(pairs, reference=True).logp
    assert all(torch.equal(*both) for both in zip(first, again, strict=True))
    adapted = {name.removeprefix("lora.").removesuffix(".A") + ".weight" for name in policy.adapters.named()}
    for name, tensor in policy.export():
        assert torch.equal(before[name], tensor.cpu()) is not (name in adapted), name
    buffers = [name for chunk in policy.chunks for name, one in chunk.named_parameters() if hasattr(one, "main_grad")]
    assert buffers and all(name.startswith("adapters.") for name in buffers)


@contextmanager
def experts_in_order() -> Iterator[None]:
    """Unless torch is to be deterministic, Megatron sums what a token's experts return in whichever order they come; of three
    and more, the sum in bf16 depends on it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def promote_all(pairs: list, old: tuple[torch.Tensor, ...]):
    """A batch in which every sample should become likelier, with bounds that a few updates do not reach."""
    batch = make_batch(pairs, old)
    return replace(batch, advantage=torch.ones(len(batch)), clip_high=torch.full((len(batch),), 50.0))
