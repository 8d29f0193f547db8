"""A user's own loss by import path: its inputs, and the errors when it does not keep its promises."""

from __future__ import annotations

import itertools
import sys
import textwrap
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from etr_megatron.errors import UserError
from etr_megatron.objective import (
    LossInputs,
    LossOutputs,
    LossSettings,
    PolicyLoss,
    diagnostic_sums,
    read_sums,
    register_loss,
    regularized,
    resolve_loss,
    token_local,
)
from tests.loss_cases import random_case
from tests.policy_jobs import build, make_batch
from tests.runs import REPO

SEQUENCES = [([7] * prompt, list(range(response))) for prompt, response in ((2, 3), (1, 7), (4, 1), (3, 6), (1, 2), (2, 8))]


@token_local
def squared(inputs: LossInputs) -> LossOutputs:
    return regularized(inputs, -((inputs.logp - inputs.group_mean) ** 2), {"gap": inputs.logp - inputs.group_mean})


def whole_sequences(inputs: LossInputs) -> LossOutputs:
    return regularized(inputs, inputs.sequences.spread(inputs.sequences.mean(inputs.logp)) * inputs.advantage)


whole_sequences.token_local = False  # the mark is removed again


def returns_a_tensor(inputs: LossInputs) -> torch.Tensor:
    return inputs.logp.sum()


def returns_rows(inputs: LossInputs) -> LossOutputs:
    return LossOutputs(inputs.logp)


def returns_one_row(inputs: LossInputs) -> LossOutputs:
    return LossOutputs(inputs.logp.sum()[None])


def returns_an_integer(inputs: LossInputs) -> LossOutputs:
    return LossOutputs(inputs.logp.sum().long())


def returns_a_number(inputs: LossInputs) -> LossOutputs:
    return LossOutputs(inputs.logp.sum().item())


def reports_a_number(inputs: LossInputs) -> LossOutputs:
    return LossOutputs(inputs.logp.sum(), {"gap": inputs.logp.mean().item()})


def forgets_the_policy(inputs: LossInputs) -> LossOutputs:
    return LossOutputs(inputs.advantage.sum())


def reports_a_scalar(inputs: LossInputs) -> LossOutputs:
    return LossOutputs(inputs.logp.sum(), {"gap": inputs.logp.mean()})


@token_local
def reports_now_and_then(inputs: LossInputs) -> LossOutputs:
    extra = {"above": inputs.logp} if bool((inputs.advantage > 0).all()) else {}
    return regularized(inputs, inputs.logp, {"gap": inputs.logp, **extra})


def makes_a_square(inputs: LossInputs) -> LossOutputs:
    return regularized(inputs, inputs.logp[:, None] * inputs.advantage[:, None])


def returns_no_rows(inputs: LossInputs) -> LossOutputs:
    return LossOutputs(inputs.logp.sum(), None)


def asks_another_rank(inputs: LossInputs) -> LossOutputs:
    dist.all_reduce(inputs.weight.sum())
    return regularized(inputs, inputs.logp)


@token_local
def changes_what_its_gradient_needs(inputs: LossInputs) -> LossOutputs:
    ratio = (inputs.logp - inputs.old_logp).exp()  # exp's gradient needs its result
    return regularized(inputs, ratio.clamp_(max=2.0) * inputs.advantage)


def changes_what_its_gradient_needs_unmarked(inputs: LossInputs) -> LossOutputs:
    return changes_what_its_gradient_needs(inputs)


def takes_too_much(inputs: LossInputs, beta: float) -> LossOutputs:
    return LossOutputs(inputs.logp.sum() * beta)


NO_FUNCTION = 3


