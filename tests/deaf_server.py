"""A server that never finishes starting: `python -m tests.deaf_server ...`."""

import time

print("up", flush=True)
time.sleep(600)
