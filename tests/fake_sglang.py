"""A process that speaks SGLang's protocol and breaks it on demand: `python -m tests.fake_sglang BEHAVIOUR`, BEHAVIOUR is JSON.
Or as SGLang is started, `... --port PORT`, with its behaviour in FAKE_SGLANG. It prints its port. Tokens are a function of the
prompt; weights are received over a real gloo group and kept as sums by name.
Behaviours: die_at, hang_at, fail_at, abort_at, refuse_at (number of the generate request, from 0), refuse_all, forget_at (from
this request on it has the weights that it was started with), drop_at (closes the connection without a reply), fail_prompt,
abort_prompt, die_prompt, die_late (first token of prompts at which it does this; late: after 30 tokens of a chain), busy (does
not answer /server_info while it generates), die_at_bucket, hang_at_bucket (number of the weight bucket, from 0), die_at_join
(of a weight group), stale (never accepts a new version), old (no begin and end of an update: SGLang before 0.5.21),
tokens_per_s (generates a chain of tokens at this rate, which can be cut off and resumes where a prompt ends), odd_tokens_per_s
(the rate of prompts whose token ids have an odd sum), pause_at (where a chain that begins waits, at this many tokens, until it
is cut off or this is taken back; `waiting` in /state counts them), odd_pause_at, hang_at_abort, stop_at (the whole process
stops at this generate request; with hang_at only the request waits), die_once (a number and a file: dies at this generate
request unless another server has made the file), seconds (per response), seconds_per_bucket, refuse_weights (any request with
weights), misfit (its parameters are another model's, which `sharded` detects), unwell (reports itself unhealthy), logprob (of
every token; a list: by attention group), says (by route, what it adds to its infos), says_no_experts (leaves out routed experts
although requested), no_tokenizer (refuses stop strings, which it otherwise ignores), weightless (accepts no weights, no torch).
POST /behave changes them in a running server; die_in and stop_in there count from the next request.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import datetime
import gc
import itertools
import json
import os
import pickle
import signal
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from etr_megatron.platform.lifetime import die_with_parent

die_with_parent()

STARTED_AS_SERVER = sys.argv[1].startswith("-")
BEHAVIOUR: dict[str, Any] = json.loads(os.environ.get("FAKE_SGLANG", "{}") if STARTED_AS_SERVER else sys.argv[1])
if not BEHAVIOUR.get("weightless"):
    gc.disable()  # collections would take a tenth of the time to the first request
    import torch
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d

    gc.enable()
CONTEXT = 512
DROP = 0
"""In place of a status: close the connection."""
TOO_LONG = 400, {"error": {"message": "Requested token count exceeds the model's maximum context length"}}
MEMORY = ("weights", "kv_cache", "cuda_graph")
UPDATE_SESSION = ("/begin_weight_update", "/end_weight_update")
ROUTES = (
    *("/generate", "/abort_request", "/model_info", "/server_info", "/health", "/flush_cache", "/update_weight_version"),
    *("/pause_generation", "/continue_generation", "/release_memory_occupation", "/resume_memory_occupation"),
    *("/init_weights_update_group", "/destroy_weights_update_group", "/update_weights_from_distributed"),
    *("/update_weights_from_tensor", "/update_weights_from_disk", "/v1/loads"),
)


def server_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--config")
    for flag in ("--skip-tokenizer-init", "--enable-memory-saver", "--enable-return-routed-experts", "--sleep-on-idle"):
        parser.add_argument(flag, action="store_true")
    for name in (
        *("--model-path", "--dtype", "--load-format", "--tp-size", "--custom-weight-loader", "--attention-backend"),
        *("--json-model-override-args", "--weight-version"),
    ):
        parser.add_argument(name)
    parser.add_argument("--mem-fraction-static", help="a number: see --attention-backends, which there is not")
    return parser.parse_args(sys.argv[1:] if STARTED_AS_SERVER else [])


def tokens_of(prompt: list[int], count: int) -> list[int]:
    return [(sum(prompt) + i) % 97 for i in range(count)]


class State:
    """The server's state; `log` lists every route that changed something, in order."""

    def __init__(self) -> None:
        self.version, self.paused, self.in_update = "default", False, False
        self.load_format = "auto"
        self.released: set[str] = set()
        self.sums: dict[str, float] = {}
        self.most_payload_bytes = 0
        self.log: list[str] = []
        self.generated = itertools.count()
        self.buckets = itertools.count()
        self.groups: dict[str, dist.ProcessGroup] = {}
        self.model: Any = None
        self.aborted: set[str] = set()
        self.rids: list[str | None] = []  # of `prompts`
        self.ranks: list[int | None] = []  # the attention groups of `prompts`
        self.running, self.waiting = set[str](), set[str]()
        self.prompts: list[list[int]] = []  # in the order received
        self.prompt_versions: list[str] = []  # weight version when each was received
        self.origin: dict[int, list[int]] = {}  # seed -> the first prompt that had it


