#!/usr/bin/env bash
# Sets up .venv if needed, then lints, checks the types and runs the tests.
#
#   bash tools/run_tests.sh [--fast] [pytest arguments]     --fast leaves out the tests marked slow
#
# Runs two test files at a time, since most tests spend half their time waiting for processes; with three, two cores take longer.
# `-n 0` runs all in one process.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/tools/setup_env.sh"
cd "$root"
selection=()
if [ "${1:-}" = --fast ]; then
    selection=(-m "not slow")
    shift
else
    # Slow tests include those with a real SGLang server; without its environment they are skipped, and pytest says so.
    bash "$root/tools/setup_env.sh" --sglang || echo "warning: .venv-sglang could not be made; its tests are skipped" >&2
fi
# Tests start several processes each; more threads than cores would only slow them down.
export OMP_NUM_THREADS=1
# Without byte code on disk, each of these processes would compile everything that it imports.
unset PYTHONDONTWRITEBYTECODE
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# Tests of a file share fixtures such as a server, so a file stays in one process.
exec .venv/bin/python -m pytest -n 2 --dist loadfile "${selection[@]}" "$@"
