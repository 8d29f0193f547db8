"""A real Slurm cluster on two hosts of one machine (`tests/test_two_hosts.py`): a controller, and a node daemon on each."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from tests.runs import REPO, wait_for
from tests.test_two_hosts import ADDRESSES, Hosts

NODES = ("node7", "node8")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "nsenter", "unshare", "setpriv")

# A requeued job may start when its credential has expired, which takes two minutes by default.
CONFIG = """
ClusterName=etr
SlurmctldHost=head({head})
AuthInfo=socket={folder}/munge,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
GresTypes=gpu
KillWait=120
MessageTimeout=60
SlurmdTimeout=0
MpiDefault=none
NodeName={nodes[0]} NodeAddr={addresses[0]} CPUs=1 Gres=gpu:8
NodeName={nodes[1]} NodeAddr={addresses[1]} CPUs=1 Gres=gpu:8
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 MaxTime=INFINITE GraceTime=120
PartitionName=high Nodes=ALL PriorityTier=10 MaxTime=INFINITE PreemptMode=OFF
"""


def missing() -> str:
    """Why no cluster can run here, or an empty string."""
    absent = [name for name in PROGRAMS if not shutil.which(name)]
    if absent:
        return f"no {', '.join(absent)} (Debian: slurm-wlm, munge)"
    return "Slurm's daemons run as root" if os.geteuid() != 0 else ""


class SlurmCluster:
    """Two nodes, each with one core and eight GPUs that are plain files. Jobs of the partition `high` preempt others."""

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts
        self.folder = Path(tempfile.mkdtemp(prefix="slurm"))  # short, as it holds sockets
        self._daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        folder = self.folder
        (folder / "state").mkdir()
        (folder / "key").write_bytes(os.urandom(1024))
        (folder / "key").chmod(0o600)
        names = "".join(f"{address} {name}\n" for address, name in zip(ADDRESSES, NODES, strict=True))
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}{ADDRESSES[0]} head\n")
        (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, head=ADDRESSES[0], nodes=NODES, addresses=ADDRESSES))
        for gpu in range(8):
            (folder / f"gpu{gpu}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
        munge = [f"--{what}={folder / name}" for what, name in {"key-file": "key", "socket": "munge"}.items()]
        munge += [f"--{what}={folder / f'munge.{what}'}" for what in ("pid-file", "log-file", "seed-file")]
        self._start(0, "head", "munged", "--foreground", "--force", *munge)
        wait_for((folder / "munge").exists, deadline_s=120)
        self._start(0, "head", "slurmctld", "-D")
        for host, name in enumerate(NODES):
            (folder / name).mkdir()
            self._start(host, name, "slurmd", "-D")
        wait_for(lambda: self.run("sinfo", "--noheader", "--format=%T %D").split() == ["idle", "2"], deadline_s=300)

    def _start(self, host: int, name: str, *command: str) -> None:
        """Start a daemon on a host, with this name and the other hosts' addresses."""
        network = f"/run/netns/{self._hosts.names[host]}"
        setup = f"mount --bind {self.folder}/hosts /etc/hosts; hostname {name}; exec nsenter --net={network}"
        with open(self.folder / f"{command[0]}.{name}.out", "w") as output:
            daemon = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", "--uts", "--mount", "sh", "-c", f'{setup} "$@"', "sh", *command],
                env=self._environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._daemons.append(daemon)

    def _environment(self, **more: str) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path, "OMP_NUM_THREADS": "1", **more}

    def run(self, *command: str, **environment: str) -> str:
        """Output of a Slurm command on the first host; empty if it fails."""
        inside = ["nsenter", f"--net=/run/netns/{self._hosts.names[0]}", *command]
        done = subprocess.run(
            inside, cwd=REPO, env=self._environment(**environment), capture_output=True, text=True, timeout=300
        )
        return done.stdout if done.returncode == 0 else ""

    def submit(self, *words: str, **environment: str) -> str:
        """Submit a job and return its number; its output goes to `output(job)`."""
        return self.run("sbatch", "--parsable", f"--output={self.folder}/job-%j", "--nodes=2", *words, **environment).strip()

    def output(self, job: str) -> str:
        path = self.folder / f"job-{job}"
        return path.read_text() if path.exists() else ""

    def show(self, job: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", job)))

    def said(self) -> str:
        """The end of every daemon's log."""
        return " | ".join(f"{path.name}: {path.read_text()[-200:].strip()}" for path in self.folder.glob("*.out"))

    def stop(self) -> None:
        with suppress(subprocess.TimeoutExpired):
            self.run("scancel", "--user=root", "--signal=KILL", "--full")
        for daemon in reversed(self._daemons):
            os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait()
        for name in self._hosts.names:  # steps run in their own sessions
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)
