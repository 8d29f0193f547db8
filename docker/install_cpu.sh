#!/usr/bin/env bash
# The installation step of docker/Dockerfile.cpu: install_cpu.sh FOLDER [TORCH_INDEX_URL]
set -euo pipefail

folder=$1
index=${2:-}
python -m pip install ${index:+--index-url "$index"} 'torch==2.13.*'
python -m pip install --editable "$folder"
