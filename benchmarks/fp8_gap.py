"""How far log-probs computed in FP8 are from those in bfloat16, by a simulation of a real checkpoint on CPU.

    python -m benchmarks.fp8_gap --model DIR

A model in FP8 draws responses. Log-probs of these tokens are then computed in several ways, and compared in pairs:

    bf16          everything in bfloat16, as a trainer without FP8
    fp8           matrices of the layers in FP8: weights in blocks of 128 x 128, activations in groups of 128 along a row,
                  products and sums in fp32; the rest in bfloat16. As servers with `sglang.fp8`, and `fp8.recipe: blockwise`
    bf16', fp8'   the same with another implementation of attention, which rounds in other places: as two programs that both
                  are right
    fp32          everything in fp32

    swapped       bfloat16, with the first and the last layer swapped: a model with other weights

The head stays in bfloat16, as in servers. The simulation has the formats' rounding and none of a GPU's kernels.

The gap of a probe (`sglang.probe_every`) is the mean over its few tokens, which are drawn from a prompt without meaning. Of 40
probes the largest gap is reported where both compute with the same weights, and the smallest where they do not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.experiment_environment import environment
from benchmarks.output import code_of_stoppable, prepare_output
from etr_megatron.config.schema.fp8 import FP8_BLOCK
from etr_megatron.data import load_tokenizer
from etr_megatron.errors import UserError
from etr_megatron.rollout.sglang.control import PROBE_PROMPT
from etr_megatron.weights.quantize import FP8, dequantize_box, quantize_blocks

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = (
    "What is 17 * 23? Think step by step.",
    "Natalia has 48 shells, and Tom has half as many. How many shells do they have together?",
    "Solve for x: 3x + 7 = 22.",
    "Write a short story about a lighthouse keeper.",
    "Explain why the sky is blue.",
    "A train travels 60 km in 45 minutes. What is its speed in km/h?",
    "List three prime numbers greater than 50, and explain why they are prime.",
    "What is the derivative of x^3 + 2x?",
)
PROBES, PROBE_TOKENS = 40, 32
PROBE_PAIRS = (("bf16'", "bf16"), ("fp8", "bf16"), ("fp8", "swapped"))
"""(the way that draws the probes, the way that checks them)."""
PAIRS = (("fp32", "bf16"), ("bf16", "bf16'"), ("bf16", "fp8"), ("fp8", "fp8'"))
Sample = tuple[list[int], list[int]]
"""Token ids of a prompt and of a response."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; exits with 2 if an option is wrong. Raises `UserError` for values that do not fit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fp8_gap", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="HuggingFace checkpoint directory with a chat template")
    parser.add_argument("--samples", type=int, default=3, help="responses to each of the 8 prompts (default 3)")
    parser.add_argument("--tokens", type=int, default=128, help="longest response (default 128)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "fp8_gap.json", help="JSON")
    options = parser.parse_args(argv)
    for name in ("samples", "tokens"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}; it must be at least 1")
    prepare_output(options.output)
    return options


def quantized_rows(values: Tensor) -> Tensor:
    """fp32 [..., K]: `values` [..., K] after a round trip through e4m3, each group of 128 along a row with its own scale."""
    size = values.shape[-1]
    groups = nn.functional.pad(values.float(), (0, -size % FP8_BLOCK)).unflatten(-1, (-1, FP8_BLOCK))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / torch.finfo(FP8).max
    return ((groups / scale).to(FP8).float() * scale).flatten(-2)[..., :size]


def in_fp8(model: PreTrainedModel) -> PreTrainedModel:
    """The model, changed in place, with all linear layers but the head in FP8."""
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or name == "lm_head":
            continue
        weight = torch.empty(layer.weight.shape)
        dequantize_box(*quantize_blocks(layer.weight.data, FP8_BLOCK), weight, FP8_BLOCK)

        def forward(values: Tensor, weight: Tensor = weight, layer: nn.Linear = layer) -> Tensor:
            bias = None if layer.bias is None else layer.bias.float()
            return nn.functional.linear(quantized_rows(values), weight, bias).to(values.dtype)

        layer.forward = forward  # type: ignore[method-assign]
    return model


def loaded(model: Path, way: str) -> PreTrainedModel:
    """The checkpoint as `way` (see above) computes."""
    dtype = torch.float32 if way == "fp32" else torch.bfloat16
    attention = "eager" if way.endswith("'") else "sdpa"
    found = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation=attention).eval()
    if way == "swapped":
        layers = found.model.layers
        layers[0], layers[-1] = layers[-1], layers[0]
    return in_fp8(found) if way.startswith("fp8") else found


