"""What `ted-ds doctor` says of machines that lack something, of ranks that differ, of recipes that do not fit."""

from __future__ import annotations

import gc
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.elastic.utils.distributed import get_free_port
from transformers import AutoModelForCausalLM

from ted_ds.config.schema import RunConfig
from ted_ds.doctor import machine, ranks
from ted_ds.doctor import recipe as fitting
from ted_ds.doctor.estimate import Estimate, Line, Machine, estimate
from ted_ds.doctor.finding import GIB, Finding
from ted_ds.doctor.machine import writable
from ted_ds.doctor.ranks import Facts
from ted_ds.doctor.shapes import NO_FILTERS, FilterShape, ModelShape, Shapes, model_shape, run_shapes, saved_bytes
from ted_ds.errors import ConfigError
from tests.project import make_project, recipe, write_recipe
from tests.tiny_models import tiny_config
from tests.workers import Workers

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def only(findings: list[Finding], check: str) -> Finding:
    """The one finding of a check that has a status."""
    (found,) = [finding for finding in findings if finding.check == check and finding.status]
    return found


# --- a machine -------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Packages as they are installed, by name; a test may change or remove some."""
    there = {"torch": "2.13.0+cpu", "deepspeed": "0.19.8", "transformers": "5.23.0", "ted_ds": "0.1.0", "pyyaml": "6"}
    asked = ["torch>=2.11", "deepspeed>=0.19.8", "transformers<6,>=5.0", "pyyaml", 'mypy; extra == "dev"']

    def version(name: str) -> str:
        if name not in there:
            raise metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda name: version(name) and asked)
    monkeypatch.setattr(metadata, "metadata", lambda name: version(name) and {"Requires-Python": ">=3.11"})
    return there


def test_versions_in_range(installed: dict[str, str]) -> None:
    assert [(f.status, f.check) for f in machine.versions()] == [
        ("ok", name) for name in ("python", "torch", "deepspeed", "transformers", "packages", "ted_ds")
    ]


def test_versions_out_of_range_or_missing(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    installed["transformers"] = "6.0.1"
    del installed["pyyaml"]
    monkeypatch.setattr("platform.python_version", lambda: "3.10.4")
    bad = {f.check: str(f) for f in machine.versions() if f.status == "FAIL"}
    assert bad.keys() == {"python", "transformers", "pyyaml"}
    assert "3.10.4 is not >=3.11: use such a Python" in bad["python"]
    assert 'is not <6,>=5.0: run `pip install "transformers<6,>=5.0"`' in bad["transformers"]
    assert 'is not installed: run `pip install "pyyaml"`' in bad["pyyaml"]


def test_a_package_that_is_not_installed(installed: dict[str, str]) -> None:
    del installed["ted_ds"]
    (found,) = machine.versions()
    assert found.status == "warn" and "pip install -e ." in found.advice


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """One idle H100, by what torch and NVML would say of it."""
    card = SimpleNamespace(name="NVIDIA H100", total_memory=80 * GIB, major=9, minor=0, used=0.5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(machine, "_driver", lambda: "570.1")
    monkeypatch.setattr(machine, "GpuCounters", lambda device: SimpleNamespace(sample=lambda: [card.used]))
    return card


def test_gpus(gpu: SimpleNamespace) -> None:
    (idle,) = machine.devices()
    assert str(idle).split(None, 2) == [
        "ok",
        "cuda:0",
        "NVIDIA H100, 80.0 GiB, compute capability 9.0, driver 570.1, CUDA 12.8, bfloat16",
    ]
    gpu.used = 41.0
    (busy,) = machine.devices()
    assert busy.status == "warn" and "41.0 GiB of it in use already: see with nvidia-smi" in str(busy)
    gpu.major = 7
    (old,) = machine.devices()
    assert old.status == "warn" and "student.dtype and teacher.dtype to float32" in old.advice


def test_a_driver_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.devices()[0].status == "ok"
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(machine, "_driver", lambda: "570.1")
    (found,) = machine.devices()
    assert found.status == "FAIL" and "CUDA_VISIBLE_DEVICES" in found.advice


def test_memory_is_what_the_control_groups_leave(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    job = tmp_path / "system.slice/job_7/step_0"
    job.mkdir(parents=True)
    (job / "memory.max").write_text("max\n")
    (job.parent / "memory.max").write_text(f"{8 * GIB}\n")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "_own_cgroup", lambda: "system.slice/job_7/step_0")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=32 * GIB, available=5 * GIB))
    assert machine.host_limit() == 8 * GIB and machine.host_memory().status == "ok"
    (job.parent / "memory.max").unlink()
    assert machine.host_limit() == 32 * GIB
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=32 * GIB, available=3 * GIB))
    assert machine.host_memory().status == "warn"


