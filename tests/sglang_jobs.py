"""Jobs that gang ranks run against SGLang servers."""

from __future__ import annotations

import json
import os
import signal
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from etr_megatron.config import Config, SglangConfig
from etr_megatron.config.schema import RolloutConfig, RunConfig
from etr_megatron.data import PromptCursor
from etr_megatron.reward import Grade, GradeRequest
from etr_megatron.rollout import Sampling, StreamingSampler, rank0
from etr_megatron.rollout.rank0 import on_rank0
from etr_megatron.rollout.sglang import Serving, SglangEngine, server, sharded_sender
from etr_megatron.rollout.sglang.senders import WholeSender
from etr_megatron.rollout.sglang.sharded_sender import ShardedSender
from etr_megatron.rollout.stops import NO_STOP_STRINGS, StopStrings
from etr_megatron.types import Problem, Sample
from etr_megatron.weights import weights_of
from etr_megatron.weights.quantize import quantize_blocks
from tests.fake_servers import impatient_with
from tests.graders import Graders
from tests.nodes import as_a_node_at
from tests.policy_jobs import build, make_batch
from tests.warm_servers import start_warm

TEMPERATURE = 0.9


def engine_of(
    policy: Any,
    model: str,
    directory: str,
    max_gap: float = 1e-5,
    stop_ids: Sequence[int] = (),
    bucket_bytes: int | None = None,
    routing: bool = False,
    stop_strings: StopStrings = NO_STOP_STRINGS,
    warm: bool = True,
    real: str | None = None,
    **settings: Any,
) -> SglangEngine:
    """bucket_bytes: for `broadcast` and `tensor`; may be less than `bucket_mib` allows, as the tests' models are small.
    warm, real: see `start_warm`."""
    start_warm(warm, real)
    more = dict(temperature=TEMPERATURE, max_gap=max_gap, routing=routing, stop_strings=stop_strings)
    serving = Serving(policy.arch, "float32", "gloo", stop_ids, Path(directory), **more)
    engine = SglangEngine(SglangConfig(**{"bucket_mib": 1, "update_timeout_s": 60} | settings), Path(model), serving)
    if bucket_bytes is not None and isinstance(engine._sender, WholeSender):
        engine._sender._settings = replace(engine._sender._settings, bucket_bytes=bucket_bytes)
    return engine


