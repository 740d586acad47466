"""The benchmarks run and leave their reports; their arithmetic (bytes, FLOPs, the gate) is right. No time is held."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import check, data, gemms, memory, ops, scaling, step
from benchmarks.collectives import theory
from benchmarks.flops import step_flops
from benchmarks.memory import Point
from benchmarks.shapes import SHAPES, Shape, Side
from benchmarks.timing import environment

CPU = torch.device("cpu")


def report_of(main: Callable[[list[str]], Any], folder: Path, options: str) -> dict[str, Any]:
    """The report of a run, whose PNG is there too."""
    path = folder / "report.json"
    main(["--device", "cpu", "--json", str(path), *options.split()])
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    report: dict[str, Any] = json.loads(path.read_text())
    assert str(folder) not in json.dumps(report)
    return report


@pytest.fixture
def peaks_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps whose peak is asked for run in this process and "need" 8 MiB: a process of their own takes seconds."""

    def run(make_step: Callable[..., Callable[[], Any]], *arguments: Any, device: torch.device) -> float:
        make_step(*arguments)()
        return 8.0

    for module in (ops, step):
        monkeypatch.setattr(module, "step_peak_mib", run)


def test_ops_runs_every_size_and_says_what_it_skips(tmp_path: Path, peaks_here: None) -> None:
    report = report_of(ops.main, tmp_path, "--tokens 7 12 --width 8 --vocab 33 40 --repeats 1")

    assert [(r["tokens"], r["vocab"]) for r in report["ops"] if r["implementation"] == "fused"] == [
        *[(7, 33), (7, 40), (12, 33), (12, 40)],
        *[(7, None), (12, None)],
    ]
    assert all(("ms" in row) != bool(row["skipped"]) for row in report["ops"])
    two_passes = [row["skipped"] for row in report["ops"] if row["implementation"] == "liger ce, kl"]
    assert len(two_passes) == 4 and all(two_passes)
    assert report["extra_memory_ratio_fused_to_naive"] == 1.0
    assert set(check.RATIOS["ops"]) <= report.keys()


def test_gemms_times_every_variant_of_every_vocabulary(tmp_path: Path) -> None:
    rows = report_of(gemms.main, tmp_path, "--tokens 8 --width 8 --vocab 33 40 --repeats 1")["gemms"]
    assert [row["vocab"] for row in rows] == [33] * 5 + [40] * 5
    assert [row["variant"] for row in rows if "copy" in row] == ["padded"] * 2


@pytest.mark.parametrize("op", [ops.CE_KL, ops.LAYER])
def test_ops_compares_what_computes_the_same(op: str) -> None:
    sizes = ops.Sizes(tokens=9, width=8, vocab=21, dtype="float64", device="cpu")
    gradients = []
    name = "make_inputs" if op == ops.CE_KL else "make_pair"
    make = getattr(ops, name)
    for kind in ("naive", "fused"):
        inputs = make(sizes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ops, name, lambda sizes, inputs=inputs: inputs)
            ops.implementations(op, None)[kind](sizes)()
        leaves = [inputs.hidden_s, inputs.weight_s] if op == ops.CE_KL else [inputs.hidden, inputs.weight, inputs.bias]
        gradients.append([leaf.grad for leaf in leaves])

    for naive, fused in zip(*gradients, strict=True):
        torch.testing.assert_close(fused, naive, rtol=1e-4, atol=1e-5)  # naive reduces in float32


@pytest.mark.slow
def test_step_measures_methods_with_and_without_checkpointing(tmp_path: Path, peaks_here: None) -> None:
    report = report_of(step.main, tmp_path, "--size tiny --repeats 1")

    methods = ["ce", "kd", "lwd", "ted", "ted mse"]
    cached = ["ted cached", "ted cached top 64"]
    names = ["plain", "teacher", *methods, *cached, *(f"naive {method}" for method in methods)]
    assert [(row["step"], row["checkpointing"]) for row in report["steps"]] == [
        *((name, False) for name in names),
        *((name, True) for name in names),
    ]
    assert all(report[name] > 0 for name in step.COMPARED)
    assert report["memory_ratio"] == 1.0
    assert report["shape"]["student"]["parameters"] == 2 * 512 * 32 + 2 * (4 * 32**2 + 3 * 32 * 128 + 2 * 32) + 32


