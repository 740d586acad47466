"""What a recipe asks of a machine: its data files, its models' configs, memory, disk."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, PreTrainedConfig

from ted_ds.config.data_section import HubDataset
from ted_ds.config.schema import RunConfig
from ted_ds.data.files import matching_files
from ted_ds.data.tokenizers import Tokenizer, load_tokenizer
from ted_ds.doctor.finding import GIB, Finding, Status, gib
from ted_ds.doctor.machine import existing, writable
from ted_ds.doctor.memory import Estimate, FilterShape, ModelShape, estimate, model_shape
from ted_ds.doctor.ranks import Facts
from ted_ds.errors import TedError
from ted_ds.models.filters import FilterPlan
from ted_ds.models.loading import meta_model
from ted_ds.models.pooler import set_head_dropout
from ted_ds.models.pruning import plan_cut
from ted_ds.models.structure import set_dropout
from ted_ds.models.task_head import label_fields
from ted_ds.pipeline.stage0 import ModelPaths
from ted_ds.pipeline.stage1 import plan_pairs
from ted_ds.teacher.hosting import HOSTS

OFFLOAD = Path("ds_configs/zero3_offload.json")

TIGHT = {"cuda": 0.85, "cpu": 0.6}
"""Share of the memory above which the estimate's error may decide; on CPUs the C library keeps what is freed."""


def folders(run: RunConfig | None) -> list[Finding]:
    """Whether this rank can write where a run writes; without a recipe, into the working folder."""
    if run is None:
        return [writable("working folder", Path())]
    return [writable("output_dir", run.output_dir), writable("data.prepared", run.prepared_folder)]


def data_files(run: RunConfig) -> list[Finding]:
    """Whether this rank sees each data entry's files, and the tokenizer."""
    data = run.data
    entries = {"data.train": data.train, "data.validation": data.validation}
    entries |= {f"data.{name}": extra for name, extra in data.extra_validation.items()}
    return [*(_entries(check, given) for check, given in entries.items() if given), _tokenizer(run)]


def _entries(check: str, entries: tuple[str | HubDataset, ...]) -> Finding:
    try:
        files = [path for entry in entries if isinstance(entry, str) for path in matching_files(entry)]
    except TedError as error:
        return Finding("FAIL", check, str(error), "see to the path, or to what this node mounts")
    hub = [entry.hub for entry in entries if isinstance(entry, HubDataset)]
    parts = [f"{len(files)} files, {gib(sum(path.stat().st_size for path in files))}"] if files else []
    return Finding("ok", check, "; ".join([*parts, *(f"{name} of the hub, not looked at" for name in hub)]))


def _tokenizer(run: RunConfig) -> Finding:
    name, train = run.data.tokenizer, run.data.train_tokenizer
    if train is not None and not Path(name).exists():
        return Finding("ok", "data.tokenizer", f"{name} will be trained, {train} pieces")
    try:
        return Finding("ok", "data.tokenizer", f"{name}, {_loaded(run).vocab_size} ids")
    except TedError as error:
        return Finding("FAIL", "data.tokenizer", str(error), "give another, or data.train_tokenizer")


@dataclass(frozen=True)
class Machine:
    """What one rank may use. device_bytes: of its GPU, or its part of the host's memory. host_bytes: its part of
    the host's, where the device is a GPU; else 0. idle: what the process has without a model.
    """

    world_size: int
    device: torch.device
    device_bytes: float
    host_bytes: float
    idle: float


def share_of(facts: list[Facts], device: torch.device) -> Machine:
    """The part of the machines that every rank may count on: the least of all GPUs, and of the hosts' shares."""
    ranks = Counter(fact.host for fact in facts)
    host = min(fact.host_bytes / ranks[fact.host] for fact in facts)
    if device.type == "cuda":  # what runs already, its context and NCCL, is not free any more
        return Machine(len(facts), device, min(fact.gpu_bytes for fact in facts), host, idle=0.0)
    return Machine(len(facts), device, host, 0.0, idle=float(psutil.Process().memory_info().rss))


def fit(run: RunConfig, machine: Machine) -> list[Finding]:
    """Whether the recipe fits memory and disk, by the models' configs alone: an estimate, line by line."""
    try:
        student, teacher, filters = shapes(run)
        calculate = partial(_estimated, student=student, teacher=teacher, filters=filters, machine=machine)
        found = calculate(run, machine.world_size)
    except TedError as error:
        return [Finding("FAIL", "recipe", str(error))]
    except Exception as error:  # whatever a model's own code raises that cannot do without values
        return [Finding("warn", "memory", f"not estimated: {str(error).partition(chr(10))[0]}", "try a few steps")]
    lines = [
        Finding("", "memory", f"{line.size / GIB:9.3f} GiB  {'passing: ' * line.passing}{line.what}{_on(line.place)}")
        for line in found.lines
    ]
    return [*lines, *_verdicts(run, found, machine, calculate), disk(run, found.checkpoint)]


