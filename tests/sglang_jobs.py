"""What gang ranks run against a real SGLang server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from etr_megatron.config import SglangConfig
from etr_megatron.rollout import Sampling
from etr_megatron.rollout.sglang import SglangEngine
from etr_megatron.types import Problem
from etr_megatron.weights import weights_of
from tests.policy_jobs import build, make_batch


def gaps(model: str, url: str, prompts: list[list[int]], overrides: list[str]) -> list[float]:
    """Largest gap between the server's and the trainer's log-probs after each of two weight syncs, with an update between."""
    policy = build(model, [*overrides, "train.lr=0.01", "rollout.temperature=0.9"])
    shapes = {name: shape for weight in weights_of(policy.arch) for name, shape in zip(weight.hf, weight.shapes, strict=True)}
    engine = SglangEngine(
        SglangConfig(urls=(url,), bucket_mib=1, update_timeout_s=60),
        Path(model),
        shapes=shapes,
        dtype="float32",
        backend="gloo",
        stop_ids=[],
        logs=Path("unused"),
    )
    problems = [Problem(f"p{i}", "", "", ids) for i, ids in enumerate(prompts)]
    found = []
    for version in (1, 2):
        engine.update_weights(policy.export(), version=version)
        groups = engine.generate(problems, Sampling(2, 8, 0.9, seed=1, step=version, top_p=0.95))
        samples = [sample for group in groups for sample in group]
        assert all(sample.weight_version == version for sample in samples)
        sequences = [(prompts[i // 2], sample.response_ids) for i, sample in enumerate(samples)]
        trainer = policy.logprobs(sequences).logp
        served = [torch.tensor(sample.rollout_logprobs) for sample in samples]
        found.append(max((a - b).abs().max().item() for a, b in zip(trainer, served, strict=True)))
        policy.update(replace(make_batch(sequences), old_logp=trainer))
    engine.close()
    return found
