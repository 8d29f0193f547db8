"""What only models with latent attention ask of the policy: layouts that are refused, the engine's experts in groups, a run."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode

from etr_megatron.checks import check_architecture
from etr_megatron.config import load_config
from etr_megatron.convert import Ranks, to_hf
from etr_megatron.errors import UserError
from etr_megatron.policy.packing import pack
from etr_megatron.weights import read_architecture
from tests import test_glm4_moe, test_routing_replay
from tests.hf_models import write_model
from tests.test_policy_losses import Waits

SP = "parallel.sequence_parallel=true"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["parallel.cp=2", "parallel.cp_comm=a2a"],
            "m has values of 14 dimensions and keys of 20, for which Transformer Engine",
        ),
        (["parallel.tp=3", SP], "m has 4 attention heads, which parallel.tp=3 does not divide"),
        (["parallel.tp=2"], "m has experts, which need parallel.sequence_parallel=true with parallel.tp=2"),
        (["parallel.ep=5"], "m has 12 experts, which parallel.ep=5 does not divide"),
        (["parallel.pp=3", "parallel.first_stage_layers=3"], "m has 4 layers, which do not divide into parallel.pp=3 stages"),
        (["train.moe_aux_loss_coef=0.1"], "m balances its experts by a bias per expert"),
    ],
)
def test_what_does_not_fit_latent_attention_is_refused(hf_models, overrides, sentence):
    with pytest.raises(UserError) as caught:
        refuse(hf_models["deepseek_v3"], overrides)
    assert str(caught.value).startswith(sentence) and "\n" not in str(caught.value)


def test_what_fits_is_not(hf_models, tmp_path):
    refuse(hf_models["deepseek_v3"], ["parallel.cp=2", "parallel.tp=2", SP, "train.routing_replay=true"])
    # Published models with 256 experts, and keys as wide as values.
    wide = write_model("glm4_moe_lite", tmp_path, n_routed_experts=256, moe_intermediate_size=2, v_head_dim=20)
    refuse(wide, ["parallel.cp=2", "parallel.cp_comm=a2a", "train.routing_replay=true"])


def refuse(model: str, overrides: list[str]) -> None:
    config = load_config(None, [f"model.path={model}", "parallel.tp=1", *overrides])
    check_architecture("m", read_architecture(model), config, config.parallel.tp)


@pytest.mark.slow
def test_replayed_experts_may_lie_in_other_groups(gangs, hf_models, monkeypatch):
    """The engine's groups, too, are a choice that rounding changes."""
    monkeypatch.setattr(test_routing_replay, "Told", test_glm4_moe.Told)
    routing = test_routing_replay.random_routing(3, experts=12, per_token=4)
    test_routing_replay.check(gangs, hf_models["deepseek_v3"], routing, test_routing_replay.LAYOUTS["cp2_ep2"])


class NoWaits(TorchFunctionMode):
    """Raises where a host would wait for its GPU to read a value."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func.__name__ not in Waits.READS, func.__name__
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cp", [1, 2, 3])
def test_queries_are_turned_by_their_positions_without_waiting_for_the_device(cp):
    from megatron.core.models.common.embeddings import rope_utils  # only after etr_megatron.policy has prepared it

    samples = [([1] * 5, [2] * 8), ([1] * 2, [2]), ([1] * 4, [2] * 20)]
    settings = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=True)
    inverse, heads = torch.tensor([1.0, 0.3, 0.01]), 2
    angles = torch.arange(60.0)[:, None] * inverse
    freqs = torch.cat([angles, angles], -1)[:, None, None]
    for rank in range(cp):
        batch = pack(samples, [2, 0, 1], multiple=7, device=torch.device("cpu"), cp=cp, cp_rank=rank)
        queries = torch.randn(batch.tokens.shape[1], heads, 2 * len(inverse), generator=torch.Generator().manual_seed(rank))
        group = mock.Mock(size=lambda: cp, rank=lambda rank=rank: rank)
        with NoWaits():
            found = rope_utils.apply_rotary_pos_emb(queries, freqs, settings, batch.cu_seqlens, mscale=0.5, cp_group=group)
        turns = torch.polar(torch.full_like(inverse, 0.5), batch.positions[0, :, None] * inverse)
        turned = torch.view_as_complex(queries.unflatten(-1, (-1, 2))) * turns[:, None]
        torch.testing.assert_close(found, torch.cat([turned.real, turned.imag], -1))


@pytest.mark.slow
def test_a_run_goes_on_in_another_layout_and_ends_as_the_model_that_transformers_computes(runs, gangs, tmp_path):
    model = test_routing_replay.with_tokenizer(runs, "deepseek_v3", tmp_path / "model")
    options = [f"model.path={model}", "run.name=latent", "eval.every=0", "checkpoint.every=1", "data.max_prompt_tokens=256"]
    for layout in (["parallel.tp=2", SP, "parallel.ep=2", "parallel.etp=1"], ["parallel.tp=1", "parallel.pp=2"]):
        steps = len(runs.rows("latent")) + 1
        code, printed = runs.finish(*options, f"run.steps={steps}", "--nproc", "2", *layout)
        assert code == 0, printed
    rows = runs.rows("latent")
    assert len(rows) == 2 and all(row["grad_norm"] > 0.1 and row["logprob_gap_max"] < 1e-4 for row in rows)
    to_hf(runs.directory("latent"), tmp_path / "hf", Ranks())
    (found,) = gangs(1).run("tests.convert_jobs:verified", hf=str(tmp_path / "hf"), megatron=str(runs.directory("latent")))
    assert found.same and found.tensors > 60 and found.logits[0] < 1e-5 < found.logits[1]