def _on(place: str) -> str:
    return "" if place == "device" else ", on the host"


def _estimated(
    run: RunConfig,
    ranks: int,
    *,
    student: ModelShape,
    teacher: ModelShape | None,
    filters: FilterShape,
    machine: Machine,
) -> Estimate:
    return estimate(run, student, teacher, filters, world_size=ranks, device=machine.device, idle=machine.idle)


Calculate = Callable[[RunConfig, int], Estimate]


def _verdicts(run: RunConfig, found: Estimate, machine: Machine, calculate: Calculate) -> list[Finding]:
    """The totals against what there is; the host's where a DeepSpeed file offloads to it."""
    need, have = found.total("device"), machine.device_bytes
    place = "GPU" if machine.device.type == "cuda" else "rank's part of the host"
    moment = "at the worst moment (all that stays and the largest that passes)"
    what = f"estimate: {gib(need)} a rank {moment}, the {place} has {gib(have)}"
    verdicts = []
    if need <= TIGHT[machine.device.type] * have:
        verdicts.append(Finding("ok", "memory", what))
    else:
        status: Status = "FAIL" if need > have else "warn"
        said = "does not fit" if need > have else "is tight"
        remedies = "; ".join(_remedies(run, machine, calculate)) or "take a smaller model or shorter rows"
        verdicts.append(Finding(status, "memory", f"{what}, which {said}", remedies))
    if host := found.total("host"):
        status = "ok" if host <= machine.host_bytes else "FAIL"
        what = f"estimate: {gib(host)} a rank on the host, whose part of it is {gib(machine.host_bytes)}"
        advice = "" if status == "ok" else "ask for more memory (SLURM's --mem), take more nodes, or offload less"
        verdicts.append(Finding(status, "host memory", what, advice))
    return verdicts


def _remedies(run: RunConfig, machine: Machine, calculate: Calculate) -> list[str]:
    """Of each way to less memory the mildest change that makes it fit, with the new figure; else all ways at once."""
    limit = TIGHT[machine.device.type] * machine.device_bytes
    fitting, together = [], Change("", machine.world_size)
    for way in _ways(run, machine):
        needs = [(change, _need(change, run, machine, calculate)) for change in way]
        fits = (f"{change.name} gives {gib(need)}" for change, need in needs if need <= limit)
        fitting += list(fits)[:1]
        possible = (together.joined(change) for change, _ in needs[::-1])
        feasible = (c for c in possible if _need(c, run, machine, calculate) < math.inf)
        together = next(feasible, together)
    if fitting or not together.name:
        return fitting
    return [f"no one change is enough; {together.name} give {gib(_need(together, run, machine, calculate))}"]


@dataclass(frozen=True)
class Change:
    """Other values of a recipe, by section ("" for its own keys), or more ranks."""

    name: str
    ranks: int
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    def joined(self, other: Change) -> Change:
        """Both changes, which are of different keys."""
        names = self.sections.keys() | other.sections.keys()
        sections = {n: {**self.sections.get(n, {}), **other.sections.get(n, {})} for n in names}
        return Change(", ".join(filter(None, (self.name, other.name))), max(self.ranks, other.ranks), sections)

    def applied(self, run: RunConfig) -> RunConfig:
        """The recipe with these values."""
        sections = {n: getattr(run, n).model_copy(update=f) for n, f in self.sections.items() if n}
        return run.model_copy(update={**sections, **self.sections.get("", {})})


def _need(change: Change, run: RunConfig, machine: Machine, calculate: Calculate) -> float:
    """Bytes on the device after a change; infinite where batch sizes or files do not allow it."""
    try:
        found = calculate(change.applied(run), change.ranks)
    except TedError:
        return math.inf
    return found.total("device") if found.total("host") <= machine.host_bytes else math.inf