def test_a_users_loss_by_import_path_gets_inputs_and_diagnostics() -> None:
    loss = resolve_loss("tests.test_own_losses:squared")
    assert loss.token_local and not resolve_loss("tests.test_own_losses:whole_sequences").token_local
    case, logp, entropy = random_case(1)
    inputs = case.inputs(torch.tensor(logp), torch.tensor(entropy))
    outputs = loss(inputs)
    r = case.rows
    gap = logp - r["group_mean"]
    assert outputs.loss.item() == pytest.approx((r["weight"] * r["correction"] * gap**2).sum())
    sums = read_sums([diagnostic_sums(inputs, outputs, torch.zeros(len(logp), dtype=torch.long))])
    assert sums["loss/gap"] == pytest.approx(gap.sum())
    assert sums["ratio"] == pytest.approx(np.exp(logp - r["old_logp"]).sum())


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        ("returns_a_tensor", "returned Tensor instead of LossOutputs"),
        ("returns_rows", r"not a scalar floating-point tensor \(torch.float64, shape \[18\]\)"),
        ("returns_one_row", r"not a scalar floating-point tensor \(torch.float64, shape \[1\]\)"),
        ("returns_an_integer", r"not a scalar floating-point tensor \(torch.int64, shape \[\]\)"),
        ("returns_a_number", r"not a scalar floating-point tensor \(float\)"),
        ("reports_a_number", r"rows\['gap'\] that is not a tensor of shape \[18\] \(float\)"),
        ("forgets_the_policy", "without a gradient"),
        ("reports_a_scalar", r"rows\['gap'\] that is not a tensor of shape \[18\]"),
        ("makes_a_square", r"raised ValueError: the surrogate has shape \[18, 1\], but must have \[18\], one value per row\n"),
        ("returns_no_rows", r"returned rows that are not a mapping of names to tensors \(NoneType\)"),
    ],
)
def test_wrong_outputs_of_a_users_loss_are_named(function: str, complaint: str) -> None:
    case, logp, entropy = random_case(1)
    inputs = case.inputs(torch.tensor(logp, requires_grad=True), torch.tensor(entropy))
    with pytest.raises(UserError, match=f"objective.loss tests.test_own_losses:{function} .*{complaint}"):
        resolve_loss(f"tests.test_own_losses:{function}")(inputs)


def test_a_message_between_ranks_that_fails_inside_of_a_loss_is_not_called_the_losses_fault() -> None:
    case, logp, entropy = random_case(1)
    with pytest.raises(ValueError, match="process group has not been initialized"):
        resolve_loss("tests.test_own_losses:asks_another_rank")(case.inputs(torch.tensor(logp), torch.tensor(entropy)))


