"""`make bench-check`: the CPU ratios of today against the committed ones; a loss of more than 15% fails.

Ratios within one run hold where absolute times do not, on another machine too, if roughly. Machines are noisy: what
fails is measured again, up to three times in all, and of every ratio the best counts.
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

from benchmarks.report import table

RATIOS = {
    "ops": ("time_ratio_fused_to_naive", "time_ratio_fused_to_gemms", "extra_memory_ratio_fused_to_naive"),
    "step": ("time_ratio", "memory_ratio"),
}
"""Benchmark -> fields of its report, of which less is better."""

LARGEST_LOSS = 0.15
RUNS = 3
COMMITTED = Path(__file__).parent / "results" / "cpu-epyc-2-cores"

Ratios = dict[str, float]
Measure = Callable[[str], Mapping[str, Any]]


def ratios_of(benchmark: str, report: Mapping[str, Any]) -> Ratios:
    """The ratios of a report; SystemExit where one is missing."""
    missing = [name for name in RATIOS[benchmark] if name not in report]
    if missing:
        raise SystemExit(f"the report of benchmarks.{benchmark} has no {missing[0]}: measure and commit it anew")
    return {name: float(report[name]) for name in RATIOS[benchmark]}


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
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def compare(folder: Path, measure: Measure) -> tuple[list[dict[str, Any]], bool]:
    """(a row a ratio, whether none lost too much)."""
    rows = []
    for benchmark in RATIOS:
        committed = ratios_of(benchmark, json.loads((folder / f"{benchmark}.json").read_text(encoding="utf-8")))
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
    parser.add_argument("--results", type=Path, default=COMMITTED, help="folder of the committed reports")
    rows, passed = compare(parser.parse_args(argv).results, measure)
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


if __name__ == "__main__":
    sys.exit(main())
