"""A fake SGLang server that spans nodes, started as SGLang is: `python -m tests.fake_parts --nnodes N --node-rank R ...`.

The first part is tests/fake_sglang.py, which serves once all others have connected to its `--dist-init-addr`. The others say
nothing. As with gloo, each ends when it loses another. FAKE_PARTS is JSON of misbehaviours by part: "die" (it ends before it
connects), "late" (seconds before it connects), "dies_after" (seconds after it has connected).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time

from etr_megatron.platform.lifetime import die_with_parent

die_with_parent()


def option(name: str) -> str:
    """Take an option from the command line, which fake_sglang reads next."""
    place = sys.argv.index(name)
    value = sys.argv[place + 1]
    del sys.argv[place : place + 2]
    return value


def end_with(peer: socket.socket) -> None:
    with contextlib.suppress(OSError):
        peer.recv(1)
    print("RuntimeError: Connection closed by peer", flush=True)
    os._exit(9)


def main() -> None:
    parts, part = int(option("--nnodes")), int(option("--node-rank"))
    host, port = option("--dist-init-addr").split(":")
    behaviour = json.loads(os.environ.get("FAKE_PARTS", "{}")).get(str(part), {})
    time.sleep(behaviour.get("late", 0))
    if behaviour.get("die"):
        sys.exit("torch.OutOfMemoryError: no room for the model")
    if part:
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                met = socket.create_connection((host, int(port)))
                if "dies_after" in behaviour:
                    time.sleep(behaviour["dies_after"])
                    sys.exit("ncclSystemError: no way to the head")
                end_with(met)
            time.sleep(0.05)
    from tests.fake_sglang import start

    door = socket.create_server((host, int(port)), reuse_port=False)
    for _ in range(parts - 1):
        threading.Thread(target=end_with, args=(door.accept()[0],), daemon=True).start()
    start()


if __name__ == "__main__":
    main()