STATE = State()


def _act(kind: str, number: int, suffix: str = "") -> None:
    if BEHAVIOUR.get(f"die_at{suffix}") == number:
        os._exit(9)
    if BEHAVIOUR.get(f"hang_at{suffix}") == number:
        time.sleep(3600)
    if BEHAVIOUR.get(f"stop_at{suffix}") == number:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(BEHAVIOUR.get(f"seconds_per{suffix}", 0))


def generate(body: dict[str, Any]) -> tuple[int, Any]:
    if len(body["input_ids"]) + body["sampling_params"]["max_new_tokens"] > CONTEXT:
        return TOO_LONG
    with ENTRY:
        number = next(STATE.generated)
        STATE.prompts.append(body["input_ids"])
        STATE.prompt_versions.append(STATE.version)
        STATE.rids.append(body.get("rid"))
        STATE.ranks.append(body.get("routed_dp_rank"))
    _act("generate", number)
    if number == BEHAVIOUR.get("die_once", [None])[0]:
        with contextlib.suppress(FileExistsError):
            Path(BEHAVIOUR["die_once"][1]).touch(exist_ok=False)
            os._exit(9)
    first = body["input_ids"][0]
    if BEHAVIOUR.get("die_prompt") == first:
        os._exit(9)
    if BEHAVIOUR.get("drop_at") == number:
        return DROP, None
    if BEHAVIOUR.get("fail_at") == number or BEHAVIOUR.get("fail_prompt") == first or BEHAVIOUR.get("fail_all"):
        return 500, {"error": {"message": "out of order"}}
    if BEHAVIOUR.get("refuse_at") == number or BEHAVIOUR.get("refuse_all"):
        return TOO_LONG
    if body["sampling_params"].get("stop") and (BEHAVIOUR.get("no_tokenizer") or "--skip-tokenizer-init" in sys.argv):
        return 400, {"error": {"message": "stop is unavailable when skip_tokenizer_init=True"}}
    if BEHAVIOUR.get("forget_at") == number:
        STATE.version = "default"
    count, finish = body["sampling_params"]["max_new_tokens"], "length"
    if BEHAVIOUR.get("tokens_per_s"):
        ids, finish = draw_slowly(body, count)
    else:
        with BATCH if BEHAVIOUR.get("busy") else contextlib.nullcontext():
            time.sleep(BEHAVIOUR.get("seconds", 0.01))
        ids = tokens_of(body["input_ids"], count)
    finish = "abort" if BEHAVIOUR.get("abort_at") == number or BEHAVIOUR.get("abort_prompt") == first else finish
    said = BEHAVIOUR.get("logprob", -0.5)
    logprob = said[body["routed_dp_rank"]] if isinstance(said, list) else said
    meta = {
        "output_token_logprobs": [[logprob, token, None] for token in ids],
        "finish_reason": {"type": finish},
        "weight_version": STATE.version,
    }
    if body.get("return_routed_experts") and not BEHAVIOUR.get("says_no_experts"):
        chosen = [number for token in [*body["input_ids"], *ids][:-1] for number in (token % 4, 4 + token % 3)]
        meta["routed_experts"] = base64.b64encode(struct.pack(f"<{len(chosen)}i", *chosen)).decode()
    return 200, {"output_ids": ids, "meta_info": meta}


def draw_slowly(body: dict[str, Any], count: int) -> tuple[list[int], str]:
    """The chain, or the part generated before the request is cut off. A seed identifies one response across resumptions."""
    last = body["input_ids"][-1]
    rate, seed = BEHAVIOUR["tokens_per_s"], body["sampling_params"]["sampling_seed"]
    is_new = seed not in STATE.origin
    is_odd = sum(STATE.origin.setdefault(seed, body["input_ids"])) % 2
    if is_odd:
        rate = BEHAVIOUR.get("odd_tokens_per_s", rate)
    started = time.monotonic()
    STATE.running.add(body.get("rid"))
    drawn = 0
    while drawn < count and body.get("rid") not in STATE.aborted:
        time.sleep(0.005)
        most = BEHAVIOUR.get("odd_pause_at" if is_odd and "pause_at" not in BEHAVIOUR else "pause_at") if is_new else None
        drawn = min(int((time.monotonic() - started) * rate), count if most is None else most)
        if drawn == most:
            STATE.waiting.add(body.get("rid"))
        if BEHAVIOUR.get("die_late") == body["input_ids"][0] and drawn >= 30:
            os._exit(9)
    STATE.running.discard(body.get("rid"))
    chain = [(last + 1 + i) % 97 for i in range(count)]
    return (chain, "length") if drawn >= count else (chain[:drawn], "abort")


