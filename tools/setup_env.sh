#!/usr/bin/env bash
# Makes .venv and installs this checkout with its test extra; does nothing if that is already done.
#
#   bash tools/setup_env.sh            set up if needed
#   bash tools/setup_env.sh --check    exit code 0 if set up, 1 if not
#   bash tools/setup_env.sh --sglang   makes .venv-sglang, the environment of rollout servers, instead
#
# pip's own settings (index, proxy, cache, constraints) are honoured. ETR_TORCH_SPEC replaces the torch requirement, for
# example ETR_TORCH_SPEC='torch==2.11.*'. The log is .venv/setup.log. The exit code is 2 when the set-up fails.
# .venv may be a link, for example to a faster disk, but not to the environment of another checkout.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
stamp=$venv/.etr_setup_stamp
log=$venv/setup.log
default_torch='torch==2.13.*'

fail() {
    echo "error: $*" >&2
    exit 2
}

# First line of the stamp: what the installation depends on. The checkout's path is part of it because the package is
# installed in place: a copied tree would still import the original.
fingerprint() {
    "$venv/bin/python" - "$root" <<'PYTHON'
import hashlib, pathlib, platform, sys
root = sys.argv[1]
project = pathlib.Path(root, "pyproject.toml").read_bytes()
print(hashlib.sha256(project).hexdigest(), platform.python_version(), root)
PYTHON
}

# Without ETR_TORCH_SPEC the second line is not compared, so that a torch chosen earlier stays until another is chosen.
is_set_up() {
    [ -x "$venv/bin/python" ] && [ -f "$stamp" ] || return 1
    [ "$(sed -n 1p "$stamp")" = "$(fingerprint)" ] || return 1
    [ -z "${ETR_TORCH_SPEC:-}" ] || [ "$(sed -n 2p "$stamp")" = "$ETR_TORCH_SPEC" ]
}

# An environment has one checkout installed in place: an installation through a link would take it from the other one.
refuse_anothers() {
    local owner
    [ -L "$venv" ] && [ -f "$stamp" ] || return 0
    owner=$(sed -n 1p "$stamp" | cut -d ' ' -f 3-)
    [ "$owner" -ef "$root" ] || [ ! -d "$owner" ] ||
        fail "$venv is a link to $(realpath "$venv"), the environment of $owner; remove the link to set up an environment here"
}

find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.13 python3.14 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

install() {
    local python=$1 torch=$2
    # A .venv that works is kept: packages added by hand (wandb, matplotlib) survive a change of pyproject.toml.
    if ! "$venv/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        "$python" -m venv "$venv"
    fi
    # Taken before the installation, as pyproject.toml may change meanwhile.
    { fingerprint; echo "$torch"; } >"$stamp.new"
    # Install torch first and alone, so that the rest is resolved against this build.
    "$venv/bin/python" -m pip install "$torch"
    "$venv/bin/python" -m pip install -e "${root}[test]"
}

if [ "${1:-}" = --check ]; then
    is_set_up
    exit
fi
if [ "${1:-}" = --sglang ]; then
    exec bash "$root/tools/setup_sglang.sh"
fi
[ $# -eq 0 ] || fail "unknown option $1; known are --check and --sglang"
is_set_up && exit 0

python=$(find_python) || fail "no Python >= 3.11 is on the PATH; install one (python3.11 or newer) and start again"
command -v flock >/dev/null || fail "the command flock is missing; install util-linux"
why=$({ mkdir -p "$(realpath -m "$venv")" && touch "$venv/.setup_lock"; } 2>&1) ||
    fail "$venv cannot be made or written (${why##*: }); remove it, or use a checkout of your own"
exec 9>>"$venv/.setup_lock"
# Of two jobs started at once, the second waits here, and then finds the work done.
if ! flock -n 9; then
    echo "waiting for another set-up of .venv (log: $log)" >&2
    flock 9
fi
is_set_up && exit 0
refuse_anothers

torch=${ETR_TORCH_SPEC:-$default_torch}
echo "setting up .venv with $python (a few minutes; log: $log)" >&2
rm -f "$stamp"
# In a process of its own, because `set -e` has no effect in a function called from `if`.
export -f install fingerprint
export venv root stamp
if ! bash -euo pipefail -c 'install "$@"' install "$python" "$torch" >"$log" 2>&1 9>&-; then
    tail -n 20 "$log" >&2
    fail "the set-up failed; the whole log is $log. Fix the cause and start the same command again"
fi
mv "$stamp.new" "$stamp"
echo "set-up done" >&2