@pytest.mark.parametrize(("missing", "advice"), [("ninja", "pip install ninja"), ("c++", "install g++")])
def test_compiler(monkeypatch: pytest.MonkeyPatch, missing: str, advice: str) -> None:
    monkeypatch.setattr(machine, "get_cxx_compiler", lambda: "c++")
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None if name == missing else f"/usr/bin/{name}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = machine.compiler()
    assert found.status == "FAIL" and found.what.startswith(f"{missing} not found") and advice in found.advice
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine.compiler().status == "warn"


def test_shared_memory_and_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=64 << 20, free=64 << 20))
    small = machine.shared_memory()
    assert small.status == "warn" and "64.0 MiB" in small.what and "--shm-size" in small.advice
    monkeypatch.undo()
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path / "nowhere")
    assert machine.shared_memory().status == "warn"
    monkeypatch.setattr(resource, "getrlimit", lambda what: (256, 1024))
    assert str(machine.open_files()).endswith("1024 open files: have `ulimit -Hn` raised to 4096, for many ranks")
    monkeypatch.setattr(resource, "getrlimit", lambda what: (256, 4096))
    assert machine.open_files().status == "ok"


def test_a_folder_is_tried_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert writable("output_dir", tmp_path / "runs/new").status == "ok"
    monkeypatch.setattr(machine, "SLOW_PROBE_S", -1.0)
    assert writable("output_dir", tmp_path).status == "warn"

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    failed = writable("output_dir", tmp_path)
    assert failed.status == "FAIL" and failed.what == f"{tmp_path}: No space left on device"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    assert writable("output_dir", tmp_path / "file/run").status == "FAIL"


# --- ranks -----------------------------------------------------------------------------------------------------------


def facts(rank: int, host: str = "n1", **changed: Any) -> Facts:
    same = Facts(rank, host, "cuda:0", f"gpu-{rank}", 0, 0, frozenset(range(8)), 1, {"torch": "2.13"}, (), None)
    return replace(same, **changed)


def test_the_table_of_ranks() -> None:
    found = ranks.table([facts(0), facts(1, device="cuda:1"), facts(2, "n2")])
    assert (found.status, found.what) == ("ok", "3 on 2 nodes: n1 0=cuda:0 1=cuda:1; n2 2=cuda:0")
    assert ranks.table([facts(0), facts(1, gpu="gpu-0")]).status == "FAIL"
    assert ranks.table([facts(0, device="cpu", gpu=""), facts(1, device="cpu", gpu="")]).status == "ok"


def test_one_process_of_a_larger_job() -> None:
    (found,) = ranks.whole_job({"SLURM_NTASKS": "8"}, 1)
    assert found.status == "warn" and "8 tasks" in found.what and "srun" in found.advice
    assert ranks.whole_job({"SLURM_NTASKS": "8"}, 8) == ranks.whole_job({}, 1) == []


def test_cores_are_shared_by_the_ranks_of_a_node() -> None:
    pinned = [facts(0, cores=frozenset({0})), facts(1, cores=frozenset({1})), facts(2, "n2", cores=frozenset({0}))]
    crowded = ranks.cores(pinned)
    assert crowded.status == "warn" and "2 ranks on 2 cores" in crowded.what and "--cpus-per-task" in crowded.advice
    assert ranks.cores([facts(0), facts(1)]).status == "ok"
    on_cpus = [facts(rank, gpu="", threads=8) for rank in range(2)]
    assert "set OMP_NUM_THREADS to 4," in str(ranks.cores(on_cpus))
    assert ranks.cores([replace(fact, threads=4) for fact in on_cpus]).status == "ok"


