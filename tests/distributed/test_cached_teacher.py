"""Stage II from a teacher cache: the live teacher's losses, without a teacher; and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ted_ds.teacher.cache_layout import Manifest
from ted_ds.telemetry.recorder import read_metrics
from tests.cache_jobs import full_while_recording, in_small_shards, on_a_small_disk, recordings, without_a_teacher
from tests.jobs import pretrain_error, pretrain_recipe
from tests.marks import slow
from tests.project import make_project, write_recipe
from tests.task_project import KL_ROUNDING, make_task_project, write_task_recipe
from tests.tiny_models import tiny_model
from tests.workers import Workers

Group = Callable[[int], Workers]
TERMS = ("step", "loss", "pred_loss", "kl_loss", "layer_loss")
SHORT: dict[str, Any] = {"data__validation": [], "train__steps": 4, "filters__steps": 3, "train__save_every": 0}
SMALL = 40_000
"""Bytes of a shard, so that the projects' caches have several."""

REPLICATED = ("--teacher.sharding=replicated", "--deepspeed=ds_configs/zero0.json")
CASES: dict[str, tuple[str | None, dict[str, Any], int, tuple[str, ...]]] = {
    "ted": (None, {"method": "ted"}, 2, ()),
    "kd, replicated": (None, {"method": "kd"}, 2, REPLICATED),
    "lwd, 1 rank": (None, {"method": "lwd"}, 1, ()),
    "ted without KL": (None, {"method": "ted", "loss__kl_alpha": 0}, 2, ()),
    "bfloat16": (None, {"teacher__dtype": "bfloat16"}, 2, ()),
    "ted, classification": ("mnli", {}, 2, ()),
    "kd, regression": ("stsb", {"method": "kd", "loss__mse_alpha": None, "train__micro_batch_size": 4}, 2, ()),
    "lwd, questions": ("squad_v2", {"method": "lwd"}, 2, REPLICATED),
}


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str | None, Path] = {}

    def project(task: str | None = None) -> Path:
        if task not in made:
            folder = tmp_path_factory.mktemp(task or "text")
            made[task] = make_project(folder) if task is None else make_task_project(folder, task)
        return made[task]

    return project


def written(project: Path, task: str | None, name: str, **changes: Any) -> Path:
    settings = {**SHORT, "data__prepared": str(project / "data"), **changes}
    if task is None:
        return write_recipe(project, name, **settings)
    return write_task_recipe(project, task, name, **settings)


def terms_of(folder: Path) -> list[list[float]]:
    return [[line[name] for name in TERMS] for line in read_metrics(folder) if "loss" in line]


def with_filters_of(path: Path, other: Path) -> Path:
    """The recipe's run begins with Stage I of another run."""
    for side in ("teacher", "student"):
        source = other.with_suffix("") / f"{side}_filters"
        if source.exists():
            shutil.copytree(source, path.with_suffix("") / f"{side}_filters")
    return path


def tensors_of(cache: Path) -> dict[str, torch.Tensor]:
    """A cache's fields, whole."""
    shards = [load_file(path) for path in sorted(cache.glob("shard-*"))]
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}


SLOW = ("kd, replicated", "bfloat16", "kd, regression")


@pytest.mark.parametrize("case", [slow(case) if case in SLOW else case for case in CASES])
def test_the_losses_are_those_of_the_live_teacher(projects: Callable[..., Path], workers: Group, case: str) -> None:
    task, changes, ranks, overrides = CASES[case]
    project, name = projects(task), "-".join(case.replace(",", "").split())
    live = written(project, task, f"live-{name}", **changes)
    workers(ranks).run(pretrain_recipe, live, overrides)
    changes = {**changes, "teacher__cache": str(project / f"cache-{name}")}
    recorded = with_filters_of(written(project, task, f"recorded-{name}", **changes), live)
    workers(ranks).run(in_small_shards, recorded, SMALL, overrides)
    read = with_filters_of(written(project, task, f"read-{name}", **changes), live)
    # a regression compares the rows of a step: one micro-batch a rank, whatever the recipe says
    whole = ("--train.micro_batch_size=8",) if task == "stsb" and ranks == 2 else ()
    workers(3 - ranks).run(without_a_teacher, read, (*overrides, *whole))
    first, again, expected = (terms_of(path.with_suffix("")) for path in (recorded, read, live))
    assert len(expected) == 4 and len(list((project / f"cache-{name}").glob("shard-*"))) > (task != "stsb")
    if task is None:
        assert first == expected
    # rows of tasks are padded to other widths as they are recorded, which rounds otherwise, and Adam adds to it: its
    # first step has the whole rate however small a gradient is
    assert first[0] == pytest.approx(expected[0], rel=1e-6, abs=1e-7)
    rounding = 1e-5 if task is None else 5e-5
    assert first == [pytest.approx(terms, rel=rounding, abs=KL_ROUNDING) for terms in expected]
    # another number of ranks adds up in another order
    assert again == [pytest.approx(terms, rel=2 * rounding, abs=KL_ROUNDING) for terms in expected]