@pytest.mark.parametrize("method", ["ce", "kd"])
def test_naive_steps_have_the_gradients_of_ted_ds(method: str) -> None:
    gradients = []
    for make in (step.own_step, step.naive_step):
        models = step.prepared(SHAPES["tiny"], CPU, checkpointing=False)
        make(models, method)()
        gradients.append({name: p.grad for name, p in models.student.named_parameters()})

    for name, own in gradients[0].items():
        torch.testing.assert_close(own, gradients[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_memory_measures_points_of_every_axis(tmp_path: Path) -> None:
    options = "--blocks 2 --pairs 1 2 --width 64 --vocab 256 --sequence 32"
    report = report_of(memory.main, tmp_path, options)

    assert [(row["axis"], row["pairs"]) for row in report["points"]] == [("pairs", 1), ("pairs", 2)]
    assert all(row["peak_mib"] > row["weights_mib"] > 0 for row in report["points"])
    assert report["flatness_over_pairs"] == memory.flatness(report["points"])


def test_memory_counts_what_has_to_grow() -> None:
    side = Side(4, 64, 256, 1, 1)
    point = Point(Shape(side, side, 100, 2, 32, "float32", tied=False), pairs=2)
    rows = [{"axis": "pairs", "peak_mib": p, "residuals_mib": r} for p, r in ((100.0, 10.0), (130.0, 20.0))]

    assert point.layer_map == ((1, 1), (3, 3))
    assert point.residuals_mib == 2 * 64 * 64 * 4 / 2**20
    model = 2 * 100 * 64 + 4 * (4 * 64**2 + 3 * 64 * 256 + 2 * 64) + 64
    filters = 2 * (64 * 64 + 64)
    assert point.weights_mib == 3 * (model + filters) * 4 / 2**20
    assert memory.flatness(rows) == pytest.approx(110 / 90 - 1)
    assert memory.flatness(rows[:1]) is None


def test_data_prepares_loads_and_compares_with_a_step(tmp_path: Path) -> None:
    options = "--size tiny --mib 0.3 --vocab 600 --repeats 1"
    report = report_of(data.main, tmp_path, options)

    (row,) = report["prepare"]
    assert row["processes"] == 1
    assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["seconds"])
    assert 0 < report["load_share_of_step"] < 1


@pytest.mark.slow
def test_scaling_moves_the_bytes_of_the_theory(tmp_path: Path) -> None:
    options = "--ranks 2 --steps 1 --blocks 2 --width 64 --vocab 512 --sequence 16"
    report = report_of(scaling.main, tmp_path, options)

    (row,) = report["ranks"]
    # blocks of q, k, v, o and three FFN matrices and two norms; embedding, LM head, last norm; one pair's filters
    model = {blocks: blocks * (4 * 64**2 + 3 * 64 * 256 + 2 * 64) + 2 * 512 * 64 + 64 for blocks in (1, 2)}
    student, teacher = (4 * (model[blocks] + 64 * 64 + 64) for blocks in (1, 2))
    assert row["parameter_bytes"] == {"student": student, "teacher": teacher}
    expected = {"student all_gather": 2 * student, "student reduce_scatter": student, "teacher all_gather": teacher}
    assert {name: part["theory_bytes"] for name, part in row["collectives"].items()} == expected
    for name, size in expected.items():
        assert row["collectives"][name]["bytes"] == pytest.approx(size, rel=0.02), name
    assert row["surplus"] == []
    assert row["other_bytes"] < 1000
    assert {part["caller"] for part in row["other"]} >= {"ted_ds.job.world.sum"}


def test_theory_counts_a_shared_parameter_once() -> None:
    student = nn.Linear(3, 5)
    shared = nn.ModuleList([student, nn.Linear(3, 5, bias=False)])
    shared[1].weight = student.weight
    teacher = nn.Linear(7, 2).to(torch.bfloat16)

    assert theory(shared, teacher) == {
        ("all_gather", "student"): 2 * 4 * 20,
        ("reduce_scatter", ""): 4 * 20,
        ("all_gather", "teacher"): 2 * 16,
    }


@pytest.mark.parametrize("name", ["plain", "teacher", "naive ce", "naive lwd", "naive ted"])
def test_counted_flops_are_those_that_torch_counts(name: str) -> None:
    """Beyond the formula torch counts what attention's backward computes anew."""
    shape = SHAPES["tiny"]
    run = step.make_step(step.prepared(shape, CPU, checkpointing=False), name)
    with FlopCounterMode(display=False) as counter:
        run()
    by_op = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    products = sum(count for op, count in by_op.items() if "attention" not in op)
    whole = {
        side: side.blocks * 4 * shape.sequence**2 * side.width * shape.rows for side in (shape.teacher, shape.student)
    }
    attention = (name != "naive ce") * whole[shape.teacher] + (name != "teacher") * 3 * whole[shape.student]

    # some versions of transformers compute the angles of rotary embeddings as a GEMM
    assert products == pytest.approx(step_flops(name.removeprefix("naive "), shape) - attention, rel=1e-4)


def test_a_copy_says_of_which_commit_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMIT", "abc123")
    assert environment(CPU, "ops", [])["commit"] == "abc123"


def test_environment_keeps_no_absolute_path() -> None:
    told = environment(CPU, "ops", ["--json", "/somewhere/else/ops.json", "--repeats", "2"])
    assert told["command"] == "python -m benchmarks.ops --json ops.json --repeats 2"


COMMITTED = {
    "ops": dict.fromkeys(check.RATIOS["ops"], 0.5) | {"unit": "none"},
    "step": {"time_ratio": 1.0, "memory_ratio": 0.8},
    "engine": dict.fromkeys(check.RATIOS["engine"], 2.0),
}


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    for name, report in COMMITTED.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    return tmp_path


def runs_with(*reports: Mapping[str, float]) -> tuple[Callable[[str], Mapping[str, Any]], list[str]]:
    """A measurement of `step` that gives these changes in turn, and what was asked for."""
    left, asked = list(reports), []

    def measure(benchmark: str) -> Mapping[str, Any]:
        asked.append(benchmark)
        return COMMITTED[benchmark] | (left.pop(0) if benchmark == "step" else {})

    return measure, asked


def test_gate_passes_what_is_as_good(committed: Path) -> None:
    measure, asked = runs_with({"time_ratio": 1.149, "memory_ratio": 0.1})
    assert check.main(["--results", str(committed)], measure) == 0
    assert asked == ["ops", "step", "engine"]


def test_gate_takes_the_best_of_three(committed: Path) -> None:
    measure, asked = runs_with(
        {"time_ratio": 1.3}, {"time_ratio": 1.1, "memory_ratio": 0.99}, {"time_ratio": 9.0, "memory_ratio": 0.8}
    )
    assert check.main(["--results", str(committed)], measure) == 0
    assert asked == ["ops", "step", "step", "engine"], "each ratio was good once"


def test_gate_names_what_is_lost_and_by_how_much(committed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measure, asked = runs_with({"time_ratio": 1.4}, {"time_ratio": 1.2}, {"time_ratio": 1.3})
    assert check.main(["--results", str(committed)], measure) == 1
    assert asked == ["ops", "step", "step", "step", "engine"]
    said = capsys.readouterr()
    assert "benchmarks.step: time_ratio is 1.200, committed 1.000: +20.0%, and +15% is allowed" in said.err
    assert said.err.count("benchmarks.") == 1
    assert "where nothing else runs" in said.err
    assert said.out.count("LOSS") == 1


def test_gate_refuses_a_report_without_its_ratios(committed: Path) -> None:
    (committed / "ops.json").write_text(json.dumps({"time_ratio_fused_to_naive": 0.5}))
    with pytest.raises(SystemExit, match=r"benchmarks\.ops has no time_ratio_fused_to_gemms"):
        check.main(["--results", str(committed)], lambda benchmark: {})


EPYC = {"device": "cpu", "cpu": "AMD EPYC", "cores": 2, "cpu_capability": "AVX2"}


@pytest.mark.parametrize("benchmark", check.RATIOS)
def test_gate_knows_the_committed_results(benchmark: str) -> None:
    folder = check.results_for(EPYC)
    assert folder == check.RESULTS / "cpu-epyc-2-cores"
    report = json.loads((folder / f"{benchmark}.json").read_text())
    assert len(check.ratios_of(benchmark, report)) == len(check.RATIOS[benchmark])


def test_gate_compares_with_the_same_kind_of_machine_alone(tmp_path: Path) -> None:
    """Of two folders, one has but a part of the reports; a field that is younger than a report does not count."""
    older = {name: value for name, value in EPYC.items() if name != "cpu_capability"}
    for folder, told, names in (("a", EPYC, ["ops"]), ("b", older, list(check.RATIOS))):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / f"{name}.json").write_text(json.dumps({"environment": told}))
    assert check.results_for(EPYC, tmp_path) == tmp_path / "b"
    for other in ({"cpu": "Intel Xeon"}, {"cores": 64}, {"device": "cuda"}):
        assert check.results_for(EPYC | other, tmp_path) is None
    for name in check.RATIOS:
        (tmp_path / f"b/{name}.json").write_text(json.dumps({"environment": EPYC}))
    assert check.results_for(EPYC | {"cpu_capability": "AVX512"}, tmp_path) is None


def test_gate_measures_nothing_where_nothing_is_to_compare(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.timing._cpu_model", lambda: "Z80")
    assert check.main([], measure=lambda benchmark: pytest.fail("measured")) == 0
    said = capsys.readouterr().out
    assert "no committed results of this kind of machine (device cpu, cpu Z80, cores " in said
    assert "python -m benchmarks.ops --device cpu --json benchmarks/results/MACHINE/ops.json" in said
