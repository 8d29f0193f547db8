"""Jobs that gang ranks run against servers that fail and come back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any
from unittest import mock

import httpx
import psutil
import pytest
import torch

from etr_megatron.platform.phases import StopAskedError
from etr_megatron.rollout import EngineGoneError, NeedsSyncError, Sampling
from etr_megatron.rollout.sglang import hosts, server
from etr_megatron.rollout.sglang.client import ServerError
from etr_megatron.rollout.sglang.control import PROBE_PROMPT, Control
from etr_megatron.types import Problem
from tests.fake_servers import impatient_with, patient_with
from tests.nodes import as_a_node_at
from tests.policy_jobs import build, make_batch
from tests.sglang_jobs import TEMPERATURE, behaving, engine_of, on_first_request, states_of, sums_of


def fails_soon(control: Control, how: str) -> int:
    """Have the first fake server die or stop (`how`: die_in, stop_in) at its third request from now; returns its process id."""
    client = control.fleet.clients[0]
    pid = control.run(client.get("/state", timeout_s=120))["pid"]
    with suppress(ServerError):  # with requests under way, it may be gone before it has answered
        control.run(client.call("/behave", {how: 2}, timeout_s=120))
    return pid


def killed_between(model: str, directory: str, how: str, **settings: Any) -> dict[str, Any]:
    """Two servers of the job, one of which dies or stops (see `fails_soon`) with requests under way. Tokens by request, failed
    servers, and states after the next sync."""
    policy = build(model, ["parallel.tp=1"])
    with behaving({"seconds": 0.1}):
        engine = engine_of(policy, model, directory, probe_every=0, **settings)
    try:
        engine.update_weights(policy.export(), 1)
        assert engine._control is not None
        first, *others = engine._control.fleet.clients
        patient_with(others)
        fails_soon(engine._control, how)
        problems = [Problem(f"p{i}", "", "", [i, 7]) for i in range(30)]
        sampling, failed = Sampling((1, 3) * 15, 5, 1.0, seed=1, step=1), {}
        try:
            with impatient_with(first, 2.0):
                engine.generate(problems, sampling)
        except NeedsSyncError:
            failed = engine._control.fleet.failed
            engine.update_weights(policy.export(), 1)
            patient_with([first])  # it is well again
        groups = engine.generate(problems, sampling)
        engine.update_weights(policy.export(), 2)
        states = states_of(engine)
        return {"ids": [[s.response_ids.tolist() for s in group] for group in groups], "failed": failed, "states": states}
    finally:
        engine.close()


def syncs_with(model: str, directory: str, server: str, behaviours: Sequence[Mapping[str, Any]], **settings: Any) -> list[int]:
    """Numbers of the syncs, from 1, in which `server` was sent weights. behaviours: its behaviour, changed before each of as
    many syncs; `in_update`: also leave it in the middle of an update."""
    policy = build(model, [])
    engine = engine_of(policy, model, directory, probe_every=0, sync="disk", **settings)
    try:
        assert engine._control is not None
        client = next(client for client in engine._control.fleet.clients if client.name == server)
        loads = [0]
        for behaviour in behaviours:
            engine._control.run(client.call("/behave", dict(behaviour), timeout_s=120))
            for route in ("/pause_generation", "/begin_weight_update") if behaviour.get("in_update") else ():
                engine._control.run(client.call(route, timeout_s=120))
            engine.update_weights(policy.export(), len(loads))
            log = engine._control.run(client.get("/state", timeout_s=120))["log"]
            loads.append(log.count("/update_weights_from_disk"))
        return [number for number in range(1, len(loads)) if loads[number] > loads[number - 1]]
    finally:
        engine.close()


def colocated_failures(model: str, directory: str, fails_after: Sequence[int], **settings: Any) -> list[list[list[str]]]:
    """The first of two colocated fake servers fails at its first request after those of four syncs that `fails_after` lists.
    For each sync: the servers that took part, and those of them whose process was alive before and after the
    release of memory."""
    policy = build(model, [])
    engine = engine_of(policy, model, directory, probe_every=0, placement="colocated", servers=2, **settings)
    problems = [Problem(f"p{i}", "", "", [i, 7]) for i in range(2)]
    found = []

    def there(states: Mapping[str, Mapping[str, Any]]) -> list[str]:
        return [name for name, state in states.items() if psutil.pid_exists(state["pid"])]

    try:
        for version in range(1, 5):
            engine.update_weights(policy.export(), version)
            states = states_of(engine)
            if engine._control is not None and version in fails_after:
                engine._control.run(engine._control.fleet.clients[0].call("/behave", {"abort_at": 0}, timeout_s=120))
            engine.generate(problems, Sampling(1, 2, 1.0, seed=1, step=version))
            before = there(states)
            engine.release()
            found.append([list(states), before, there(states)])
        return found
    finally:
        engine.close()


def failed_between(model: str, directory: str, **settings: Any) -> list[tuple[str, bool]]:
    """A server of the job is healthy and marked as failed before each of three syncs, the first of two servers. For each sync:
    its version afterwards, and whether it is the process that was started first. A sync that has to start both servers ends at
    once when the job is asked to stop."""
    policy = build(model, [])
    engine = engine_of(policy, model, directory, probe_every=0, sync="disk", servers=2, **settings)
    try:
        assert engine._control is not None
        client, found, pid = engine._control.fleet.clients[0], [], 0
        for version in range(1, 5):
            engine.update_weights(policy.export(), version)
            state = engine._control.run(client.get("/state", timeout_s=120))
            pid = pid or state["pid"]
            found.append((state["version"], state["pid"] == pid))
            engine._control.fleet.mark_failed(client, "completed no response")
        engine._control.mark_failed(client.name, "has other weights")
        engine._control.mark_failed("SGLang server 1", "has other weights")  # now all are to be started again
        not_yet = mock.patch.object(hosts, "_answers", lambda url: False)  # however quick they are
        with pytest.raises(StopAskedError), not_yet:
            engine.update_weights(policy.export(), 5, must_stop=lambda: True)
        return found[1:]
    finally:
        engine.close()


def none_start(model: str, directory: str, **settings: Any) -> tuple[str, int]:
    """The error of a sync before which all servers have failed and none comes back, and how often they were to come back."""
    policy = build(model, [])
    engine = engine_of(policy, model, directory, probe_every=0, **settings)
    attempts = []
    try:
        engine.update_weights(policy.export(), 1)
        assert engine._control is not None
        engine._control.mark_failed("SGLang server 0", "it does not start")
        with mock.patch.object(engine, "_bring_back", lambda _must_stop: attempts.append(1)):
            try:
                engine.update_weights(policy.export(), 2)
            except EngineGoneError as error:
                return str(error), len(attempts)
            return "", 0
    finally:
        engine.close()


def all_are_lost(model: str, directory: str, **settings: Any) -> dict[str, Any]:
    """States after a sync in which two servers of the job died at the first weights, and the expected sums."""
    policy = build(model, ["parallel.tp=2"])
    with behaving({"die_at_bucket": 0}):
        engine = engine_of(policy, model, directory, probe_every=0, servers=2, **settings)
    try:
        engine.update_weights(policy.export(), 1)
        return {"states": states_of(engine), "sums": sums_of(policy, fp8=False)}
    finally:
        engine.close()


def killed_for_real(model: str, directory: str, prompts: list[list[int]], address: str, **settings: Any) -> dict[str, Any]:
    """Two real servers at an address. The first hangs with requests under way, and is back for the rest of them after a sync.
    The second is killed in the sync after that, and the first with requests under way after it. Returns what was generated,
    what failed and when, whether servers require a key, and log-prob gaps after the sync."""
    policy = build(model, [f"rollout.temperature={TEMPERATURE}"])
    with as_a_node_at(address), mock.patch.object(server, "_GRACE_S", 3.0):  # one that is stopped ends after that
        engine = engine_of(policy, model, directory, nodes="every", **settings)
    tokens = 240

    def process(number: int) -> psutil.Process:
        watchdog = engine._servers._machine._processes[f"SGLang server {number}"]._watchdog
        return psutil.Process(watchdog.pid).children()[0]

    class KillsAsItIsRead(type(policy.export())):
        def shards(self) -> dict[str, torch.Tensor]:
            process(1).kill()
            return super().shards()

    try:
        engine.update_weights(policy.export(), 1)
        first, *others = engine._control.fleet.clients
        patient_with(others)
        on_first_request(first, process(0).suspend)
        problems = [Problem(f"p{i}", "", "", ids) for i, ids in enumerate(prompts)]
        sampling = Sampling(4, tokens, TEMPERATURE, seed=1, step=1)
        with pytest.raises(NeedsSyncError):
            engine.generate(problems, sampling)
        found: dict[str, Any] = {"tokens": tokens, "failed": engine._control.fleet.failed}
        engine.update_weights(policy.export(), 1)
        patient_with([first])
        groups = engine.generate(problems, sampling)
        found["failed_then"] = engine._control.fleet.failed
        samples = [(prompts[i], sample.response_ids) for i, group in enumerate(groups) for sample in group]
        policy.update(replace(make_batch(samples), old_logp=policy.logprobs(samples).logp))
        engine.update_weights(KillsAsItIsRead(policy), 2)
        found["failed_in_sync"] = engine._control.fleet.failed
        clients = engine._control.fleet.serving
        replies = engine._control.probe(TEMPERATURE)
        wanted = policy.logprobs([(PROBE_PROMPT, reply.ids) for reply in replies.values()]).logp
        found |= {
            "lengths": [[len(sample.response_ids) for sample in group] for group in groups],
            "keyless": [httpx.get(f"{client.url}/model_info").status_code for client in clients],
            "served": [client.name for client in clients],
            "versions": [engine._control.run(client.weight_version(10)) for client in clients],
            "gaps": [
                (torch.tensor(reply.logprobs) - one).abs().max().item()
                for reply, one in zip(replies.values(), wanted, strict=True)
            ],
        }
        on_first_request(first, process(0).kill)
        with pytest.raises(EngineGoneError) as gone:
            engine.generate(problems, Sampling(4, tokens, TEMPERATURE, seed=1, step=2))
        return found | {"gone": str(gone.value)}
    finally:
        engine.close()
