"""`sglang_router.launch_router` for environments whose torchvision is not a CPU build: `python router.py ROUTER_ARGUMENTS...`

The package's own entry point imports all of sglang for a load balancer that is not used here; this one does not.
"""

from __future__ import annotations

import argparse

from sglang_router.router import Router
from sglang_router.router_args import RouterArgs

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    RouterArgs.add_cli_args(parser, use_router_prefix=False)
    Router.from_args(RouterArgs.from_cli_args(parser.parse_args(), use_router_prefix=False)).start()
