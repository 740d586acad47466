"""A whole run: what it leaves behind, that it goes on where it was, and how it ends on bad input."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from ted_ds.telemetry.recorder import read_metrics
from tests.jobs import attention_of, full_disk, pretrain_error, pretrain_recipe, restored_logits, zero_timeout
from tests.project import VOCAB, make_project, write_recipe
from tests.tiny_models import tiny_model
from tests.workers import TIMEOUT_S, Workers

Group = Callable[[int], Workers]
LOSSES = ("step", "tokens", "loss", "pred_loss", "kl_loss", "layer_loss", "layer_losses", "lr", "validation_loss")

LOAD_ALONE = """
import sys, torch
sys.modules["ted_ds"] = None  # importing it fails from here on
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
torch.save(model(torch.load(sys.argv[2], weights_only=True)).logits.detach(), sys.argv[3])
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def finished(project: Path, workers: Group) -> Path:
    """The recipe of a finished run of 10 steps on 2 ranks, saved at 5 and 10."""
    path = write_recipe(project, "finished", optimizer__schedule="constant")
    workers(2).run(pretrain_recipe, path)
    return path


def losses_of(folder: Path) -> list[dict[str, object]]:
    return [{name: line[name] for name in LOSSES if name in line} for line in read_metrics(folder)]


def copied(project: Path, name: str, **changes: object) -> Path:
    """A copy of the finished run under another name, and its recipe."""
    path = write_recipe(project, name, optimizer__schedule="constant", **changes)
    shutil.copytree(project / "finished", project / name)
    return path


def test_the_folder_holds_what_is_promised(project: Path, finished: Path) -> None:
    folder = project / "finished"
    assert (folder / "checkpoints/latest").read_text() == "step-00000010"
    assert sorted(p.name for p in (folder / "checkpoints").glob("step-*")) == ["step-00000005", "step-00000010"]
    assert {p.name for p in (folder / "teacher_filters").iterdir()} >= {"filters.safetensors", "filters.json"}
    summary = json.loads((folder / "summary.json").read_text())
    last = read_metrics(folder)[-1]
    assert summary["steps"] == last["step"] == 10 and summary["tokens"] == last["tokens"] == 10 * 4 * 12
    assert summary["validation_perplexity"] == last["validation_perplexity"] < summary["initial_validation_perplexity"]
    assert {"grad_norm", "step_ms", "tokens_per_second", "mfu", "peak_memory_gib"} <= last.keys()
    for line in (last, *(read_metrics(folder / f"{side}_filters")[-1] for side in ("teacher", "student"))):
        assert line["model_tflops"] > 0 and line["mfu"] is None  # counted, but the CPU's peak is not known
        assert min(line["phase_ms"].values()) > 0 and sum(line["phase_ms"].values()) <= line["step_ms"]
    assert "environment" in (folder / "config.yaml").read_text()
    assert not list(folder.rglob("*.tmp"))


def test_the_exported_student_is_plain_and_equal(project: Path, finished: Path, workers: Group, tmp_path: Path) -> None:
    ids = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    torch.save(ids, tmp_path / "ids.pt")
    student = project / "finished/student"
    command = [sys.executable, "-c", LOAD_ALONE, str(student), str(tmp_path / "ids.pt"), str(tmp_path / "logits.pt")]
    subprocess.run(command, check=True, capture_output=True)
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert torch.equal(logits, workers(2).run(restored_logits, finished, ids)[0])
    assert len(AutoTokenizer.from_pretrained(student)) == VOCAB
    assert "filter" not in " ".join(AutoModelForCausalLM.from_pretrained(student).state_dict())


