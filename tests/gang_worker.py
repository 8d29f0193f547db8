"""A rank of a test gang, see `tests/gang.py`. Calls come in on stdin; stdout carries the replies, prints go to stderr."""

from __future__ import annotations

import datetime
import gc
import importlib
import os
import pickle
import struct
import sys
import traceback


def main() -> None:
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    from etr_megatron.platform.lifetime import die_with_parent

    die_with_parent()
    gc.disable()  # collections in the middle of the imports take a fifth of their time; below one is made after every call
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=os.environ["GANG_STORE"],
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=datetime.timedelta(seconds=120),
    )
    while header := sys.stdin.buffer.read(8):
        function, arguments = pickle.loads(sys.stdin.buffer.read(struct.unpack("<Q", header)[0]))
        module, name = function.split(":")
        try:
            reply = (True, getattr(importlib.import_module(module), name)(**arguments))
        except BaseException:
            reply = (False, traceback.format_exc())
        gc.collect()  # models hold process groups in reference cycles, and every gloo group holds threads
        if not gc.get_freeze_count():  # the modules stay, and need not be looked through each time
            gc.freeze()
        body = pickle.dumps(reply)
        replies.write(struct.pack("<Q", len(body)) + body)
        replies.flush()


if __name__ == "__main__":
    main()