class CountsBackward(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(ctx, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        CountsBackward.calls += 1
        return gradient


def counts_its_gradients(inputs: LossInputs) -> LossOutputs:
    return regularized(inputs, CountsBackward.apply(inputs.logp + inputs.entropy))


@pytest.mark.parametrize(("name", "tries"), [("tests.test_own_losses:counts_its_gradients", 1), ("one_of_ours", 0)])
def test_a_users_gradient_is_tried_in_the_first_call_alone_and_what_watches_the_policy_does_not_see_it(name, tries) -> None:
    case, logp, entropy = random_case(1)
    policys, seen = [torch.tensor(values, requires_grad=True) for values in (logp, entropy)], []
    for values in policys:
        values.register_hook(seen.append)
    loss, before = PolicyLoss(name, counts_its_gradients, True), CountsBackward.calls
    for _ in range(3):
        outputs = loss(case.inputs(*policys))
    assert CountsBackward.calls - before == tries and not seen
    outputs.loss.backward()
    assert len(seen) == 2
    with torch.no_grad():
        PolicyLoss(name, counts_its_gradients, True)(case.inputs(*policys))  # nothing to try without gradients
    resolve_loss("tests.test_own_losses:has_a_parameter")(case.inputs(torch.tensor(logp), torch.tensor(entropy)))


PARAMETER = torch.ones((), requires_grad=True)


def has_a_parameter(inputs: LossInputs) -> LossOutputs:
    return regularized(inputs, inputs.logp * PARAMETER)


def spoils_its_entropys_gradient(inputs: LossInputs) -> LossOutputs:
    return regularized(inputs, inputs.logp + inputs.entropy.exp().clamp_(max=0.1))


def test_a_users_gradient_with_respect_to_the_entropy_is_tried_too() -> None:
    case, logp, entropy = random_case(1)
    inputs = case.inputs(torch.tensor(logp, requires_grad=True), torch.tensor(entropy, requires_grad=True))
    with pytest.raises(UserError, match="spoils_its_entropys_gradient raised in its gradient RuntimeError: one of the var"):
        resolve_loss("tests.test_own_losses:spoils_its_entropys_gradient")(inputs)


def test_what_a_loss_of_ours_raises_is_not_called_the_users_fault() -> None:
    case, logp, entropy = random_case(1)
    with pytest.raises(ValueError, match="the surrogate has shape"):
        PolicyLoss("one_of_ours", makes_a_square, True)(case.inputs(torch.tensor(logp), torch.tensor(entropy)))


def raised(path: str) -> str:
    case, logp, entropy = random_case(1)
    with pytest.raises(UserError) as caught:
        resolve_loss(path)(case.inputs(torch.tensor(logp), torch.tensor(entropy)))
    return str(caught.value)


def test_of_what_a_users_loss_raises_the_traceback_is_told_from_the_loss_on() -> None:
    told = raised("tests.broken_loss:needs_an_option")
    assert told.startswith("objective.loss tests.broken_loss:needs_an_option raised KeyError: 'margin'\nTraceback")
    assert [line.rpartition(" in ")[2] for line in told.splitlines() if " in " in line] == ["needs_an_option", "_margin"]
    # Callables without Python frames.
    assert raised("builtins:len").endswith("\nTypeError: object of type 'LossInputs' has no len()")
    assert "Traceback" not in raised("builtins:len")
    assert "builtins:max raised TypeError" in raised("builtins:max")  # max does not say how it can be called
    assert "leaves raised SystemExit: 0" in raised("tests.broken_loss:leaves")


@token_local
def sums_a_sequence(inputs: LossInputs) -> LossOutputs:
    return whole_sequences(inputs)


def test_a_user_error_from_inside_of_a_loss_is_told_as_it_is() -> None:
    case, logp, entropy = random_case(1)
    inputs = case.inputs(torch.tensor(logp), torch.tensor(entropy))
    with pytest.raises(UserError, match=r"^a loss that is marked token-local uses sums"):
        resolve_loss("tests.test_own_losses:sums_a_sequence")(inputs.at(slice(5), inputs.logp[:5], inputs.entropy[:5]))


@token_local
def takes_a_mean(inputs: LossInputs) -> LossOutputs:
    return LossOutputs(-(inputs.logp * inputs.advantage).mean())


@pytest.mark.parametrize(
    ("advantages", "complaint"), [((-1.0, 1.0), r"returned rows\['above'\]"), ((1.0, -1.0), r"left out rows\['above'\]")]
)
def test_rows_that_change_their_names_between_calls_are_named(advantages: tuple[float, float], complaint: str) -> None:
    case, logp, entropy = random_case(0)
    first, second = (
        replace(case, rows={**case.rows, "advantage": np.full_like(logp, advantage)}).inputs(
            torch.tensor(logp), torch.tensor(entropy)
        )
        for advantage in advantages
    )
    path = "tests.test_own_losses:reports_now_and_then"
    loss = resolve_loss(path)
    for _ in range(2):
        loss(first)
    with pytest.raises(UserError, match=f"objective.loss {path} {complaint}.*every call must return the same names"):
        loss(second)
    assert "gap" in resolve_loss(path)(second).rows  # the first call in another run


def errors_of_updates(model: str, sequences: list, loss: str, factors: list[dict[str, float]]) -> list[str]:
    """The error of each update ("" if none) when the head applies a loss of this module in small chunks.

    factors: for every update, the factors by which fields of the batch are multiplied.
    """
    policy = build(model, ["parallel.tp=1", "train.head_chunk_rows=5", f"objective.loss=tests.test_own_losses:{loss}"])
    batch, errors = make_batch(sequences), []
    for factor in factors:
        try:
            policy.update(replace(batch, **{name: by * getattr(batch, name) for name, by in factor.items()}))
            errors.append("")
        except UserError as error:
            errors.append(str(error))
    return errors


def test_rows_that_change_their_names_between_chunks_stop_the_update_with_a_sentence(gangs, hf_models) -> None:
    job = {"model": hf_models["llama"], "sequences": SEQUENCES, "loss": "reports_now_and_then", "factors": [{}]}
    ((error,),) = gangs(1).run("tests.test_own_losses:errors_of_updates", **job)
    assert "tests.test_own_losses:reports_now_and_then" in error and "rows['above']" in error


@pytest.mark.parametrize("loss", ["changes_what_its_gradient_needs", "changes_what_its_gradient_needs_unmarked"])
def test_an_operation_in_place_that_spoils_a_losses_gradient_is_told_with_its_name(gangs, hf_models, loss) -> None:
    job = {"model": hf_models["llama"], "sequences": SEQUENCES, "loss": loss, "factors": [{}]}
    ((error,),) = gangs(1).run("tests.test_own_losses:errors_of_updates", **job)
    assert error.startswith(f"objective.loss tests.test_own_losses:{loss} raised in its gradient RuntimeError: one of the var")


@token_local
def compares_with_the_mean(inputs: LossInputs) -> LossOutputs:
    return regularized(inputs, inputs.logp * (inputs.advantage - inputs.advantage.mean()))


@pytest.mark.parametrize(
    ("loss", "factors", "refused"),
    [
        ("takes_a_mean", [{"advantage": 0.0}], [True]),
        ("compares_with_the_mean", [{"weight": 0.0}, {}], [False, True]),
    ],
    ids=["no_advantage_at_first", "no_gradient_at_first"],
)
def test_a_first_update_that_teaches_nothing_does_not_pass_a_loss_for_token_local(gangs, hf_models, loss, factors, refused):
    job = {"model": hf_models["llama"], "sequences": SEQUENCES, "loss": loss, "factors": factors}
    (errors,) = gangs(1).run("tests.test_own_losses:errors_of_updates", **job)
    assert ["marked token-local, but" in error for error in errors] == refused, errors


def reports_on_one_rank(inputs: LossInputs) -> LossOutputs:
    return regularized(inputs, inputs.logp, {"first": inputs.logp} if dist.get_rank() == 0 else {})


def test_rows_that_have_other_names_on_another_rank_stop_the_update_on_every_rank(gangs, hf_models) -> None:
    job = {"model": hf_models["llama"], "sequences": SEQUENCES, "loss": "reports_on_one_rank", "factors": [{}]}
    errors = [error for (error,) in gangs(2).run("tests.test_own_losses:errors_of_updates", **job)]
    assert all("returned rows['first'] on rank 0 and not on rank 1; every rank must" in error for error in errors), errors


@pytest.mark.parametrize(
    ("by_rank", "complaint"),
    [
        ([None, {"a"}, None, {"a"}], None),
        ([None, {"a"}, {"a"}, {"b", "a"}], r"returned rows\['b'\] on rank 3 and not on rank 1;"),
        ([{"b", "a"}, None, {"a"}], r"returned rows\['b'\] on rank 0 and not on rank 2;"),
        ([set(), {7, "a"}], r"returned rows\[7\] on rank 1 and not on rank 0;"),
    ],
)
def test_the_ranks_whose_rows_have_other_names_are_told_and_a_rank_without_rows_is_none(by_rank, complaint) -> None:
    loss = resolve_loss("tests.test_own_losses:squared")
    assert loss.row_names is None
    names = [None if names is None else frozenset(names) for names in by_rank]
    with pytest.raises(UserError, match=complaint) if complaint else nullcontext():
        loss.refuse_other_names(names)


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("nothing", "known: cispo, clipped, gspo, reinforce"),
        ("no_such_module:f", "importing no_such_module failed with ModuleNotFoundError"),
        ("tests.test_own_losses:none", "has no none"),
        ("tests.test_own_losses:NO_FUNCTION", "is not callable"),
        ("tests.test_own_losses:takes_too_much", "callable with one argument"),
    ],
)
def test_a_loss_that_cannot_be_had_is_a_user_error(path: str, complaint: str) -> None:
    with pytest.raises(UserError, match=f"objective.loss is '{path}'.*{complaint}"):
        resolve_loss(path)


