"""Jobs that gang ranks run for the tests of the rollout."""

from __future__ import annotations

from dataclasses import asdict, replace

import torch
from safetensors.torch import load_file

from etr_megatron.batching import routing_of, sequences_of
from etr_megatron.policy import StepRouting
from etr_megatron.rollout import Sampling
from etr_megatron.rollout.embedded import EmbeddedEngine
from etr_megatron.types import Group, Problem, Sample
from tests.policy_jobs import build, make_batch
from tests.reads import bytes_read_by


def _engine(model: str, stop_ids: list[int]) -> EmbeddedEngine:
    """An engine with the weights of the model's own file."""
    engine = EmbeddedEngine(model, dtype=torch.float32, device=torch.device("cpu"), batch_samples=4, stop_ids=stop_ids)
    engine.update_weights(load_file(f"{model}/model.safetensors").items(), version=0)
    return engine


def reads_weights(model: str) -> tuple[int, str]:
    """Bytes that a new engine reads, and its error when asked to generate."""
    engines = []

    def make() -> None:
        options = dict(dtype=torch.float32, device=torch.device("cpu"), batch_samples=4, stop_ids=[])
        engines.append(EmbeddedEngine(model, **options))

    make()  # imports
    read = bytes_read_by(make)
    try:
        engines[0].generate(_problems([[1, 2]]), Sampling(1, 2, 1.0, seed=1, step=1))
    except RuntimeError as error:
        return read, str(error)
    return read, ""


def _problems(prompts: list[list[int]]) -> list[Problem]:
    return [Problem(f"p{i}", "", "", ids) for i, ids in enumerate(prompts)]


def generate(model, prompts, temperature, samples, max_tokens, stop_ids=(), routing=False) -> list[list[dict]]:
    sampling = Sampling(samples, max_tokens, temperature, seed=3, step=2, routing=routing)
    groups = _engine(model, list(stop_ids)).generate(_problems(prompts), sampling)
    return [[asdict(sample) for sample in group] for group in groups]


def gap_after_update(model, prompts, overrides) -> tuple[float, float, float]:
    """Largest engine/trainer gap before and after the engine gets an update, and how far the update moved log-probs."""
    policy = build(model, [*overrides, "train.lr=0.01", "rollout.temperature=0.9"])
    engine = _engine(model, [])
    problems = _problems(prompts)

    def gap(step: int) -> tuple[float, list[Sample]]:
        groups = engine.generate(problems, Sampling(2, 8, 0.9, seed=1, step=step))
        samples = [sample for group in groups for sample in group]
        assert all(sample.weight_version == step for sample in samples)
        sequences = [(prompts[i // 2], sample.response_ids) for i, sample in enumerate(samples)]
        trainer = policy.logprobs(sequences).logp
        engine_logp = [torch.tensor(sample.rollout_logprobs) for sample in samples]
        return max((a - b).abs().max().item() for a, b in zip(trainer, engine_logp, strict=True)), sequences

    before, sequences = gap(0)
    old = policy.logprobs(sequences).logp
    policy.update(replace(make_batch(sequences), old_logp=old))
    changed = max((a - b).abs().max().item() for a, b in zip(policy.logprobs(sequences).logp, old, strict=True))
    engine.update_weights(policy.export(), version=1)
    return before, gap(1)[0], changed


def gaps_in_bf16(model, prompts, overrides) -> tuple[dict[str, float], dict[str, float]]:
    """See `gaps_of_experts`."""
    return gaps_of_experts(build(model, [*overrides, "model.dtype=bfloat16"]), model, prompts, torch.device("cpu"))


def gaps_of_experts(policy, model, prompts, device) -> tuple[dict[str, float], dict[str, float]]:
    """Log-prob gaps between engine and trainer in bf16: with each using its own experts, and with both using the engine's."""
    engine = EmbeddedEngine(model, dtype=torch.bfloat16, device=device, batch_samples=4, stop_ids=[])
    engine.update_weights(policy.export(), version=0)
    samples = engine.generate(_problems(prompts), Sampling(4, 40, 1.0, seed=1, step=1, routing=True))
    groups = [Group(problem.id, problem, some) for problem, some in zip(_problems(prompts), samples, strict=True)]
    arch, sequences = policy.arch, sequences_of(groups)
    engine_logp = torch.tensor([logp for group in groups for sample in group.samples for logp in sample.rollout_logprobs])
    routings = (None, StepRouting.of(routing_of(groups, arch.experts, len(arch.expert_layers))))
    own, replayed = (torch.cat(policy.logprobs(sequences, routing=routing).logp) for routing in routings)
    return gaps_of(own - engine_logp), gaps_of(replayed - engine_logp)


def gaps_of(difference: torch.Tensor) -> dict[str, float]:
    size = difference.abs()
    return {"mean": size.mean().item(), "p99": size.quantile(0.99).item(), "max": size.max().item()}


def bad_update(model) -> tuple[str, int]:
    """The refusal, and the engine's version after it."""
    engine = _engine(model, [])
    tensors = [("model.norm.weight", torch.zeros(47)), ("nonsense", torch.zeros(1))]
    try:
        engine.update_weights(tensors, version=1)
    except ValueError as error:
        return str(error), engine.weight_version
    return "", engine.weight_version