def join(body: dict[str, Any]) -> tuple[int, Any]:
    if BEHAVIOUR.get("die_at_join"):
        os._exit(9)
    try:
        return form_group(body, datetime.timedelta(seconds=600))  # as SGLang's
    except Exception as error:
        return 400, {"success": False, "message": f"not formed: {error}"}


def form_group(body: dict[str, Any], timeout: datetime.timedelta) -> tuple[int, Any]:
    store = dist.TCPStore(body["master_address"], body["master_port"], body["world_size"], timeout=timeout)
    name, world, rank, backend = body["group_name"], body["world_size"], body["rank_offset"], c10d.Backend(body["backend"])
    prefixed = dist.PrefixStore(name, store)
    group, _ = c10d._new_process_group_helper(world, rank, [], backend, prefixed, group_name=name, timeout=timeout)
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
    STATE.groups[name] = group
    return 200, {"success": True, "message": ""}


def receive(body: dict[str, Any]) -> tuple[int, Any]:
    if not STATE.in_update and not BEHAVIOUR.get("old"):
        return 400, {"success": False, "message": "not between begin and end"}
    _act("bucket", next(STATE.buckets), "_bucket")
    dtypes = [getattr(torch, dtype) for dtype in body["dtypes"]]
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in zip(body["shapes"], dtypes, strict=True)]
    flat = torch.empty(sum(sizes), dtype=torch.uint8)
    try:
        dist.broadcast(flat, src=0, group=STATE.groups[body["group_name"]])
    except Exception as error:
        return 400, {"success": False, "message": f"not received: {error}"}
    for name, dtype, part in zip(body["names"], dtypes, flat.split(sizes), strict=True):
        STATE.sums[name] = part.view(dtype).double().sum().item()
    return 200, {"success": True, "message": ""}


def take_tensors(body: dict[str, Any]) -> tuple[int, Any]:
    """Whole tensors, or the offer of a sharded sync, which is received into parameters named like a server's."""
    if not STATE.in_update and not BEHAVIOUR.get("old"):
        return 400, {"success": False, "message": "not between begin and end"}
    _act("bucket", next(STATE.buckets), "_bucket")
    payloads = body["serialized_named_tensors"]
    STATE.most_payload_bytes = max(STATE.most_payload_bytes, *map(len, payloads))
    workers = [pickle.loads(base64.b64decode(payload)) for payload in payloads]
    if body.get("load_format") is None:
        found = [{name: tensor.double().sum().item() for name, tensor in named} for named in workers]
        if any(one != found[0] for one in found):
            return 400, {"success": False, "message": "workers were sent different tensors"}
        STATE.sums |= found[0]
        return 200, {"success": True, "message": ""}
    named = workers[0]
    from etr_megatron.weights.transport import server_loader
    from tests.transport_jobs import ToyServer

    offer = server_loader.Offer.read(named[0][1])
    if STATE.model is None:
        STATE.model = ToyServer(offer.plan(), offer.rank, torch.float32)
        if BEHAVIOUR.get("misfit"):
            STATE.model.named_parameters = lambda: [("model.norm.weight", torch.zeros(3))]
    server_loader.load(STATE.model, named)
    STATE.sums = {name: tensor.double().sum().item() for name, tensor in STATE.model.named_parameters()}
    return 200, {"success": True, "message": ""}


def load_directory(body: dict[str, Any]) -> tuple[int, Any]:
    from etr_megatron.weights import SafetensorsDir

    _act("bucket", next(STATE.buckets), "_bucket")
    if (body.get("load_format") or STATE.load_format) == "dummy":
        return 400, {"success": False, "message": "Failed to get model loader: DummyModelLoader."}
    files = SafetensorsDir(body["model_path"])
    for name, shape in files.shapes().items():
        STATE.sums[name] = files.read(name, (0,) * len(shape), shape).double().sum().item()
    return 200, {"success": True, "message": ""}


def info_of(route: str) -> dict[str, Any] | None:
    """The reply of a route that only tells something; None for other routes."""
    says = BEHAVIOUR.get("says", {}).get(route, {})
    if route == "/model_info":
        return {"weight_version": STATE.version} | says
    if route == "/server_info":
        with SCHEDULER, BATCH:
            return says
    if route == "/v1/loads?include=core":
        return {"loads": [{"num_running_reqs": len(STATE.running), "num_waiting_reqs": 0, "token_usage": 0.0}]}
    if route != "/state":
        return None
    names = ("sums", "log", "paused", "version", "prompts", "prompt_versions", "rids", "ranks", "most_payload_bytes")
    said = {name: getattr(STATE, name) for name in names}
    return said | {"aborted": list(filter(None, STATE.aborted)), "waiting": len(STATE.waiting), "pid": os.getpid()}