@torch.no_grad()
def drawn(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: int, tokens: int) -> list[Sample]:
    """Responses at temperature 1, each up to and with its end-of-sequence token."""
    torch.manual_seed(0)
    found = []
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        options = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens)
        inputs = torch.tensor([ids] * samples)
        outputs: Any = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), pad_token_id=tokenizer.eos_token_id, **options
        )
        for row in outputs[:, len(ids) :].tolist():
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            found.append((ids, row[:end]))
    return found


@torch.no_grad()
def logprobs(model: PreTrainedModel, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of all response tokens, fp32 [tokens]."""
    parts, entropies = [], []
    for prompt, response in samples:
        logits = model(torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        of_all = torch.log_softmax(logits.float(), -1)
        parts.append(of_all.gather(1, torch.tensor(response)[:, None])[:, 0])
        entropies.append(-(of_all.exp() * of_all).sum(-1))
    return torch.cat(parts), torch.cat(entropies)


def gap(one: Tensor, other: Tensor) -> dict[str, float]:
    """Figures of abs(one - other), nats per token."""
    found = (one - other).abs().double()
    return {"mean": found.mean().item(), "mean_exp": found.exp().mean().item(), "max": found.max().item()}


@torch.no_grad()
def probes_of(model: PreTrainedModel, eos: int) -> list[Sample]:
    """What a server would draw for `PROBES` probes. As on a server, a probe continues after an end-of-sequence token."""
    torch.manual_seed(1)
    inputs = torch.tensor([list(PROBE_PROMPT)] * PROBES)
    options = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None, max_new_tokens=PROBE_TOKENS)
    outputs: Any = model.generate(inputs, attention_mask=torch.ones_like(inputs), pad_token_id=eos, **options)
    return [(list(PROBE_PROMPT), row) for row in outputs[:, len(PROBE_PROMPT) :].tolist()]


def probe_gaps(model: Path, eos: int) -> dict[str, dict[str, float]]:
    """The smallest and the largest gap of a probe, nats per token, for each of `PROBE_PAIRS`."""
    found = {}
    for one, other in PROBE_PAIRS:
        probes = probes_of(loaded(model, one), eos)
        gaps = (logprobs(loaded(model, one), probes)[0] - logprobs(loaded(model, other), probes)[0]).abs()
        means = gaps.view(PROBES, -1).double().mean(1)
        found[f"{one} - {other}"] = {"smallest": means.min().item(), "largest": means.max().item()}
    return found


def measure(model: Path, samples: int, tokens: int) -> dict[str, Any]:
    """The result, less the environment. Raises UserError for a checkpoint that has no chat template or cannot be read."""
    tokenizer = load_tokenizer(model, named="--model")
    if not tokenizer.chat_template:
        raise UserError(f"--model: the tokenizer in {str(model)!r} has no chat template; name a checkpoint that has one")
    responses = drawn(loaded(model, "fp8"), tokenizer, samples, tokens)
    ways = dict.fromkeys(way for pair in PAIRS for way in pair)
    found = {way: logprobs(loaded(model, way), responses) for way in ways}
    return {
        "model": model.resolve().name,
        "tokens": sum(len(response) for _, response in responses),
        "entropy": found["bf16"][1].double().mean().item(),
        "gaps": {f"{one} - {other}": gap(found[one][0], found[other][0]) for one, other in PAIRS},
        "probes": probe_gaps(model, tokenizer.eos_token_id),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit code: 2 if an option is wrong."""
    torch.set_num_threads(1)
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        result = {"environment": environment(ROOT), **measure(options.model, options.samples, options.tokens)}
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['model']}: {result['tokens']:,} tokens, entropy {result['entropy']:.2f} nats")
    for name, each in result["gaps"].items():
        print(f"  {name:<14} mean {each['mean']:.4f}  mean of exp {each['mean_exp']:.3f}  max {each['max']:.2f}")
    for name, each in result["probes"].items():
        print(f"  {name:<14} probes: smallest {each['smallest']:.3f}  largest {each['largest']:.3f}")
    print(f"written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(code_of_stoppable(main))
