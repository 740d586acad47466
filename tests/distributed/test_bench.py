"""`ted-ds bench`: what it measures of a recipe, on 1 and 2 ranks, and what it leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.jobs import pretrain_recipe, throughput_of
from tests.project import SEQUENCE, make_project, write_recipe
from tests.task_project import make_task_project, write_task_recipe
from tests.workers import Workers

Group = Callable[[int], Workers]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("throughput"))


def test_a_recipe_is_measured_over_sizes_and_ranks(project: Path, workers: Group) -> None:
    """Of a student that Stage 0 has yet to cut, and data that are not prepared."""
    path = write_recipe(project, "measured", student={"dtype": "float32", "init": {"num_blocks": 2}})
    for ranks, sizes in ((1, [1, 2, 4]), (2, [1, 2])):
        found, steps, text = workers(ranks).run(throughput_of, path)[0]
        assert [one.micro_batch_size for one in found.sizes] == sizes
        assert all(made == 1 for _, made, _ in steps)  # an optimizer step each, of one micro-batch or two
        assert {(count, fade) for count, _, fade in steps} == {(1, 1.0), (2, 1.0), (1, 0.0), (2, 0.0)}
        for one in [*found.sizes, found.faded]:
            assert one.micro_batches * one.micro_batch_size * ranks == 4
            assert one.tokens_per_second == pytest.approx(4 * SEQUENCE * 1e3 / one.step_ms)
            assert one.a_rank == pytest.approx(one.tokens_per_second / ranks)
            assert (one.communication is None) == (ranks == 1) and one.mfu is None
        if ranks == 2:
            assert all(0 < one.communication <= 1 for one in found.sizes)
        assert all(one.phase_ms["teacher_forward"] > 0 for one in found.sizes)
        half = (found.fastest.step_ms + found.faded.step_ms) / 2
        assert found.hours == pytest.approx(10 * half / 3.6e6)  # 10 steps, half of them with the layer loss
        assert f"fastest: --train.micro_batch_size={found.fastest.micro_batch_size}" in text
    assert "efficiency" in text
    left = {file.name for file in (project / "measured").rglob("*") if file.is_file()}
    assert left == {"ranks-1.json", "ranks-1.png", "ranks-2.json", "ranks-2.png", "scaling.png"}
    assert json.loads((project / "measured/bench/ranks-2.json").read_text())["ranks"] == 2
    # the run itself begins as if nothing had been there
    assert workers(1).run(pretrain_recipe, path, ("--train.steps=1", "--filters.steps=1"))[0]["steps"] == 1


@pytest.mark.parametrize("method", ["ce", "lwd"])
def test_other_methods_are_measured(project: Path, workers: Group, method: str) -> None:
    path = write_recipe(project, f"by_{method}", method=method)
    found, *_ = workers(1).run(throughput_of, path)[0]
    assert (found.faded is None) == (method != "lwd")
    assert (found.fastest.phase_ms["teacher_forward"] > 0) == (method != "ce")


def test_a_labelled_task_reads_its_own_rows(tmp_path: Path, workers: Group) -> None:
    project = make_task_project(tmp_path, "sst2")
    found, *_ = workers(2).run(throughput_of, write_task_recipe(project, "sst2", "measured"))[0]
    assert found.fastest.tokens_per_second > 0


def test_it_ends_before_memory_does(project: Path, workers: Group) -> None:
    path = write_recipe(project, "tight")
    found, *_, text = workers(1).run(throughput_of, path, (), 1e-3)[0]
    assert [one.micro_batch_size for one in found.sizes] == [1, 2] and "4 rows would take about" in text


def test_a_cache_is_refused_and_nothing_is_left(project: Path, workers: Group) -> None:
    path = write_recipe(project, "cached", teacher__cache=str(project / "cache"))
    with pytest.raises(AssertionError, match=r"give --teacher\.cache=null"):
        workers(1).run(throughput_of, path)
    assert not (project / "cached").exists()
