#!/usr/bin/env bash
# Prints what the image contains, refuses an environment in which a job would fail later, then runs the command.
set -euo pipefail

python3 -m etr_megatron.preflight.image
exec "$@"
