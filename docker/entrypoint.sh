#!/usr/bin/env bash
# Says what is in the image, refuses an environment in which a job would fail later, then runs the command.
set -euo pipefail

python3 -m etr_megatron.preflight.image
exec "$@"
