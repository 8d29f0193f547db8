"""Rules about single values."""

from __future__ import annotations

from collections.abc import Iterator

from etr_megatron.config.rules.violation import Violation, get
from etr_megatron.config.schema import Config

BYTE_VOCAB = 260
"""A byte-level BPE starts from 256 bytes and a few special tokens."""

AT_LEAST: dict[str, int] = {
    "run.seed": 0,
    "run.steps": 1,
    "tiny.hidden_size": 1,
    "tiny.layers": 1,
    "tiny.heads": 2,
    "tiny.head_dim": 2,
    "tiny.intermediate_size": 1,
    "tiny.vocab_size": BYTE_VOCAB,
    "tiny.warm_start_steps": 0,
    "tiny.warm_start_batch": 1,
    "tiny.warm_start_seed": 0,
    "arithmetic.min_digits": 1,
    "arithmetic.train_problems": 1,
    "arithmetic.eval_problems": 1,
    "arithmetic.seed": 0,
    "data.max_prompt_tokens": 1,
    "environment.max_turns": 1,
    "environment.workers": 1,
    "environment.concurrency": 1,
    "reward.workers": 1,
    "reward.concurrency": 1,
    "reward.overlong_buffer": 0,
    "rollout.prompts_per_step": 1,
    "rollout.max_response_tokens": 1,
    "rollout.top_k": 0,
    "rollout.batch_samples": 1,
    "rollout.max_staleness": 0,
    "sglang.servers": 1,
    "sglang.dedicated_nodes": 0,
    "sglang.nodes_per_server": 1,
    "sglang.tp": 1,
    "sglang.ep": 1,
    "sglang.dp_attention": 1,
    "sglang.probe_every": 0,
    "sglang.concurrency": 1,
    "sglang.bucket_mib": 1,
    "train.minibatches": 1,
    "train.epochs": 1,
    "train.tokens_per_microbatch": 1,
    "train.lr_warmup_updates": 0,
    "lora.rank": 0,
    "parallel.pp": 1,
    "parallel.vpp": 1,
    "parallel.cp": 1,
    "parallel.ep": 1,
    "eval.every": 0,
    "eval.problems": 1,
    "eval.top_k": 0,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "checkpoint.keep_best": 0,
    "observe.rollouts_every": 0,
    "observe.rollouts_groups": 1,
    "observe.profile_step": 0,
}
"""Minimum of whole numbers."""

POSITIVE = (
    "run.phase_timeout_s",
    "tiny.warm_start_lr",
    "environment.timeout_s",
    "reward.timeout_s",
    "rollout.temperature",
    "sglang.startup_timeout_s",
    "sglang.request_timeout_s",
    "sglang.hang_timeout_s",
    "sglang.update_timeout_s",
    "objective.correction_cap",
    "lora.alpha",
    "train.lr",
    "train.adam_eps",
)
NOT_NEGATIVE = (
    "run.stop_grace_s",
    "reward.overlong_penalty",
    "objective.eps_low",
    "objective.eps_high",
    "objective.eps_min",
    "objective.delta",
    "objective.kl_coef",
    "objective.entropy_coef",
    "objective.correction_floor",
    "train.min_lr",
    "train.weight_decay",
    "train.clip_grad",
    "train.moe_aux_loss_coef",
    "eval.temperature",
)
SECONDS = (
    "run.phase_timeout_s",
    "run.stop_grace_s",
    "environment.timeout_s",
    "reward.timeout_s",
    "sglang.startup_timeout_s",
    "sglang.request_timeout_s",
    "sglang.hang_timeout_s",
    "sglang.update_timeout_s",
)
MAX_SECONDS = 1e6
"""Maximum of a wait, eleven days: the system and torch count milliseconds in 32 bits."""
AT_MOST = {
    "arithmetic.max_digits": 1000,  # Python does not print integers of more than 4300 digits
    "environment.workers": 1024,  # processes on rank 0's machine
    "reward.workers": 1024,
}

MIN_PHASE_TIMEOUT_S = 1.0
"""Minimum of `run.phase_timeout_s`: newly started ranks do not find each other sooner."""
MAX_LR = 1e3
MIN_ADAM_EPS = 1e-30
"""Minimum of Adam's epsilon: a much smaller one is 0 in float32, and then a weight with gradient 0 becomes NaN."""

MIN_TEMPERATURE = 1e-3
"""Minimum of a temperature other than 0: logits divided by a much smaller one are infinite, and sampling fails."""

NOT_EMPTY = (
    "run.name",
    "run.dir",
    "model.path",
    "tiny.cache_dir",
    "data.train",
    "data.train_split",
    "data.eval_split",
    "data.prompt_column",
    "data.answer_column",
    "environment.role",
    "reward.extract",
    "arithmetic.operators",
)


def bounds(config: Config) -> Iterator[Violation]:
    """Minimum and maximum values."""
    for key, least in AT_LEAST.items():
        if get(config, key) < least:
            yield Violation((key,), f"must be at least {least}")
        elif get(config, key) >= 2**31 and not key.endswith("seed"):
            yield Violation((key,), "must be below 2**31")
    for key in POSITIVE:
        if (value := get(config, key)) is not None and value <= 0:
            yield Violation((key,), "must be greater than 0")
    for key in NOT_NEGATIVE:
        if get(config, key) < 0:
            yield Violation((key,), "must not be negative")
    for key in SECONDS:
        if (value := get(config, key)) is not None and value > MAX_SECONDS:
            yield Violation((key,), f"must be at most {MAX_SECONDS:g}")
    if 0 < config.run.phase_timeout_s < MIN_PHASE_TIMEOUT_S:
        yield Violation(("run.phase_timeout_s",), f"must be at least {MIN_PHASE_TIMEOUT_S:g}")
    for key in ("train.lr", "tiny.warm_start_lr"):
        if get(config, key) > MAX_LR:
            yield Violation((key,), f"must be at most {MAX_LR:g}")
    if 0 < config.train.adam_eps < MIN_ADAM_EPS:
        yield Violation(("train.adam_eps",), f"must be at least {MIN_ADAM_EPS:g}")
    for key in ("rollout.temperature", "eval.temperature"):
        if 0 < get(config, key) < MIN_TEMPERATURE:
            greedy = ", or 0 for greedy sampling" if "eval" in key else ""
            yield Violation((key,), f"must be at least {MIN_TEMPERATURE:g}{greedy}")
    for key, most in AT_MOST.items():
        if get(config, key) > most:
            yield Violation((key,), f"must be at most {most}")
    for key in NOT_EMPTY:
        if not get(config, key):
            yield Violation((key,), "must not be empty")
    for key in ("run.seed", "tiny.warm_start_seed", "arithmetic.seed"):
        if get(config, key) >= 2**32:
            yield Violation((key,), "must be below 2**32")
    for key in ("objective.alpha", "objective.gamma", "tiny.forgotten_carry", "tiny.wrong_digit"):
        if not 0 <= get(config, key) <= 1:
            yield Violation((key,), "must lie between 0 and 1")
    for key in ("train.adam_beta1", "train.adam_beta2"):
        if not 0 <= get(config, key) < 1:
            yield Violation((key,), "must be at least 0 and below 1")