def test_ranks_that_differ() -> None:
    other = facts(2, "n2", versions={"torch": "2.11"})
    assert ranks.same_versions([facts(0), facts(1)]).status == "ok"
    found = ranks.same_versions([facts(0), facts(1), other])
    assert found.status == "FAIL" and found.what == "rank 2 (n2) has torch 2.11, rank 0 2.13"
    probe = facts(0, probe=Path("/runs/probe"))
    assert ranks.same_folder(Path("/runs/a"), [probe, other], [True, True]).status == "ok"
    blind = ranks.same_folder(Path("/runs/a"), [probe, facts(1), other], [True, False, False])
    assert blind.status == "FAIL" and blind.what.startswith("ranks 1, 2 (n1, n2) does not see")
    assert ranks.same_folder(Path("/runs/a"), [facts(0), other], [False, False]).status == "FAIL"


def test_others_findings_are_shown_once_and_measurements_where_they_are_bad() -> None:
    card, free = Finding("ok", "cuda:0", "H100"), Finding("ok", "host memory", "7 GiB free")
    old, full = Finding("warn", "cuda:0", "V100", "x"), Finding("warn", "host memory", "0 GiB free", "x")
    own = facts(0, findings=(card, Finding("ok", "host memory", "9 GiB free")))
    other = facts(1, findings=(card, free))
    strange = [facts(n, "n2", findings=(old, full)) for n in (2, 3)]
    shown = ranks.differing([own, other, *strange])
    assert [f.what for f in shown] == ["ranks 2, 3 (n2): V100", "ranks 2, 3 (n2): 0 GiB free"]


# --- a recipe's memory -----------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """Blocks whose saved tensors can be told by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh()) for _ in range(3))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            states = block(states)
        return states.exp()


def test_what_autograd_keeps_is_counted_by_hand() -> None:
    toy = Toy()
    with saved_bytes(toy, toy.blocks) as saved:
        toy(torch.ones(5, 8))
    each = 5 * 8 * 4
    # a block's tanh keeps its output, which is the next block's input and is not counted twice; the first keeps its
    # own input too; exp keeps its output
    assert saved == {0: 2 * each, 1: each, 2: each, -1: each}


