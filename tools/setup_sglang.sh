#!/usr/bin/env bash
# Makes .venv-sglang with SGLang, apart from the trainer's environment; does nothing if that is already done.
#
#   bash tools/setup_env.sh --sglang
#
# With an NVIDIA driver: the published package with its CUDA kernels. Without: the same SGLang on a CPU build of torch, with
# replacements for its CUDA kernels from tests/sglang_cpu; this is meant for tests and experiments.
# ETR_SGLANG_VERSION=0.5.23 selects another version of SGLang than the one the tests use.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv-sglang
log=$venv/setup.log
sglang="sglang==${ETR_SGLANG_VERSION:-0.5.21}"
router='sglang-router==0.3.2'
requirements=$root/tests/sglang_cpu/requirements.txt

kind=cpu
command -v nvidia-smi >/dev/null && kind=cuda
wanted="$sglang $router $kind $(sha256sum <"$requirements" | cut -d' ' -f1) $root"
[ -x "$venv/bin/python" ] && [ "$(cat "$venv/.etr_setup_stamp" 2>/dev/null)" = "$wanted" ] && exit 0

python=$(command -v python3.11 || command -v python3.12) || {
    echo "error: SGLang needs Python 3.11 or 3.12 on the PATH; install one and start again" >&2
    exit 2
}
command -v flock >/dev/null || { echo "error: the command flock is missing; install util-linux" >&2; exit 2; }
mkdir -p "$venv"
exec 9>>"$venv/.setup_lock"
if ! flock -n 9; then
    echo "waiting for another set-up of .venv-sglang (log: $log)" >&2
    flock 9
fi
[ "$(cat "$venv/.etr_setup_stamp" 2>/dev/null)" = "$wanted" ] && exit 0

install() {
    "$python" -m venv "$venv"
    if [ "$kind" = cuda ]; then
        "$venv/bin/python" -m pip install "$sglang" "$router"
        return
    fi
    "$venv/bin/python" -m pip install 'torch==2.13.*'
    # --no-deps, because the dependencies are CUDA kernels. triton and torchvision are imported, never run.
    "$venv/bin/python" -m pip install --no-deps "$sglang" "$router" 'torchvision==0.28.*' 'triton==3.7.*'
    "$venv/bin/python" -m pip install -r "$requirements"
}

echo "setting up .venv-sglang ($kind) with $python (a few minutes; log: $log)" >&2
rm -f "$venv/.etr_setup_stamp"
export -f install
export python venv sglang router requirements kind
if ! bash -euo pipefail -c install >"$log" 2>&1 9>&-; then
    tail -n 20 "$log" >&2
    echo "error: the set-up failed; the whole log is $log. Fix the cause and start the same command again" >&2
    exit 2
fi
echo "$wanted" >"$venv/.etr_setup_stamp"
echo "set-up done" >&2
