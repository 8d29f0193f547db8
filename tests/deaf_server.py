"""A server that starts for ever: `python -m tests.deaf_server ...`."""

import time

print("up", flush=True)
time.sleep(600)