def _ways(run: RunConfig, machine: Machine) -> list[list[Change]]:
    """Ways to less memory, each from the mildest change to the strongest."""
    ranks, rows = machine.world_size, run.train.micro_batch_size
    on_gpus = machine.device.type == "cuda"
    halves = [rows >> i for i in range(1, rows.bit_length())]
    ways = [[Change(f"train.micro_batch_size: {n}", ranks, {"train": {"micro_batch_size": n}}) for n in halves]]
    if not run.student.activation_checkpointing:
        recompute = {"student": {"activation_checkpointing": True}}
        ways.append([Change("student.activation_checkpointing: true", ranks, recompute)])
    if run.teacher is not None and HOSTS[run.teacher.sharding].whole_copy and ranks > 1:
        ways.append([Change("teacher.sharding: zero3", ranks, {"teacher": {"sharding": "zero3"}})])
    if on_gpus:
        ways.append([Change(f"deepspeed: {OFFLOAD}", ranks, {"": {"deepspeed": OFFLOAD}})])
    more = "" if on_gpus else " on as many more nodes"
    return [*ways, [Change(f"{n * ranks} ranks{more}", n * ranks) for n in (2, 4, 8, 16)]]


def disk(run: RunConfig, checkpoint: float) -> Finding:
    """Whether checkpoints have room where output_dir is or will be, while another is written."""
    place = existing(run.output_dir)
    free, kept = shutil.disk_usage(place).free, run.train.keep_last
    what = f"estimate: a checkpoint takes {gib(checkpoint)}, {place} has {gib(free)} free"
    if free < checkpoint:
        return Finding("FAIL", "disk", what, "make room, or give another output_dir")
    if free < (kept + 1) * checkpoint:
        what += f", train.keep_last {kept} and the one being written take {gib((kept + 1) * checkpoint)}"
        return Finding("warn", "disk", what, "make room, or lower train.keep_last")
    return Finding("ok", "disk", what)


def shapes(run: RunConfig) -> tuple[ModelShape, ModelShape | None, FilterShape]:
    """Student, teacher (None where no loss needs one) and filters, by configs alone.

    Raises a TedError where a model is not found, or the recipe does not fit it.
    """
    kind, length = run.spec.kind, run.data.sequence_length
    config = _student_config(run)
    if run.student.dropout is not None:
        set_dropout(config, run.student.dropout)
    if run.student.head_dropout is not None:
        set_head_dropout(config, run.student.head_dropout)
    student = model_shape(config, kind, run.student.dtype, length, trust_remote_code=run.student.trust_remote_code)
    if run.teacher is None or not (run.loss.kl_alpha or run.loss.mse_alpha):
        return student, None, FilterShape(0, 0, 0, 0)
    theirs = meta_model(run.teacher.model, kind, trust_remote_code=run.teacher.trust_remote_code).config
    teacher = model_shape(theirs, kind, run.teacher.dtype, length, trust_remote_code=run.teacher.trust_remote_code)
    return student, teacher, _filters(run, config)


def _filters(run: RunConfig, student: PreTrainedConfig) -> FilterShape:
    """The run's own plan, for a student that may not be made yet: its config is enough."""
    assert run.teacher is not None
    with tempfile.TemporaryDirectory() as folder:
        student.save_pretrained(folder)
        plan = plan_pairs(run, ModelPaths(folder, run.teacher.model))
    if plan is None:
        return FilterShape(0, 0, 0, 0)
    sides = (_filter_parameters(plan.student), _filter_parameters(plan.teacher))
    return FilterShape(len(plan.layer_map), plan.student.output_dim, *sides)


def _filter_parameters(plan: FilterPlan | None) -> int:
    if plan is None:
        return 0
    with torch.device("meta"):
        return sum(p.numel() for p in plan.build()[0].parameters())


def _student_config(run: RunConfig) -> PreTrainedConfig:
    """The student's config: a checkpoint's, or what Stage 0 will write."""
    student, kind = run.student, run.spec.kind
    if student.init_from_pretrained or student.init is None:
        name = student.pretrained if student.init_from_pretrained else student.model
        assert name is not None
        return meta_model(name, kind, trust_remote_code=student.trust_remote_code).config
    if student.init.config is not None:
        fields = {"vocab_size": _vocabulary(run)} | ({} if run.task == "causal-lm" else label_fields(run.spec))
        return AutoConfig.for_model(**{**fields, **student.init.config})
    assert run.teacher is not None
    return plan_cut(run.teacher.model, student.init, kind, run.teacher.trust_remote_code).config


def _vocabulary(run: RunConfig) -> int:
    """Ids of the tokenizer, or of the one that will be trained."""
    data = run.data
    if data.train_tokenizer is not None and not Path(data.tokenizer).exists():
        return data.train_tokenizer
    return _loaded(run).vocab_size


def _loaded(run: RunConfig) -> Tokenizer:
    return load_tokenizer(run.data.tokenizer, trust_remote_code=run.data.trust_remote_code)