def test_a_complete_run_is_left_alone(project: Path, finished: Path, workers: Group) -> None:
    folder = project / "finished"
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != "config.yaml"}
    assert workers(2).run(pretrain_recipe, finished)[0] == json.loads((folder / "summary.json").read_text())
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_an_interrupted_run_continues_as_if_it_had_not_been(project: Path, finished: Path, workers: Group) -> None:
    path, folder = copied(project, "interrupted"), project / "interrupted"
    shutil.rmtree(folder / "student")
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints/step-00000010")
    (folder / "checkpoints/latest").write_text("step-00000005")
    with (folder / "metrics.jsonl").open("a") as log:
        log.write('{"step": 11, "torn')
    _as_an_earlier_version_wrote_it(folder)
    workers(2).run(pretrain_recipe, path)
    assert losses_of(folder) == losses_of(project / "finished")
    assert "divergence: forward" in (folder / "config.yaml").read_text()


def _as_an_earlier_version_wrote_it(folder: Path) -> None:
    """A recipe without some of today's keys, and a checkpoint with a hash in place of its recipe."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for section, key in (("loss", "divergence"), ("train", "keep_every"), ("student", "head_dropout")):
        del config[section][key]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    path = folder / "checkpoints/step-00000005/ted_ds.json"
    card = json.loads(path.read_text())
    card["identity"]["recipe"] = "3ec832ca49275c63"
    del card["digest"]
    digest = hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**card, "digest": digest}, indent=2))


def test_dropout_is_drawn_alike_with_evaluation_and_without_and_after_a_restart(project: Path, workers: Group) -> None:
    common = {"method": "ce", "student__dropout": 0.3, "student__activation_checkpointing": True}
    model = tiny_model("gpt2", blocks=2, vocab=VOCAB)
    model.save_pretrained(project / "gpt2")
    start = {"student__init": None, "student__model": str(project / "gpt2"), "optimizer__schedule": "constant"}
    losses = {}
    for name, changes in {
        "evaluated": {},
        "unseen": {"data__validation": []},
        "without": {"student__dropout": 0.0},
        "restarted": {"train__steps": 4},
    }.items():
        path = write_recipe(project, f"dropout-{name}", **{**common, **start, **changes})
        workers(2).run(pretrain_recipe, path)
        if name == "restarted":
            workers(2).run(pretrain_recipe, path, ("--train.steps=10",))
        lines = read_metrics(project / f"dropout-{name}")
        losses[name] = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert losses["evaluated"] == losses["unseen"] == losses["restarted"]
    assert losses["evaluated"][1] != losses["without"][1]


def test_auto_is_chosen_once(project: Path, workers: Group, finished: Path) -> None:
    """The same losses as under ZeRO-3 on both sides; a run that was begun goes on as it began."""
    auto = {"deepspeed": "auto", "teacher__sharding": "auto"}

    def engines(name: str) -> tuple[str, str]:
        found = yaml.safe_load((project / name / "config.yaml").read_text())
        return found["deepspeed"], found["teacher"]["sharding"]

    path = write_recipe(project, "chosen", optimizer__schedule="constant", **auto)
    workers(2).run(pretrain_recipe, path)
    assert engines("chosen") == ("ds_configs/zero1.json", "replicated")
    for mine, theirs in zip(losses_of(project / "chosen"), losses_of(project / "finished"), strict=True):
        assert mine == {name: pytest.approx(value, rel=1e-4) for name, value in theirs.items()}
    longer = copied(project, "begun", train__steps=11, **auto)
    workers(2).run(pretrain_recipe, longer)
    assert engines("begun") == ("ds_configs/zero3.json", "zero3")
    assert len(losses_of(project / "begun")) == 12


@pytest.mark.parametrize("cut", [{"num_blocks": 2}, {"num_blocks": 3, "hidden_size": 8}], ids=["depth", "width"])
def test_no_filters_are_learnt_where_both_sides_share_a_basis(
    project: Path, workers: Group, cut: dict[str, object]
) -> None:
    """`filters.learn: auto`: the losses are those of lwd, and there is no Stage I."""
    changes = {"student__init": cut, "filters__learn": "auto", "train__steps": 3, "train__save_every": 0}
    name = f"auto-{len(cut)}"
    paths = {m: write_recipe(project, f"{name}-{m}", method=m, **changes) for m in ("ted", "lwd")}
    for method, path in paths.items():
        workers(2 if method == "ted" else 1).run(pretrain_recipe, path)
    ted, lwd = (read_metrics(project / f"{name}-{m}") for m in paths)
    assert [line["loss"] for line in ted[1:]] == pytest.approx([line["loss"] for line in lwd[1:]], rel=1e-5)
    assert not list((project / f"{name}-ted").glob("*_filters"))
    shaped = write_recipe(project, f"{name}-shaped", **changes, filters__output_dim=4, filters__steps=1)
    workers(1).run(pretrain_recipe, shaped, (), "filters")
    assert len(list((project / f"{name}-shaped").glob("*_filters"))) == 2  # a width of the recipe's own is learnt


def test_a_probe_says_whether_the_layer_loss_pays(project: Path, workers: Group, finished: Path) -> None:
    """Its two runs begin with the run's own student and filters, and the run is what it would be without them."""
    path = write_recipe(project, "probed", optimizer__schedule="constant", loss__probe_steps=2)
    workers(2).run(pretrain_recipe, path)
    folder = project / "probed"
    assert losses_of(folder) == losses_of(project / "finished")
    found = json.loads((folder / "probe/probe.json").read_text())
    short = {m: json.loads((folder / f"probe/{m}/summary.json").read_text()) for m in ("kd", "ted")}
    assert {m: found[m] for m in short} == {m: summary["validation_loss"] for m, summary in short.items()}
    assert found["pays"] == (found["ted"] < found["kd"]) and {s["steps"] for s in short.values()} == {2}
    assert len({summary["initial_validation_loss"] for summary in short.values()}) == 1
    assert (folder / "probe/ted/teacher_filters").resolve() == (folder / "teacher_filters").resolve()
    before = (folder / "probe/kd/metrics.jsonl").stat().st_mtime_ns
    workers(2).run(pretrain_recipe, path, ("--train.steps=12",))
    assert (folder / "probe/kd/metrics.jsonl").stat().st_mtime_ns == before