def gaps(
    model: str,
    directory: str,
    prompts: list[list[int]],
    overrides: list[str],
    served: str | None = None,
    address: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Largest gap between the server's and the trainer's log-probs after each of two weight syncs, with an update between;
    bytes that this rank sent in the second one, if sharded. With `routing`, also the tokens of prompt and response of the
    samples after the first sync, and the experts that the server reports for them. served: the model that a server is started
    with, if not `model`. address: of every rank's node, if each is to have its own."""
    policy = build(model, [*overrides, "train.lr=0.01", f"rollout.temperature={TEMPERATURE}"])
    with as_a_node_at(address) if address is not None else nullcontext():
        engine = engine_of(policy, served or model, directory, **settings)
    try:
        return _gaps(policy, engine, prompts, settings.get("routing", False))
    finally:
        engine.close()


def generated(engine: SglangEngine, prompts: list[list[int]], sampling: Sampling) -> list[list[Sample]]:
    """Responses to each prompt on every rank; the engine itself gives them to rank 0 alone."""
    problems = [Problem(f"p{i}", "", "", ids) for i, ids in enumerate(prompts)]
    found = engine.generate(problems, sampling)
    assert [len(group) for group in found] == list(sampling.samples_of(problems))
    assert dist.get_rank() == 0 or not any(sample.response_ids or sample.routing for group in found for sample in group)
    return on_rank0(lambda: found)


def _gaps(policy: Any, engine: SglangEngine, prompts: list[list[int]], routing: bool) -> dict[str, Any]:
    found, sent = [], []
    routed: list[tuple[list[int], list[int]]] = []
    for version in (1, 2):
        engine.update_weights(policy.export(), version=version)
        sender = engine._sender
        sent.append(sender._transport.wire.bytes_sent if isinstance(sender, ShardedSender) else 0)
        groups = generated(engine, prompts, Sampling(2, 8, TEMPERATURE, seed=1, step=version, top_p=0.95, routing=routing))
        samples = [sample for group in groups for sample in group]
        assert all(sample.weight_version == version for sample in samples)
        sequences = [(prompts[i // 2], sample.response_ids) for i, sample in enumerate(samples)]
        routed = routed or [([*prompts[i // 2], *one.response_ids], one.routing.tolist()) for i, one in enumerate(samples)]
        trainer = policy.logprobs(sequences).logp
        served = [torch.tensor(sample.rollout_logprobs) for sample in samples]
        found.append(max((a - b).abs().max().item() for a, b in zip(trainer, served, strict=True)))
        engine.release()
        policy.update(replace(make_batch(sequences), old_logp=trainer))
    return {"gaps": found, "bytes": sent[1] - sent[0], "routed": routed}


def states_of(engine: SglangEngine, names: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """States of serving fake servers, on rank 0; empty on others."""
    control = engine._control
    if control is None:
        return {}
    serving = [client for client in control.fleet.serving if names is None or client.name in names]
    return {client.name: control.run(client.get("/state", timeout_s=120)) for client in serving}


def sums_of(policy: Any, fp8: bool = False) -> dict[str, float]:
    """Sums of all tensors under the server's names; a quantised one comes with the scales of its blocks."""
    quantised = {name for weight in weights_of(policy.arch) if weight.fp8 and fp8 for name in weight.hf}
    found = dict(policy.export())
    for name in quantised:
        found[name], found[f"{name}_scale_inv"] = quantize_blocks(found[name], 128)
    return {name: tensor.double().sum().item() for name, tensor in found.items()}


class Problems(list[Problem]):
    fingerprint = "these"


def streamed(
    model: str, directory: str, prompts: list[list[int]], steps: int, rollout: dict[str, Any], idle_syncs: int, **settings: Any
) -> dict[str, Any]:
    """Steps of a sampler on a real server, with an update and a sync between; before the last step, `idle_syncs` more of both.

    All rewards of every fourth problem are equal. Returns the steps' groups and counts, and for every sample the largest gap to
    transformers' log-probs under the weights that its tokens' versions name, and under those of the sync after.
    """
    policy = build(model, ["train.lr=0.02", f"rollout.temperature={TEMPERATURE}"])
    engine = engine_of(policy, model, directory, stop_ids=range(100, 112), probe_every=0, **settings)
    config = Config(
        run=RunConfig(steps=steps),
        rollout=RolloutConfig(**rollout, samples_per_prompt=2, temperature=TEMPERATURE, backend="sglang"),
    )
    problems = Problems(Problem(f"p{number}", "", str(number), [3 + number, *prompts[number % 3]]) for number in range(40))

    def grade(requests: Sequence[GradeRequest]) -> list[Grade]:
        rewards = [zlib.crc32(one.response.encode()) / 2**32 if int(one.answer) % 4 else 0.5 for one in requests]
        return [Grade(reward, "ok", "") for reward in rewards]

    sampler = StreamingSampler(config, engine, PromptCursor(problems, seed=1, shuffle=False), str, Graders(grade))
    weights: dict[int, dict[str, torch.Tensor]] = {}
    found: dict[str, Any] = {"steps": [], "counts": []}
    batch = None
    try:
        for step in range(1, steps + 1):
            for _ in range(1 + (idle_syncs if step == steps else 0)):
                if batch is not None:
                    policy.update(batch)
                weights[len(weights)] = {name: tensor.clone() for name, tensor in policy.export()}
                sampler.pause()
                engine.update_weights(policy.export(), len(weights) - 1)
                sampler.resume()
            rollouts = sampler.take(step, lambda _phase: nullcontext())
            found["steps"].append((len(weights) - 1, [asdict(group) for group in rollouts.groups]))
            found["counts"].append(rollouts.counts)
            samples = [(group.problem.prompt_ids, one.response_ids) for group in rollouts.groups for one in group.samples]
            batch = replace(make_batch(samples), old_logp=policy.logprobs(samples).logp)
        sampler.pause()
    finally:
        engine.close()
    policy.update(batch)
    weights[len(weights)] = {name: tensor.clone() for name, tensor in policy.export()}
    groups = [group for _, groups in found["steps"] for group in groups]
    return found | {"gaps": _gaps_by_version(model, groups, weights, 0), "wrong": _gaps_by_version(model, groups, weights, 1)}


def _gaps_by_version(
    model: str, groups: list[dict[str, Any]], weights: Mapping[int, dict[str, torch.Tensor]], later: int
) -> list[float]:
    """Per sample, largest gap of its log-probs (replies: 0) to transformers' under weights `later` syncs after a token's."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    logp: dict[tuple[str, int, int], torch.Tensor] = {}
    for version, tensors in weights.items():
        reference.load_state_dict(tensors)
        for group in groups:
            for one in group["samples"]:
                prompt, ids = group["problem"]["prompt_ids"], one["response_ids"]
                with torch.no_grad():
                    logits = reference(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].double()
                rows = torch.log_softmax(logits / TEMPERATURE, -1)
                logp[group["id"], one["index"], version] = rows[range(len(ids)), ids]
    gaps = []
    for group in groups:
        for one in group["samples"]:
            versions = one["weight_versions"] or [one["weight_version"]] * len(one["response_ids"])
            drawn = one["loss_mask"] or [1] * len(versions)
            wanted = [drawn[i] * logp[group["id"], one["index"], each + later][i] for i, each in enumerate(versions)]
            gaps.append((torch.tensor(one["rollout_logprobs"], dtype=torch.float64) - torch.stack(wanted)).abs().max().item())
    return gaps


@contextmanager
def hanging(engine: SglangEngine, name: str) -> Iterator[None]:
    """A short deadline for the server `name` (if not empty), which hangs at its second bucket. In a sharded sync its weights
    have the deadline of the ranks; what it is asked after that has the short one, and so has the end of its part."""
    with ExitStack() as deadline:
        if engine._control is not None and name:
            (client,) = (client for client in engine._control.fleet.clients if client.name == name)
            routes = None
            if isinstance(engine._sender, ShardedSender):
                routes = ("/server_info", "/end_weight_update", "/continue_generation")
                deadline.enter_context(mock.patch.object(sharded_sender, "_GRACE_S", 4.0))
            deadline.enter_context(impatient_with(client, 2.0, broadcast=1, routes=routes))
        yield


@contextmanager
def waits_for_servers() -> Iterator[list[tuple[str, bool]]]:
    """Rank 0's work at the servers in this context: its place in the code, and whether it may take longer than a collective."""
    found, broadcast = [], rank0._broadcast

    def recorded(body: Callable[[], Any], signs: dist.Store | None, *rest: Any) -> Any:
        if body.__module__ in (SglangEngine.__module__, WholeSender.__module__, ShardedSender.__module__):
            found.append((body.__qualname__, signs is not None))
        return broadcast(body, signs, *rest)

    with mock.patch.object(rank0, "_broadcast", recorded):
        yield found


def fake_sync(
    model: str, directory: str, overrides: list[str], versions: Sequence[int] = (1,), hangs: str = "", **settings: Any
) -> dict:
    """States of fake servers after syncs of these versions, the expected sums, the servers that failed, and the metrics; what
    `waits_for_servers` says. hangs: the server that hangs at its second bucket, if one does."""
    with waits_for_servers() as waits:
        return _fake_sync(build(model, overrides), model, directory, versions, hangs, **settings) | {"waits": waits}


def _fake_sync(policy: Any, model: str, directory: str, versions: Sequence[int], hangs: str, **settings: Any) -> dict:
    engine = engine_of(policy, model, directory, probe_every=0, **settings)
    try:
        with hanging(engine, hangs):
            for version in versions:
                if hangs and isinstance(engine._sender, ShardedSender) and (transport := engine._sender._transport):
                    assert transport.wire.board.timeout_s in (engine._config.update_timeout_s, 5.0)
                    transport.wire.board.timeout_s = 5.0  # not before: all have connected and had their first bucket
                engine.update_weights(policy.export(), version)
        failed = engine._control.fleet.failed if engine._control is not None else {}
        found = {"states": states_of(engine), "sums": sums_of(policy, settings.get("fp8", False)), "failed": failed}
        return found | {"metrics": engine.metrics()}
    finally:
        engine.close()


@contextmanager
def behaving(behaviour: Mapping[str, Any]) -> Iterator[None]:
    """Behaviour of fake servers that this process starts in this context. They end when they are told to, so one that does not
    at once, because it has been stopped, is given no more time."""
    os.environ["FAKE_SGLANG"] = json.dumps(behaviour)
    try:
        with mock.patch.object(server, "_GRACE_S", 1.0):
            yield
    finally:
        del os.environ["FAKE_SGLANG"]


def rank_fails(model: str, directory: str, **settings: Any) -> tuple[str, dict[str, Any]]:
    """The error on this rank if rank 1's weights cannot be read, and the servers' states after it."""
    policy = build(model, ["parallel.tp=2"])
    engine = engine_of(policy, model, directory, probe_every=0, **settings)

    class Broken(type(policy.export())):
        def shards(self) -> dict[str, torch.Tensor]:
            found = super().shards()
            if dist.get_rank() == 1:
                found.pop(next(iter(found)))
            return found

    try:
        engine.update_weights(Broken(policy), 1)
    except Exception as error:
        states = {}
        if engine._control is not None:
            clients = engine._control.fleet.clients
            states = {client.name: engine._control.run(client.get("/state", timeout_s=120)) for client in clients}
        return f"{type(error).__name__}: {error}", states
    finally:
        dist.barrier()  # rank 0 reads the states of all ranks' servers first
        engine.close()
    return "", {}


def refused(model: str, directory: str, generate_first: bool = False, **settings: Any) -> str:
    """The first error on this rank."""
    policy = build(model, [])
    try:
        engine = engine_of(policy, model, directory, **settings)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    try:
        if not generate_first:
            engine.update_weights(policy.export(), 1)
        engine.generate([Problem("p", "", "", [3])], Sampling(1, 2, 1.0, seed=1, step=1))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        engine.close()
    return ""


def colocated(model: str, directory: str, **settings: Any) -> list[str]:
    """The routes requested from a colocated fake server over a step."""
    policy = build(model, [])
    engine = engine_of(policy, model, directory, probe_every=0, placement="colocated", **settings)
    try:
        engine.update_weights(policy.export(), 1)
        engine.generate([Problem("p", "", "", [3])], Sampling(1, 2, 1.0, seed=1, step=1))
        engine.release()
        engine.update_weights(policy.export(), 2)
        return [route for state in states_of(engine).values() for route in state["log"]]
    finally:
        engine.close()


def colocated_restart(model: str, directory: str, **settings: Any) -> dict[str, str]:
    """Versions of two colocated fake servers two syncs after one of them was killed while their memory was released."""
    policy = build(model, [])
    engine = engine_of(policy, model, directory, probe_every=0, placement="colocated", servers=2, **settings)
    try:
        engine.update_weights(policy.export(), 1)
        pid = states_of(engine)["SGLang server 0"]["pid"]
        engine.release()
        os.kill(pid, signal.SIGKILL)
        for version in (2, 3):
            engine.update_weights(policy.export(), version)
            engine.release()
        return {name: state["version"] for name, state in states_of(engine).items()}
    finally:
        engine.close()


def on_first_request(client: Any, what: Callable[[], None]) -> None:
    """Do `what` shortly after the client's first request is sent: the server should have begun, but not have generated 240
    tokens (once it had 60 before the timer's thread ran)."""
    generate, timer = client.generate, threading.Timer(0.1, what)

    def first(*args: Any, **kwargs: Any) -> Any:
        client.generate = generate
        timer.start()
        return generate(*args, **kwargs)

    client.generate = first
