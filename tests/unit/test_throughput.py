"""The report of `ted-ds bench`, and how it decides on sizes, without an engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ted_ds.config.schema import RunConfig
from ted_ds.doctor import throughput
from ted_ds.doctor.throughput import Measured, Throughput
from ted_ds.doctor.throughput_report import write_report
from ted_ds.errors import TedError


def measured(size: int, a_rank: float = 100.0, **changes: Any) -> Measured:
    found = Measured(size, 8 // size, 10.0, 2.0, 12.0, a_rank, a_rank, 0.25, 1.0 + size, None, {})
    return replace(found, **changes)


def recipe(**changes: Any) -> RunConfig:
    data = {"train": ["none"], "tokenizer": "none", "sequence_length": 16}
    train = {"steps": 10, "global_batch_size": 8, "micro_batch_size": 2}
    return RunConfig(
        **{"output_dir": "out", "method": "ce", "student": {"model": "s"}, "data": data, "train": train} | changes
    )


def test_reports_of_one_recipe_make_a_table_of_scaling(tmp_path: Path) -> None:
    def report(ranks: int, a_rank: float, run: RunConfig) -> str:
        fastest = measured(2, a_rank, tokens_per_second=ranks * a_rank)
        return write_report(Throughput("cpu", ranks, [fastest], fastest, "the end", None, 1.5), run, {}, tmp_path)

    assert "efficiency" not in report(1, 100.0, recipe())
    other_size = recipe(train={"steps": 10, "global_batch_size": 8, "micro_batch_size": 4})
    lines = report(4, 80.0, other_size).splitlines()
    assert [line.split() for line in lines[-4:-2]] == [
        ["1", "2", "100", "100", "100.0%", "25.0%", "3.00", "-"],
        ["4", "2", "320", "80", "80.0%", "25.0%", "3.00", "-"],
    ]
    assert "efficiency" not in report(2, 90.0, recipe(seed=1))
    assert {file.name for file in tmp_path.glob("*.png")} == {f"ranks-{n}.png" for n in (1, 2, 4)} | {"scaling.png"}


def bench(monkeypatch: pytest.MonkeyPatch, fits: int, ranks: int = 1) -> Any:
    """A bench whose device has room for `fits` rows, each of which takes 1 GiB."""
    world = SimpleNamespace(size=ranks, device=torch.device("cpu"))
    engine = SimpleNamespace(train=lambda: None)
    run: Any = recipe().resolved(100)
    found = throughput._Bench(run, world, None, SimpleNamespace(pairs=None), engine, 1)

    def measure(size: int) -> Measured:
        if size > fits:
            raise torch.OutOfMemoryError("out of memory")
        return measured(size, 100.0 + size)

    monkeypatch.setattr(found, "_measure", measure)
    monkeypatch.setattr(throughput, "available_bytes", lambda world: (5 if fits == 2 else 100) * 2**30)
    return found


def test_sizes_divide_the_ranks_part_and_have_the_recipes_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    found = bench(monkeypatch, fits=8).measured()
    assert [one.micro_batch_size for one in found.sizes] == [1, 2, 4, 8] and found.fastest.micro_batch_size == 8
    run: Any = recipe(train={"steps": 1, "global_batch_size": 18, "micro_batch_size": 3}).resolved(100)
    world = SimpleNamespace(size=1, device=torch.device("cpu"))
    other = throughput._Bench(run, world, None, SimpleNamespace(pairs=None), SimpleNamespace(train=lambda: None), 1)
    assert list(other._candidates()) == [1, 2, 3]


def test_memory_that_ends_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = bench(monkeypatch, fits=2).measured()
    assert found.ended == "4 rows would take about 5.0 of 5.0 GiB"
    assert bench(monkeypatch, fits=1).measured().ended == "2 rows do not fit"
    with pytest.raises(TedError, match="micro-batches of 1 rows do not fit"):
        bench(monkeypatch, fits=0).measured()
    with pytest.raises(TedError, match="micro-batches of 2 rows do not fit"):
        bench(monkeypatch, fits=1, ranks=2).measured()


def test_times_that_overlap_count_once() -> None:
    assert throughput._union([(0.0, 2.0), (1.0, 1.5), (1.0, 3.0), (5.0, 6.0)]) == 4.0
