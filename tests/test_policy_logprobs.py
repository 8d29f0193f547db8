"""The policy's log-probs against transformers, in every layout."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from etr_megatron.errors import UserError
from tests.hf_models import VOCAB, in_turn, random_sequences, rewrite_config_as_published
from tests.policy_jobs import build, make_batch

LAYOUTS = {
    "tp1": (1, ["parallel.tp=1"]),
    "tp2": (2, ["parallel.tp=2"]),
    "tp2_sp": (2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    "pp2": (2, ["parallel.tp=1", "parallel.pp=2"]),
    "dp2": (2, ["parallel.tp=1"]),
    "pp2_vpp2": (2, ["parallel.tp=1", "parallel.pp=2", "parallel.vpp=2"]),
    "cp2": (2, ["parallel.tp=1", "parallel.cp=2"]),
}

MIXTURES = {
    "tp1": (1, ["parallel.tp=1"]),
    "tp2_sp": (2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    "pp2": (2, ["parallel.tp=1", "parallel.pp=2"]),
    "dp2": (2, ["parallel.tp=1"]),
    "ep2": (2, ["parallel.tp=1", "parallel.ep=2"]),
    "tp2_sp_ep2_etp1": (2, ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.ep=2", "parallel.etp=1"]),
    "tp2_sp_ep2": (4, ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.ep=2"]),
}


def reference(model: str, sequences: list, temperature: float = 1.0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Log-probs and entropies by transformers, one unpadded sequence at a time."""
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    logps, entropies = [], []
    for prompt, response in sequences:
        with torch.no_grad():
            logits = hf(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1] / temperature
        log_p = torch.log_softmax(logits.double(), -1)
        logps.append(log_p.gather(1, torch.tensor(response)[:, None])[:, 0])
        entropies.append(-(log_p.exp() * log_p).sum(-1))
    return logps, entropies


def assert_close(found: list, wanted: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(torch.tensor(a).double(), b, atol=tolerance, rtol=1e-5)


def check(gangs, model: str, world: int, overrides: list[str]) -> None:
    sequences = random_sequences()
    wanted = reference(model, sequences, temperature=0.7)
    # A small budget makes several microbatches of different lengths.
    overrides = [*overrides, "rollout.temperature=0.7", "train.tokens_per_microbatch=64", "train.head_chunk_rows=5"]
    for logp, entropy in gangs(world).run("tests.policy_jobs:logprobs", model=model, sequences=sequences, overrides=overrides):
        assert_close(logp, wanted[0])
        assert_close(entropy, wanted[1])


@pytest.mark.parametrize(("family", "layout"), in_turn(["qwen3", "llama", "qwen2", "qwen3_tied"], LAYOUTS))
def test_logprobs_and_entropy_equal_transformers(gangs, hf_models, family, layout):
    check(gangs, hf_models[family], *LAYOUTS[layout])


def test_logprobs_and_entropy_of_a_family_with_anothers_table_equal_transformers(gangs, hf_models):
    check(gangs, hf_models["mistral"], *LAYOUTS["tp2_sp"])


@pytest.mark.parametrize("layout", ["tp2_sp", "cp2"])
def test_logprobs_and_entropy_with_a_context_extended_by_yarn_equal_transformers(gangs, hf_models, layout):
    check(gangs, hf_models["qwen3_yarn"], *LAYOUTS[layout])


def test_padded_logits_with_a_context_extended_by_yarn_equal_transformers(gangs, hf_models):
    check_logits(gangs, hf_models["qwen3_yarn"], *LAYOUTS["tp1"])


def test_logprobs_and_entropy_of_queries_without_a_latent_equal_transformers(gangs, hf_models):
    check(gangs, hf_models["glm4_moe_lite"], *MIXTURES["tp2_sp_ep2_etp1"])


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("glm4_moe", "tp1"),
        *(("qwen3_moe", layout) for layout in ("tp2_sp", "ep2", "tp2_sp_ep2")),
        ("qwen3_moe_dense", "pp2"),  # no experts in the first stage
        ("qwen3_moe_dense", "dp2"),
        ("glm4_moe", "tp2_sp_ep2_etp1"),
        ("deepseek_v3", "tp2_sp"),  # latents are split in a way of their own
        ("deepseek_v3", "tp2_sp_ep2_etp1"),
    ],
)
def test_logprobs_and_entropy_of_a_mixture_equal_transformers(gangs, hf_models, family, layout):
    check(gangs, hf_models[family], *MIXTURES[layout])


def test_config_as_published_reads_like_transformers_5_writes_it(gangs, hf_models, tmp_path):
    import shutil

    from etr_megatron.weights import read_architecture

    copy = tmp_path / "llama"
    shutil.copytree(hf_models["llama"], copy)
    rewrite_config_as_published(copy)
    before, after = read_architecture(hf_models["llama"]), read_architecture(copy)
    assert after == before
    assert after.rope["rope_theta"] == 500000.0 and after.rope["factor"] == 8.0


def check_logits(gangs, model: str, world: int, overrides: list[str]) -> None:
    lengths = [14, 9, 3]
    tokens = torch.randint(1, 301, (3, 14), generator=torch.Generator().manual_seed(1))
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = [hf(tokens[i : i + 1, :size]).logits[0] for i, size in enumerate(lengths)]
    replies = gangs(world).run("tests.policy_jobs:padded_logits", model=model, tokens=tokens, overrides=overrides)
    found = [reply for reply in replies if reply is not None]
    assert found
    for logits in found:
        for row, expected in zip(logits, wanted, strict=True):
            torch.testing.assert_close(row[: len(expected)], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "layout"), [("qwen3", "tp1"), ("llama", "tp2"), ("qwen2", "tp2_sp"), ("qwen3_tied", "pp2")])
