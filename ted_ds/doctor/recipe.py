"""Checks of a recipe on this machine: the folders it writes, its data files, and whether it fits memory and disk."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from ted_ds.config.data_section import HubDataset
from ted_ds.config.schema import RunConfig
from ted_ds.data.text_files import matching_files
from ted_ds.data.tokenizers import load_tokenizer
from ted_ds.doctor.engines import TIGHT, engine_choices, first_that_fits, named
from ted_ds.doctor.estimate import Machine, estimate
from ted_ds.doctor.finding import GIB, Finding, Status, gib
from ted_ds.doctor.machine import existing, writable
from ted_ds.doctor.ranks import Facts
from ted_ds.doctor.shapes import Shapes, run_shapes
from ted_ds.errors import TedError
from ted_ds.models.loading import meta_model
from ted_ds.models.probe import probe
from ted_ds.models.published import is_published
from ted_ds.models.weight_check import check_weights
from ted_ds.teacher.hosting import HOSTS

OFFLOAD, RANKS = Path("ds_configs/zero3_offload.json"), "ranks"

Change = dict[str, Any]
"""Other values of a recipe by dotted key, and by RANKS the number of ranks."""


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
    hub = [f"{entry.hub} of the hub, not looked at" for entry in entries if isinstance(entry, HubDataset)]
    local = [f"{len(files)} files, {gib(sum(path.stat().st_size for path in files))}"] if files else []
    return Finding("ok", check, "; ".join([*local, *hub]))


def _tokenizer(run: RunConfig) -> Finding:
    name, train = run.data.tokenizer, run.data.train_tokenizer
    if train is not None and not Path(name).exists():
        return Finding("ok", "data.tokenizer", f"{name} will be trained, {train} pieces")
    try:
        tokenizer = load_tokenizer(name, trust_remote_code=run.data.trust_remote_code)
    except TedError as error:
        return Finding("FAIL", "data.tokenizer", str(error), "give another, or data.train_tokenizer")
    return Finding("ok", "data.tokenizer", f"{name}, {tokenizer.vocab_size} ids")


def models(run: RunConfig) -> list[Finding]:
    """Whether the files of the models that are given hold all weights, and their families behave as ted_ds assumes."""
    found = []
    for role, section in (("teacher", run.teacher), ("student", run.student)):
        path = None if section is None else section.model
        if section is None or path is None or is_published(path):
            continue
        kind, trusted = run.spec.kind, section.trust_remote_code
        try:
            check_weights(role, path, kind, trust_remote_code=trusted)
            model = meta_model(path, kind, trust_remote_code=trusted)
            probe(role, path, model, kind, layers=bool(run.loss.mse_alpha))
        except TedError as error:
            found.append(Finding("FAIL", f"{role}.model", str(error), "give another, or mend it"))
        else:
            found.append(Finding("ok", f"{role}.model", f"{path}, {model.config.model_type}: all weights are there"))
    return found


def share_of(facts: list[Facts], device: torch.device) -> Machine:
    """The part of the machines that every rank may count on: the least of all GPUs, and of the hosts' shares."""
    ranks = Counter(fact.host for fact in facts)
    host = min(fact.host_bytes / ranks[fact.host] for fact in facts)
    if device.type == "cuda":  # the process's own context and NCCL are taken from the free memory already
        return Machine(len(facts), device, min(fact.gpu_bytes for fact in facts), host, idle=0.0)
    return Machine(len(facts), device, host, 0.0, idle=float(psutil.Process().memory_info().rss))


def fit(run: RunConfig, machine: Machine) -> list[Finding]:
    """Whether the recipe fits memory and disk, by the models' configs alone: an estimate, line by line."""
    lines = []
    try:
        choices = engine_choices(run)
        if len(choices) > 1:
            run = choices[first_that_fits(choices, machine)]
            lines.append(Finding("ok", "engines", f"auto takes {named(run)}"))
        shapes = run_shapes(run)
        found = estimate(run, shapes, machine)
    except TedError as error:
        return [Finding("FAIL", "recipe", str(error))]
    except Exception as error:  # any error of a model's own code, if it needs the tensors' values
        return [Finding("warn", "memory", f"not estimated: {str(error).partition(chr(10))[0]}", "try a few steps")]
    for line in found.lines:
        what = f"{'passing: ' * line.passing}{line.what}{', on the host' * (line.place == 'host')}"
        lines.append(Finding("", "memory", f"{line.size / GIB:9.3f} GiB  {what}"))
    lines += [_device_memory(run, shapes, machine, found.total("device")), *_host_memory(machine, found.total("host"))]
    return [*lines, disk(run, found.checkpoint)]