def test_a_script_that_leaves_when_it_is_imported_does_not_end_the_run_as_if_all_were_well(tmp_path, monkeypatch) -> None:
    (tmp_path / "script_with_a_loss.py").write_text("import sys\n\ndef f(inputs): ...\n\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="importing script_with_a_loss failed with SystemExit: 0"):
        resolve_loss("script_with_a_loss:f")


def test_a_module_is_looked_for_in_the_working_directory_after_everywhere_else(tmp_path, monkeypatch) -> None:
    code = "def here(inputs): ...\n\nclass Losses:\n    @staticmethod\n    def nested(inputs): ...\n"
    for folder, function in (("installed", "def installed(inputs): ...\n"), ("working", code)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "losses_in_two_places.py").write_text(function)
    (tmp_path / "working" / "losses_beside_the_job.py").write_text(code)
    monkeypatch.chdir(tmp_path / "working")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "installed")])
    assert resolve_loss("losses_beside_the_job:here") and resolve_loss("losses_beside_the_job:Losses.nested")
    assert resolve_loss("losses_in_two_places:installed")


def test_names_are_unique() -> None:
    with pytest.raises(ValueError, match="already registered"):
        register_loss("clipped", token_local=True)(squared)


def test_the_documented_loss_is_what_it_says(tmp_path, monkeypatch):
    lines = (REPO / "docs" / "etr.md").read_text().splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("    from etr_megatron.objective import"))
    code = list(itertools.takewhile(lambda line: not line or line.startswith("    "), lines[begin:]))
    (tmp_path / "documented_losses.py").write_text(textwrap.dedent("\n".join(code)))
    monkeypatch.syspath_prepend(tmp_path)
    case, logp, entropy = random_case(3, LossSettings(options={"power": 0.5}))
    loss = resolve_loss("documented_losses:tempered")
    outputs = loss(case.inputs(torch.tensor(logp, requires_grad=True), torch.tensor(entropy)))
    gate = np.sqrt(case.rows["variance"])
    surrogate = gate * np.exp(logp - case.rows["old_logp"]) * case.rows["advantage"]
    wanted = -(case.rows["weight"] * case.rows["correction"] * surrogate).sum()
    assert loss.token_local and outputs.loss.item() == pytest.approx(wanted, rel=1e-12)
    assert torch.equal(outputs.rows["gate"], torch.tensor(case.rows["variance"]) ** 0.5)
