"""The checkpoint writer on a disk that fills up at every possible point of a file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]

SAVE_ON_A_FULL_DISK = """
import os, pickle, sys
from pathlib import Path
import torch
import etr_megatron.policy  # its import makes megatron.core importable without a GPU
import torch.distributed.checkpoint as dcp
from etr_megatron.checkpoint.saving import _Writer, is_disk_full

disk, attempts = Path(sys.argv[1]), 0
state = {f"tensor {n}": torch.randn(31 * n + 7) for n in range(40)}
for left in range(0, 16):
    for odd in (0, 598, 1700):
        free = os.statvfs(disk).f_bavail * 4096
        (disk / "other").write_bytes(bytes(free - left * 4096))
        try:
            dcp.save(state, storage_writer=_Writer(disk / f"saved{odd}", thread_count=1), no_dist=True)
        except BaseException as error:
            sent = pickle.loads(pickle.dumps(error))  # as torch gathers it from the ranks: contexts are lost
            assert is_disk_full(sent), (left, odd, error)
            attempts += 1
        for file in [disk / "other", *disk.glob("saved*/*")]:
            file.unlink(missing_ok=True)
        state["odd"] = torch.zeros(odd + left, dtype=torch.uint8)
print(attempts, "failed saves")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="makes a small disk in a mount namespace of its own")
def test_a_disk_that_fills_up_anywhere_in_a_file_is_recognised_as_full(tmp_path):
    mount = f'mount -t tmpfs -o size=256k tmpfs "{tmp_path}"; exec "$@"'
    found = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", mount, "bash"]
        + [sys.executable, "-W", "ignore", "-c", SAVE_ON_A_FULL_DISK, str(tmp_path)],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    assert int(found.stdout.split()[0]) > 30, found.stdout
