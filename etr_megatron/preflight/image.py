"""`python -m etr_megatron.preflight.image`: check a container at startup: versions to stderr, exit code 2 if jobs would fail.

ETR_PLATFORM=cpu allows the GPU image to run without a GPU.
"""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from etr_megatron.errors import UserError
from etr_megatron.preflight.facts import PACKAGES, package_version
from etr_megatron.preflight.findings import SHM_BYTES, gib


def check(folder: Path, *, gpus: int, wants_gpu: bool) -> list[str]:
    """Warnings. folder: where the job will write. gpus: GPUs that the container sees. wants_gpu: whether the image is for GPUs.

    Raises UserError for problems that would fail every job.
    """
    if wants_gpu and not gpus:
        raise UserError(
            "this image is for GPUs, but the container sees none; start it with --gpus all, or with ETR_PLATFORM=cpu"
        )
    if not os.access(folder, os.W_OK):
        raise UserError(
            f"{folder} cannot be written by uid {os.getuid()}; mount a folder that this user can write there, or start with "
            "--user"
        )
    warnings = []
    shm = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    if gpus > 1 and shm < SHM_BYTES:
        warnings.append(f"/dev/shm has {gib(shm)}, too little for NCCL between GPUs; start with --ipc host or --shm-size 16g")
    return warnings


def main() -> int:
    """Print versions and check; returns the exit code."""
    import torch

    gpus = torch.cuda.device_count()
    print(
        "etr_megatron image:",
        ", ".join(f"{name} {package_version(name)}" for name in PACKAGES),
        f"({gpus} GPUs)",
        file=sys.stderr,
    )
    wants_gpu = find_spec("transformer_engine") is not None and os.environ.get("ETR_PLATFORM") != "cpu"
    try:
        for warning in check(Path.cwd(), gpus=gpus, wants_gpu=wants_gpu):
            print(f"warning: {warning}", file=sys.stderr)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
