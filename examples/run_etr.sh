#!/usr/bin/env bash
# Starts a training job. This file is valid bash AND valid Python, so both of these work:
#
#   bash examples/run_etr.sh [--nproc N] [--rollout-only | --dry-run] [CONFIG] [key=value ...]
#   torchrun [--nnodes ... --nproc-per-node N] examples/run_etr.sh [--rollout-only] [CONFIG] [key=value ...]
#
# The first sets up .venv, checks the input and starts torchrun. --help explains the arguments.
#
# torchrun runs its argument as Python. To Python, the bash part below is a string: the module's docstring. To bash, the
# string's opening quotes are the no-op command `:`, and the Python part is a here-document that nothing reads.
# Without CONFIG, a machine without a GPU runs configs/cpu_tiny.yaml; with a GPU, the job stops and lists the shipped configs.
""":"
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/tools/setup_env.sh"
exec "$root/.venv/bin/python" -m etr_megatron.launch "$@"
: <<'# end of the Python part'
":"""

import importlib.util
import sys
from pathlib import Path

# Not only under __main__: children that graders and data workers spawn import this file again, under another name.
if importlib.util.find_spec("etr_megatron") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from etr_megatron.status import run_and_exit
    from etr_megatron.train import main

    run_and_exit(main)
# end of the Python part
