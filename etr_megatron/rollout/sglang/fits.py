"""Checks whether a server at `sglang.urls` can load the job's weights, by what the server reports about itself.

A server crashes on a tensor of the wrong shape, and ignores a tensor whose name it does not know.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etr_megatron.config import SglangConfig, sync_of
from etr_megatron.config.schema.fp8 import FP8_BLOCK
from etr_megatron.rollout.sglang.commands import NO_TOKENIZER, ROUTING
from etr_megatron.weights import FAMILIES, Architecture

_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "tie_word_embeddings": "tied_embeddings",
}
"""Fields of config.json that determine names and shapes of weights -> attributes of `Architecture`."""

_OF_HEADS = ("num_key_value_heads", "head_dim")
"""Fields without a meaning for latent attention: transformers writes values there that do not match the tensors."""

_LATENT_SIZES = {
    "q_lora_rank": "q_rank",
    "kv_lora_rank": "kv_rank",
    "qk_nope_head_dim": "nope_dim",
    "qk_rope_head_dim": "rope_dim",
    "v_head_dim": "value_dim",
}
"""Further fields for latent attention -> attributes of `LatentAttention`. If q_lora_rank is null, the tensors differ too."""

_DTYPES = {"half": "float16", "float": "float32"}


_SILENT = ("flashinfer_trtllm", "experimental_sgl_trtllm", "flashinfer_mxfp4", "triton_kernel")
"""Kernels that choose experts internally. SGLang returns zeros as their chosen experts (`layers/moe/topk.py`, 0.5.21).
/server_info reports the kernel that `auto` resolved to: on Blackwell, the first of these."""


@dataclass(frozen=True)
class Expected:
    """The weights that servers will be sent, and what servers must be able to do.

    dtype: as torch names it. tp: workers per server that the sync expects; None where it does not matter, as with `disk`.
    attention_dp: the data-parallel size of their attention; None likewise. fp8: whether matrices are sent in FP8, in blocks
    with scales. routing: whether a server must return the chosen experts. tokenizer: whether it must have a tokenizer, to match
    stop strings.
    """

    architecture: Architecture
    dtype: str
    tp: int | None
    fp8: bool
    routing: bool = False
    tokenizer: bool = False
    attention_dp: int | None = None

    @classmethod
    def of(
        cls, config: SglangConfig, architecture: Architecture, dtype: str, *, routing: bool = False, tokenizer: bool = False
    ) -> Expected:
        """The expectations of a job."""
        tp, attention_dp = (None, None) if sync_of(config) == "disk" else (config.tp, config.dp_attention)
        return cls(architecture, dtype, tp, config.fp8, routing, tokenizer, attention_dp)

    def misfit(self, server: Mapping[str, Any], model: Mapping[str, Any]) -> str | None:
        """The first definite mismatch, with both values; None if there is none. A field that the server does not report counts
        as a match.

        server, model: JSON of `/server_info` and `/model_info`.
        """
        return next(self._misfits(server, model), None)

    def other_dtype(self, server: Mapping[str, Any]) -> str | None:
        """The server's dtype if it reports one that is not the job's, else None. It can load the weights in either case."""
        said = server.get("dtype")
        found = _DTYPES.get(said, said) if isinstance(said, str) else "auto"
        return None if found in ("auto", self.dtype) else found

    def _misfits(self, server: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[str]:
        tp = server.get("tp_size")
        if self.tp is not None and isinstance(tp, int) and tp != self.tp:
            yield f"its tp_size is {tp}, but sglang.tp is {self.tp}"
        replicas = server.get("dp_size")
        if self.tp is not None and isinstance(replicas, int) and replicas > 1 and server.get("enable_dp_attention") is False:
            yield (
                f"its dp_size is {replicas} without --enable-dp-attention, so SGLang allows no weight sync but disk; start "
                f"{replicas} servers instead"
            )
        if self.attention_dp is not None and isinstance(replicas, int) and replicas != self.attention_dp:
            yield f"its dp_size is {replicas}, but sglang.dp_attention is {self.attention_dp}"
        names = model.get("architectures")
        known = [name for name in names if isinstance(name, str) and name in FAMILIES] if isinstance(names, list) else []
        if known and FAMILIES[known[0]] != self.architecture.family:
            yield f"its architectures are {known}, but the job's model is of {self.architecture.family}"
        file, config = _config(server, model)
        for field, wanted in _sizes(self.architecture).items():
            found = config.get(field)
            is_said = isinstance(found, int | float) or (field == "q_lora_rank" and field in config)
            if is_said and found != wanted:
                where = f" according to {file}" if file is not None else ""
                yield f"its {field} is {'null' if found is None else found}{where}, but the job's is {wanted}"
        yield from self._quantisation(server, file, config)
        if self.tokenizer and server.get("skip_tokenizer_init") is True:
            yield f"it was started with {NO_TOKENIZER}, so it cannot match the texts of rollout.stop_strings"
        if self.routing and server.get("enable_return_routed_experts") is False:
            yield f"it was started without {ROUTING}, which train.routing_replay needs"
        if self.routing and (kernel := server.get("moe_runner_backend")) in _SILENT:
            yield (
                f"its moe_runner_backend is {kernel}, which does not report the experts that it "
                "chooses, as train.routing_replay needs; start it with --moe-runner-backend triton"
            )

    def _quantisation(self, server: Mapping[str, Any], file: Path | None, config: Mapping[str, Any]) -> Iterator[str]:
        stored = config.get("quantization_config") or {}
        method, blocks = stored.get("quant_method"), stored.get("weight_block_size")
        # The server's arguments alone do not tell whether its checkpoint is quantised. Arguments and config.json together do.
        is_plain = file is not None and not stored and server.get("quantization", "unsaid") is None
        if not self.fp8 and method is not None:
            yield f"its quantization_config is of {method}, but sglang.fp8 is false"
        elif self.fp8 and (is_plain or method not in (None, "fp8")):
            yield f"its quantization_config is {'null' if is_plain else f'of {method}'}, but sglang.fp8 is true"
        elif self.fp8 and isinstance(blocks, list) and blocks != [FP8_BLOCK, FP8_BLOCK]:
            yield f"its weight_block_size is {blocks}, but sglang.fp8 needs {[FP8_BLOCK, FP8_BLOCK]}"


def groups_of(server: Mapping[str, Any]) -> int:
    """Number of groups of a server's workers that attend, and cache prefixes, for requests of their own. server: JSON of
    `/server_info`."""
    found = server.get("dp_size")
    return found if isinstance(found, int) else 1


def _sizes(architecture: Architecture) -> dict[str, float | None]:
    """Expected values of the fields of config.json that determine shapes, or how experts are chosen and weighted."""
    experts, latent = architecture.experts, architecture.latent
    found = {field: getattr(architecture, name) for field, name in _SIZES.items()}
    if latent is not None:
        found = {field: size for field, size in found.items() if field not in _OF_HEADS}
        found |= {field: getattr(latent, name) for field, name in _LATENT_SIZES.items()}
    if experts is None or experts.dense_layers:
        found["intermediate_size"] = architecture.intermediate_size
    if experts is not None:
        counts = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), experts.count)
        found |= counts | {"moe_intermediate_size": experts.intermediate_size, "num_experts_per_tok": experts.per_token}
    if experts is not None and experts.expert_bias:
        found["n_shared_experts"] = experts.shared_size // experts.intermediate_size
        found |= {"first_k_dense_replace": len(experts.dense_layers), "use_qk_norm": architecture.qk_norm}
        found |= {"n_group": experts.groups, "topk_group": experts.groups_per_token}
        found["routed_scaling_factor"] = experts.scaling_factor
    return found


def _config(server: Mapping[str, Any], model: Mapping[str, Any]) -> tuple[Path | None, dict[str, Any]]:
    """The path of the server's config.json, None if this machine does not have it; its fields with the server's overrides.

    The same path in the server's container may be another file, so a file for another kind of model is ignored.
    """
    file, config = None, {}
    path = server.get("model_path")
    if isinstance(path, str) and Path(path).is_absolute():
        found = _json_object(Path(path) / "config.json")
        if found and all(model.get(key) in (None, found.get(key)) for key in ("model_type", "architectures")):
            file, config = Path(path) / "config.json", found
    return file, config | _object(server.get("json_model_override_args"))


def _json_object(file: Path) -> dict[str, Any]:
    try:
        return _object(file.read_text())
    except (OSError, UnicodeDecodeError):
        return {}


def _object(text: Any) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
