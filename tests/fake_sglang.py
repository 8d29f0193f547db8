"""A process that speaks SGLang's protocol and breaks it on demand: `python -m tests.fake_sglang BEHAVIOUR`, BEHAVIOUR is JSON.

It prints its port. Tokens are a function of the prompt; weights are received over a real gloo group and kept as sums by name.
Behaviours: die_at, hang_at, fail_at, abort_at (numbers of the generate request, from 0), die_at_bucket, hang_at_bucket (numbers
of the weight bucket, from 0), stale (it never takes over a version), old (no begin and end of an update: SGLang before 0.5.21).
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from etr_megatron.platform.lifetime import die_with_parent

die_with_parent()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed import distributed_c10d as c10d  # noqa: E402

BEHAVIOUR: dict[str, Any] = json.loads(sys.argv[1])


def tokens_of(prompt: list[int], count: int) -> list[int]:
    return [(sum(prompt) + i) % 97 for i in range(count)]


class State:
    """What the server remembers; `log` is every route that changed something, in order."""

    def __init__(self) -> None:
        self.version, self.paused, self.in_update = "default", False, False
        self.sums: dict[str, float] = {}
        self.log: list[str] = []
        self.generated = itertools.count()
        self.buckets = itertools.count()
        self.groups: dict[str, dist.ProcessGroup] = {}


STATE = State()


def _act(kind: str, number: int, suffix: str = "") -> None:
    if BEHAVIOUR.get(f"die_at{suffix}") == number:
        os._exit(9)
    if BEHAVIOUR.get(f"hang_at{suffix}") == number:
        time.sleep(3600)


def generate(body: dict[str, Any]) -> tuple[int, Any]:
    number = next(STATE.generated)
    _act("generate", number)
    if BEHAVIOUR.get("fail_at") == number:
        return 500, {"error": {"message": "out of order"}}
    time.sleep(BEHAVIOUR.get("seconds", 0.01))
    ids = tokens_of(body["input_ids"], body["sampling_params"]["max_new_tokens"])
    finish = "abort" if BEHAVIOUR.get("abort_at") == number else "length"
    meta = {
        "output_token_logprobs": [[-0.5, token, None] for token in ids],
        "finish_reason": {"type": finish},
        "weight_version": STATE.version,
    }
    return 200, {"output_ids": ids, "meta_info": meta}


def join(body: dict[str, Any]) -> tuple[int, Any]:
    timeout = datetime.timedelta(seconds=20)
    store = dist.TCPStore(body["master_address"], body["master_port"], body["world_size"], timeout=timeout)
    name = body["group_name"]
    STATE.groups[name], _ = c10d._new_process_group_helper(
        body["world_size"],
        body["rank_offset"],
        [],
        c10d.Backend(body["backend"]),
        dist.PrefixStore(name, store),
        group_name=name,
        timeout=timeout,
    )
    c10d._world.pg_group_ranks[STATE.groups[name]] = {rank: rank for rank in range(body["world_size"])}
    return 200, {"success": True, "message": ""}


def receive(body: dict[str, Any]) -> tuple[int, Any]:
    if not STATE.in_update and not BEHAVIOUR.get("old"):
        return 200, {"success": False, "message": "not between begin and end"}
    _act("bucket", next(STATE.buckets), "_bucket")
    dtypes = [getattr(torch, dtype) for dtype in body["dtypes"]]
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in zip(body["shapes"], dtypes, strict=True)]
    flat = torch.empty(sum(sizes), dtype=torch.uint8)
    try:
        dist.broadcast(flat, src=0, group=STATE.groups[body["group_name"]])
    except Exception as error:
        return 200, {"success": False, "message": f"not received: {error}"}
    for name, dtype, part in zip(body["names"], dtypes, flat.split(sizes), strict=True):
        STATE.sums[name] = part.view(dtype).double().sum().item()
    return 200, {"success": True, "message": ""}


def answer(route: str, body: dict[str, Any]) -> tuple[int, Any]:
    if route == "/generate":
        return generate(body)
    if route == "/model_info":
        return 200, {"weight_version": STATE.version}
    if route == "/state":
        return 200, {"sums": STATE.sums, "log": STATE.log, "paused": STATE.paused, "version": STATE.version}
    if route == "/health":
        return 200, {}
    if route.endswith("_weight_update") and BEHAVIOUR.get("old"):
        return 404, {"detail": "Not Found"}
    STATE.log.append(route)
    if route == "/init_weights_update_group":
        return join(body)
    if route == "/update_weights_from_distributed":
        return receive(body)
    if route in ("/begin_weight_update", "/end_weight_update"):
        STATE.in_update = route.startswith("/begin")
    elif route in ("/pause_generation", "/continue_generation"):
        STATE.paused = route.startswith("/pause")
    elif route == "/destroy_weights_update_group":
        dist.destroy_process_group(STATE.groups.pop(body["group_name"]))
    elif route == "/update_weight_version" and not BEHAVIOUR.get("stale"):
        STATE.version = body["new_version"]
    return 200, {"success": True, "message": ""}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._reply(*answer(self.path, {}))

    def do_POST(self) -> None:
        self._reply(*answer(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")))

    def _reply(self, status: int, found: Any) -> None:
        body = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: Any) -> None:
        pass


def main() -> None:
    # A group needs a default one in the process; this one is of this process alone.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_port, flush=True)
    threading.Thread(target=server.serve_forever).start()


if __name__ == "__main__":
    main()
