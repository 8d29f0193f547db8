#!/usr/bin/env bash
# The steps of docker/Dockerfile, each against the torch that is there:
#
#   install_gpu.sh transformer-engine VERSION JOBS
#   install_gpu.sh apex COMMIT ARCHITECTURES JOBS     fused Adam and the fused weight gradient; the package of that name on PyPI is another
#   install_gpu.sh product FOLDER [WORKSPACE]         this project, in place
set -euo pipefail

versions() {
    python3 -c 'from importlib.metadata import version; print(*(f"{name}=={version(name)}" for name in ("torch", "sglang")), sep="\n")'
}

build_tools() { # what the builds import, which --no-build-isolation takes from here
    python3 -m pip install --constraint "$constraints" ninja packaging pybind11 setuptools wheel
}

constraints=$(mktemp)
versions >"$constraints"
step=$1
shift
case $step in
    transformer-engine)
        build_tools
        # Without the last word its set-up takes a wheel from GitHub where it finds one by a name that it guesses.
        MAX_JOBS=$2 NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE \
            python3 -m pip install --no-build-isolation --constraint "$constraints" "transformer-engine[pytorch]==$1"
        ;;
    apex)
        build_tools
        TORCH_CUDA_ARCH_LIST=$2 MAX_JOBS=$3 python3 -m pip install --no-build-isolation --constraint "$constraints" \
            --config-settings "--build-option=--cpp_ext --cuda_ext" "git+https://github.com/NVIDIA/apex.git@$1"
        ;;
    product)
        python3 -m pip install --constraint "$constraints" --editable "$1[router]"
        # Rollout servers run in the same environment here; configs look for it where a checkout has one of its own. Not a link:
        # to the Python of a virtual environment it would be one to the Python that this was made from.
        servers=${2:-/workspace}/.venv-sglang/bin
        install --directory "$servers"
        printf '#!/bin/sh\nexec "%s" "$@"\n' "$(command -v python3)" >"$servers/python"
        chmod 755 "$servers/python"
        "$servers/python" -c 'from importlib.metadata import version; version("sglang"), version("etr_megatron")'
        ;;
    *)
        echo "error: unknown step $step" >&2
        exit 2
        ;;
esac
versions | diff "$constraints" - || {
    echo "error: the step $step changed torch or sglang; their kernels are built for each other" >&2
    exit 2
}
rm "$constraints"
