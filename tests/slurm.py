"""A SLURM of two nodes on this machine, in a folder and on ports of its own; needs root, slurm-wlm and munge."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

PROGRAMS = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "munged": "munge"}
NODES = ("n1", "n2")
"""Names that resolve nowhere: the ranks of a job meet at the loopback address, by MASTER_ADDR."""

CONFIGURATION = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
JobRequeue=1
SchedulerParameters=sched_interval=1,bf_interval=1
NodeName=n[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{slurmd_ports}] CPUs=4 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """What keeps this machine from running the cluster, for a skipped test; None where it can."""
    missing = sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})
    if missing:
        return f"needs a SLURM: apt-get install {' '.join(missing)}"
    return None if os.geteuid() == 0 else "needs root: slurmd starts the tasks of others"


class Slurm:
    """The commands of a running cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.configuration = folder / "slurm.conf"

    def call(self, *command: object, code: int | None = 0, cwd: Path | None = None, **variables: str) -> str:
        """What a command of SLURM's prints, with `variables` in its environment (and so in a job's)."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        environment |= {"SLURM_CONF": str(self.configuration), **variables}
        words = [str(word) for word in command]
        done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)
        assert code in (None, done.returncode), done.stdout + done.stderr
        return done.stdout.strip()

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job` of a job that is no array."""
        return self._fields(job, name)[0]

    def states(self, job: str) -> list[str]:
        """Of the job, or of each index of an array."""
        return self._fields(job, "JobState")

    def over(self, job: str) -> bool:
        """Whether nothing of the job is waiting or running."""
        return not {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"} & set(self.states(job))

    def _fields(self, job: str, name: str) -> list[str]:
        return re.findall(rf"\b{name}=(\S+)", self.call("scontrol", "show", "job", job))


@contextmanager
def running_slurm(folder: Path) -> Iterator[Slurm]:
    """The cluster, idle; afterwards none of its processes is left."""
    folder.chmod(0o755)  # munged refuses a socket in a folder that others cannot enter
    ports = _free_ports(3)
    text = CONFIGURATION.format(folder=folder, ctld_port=ports[0], slurmd_ports=f"{ports[1]},{ports[2]}")
    slurm = Slurm(folder)
    slurm.configuration.write_text(text)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    for name in ("state", *(f"spool.{node}" for node in NODES)):
        (folder / name).mkdir()
    with ExitStack() as stack:
        stack.callback(_end_leftovers, str(slurm.configuration))
        files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        options = [f"--{name}={folder / file}" for name, file in files.items()]
        options.append(f"--log-file={folder}/munged.log")
        stack.enter_context(_daemon(slurm, "munged", *options, "--force", "--foreground"))
        stack.enter_context(_daemon(slurm, "slurmctld", "-D"))
        for node in NODES:
            stack.enter_context(_daemon(slurm, "slurmd", "-D", "-N", node))
        _wait_until_idle(slurm)
        stack.callback(slurm.call, "scancel", "--signal=KILL", "--full", "--user=root", code=None)
        yield slurm


@contextmanager
def _daemon(slurm: Slurm, *command: str) -> Iterator[None]:
    environment = os.environ | {"SLURM_CONF": str(slurm.configuration)}
    with (slurm.folder / f"{command[0]}.{command[-1]}.out").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_idle(slurm: Slurm) -> None:
    for _ in range(100):
        if slurm.call("sinfo", "-h", "-o", "%T %D", code=None) == f"idle {len(NODES)}":
            return
        time.sleep(0.2)
    logs = "\n".join(path.read_text()[-2000:] for path in slurm.folder.glob("*.log"))
    raise AssertionError(f"SLURM did not come up:\n{logs}")


def _end_leftovers(configuration: str) -> None:
    """Ends what the jobs left: all that has this cluster's configuration in its environment, and nothing else."""
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("SLURM_CONF") == configuration:
                process.kill()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
