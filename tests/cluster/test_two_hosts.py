"""Two hosts: network namespaces joined by one link, a rank in each, started by hand as on machines without ssh."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests.faults.ranks import recorded, run
from tests.project import make_project, write_recipe

ROOT = Path(__file__).resolve().parents[2]
DEEPSPEED = Path(sys.executable).parent / "deepspeed"
ADDRESSES = ("10.213.7.1", "10.213.7.2")
PORT = 29555  # nothing else listens in a fresh namespace
STEPS = 40
RANK_LOST = 76
TIMEOUT_S = 12
LEAVING_S = 10
"""Two launchers notice within a second that their rank has ended; the rest is two cores that others use too."""


def ip(*words: object) -> None:
    subprocess.run(["ip", *(str(word) for word in words)], check=True, capture_output=True, text=True)


class Hosts:
    """The namespaces' names, and the first one's end of the link."""

    def __init__(self) -> None:
        self.names = tuple(f"ted{os.getpid()}-{side}" for side in "ab")
        self.ends = tuple(f"ted{os.getpid()}{side}" for side in "ab")  # an interface's name has at most 15 bytes

    def join(self) -> None:
        ip(
            "link",
            "add",
            self.ends[0],
            "netns",
            self.names[0],
            "type",
            "veth",
            "peer",
            self.ends[1],
            "netns",
            self.names[1],
        )
        for name, end, address in zip(self.names, self.ends, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/30", "dev", end)
            ip("-n", name, "link", "set", "lo", "up")
        self.link("up")

    def link(self, state: str) -> None:
        """Plugs the cable in (up) or pulls it (down): a link that is down at one end carries nothing."""
        for name, end in zip(self.names, self.ends, strict=True):
            ip("-n", name, "link", "set", end, state)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip: apt-get install iproute2")
    found = Hosts()
    with ExitStack() as stack:
        for name in found.names:
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"needs root and network namespaces: {error.stderr.strip()}")
            stack.callback(ip, "netns", "del", name)  # the link goes with them
        found.join()
        yield found


class Job:
    """One launcher a host."""

    def __init__(self, hosts: Hosts, folder: Path, *arguments: object) -> None:
        hostfile = folder / "hostfile"
        hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
        launch = [DEEPSPEED, "--hostfile", hostfile, "--no_ssh", "--master_addr", ADDRESSES[0], "--master_port", PORT]
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        self._logs = [folder / f"{name}.log" for name in hosts.names]
        self._processes = []
        for rank, (name, end) in enumerate(zip(hosts.names, hosts.ends, strict=True)):
            words = ["ip", "netns", "exec", name, *launch, "--node_rank", rank, "launchers/pretrain.sh", *arguments]
            variables = environment | {"GLOO_SOCKET_IFNAME": end, "OMP_NUM_THREADS": "1"}
            with self._logs[rank].open("w") as log:
                process = psutil.Popen([str(w) for w in words], cwd=ROOT, env=variables, stdout=log, stderr=log)
            self._processes.append(process)

    def ended(self, within_s: float) -> list[int | None]:
        """The exit codes, by host; None where one goes on for longer, which is killed with its rank."""
        psutil.wait_procs(self._processes, within_s)
        codes = [process.poll() for process in self._processes]
        late = [p for process in self._processes if process.poll() is None for p in [process, *process.children(True)]]
        for process in late:
            process.kill()
        psutil.wait_procs(late, 10)
        return codes

    def said(self) -> list[str]:
        """What was said, by host."""
        return [log.read_text() for log in self._logs]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path)


def wait_for(happened: Callable[[], bool], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_cut_link_ends_both_sides_and_the_run_goes_on_over_the_mended_one(hosts: Hosts, project: Path) -> None:
    changes = {"train__steps": STEPS, "train__timeout_minutes": TIMEOUT_S / 60}
    run(2, write_recipe(project, "undisturbed", **changes), logs=project / "logs")

    recipe, metrics = write_recipe(project, "cut", **changes), project / "cut/metrics.jsonl"
    job = Job(hosts, project, "--config", recipe)
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > STEPS // 4, within_s=120)
    hosts.link("down")
    codes, said = job.ended(within_s=TIMEOUT_S + LEAVING_S), job.said()
    assert codes == [RANK_LOST, RANK_LOST], said
    assert "ted_ds: rank 0: rank 1" in said[0] and "goes on from the last checkpoint" in said[0]
    assert f"ted_ds: rank 1: rank 0's store at {ADDRESSES[0]}:{PORT} does not answer" in said[1]
    assert "Traceback" not in said[0] + said[1]
    assert not (project / "cut/summary.json").exists()

    hosts.link("up")
    job = Job(hosts, project, "--config", recipe)
    assert job.ended(within_s=120) == [0, 0], job.said()
    assert recorded(project / "cut") == recorded(project / "undisturbed")
