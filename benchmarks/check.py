"""`make bench-check`: the CPU ratios of today against the committed ones; a loss of more than 15% fails.

Ratios within one run vary less than absolute times, but another processor has others: fused / GEMMs is 1.20 on an
EPYC and 1.43 on a Xeon with AVX-512. So they are compared with results of this kind of machine; if none are
committed, it says so and passes. Machines are noisy: what fails is measured again, up to three times in all, and of
every ratio the best counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import table
from benchmarks.timing import environment

RATIOS = {
    "ops": ("time_ratio_fused_to_naive", "time_ratio_fused_to_gemms", "extra_memory_ratio_fused_to_naive"),
    "step": ("time_ratio", "memory_ratio"),
    "engine": ("host_ratio_zero3", "host_ratio_replicated", "host_ratio_zero1"),
}
"""Benchmark -> fields of its report, of which less is better."""

LARGEST_LOSS = 0.15
RUNS = 3
RESULTS = Path(__file__).parent / "results"

KIND = ("device", "cpu", "cores", "cpu_capability")
"""Fields of a report's environment that make one kind of machine."""

Ratios = dict[str, float]
Measure = Callable[[str], Mapping[str, Any]]


def ratios_of(benchmark: str, report: Mapping[str, Any]) -> Ratios:
    """The ratios of a report; SystemExit where one is missing."""
    missing = [name for name in RATIOS[benchmark] if name not in report]
    if missing:
        raise SystemExit(f"the report of benchmarks.{benchmark} has no {missing[0]}: measure and commit it anew")
    return {name: float(report[name]) for name in RATIOS[benchmark]}


def results_for(here: Mapping[str, Any], results: Path = RESULTS) -> Path | None:
    """The first folder in `results` whose reports were all measured on the kind of machine `here`; None: there is none.

    here: an `environment`. A field that a report does not have, since it is older than the field, does not count.
    """
    for folder in sorted(results.iterdir()):
        paths = [folder / f"{benchmark}.json" for benchmark in RATIOS]
        if all(path.is_file() and _same_kind(_read(path)["environment"], here) for path in paths):
            return folder
    return None


def _same_kind(there: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    return all(there.get(name, here[name]) == here[name] for name in KIND)


def _read(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def losses(committed: Mapping[str, float], measured: Mapping[str, float]) -> Ratios:
    """Name -> by which share a ratio is worse than the committed one, of those worse by more than `LARGEST_LOSS`."""
    loss = {name: measured[name] / before - 1 for name, before in committed.items()}
    return {name: value for name, value in loss.items() if value > LARGEST_LOSS}


def best_of_runs(benchmark: str, committed: Mapping[str, float], measure: Measure) -> Ratios:
    """The best of each ratio over as many runs as it takes to lose nothing, `RUNS` at most."""
    best = dict.fromkeys(committed, float("inf"))
    for _ in range(RUNS):
        now = ratios_of(benchmark, measure(benchmark))
        best = {name: min(value, now[name]) for name, value in best.items()}
        if not losses(committed, best):
            break
    return best


def run_benchmark(benchmark: str) -> Mapping[str, Any]:
    """One run in a process of its own, on the CPU, of the numbers that are compared."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        command = [sys.executable, "-m", f"benchmarks.{benchmark}", "--gate", "--device", "cpu", "--json", str(path)]
        subprocess.run(command, check=True, cwd=Path(__file__).parent.parent)
        return _read(path)


def compare(folder: Path, measure: Measure) -> tuple[list[dict[str, Any]], bool]:
    """(a row a ratio, whether none lost too much)."""
    rows = []
    for benchmark in RATIOS:
        committed = ratios_of(benchmark, _read(folder / f"{benchmark}.json"))
        measured = best_of_runs(benchmark, committed, measure)
        lost = losses(committed, measured)
        rows += [
            {
                "benchmark": benchmark,
                "ratio": name,
                "committed": before,
                "now": measured[name],
                "change": f"{100 * (measured[name] / before - 1):+.1f}%",
                "verdict": "LOSS" if name in lost else "ok",
            }
            for name, before in committed.items()
        ]
    return rows, all(row["verdict"] == "ok" for row in rows)


def main(argv: Sequence[str] | None = None, measure: Measure = run_benchmark) -> int:
    """Prints the comparison; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, help="reports to compare with; default: this kind of machine's")
    here = environment(torch.device("cpu"), "check", [])
    folder = parser.parse_args(argv).results or results_for(here)
    if folder is None:
        print(_nothing_to_compare(here))
        return 0
    rows, passed = compare(folder, measure)
    print(table(rows, ("benchmark", "ratio", "committed", "now", "change", "verdict")))
    for row in rows:
        if row["verdict"] != "ok":
            print(
                f"benchmarks.{row['benchmark']}: {row['ratio']} is {row['now']:.3f}, committed {row['committed']:.3f}: "
                f"{row['change']}, and +{100 * LARGEST_LOSS:.0f}% is allowed",
                file=sys.stderr,
            )
    if not passed:
        load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
        print(f"load {load:.1f} on {cores} cores: ratios hold only where nothing else runs", file=sys.stderr)
    return 0 if passed else 1


def _nothing_to_compare(here: Mapping[str, Any]) -> str:
    commands = [
        f"    python -m benchmarks.{name} --device cpu --json benchmarks/results/MACHINE/{name}.json" for name in RATIOS
    ]
    kind = ", ".join(f"{name} {here[name]}" for name in KIND)
    said = f"no committed results of this kind of machine ({kind}): nothing was compared. To record them, then commit:"
    return "\n".join([said, *commands])


if __name__ == "__main__":
    sys.exit(main())
