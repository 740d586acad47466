"""What SLURM says of a task, in the words of torch's launchers; the environments are those of a real step.

And what a rank says if the port that its launcher chose is another's.
"""

from __future__ import annotations

import socket

import pytest

from ted_ds.errors import RankLost
from ted_ds.job.slurm import slurm_environment
from ted_ds.job.world import init_world

TASK = {
    "SLURM_JOB_ID": "12005",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "gpu[003-005,12]",
}
RANK = {
    "RANK": "5",
    "WORLD_SIZE": "7",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "LOCAL_SIZE": "2",
    "MASTER_ADDR": "gpu003",
    "MASTER_PORT": "20005",
}
BATCH_SCRIPT = {"SLURM_JOB_ID": "12005", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "7"}
ONE_TASK = TASK | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "1"}
ONE_TASK |= {"SLURM_STEP_TASKS_PER_NODE": "1"}


def test_a_task_is_a_rank() -> None:
    assert slurm_environment(TASK) == RANK
    last = TASK | {"SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "3"}
    assert slurm_environment(last) == RANK | {
        "RANK": "6",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "LOCAL_SIZE": "1",
    }


@pytest.mark.parametrize(("gpus", "local_rank"), [("3", "0"), ("0,1", "1"), ("", "1")])
def test_a_task_that_sees_one_gpu_takes_it(gpus: str, local_rank: str) -> None:
    assert slurm_environment(TASK | {"CUDA_VISIBLE_DEVICES": gpus})["LOCAL_RANK"] == local_rank


def test_what_is_set_wins() -> None:
    given = {"RANK": "0", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert slurm_environment(TASK | given) == {k: v for k, v in RANK.items() if k not in given}


def test_nothing_is_said_where_a_task_is_no_rank() -> None:
    assert slurm_environment({"HOME": "/root"}) == {}
    assert slurm_environment(BATCH_SCRIPT) == {}
    assert slurm_environment(TASK | {"RANK": "3", "WORLD_SIZE": "8"}) == {}  # torchrun or deepspeed, one a node
    assert slurm_environment(ONE_TASK) == {}
    alone = slurm_environment(ONE_TASK | {"RANK": "0"})
    assert (alone["WORLD_SIZE"], alone["LOCAL_WORLD_SIZE"], alone["LOCAL_RANK"]) == ("1", "1", "0")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("x1,gpu[1-2]", "x1"),
        ("gpu[003-010,12],x1", "gpu003"),
        ("gpu-a100-[09-11],b", "gpu-a100-09"),
        ("rack[1-2]n[3-4]", "rack1n3"),
    ],
)
def test_the_first_host(nodes: str, first: str) -> None:
    """As `scontrol show hostnames NODES` says."""
    assert slurm_environment(TASK | {"SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == first


def test_a_port_in_use_is_named_with_the_way_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = str(other.getsockname()[1])
        place = RANK | {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in place.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RankLost, match=f"^the port of 127.0.0.1:{port} is in use, .*--master_port N"):
            init_world()
