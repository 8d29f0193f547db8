"""The embedded engine: a transformers replica of the policy in every rank, with the prompts spread over all ranks.

Like a server, it takes weight updates by name, and it returns the same fields. It is the default of `rollout.backend`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from etr_megatron.platform.transformers_errors import transformers_errors
from etr_megatron.rollout.engine import MustStop, Sampling, never, sample_seed
from etr_megatron.rollout.sampling import draw
from etr_megatron.rollout.stops import NO_STOP_STRINGS, StopStrings
from etr_megatron.types import Problem, Sample
from etr_megatron.weights.latent import use_norm_eps


class EmbeddedEngine:
    """A replica of the policy in HF format, decoding batches of at most `batch_samples` responses.

    Only config.json is read from model_dir. The weights come with the first update, so that not every rank reads all of them.

    Batches are formed first and then spread over the ranks. So the batch of a response does not depend on the layout, and the
    same weights give the same samples on any number of ranks.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        batch_samples: int,
        stop_ids: Iterable[int],
        stop_strings: StopStrings = NO_STOP_STRINGS,
    ) -> None:
        self.weight_version, self._has_weights = 0, False
        transformers_logging.disable_progress_bar()  # every rank would show one below the run's own
        self._model = _replica(model_dir, dtype).to(device).eval().requires_grad_(False)
        self._device, self._batch_samples = device, batch_samples
        self._stop_ids, self._stop_strings = frozenset(stop_ids), stop_strings

    def generate(self, problems: Sequence[Problem], sampling: Sampling, must_stop: MustStop = never) -> list[list[Sample]]:
        """See `RolloutEngine.generate`. must_stop is not checked: the ranks finish their responses first. Raises RuntimeError
        before the first update."""
        if not self._has_weights:
            raise RuntimeError("the engine has no weights before the first update_weights")
        counts, limits = sampling.samples_of(problems), sampling.max_tokens_of(problems)
        jobs = [(number, index) for number, count in enumerate(counts) for index in range(count)]
        batches = [jobs[begin : begin + self._batch_samples] for begin in range(0, len(jobs), self._batch_samples)]
        mine: list[tuple[tuple[int, int], Sample]] = []
        for batch in batches[dist.get_rank() :: dist.get_world_size()]:
            with _Routing(self._model) if sampling.routing else nullcontext() as routing:
                drawn = self._decode([_Job(problems[n], i, limits[n]) for n, i in batch], sampling, routing)
            mine.extend(zip(batch, drawn, strict=True))
        shares: list[list[tuple[tuple[int, int], Sample]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(shares, mine)
        found = {job: sample for share in shares for job, sample in share}
        return [[found[number, index] for index in range(count)] for number, count in enumerate(counts)]

    @torch.no_grad()
    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int, must_stop: MustStop = never) -> None:
        """Copy the tensors into the replica's own parameters (in place). See `RolloutEngine.update_weights`."""
        wanted = _published_parameters(self._model)
        problems = []
        for name, tensor in weights:  # consumed to the end even after an error: the export is a collective
            parameter = wanted.pop(name, None)
            if parameter is None:
                problems.append(f"{name} is unknown to the engine or was sent twice")
            elif parameter.shape != tensor.shape:
                problems.append(f"{name} has shape {tuple(tensor.shape)}, but the engine needs {tuple(parameter.shape)}")
            else:
                parameter.copy_(tensor)
        problems += [f"{name} is missing" for name in wanted]
        if problems:
            raise ValueError(f"weight update {version}: " + "; ".join(problems))
        self.weight_version, self._has_weights = version, True

    def release(self) -> None:
        """See `RolloutEngine.release`: the replica is small and stays."""

    def metrics(self) -> dict[str, float]:
        """See `RolloutEngine.metrics`: there are none."""
        return {}

    def close(self) -> None:
        """Drop the replica."""
        del self._model

    @torch.no_grad()
    def _decode(self, jobs: list[_Job], sampling: Sampling, routing: _Routing | None = None) -> list[Sample]:
        """Responses of one batch, with a KV cache over left-padded prompts; finished rows leave the batch."""
        state = _Batch(jobs, sampling, self._device)
        cache = DynamicCache(config=self._model.config)
        tokens, mask = state.prompts()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        rows = torch.arange(len(jobs), device=self._device)
        for step in range(max(job.max_tokens for job in jobs)):
            out = self._model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            if routing is not None:
                state.append_routing(rows.tolist(), routing.of_pass(len(rows)), mask[:, -tokens.shape[1] :])
            drawn, logp = draw(
                out.logits[:, -1],
                state.uniform[rows, step],
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
            )
            alive = state.append(rows.tolist(), drawn.tolist(), logp.tolist(), self._is_over)
            if not alive:
                break
            if len(alive) < len(rows):
                keep = torch.tensor(alive, device=self._device)
                cache.batch_select_indices(keep)
                rows, drawn, mask, positions = rows[keep], drawn[keep], mask[keep], positions[keep]
            tokens = drawn[:, None]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            positions = positions[:, -1:] + 1
        return state.samples(self.weight_version)

    def _is_over(self, ids: list[int]) -> bool:
        """Whether the turn with tokens `ids` ends with the last of them."""
        return ids[-1] in self._stop_ids or self._stop_strings.end_with(ids)


def _replica(model_dir: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model in HF format with uninitialised parameters. Raises UserError when transformers cannot build it."""
    with transformers_errors(model_dir), no_init_weights():
        config = AutoConfig.from_pretrained(model_dir)
        if getattr(config, "quantization_config", None) is not None:  # training and this engine compute in `dtype`
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        use_norm_eps(model)
        model.tie_weights()  # part of the initialisation, which is skipped
        for buffer in _saved_buffers(model).values():
            buffer.data = buffer.float()  # transformers creates those of DeepSeek-V3 in `dtype`
        return model


def _saved_buffers(model: torch.nn.Module) -> dict[str, Tensor]:
    """Buffers that are part of checkpoints: the router biases of GLM-4.5 and DeepSeek-V3, float32 in a model of any dtype."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def _published_parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and `_saved_buffers` by their names in published checkpoints. Experts are views, because transformers keeps
    all experts of a layer in one tensor."""
    found = _saved_buffers(model)
    for name, parameter in model.named_parameters():
        layer, _, kind = name.rpartition(".experts.")
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(kind, ()) if layer else ()
        if not parts:
            found[name] = parameter
        for expert, whole in enumerate(parameter if parts else ()):
            for part, view in zip(parts, whole.chunk(len(parts)), strict=True):
                found[f"{layer}.experts.{expert}.{part}.weight"] = view
    return found


class _Routing:
    """Records the experts that the routers of a replica choose in each forward pass while the block runs."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model, self._hooks = model, ExitStack()
        self._chosen: list[Tensor] = []

    def __enter__(self) -> _Routing:
        for name, module in self._model.named_modules():
            if name.endswith(".experts"):  # called with the tokens, the experts of each token, and the experts' weights
                hook = module.register_forward_pre_hook(lambda _module, inputs: self._chosen.append(inputs[1]))
                self._hooks.callback(hook.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def of_pass(self, rows: int) -> Tensor:
        """Experts chosen in the last forward pass, of `rows` rows: uint8 [rows, tokens, layers with experts, experts per
        token]."""
        found = torch.stack(self._chosen, 1).to("cpu", torch.uint8)
        self._chosen.clear()
        return found.view(rows, -1, *found.shape[1:])


class _Job(NamedTuple):
    """A response to draw."""

    problem: Problem
    sample_index: int
    max_tokens: int


class _Batch:
    """The tokens drawn so far for the rows of one batch."""

    def __init__(self, jobs: list[_Job], sampling: Sampling, device: torch.device) -> None:
        self._jobs, self._device = jobs, device
        self._ids: list[list[int]] = [[] for _ in jobs]
        self._logprobs: list[list[float]] = [[] for _ in jobs]
        self._stopped = [False] * len(jobs)
        self._routing = [array("B") for _ in jobs]
        generator = torch.Generator()
        rows = []
        for problem, index, max_tokens in jobs:
            generator.manual_seed(sample_seed(sampling, problem, index))
            rows.append(torch.rand(max_tokens, generator=generator, dtype=torch.float64))
        self.uniform = pad_sequence(rows, batch_first=True).to(device)

    def prompts(self) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, int64 [B, longest prompt], padded on the left."""
        longest = max(len(job.problem.prompt_ids) for job in self._jobs)
        tokens = torch.zeros(len(self._jobs), longest, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, job in enumerate(self._jobs):
            size = len(job.problem.prompt_ids)
            tokens[row, longest - size :] = torch.tensor(job.problem.prompt_ids)
            mask[row, longest - size :] = 1
        return tokens.to(self._device), mask.to(self._device)

    def append(
        self, rows: list[int], tokens: list[int], logprobs: list[float], is_over: Callable[[list[int]], bool]
    ) -> list[int]:
        """Append a token to each row in `rows`; return the positions in `rows` of the unfinished ones. is_over: whether a row
        ends with the last of its tokens."""
        alive = []
        for place, (row, token, logprob) in enumerate(zip(rows, tokens, logprobs, strict=True)):
            self._ids[row].append(token)
            self._logprobs[row].append(logprob)
            if is_over(self._ids[row]):
                self._stopped[row] = True
            elif len(self._ids[row]) < self._jobs[row].max_tokens:
                alive.append(place)
        return alive

    def append_routing(self, rows: list[int], chosen: Tensor, mask: Tensor) -> None:
        """Append the experts of a pass, uint8 [rows, tokens, layers, experts per token]. mask [rows, tokens]: 0 is padding."""
        real = mask.bool().cpu()  # copied once, because every read synchronizes with the device
        for place, row in enumerate(rows):
            self._routing[row].frombytes(chosen[place][real[place]].numpy().tobytes())

    def samples(self, weight_version: int) -> list[Sample]:
        """The finished rows."""
        parts = zip(self._jobs, self._ids, self._logprobs, self._stopped, self._routing, strict=True)
        return [
            Sample(
                job.sample_index,
                array("i", ids),
                array("d", logprobs),
                "stop" if stopped else "length",
                weight_version,
                routing=routing,
            )
            for job, ids, logprobs, stopped, routing in parts
        ]
