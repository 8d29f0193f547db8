"""Nodes with servers and no ranks: rank 0's orders to these nodes, and the process on each of them that carries orders out.

Both sides exchange messages through torchrun's store on the first node. A server node takes part in no collective. When it is
lost, the run goes on with the servers of the other nodes. Keys, for node N:

    session       a name that rank 0 chooses; it is the prefix of all other keys. torchrun may keep one store through restarts,
                  so keys of earlier sessions must be ignored: nodes join a session only if its beats increase
    beats         increases while rank 0 is alive; `N/beats` likewise for the node
    N/hello       the node's address, and the reason if it cannot run servers
    N/order/K     the K-th order; N/reply/K its result. Once there is a next order, a missing reply is not waited for any more
    N/stop        the node received SIGTERM
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any

import torch.distributed as dist

from etr_megatron.config import SglangConfig, startup_timeout_of
from etr_megatron.errors import RequeueError, UserError
from etr_megatron.platform.background import background_thread
from etr_megatron.platform.heartbeat import Heartbeat
from etr_megatron.platform.job_store import own_connection
from etr_megatron.platform.phases import StopAskedError
from etr_megatron.platform.preemption import StopRequest
from etr_megatron.rollout.engine import MustStop, never
from etr_megatron.rollout.rank0 import BEAT_S, SILENCE_S
from etr_megatron.rollout.sglang.hosts import STARTS, Machine, Started
from etr_megatron.rollout.sglang.machines import ServerSetting, machine_of
from etr_megatron.rollout.sglang.parts import LATE_S, Rendezvous, merged
from etr_megatron.rollout.sglang.places import address_towards, parts_of
from etr_megatron.status import REQUEUE_EXIT, USER_ERROR_EXIT

_POLL_S = 0.1
LOST_S = 30.0
"""Seconds without a heartbeat after which a node counts as lost."""
_HEARD_S = 5.0
_END_S = 60.0
"""Seconds for a node to stop its servers."""
_SESSION = "session"
_GONE = "gives no sign of life any more; the servers are stopped"


def _connect(patience_s: float) -> dist.Store:
    """Connect to the job's store, as its ranks do. patience_s: wait for rank 0, whose process may host the store."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=datetime.timedelta(seconds=patience_s)))
    return dist.PrefixStore("server_nodes", store)


