"""Ranks of test gangs, and the process that they are forked from (see `tests/gang.py`): `python -m tests.gang_worker MODULE...`

That process imports torch and the modules, and reads requests, a line of JSON each, from a socket that is its stdin. A rank
reads its calls from stdin and writes replies to stdout; prints go to stderr.
"""

from __future__ import annotations

import datetime
import gc
import importlib
import json
import os
import pickle
import socket
import struct
import sys
import traceback

from etr_megatron.platform.lifetime import die_with_parent


def main() -> None:
    die_with_parent()
    gc.disable()  # during imports, collections take a fifth of the time; a rank collects after every call
    for name in ("torch.distributed", *sys.argv[1:]):
        importlib.import_module(name)
    requests = socket.socket(fileno=os.dup(0))
    while True:
        data, files, _, _ = socket.recv_fds(requests, 1 << 16, 2)
        if not data:
            return
        request = json.loads(data)  # one at a time: the next is sent only after the answer
        requests.sendall(f"{_answer(request, files)}\n".encode())


def _answer(request: dict, files: list[int]) -> int:
    """See `_Nursery.ask` in tests/gang.py."""
    if "start" not in request:
        pid = request.get("poll") or request["end"]
        # A poll does not reap it; that happens at its end.
        options = os.WEXITED | os.WNOWAIT | os.WNOHANG if "poll" in request else os.WEXITED
        return int(os.waitid(os.P_PID, pid, options) is not None)
    nursery, pid = os.getpid(), os.fork()
    if not pid:
        try:
            die_with_parent(nursery)
            os.dup2(files[0], 0)
            os.dup2(2, 1)
            os.environ |= request["start"]
            _serve(files[1])
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    for file in files:
        os.close(file)
    return pid


def _serve(stdout: int) -> None:
    """Serve a rank's calls until its stdin ends."""
    replies = os.fdopen(stdout, "wb")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=os.environ["GANG_STORE"],
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=datetime.timedelta(seconds=600),
    )
    with open(0, "rb", closefd=False) as calls:
        while header := calls.read(8):
            function, arguments = pickle.loads(calls.read(struct.unpack("<Q", header)[0]))
            module, name = function.split(":")
            try:
                reply = (True, getattr(importlib.import_module(module), name)(**arguments))
            except BaseException:
                reply = (False, traceback.format_exc())
            gc.collect()  # models hold process groups in reference cycles, and every gloo group holds threads
            if not gc.get_freeze_count():  # modules stay, so later collections can skip them
                gc.freeze()
            body = pickle.dumps(reply)
            replies.write(struct.pack("<Q", len(body)) + body)
            replies.flush()


if __name__ == "__main__":
    main()
