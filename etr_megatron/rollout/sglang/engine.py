"""The rollout engine with SGLang servers in separate processes. Rank 0 sends the requests; every rank gets the results."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from etr_megatron import platform
from etr_megatron.config import SglangConfig, sync_of
from etr_megatron.config.schema.fp8 import FP8_BLOCK
from etr_megatron.platform.all_ranks import on_all_ranks
from etr_megatron.rollout.engine import (
    EngineGoneError,
    GenerationOutput,
    GenerationRequest,
    MustStop,
    OtherModelError,
    Place,
    Sampling,
    WeightSource,
    never,
    sample_seed,
)
from etr_megatron.rollout.rank0 import of_rank0, on_rank0_until_stopped
from etr_megatron.rollout.sglang.client import GenerateParameters
from etr_megatron.rollout.sglang.control import PROBE_PROMPT, Control
from etr_megatron.rollout.sglang.fits import Expected
from etr_megatron.rollout.sglang.fleet import Request
from etr_megatron.rollout.sglang.job_servers import JobServers
from etr_megatron.rollout.sglang.machines import ServerSetting
from etr_megatron.rollout.sglang.node_buckets import NodeBuckets, require_room
from etr_megatron.rollout.sglang.replies import Generated, of_expert_layers
from etr_megatron.rollout.sglang.senders import DiskSender, Sender, SendSettings, WholeSender, at_servers
from etr_megatron.rollout.sglang.server_nodes import ServerNodes
from etr_megatron.rollout.sglang.sharded_sender import ShardedSender
from etr_megatron.rollout.stops import NO_STOP_STRINGS, StopStrings
from etr_megatron.types import Problem, Sample
from etr_megatron.weights import Architecture, ServerLayout

logger = logging.getLogger(__name__)

_PROBE_GAPS, _LARGEST_PROBE_GAP = 10.0, 2.0
"""Limits of a probe's mean gap: as a multiple of the limit for a step, and in nats unless the limit for a step is larger. A
probe has few tokens of meaningless text: distributions are flat, and rounding to bfloat16 and FP8 has its full effect. In the
simulation of docs/rollout.md, 40 probes had gaps up to 0.1 in bfloat16 and 0.6 in FP8; with two layers swapped, 14 or more."""


@dataclass(frozen=True)
class Serving:
    """Facts of the run that the servers depend on.

    dtype: of weights and arithmetic, as torch names it. backend: of the process groups that transfer weights, `gloo` or `nccl`.
    directory: for the servers' files. temperature: the sampler's. max_gap: limit of the mean difference between a step's
    log-probs and the trainer's; a probe allows a multiple of it. routing: whether servers must return the chosen experts.
    stop_strings: if there are any, the servers need a tokenizer.
    """

    architecture: Architecture
    dtype: str
    backend: str
    stop_ids: Iterable[int]
    directory: Path
    temperature: float
    max_gap: float
    routing: bool = False
    stop_strings: StopStrings = NO_STOP_STRINGS


class SglangEngine:
    """See `RolloutEngine`. The servers are those of `config.urls`, or are started by rank 0, by the first rank of every node or
    on dedicated nodes.

    model_dir: has the config.json for servers that are started here. They get their weights with `update_weights`; before
    that nothing can be generated.
    """

    def __init__(
        self,
        config: SglangConfig,
        model_dir: Path,
        serving: Serving,
        nodes: ServerNodes | None = None,
        *,
        must_stop: MustStop = never,
    ) -> None:
        """A collective. nodes: on rank 0, if there are dedicated nodes. Raises UserError on every rank when a server does not
        start or answer, and StopAskedError when `must_stop()` becomes true on a rank that waits for servers to start."""
        self.weight_version, self._syncs = 0, 0
        self._config, self._serving = config, serving
        self._stop_ids = tuple(sorted(serving.stop_ids))
        self._submitted: dict[int, GenerationRequest] = {}
        self._generated_at: dict[str, Place | None] = {}  # on rank 0: name of each response of the last `generate` -> where
        self._control: Control | None = None
        needs = dict(routing=serving.routing, tokenizer=bool(serving.stop_strings))
        cuda, folder = serving.backend == "nccl", str(serving.directory)
        setting = ServerSetting(str(model_dir), serving.dtype, folder, None, cuda, **needs)
        self._servers = servers = JobServers(config, setting, nodes, must_stop=must_stop)
        on_all_ranks(self._require_room)
        self._control = on_all_ranks(
            lambda: (
                Control(
                    config,
                    servers.names,
                    Expected.of(config, serving.architecture, serving.dtype, **needs),
                    host=servers.own_address,
                    api_key=servers.api_key,
                    backend=serving.backend,
                    logs=serving.directory,
                )
                if dist.get_rank() == 0
                else None
            )
        )
        self._sender = self._make_sender()
        try:
            at_servers(lambda: self._speaker.start_router())  # first: a missing router fails at once, servers take minutes
            started = servers.start(servers.names, must_stop)
            at_servers(lambda: self._speaker.open(started))
            self.release()  # next, the ranks build their models on the GPUs of colocated servers
        except BaseException:
            self.close()
            raise

    @property
    def _speaker(self) -> Control:
        """The `Control`, which only rank 0 has; use it on rank 0 alone."""
        return of_rank0(self._control)

    def _send_settings(self) -> SendSettings:
        config, serving = self._config, self._serving
        return SendSettings(
            serving.architecture,
            getattr(torch, serving.dtype),
            FP8_BLOCK if config.fp8 else None,
            config.bucket_mib << 20,
            serving.backend,
            config.update_timeout_s,
            config.checksums,
        )

    def _require_room(self) -> None:
        """Raise UserError if this machine has no shared memory for the buckets that this rank shares with its servers."""
        send = self._send_settings()
        if sync_of(self._config) == "tensor" and dist.get_rank() in self._servers.hosts:
            require_room(send.arch, send.dtype, send.fp8_block, send.bucket_bytes)

    def _make_sender(self) -> Sender:
        config, serving, control = self._config, self._serving, self._control
        settings = self._send_settings()
        how = sync_of(config)
        if how == "disk":
            directory = Path(config.sync_dir) if config.sync_dir else serving.directory / "weights"
            return DiskSender(settings, directory, control.load if control is not None else None)
        if how == "sharded":
            layout = ServerLayout(config.tp, config.ep, attention_dp=config.dp_attention)
            return ShardedSender(settings, layout, self._servers.own_address, control.calls if control is not None else None)
        # No memory is shared with servers at `sglang.urls`: whatever its address, a server may run in its own container.
        hosts = self._servers.hosts if how == "tensor" else {}
        shared = NodeBuckets(hosts, config.tp_on_a_node, config.tp)
        if control is None:
            return WholeSender(settings, None, None, shared)
        return WholeSender(settings, control.send_queue, control.serving, shared)

    def generate(self, problems: Sequence[Problem], sampling: Sampling, must_stop: MustStop = never) -> list[list[Sample]]:
        """See `RolloutEngine.generate`. Only rank 0 gets the responses; other ranks get empty responses. Raises
        EngineGoneError, NeedsSyncError and RefusedError on every rank."""
        counts, limits = sampling.samples_of(problems), sampling.max_tokens_of(problems)
        names = sampling.names_of(problems)
        cached, name = self._generated_at if sampling.continued else {}, iter(names)
        requests = [
            Request(problem.prompt_ids, self._parameters(problem, index, sampling, limit), problem.id, cached.get(next(name)))
            for problem, count, limit in zip(problems, counts, limits, strict=True)
            for index in range(count)
        ]
        self._require_weights()
        found: list[Generated] = on_rank0_until_stopped(
            lambda anywhere: self._answers(requests, anywhere),
            must_stop,
            share=lambda replies: [reply.without_tokens() for reply in replies],
        )
        self._generated_at = {name: reply.place for name, reply in zip(names, found, strict=True)}
        replies = iter(found)
        return [[self._sample(index, next(replies)) for index in range(count)] for count in counts]

    def _answers(self, requests: Sequence[Request], anywhere: MustStop) -> list[Generated]:
        replies = self._speaker.run_until_stopped(self._speaker.stream.answer(requests), anywhere)
        return [self._until_stop(reply, len(request.prompt_ids)) for request, reply in zip(requests, replies, strict=True)]

    def _until_stop(self, reply: Generated, context: int, turn: Sequence[int] = ()) -> Generated:
        """The reply up to the token in which a stop string ends. context: number of tokens before the reply. turn: tokens of
        the current turn that were generated before the reply.

        Servers miss some stop strings:
        - one that begins in `turn`
        - one generated in many more tokens than the tokenizer would make of it, as a server matches only the last few tokens
          (`tail_str` in SGLang's schedule_batch.py)
        - one in the last tokens of an aborted request
        """
        if not self._serving.stop_strings:
            return reply
        end = self._serving.stop_strings.end([*turn, *reply.ids], len(turn))
        if end is None:
            return reply
        kept = end - len(turn)
        per_token, rest = divmod(len(reply.routing), max(1, context + len(reply.ids) - 1))
        routing = reply.routing if rest else reply.routing[: (context + kept - 1) * per_token]
        return replace(reply, ids=reply.ids[:kept], logprobs=reply.logprobs[:kept], finish_reason="stop", routing=routing)

    def _sample(self, index: int, reply: Generated) -> Sample:
        routing = of_expert_layers(reply.routing, self._serving.architecture)
        return Sample(index, reply.ids, reply.logprobs, reply.finish_reason, self.weight_version, routing=routing)

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """See `StreamingEngine.submit`."""
        self._submitted |= {request.key: request for request in requests}
        stream = self._speaker.stream
        # Dialogues that have begun go first: their groups are the oldest, and servers still have their tokens cached.
        for first in (True, False):
            chosen = {request.key: self._request(request) for request in requests if bool(request.turn_begin) == first}
            if chosen:
                self._speaker.run(stream.submit(chosen, first=first))

    def wait(self, timeout_s: float) -> list[GenerationOutput]:
        """See `StreamingEngine.wait`."""
        return [self._output(key, reply) for key, reply in self._speaker.stream.wait(timeout_s)]

    def stop(self, *, abort: bool) -> list[GenerationOutput]:
        """See `StreamingEngine.stop`."""
        replies = self._speaker.run(self._speaker.stream.stop(abort=abort))
        found = [self._output(key, reply) for key, reply in replies]
        self._submitted.clear()
        return found

    def _request(self, request: GenerationRequest) -> Request:
        parameters = self._parameters(request.problem, request.index, request.sampling, request.max_new_tokens)
        return Request([*request.problem.prompt_ids, *request.generated_ids], parameters, request.problem.id, request.cached_at)

    def _output(self, key: int, reply: Generated) -> GenerationOutput:
        request = self._submitted.pop(key)
        before = len(request.problem.prompt_ids) + len(request.generated_ids)
        reply = self._until_stop(reply, before, request.generated_ids[request.turn_begin :])
        finish = reply.finish_reason
        if finish == "abort" and reply.ids:  # the abort may have come right after the last token
            if reply.ids[-1] in self._stop_ids:
                finish = "stop"
            elif len(reply.ids) >= request.max_new_tokens:
                finish = "length"
        routing = of_expert_layers(reply.routing, self._serving.architecture)
        version = self.weight_version
        return GenerationOutput(key, reply.ids, reply.logprobs, finish, version, reply.given_up, routing, reply.place)

    def update_weights(self, weights: WeightSource, version: int, must_stop: MustStop = never) -> None:
        """See `RolloutEngine.update_weights`.

        Failed servers are brought back first, and serve once they have `version`. If all servers are lost in the sync, the job
        restarts its own servers and repeats the sync once. Raises on every rank: EngineGoneError when no server is left,
        SyncError naming ranks that are missing, OtherModelError when the log-probs of all servers differ from the trainer's.
        """
        self._empty_caches()
        self._bring_back(must_stop)
        # With NCCL, a server that dies during a sync makes the others fail too, see docs/rollout.md, and a restart helps. If
        # none serves even now, none could be started, and another attempt would only take as long again.
        may_lose_all = not self._config.urls and at_servers(lambda: bool(self._speaker.serving()))
        try:
            self._send(weights, version)
        except EngineGoneError as error:
            if not may_lose_all:
                raise
            if self._control is not None:
                logger.warning("%s; they are started again", error)
            self._bring_back(must_stop)
            self._send(weights, version)
        self.weight_version = version
        self._syncs += 1
        if self._config.probe_every and (self._syncs - 1) % self._config.probe_every == 0:
            self._probe(weights)

    def _send(self, weights: WeightSource, version: int) -> None:
        with self._transaction(version):
            self._sender.send(weights, version)
            self._empty_caches()

    def _empty_caches(self) -> None:
        """Empty torch's GPU memory cache, because colocated servers allocate their memory again next. A collective, so that
        rank 0 asks the servers only after all ranks are done."""
        if self._config.placement == "colocated":
            on_all_ranks(platform.release_cached_memory)

    @contextmanager
    def _transaction(self, version: int) -> Iterator[None]:
        """Wraps an update: opens it, and closes it when the servers confirm the version. After any error they are resumed."""
        try:
            at_servers(lambda: self._speaker.begin())
            yield
            at_servers(lambda: self._speaker.finish(version))
        except BaseException as error:
            if self._control is not None:
                self._control.abandon(f"weight sync {version} failed: {error}")
            raise

    def _bring_back(self, must_stop: MustStop) -> None:
        """Bring failed servers back: restart those of the job that need it, and check the health of others again."""
        due = at_servers(lambda: self._speaker.due())
        if due:
            broken = at_servers(lambda: self._speaker.to_restart(due))
            started = self._servers.start(broken, must_stop) if broken else {}
            at_servers(lambda: self._speaker.take_back(due, started))

    def _probe(self, weights: WeightSource) -> None:
        """Have all servers generate, in all their attention groups, and mark those whose log-probs differ from the trainer's.
        Raises OtherModelError when all differ."""
        found = at_servers(lambda: self._speaker.probe(self._serving.temperature))
        ours = weights.logprobs([(PROBE_PROMPT, reply.ids) for reply in found.values()])
        gaps = {
            place: (torch.tensor(reply.logprobs) - wanted).abs().mean().item()
            for (place, reply), wanted in zip(found.items(), ours, strict=True)
        }
        most = max(self._serving.max_gap, min(_PROBE_GAPS * self._serving.max_gap, _LARGEST_PROBE_GAP))
        wrong = {place.server: (place.group, gap) for place, gap in gaps.items() if not gap <= most}
        for name, (group, gap) in wrong.items():
            what = f"after weight sync {self.weight_version} its log-probs differ by {gap:.3g} on average from the trainer's"
            what += "" if group is None else f" in its attention group {group}"
            limit = f"more than the {most:g} that rollout.max_logprob_gap={self._serving.max_gap:g} allows in a probe"
            if len(wrong) == len({place.server for place in gaps}):
                raise OtherModelError(f"{name}: {what}, {limit}; it serves another model or computes in another precision")
            if self._control is not None:
                self._control.mark_failed(name, f"{what}, {limit}")

    def release(self) -> None:
        """Have colocated servers release their memory until the next `update_weights`. A collective, with no request in flight.

        Failed servers are stopped instead; a later `update_weights` restarts them. Raises EngineGoneError on every rank when no
        server is left.
        """
        failed = at_servers(lambda: self._speaker.release())
        if failed:
            on_all_ranks(lambda: self._servers.stop(failed))

    def metrics(self) -> dict[str, float]:
        """See `RolloutEngine.metrics`."""
        control = self._control
        return {} if control is None else {"servers_serving": len(control.serving()), **control.loads.take()}

    def close(self) -> None:
        """Stop the servers that were started here and wait until all their processes have ended. Not a collective."""
        self._sender.close()
        if self._control is not None:
            self._control.close()
            self._control = None
        self._servers.stop()

    def _require_weights(self) -> None:
        if self._syncs == 0:
            raise RuntimeError("servers have no weights before the first update_weights")

    def _parameters(self, problem: Problem, index: int, sampling: Sampling, max_tokens: int) -> GenerateParameters:
        return GenerateParameters(
            max_new_tokens=max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sample_seed(sampling, problem, index),
            stop_ids=self._stop_ids,
            stop_strings=self._serving.stop_strings.texts,
            routing=sampling.routing,
        )