@pytest.fixture(scope="module")
def recorded(projects: Callable[..., Path], workers: Group) -> Path:
    """The recipe of a ted run whose cache, `cache` in its project, 2 ranks recorded."""
    project = projects()
    path = written(project, None, "recorded", teacher__cache=str(project / "cache"))
    workers(2).run(in_small_shards, path, SMALL)
    return path


def test_one_rank_records_the_same_and_the_size_is_as_predicted(recorded: Path, workers: Group) -> None:
    project = recorded.parent
    path = written(project, None, "alone", teacher__cache=str(project / "cache-alone"))
    workers(1).run(in_small_shards, with_filters_of(path, recorded), SMALL, REPLICATED)
    two, one = tensors_of(project / "cache"), tensors_of(project / "cache-alone")
    assert two.keys() == one.keys() == {"states.1", "states.3", "hidden"}
    assert all(torch.equal(two[name], one[name]) for name in two)
    manifest = Manifest.read(project / "cache/manifest.json")
    assert manifest is not None and len(two["hidden"]) == manifest.tokens
    files = sum(file.stat().st_size for file in (project / "cache").glob("*.*"))
    assert manifest.bytes() == pytest.approx(files, rel=0.006)  # the LM head alone is 0.01 of it
    assert not list((project / "cache").glob("*.tmp")) and not (project / "cache/manifest.unfinished.json").exists()


def test_a_cache_serves_methods_that_need_less_and_a_copy_of_the_teacher(recorded: Path, workers: Group) -> None:
    project = recorded.parent
    shutil.copytree(project / "teacher", project / "teacher-copy", dirs_exist_ok=True)
    changes = {"method": "kd", "teacher__model": str(project / "teacher-copy"), "seed": 3}
    live = written(project, None, "less-live", **changes)
    workers(1).run(pretrain_recipe, live)
    cached = written(project, None, "less", **changes, teacher__cache=str(project / "cache"))
    workers(1).run(without_a_teacher, cached)
    assert terms_of(project / "less") == [pytest.approx(terms, rel=1e-6) for terms in terms_of(project / "less-live")]


def test_a_top_k_is_recorded_in_place_of_hidden_states(recorded: Path, workers: Group) -> None:
    project = recorded.parent
    changes = {"method": "kd", "loss__kl_top_k": 7, "loss__temperature": 1.5}
    workers(1).run(pretrain_recipe, written(project, None, "top-live", **changes))
    top = written(project, None, "top", **changes, teacher__cache=str(project / "cache-top"))
    workers(2).run(pretrain_recipe, top)
    exact = written(project, None, "top-exact", **changes, teacher__cache=str(project / "cache"))
    workers(1).run(without_a_teacher, exact)
    live, kept, of_exact = (terms_of(project / name) for name in ("top-live", "top", "top-exact"))
    assert kept == [pytest.approx(terms, rel=1e-3) for terms in live]  # float16 log-probabilities
    assert of_exact == [pytest.approx(terms, rel=1e-6) for terms in live]
    assert tensors_of(project / "cache-top")["top_ids"].shape[1] == 7
    assert not (project / "cache-top/head.safetensors").exists()
    other = written(
        project, None, "top-other", **changes | {"loss__temperature": 2.0}, teacher__cache=str(project / "cache-top")
    )
    (message,) = workers(1).run(pretrain_error, other)
    assert "is a cache of another loss.temperature (1.5, this run's 2.0): give another teacher.cache" in message


OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "teacher": ({"teacher__model": "other-teacher"}, "is a cache of another teacher ({project}/teacher, weights "),
    "data": ({"data__sequence_length": 10, "data__prepared": None}, "is a cache of other training data ("),
    "filters": ({"filters__steps": 2}, "is a cache of other filters ("),
    "unfiltered": ({"method": "lwd"}, "this run's none, as lwd)"),
    "dtype": ({"teacher__dtype": "bfloat16"}, "is a cache of another teacher.dtype (float32, this run's bfloat16)"),
    "blocks": ({"filters__layer_map": [[0, 2]]}, ""),
}


@pytest.mark.parametrize("other", OTHER)
def test_a_cache_of_something_else_is_refused(recorded: Path, workers: Group, other: str) -> None:
    project = recorded.parent
    changes, message = OTHER[other]
    if "teacher__model" in changes:
        tiny_model("llama", blocks=4, vocab=61, seed=9).save_pretrained(project / "other-teacher")
        changes = {"teacher__model": str(project / "other-teacher")}
    path = written(project, None, f"other-{other}", **changes, teacher__cache=str(project / "cache"))
    if other in ("filters", "blocks"):  # learnt without the cache, whose own they would be otherwise
        workers(2).run(pretrain_recipe, path, ("--teacher.cache=null",), "filters")
    elif other in ("teacher", "data", "dtype"):
        with_filters_of(path, recorded)
    for said in workers(2).run(pretrain_error, path):
        assert f"{project}/cache is a cache " in said and message.format(project=project) in said
        assert "give another teacher.cache, or " in said and "\n" not in said
        assert (other == "filters") <= ("or delete teacher_filters in output_dir to take the cache's" in said)


