"""Experts chosen elsewhere, in every layout of the policy, against transformers with the same choice."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import weakref
from array import array
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from etr_megatron.batching import routing_of
from etr_megatron.config import load_config
from etr_megatron.data import build_tiny_policy
from etr_megatron.errors import UserError
from etr_megatron.metrics import _replayed
from etr_megatron.policy import StepRouting
from etr_megatron.policy import routing as policy_routing
from etr_megatron.policy.packing import pack
from etr_megatron.policy.routing import RoutingReplay
from etr_megatron.rollout.rank0 import on_rank0
from etr_megatron.types import MAX_REPLAYED_EXPERTS, Group, Problem, Sample, TokenSequence
from etr_megatron.weights import Experts, read_architecture
from tests import test_policy_gradients
from tests.batches import batch_of, metrics_row
from tests.hf_models import by_published_names, random_sequences, write_model
from tests.policy_jobs import build, make_batch, with_replies

EXPERTS, PER_TOKEN = 6, 3
TP2 = ("parallel.tp=2", "parallel.sequence_parallel=true")
LAYOUTS = {
    "tp1": (1, ["parallel.tp=1"]),
    "tp2": (2, [*TP2]),
    "dp2": (2, ["parallel.tp=1"]),
    "cp2_ep2": (2, ["parallel.tp=1", "parallel.cp=2", "parallel.ep=2"]),
    "pp2_recomputed": (2, ["parallel.tp=1", "parallel.pp=2", "train.recompute=full"]),
    "pp2_vpp2": (2, ["parallel.tp=1", "parallel.pp=2", "parallel.vpp=2"]),
    "tp2_cp2_ep2_etp1": (4, [*TP2, "parallel.cp=2", "parallel.ep=2", "parallel.etp=1"]),
}
MIXTURES = {"qwen3_moe": 4, "qwen3_moe_dense": 1}  # layers with experts


def sequences() -> list:
    return random_sequences(5)


def masked_sequences() -> list:
    return with_replies(sequences())


def random_routing(layers: int, lacking: int = 0, experts: int = EXPERTS, per_token: int = PER_TOKEN) -> list[Tensor]:
    """Per sample, uint8 [tokens but the last, layers, experts per token]. lacking: this many more tokens have no routing."""
    generator = torch.Generator().manual_seed(11)
    found = []
    for prompt, response in sequences():
        count = max(0, len(prompt) + len(response) - 1 - lacking)
        keys = torch.rand(count, layers, experts, generator=generator)
        found.append(keys.argsort(-1)[..., :per_token].to(torch.uint8))
    return found


class Told:
    """Makes transformers' routers choose the given experts where there are any, for one sequence at a time."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.routing: Tensor | None = None
        routers = [module for module in model.modules() if type(module).__name__ == "Qwen3MoeTopKRouter"]
        for index, router in enumerate(routers):
            router.forward = lambda hidden, router=router, index=index: self._route(router, index, hidden)

    def _route(self, router: torch.nn.Module, index: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden.reshape(-1, router.hidden_dim) @ router.weight.t()
        probabilities = logits.softmax(-1)
        chosen = probabilities.topk(router.top_k).indices
        told = self.routing[:, index].long()
        chosen[: len(told)] = told
        given = probabilities.gather(1, chosen)
        return logits, given / given.sum(-1, keepdim=True) if router.norm_topk_prob else given, chosen


def reference(model: str, routing: list[Tensor], samples: list) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Log-probs of the tokens that the model drew, and gradients by HF name of minus their sum, weighted as in `step`."""
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, experts_implementation="eager")
    told, logps, loss = Told(hf), [], 0.0
    batch = make_batch(samples)
    for i, (prompt, response, mask) in enumerate(TokenSequence(*one) for one in samples):
        told.routing = routing[i]
        logits = hf(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / test_policy_gradients.TEMPERATURE
        logp = torch.log_softmax(logits, -1).gather(1, torch.tensor(response)[:, None])[:, 0]
        logps.append(logp[torch.tensor(mask).bool()] if mask else logp)
        loss = loss - batch.weight[i].double() * batch.advantage[i].double() * logps[-1].sum()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in hf.named_parameters()}
    return [logp.detach() for logp in logps], by_published_names(gradients)


def on_every_rank(chosen: list[Tensor] | None) -> StepRouting:
    """As the trainer passes rank 0's routing to the others."""
    return on_rank0(lambda: StepRouting.of(chosen), share=StepRouting.without_chosen)


def step(
    model: str, routing: list[Tensor], overrides: list[str], samples: list
) -> tuple[list[list[float]], list[list[float]], dict[str, Tensor]]:
    """Log-probs with the given routing and with the policy's own, and Adam's step of a REINFORCE loss by HF name."""
    policy = build(model, [*test_policy_gradients.BASE, *overrides, "objective.loss=reinforce", "objective.entropy_coef=0"])
    batch = make_batch(samples)
    given = [one.clone() for one in routing] if dist.get_rank() == 0 else None
    told = policy.logprobs(batch.sequences, routing=on_every_rank(given))
    own = policy.logprobs(batch.sequences)
    before = {name: tensor.clone() for name, tensor in policy.export()}
    held = weakref.ref(given[0]) if given is not None else lambda: None
    policy.update(replace(batch, old_logp=told.logp, routing=on_every_rank(given)))
    del given
    assert held() is None  # a step's routing takes gigabytes and is no longer needed
    change = {name: before[name] - tensor for name, tensor in policy.export()}
    return [x.tolist() for x in told.logp], [x.tolist() for x in own.logp], change


def check(gangs, model: str, routing: list[Tensor], layout: tuple[int, list[str]], samples: list | None = None) -> None:
    samples = samples or sequences()
    logps, gradients = reference(model, routing, samples)
    world, overrides = layout
    job = dict(model=model, routing=routing, samples=samples, overrides=[*overrides, "train.tokens_per_microbatch=48"])
    for told, own, change in gangs(world).run("tests.test_routing_replay:step", **job):
        for found, wanted, other in zip(told, logps, own, strict=True):
            torch.testing.assert_close(torch.tensor(found).double(), wanted, atol=1e-5, rtol=1e-5)
            assert not found or max(abs(a - b) for a, b in zip(found, other, strict=True)) > 1e-3
        for name, gradient in gradients.items():
            wanted = gradient / (gradient.abs() + 1)
            torch.testing.assert_close(change[name].double(), wanted, atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprobs_and_gradients_are_those_of_the_experts_that_were_told(gangs, hf_models, layout):
    check(gangs, hf_models["qwen3_moe"], random_routing(MIXTURES["qwen3_moe"]), LAYOUTS[layout])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2", "cp2_ep2"])
def test_replies_too_are_routed_as_the_engine_did(gangs, hf_models, layout):
    check(gangs, hf_models["qwen3_moe"], random_routing(MIXTURES["qwen3_moe"]), LAYOUTS[layout], masked_sequences())


@pytest.mark.parametrize("layout", ["tp1", "pp2_vpp2"])
def test_layers_without_experts_are_not_counted(gangs, hf_models, layout):
    check(gangs, hf_models["qwen3_moe_dense"], random_routing(MIXTURES["qwen3_moe_dense"]), LAYOUTS[layout])


def test_tokens_of_which_nothing_is_known_are_routed_as_ever(gangs, hf_models):
    check(gangs, hf_models["qwen3_moe"], random_routing(MIXTURES["qwen3_moe"], lacking=2), LAYOUTS["cp2_ep2"])


def handed_out(lengths: list[int], layers: int, piece: int) -> tuple[tuple[int, ...], dict[int, Tensor], int]:
    """(lengths, the experts of this rank's samples and layers, bytes that it keeps).

    Of 3 ranks, rank r requests the samples with number r modulo 3, the last rank none, and the layers with number r modulo 2.
    """
    rank = dist.get_rank()
    whole = all_experts(lengths, layers) if rank == 0 else ["is not looked at"]
    wanted = set(range(rank, len(lengths), 3)) if rank < 2 else set()
    with mock.patch.object(policy_routing, "PIECE", piece):
        routing = on_every_rank(whole).select(range(len(lengths)))
        found = routing.distribute(wanted, range(rank % 2, layers, 2), (layers, PER_TOKEN))
    return routing.lengths, found, sum(one.untyped_storage().nbytes() for one in found.values())


def all_experts(lengths: list[int], layers: int) -> list[Tensor]:
    """Random numbers for every sample, token and layer."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 256, (length, layers, PER_TOKEN), generator=generator, dtype=torch.uint8) for length in lengths]


@pytest.mark.parametrize("piece", [1 << 20, 300, 1])
def test_a_rank_gets_the_experts_of_its_own_samples_and_layers_and_keeps_no_others(gangs, piece):
    lengths, layers = [5, 0, 17, 9, 2, 31, 1], 5
    whole = all_experts(lengths, layers)
    for rank, (told, found, held) in enumerate(
        gangs(3).run(f"{__name__}:handed_out", lengths=lengths, layers=layers, piece=piece)
    ):
        assert told == tuple(lengths) and sorted(found) == (list(range(rank, 7, 3)) if rank < 2 else [])
        assert all(torch.equal(one, whole[i][:, rank % 2 :: 2]) for i, one in found.items())
        assert held == sum(one.numel() for one in found.values())


class Router(torch.nn.Module):
    """All that replay needs of Megatron's router."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer_number = layer + 1


@pytest.mark.parametrize(("cp", "tp", "tp_shares"), [(1, 1, False), (1, 2, False), (2, 2, True), (1, 4, True)])
def test_a_rank_holds_the_experts_of_its_own_tokens_before_the_first_pass(monkeypatch, cp, tp, tp_shares):
    known, layers, own = [5, 0, 21, 7, 16], 4, [1, 3]
    samples = [([1] * 4, [2] * 12), ([1] * 3, [2] * 2), ([1] * 5, [2] * 17), ([1] * 2, [2] * 6), ([1] * 9, [2] * 8)]
    whole = all_experts(known, layers)
    arch = mock.Mock(experts=mock.Mock(per_token=PER_TOKEN), expert_layers=range(layers))
    monkeypatch.setattr(policy_routing, "TopKRouter", Router)
    monkeypatch.setattr(StepRouting, "distribute", lambda *_: {i: one[:, own] for i, one in enumerate(whole)})
    for cp_rank, tp_rank in itertools.product(range(cp), range(tp)):
        layout = mock.Mock(cp=cp, cp_rank=cp_rank, tp=tp, tp_rank=tp_rank)
        chunks = [torch.nn.ModuleList(map(Router, own))]
        replay = RoutingReplay(arch, chunks, layout, tp_shares=tp_shares)
        micro = [
            pack(samples, numbers, multiple=16, device=torch.device("cpu"), cp=cp, cp_rank=cp_rank)
            for numbers in ([3, 0], [4, 2, 1])
        ]
        with replay.replaying(micro, StepRouting.of(whole)):
            first, second = replay.targets(0), replay.targets(1)
            # Nothing is assembled during a pass: on CPU, the recomputation of a microbatch gets the tensors of its first pass.
            assert all(one is other for one, other in zip(first, replay.targets(0), strict=True))
        for batch, (experts, has) in zip(micro, (first, second), strict=True):
            share = batch.tokens.shape[1] // (tp if tp_shares else 1)
            assert experts.shape == (share, len(own), PER_TOKEN) and has.shape == (share,)
            sequence = torch.searchsorted(batch.cu_seqlens // cp, torch.arange(batch.tokens.shape[1]), right=True) - 1
            for token in range(share):
                at = token + (share * tp_rank if tp_shares else 0)
                number, position = int(sequence[at]), int(batch.positions[0, at])
                is_known = number < len(batch.samples) and position < known[batch.samples[number]]
                assert bool(has[token]) == is_known
                if is_known:
                    assert torch.equal(experts[token], whole[batch.samples[number]][position, own])


def told_by(*numbers: int) -> list[Group]:
    """A group with one sample of five tokens for which the engine reports these numbers."""
    sample = Sample(0, [7, 8], [-1.0] * 2, "stop", 1, routing=array("B", numbers))
    return [Group("p@1", Problem("p", "", "", [1, 2, 3]), [sample])]


def test_routing_is_what_the_samples_say_and_must_be_of_this_models_experts():
    experts = Experts(count=6, per_token=2, intermediate_size=1, normalized=True)
    (found,) = routing_of(told_by(*[0, 1, 2, 3, 4, 5] * 4), experts, layers=3)  # all of the five tokens but the last
    assert found.tolist() == [[[0, 1], [2, 3], [4, 5]]] * 4
    assert [len(one) for one in routing_of(told_by(), experts, layers=3)] == [0]
    for wrong in ([0, 1, 2, 3, 4], [0] * 6 * 6, [0, 1, 2, 3, 4, 6]):
        with pytest.raises(RuntimeError, match=r"^the engine reports \d+ chosen experts up to \d for sample p@1/0, whose 5"):
            routing_of(told_by(*wrong), experts, layers=3)


def test_all_that_a_byte_can_say_are_experts_of_a_model_that_has_so_many():
    experts = Experts(count=MAX_REPLAYED_EXPERTS, per_token=2, intermediate_size=1, normalized=True)
    (found,) = routing_of(told_by(0, 255, 128, 1), experts, layers=1)
    assert found.tolist() == [[[0, 255]], [[128, 1]]]


def test_zeros_of_an_engine_that_did_not_note_its_choice_are_no_routing():
    """SGLang's buffer stays zero if the experts' kernel also chooses the experts."""
    with pytest.raises(
        UserError, match=r"^the engine reports the same expert twice for a token of sample p@1/0, .*,triton to sglang"
    ):
        routing_of(told_by(*[0] * 24), Experts(count=6, per_token=2, intermediate_size=1, normalized=True), layers=3)
    (found,) = routing_of(told_by(*[0] * 4), Experts(count=6, per_token=1, intermediate_size=1, normalized=True), layers=1)
    assert len(found) == 4  # with one expert per token, zeros are valid


def test_the_share_of_tokens_whose_experts_are_replayed_is_told():
    """All tokens of the first sample; of the second, only the first response token, which the prompt's last token predicts."""
    batch = batch_of()
    prompts, responses, _ = zip(*batch.sequences, strict=True)
    counts = [len(prompts[0]) + len(responses[0]) - 1, len(prompts[1]), *[0] * (len(batch) - 2)]
    row = metrics_row(replace(batch, routing=StepRouting(tuple(counts), None)))
    assert row["routing_replayed"] == (len(responses[0]) + 1) / sum(map(len, responses))
    assert "routing_replayed" not in metrics_row(batch)
    # Of the fourth response's 5 tokens, the model drew the first two and the last.
    masked = (*batch.sequences[:3], batch.sequences[3]._replace(loss_mask=[1, 1, 0, 0, 1]))
    parts = replace(batch.select(range(4), batch.weight[:4]), sequences=masked)
    for length, known in ((0, 0), (1, 0), (2, 1), (3, 2), (5, 2), (6, 3), (7, 3)):
        routing = StepRouting((9, 0, 0, length), None)
        assert _replayed(replace(parts, routing=routing)) == {"routing_replayed": (3 + known) / (3 + 1 + 2 + 3)}


def with_tokenizer(runs, family: str, path: Path) -> Path:
    """A small model of the family in HuggingFace format, with the tiny policy's tokenizer."""
    config = load_config(runs.config, runs.command()[4:])
    tiny = build_tiny_policy(config.tiny, config.arithmetic, progress=False)
    folder = Path(write_model(family, path, layers=2, vocab_size=config.tiny.vocab_size))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny / file, folder)
    return folder


@pytest.mark.slow
def test_a_run_trains_with_the_engines_experts_and_so_does_one_that_replays_it(runs, tmp_path):
    mixture = with_tokenizer(runs, "deepseek_v3", tmp_path / "mixture")
    last = read_architecture(mixture).experts.count - 1
    options = (f"model.path={mixture}", "--nproc", "2", "parallel.tp=1", "parallel.ep=2", "train.routing_replay=true")
    options += ("eval.every=0", "checkpoint.every=0", "run.steps=2", "data.max_prompt_tokens=256")
    code, printed = runs.finish("run.name=recorded", "rollout.record=true", *options)
    assert code == 0, printed
    rows = runs.rows("recorded")
    assert [row["routing_replayed"] for row in rows] == [1.0, 1.0] and all(row["logprob_gap_max"] < 1e-4 for row in rows)

    file = runs.directory("recorded") / "recorded" / "step_000002.jsonl"
    head, *groups = map(json.loads, file.read_text().splitlines())
    for group in groups:
        for sample in group["samples"]:
            others = bytes(last - expert for expert in base64.b64decode(sample["routing"]))  # still distinct
            sample["routing"] = base64.b64encode(others).decode()
    file.write_text("".join(json.dumps(line) + "\n" for line in (head, *groups)))
    code, printed = runs.finish("run.name=again", f"rollout.replay={runs.directory('recorded')}", *options)
    assert code == 0, printed
    same, other = runs.rows("again")
    assert same == rows[0]
    assert other["routing_replayed"] == 1.0 and other["logprob_gap_mean"] > 1e-2
