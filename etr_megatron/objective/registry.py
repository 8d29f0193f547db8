"""Policy losses by name, or by import path for custom ones.

    @token_local
    def my_loss(inputs: LossInputs) -> LossOutputs:      # in my_package/my_losses.py
        ratio = importance_ratio(inputs.logp, inputs.old_logp, inputs.settings.log_ratio_bound)
        return regularized(inputs, ratio * inputs.advantage)

and `objective.loss=my_package.my_losses:my_loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from etr_megatron.errors import UserError
from etr_megatron.imports import ImportPathError, accepts_arguments, import_function
from etr_megatron.objective.attribution import attributed_to_loss
from etr_megatron.objective.inputs import LossInputs, LossOutputs

LossFunction = Callable[[LossInputs], LossOutputs]


@dataclass(eq=False)
class PolicyLoss:
    """A loss and its properties.

    token_local: the loss of a row depends only on that row, so rows may come in chunks whose losses are summed.
    row_names: names of `LossOutputs.rows`, None before the first call.
    """

    name: str
    function: LossFunction
    token_local: bool
    row_names: frozenset[str] | None = field(default=None, init=False, repr=False)

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """The function's checked outputs. Raises UserError for outputs of a wrong type or shape, for row names that differ from
        this object's first call, and for any exception in a custom loss."""
        is_users = ":" in self.name
        is_tried = is_users and self.row_names is None
        if is_tried:
            # Take the trial gradient below through aliases, so that hooks on the policy's tensors do not see it.
            inputs = replace(inputs, logp=inputs.logp.view_as(inputs.logp), entropy=inputs.entropy.view_as(inputs.entropy))
        with attributed_to_loss(self.name) if is_users else nullcontext():
            outputs = self.function(inputs)
        fault = _fault(outputs, inputs) or self._other_rows(outputs)
        if fault:
            raise UserError(f"objective.loss {self.name} {fault}; see LossOutputs in etr_megatron/objective/inputs.py")
        if is_tried:
            self._try_gradient(outputs, inputs)
        return outputs

    def _try_gradient(self, outputs: LossOutputs, inputs: LossInputs) -> None:
        """Raise UserError if the gradient fails, as after an in-place operation; backward's error would not name the loss."""
        policys = [values for values in (inputs.logp, inputs.entropy) if values.requires_grad]
        if policys and outputs.loss.requires_grad:
            with attributed_to_loss(self.name, "in its gradient "):
                torch.autograd.grad(outputs.loss, policys, retain_graph=True, allow_unused=True)

    def _other_rows(self, outputs: LossOutputs) -> str:
        """A message if a name of `outputs.rows` is new or missing, else empty."""
        if self.row_names is None:
            self.row_names = frozenset(outputs.rows)
        changed = sorted(self.row_names ^ outputs.rows.keys(), key=str)
        if not changed:
            return ""
        # A mean over the step's tokens would be wrong if some of them had no value.
        found = "returned" if changed[0] in outputs.rows else "left out"
        return f"{found} rows[{changed[0]!r}], unlike in its first call; every call must return the same names"

    def refuse_other_names(self, by_rank: Sequence[frozenset[str] | None]) -> None:
        """Raise UserError if two ranks with `row_names` disagree on them: a mean would leave out some tokens."""
        known = [(rank, names) for rank, names in enumerate(by_rank) if names is not None]
        for rank, names in known[1:]:
            if changed := sorted(known[0][1] ^ names, key=str):
                has, lacks = (rank, known[0][0]) if changed[0] in names else (known[0][0], rank)
                raise UserError(
                    f"objective.loss {self.name} returned rows[{changed[0]!r}] on rank {has} and not on rank {lacks}; "
                    "every rank must return the same names"
                )


_LOSSES: dict[str, PolicyLoss] = {}


def register_loss(name: str, *, token_local: bool) -> Callable[[LossFunction], LossFunction]:
    """Decorator that registers a loss by name. Raises ValueError if the name is taken."""

    def add(function: LossFunction) -> LossFunction:
        if name in _LOSSES:
            raise ValueError(f"a loss named {name!r} is already registered")
        _LOSSES[name] = PolicyLoss(name, function, token_local)
        return function

    return add


def loss_names() -> tuple[str, ...]:
    """Every registered name, sorted."""
    return tuple(sorted(_LOSSES))


def token_local(function: LossFunction) -> LossFunction:
    """Decorator for a loss given by import path: the loss of a row depends only on that row. See `PolicyLoss`."""
    function.token_local = True  # type: ignore[attr-defined]
    return function


def resolve_loss(name: str) -> PolicyLoss:
    """The loss with that registered name or import path (`package.module:function`); a new object every time.

    Raises UserError for an unknown name, a path that cannot be imported, or a function that does not take one argument.
    """
    if name in _LOSSES:
        return replace(_LOSSES[name])
    if ":" not in name:
        known = ", ".join(loss_names())
        raise UserError(f"objective.loss is {name!r}; known: {known}, and your own as package.module:function")
    try:
        function = import_function(name)
    except ImportPathError as error:
        raise UserError(f"objective.loss is {name!r}: {error}") from error
    if not accepts_arguments(function, 1):
        raise UserError(f"objective.loss is {name!r}: it must be callable with one argument, the LossInputs")
    return PolicyLoss(name, function, bool(getattr(function, "token_local", False)))


def _fault(outputs: object, inputs: LossInputs) -> str:
    """What is wrong with a loss's outputs, or an empty string."""
    if not isinstance(outputs, LossOutputs):
        return f"returned {type(outputs).__name__} instead of LossOutputs"
    loss = outputs.loss
    if not isinstance(loss, Tensor) or loss.shape != () or not loss.is_floating_point():
        return f"returned a loss that is not a scalar floating-point tensor ({_described(loss)})"
    if torch.is_grad_enabled() and inputs.logp.requires_grad and not loss.requires_grad:
        return "returned a loss without a gradient: it depends on neither inputs.logp nor inputs.entropy"
    by_name: object = outputs.rows  # a function of the user's own may have put anything there
    if not isinstance(by_name, Mapping):
        return f"returned rows that are not a mapping of names to tensors ({_described(by_name)})"
    for name, rows in by_name.items():
        if not isinstance(rows, Tensor) or rows.shape != inputs.logp.shape:
            return f"returned rows[{name!r}] that is not a tensor of shape {list(inputs.logp.shape)} ({_described(rows)})"
    return ""


def _described(value: object) -> str:
    return f"{value.dtype}, shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