def test_filters_come_with_the_cache(recorded: Path, workers: Group) -> None:
    """A run of another seed has the first one's teacher filters, and loads no teacher; other settings are refused."""
    project = recorded.parent
    path = written(project, None, "seed-1", seed=1, teacher__cache=str(project / "cache"))
    workers(2).run(without_a_teacher, path)
    first, own = (load_file(project / name / "teacher_filters/filters.safetensors") for name in ("recorded", "seed-1"))
    assert all(torch.equal(first[name], own[name]) for name in first) and len(terms_of(project / "seed-1")) == 4
    student = [load_file(project / name / "student_filters/filters.safetensors") for name in ("recorded", "seed-1")]
    assert not torch.equal(student[0]["0.weight"], student[1]["0.weight"])
    path = written(project, None, "longer", filters__steps=9, teacher__cache=str(project / "cache"))
    for message in workers(2).run(pretrain_error, path):
        assert "teacher_filters was learnt with filters.steps 3, this run has 9: give another teacher.cache" in message


def test_a_cache_without_what_is_needed_is_refused(recorded: Path, workers: Group) -> None:
    project = recorded.parent
    (project / "cache-kd").mkdir()
    path = written(project, None, "kd", method="kd", teacher__cache=str(project / "cache-kd"))
    workers(1).run(pretrain_recipe, path)
    path = with_filters_of(written(project, None, "more", teacher__cache=str(project / "cache-kd")), recorded)
    (message,) = workers(1).run(pretrain_error, path)
    assert "is a cache without states.1, states.3 (it holds hidden), which this run's loss needs" in message


def test_a_torn_cache_is_refused(recorded: Path, workers: Group) -> None:
    project = recorded.parent
    shutil.copytree(project / "cache", project / "torn")
    path = with_filters_of(written(project, None, "torn-run", teacher__cache=str(project / "torn")), recorded)
    shard = project / "torn/shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    assert "shard-00001.safetensors has 1000 of " in workers(1).run(pretrain_error, path)[0]
    (project / "torn/manifest.json").write_text("{")
    assert "is no manifest of a teacher cache" in workers(1).run(pretrain_error, path)[0]
    (project / "torn/manifest.json").unlink()
    assert "holds parts of another cache" in workers(1).run(pretrain_error, path)[0]


def test_an_interrupted_recording_goes_on(recorded: Path, workers: Group) -> None:
    project, cache = recorded.parent, recorded.parent / "interrupted"
    path = with_filters_of(written(project, None, "interrupted-run", teacher__cache=str(cache)), recorded)
    for message in workers(2).run(full_while_recording, path, SMALL, 1):
        assert f"teacher.cache {cache} could not be written" in message and "finished shards are kept" in message
    finished = {shard: shard.stat().st_mtime_ns for shard in cache.glob("shard-*.safetensors")}
    assert not (cache / "manifest.json").exists() and len(finished) == 3
    other = written(project, None, "interrupted-kd", method="kd", teacher__cache=str(cache))
    assert "holds parts of another cache" in workers(1).run(pretrain_error, other)[0]
    workers(1).run(in_small_shards, path, SMALL)
    assert all(shard.stat().st_mtime_ns == time for shard, time in finished.items())
    whole = tensors_of(project / "cache")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in tensors_of(cache).items())


def test_a_cache_that_does_not_fit_on_the_disk_is_not_begun(recorded: Path, workers: Group) -> None:
    project, cache = recorded.parent, recorded.parent / "too-large"
    path = with_filters_of(written(project, None, "too-large-run", teacher__cache=str(cache)), recorded)
    for message in workers(2).run(on_a_small_disk, path, 300_000):
        assert "would take 0.3" in message and "but 0.29 MiB are free: make room" in message
    assert not list(cache.glob("*.safetensors"))


def test_jobs_that_start_at_once_record_once(recorded: Path) -> None:
    project = recorded.parent
    paths = [
        written(project, None, f"array-{i}", teacher__cache=str(project / "array"), seed=i, train__steps=2)
        for i in range(2)
    ]
    jobs = [Workers(1) for _ in paths]
    try:
        with ThreadPoolExecutor(2) as threads:
            counts = list(threads.map(lambda job, path: job.run(recordings, path)[0], jobs, paths))
    finally:
        for job in jobs:
            job.close()
    assert sorted(counts) == [0, 1]
    filters = [load_file(project / f"array-{i}/teacher_filters/filters.safetensors") for i in range(2)]
    assert all(torch.equal(filters[0][name], filters[1][name]) for name in filters[0])
    assert all(len(terms_of(project / f"array-{i}")) == 2 for i in range(2))