def test_padded_logits_equal_transformers(gangs, hf_models, family, layout):
    check_logits(gangs, hf_models[family], *LAYOUTS[layout])


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen3_moe", "tp1"),
        ("qwen3_moe_dense", "pp2"),
        ("deepseek_v3", "tp2_sp"),
        ("glm4_moe", "ep2"),
        ("qwen3_moe", "tp2_sp_ep2_etp1"),
    ],
)
def test_padded_logits_of_a_mixture_equal_transformers(gangs, hf_models, family, layout):
    check_logits(gangs, hf_models[family], *MIXTURES[layout])


def test_a_nan_at_an_active_token_names_sample_and_rank(gangs, hf_models):
    sequences = [([5, 6], [7, 8]), ([9, 10], [11]), ([299, 12], [13, 14])]
    job = dict(model=hf_models["qwen3"], sequences=sequences)
    (message,) = gangs(1).run("tests.policy_jobs:nan_error", **job, in_weights=True)
    assert message == "logp is nan at an active token: position 0 in the response of sample g1/0, on rank 0"


@pytest.mark.parametrize("loss", ["root_of_zero", "root_of_zero_unmarked"])
def test_a_nan_that_a_loss_makes_in_its_gradient_names_sample_and_rank(gangs, hf_models, loss):
    overrides = [f"objective.loss=tests.broken_loss:{loss}", "objective.options={rank: 0}"]
    job = dict(model=hf_models["qwen3"], sequences=[([5, 6], [7, 8]), ([9, 10], [11])], overrides=overrides)
    (message,) = gangs(1).run("tests.policy_jobs:nan_error", **job, in_weights=False)
    assert message == (
        f"the gradient of objective.loss tests.broken_loss:{loss} with respect to logp is not finite although all of its "
        "inputs are: position 0 in the response of sample g0/0, on rank 0"
    )


@pytest.mark.parametrize("layout", ["parallel.cp=2", "parallel.pp=2"])
def test_a_nan_that_travels_to_other_ranks_is_one_error_on_all_with_sample_and_rank(gangs, hf_models, layout):
    overrides = ["objective.loss=tests.broken_loss:root_of_zero", "objective.options={rank: 1}", layout]
    job = dict(model=hf_models["qwen3"], sequences=[([5, 6], [7, 8, 9, 10]), ([9, 10], [11, 12])], overrides=overrides)
    of_0, of_1 = gangs(2).run("tests.policy_jobs:nan_error", **job, in_weights=False)
    assert of_0 == of_1 and "with respect to logp is not finite" in of_1 and of_1.endswith(", on rank 1")


def errors_of_nan(model: str, sequences: list) -> tuple[list[str], bool]:
    """The errors of NaN in a weight's gradient on rank 1 and of NaN at a token of the last sample, and whether the weight is as
    it was."""
    policy, batch, errors = build(model, ["parallel.tp=1", "train.overlap_grad_reduce=true"]), make_batch(sequences), []
    policy.update(batch)  # Megatron overlaps nothing in its first update
    stage = policy.chunks[0]
    weight, before = stage.decoder.final_layernorm.weight, stage.decoder.final_layernorm.weight.detach().clone()
    hook = weight.register_hook(lambda gradient: gradient * (float("nan") if dist.get_rank() == 1 else 1.0))
    for _ in range(2):
        with pytest.raises((FloatingPointError, RuntimeError)) as error:
            policy.update(batch)
        errors.append(str(error.value))
        hook.remove()
        with torch.no_grad():
            stage.embedding.word_embeddings.weight[sequences[-1][0][0]] = float("nan")
    return errors, weight.equal(before)


def test_with_overlap_a_nan_is_one_error_on_all_ranks_before_weights_change(gangs, hf_models):
    job = dict(model=hf_models["qwen3"], sequences=[([5, 6], [7, 8]), ([9, 10], [11]), ([299, 12], [13, 14])])
    for (of_gradient, of_token), is_unchanged in gangs(2).run("tests.test_policy_logprobs:errors_of_nan", **job):
        assert of_gradient == "the gradient of decoder.final_layernorm.weight is not finite, although those of the loss are"
        assert "logp is nan at an active token: position 0 in the response of sample g1/0, on rank " in of_token
        assert is_unchanged


def errors_of_a_batch(model: str, sequences: list) -> list[str]:
    """The errors of log-probs of the sequences and of an update with them."""
    policy, errors = build(model, ["parallel.tp=1"]), []
    for job in (partial(policy.logprobs, sequences), partial(policy.update, make_batch(sequences))):
        with pytest.raises(UserError) as error:
            job()
        errors.append(str(error.value))
    return errors


def test_a_target_in_the_vocabularys_padding_is_refused_with_a_sentence(gangs, hf_models):
    sequences = random_sequences()
    sequences[3][1][-1] = VOCAB
    job = {"model": hf_models["llama"], "sequences": sequences}
    (errors,) = gangs(1).run("tests.test_policy_logprobs:errors_of_a_batch", **job)
    assert all(f"the response of sample 3 has token {VOCAB}, outside the model's vocab_size" in error for error in errors)
