"""The whole loop with what a loss may need besides the rollout: a reference model, weights for the engine's mismatch."""

from __future__ import annotations

import json
import math

import pytest

pytestmark = pytest.mark.slow
SHORT = ("run.steps=2", "eval.every=0", "checkpoint.every=0", "train.lr=3.0e-3")
ONE_RANK = "parallel.tp=1"
"""Where nothing new is split between ranks: on two cores, two ranks take nearly twice as long to start."""


@pytest.mark.parametrize(
    "loss",
    [
        (ONE_RANK, "objective.preset=rloo", "objective.kl_coef=0.05", "objective.kl_in=reward"),
        ("objective.preset=gspo", "objective.kl_coef=0.05", "objective.kl_in=loss"),
        (ONE_RANK, "objective.preset=etr", "objective.correction=truncate", "objective.correction_cap=1.000001"),
    ],
    ids=["rloo_kl_in_reward", "gspo_kl_in_loss", "etr_correction"],
)
def test_a_run_trains_and_reports_what_its_loss_asks_for(runs, loss):
    code, printed = runs.finish("run.name=loss", *SHORT, *loss)
    assert code == 0, printed
    first, second = runs.rows("loss")
    assert ("warning: objective.loss" in printed) == ("objective.preset=rloo" in loss)  # 8 optimizer steps per rollout
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in (first, second))
    if "objective.kl_coef=0.05" in loss:
        # The reference is the initial policy, which the first step's updates move away from.
        # (On samples of another policy, k1 may have either sign; k3 is never negative.)
        assert first["kl"] != 0 if "objective.kl_in=reward" in loss else 0 < first["kl"] < second["kl"]
        assert first["correction_mean"] == 1.0
    else:
        # The engine computes in another order than the trainer, so weights are almost 1, and some are above this cap.
        assert first["kl"] == 0 and 0 < first["correction_frac"] < 1
        assert 1 - 1e-3 < first["correction_mean"] < 1.000001 + 1e-9


def test_a_run_trains_relative_to_the_engines_log_probs(runs):
    code, printed = runs.finish("run.name=engines", *SHORT, ONE_RANK, "objective.old_logp=engine", "rollout.record=true")
    assert code == 0, printed
    for row in runs.rows("engines"):
        assert row["grad_norm"] > 0 and row["logprob_gap_max"] is None
        # Before the first update the two differ in rounding alone, but they are not the same numbers.
        assert 0 < row["logprob_gap_mean"] < 1e-4 and row["entropy"] > 0.1
    assert "old_logprobs" not in (runs.directory("engines") / "recorded" / "step_000001.jsonl").read_text()


def test_truncated_responses_can_be_left_out_of_the_loss(runs):
    for name, limit in (("some", 10), ("all", 1)):
        overrides = (f"run.name={name}", ONE_RANK, "objective.mask_truncated=true", f"rollout.max_response_tokens={limit}")
        code, printed = runs.finish(*SHORT, *overrides)
        assert code == 0, printed
        warned = [f"step {step}: nothing to train on, as all responses were cut off" for step in (1, 2)]
        assert [line in printed for line in warned] == [name == "all"] * 2
    for row in runs.rows("some"):
        assert 0 < row["truncated"] < 24 and row["grad_norm"] > 0
    for row in runs.rows("all"):
        assert row["truncated"] == 24 and row["loss"] == row["grad_norm"] == 0


def test_training_sets_have_their_shares_in_every_step_and_after_a_restart(runs, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"question": f"{i}+1=", "answer": str(i + 1)}) + "\n" for i in range(5)))
    sets = (f"data.train={{sums: arithmetic, few: {few}}}", "data.train_weights={sums: 1, few: 2}")
    common = ("run.name=shares", ONE_RANK, *sets, "eval.every=0", "rollout.record=true")
    for steps in (1, 2):
        code, printed = runs.finish(*common, f"run.steps={steps}", "checkpoint.every=1")
        assert code == 0, printed
    rows = runs.rows("shares")
    assert [(row["train/sums/groups"], row["train/few/groups"]) for row in rows] == [(2, 4)] * 2
    drawn = [json.loads(line) for step in (1, 2) for line in recorded_lines(runs, "shares", step)]
    ids = [group["problem"]["id"] for group in drawn if group["problem"]["id"].startswith("few/")]
    assert len(ids) == 8 and len(set(ids[:5])) == 5  # the resumed run went on in the epoch


def recorded_lines(runs, name: str, step: int) -> list[str]:
    """The groups of a recorded step."""
    return (runs.directory(name) / "recorded" / f"step_{step:06}.jsonl").read_text().splitlines()[1:]


def test_further_numbers_of_the_reward_function_become_metrics_and_are_saved_with_the_responses(runs):
    own = ("run.name=parts", ONE_RANK, "reward.function=tests.rewards:in_parts", "run.steps=1", "eval.every=1")
    code, printed = runs.finish(*own)
    assert code == 0, printed
    (row,) = runs.rows("parts")
    (file,) = (runs.directory("parts") / "rollouts").iterdir()
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(sample["parts"] == {"digits": sum(map(str.isdigit, sample["response"]))} for sample in samples)
    assert row["reward/digits"] > 0 and row["eval_reward/digits"] > 0 and row["eval_reward/digits_start"] > 0
    assert 0 < row["reward_mean"] < 1