class ServerNodes:
    """Rank 0's side: start and stop as of one `Machine` for all nodes. As a context manager, ends the nodes with the run."""

    def __init__(self, count: int, config: SglangConfig, store: dist.Store | None = None) -> None:
        """store: of the job, which must be up already; None connects to it."""
        self._count, self._config = count, config
        self._name_of_session = secrets.token_hex(8)
        self._root = store if store is not None else _connect(_END_S)
        self._store = dist.PrefixStore(self._name_of_session, self._root)
        self._names: list[list[str]] = [[] for _ in range(count)]
        self._addresses: list[str] = []
        self._orders = [0] * count
        self._silences = [0.0] * count
        self._stop_asked = threading.Event()
        self._stack = ExitStack()

    def __enter__(self) -> ServerNodes:
        self._root.set(_SESSION, self._name_of_session)
        self._stack.enter_context(background_thread(self._beat, "server_nodes"))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """End the nodes with the run's exit code."""
        code = 0
        if error is not None:
            code = REQUEUE_EXIT if isinstance(error, RequeueError) else USER_ERROR_EXIT if isinstance(error, UserError) else 1
        end = {"do": "end", "code": code, "why": str(error or "")}
        with suppress(RuntimeError):  # if the store is gone, the nodes have ended too
            # Wait until the nodes have read the order, because the store ends with this process's torchrun.
            self._ask({node: end for node in range(self._count)}, _HEARD_S)
        self._stack.close()

    def _beat(self, done: threading.Event) -> None:
        """Send rank 0's heartbeats; check which nodes are alive, and whether one received SIGTERM."""
        store = own_connection(self._store)
        hearts = [Heartbeat(store, f"{node}/beats") for node in range(self._count)]
        with suppress(RuntimeError):
            while not done.wait(BEAT_S):
                store.add("beats", 1)
                self._silences = [heart.silence_s() for heart in hearts]
                if any(store.check([f"{node}/stop"]) for node in range(self._count)):
                    self._stop_asked.set()

    def asked_to_stop(self) -> bool:
        """Whether a node received SIGTERM, which stops the whole job."""
        return self._stop_asked.is_set()

    def meet(self, timeout_s: float, must_stop: MustStop = never) -> list[str]:
        """Wait for all nodes; returns their addresses, in order. Raises UserError for nodes that cannot run servers or do not
        connect in time, and StopAskedError when `must_stop()` becomes true."""
        deadline = time.monotonic() + timeout_s
        missing = set(range(self._count))
        hellos: dict[int, Any] = {}
        while missing and time.monotonic() < deadline:
            for node in sorted(missing):
                if self._store.check([f"{node}/hello"]):
                    hellos[node] = json.loads(self._store.get(f"{node}/hello"))
                    missing.remove(node)
            self._refuse_if(must_stop)
            time.sleep(_POLL_S)
        for node, said in sorted(hellos.items()):
            if said["problem"]:
                raise UserError(f"server node {node} ({said['address']}): {said['problem']}")
        if missing:
            who = ", ".join(map(str, sorted(missing)))
            raise UserError(
                f"server node {who} of sglang.dedicated_nodes={self._count} did not connect within {timeout_s:g} s (they are "
                "counted from 0, and are the last of torchrun's nodes)"
            )
        self._addresses = [hellos[node]["address"] for node in range(self._count)]
        return list(self._addresses)

    def prepare(self, names: Sequence[str], setting: ServerSetting) -> None:
        """Assign servers to the nodes; call it after `meet`. Raises UserError for a node that cannot run its servers."""
        places = parts_of(names, self._count, self._config)
        self._names = [own for own, _ in places]
        orders = {
            node: {"do": "prepare", "names": own, "part": part, "setting": setting._asdict()}
            for node, (own, part) in enumerate(places)
        }
        for node, said in self._ask(orders, _END_S).items():
            if isinstance(said, str):
                raise UserError(f"{self._name(node)}: {said}")

    def start(self, names: Iterable[str], must_stop: MustStop = never) -> dict[str, Started]:
        """See `Machine.start`. Servers of a lost node have a problem. Raises StopAskedError when `must_stop()` becomes true."""
        own, attempt = self._by_node(names), secrets.token_hex(8)
        orders = {node: {"do": "start", "names": mine, "attempt": attempt} for node, mine in own.items()}

        def give_up(node: int) -> None:
            for name in own[node]:  # the server's parts on other nodes would wait for this one
                Rendezvous(self._store, attempt, name).fail()

        once_s = startup_timeout_of(self._config)
        limit_s = _END_S + (STARTS * once_s if self._config.nodes_per_server == 1 else once_s + LATE_S)
        found: list[dict[str, Started]] = []
        for node, said in self._ask(orders, limit_s, must_stop, failed=give_up).items():
            if isinstance(said, str):
                what = f"cannot be started on {self._name(node)}: {said}"
                found.append({name: Started("", f"{name}: {what}") for name in own[node]})
            else:
                found.append({name: Started(*started) for name, started in said.items()})
        return merged(found)

    def stop(self, names: Iterable[str] | None = None) -> None:
        """See `Machine.stop`."""
        orders = {node: {"do": "stop", "names": mine} for node, mine in self._by_node(names).items()}
        with suppress(RuntimeError):  # if the store is gone, the nodes have ended too
            self._ask(orders, _END_S)

    def _by_node(self, names: Iterable[str] | None) -> dict[int, list[str]]:
        """Node -> those of these servers (None: all) that run on it, for nodes that have any."""
        asked = None if names is None else set(names)
        own = {node: [name for name in mine if asked is None or name in asked] for node, mine in enumerate(self._names)}
        return {node: mine for node, mine in own.items() if mine}

    @staticmethod
    def _refuse_if(must_stop: MustStop) -> None:
        if must_stop():
            raise StopAskedError("told to stop (SIGTERM) while waiting for server nodes")

    def _name(self, node: int) -> str:
        return f"server node {node} ({self._addresses[node]})"

    def _post(self, node: int, order: Mapping[str, Any]) -> int:
        number = self._orders[node]
        self._orders[node] += 1
        self._store.set(f"{node}/order/{number}", json.dumps(order))
        return number

    def _ask(
        self,
        orders: Mapping[int, Mapping[str, Any]],
        timeout_s: float,
        must_stop: MustStop = never,
        *,
        failed: Callable[[int], None] = lambda _: None,
    ) -> dict[int, Any]:
        """Send orders; returns node -> its reply, or a sentence if it failed or did not answer.

        failed: called at once with a node that failed. Raises StopAskedError when `must_stop()` becomes true; the nodes abandon
        their current order when they get the next one.
        """
        keys = {node: f"{node}/reply/{self._post(node, order)}" for node, order in orders.items()}
        found: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while keys:
            for node, key in list(keys.items()):
                if self._store.check([key]):
                    found[node] = json.loads(self._store.get(key))
                elif (silence := self._silences[node]) > LOST_S:
                    found[node] = f"it has given no sign of life for {silence:.0f} s"
                elif time.monotonic() > deadline:
                    found[node] = f"it did not answer within {timeout_s:g} s"
                if node in found:
                    del keys[node]
                    if isinstance(found[node], str):
                        failed(node)
            if keys:
                self._refuse_if(must_stop)
                time.sleep(_POLL_S)
        return {node: found[node] for node in orders}


