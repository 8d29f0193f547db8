"""Jobs that check how long ranks wait for each other in a weight sync, and which rank their errors name."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

from etr_megatron import platform
from etr_megatron.rollout import Sampling
from etr_megatron.rollout.sglang import SglangEngine, senders
from etr_megatron.rollout.sglang.control import Control
from etr_megatron.rollout.sglang.shared_memory import SharedBuckets
from etr_megatron.types import AnySequence, Problem
from etr_megatron.weights.transport import verify
from etr_megatron.weights.transport.board import Board, SyncError
from tests.hang import Hang
from tests.nodes import as_a_node_at
from tests.policy_jobs import build
from tests.sglang_jobs import engine_of, states_of, sums_of


def slow_delivery(model: str, directory: str, overrides: list[str], **settings: Any) -> dict[str, Any]:
    """States and sums after a sync, and its duration. Ranks wait for rank 0 no longer than for each other."""
    policy = build(model, overrides)
    engine = engine_of(policy, model, directory, probe_every=0, **settings)
    try:
        begun = time.monotonic()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(senders, "_PATIENCE", 1.0)
            engine.update_weights(policy.export(), 1)
        seconds = time.monotonic() - begun
        return {"states": states_of(engine), "sums": sums_of(policy), "seconds": seconds}
    finally:
        engine.close()


def late_rank(model: str, directory: str, **settings: Any) -> str:
    """The error on this rank of a second sync for which rank 1 is late."""
    policy, hang = build(model, ["parallel.tp=2"]), Hang()
    engine = engine_of(policy, model, directory, probe_every=0, **settings)

    class Late(type(policy.export())):
        def shards(self) -> dict[str, Any]:
            if dist.get_rank() == 1:
                hang()
            return super().shards()

    try:
        engine.update_weights(policy.export(), 1)
        board = engine._sender._tensors.wire.board
        assert board.timeout_s == engine._config.update_timeout_s
        board.timeout_s = 3.0  # not before: all have connected
        try:
            engine.update_weights(Late(policy), 2)
        except Exception as error:
            hang.given_up()
            return f"{type(error).__name__}: {error}"
        return ""
    finally:
        dist.barrier()
        engine.close()


def _error_of(engine: SglangEngine, weights: Any, owner: Any, name: str, instead: Callable[..., Any]) -> str:
    """The error on this rank of an engine's only sync, in which attribute `name` of `owner` is replaced."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, instead)
            engine.update_weights(weights, 1)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        dist.barrier()
        engine.close()
    return ""


def rank0_fails(model: str, directory: str, **settings: Any) -> str:
    """The error on this rank if rank 0's weights cannot be read, and rank 1 asks for the reason two seconds later."""
    policy = build(model, ["parallel.tp=2"])
    engine = engine_of(policy, model, directory, probe_every=0, **settings)
    failure = Board.failure

    class Broken(type(policy.export())):
        def shards(self) -> dict[str, Any]:
            return super().shards() if dist.get_rank() == 1 else {}

    def slowly(board: Board) -> SyncError:
        if dist.get_rank() == 1:
            time.sleep(2)
        return failure(board)

    return _error_of(engine, Broken(policy), Board, "failure", slowly)


def corrupted(model: str, directory: str, **settings: Any) -> str:
    """The error on this rank of a sync in which rank 1's checksum does not match its weights."""
    policy = build(model, ["parallel.tp=2"])
    engine = engine_of(policy, model, directory, probe_every=0, sync="sharded", **settings)
    right = verify.source_checksum

    def wrong(*args: Any) -> int:
        return right(*args) + (dist.get_rank() == 1)

    return _error_of(engine, policy.export(), verify, "source_checksum", wrong)


def host_fails(model: str, directory: str, culprit: int, **settings: Any) -> dict[str, Any]:
    """Ranks that act as nodes, one of which cannot write the second bucket to its shared memory: the error on this rank, how
    long it took from there, and whether the servers are paused then."""
    policy = build(model, ["parallel.tp=2"])
    with as_a_node_at("127.0.0.1"):
        engine = engine_of(policy, model, directory, probe_every=0, nodes="every", **settings)
    put, calls = SharedBuckets.put, []

    def broken(*args: Any) -> Any:
        calls.append(time.monotonic())
        if dist.get_rank() == culprit and len(calls) == 2:
            raise RuntimeError("bus error")
        return put(*args)

    found: dict[str, Any] = {"error": ""}
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SharedBuckets, "put", broken)
            try:
                engine.update_weights(policy.export(), 1)
            except Exception as error:
                found |= {"error": f"{type(error).__name__}: {error}", "buckets": len(calls)}
                found["after_s"] = time.monotonic() - calls[-1]
        control = engine._control
        if control is not None:
            clients = control.fleet.clients
            found["paused"] = [control.run(client.get("/state", timeout_s=120))["paused"] for client in clients]
        return found
    finally:
        dist.barrier()  # rank 0 reads the states of all ranks' servers first
        engine.close()


def one_probed_wrong(model: str, directory: str, **settings: Any) -> dict[str, Any]:
    """Syncs of fake servers, for which log-probs of -0.5 are right; the second server's are so only from the second sync on.
    After each sync and the generation after it, which servers had failed and how many prompts each had been given."""
    policy = build(model, ["parallel.tp=2"])
    engine = engine_of(policy, model, directory, probe_every=1, **settings)
    found: dict[str, Any] = {"failed": [], "prompts": [], "served": 0}

    class Right(type(policy.export())):
        def logprobs(self, sequences: Sequence[AnySequence]) -> list[torch.Tensor]:
            return [torch.full((len(ids),), -0.5) for _, ids in sequences]

    control = engine._control
    try:
        for version in (1, 2):
            engine.update_weights(Right(policy), version)
            problems = [Problem(f"p{i}", "", "", [i, 7]) for i in range(12)]
            found["served"] += len(engine.generate(problems, Sampling(1, 2, 1.0, seed=1, step=version)))
            if control is not None:
                found["failed"].append(control.fleet.failed)
                states = [control.run(client.get("/state", timeout_s=120)) for client in control.fleet.clients]
                found["prompts"].append([len(state["prompts"]) for state in states])
                control.run(control.fleet.clients[1].call("/behave", {"logprob": -0.5}, timeout_s=120))
        return found
    finally:
        engine.close()


def syncs_beside_a_server(model: str, directory: str, **settings: Any) -> list[str]:
    """What a rank does in three syncs with a colocated server; its cache of GPU memory is a stand-in."""
    policy = build(model, [])
    engine = engine_of(policy, model, directory, max_gap=1e9, placement="colocated", **settings)
    done: list[str] = []

    def noting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            done.append(name)
            return method(*args)

        return noted

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(platform, "release_cached_memory", lambda: done.append("empty cache"))
            for name in ("due", "begin", "finish", "probe"):
                patch.setattr(Control, name, noting(name, getattr(Control, name)))
            for version in (1, 2, 3):
                done.append(f"sync {version}")
                engine.update_weights(policy.export(), version)
                engine.release()
        return done
    finally:
        engine.close()
