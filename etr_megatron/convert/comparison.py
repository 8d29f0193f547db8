"""Checks that a torch_dist checkpoint is the same model as a HuggingFace one: bit by bit, and by the logits of a prompt.

An FP8 tensor is the same as Megatron's in two cases:

- It dequantises to exactly Megatron's values: the Megatron checkpoint was converted from FP8.
- Megatron's values, as stored or rounded to bf16, quantise to its bits and scales: the FP8 was exported from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from etr_megatron.convert.progress import progress_bar
from etr_megatron.convert.quantiser import Quantiser
from etr_megatron.convert.ranks import Ranks
from etr_megatron.convert.source import find_megatron
from etr_megatron.errors import UserError
from etr_megatron.platform.transformers_errors import transformers_errors
from etr_megatron.types import TOKENIZER_FILES
from etr_megatron.weights import (
    Architecture,
    BoxSource,
    Merged,
    SafetensorsDir,
    Weight,
    check_checkpoint,
    open_checkpoint,
    weights_of,
)
from etr_megatron.weights.boxes import ByName
from etr_megatron.weights.fp8_dir import Fp8Dir
from etr_megatron.weights.latent import use_norm_eps
from etr_megatron.weights.map import EMBEDDING, hf_name

PROMPT = "Natalia had 48 clips and sold half of them. How many clips are left?"

LOGIT_TOLERANCE = 1e-5
"""Largest allowed difference of two logits, relative to the largest logit: fp32 sums differ in the order of their terms."""


@dataclass
class Verification:
    """Result of `verify`. differing: HF names of tensors with any bit that differs. tensors: how many were compared.

    rounded: HF names of FP8 tensors that are the same only after Megatron's values are quantised. logits: (largest difference,
    largest logit), None if they were not compared.
    """

    tensors: int = 0
    differing: list[str] = field(default_factory=list)
    rounded: list[str] = field(default_factory=list)
    logits: tuple[float, float] | None = None

    @property
    def logits_agree(self) -> bool:
        """Whether logits are within the tolerance; true if they were not compared."""
        return self.logits is None or self.logits[0] <= LOGIT_TOLERANCE * max(1.0, self.logits[1])

    @property
    def same(self) -> bool:
        """Whether it is the same model."""
        return not self.differing and self.logits_agree


def verify(
    hf: Path, megatron: Path, ranks: Ranks, *, logits: bool = True, prompt: str | None = None, base: Path | None = None
) -> Verification:
    """Compare every tensor bit by bit, HF values cast to the stored type, and then the logits of a prompt in fp32.

    FP8 is compared as the module docstring says. Where it is the quantised form of Megatron's values, the logits are computed
    from Megatron's values. prompt: None means `PROMPT`. base: see `find_megatron`; adapters are merged into it before they are
    compared. One process only. Tensors are read part by part, tensors to be quantised one at a time; for the logits both models
    are in memory. Raises UserError for directories that cannot be read or hold different architectures, and for a prompt
    without tokens, without a tokenizer, or with a tokenizer of another model.
    """
    if ranks.world > 1:
        raise UserError("verify runs in one process; start it without torchrun")
    arch = check_checkpoint(hf, named="--hf", values=True)
    found = find_megatron(megatron, config_from=hf, base=base)
    stored, source = found.open(arch), open_checkpoint(hf)
    tokens = None
    if logits:  # checked before hours of reading
        _refuse_unknown_to_transformers(hf)
        tokens = _tokens(hf, arch, prompt)
    result = _compare_tensors(arch, stored, source, ranks)
    if isinstance(stored, Merged):
        stored.refuse_other_base(ranks.all_reduce_sum)
    if tokens is not None:
        ours = _megatron_logits(arch, found.weights if found.base is None else ByName(stored, arch), tokens)
        types = {name: stored.type_of(name, w) for w in weights_of(arch) for name in w.hf}
        exact = _whole_tensors(set(result.rounded), arch, stored)
        theirs = _transformers_logits(hf, source, tokens, types, exact, usual=types[hf_name(arch.family, EMBEDDING)])
        result.logits = ((ours - theirs).abs().max().item(), theirs.abs().max().item())
    return result


def _compare_tensors(arch: Architecture, stored: BoxSource, source: SafetensorsDir, ranks: Ranks) -> Verification:
    result = Verification()
    weights = weights_of(arch)
    total = sum(
        torch.Size(shape).numel() * stored.type_of(name, weight).itemsize
        for weight in weights
        for name, shape in zip(weight.hf, weight.shapes, strict=True)
    )
    fp8 = (source, Quantiser(stored, arch, source.block)) if isinstance(source, Fp8Dir) else None
    with progress_bar(total, ranks) as bar:
        for weight in weights:
            differing = set()
            for name, begin, values in stored.parts(weight, arch):
                wanted = source.read(name, begin, tuple(values.shape)).to(values.dtype)
                if not torch.equal(_bits(values), _bits(wanted)):
                    differing.add(name)
                bar.update(values.nbytes)
            rounded = {name for name in differing if fp8 and _is_quantised(name, weight, stored, *fp8)}
            result.tensors += len(weight.hf)
            result.rounded += [name for name in weight.hf if name in rounded]
            result.differing += [name for name in weight.hf if name in differing - rounded]
    return result


def _is_quantised(name: str, weight: Weight, stored: BoxSource, source: Fp8Dir, quantiser: Quantiser) -> bool:
    """Whether a tensor is FP8 and equals, with its scales, the stored values quantised as they are or rounded to bf16 first."""
    if name not in source.quantized:
        return False
    dtypes = dict.fromkeys((stored.type_of(name, weight), torch.bfloat16))
    return any(_equals_panels(quantiser.panels(name, weight, dtype), name, source) for dtype in dtypes)


def _equals_panels(panels: Iterator[tuple[int, Tensor, Tensor]], name: str, source: Fp8Dir) -> bool:
    for first, *ours in panels:
        theirs = source.read_quantized(name, (first, 0), tuple(ours[0].shape))
        if not all(torch.equal(_bits(a), _bits(b)) for a, b in zip(ours, theirs, strict=True)):
            return False
    return True


def _whole_tensors(names: Set[str], arch: Architecture, stored: BoxSource) -> dict[str, Tensor]:
    """Megatron's values of these tensors, by HF name."""
    found: dict[str, Tensor] = {}
    for weight in weights_of(arch):
        for name, shape in zip(weight.hf, weight.shapes, strict=True):
            if name in names:
                found[name] = torch.empty(shape, dtype=stored.type_of(name, weight))
                stored.read_into(name, weight, arch, found[name])
    return found