def answer(route: str, body: dict[str, Any]) -> tuple[int, Any]:
    if route == "/openapi.json":
        lacks = [*BEHAVIOUR.get("lacks", ()), *(UPDATE_SESSION if BEHAVIOUR.get("old") else ())]
        return 200, {"paths": {name: {} for name in (*ROUTES, *UPDATE_SESSION) if name not in lacks}}
    if route == "/generate":
        return generate(body)
    if route == "/abort_request":
        if BEHAVIOUR.get("hang_at_abort"):
            time.sleep(3600)
        STATE.aborted |= STATE.running if body.get("abort_all") else {body["rid"]}
        return 200, {}
    if (info := info_of(route)) is not None:
        return 200, info
    if route == "/behave":
        soon = {how[:-2] + "at": len(STATE.prompts) + more for how, more in body.items() if how in ("die_in", "stop_in")}
        BEHAVIOUR.update(body | soon)
        return 200, {}
    if route == "/health" and (BEHAVIOUR.get("unwell") or not STATE.paused):
        return 503 if BEHAVIOUR.get("unwell") else 200, {}
    if route == "/health":
        time.sleep(15)  # SGLang's check generates a token, which a paused server does not
        return 503, {}
    if route.endswith("_weight_update") and BEHAVIOUR.get("old"):
        return 404, {"detail": "Not Found"}
    STATE.log.append(" ".join([route, *body.get("tags", ())]))
    if route in WEIGHTS and BEHAVIOUR.get("refuse_weights"):
        return 400, {"success": False, "message": "it takes no weights"}
    if route in WEIGHTS:
        with SCHEDULER:
            return WEIGHTS[route](body)
    if route == "/end_weight_update" and not STATE.in_update:
        return 400, {"success": False, "message": "no weight-update session is open"}
    if route == "/begin_weight_update" and STATE.in_update:
        return 400, {"success": False, "message": "a weight-update session is already open; call end_weight_update() first"}
    if route in UPDATE_SESSION:
        STATE.in_update = route.startswith("/begin")
    elif route in ("/pause_generation", "/continue_generation"):
        STATE.paused = route.startswith("/pause")
    elif route.endswith("_memory_occupation"):
        tags, releases = set(body.get("tags") or MEMORY), route.startswith("/release")
        if (STATE.running or tags & STATE.released) if releases else tags - STATE.released:
            os._exit(9)  # as SGLang does if asked twice, or to release memory while it generates
        STATE.released ^= tags
    elif route == "/destroy_weights_update_group":
        if body["group_name"] not in STATE.groups:
            return 400, {"success": False, "message": "there is no such group"}
        dist.destroy_process_group(STATE.groups.pop(body["group_name"]))
    elif route == "/update_weight_version" and not BEHAVIOUR.get("stale"):
        STATE.version = body["new_version"]
    if route in ("/pause_generation", "/continue_generation"):
        return 200, {"message": "", "status": "ok"}
    if route.startswith("/flush_cache") or route.endswith("_memory_occupation"):
        return 200, {}  # SGLang answers with plain text, or nothing
    return 200, {"success": True, "message": ""}


WEIGHTS = {
    "/init_weights_update_group": join,
    "/update_weights_from_distributed": receive,
    "/update_weights_from_tensor": take_tensors,
    "/update_weights_from_disk": load_directory,
}
ENTRY, BATCH, SCHEDULER = threading.Lock(), threading.Lock(), threading.Lock()
"""Held while a generate request is numbered; while generating, if `busy`; while a request for weights or /server_info is
handled: SGLang's scheduler handles these one at a time, and one that waits blocks the next."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    api_key = ""

    def do_GET(self) -> None:
        self._reply(*answer(self.path, {}))

    def do_POST(self) -> None:
        self._reply(*answer(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")))

    def _reply(self, status: int, found: Any) -> None:
        if self.api_key and self.path != "/health" and self.headers.get("Authorization") != f"Bearer {self.api_key}":
            status, found = 401, {"error": "Unauthorized"}
        if status == DROP:
            self.close_connection = True
            return
        body = json.dumps(found, separators=(",", ":")).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: Any) -> None:
        pass


def start() -> threading.Thread:
    """Print the port and serve in a thread."""
    # New groups require a default group; this one has only this process.
    if not BEHAVIOUR.get("weightless"):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    arguments = server_arguments()
    STATE.version = arguments.weight_version or STATE.version
    STATE.load_format = arguments.load_format or STATE.load_format
    if arguments.config:
        Handler.api_key = json.loads(Path(arguments.config).read_text().removeprefix("api-key: "))
    ThreadingHTTPServer.request_queue_size = 256  # pending connections; with the default of 5, some are reset
    server = ThreadingHTTPServer((arguments.host, arguments.port), Handler)
    server.daemon_threads = True
    print(server.server_port, flush=True)
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    return serving


if __name__ == "__main__":
    start()