def test_a_shape_is_that_of_the_real_model() -> None:
    config = tiny_config("llama", blocks=3)
    shape = model_shape(config, "causal-lm", "float32", 12)
    model = AutoModelForCausalLM.from_config(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.largest == sum(p.numel() for p in model.model.layers[0].parameters())
    assert (shape.blocks, shape.width, shape.vocab) == (3, 16, 97)
    # of a block at least: inputs of two norms, q k v and attention's output, three projections' inputs and factors
    assert shape.saved_in_block > 12 * (6 * 16 + 3 * 48) * 4
    deeper = model_shape(tiny_config("llama", blocks=5), "causal-lm", "float32", 12)
    rotary = 2 * 12 * 8 * 4  # cosines and sines of all blocks, which the first is the first to keep
    assert deeper.saved - shape.saved == 2 * (shape.saved_in_block - rotary)
    half = model_shape(config, "causal-lm", "bfloat16", 12)
    assert shape.saved / 2 < half.saved < shape.saved  # norms work in float32


STUDENT = ModelShape(1000, 300, blocks=2, width=4, vocab=10, saved=700, saved_outside=100, saved_in_block=300)
TEACHER = ModelShape(8000, 900, blocks=4, width=8, vocab=10, saved=0, saved_outside=0, saved_in_block=500)
FILTERS = FilterShape(pairs=2, output_dim=8, student=40, teacher=72)
SHAPES = Shapes(STUDENT, TEACHER, FILTERS)


def on(ranks: int, device: torch.device = CPU, idle: float = 0.0) -> Machine:
    return Machine(ranks, device, 0.0, 0.0, idle)


def a_run(folder: Path, zero: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    """A recipe of 3 rows x 12 tokens in float32, whose DeepSpeed file has the section zero_optimization `zero`."""
    path = folder / "ds.json"
    path.write_text(f'{{"zero_optimization": {zero or {"stage": 0}}}}'.replace("'", '"'))
    values = recipe(folder, "run", **{"train__micro_batch_size": 3, "train__global_batch_size": 12, **changes})
    return RunConfig.model_validate({**values, "deepspeed": str(path)})


def sizes(run: RunConfig, world_size: int, device: torch.device = CPU) -> dict[str, float]:
    found = estimate(run, SHAPES, on(world_size, device))
    return {re.sub(r",? [0-9.]+ (M|rows|pairs).*", "", line.what): line.size for line in found.lines}


def test_an_estimate_by_hand(tmp_path: Path) -> None:
    # trained: 1000 + 2 * 40 = 1080; frozen: 8000 + 2 * 72 = 8144; 36 tokens a micro-batch
    replicated = a_run(tmp_path, teacher__sharding="replicated")
    found = estimate(replicated, SHAPES, on(2, idle=50.0))
    assert [(line.size, line.passing) for line in found.lines] == [
        (50, False),
        (4 * 1080, False),  # weights
        (8 * 1080, False),  # moments
        (4 * 1080, False),  # gradients
        (4 * 8144, False),  # teacher
        (3 * 700, False),  # activations
        (2 * 36 * 8 * 4, False),  # residuals
        (3 * (500 + 12 * (8 + 8) * 4), True),  # a teacher's block, its state and the filtered one
        (3 * 300, True),
        # two chunks of 18 tokens, both sides: 18 * 10 * 2; d_hidden 36 * 4; d_weight 10 * 4
        (4 * (360 + 144 + 40), True),
    ]
    assert found.total("device") == 50 + 16 * 1080 + 4 * 8144 + 2100 + 2304 + max(3804, 900, 2176)
    assert found.checkpoint == 12 * 1080


def test_sharding_and_precision(tmp_path: Path) -> None:
    zero = {"stage": 3, "reduce_bucket_size": 200, "stage3_prefetch_bucket_size": 50, "stage3_max_reuse_distance": 1200}
    run = a_run(tmp_path, zero)
    four = sizes(run, 4)
    assert four["weights"] == four["their float32 copies"] == four["gradients"] == 4 * 270
    assert four["AdamW's two moments"] == 8 * 270
    assert four["weights gathered at a time"] == 4 * (600 + 50)  # half of the reuse distance, and what is fetched ahead
    assert four["bucket of gradients"] == 4 * 200
    assert four["the teacher's shard"] == 4 * 8144 / 4
    assert four["the teacher's weights gathered at a time"] == 4 * 8144  # the shipped file fetches 50 M ahead
    assert "weights gathered at a time" not in sizes(run, 1)
    larger = estimate(run, Shapes(replace(STUDENT, parameters=10_000), TEACHER, FILTERS), on(4))
    (step,) = [line for line in larger.lines if "for the optimizer" in line.what]
    assert step.passing and step.size == 10_080 - (2100 + 2304)  # activations and residuals are gone by then
    half = sizes(a_run(tmp_path, zero, student__dtype="bfloat16"), 4)
    assert half["weights"] == half["gradients"] == 2 * 270 and half["their float32 copies"] == 4 * 270
    stages = {stage: sizes(a_run(tmp_path, {"stage": stage}), 4) for stage in (1, 2)}
    assert [stages[s]["weights"] for s in (1, 2)] == [4 * 1080, 4 * 1080]
    assert [stages[s]["gradients"] for s in (1, 2)] == [4 * 1080, 4 * 270]


def test_activations_and_residuals_follow_the_recipe(tmp_path: Path) -> None:
    lean = sizes(a_run(tmp_path, student__activation_checkpointing=True), 1)
    assert lean["activations, a block's input each"] == 3 * (100 + 2 * 12 * 4 * 4)
    assert lean["residuals of"] == 2 * 36 * 8 * 4
    assert lean["a block's backward"] == 2 * 3 * 300
    curved = sizes(a_run(tmp_path, filters__nonlinear=True), 1)
    assert (
        curved["residuals of"] == 2 * 36 * (8 + 3 * 4) * 4
    )  # what is normalised, and the inner layer's output before and after
    cached = sizes(a_run(tmp_path, teacher__cache=str(tmp_path / "cache")), 1)
    assert cached["the cached teacher's LM head"] == 4 * 10 * 8 and "a teacher's block and its state" not in cached
    listed = sizes(a_run(tmp_path, teacher__cache=str(tmp_path / "cache"), loss__kl_top_k=4), 1)
    assert "the cached teacher's LM head" not in listed


@pytest.mark.parametrize(
    ("stage", "dtype", "bytes_each"),
    [(3, "float32", 12), (3, "bfloat16", 12), (2, "float32", 16), (2, "bfloat16", 14), (0, "bfloat16", 14)],
)
def test_a_checkpoint_by_hand(tmp_path: Path, stage: int, dtype: str, bytes_each: int) -> None:
    run = a_run(tmp_path, {"stage": stage}, student__dtype=dtype)
    found = estimate(run, SHAPES, on(4))
    assert found.checkpoint == bytes_each * 1080  # two moments, float32 copies, and below ZeRO-3 the weights


OFFLOAD = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}


def test_what_is_offloaded_lies_on_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "ted_ds.doctor.estimate._logit_bytes", lambda *arguments, **sides: 1.0
    )  # would ask a GPU for its size
    run = a_run(tmp_path, OFFLOAD)
    on_host = {
        line.what.split(",")[0]
        for line in estimate(run, SHAPES, on(2, torch.device("cuda"))).lines
        if line.place == "host"
    }
    assert on_host == {
        "weights",
        "their float32 copies",
        "AdamW's two moments",
        "gradients",
        "gradients in float32 for the optimizer",
    }
    assert estimate(run, SHAPES, on(2)).total("host") == 0


