"""The rollout engine whose servers are processes of their own: rank 0 speaks to them, every rank gets what came back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, TypeVar

import httpx
import torch.distributed as dist
from torch import Tensor

from etr_megatron.config import SglangConfig
from etr_megatron.errors import UserError
from etr_megatron.rollout.engine import Sampling, sample_seed
from etr_megatron.rollout.sglang.client import Generated, GenerateParameters, ServerClient, ServerError
from etr_megatron.rollout.sglang.fleet import Fleet, Request
from etr_megatron.rollout.sglang.server import ServerCommand, ServerProcess
from etr_megatron.rollout.sglang.weights import Bucket, WeightSender, buckets
from etr_megatron.types import Problem, Sample

T = TypeVar("T")

Shapes = Mapping[str, tuple[int, ...]]
"""HF name -> shape of every tensor that the servers' model has."""


class SglangEngine:
    """See `RolloutEngine`. Servers are started by rank 0, or given by `config.urls`; other ranks only take part in collectives.

    model_dir: what servers that are started here load first; the first `update_weights` replaces it. shapes: what a weight
    update must consist of; a wrong shape would kill a server, and an unknown name would be ignored by it.
    backend: of the group that carries weights, `gloo` or `nccl`. logs: directory for what servers print.
    """

    def __init__(
        self,
        config: SglangConfig,
        model_dir: Path,
        *,
        shapes: Shapes,
        dtype: str,
        backend: str,
        stop_ids: Iterable[int],
        logs: Path,
    ) -> None:
        """A collective. Raises UserError on every rank when a server does not start or does not answer."""
        self.weight_version = 0
        self._stop_ids, self._shapes = tuple(sorted(stop_ids)), dict(shapes)
        self._bucket_bytes = config.bucket_mib << 20
        self._rank0: _Rank0 | None = None
        if dist.get_rank() == 0:
            self._rank0 = _Rank0(config, _commands(config, model_dir, dtype), backend, logs)
        self._on_rank0(lambda rank0: rank0.start())

    def generate(self, problems: Sequence[Problem], sampling: Sampling) -> list[list[Sample]]:
        """See `RolloutEngine.generate`. Raises EngineGoneError on every rank when no server is left."""
        requests = [
            Request(problem.prompt_ids, self._parameters(problem, index, sampling))
            for problem in problems
            for index in range(sampling.samples)
        ]
        found: list[Generated] = self._on_rank0(lambda rank0: rank0.run(rank0.fleet.generate(requests)))
        samples = [
            Sample(number % sampling.samples, one.ids, one.logprobs, one.finish_reason, int(one.version))
            for number, one in enumerate(found)
        ]
        return [samples[begin : begin + sampling.samples] for begin in range(0, len(samples), sampling.samples)]

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `RolloutEngine.update_weights`.

        Servers that had ended are started again first, and serve once they have `version`. Raises EngineGoneError on every
        rank when no server is left.
        """
        checked = _Checked(tensors, self._shapes)
        self._on_rank0(lambda rank0: rank0.update(buckets(checked, self._bucket_bytes), version), drain=checked)
        self.weight_version = version

    def close(self) -> None:
        """End the servers that were started here and wait until nothing of them is left. Not a collective."""
        if self._rank0 is not None:
            self._rank0.close()
            self._rank0 = None

    def _parameters(self, problem: Problem, index: int, sampling: Sampling) -> GenerateParameters:
        return GenerateParameters(
            max_new_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sample_seed(sampling, problem, index),
            stop_ids=self._stop_ids,
        )

    def _on_rank0(self, body: Callable[[_Rank0], T], *, drain: _Checked | None = None) -> T:
        """What `body` returns on rank 0, or the exception that it raises there, on every rank.

        drain: an export to be iterated to its end before ranks meet: all of it on other ranks, on rank 0 what an error left.
        """
        box: list[tuple[bool, Any] | None] = [None]
        if self._rank0 is not None:
            try:
                box[0] = (True, body(self._rank0))
            except Exception as error:  # to be raised on every rank, this one included
                box[0] = (False, error)
        if drain is not None:
            drain.drain()
        dist.broadcast_object_list(box, src=0)
        assert box[0] is not None
        succeeded, found = box[0]
        if not succeeded:
            raise found
        return found


class _Checked:
    """The export, checked as it passes. It is a collective, so it has to be iterated to its end whatever happens."""

    def __init__(self, tensors: Iterable[tuple[str, Tensor]], shapes: Shapes) -> None:
        self._tensors, self._missing = iter(tensors), dict(shapes)

    def __iter__(self) -> _Checked:
        return self

    def __next__(self) -> tuple[str, Tensor]:
        """Raises ValueError, before anything wrong is sent, for a tensor that is unknown, misshapen, repeated or missing."""
        try:
            name, tensor = next(self._tensors)
        except StopIteration:
            if self._missing:
                raise ValueError(f"the weight update ends without {', '.join(sorted(self._missing)[:3])}") from None
            raise
        shape = self._missing.pop(name, None)
        if shape != tuple(tensor.shape):
            wanted = "do not have it, or had it already" if shape is None else f"have {shape}"
            raise ValueError(f"weight update: {name} is {tuple(tensor.shape)}, the servers {wanted}")
        return name, tensor

    def drain(self) -> None:
        for _ in self._tensors:
            pass


class _Rank0:
    """Servers, their clients, and one event loop in a thread for all that is said to them."""

    def __init__(self, config: SglangConfig, commands: Sequence[ServerCommand], backend: str, logs: Path) -> None:
        self._config, self._logs = config, logs
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="sglang", daemon=True).start()
        self._http = httpx.AsyncClient(limits=httpx.Limits(max_connections=None, max_keepalive_connections=None))
        self._processes: dict[str, ServerProcess] = {}
        urls = config.urls or ("",) * config.servers
        self._clients = [ServerClient(f"SGLang server {number}", url, self._http) for number, url in enumerate(urls)]
        self._commands = dict(zip((client.name for client in self._clients), commands, strict=False))
        self.fleet = Fleet(self._clients, concurrency=config.concurrency, timeout_s=config.request_timeout_s)
        self._sender = WeightSender(
            self.fleet, workers=config.tp, host=config.host, backend=backend, timeout_s=config.update_timeout_s
        )

    def run(self, what: Coroutine[Any, Any, T]) -> T:
        """Run in the loop's thread and wait."""
        return asyncio.run_coroutine_threadsafe(what, self._loop).result()

    def start(self) -> None:
        """Start what is to be started and wait until all servers answer. Raises UserError for one that does not."""
        if not self._config.urls:
            for client in self._clients:
                self._launch(client)
        try:
            self.run(self._wait_for(self._clients))
        except ServerError as error:
            self.close()
            raise UserError(str(error)) from error

    def update(self, parts: Iterable[Bucket], version: int) -> None:
        """One transaction; servers that had failed take part in it if they can be had back."""
        self._bring_back()
        self.run(self._sender.begin())
        travelling: Future[None] | None = None
        try:
            for bucket in parts:  # in this thread: the export is a collective; the next bucket is made while one travels
                if travelling is not None:
                    travelling.result()
                travelling = asyncio.run_coroutine_threadsafe(self._sender.send(bucket), self._loop)
            if travelling is not None:
                travelling.result()
        except BaseException as error:
            if travelling is not None:
                wait([travelling])
            self.run(self._sender.abandon(f"weight update {version} was given up: {error}"))
            raise
        self.run(self._sender.finish(version))

    def close(self) -> None:
        """Leave the group, end the servers."""
        self.run(self._sender.close())
        self.run(self._http.aclose())
        for process in self._processes.values():
            process.stop()
        self._processes.clear()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _launch(self, client: ServerClient) -> None:
        log = self._logs / f"{client.name.replace(' ', '_').lower()}.log"
        process = ServerProcess(client.name, self._commands[client.name], log)
        self._processes[client.name], client.url = process, process.url

    def _bring_back(self) -> None:
        """Servers that failed: restarted if they are ours, taken back if they answer. The sync comes next."""
        back = []
        for client in self._clients:
            if client.name not in self.fleet.failed:
                continue
            process = self._processes.get(client.name)
            if process is not None:
                process.stop()
                self._launch(client)
            back.append(client)
        for client in back:
            try:
                self.run(self._wait_for([client]))
            except ServerError as error:
                self.fleet.mark_failed(client, str(error))
            else:
                self.fleet.rejoin(client)

    async def _wait_for(self, clients: Sequence[ServerClient]) -> None:
        await asyncio.gather(*(self._wait_until_healthy(client) for client in clients))

    async def _wait_until_healthy(self, client: ServerClient) -> None:
        """Raises ServerError when the server ends, or does not answer within `startup_timeout_s`, with the end of its log."""
        process = self._processes.get(client.name)
        deadline = asyncio.get_running_loop().time() + self._config.startup_timeout_s
        while not await client.is_healthy(timeout_s=5.0):
            if process is not None and not process.is_running:
                raise ServerError(
                    f"{client.name} ended while it started; its log, {process.log}, ends:\n{process.last_words()}"
                )
            if asyncio.get_running_loop().time() > deadline:
                where = client.url if process is None else f"{client.url}; its log is {process.log}"
                raise ServerError(f"{client.name} did not answer within {self._config.startup_timeout_s:g} s at {where}")
            await asyncio.sleep(0.5)


def _commands(config: SglangConfig, model_dir: Path, dtype: str) -> list[ServerCommand]:
    """Of the servers that are started here, in order; each sees its own GPUs alone."""
    if config.urls:
        return []
    arguments = ("--model-path", str(model_dir), "--dtype", dtype, "--tp-size", str(config.tp), "--skip-tokenizer-init")
    commands = []
    for number in range(config.servers):
        devices = config.devices[number * config.tp : (number + 1) * config.tp]
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}
        commands.append(ServerCommand(config.python, config.launch, (*arguments, *config.arguments), environment))
    return commands