def test_attention_is_the_recipes(project: Path, workers: Group, finished: Path) -> None:
    path = copied(project, "attention")
    assert workers(1).run(attention_of, path, ("--attn_implementation=eager",)) == [["eager", "eager"]]
    assert workers(1).run(attention_of, path) == [["sdpa", "sdpa"]]
    wrong = write_recipe(project, "no-attention", attn_implementation="fastest")
    said = workers(2).run(pretrain_error, wrong)
    assert all("could not be loaded with attn_implementation: fastest: " in one for one in said)


def test_a_run_that_is_not_over_can_be_exported(project: Path, finished: Path, workers: Group) -> None:
    path, folder = copied(project, "exported"), project / "exported"
    shutil.rmtree(folder / "student")
    (folder / "checkpoints/latest").write_text("step-00000005")
    assert workers(2).run(pretrain_recipe, path, (), "export")[0] == {"steps": 5, "student": str(folder / "student")}
    halfway, end = (AutoModelForCausalLM.from_pretrained(project / n / "student") for n in ("exported", "finished"))
    assert not torch.equal(halfway.lm_head.weight, end.lm_head.weight)
    assert "steps: 10" in (folder / "config.yaml").read_text()
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "student")
    assert "has no checkpoint to export" in workers(2).run(pretrain_error, path, (), "export")[0]


def test_more_steps_go_on_from_the_last(project: Path, workers: Group, finished: Path) -> None:
    # the layer loss would fade over other steps
    constant = {"optimizer__schedule": "constant", "loss__layer_fade": 0}
    longer, whole = (write_recipe(project, n, **constant, train__steps=4) for n in ("longer", "whole"))
    workers(2).run(pretrain_recipe, longer)
    workers(2).run(pretrain_recipe, longer, ("--train.steps=10",))
    workers(2).run(pretrain_recipe, whole, ("--train.steps=10",))
    ours, expected = ([x["loss"] for x in losses_of(project / n)[1:]] for n in ("longer", "whole"))
    assert ours == expected and len(ours) == 10