# --- whether it fits -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("doctor"))


def project_run(project: Path, **changes: Any) -> RunConfig:
    return RunConfig.model_validate(recipe(project, "run", **changes))


def test_a_student_that_stage_0_has_yet_to_cut(project: Path) -> None:
    student, teacher, filters = run_shapes(project_run(project, filters__output_dim=6))
    assert teacher is not None and (student.blocks, teacher.blocks) == (2, 4)
    whole = AutoModelForCausalLM.from_pretrained(project / "teacher")
    own = [sum(p.numel() for p in block.parameters()) for block in whole.model.layers]
    assert teacher.parameters == sum(p.numel() for p in whole.parameters())
    assert student.parameters == teacher.parameters - own[0] - own[1]
    assert filters == FilterShape(2, 6, 16 * 6 + 6, 16 * 6 + 6)
    random = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    start = run_shapes(project_run(project, method="kd", student__init={"config": random}))[0]
    assert (start.width, start.vocab) == (8, 61)
    assert run_shapes(project_run(project, method="ce"))[1:] == (None, NO_FILTERS)
    # a width that is cut by rotation is the filters' too
    narrow = {"hidden_size": 8, "num_blocks": 3, "blocks": "iterative"}
    student, _, filters = run_shapes(project_run(project, student__init=narrow, filters__layer_map=None))
    assert (student.blocks, filters) == (3, FilterShape(3, 8, 8 * 8 + 8, 16 * 8 + 8))
    # of a budget, the largest shape that it allows
    budget = {"parameters": 6000}
    assert 5000 < run_shapes(project_run(project, student__init=budget)).student.parameters <= 6000


def the_machine(gib: float, ranks: int = 2, host_gib: float = 0.0) -> Machine:
    return Machine(ranks, CPU, gib * GIB, host_gib * GIB, idle=0.0)


def megabytes(run: RunConfig, world_size: int) -> Estimate:
    """A made-up estimate: 1 GiB a row, halved by checkpointing, and 2 GiB of teacher over the ranks or whole."""
    rows = run.train.micro_batch_size * (0.5 if run.student.activation_checkpointing else 1)
    assert run.teacher is not None
    teacher = 2 if run.teacher.sharding == "replicated" else 2 / world_size
    return Estimate((Line("rows", rows * GIB), Line("teacher", teacher * GIB)), checkpoint=3.0 * GIB)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "run_shapes", lambda run: SHAPES)
    monkeypatch.setattr(fitting, "estimate", lambda run, shapes, machine: megabytes(run, machine.world_size))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100 * GIB))


def test_what_would_make_it_fit(project: Path, made_up: None) -> None:
    run = project_run(project, train__micro_batch_size=4, train__global_batch_size=64, teacher__sharding="replicated")
    assert only(fitting.fit(run, the_machine(10.1)), "memory").status == "ok"  # 6 of 10.1 is below 0.6
    tight = only(fitting.fit(run, the_machine(8)), "memory")
    assert tight.status == "warn" and "6.00 GiB a rank" in tight.what and "is tight" in tight.what
    # limits of 0.6 * 5.9 = 3.54 and 0.6 * 8 = 4.8 GiB; 2 rows and the whole teacher take 4, and so on
    assert tight.advice == (
        "train.micro_batch_size: 2 gives 4.00 GiB; student.activation_checkpointing: true gives 4.00 GiB"
    )
    short = only(fitting.fit(run, the_machine(5.9)), "memory")
    assert short.status == "FAIL" and short.advice == "train.micro_batch_size: 1 gives 3.00 GiB"
    none = only(fitting.fit(run, the_machine(1.5)), "memory")
    assert none.status == "FAIL" and none.advice == (
        "no one change is enough; train.micro_batch_size: 1, student.activation_checkpointing: true, "
        "teacher.sharding: zero3, 32 ranks on as many more nodes give 0.56 GiB"  # half a row, and 2 / 32
    )


