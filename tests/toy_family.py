"""A made-up dense family: its table, a checkpoint of it, and jobs that gang ranks run to build it in Megatron."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from etr_megatron.weights import FAMILIES, TABLES, read_architecture, weights_of
from etr_megatron.weights.map import Row


def toy_family() -> tuple[Row, ...]:
    """A dense family with its own tensor names and nothing fused in the server."""
    hf, megatron = "transformer.h.{layer}.", "decoder.layers.{layer}."

    def row(name: str, split: str, tensors: dict[str, str], te: str = "", fp8: bool = False) -> Row:
        named = tuple((hf + tensor, dims) for tensor, dims in tensors.items())
        return Row(megatron + name, split, named, megatron + te if te else "", fp8=fp8)

    return (
        Row("embedding.word_embeddings.weight", "vocab", (("transformer.wte.weight", "VH"),)),
        row("input_layernorm.weight", "replicated", {"ln_1.weight": "H"}, "self_attention.linear_qkv.layer_norm_weight"),
        row("self_attention.linear_qkv.weight", "qkv", {"q.weight": "QH", "k.weight": "KH", "v.weight": "KH"}, fp8=True),
        row("self_attention.linear_proj.weight", "row", {"o.weight": "HQ"}, fp8=True),
        row("self_attention.linear_qkv.bias", "qkv", {"q.bias": "Q", "k.bias": "K", "v.bias": "K"}),
        row("pre_mlp_layernorm.weight", "replicated", {"ln_2.weight": "H"}, "mlp.linear_fc1.layer_norm_weight"),
        row("mlp.linear_fc1.weight", "gate_up", {"gate.weight": "FH", "up.weight": "FH"}, fp8=True),
        row("mlp.linear_fc2.weight", "row", {"down.weight": "HF"}, fp8=True),
        Row("decoder.final_layernorm.weight", "replicated", (("transformer.ln_f.weight", "H"),)),
        Row("output_layer.weight", "vocab", (("head.weight", "VH"),)),
    )


def register() -> None:
    """Same effect as a line in `FAMILIES` and one in `TABLES`."""
    TABLES["toy"] = toy_family()
    FAMILIES["ToyForCausalLM"] = "toy"


def unregister() -> None:
    """Undo `register`."""
    TABLES.pop("toy")
    FAMILIES.pop("ToyForCausalLM")


def write_toy(qwen2: str, path: Path) -> None:
    """The qwen2 checkpoint under the toy family's names, which have the same order."""
    config = json.loads((Path(qwen2) / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"architectures": ["ToyForCausalLM"], "model_type": "toy"}))
    names = ([name for weight in weights_of(read_architecture(folder)) for name in weight.hf] for folder in (qwen2, path))
    tensors = load_file(f"{qwen2}/model.safetensors")
    save_file({ours: tensors[theirs] for theirs, ours in zip(*names, strict=True)}, path / "model.safetensors")


def run(job: str, **arguments: Any) -> Any:
    """Run a job of tests.policy_jobs with the family registered."""
    from tests import policy_jobs

    register()
    try:
        return getattr(policy_jobs, job)(**arguments)
    finally:
        unregister()