class ServerNode:
    """The node's side, one process: carries out orders until the run ends."""

    def __init__(
        self,
        number: int,
        config: SglangConfig,
        stop_grace_s: float,
        *,
        patience_s: float,
        store: dist.Store | None = None,
    ) -> None:
        """number: among the dedicated nodes. patience_s: wait for rank 0. store: of the job; None connects to it."""
        self._number, self._config, self._grace_s, self._patience_s = number, config, stop_grace_s, patience_s
        self._root = store
        self._address = address_towards(os.environ.get("MASTER_ADDR", "127.0.0.1"))
        self._host: Machine | None = None
        self._stop_request = StopRequest()
        self._lost = threading.Event()

    def serve(self, check: Callable[[], None] = lambda: None) -> int:
        """Serve until the run ends; returns the run's exit code, or 1 when rank 0 is lost. check: raises UserError if this
        machine cannot run servers; the error is reported to rank 0 and then raised here."""
        with self._stop_request.on_sigterm(self._grace_s):
            problem = None
            try:
                check()
            except UserError as error:
                problem = error
            joined = self._join()
            if joined is None:
                if problem is not None:
                    raise problem
                return self._without_rank0(f"did not connect within {self._patience_s:g} s")
            root, session = joined
            self._store = dist.PrefixStore(session, root)
            if problem is not None:
                self._say_hello(str(problem))
                raise problem
            with background_thread(lambda done: self._beat(root, session, done), "server_node"):
                try:
                    self._say_hello("")
                    return self._obey()
                except dist.DistError:  # the store is gone, and with it rank 0 or its torchrun
                    return self._without_rank0(_GONE)
                finally:
                    if self._host is not None:
                        self._host.stop()

    def _join(self) -> tuple[dist.Store, str] | None:
        """The store and the name of rank 0's session; None if no session with increasing beats appears in time."""
        deadline = time.monotonic() + self._patience_s
        before: dict[str, int] = {}
        try:
            root = self._root if self._root is not None else _connect(self._patience_s)
            while time.monotonic() < deadline:
                if root.check([_SESSION]):
                    name = root.get(_SESSION).decode()
                    beats = root.add(f"{name}/beats", 0)
                    if beats != before.setdefault(name, beats):
                        return root, name
                time.sleep(_POLL_S)
        except dist.DistError:
            pass
        return None

    def _say_hello(self, problem: str) -> None:
        self._store.set(f"{self._number}/hello", json.dumps({"address": self._address, "problem": problem}))

    def _without_rank0(self, what: str) -> int:
        print(f"server node {self._number}: rank 0 {what}", file=sys.stderr, flush=True)
        return 1

    def _obey(self) -> int:
        for number, order in self._orders():
            reply_key = f"{self._number}/reply/{number}"
            if order["do"] == "end":
                self._store.set(reply_key, "null")
                if order["code"]:
                    print(f"server node {self._number}: the run has ended: {order['why']}", file=sys.stderr, flush=True)
                return int(order["code"])
            if order["do"] == "start" and (self._store.check([reply_key]) or self._is_over(number)):
                continue  # it was for an earlier process of this node, or its reply is not awaited any more
            try:
                reply = self._do(order, number)
            except (UserError, OSError) as error:
                reply = str(error)
            except StopAskedError:
                continue
            self._store.set(reply_key, json.dumps(reply))
        return self._without_rank0(_GONE)

    def _orders(self) -> Iterator[tuple[int, Any]]:
        """Yield (number, order) as orders arrive, until rank 0 is lost."""
        for number in itertools.count():
            while not self._store.check([self._order(number)]):
                if self._lost.wait(_POLL_S):
                    return
            yield number, json.loads(self._store.get(self._order(number)))

    def _order(self, number: int) -> str:
        return f"{self._number}/order/{number}"

    def _is_over(self, number: int) -> bool:
        """Whether the reply to this order is not awaited any more."""
        return self._lost.is_set() or self._store.check([self._order(number + 1)])

    def _do(self, order: Mapping[str, Any], number: int) -> Any:
        if order["do"] == "prepare":
            setting = ServerSetting(**order["setting"])
            self._host = machine_of(self._config, order["names"], order["part"], self._address, setting, self._store)
            return None
        assert self._host is not None
        if order["do"] == "start":
            return self._host.start(order["names"], lambda: self._is_over(number), order["attempt"])
        self._host.stop(order["names"])
        return None

    def _beat(self, root: dist.Store, session: str, done: threading.Event) -> None:
        """Send the node's heartbeats, report a SIGTERM of the node, check that rank 0 is alive and was not restarted."""
        try:
            root = own_connection(root)
            store = dist.PrefixStore(session, root)
            heart = Heartbeat(store, "beats")
            while not done.wait(BEAT_S):
                store.add(f"{self._number}/beats", 1)
                if self._stop_request():
                    store.set(f"{self._number}/stop", "")
                if heart.silence_s() > SILENCE_S or root.get(_SESSION).decode() != session:
                    break
        except RuntimeError:
            pass
        self._lost.set()
