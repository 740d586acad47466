"""The README's first command, with little to do: real launchers, one rank."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

SMALL = (
    *("--train.steps=2", "--filters.steps=2", "--optimizer.warmup_steps=0", "--data.train_tokenizer=300"),
    *("--data.sequence_length=128", "--data.processes=1", "--logging.tensorboard=false", "--loss.layer_fade=0"),
)


def test_quickstart_trains_a_teacher_and_a_student_by_each_method(tmp_path: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choice("abcdefghij") for _ in range(draw.randint(2, 7))) for _ in range(200)]
    (tmp_path / "corpus").mkdir()
    for split, documents in (("train", 60), ("validation", 5)):
        rows = [json.dumps({"text": " ".join(draw.choices(words, k=60))}) for _ in range(documents)]
        (tmp_path / f"corpus/{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "ted_ds.cli.main", "quickstart", "--folder", str(tmp_path), "--ranks", "1", *SMALL]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "report.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["run", "teacher", "initial", "ce", "kd", "lwd", "ted"]
    perplexities = [float(line.split()[-3]) for line in lines[3:]]
    assert all(1 < value < 1e4 for value in perplexities)
    summaries = {m: json.loads((tmp_path / m / "summary.json").read_text()) for m in ("ce", "kd", "lwd", "ted")}
    assert {m: s["final_layer_loss"] > 0 for m, s in summaries.items()} == {
        "ce": False,
        "kd": False,
        "lwd": True,
        "ted": True,
    }
    assert (tmp_path / "ted/student/model.safetensors").exists()