def test_a_change_that_does_not_divide_the_batch_is_not_advised(
    project: Path, made_up: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(run: RunConfig, shapes: Shapes, machine: Machine) -> Estimate:
        if machine.world_size > 4:
            raise ConfigError("does not divide")
        return megabytes(run, machine.world_size)

    monkeypatch.setattr(fitting, "estimate", refuse)
    sharded = project_run(project, teacher__sharding="zero3", student__activation_checkpointing=True)
    found = only(fitting.fit(sharded, the_machine(1.2)), "memory")
    assert found.status == "FAIL" and found.advice == (
        "no one change is enough; 4 ranks on as many more nodes give 1.00 GiB"
    )
    monkeypatch.setattr(fitting, "_ways", lambda run, machine: [])
    assert only(fitting.fit(sharded, the_machine(1.2)), "memory").advice == "take a smaller model or shorter rows"


def test_the_host_of_what_is_offloaded(project: Path, made_up: None, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (Line("weights", GIB, "host"), Line("rows", GIB))
    monkeypatch.setattr(fitting, "estimate", lambda *arguments: Estimate(lines, GIB))
    run = project_run(project)
    enough, short = (fitting.fit(run, the_machine(9, host_gib=gib)) for gib in (2.0, 0.5))
    assert only(enough, "host memory").status == "ok" and only(short, "host memory").status == "FAIL"
    assert "weights, on the host" in str(enough[0])


def test_room_for_checkpoints(project: Path, made_up: None, monkeypatch: pytest.MonkeyPatch) -> None:
    run, statuses = project_run(project), []
    for free in (9.5, 8.5, 2.5):  # keep_last 2 and the one being written: 9 GiB
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free * GIB))
        statuses.append(only(fitting.fit(run, the_machine(99)), "disk").status)
    assert statuses == ["ok", "warn", "FAIL"]


def test_models_that_cannot_be_looked_at(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = project_run(project, teacher__model=str(project / "nowhere"))
    (found,) = fitting.fit(gone, the_machine(9))
    assert found.status == "FAIL" and "nowhere" in found.what

    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("data-dependent\nmore")

    monkeypatch.setattr("ted_ds.doctor.shapes.model_shape", fail)
    (found,) = fitting.fit(project_run(project), the_machine(9))
    assert (found.status, found.what) == ("warn", "not estimated: data-dependent")


def test_models_are_measured(project: Path) -> None:
    own = shutil.copytree(project / "teacher", project / "own")
    run = project_run(project, student={"model": str(own)})
    assert [f.status for f in fitting.models(run)] == ["ok", "ok"]
    tensors = load_file(own / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, own / "model.safetensors", metadata={"format": "pt"})
    teacher, student = fitting.models(run)
    assert (teacher.status, student.status) == ("ok", "FAIL") and "lack model.norm.weight" in student.what
    shutil.rmtree(own)


def test_data_files_and_tokenizer(project: Path) -> None:
    run = project_run(project, data__validation=["nowhere/*.txt"], data__train=[{"hub": "a/b"}, f"{project}/train.txt"])
    found = {f.check: f for f in fitting.data_files(run)}
    assert found["data.train"].status == "ok" and "1 files" in found["data.train"].what
    assert "a/b of the hub, not looked at" in found["data.train"].what
    assert found["data.validation"].status == "FAIL" and found["data.tokenizer"].what.endswith(", 61 ids")
    absent = project_run(project, data__tokenizer=str(project / "none"))
    assert fitting.data_files(absent)[-1].status == "FAIL"
    trained = project_run(project, data__tokenizer=str(project / "none"), data__train_tokenizer=300)
    assert fitting.data_files(trained)[-1].status == "ok"


# --- the command -----------------------------------------------------------------------------------------------------


def diagnose(world: Any, config: Path, values: dict[str, Any]) -> tuple[int, list[str], float, float]:
    """In a rank: the command with a recipe, on the ranks that are there, and `engine_bytes`."""
    from unittest.mock import patch

    from ted_ds.cli import doctor
    from ted_ds.doctor import machine

    printed: list[str] = []
    strange = [Finding("warn", "limits", "5 open files", "x")] if world.rank else []
    with (
        patch("ted_ds.job.world.init_world", lambda wait: world),
        patch("ted_ds.job.world.shut_down", lambda world: None),
        patch.object(machine, "machine", lambda: strange),
        patch.object(doctor, "_print", lambda findings: printed.extend(map(str, findings))),
    ):
        code = doctor.main(["--config", str(config)])
    return code, printed, *engine_bytes(world, RunConfig.model_validate(values))


def engine_bytes(world: Any, run: RunConfig) -> tuple[float, float]:
    """(live bytes of an engine after a step, the estimate of its weights, copies, moments, gradients and bucket)."""
    from ted_ds.config.deepspeed import trained_engine_config
    from ted_ds.distill.engine import build_trained_engine
    from ted_ds.models.loading import sharded_init

    config = trained_engine_config(run, world_size=world.size, learning_rate=1e-3, weight_decay=0.0, cpu=True)
    before = live_bytes()
    with sharded_init(config):
        module = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(6)))
    engine = build_trained_engine(module, deepspeed_config=config, schedule=lambda step: 1.0)
    engine.backward(engine(torch.ones(1, 128)).sum())
    engine.step()
    held = live_bytes() - before
    shape = replace(STUDENT, parameters=6 * 128 * 128)
    lines = estimate(run, Shapes(shape, None, NO_FILTERS), on(world.size)).lines
    engine.destroy()
    names = ("weights, ", "their", "AdamW", "gradients", "bucket")
    return held, sum(line.size for line in lines if line.what.startswith(names) and not line.passing)