def _bits(values: Tensor) -> Tensor:
    """The same bits as integers: a NaN equals itself, 0 differs from -0."""
    return values.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.dtype.itemsize])


def _tokens(hf: Path, arch: Architecture, prompt: str | None) -> Tensor:
    """int64 [1, S]: the prompt's tokens; without prompt and tokenizer, ids spread over the vocabulary. Raises UserError."""
    if not any((hf / file).is_file() for file in TOKENIZER_FILES):
        if prompt is not None:
            raise UserError(f"{hf} has no tokenizer for --prompt; leave it out to compare on made-up tokens")
        return (torch.arange(16) * 7919 % arch.vocab_size)[None]
    from etr_megatron.data import load_tokenizer

    text = PROMPT if prompt is None else prompt
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("--prompt is not UTF-8; give another one") from None
    ids = load_tokenizer(hf, named="--hf").encode(text)
    if not ids:
        raise UserError("--prompt has no tokens; give another one")
    if 0 < arch.max_positions < len(ids):
        raise UserError(
            f"--prompt has {len(ids)} tokens, more than the {arch.max_positions} positions of the model; give a shorter one"
        )
    if max(ids) >= arch.vocab_size:
        raise UserError(
            f"{hf}: the tokenizer produces token id {max(ids)} for the prompt, but the model has only {arch.vocab_size} tokens "
            "(vocab_size of config.json); copy this model's tokenizer files there"
        )
    return torch.tensor([ids])


def _refuse_unknown_to_transformers(hf: Path) -> None:
    """Raise UserError if transformers cannot build the model. No weights are read, and no memory is allocated for them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with transformers_errors(hf), torch.device("meta"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(hf), dtype=torch.float32)


@torch.no_grad()
def _transformers_logits(
    hf: Path,
    source: SafetensorsDir,
    tokens: Tensor,
    stored: dict[str, torch.dtype],
    exact: dict[str, Tensor],
    usual: torch.dtype,
) -> Tensor:
    """fp32 [1, S, V] on the CPU, from weights rounded to their types in the Megatron checkpoint.

    stored: HF name -> type in the Megatron checkpoint. usual: the type of experts, which transformers fuses under other names.
    exact: for some FP8 tensors, the values that were quantised. The model gets these, and other FP8 tensors dequantised,
    because transformers' own FP8 kernels need a GPU and quantise activations as well.
    """
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    from etr_megatron import platform

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # hides a table of unused tensors, such as layers for multi-token prediction

    if isinstance(source, Fp8Dir):
        config = AutoConfig.from_pretrained(hf)
        del config.quantization_config
        tensors = {
            name: exact[name] if name in exact else source.read(name, (0,) * len(size), size)
            for name, size in source.shapes().items()
        }
        kind = getattr(transformers, config.architectures[0])
        model = kind.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32)
    else:
        with transformers_errors(hf):
            model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    use_norm_eps(model)
    model = model.to(platform.device()).eval()
    for name, parameter in model.named_parameters():
        parameter.copy_(parameter.to(stored.get(name, usual)))
    return model(tokens.to(platform.device())).logits.cpu()


def _megatron_logits(arch: Architecture, weights: Path | ByName, tokens: Tensor) -> Tensor:
    """fp32 [1, S, V] of the policy's model, loaded from the torch_dist directory or the merged tensors."""
    import torch.distributed as dist

    from etr_megatron import platform

    if not dist.is_initialized():  # Megatron needs a world, here of one process
        dist.init_process_group(platform.backend(), store=dist.HashStore(), rank=0, world_size=1)
    from etr_megatron.policy import init_layout
    from etr_megatron.policy.megatron_weights import megatron_logits

    return megatron_logits(arch, weights, init_layout(1, 1, seed=1), tokens)
