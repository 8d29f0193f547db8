#!/usr/bin/env bash
# The installation steps of docker/Dockerfile; each builds against the torch of the image:
#
#   install_gpu.sh transformer-engine VERSION JOBS
#   install_gpu.sh apex COMMIT ARCHITECTURES JOBS     fused Adam without Transformer Engine; PyPI's apex is another package
#   install_gpu.sh product FOLDER [WORKSPACE]         this project, editable
set -euo pipefail

versions() {
    python3 -c 'from importlib.metadata import version; print(*(f"{name}=={version(name)}" for name in ("torch", "sglang")), sep="\n")'
}

build_tools() { # with --no-build-isolation, the builds import these from the environment
    python3 -m pip install --constraint "$constraints" ninja packaging pybind11 setuptools wheel
}

constraints=$(mktemp)
versions >"$constraints"
step=$1
shift
case $step in
    transformer-engine)
        build_tools
        # Without NVTE_PYTORCH_FORCE_BUILD, its set-up downloads a wheel from GitHub if one has the name that it guesses.
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
        # In the image, rollout servers run in the same environment, but configs expect them in .venv-sglang. A script, not a
        # link: a link to a virtual environment's Python leads on to the Python that the environment was made from.
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