def live_bytes() -> float:
    gc.collect()
    storages = {}
    for tensor in (t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)):
        if tensor.device.type == "cpu":
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return float(sum(storages.values()))


def test_two_ranks_and_an_engine(workers: Callable[[int], Workers], project: Path) -> None:
    config = write_recipe(project, "together", data__prepared=str(project / "prepared"))
    zero = {"stage": 3, "reduce_bucket_size": 20000, "stage3_param_persistence_threshold": 0}
    run = a_run(project, zero, train__micro_batch_size=1, train__global_batch_size=2)
    before = sorted(project.rglob("*"))
    (code, lines, held, estimated), (other_code, nothing, _, _) = workers(2).run(
        diagnose, config, run.model_dump(mode="json")
    )
    assert (code, other_code, nothing) == (0, 0, [])
    report = "\n".join(lines)
    for pattern in (
        r"ok    recipe .*together\.yaml is valid",
        r"ok    output_dir .* free, 1 MiB is written",
        r"warn  limits +rank 1 \(\S+\): 5 open files: x",
        r"ok    ranks +2 on 1 node: \S+ 0=cpu 1=cpu",
        r"ok    same versions +on all ranks",
        r"(ok  |warn)  all-reduce +16 MiB in [0-9.]+ ms, [0-9.]+ GB/s; 4 bytes in \d+ us",
        r"ok    shared folder +all ranks see",
        r"GiB  weights, 0\.0 M of student and filters",
        r"ok    memory +estimate: ",
        r"ok    disk +estimate: a checkpoint takes ",
    ):
        assert re.search(pattern, report), (pattern, report)
    assert sorted(project.rglob("*")) == before
    assert held == pytest.approx(estimated, rel=0.02)


def test_a_rank_that_does_not_come_is_waited_for_and_said(tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("metod: ted\n")
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (port := str(get_free_port()))}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "ted_ds.cli.main", "doctor", "--wait", "2", "--config", "wrong.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    lines = done.stdout.splitlines()
    assert all(re.match(r"(ok  |warn|FAIL)  \S", line) for line in lines)
    assert re.match(r"ok    python +3\.1", lines[0])
    assert any(line.startswith("FAIL  recipe") and "metod" in line for line in lines)
    assert re.search(rf"FAIL  ranks +\S+ waited \d+ s for 2 ranks to meet at 127.0.0.1:{port} \(.*1/2", lines[-1])
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.yaml"]