@pytest.mark.parametrize("ranks", [1, 4])
def test_held_out_perplexity_counts_every_token_once(project: Path, finished: Path, workers: Group, ranks: int) -> None:
    path = write_recipe(project, f"evaluated-{ranks}", method="ce", train__steps=1)
    workers(ranks).run(pretrain_recipe, path)
    found = read_metrics(project / f"evaluated-{ranks}")[-1]
    tokenizer = AutoTokenizer.from_pretrained(project / "tokenizer")
    stream = tokenizer((project / "validation.txt").read_text())["input_ids"] + [tokenizer.eos_token_id]
    model = AutoModelForCausalLM.from_pretrained(project / f"evaluated-{ranks}/student")
    nll = 0.0
    for start in range(0, len(stream), 12):
        row = torch.tensor([stream[start : start + 12]])
        with torch.no_grad():
            scores = model(row).logits[0].double().log_softmax(-1)
        for position, target in enumerate(stream[start + 1 : start + 13]):
            nll -= float(scores[position, target])
    assert found["validation_loss"] == pytest.approx(nll / (len(stream) - 1), rel=1e-5)


BAD = {
    "a layer map outside the student": (
        {"filters__layer_map": [[2, 3]]},
        "filters.layer_map pair [2, 3]",
    ),
    "batch sizes that do not divide": ({"train__global_batch_size": 3}, "train.global_batch_size (3)"),
    "rows longer than the models' positions": ({"data__sequence_length": 65}, "has 64 positions"),
    "a missing data file": ({"data__train": ["nothing.txt"]}, "'nothing.txt' matches no file"),
    "a missing teacher": ({"teacher__model": "no/where"}, "no/where"),
    "a loss that is not finite": (
        {"optimizer__learning_rate": 1e30, "optimizer__warmup_steps": 0, "optimizer__gradient_clipping": 0.0},
        "train.max_skipped_steps is 5; the last checkpoint is intact",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_sentence_on_every_rank(project: Path, workers: Group, case: str) -> None:
    changes, expected = BAD[case]
    path = write_recipe(project, "bad-" + "-".join(case.split()), **changes)
    for message in workers(2).run(pretrain_error, path):
        assert expected in message and "\n" not in message
    assert case == "a loss that is not finite" or not list((project / path.stem).rglob("blocks.arrow"))


def test_models_and_tokenizer_must_fit(tmp_path: Path, workers: Group) -> None:
    project = make_project(tmp_path)
    tiny_model("llama", blocks=4, vocab=50).save_pretrained(project / "teacher")
    (message, _) = workers(2).run(pretrain_error, write_recipe(project, "small"))
    assert "has 50 vocabulary rows, data.tokenizer has 61 ids" in message
    tiny_model("llama", blocks=4, vocab=64).save_pretrained(project / "teacher")
    other = json.loads((project / "tokenizer/tokenizer.json").read_text())
    words = list(other["model"]["vocab"])
    other["model"]["vocab"] = {w: i for i, w in enumerate([*words[:2], *reversed(words[2:])])}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(project / "tokenizer" / name, project / "teacher" / name)
    (project / "teacher/tokenizer.json").write_text(json.dumps(other))
    (message, _) = workers(2).run(pretrain_error, write_recipe(project, "other"))
    assert "was trained with another tokenizer than data.tokenizer" in message


def test_a_padded_teacher_is_aligned(tmp_path: Path, workers: Group) -> None:
    project = make_project(tmp_path)
    teacher = tiny_model("llama", blocks=4, vocab=VOCAB)
    results = []
    for name, rows in (("plain", VOCAB), ("padded", VOCAB + 3)):
        teacher.resize_token_embeddings(rows, mean_resizing=False)
        teacher.save_pretrained(project / "teacher")
        student = project / "plain/initial_student"
        cut = {} if name == "plain" else {"student__init": None, "student__model": str(student)}
        short = {"method": "kd", "train__steps": 2, "data__prepared": str(project / "data")}
        workers(2).run(pretrain_recipe, write_recipe(project, name, **short, **cut))
        results.append([line["kl_loss"] for line in read_metrics(project / name)[1:]])
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_a_full_disk_leaves_the_last_good_checkpoint(project: Path, finished: Path, workers: Group) -> None:
    path = copied(project, "full")
    for message in workers(2).run(full_disk, path, ("--train.steps=20",)):
        assert "could not be written" in message and "step-00000015" in message
    assert (project / "full/checkpoints/latest").read_text() == "step-00000010"
    workers(2).run(pretrain_recipe, path, ("--train.steps=12",))
    assert read_metrics(project / "full")[-1]["step"] == 12


def test_wrong_checkpoints_are_named_and_the_last_whole_one_is_taken(
    project: Path, finished: Path, workers: Group
) -> None:
    path, folder = copied(project, "torn"), project / "torn"
    for side in ("student", "summary.json"):
        (shutil.rmtree if side == "student" else Path.unlink)(folder / side)
    for states in (folder / "checkpoints/step-00000010").glob("*_optim_states.pt"):
        states.write_bytes(states.read_bytes()[:1000])
    workers(2).run(pretrain_recipe, path)
    assert losses_of(folder) == losses_of(project / "finished")
    shutil.rmtree(folder / "student")
    card = folder / "checkpoints/step-00000010/ted_ds.json"
    card.write_text(card.read_text().replace('"step": 10', '"step": 11'))
    (folder / "checkpoints/step-00000005/ted_ds.json").unlink()
    for message in workers(2).run(pretrain_error, path):
        assert "is whole (" in message and message.count("has no whole ted_ds.json") == 2


def test_one_folder_is_one_run(project: Path, finished: Path, workers: Group) -> None:
    (message, _) = workers(2).run(pretrain_error, finished, ("--seed=1",))
    assert "holds a run with seed: 0, this recipe says 1: give another output_dir" in message


def test_a_run_that_made_nothing_leaves_its_folder_free(project: Path, workers: Group) -> None:
    path = write_recipe(project, "typo", method="ce", data__train=["missing.txt"])
    (message,) = workers(1).run(pretrain_error, path)
    assert "missing.txt" in message and not (project / "typo").exists()
    student = {"dtype": "float32", "model": str(project / "missing")}
    (message,) = workers(1).run(pretrain_error, write_recipe(project, "typo", method="ce", student=student))
    assert "missing" in message and (project / "typo/config.yaml").exists()
    path = write_recipe(project, "typo", method="ce", train__steps=1, train__save_every=0)
    workers(1).run(pretrain_recipe, path)
    assert (project / "typo/summary.json").exists()


def test_filters_of_another_shape_are_refused(project: Path, finished: Path, workers: Group) -> None:
    path, folder = copied(project, "reshaped"), project / "reshaped"
    shutil.rmtree(folder / "student")
    card = json.loads((folder / "teacher_filters/filters.json").read_text())
    card["plan"]["output_dim"] = 7
    (folder / "teacher_filters/filters.json").write_text(json.dumps(card))
    (message, _) = workers(2).run(pretrain_error, path)
    assert "holds filters of another layer map or shape" in message
    (folder / "teacher_filters/filters.json").write_text("{")
    assert "holds no whole filters" in workers(2).run(pretrain_error, path)[0]


def test_a_run_on_other_data_is_refused(project: Path, workers: Group) -> None:
    prepared = str(project / "shared")
    short = {"method": "ce", "train__steps": 1, "data__prepared": prepared}
    workers(2).run(pretrain_recipe, write_recipe(project, "first", **short))
    path = write_recipe(project, "second", **short, data__sequence_length=8)
    (message, _) = workers(2).run(pretrain_error, path)
    assert "was prepared with other data.sequence_length: 12, now 8" in message


def test_zeros_collectives_wait_as_long_as_the_run_says(workers: Callable[[int], Workers]) -> None:
    assert workers(1).run(zero_timeout) == [TIMEOUT_S]
