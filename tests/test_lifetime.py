"""Children end with their parent, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from etr_megatron.platform.lifetime import kill_trees, popen_from_lasting_thread
from tests.runs import gone, wait_for

pytestmark = pytest.mark.usefixtures("deadline")

LIFETIME = Path(__file__).parents[1] / "etr_megatron" / "platform" / "lifetime.py"
LOAD = f"""
import importlib.util, os, subprocess, sys, threading, time
spec = importlib.util.spec_from_file_location("lifetime", {str(LIFETIME)!r})
lifetime = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lifetime)
"""
# Starts a child, prints its pid once the child is ready, then sleeps until it is killed.
PARENT = """
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("system", ["linux", "darwin"])  # by the kernel, and by the watchdog thread
def test_child_ends_when_its_parent_is_killed(system):
    if system == "linux" and sys.platform != "linux":
        pytest.skip("PR_SET_PDEATHSIG is Linux only")
    child = f'{LOAD}\nsys.platform = "{system}"\nlifetime.die_with_parent()\nprint("up", flush=True)\ntime.sleep(600)\n'
    parent = subprocess.Popen([sys.executable, "-c", LOAD + PARENT, child], stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.2)
        assert not gone(pid)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    wait_for(lambda: gone(pid))


def test_child_ends_at_once_when_its_parent_is_gone_already():
    code = LOAD + "lifetime.die_with_parent(parent_pid=int(sys.argv[1]))\nprint('still here')"
    former = subprocess.Popen([sys.executable, "-c", ""])
    former.wait()
    result = subprocess.run([sys.executable, "-c", code, str(former.pid)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (-9, "")


def test_child_of_a_living_parent_lives():
    code = LOAD + "lifetime.die_with_parent(parent_pid=os.getppid())\nprint('still here')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "still here\n")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal follows the thread only on Linux")
def test_child_started_through_the_lasting_thread_outlives_the_thread_that_asked():
    code = LOAD + "lifetime.die_with_parent()\nprint('up', flush=True)\nsys.stdin.read()"
    children: list[subprocess.Popen[bytes]] = []

    def start(popen) -> None:
        child = popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        child.stdout.readline()
        children.append(child)

    for popen in (popen_from_lasting_thread, subprocess.Popen):
        thread = threading.Thread(target=start, args=(popen,))
        thread.start()
        thread.join()
    lasting, plain = children
    try:
        assert plain.wait(120) == -9  # the lasting thread prevents this
        assert lasting.poll() is None
    finally:
        for child in children:
            child.kill()
            child.communicate()


def test_a_forked_process_starts_its_children_by_a_thread_of_its_own():
    assert popen_from_lasting_thread(["true"]).wait() == 0
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(300)  # ends it if it waits for its parent's thread
        try:
            os._exit(popen_from_lasting_thread(["true"]).wait())
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_what_popen_raises_reaches_the_caller():
    with pytest.raises(FileNotFoundError):
        popen_from_lasting_thread(["/no/such/program"])


@pytest.mark.skipif(sys.platform != "linux", reason="descendants are found in Linux's /proc")
def test_a_killed_tree_is_gone_to_its_leaves_and_others_live_on():
    code = "import subprocess; subprocess.run(['sh', '-c', 'sleep 600 & echo $$ $!; wait'])"
    trees = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    try:
        below = [[int(pid) for pid in tree.stdout.readline().split()] for tree in trees]
        kill_trees(tree.pid for tree in trees[:2])
        assert [tree.wait() for tree in trees[:2]] == [-9, -9]
        wait_for(lambda: all(map(gone, below[0] + below[1])))
        assert trees[2].poll() is None and not any(map(gone, below[2]))
    finally:
        kill_trees(tree.pid for tree in trees if tree.poll() is None)
        for tree in trees:
            tree.wait()
            tree.stdout.close()
    wait_for(lambda: all(map(gone, below[2])))
