#!/usr/bin/env bash
# Sets up .venv if needed, then lints, checks the types and runs the tests.
#
#   bash tools/run_tests.sh [--fast] [pytest arguments]     --fast leaves out the tests marked slow
#
# Two files of tests at a time, as most tests wait for processes half of their time; three take longer on two cores. `-n 0` runs
# all in one process.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/tools/setup_env.sh"
cd "$root"
selection=()
if [ "${1:-}" = --fast ]; then
    selection=(-m "not slow")
    shift
else
    # Tests with a real SGLang server are among the slow ones; without its environment they are skipped, and pytest says so.
    bash "$root/tools/setup_env.sh" --sglang || echo "warning: .venv-sglang could not be made; its tests are skipped" >&2
fi
# Tests start several processes each; more threads than cores would only slow them down.
export OMP_NUM_THREADS=1
# And each of them would compile what it imports, where byte code is not written.
unset PYTHONDONTWRITEBYTECODE
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# What a file's tests share, such as a server, is made once: a file stays in one process.
exec .venv/bin/python -m pytest -n 2 --dist loadfile "${selection[@]}" "$@"
