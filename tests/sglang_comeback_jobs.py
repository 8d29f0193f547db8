"""Jobs that gang ranks run against fake servers that fail and come back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import psutil

from etr_megatron.rollout import Sampling
from etr_megatron.types import Problem
from tests.policy_jobs import build
from tests.sglang_jobs import behaving, engine_of, states_of, sums_of


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
            engine._control.run(client.call("/behave", dict(behaviour), timeout_s=10))
            for route in ("/pause_generation", "/begin_weight_update") if behaviour.get("in_update") else ():
                engine._control.run(client.call(route, timeout_s=10))
            engine.update_weights(policy.export(), len(loads))
            log = engine._control.run(client.get("/state", timeout_s=10))["log"]
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
                engine._control.run(engine._control.fleet.clients[0].call("/behave", {"fail_at": 0}, timeout_s=10))
            engine.generate(problems, Sampling(1, 2, 1.0, seed=1, step=version))
            before = there(states)
            engine.release()
            found.append([list(states), before, there(states)])
        return found
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
