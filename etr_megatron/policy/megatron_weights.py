"""Load a checkpoint directory into a policy model, from HuggingFace's format (FP8 as bf16) or Megatron's `torch_dist`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from etr_megatron import platform
from etr_megatron.errors import UserError
from etr_megatron.platform.all_ranks import on_all_ranks
from etr_megatron.policy.model import (
    PolicyModel,
    build_chunks,
    load_hf_weights,
    own_parameters,
    plain_values,
    weights_in,
)
from etr_megatron.policy.model_config import transformer_config
from etr_megatron.policy.parallel import Layout
from etr_megatron.policy.replicas import ReadOnce
from etr_megatron.weights import Architecture, is_torch_dist, open_checkpoint
from etr_megatron.weights.boxes import ByName
from etr_megatron.weights.listing import listed

_INITIAL_VALUES = ("_high_precision_init_val", "get_high_precision_init_val", "clear_high_precision_init_val")
"""Attributes that Transformer Engine adds to a weight that it creates in FP8."""


def load_weights(models: Sequence[Sequence[PolicyModel]], checkpoint_dir: str | Path) -> None:
    """Copy this rank's shards of a checkpoint into the parameters of every model (in place; each model is its list of chunks).
    A collective: only one of the ranks that hold a shard reads it.

    Raises UserError, on every rank, if the checkpoint does not fit the model, cannot be read, or has NaN or infinity.
    """
    if is_torch_dist(checkpoint_dir):
        load_megatron_weights(models, checkpoint_dir)
    else:
        load_hf_weights(models, open_checkpoint(checkpoint_dir))
    on_all_ranks(lambda: _check_finite(models[0], checkpoint_dir))
    for parameter in (parameter for chunks in models for chunk in chunks for parameter in chunk.parameters()):
        # Transformer Engine keeps the random initial values of an FP8 weight, and the optimizer would start from them. With
        # these attributes deleted it starts from the loaded weight; TE's `clear_high_precision_init_val` leaves a None.
        for name in _INITIAL_VALUES:
            if hasattr(parameter, name):
                delattr(parameter, name)


@torch.no_grad()
def _check_finite(chunks: Sequence[PolicyModel], checkpoint_dir: str | Path) -> None:
    own = own_parameters(chunks).values()
    broken = [weight.hf[0] for weight, values in own if not plain_values(values).isfinite().all()]
    if broken:
        raise UserError(f"{checkpoint_dir} has NaN or infinity in {listed(broken)}")


@torch.no_grad()
def load_megatron_weights(models: Sequence[Sequence[PolicyModel]], checkpoint_dir: str | Path) -> None:
    """`load_weights` for a `torch_dist` directory, written by any layout or by `tools/convert_hf.py`. A collective.

    Ignores any optimizer state in it.
    """
    wanted = {
        f"chunk{number}": {
            # `_extra_state` is empty in layers without FP8 state, and which layers have one differs between specs.
            name: part
            for name, part in chunk.sharded_state_dict().items()
            if not isinstance(part, ShardedObject)
        }
        for number, chunk in enumerate(models[0])
    }
    try:
        with warnings.catch_warnings():
            # Megatron uses deprecated torch APIs.
            warnings.simplefilter("ignore", FutureWarning)
            state: Any = dist_checkpointing.load(wanted, str(checkpoint_dir), ReadOnce())
    except (CheckpointException, CheckpointingException, KeyError) as error:
        raise UserError(f"{checkpoint_dir} does not fit this model ({reason(error)})") from error
    for number, chunk in ((number, chunk) for chunks in models for number, chunk in enumerate(chunks)):
        found = chunk.load_state_dict(state[f"chunk{number}"], strict=False)
        missing = set(found.missing_keys) & weights_in(chunk).keys()
        if missing:
            raise UserError(f"{checkpoint_dir} lacks {len(missing)} parameters of this model, first {min(missing)}")


def reason(error: BaseException) -> str:
    """One line on why a checkpoint could not be read: the first of the ranks' messages that torch gathered, without torch's
    list of all keys in the checkpoint."""
    failures = error.failures.values() if isinstance(error, CheckpointException) else ()
    cause = next((failure[0] for failure in failures), error)
    return str(cause).partition("\n")[0].partition(": [")[0].strip("'\"") or type(cause).__name__


@torch.no_grad()
def megatron_logits(arch: Architecture, weights: str | Path | ByName, layout: Layout, tokens: Tensor) -> Tensor:
    """Logits, fp32 [1, S, V] on the CPU, of tokens [1, S] from an fp32 model without an optimizer; single rank only.

    weights: a checkpoint directory, or tensors by HF name.
    """
    config = transformer_config(arch, layout, sequence_parallel=False, dtype=torch.float32)
    (model,) = build_chunks(arch, config, layout)
    if isinstance(weights, ByName):
        load_hf_weights([[model.eval()]], weights)
    else:
        load_weights([[model.eval()]], weights)
    tokens = tokens.to(platform.device())
    hidden = model(tokens, torch.arange(tokens.shape[1], device=tokens.device)[None], None)
    return (hidden @ model.head_weight().t()).transpose(0, 1)[..., : arch.vocab_size].cpu()
