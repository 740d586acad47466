"""The commands as a user starts them: a process of their own, real launchers, two ranks."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.utils.distributed import get_free_port
from transformers import AutoModelForCausalLM, AutoTokenizer

from ted_ds.cli.report import main as report
from tests.marks import slow
from tests.project import make_project, write_recipe

ROOT = Path(__file__).parents[2]
TED_DS = [sys.executable, "-m", "ted_ds.cli.main"]
BIN = Path(sys.executable).parent
PORT = str(get_free_port())  # the launchers' own default would be that of the tests beside these
DEEPSPEED = [BIN / "deepspeed", "--num_gpus", "2", "--master_port", PORT]

LAUNCHERS = {
    "bash": ["bash", "launchers/pretrain.sh"],
    "deepspeed --no_python": [*DEEPSPEED, "--no_python", "launchers/pretrain.sh"],
    "torchrun": [BIN / "torchrun", "--standalone", "--nproc_per_node", "2", "launchers/pretrain.sh"],
}
"""bash starts deepspeed itself, on the file as Python; what else each of them does, a stub shows in test_launcher."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("commands"))


def run(*command: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"TED_DS_RANKS": "2", "MASTER_PORT": PORT}
    done = subprocess.run(
        [str(word) for word in command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("other", [slow("deepspeed --no_python"), slow("torchrun")])
def test_every_launcher_runs_the_same_job_and_does_not_start_over(project: Path, other: str) -> None:
    losses = {}
    for name, command in [("bash", LAUNCHERS["bash"]), (other, LAUNCHERS[other])]:
        folder = project / name.split()[-1].strip("-")
        path = write_recipe(project, folder.name, method="kd", data__prepared=str(project / "data"))
        run(*command, "--config", path, "--train.steps=3")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [line.get("loss") for line in lines]
    assert len(losses["bash"]) == 4
    assert all(values == losses["bash"] for values in losses.values())
    before = (project / "bash/metrics.jsonl").read_text()
    # the file is Python as well: started by itself it is one rank, and spares DeepSpeed's own start
    again = run(sys.executable, "launchers/pretrain.sh", "--config", project / "bash.yaml", "--train.steps=3")
    assert "is complete (3 steps); nothing to do" in again.stdout + again.stderr
    assert (project / "bash/metrics.jsonl").read_text() == before


def test_a_wrong_recipe_is_one_line_and_exit_code_2(project: Path) -> None:
    path = write_recipe(project, "wrong", method="kd", loss__mse_alpha=5.0)
    done = run(*TED_DS, "distill", "--config", path, "--trian.steps=3", code=2)
    assert "trian: unknown key" in done.stderr and "Traceback" not in done.stderr


def test_stages_one_at_a_time(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(project, "stages")
    run(*TED_DS, "init-student", "--config", path)
    assert (project / "stages/initial_student/model.safetensors").exists()
    run(*TED_DS, "learn-filters", "--config", path)
    assert (project / "stages/student_filters/filters.safetensors").exists()
    assert not (project / "stages/metrics.jsonl").exists()
    summary = json.loads(run(*TED_DS, "distill", "--config", path).stdout)
    assert summary["steps"] == 10
    assert report([str(project / "stages")]) == 0
    assert capsys.readouterr().out.splitlines()[2].split()[:3] == ["stages", "ted", "10"]


def test_prepare_trains_a_tokenizer_and_packs(tmp_path: Path) -> None:
    text = "".join(f"the {a} {b}\n" for a in ("cat", "dog", "bird") * 40 for b in ("sits", "runs", "flies"))
    (tmp_path / "text.txt").write_text(text)
    options = [f"--data.tokenizer={tmp_path}/tok", f"--data.prepared={tmp_path}/data", "--data.sequence_length=16"]
    done = run(*TED_DS, "prepare", tmp_path / "text.txt", "--train-tokenizer", "300", *options)
    assert "blocks of 16 tokens" in done.stdout
    assert json.loads((tmp_path / "data/train/manifest.json").read_text())["documents"] == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "tok").vocab_size == 300


def test_evaluate_agrees_with_a_plain_loop(project: Path, tmp_path: Path) -> None:
    passages = ["w1 w2 w3 w4", "w5 w6 w7"]
    (tmp_path / "lambada.txt").write_text("\n".join(passages))
    command = [*TED_DS, "evaluate", project / "teacher", "--tokenizer", project / "tokenizer"]
    data = ["--data", project / "validation.txt", "--lambada", tmp_path / "lambada.txt", "--sequence-length", "12"]
    found = json.loads(run(*command, *data).stdout)
    model = AutoModelForCausalLM.from_pretrained(project / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(project / "tokenizer")
    stream = tokenizer((project / "validation.txt").read_text())["input_ids"] + [tokenizer.eos_token_id]
    nll = 0.0
    with torch.no_grad():
        for start in range(0, len(stream), 12):
            scores = model(torch.tensor([stream[start : start + 12]])).logits[0].double().log_softmax(-1)
            following = stream[start + 1 : start + 13]
            nll -= float(scores[range(len(following)), following].sum())
        word_nll, hits = 0.0, 0
        for passage in passages:
            ids = tokenizer(passage)["input_ids"]
            last = model(torch.tensor([ids[:-1]])).logits[0, -1].double().log_softmax(-1)
            word_nll -= float(last[ids[-1]])
            hits += int(last.argmax()) == ids[-1]
    assert found["perplexity"] == pytest.approx(math.exp(nll / (len(stream) - 1)), rel=1e-5)
    text = (project / "validation.txt").read_text()
    assert (found["words"], found["bytes"]) == (len(re.split(r"\s+", text)), len(text))
    assert found["documents_begin_with"] is None and found["documents"] == 1
    assert found["lambada_perplexity"] == pytest.approx(math.exp(word_nll / 2), rel=1e-5)
    assert found["lambada_accuracy"] == hits / 2
