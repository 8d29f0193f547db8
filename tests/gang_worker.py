"""Ranks of test gangs (see `tests/gang.py`). A rank reads its calls from stdin; prints go to stderr."""

from __future__ import annotations

import datetime
import gc
import importlib
import os
import pickle
import struct
import traceback


def serve(files: list[int], environment: dict[str, str]) -> None:
    """Serve a rank's calls until its stdin, the first of `files`, ends; replies go to the second."""
    os.dup2(files[0], 0)
    os.dup2(2, 1)
    os.environ |= environment | {"PYTHONWARNINGS": "ignore"}  # as in this process, where the nursery has set it
    replies = os.fdopen(files[1], "wb")
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
    has_frozen = False
    with open(0, "rb", closefd=False) as calls:
        while header := calls.read(8):
            function, arguments = pickle.loads(calls.read(struct.unpack("<Q", header)[0]))
            module, name = function.split(":")
            try:
                reply = (True, getattr(importlib.import_module(module), name)(**arguments))
            except BaseException:
                reply = (False, traceback.format_exc())
            gc.collect()  # models hold process groups in reference cycles, and every gloo group holds threads
            if not has_frozen:  # the call's modules stay, so later collections can skip them
                gc.freeze()
                has_frozen = True
            body = pickle.dumps(reply)
            replies.write(struct.pack("<Q", len(body)) + body)
            replies.flush()