def _device_memory(run: RunConfig, shapes: Shapes, machine: Machine, need: float) -> Finding:
    have, kind = machine.device_bytes, machine.device.type
    place = "GPU" if kind == "cuda" else "rank's part of the host"
    moment = "at the worst moment (all that stays and the largest that passes)"
    what = f"estimate: {gib(need)} a rank {moment}, the {place} has {gib(have)}"
    if need <= TIGHT[kind] * have:
        return Finding("ok", "memory", what)
    status: Status = "FAIL" if need > have else "warn"
    said = "does not fit" if need > have else "is tight"
    remedies = "; ".join(_remedies(run, shapes, machine)) or "take a smaller model or shorter rows"
    return Finding(status, "memory", f"{what}, which {said}", remedies)


def _host_memory(machine: Machine, need: float) -> list[Finding]:
    """Nothing, unless a DeepSpeed file offloads to the host."""
    if not need:
        return []
    what = f"estimate: {gib(need)} a rank on the host, whose part of it is {gib(machine.host_bytes)}"
    if need <= machine.host_bytes:
        return [Finding("ok", "host memory", what)]
    advice = "ask for more memory (SLURM's --mem), take more nodes, or offload less"
    return [Finding("FAIL", "host memory", what, advice)]


def _remedies(run: RunConfig, shapes: Shapes, machine: Machine) -> list[str]:
    """Of each way to use less memory the mildest change that fits, with its figure; if none fits, all ways together."""

    def need(change: Change) -> float:
        """Bytes on the device after the change; infinite if batch sizes, files or the host do not allow it."""
        try:
            found = estimate(_changed(run, change), shapes, replace(machine, world_size=change.get(RANKS, ranks)))
        except TedError:
            return math.inf
        return found.total("device") if found.total("host") <= machine.host_bytes else math.inf

    on_gpus, ranks = machine.device.type == "cuda", machine.world_size
    limit = TIGHT[machine.device.type] * machine.device_bytes
    fitting: list[str] = []
    together: Change = {}
    for way in _ways(run, machine):
        needs = ((change, need(change)) for change in way)
        fitting += [f"{_name(change, on_gpus)} gives {gib(size)}" for change, size in needs if size <= limit][:1]
        together = next((c for change in way[::-1] if need(c := together | change) < math.inf), together)
    if fitting or not together:
        return fitting
    return [f"no one change is enough; {_name(together, on_gpus)} give {gib(need(together))}"]


def _ways(run: RunConfig, machine: Machine) -> list[list[Change]]:
    """The ways to use less memory, each from the mildest change to the strongest."""
    ranks, rows = machine.world_size, run.train.micro_batch_size
    ways: list[list[Change]] = [[{"train.micro_batch_size": rows >> i} for i in range(1, rows.bit_length())]]
    if not run.student.activation_checkpointing:
        ways.append([{"student.activation_checkpointing": True}])
    if run.teacher is not None and HOSTS[run.teacher.sharding].whole_copy and ranks > 1:
        ways.append([{"teacher.sharding": "zero3"}])
    if machine.device.type == "cuda":
        ways.append([{"deepspeed": OFFLOAD}])
    return [*ways, [{RANKS: n * ranks} for n in (2, 4, 8, 16)]]


def _changed(run: RunConfig, change: Change) -> RunConfig:
    for key, value in change.items():
        section, _, name = key.rpartition(".")
        if section:
            run = run.model_copy(update={section: getattr(run, section).model_copy(update={name: value})})
        elif key != RANKS:
            run = run.model_copy(update={key: value})
    return run


def _name(change: Change, on_gpus: bool) -> str:
    """E.g. `train.micro_batch_size: 2, 8 ranks`."""
    values = {key: "true" if value is True else value for key, value in change.items()}
    more = "" if on_gpus else " on as many more nodes"
    return ", ".join(f"{value} ranks{more}" if key == RANKS else f"{key}: {value}" for key, value in values.items())


def disk(run: RunConfig, checkpoint: float) -> Finding:
    """Whether checkpoints have room where output_dir is or will be, while another one is written."""
    place = existing(run.output_dir)
    free, kept = shutil.disk_usage(place).free, run.train.keep_last
    what = f"estimate: a checkpoint takes {gib(checkpoint)}, {place} has {gib(free)} free"
    if free < checkpoint:
        return Finding("FAIL", "disk", what, "make room, or give another output_dir")
    if free < (kept + 1) * checkpoint:
        what += f", train.keep_last {kept} and the one being written take {gib((kept + 1) * checkpoint)}"
        return Finding("warn", "disk", what, "make room, or lower train.keep_last")
    return Finding("ok", "disk", what)
