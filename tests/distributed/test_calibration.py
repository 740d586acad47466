"""Stage 0's choice of blocks by a sample of the data, against plain transformers, however the sample is split."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ted_ds.batch import Batch
from ted_ds.config.load import load_config
from ted_ds.config.student_section import InitConfig
from ted_ds.data.buckets import BucketedRows
from ted_ds.data.encoded import EncodedRows
from ted_ds.data.loader import TrainingRows
from ted_ds.data.packed import PackedBlocks
from ted_ds.models.channels import Measurements
from ted_ds.models.least_squares import RIDGE
from ted_ds.models.pruning import init_student
from tests.jobs import first_filters, pretrain_error, pretrain_recipe, trials_of
from tests.marks import slow
from tests.project import SEQUENCE, make_project, write_recipe
from tests.task_project import make_task_project, write_task_recipe
from tests.workers import Workers

Group = Callable[[int], Workers]
Tensors = dict[str, torch.Tensor]

BLOCKS, WIDTH, ROWS = 6, 24, 5
LEFT_OUT: list[tuple[int, ...]] = [(), (1,), (2, 3), (5,), (0, 4)]
SPLITS = {
    "1 rank": (1, ()),
    "2 ranks, ZeRO-3": (2, ()),
    "4 ranks, ZeRO-3, 3 copies": (4, ("--train.micro_batch_size=3", "--train.global_batch_size=12")),
    "2 ranks, replicated": (2, ("--teacher.sharding=replicated", "--train.micro_batch_size=2")),
}
"""Five rows and five trials: neither ranks nor copies divide them."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("calibration"), blocks=BLOCKS, width=WIDTH)


def measured_recipe(project: Path, name: str, policy: str, keep: int, **changes: object) -> Path:
    init = {"blocks": policy, "num_blocks": keep, "calibration_tokens": ROWS * SEQUENCE}
    return write_recipe(project, name, method="kd", student={"dtype": "float32", "init": init}, **changes)


def plain_teacher(project: Path, left_out: Collection[int]) -> Any:
    """The teacher without these blocks, which are taken out of its list."""
    teacher: Any = AutoModelForCausalLM.from_pretrained(project / "teacher").eval()
    layers = teacher.model.layers
    teacher.model.layers = nn.ModuleList(layer for i, layer in enumerate(layers) if i not in left_out)
    teacher.config.num_hidden_layers = len(teacher.model.layers)
    teacher.config.use_cache = False
    return teacher


def plain_sample(recipe: Path) -> Batch:
    run = load_config(recipe, [])
    blocks = PackedBlocks(run.prepared_folder / "train")
    rows = TrainingRows(blocks, seed=run.seed, global_batch_size=ROWS, micro_batch_size=ROWS, rank=0, world_size=1)
    (batch,) = rows.micro_batches(0)
    return batch


def plain_loss(project: Path, recipe: Path, left_out: Collection[int]) -> float:
    """Nats a token."""
    batch = plain_sample(recipe)
    with torch.no_grad():
        logits = plain_teacher(project, left_out)(batch.input_ids).logits
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()))


def plain_influence(project: Path, recipe: Path) -> list[float]:
    teacher = plain_teacher(project, ())
    seen: list[float] = []

    def look(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen.append(float(1 - nn.functional.cosine_similarity(inputs[0].double(), output.double(), dim=-1).mean()))

    for layer in teacher.model.layers:
        layer.register_forward_hook(look)
    with torch.no_grad():
        teacher(plain_sample(recipe).input_ids)
    return seen


def plain_states(project: Path, recipe: Path, left_out: Collection[int]) -> tuple[Tensors, Tensors, torch.Tensor]:
    """What norms multiply their gains by, and what matrices read that write hidden states, [tokens, inputs] by
    "BLOCK.NAME" of the teacher; the mean of |what norms give|, summed over the norms."""
    teacher = plain_teacher(project, left_out)
    numbers = [str(block) for block in range(BLOCKS) if block not in left_out]
    norms: Tensors = {}
    readers: Tensors = {}
    channels = torch.zeros(WIDTH).double()

    def look(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor, site: str) -> None:
        x = inputs[0].double().flatten(0, 1)
        if site.endswith("norm.weight"):
            norms[site] = x / x.square().mean(-1, keepdim=True).sqrt()
            channels.add_(output.double().abs().flatten(0, 1).mean(0))
        else:
            readers[site] = x

    for path, module in teacher.named_modules():
        if path.endswith(("norm", "o_proj", "down_proj")):
            block, _, name = path.removeprefix("model.layers.").partition(".")
            site = f"{numbers[int(block)]}.{name}.weight" if block.isdecimal() else "norm.weight"
            module.register_forward_hook(partial(look, site=site))
    with torch.no_grad():
        teacher(plain_sample(recipe).input_ids)
    return norms, readers, channels


def assert_measured(
    found: Measurements, moments: list[Tensors], project: Path, recipe: Path, left_out: Collection[int]
) -> None:
    """Moments, channels and energies of the teacher without these blocks."""
    norms, readers, channels = plain_states(project, recipe, left_out)
    assert found.moments is not None and found.energies.keys() == readers.keys()
    expected = sum(x.T @ x / len(x) for x in norms.values())
    torch.testing.assert_close(found.moments, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.channels, channels, rtol=1e-6, atol=1e-6)
    for key, x in readers.items():
        torch.testing.assert_close(found.energies[key], x.square().mean(0), rtol=1e-5, atol=1e-8)
    assert len(moments) > 2
    sites = {site: moment for part in moments for site, moment in part.items()}
    assert sites.keys() == {*readers, "norm.weight", "1.post_attention_layernorm.weight"}
    for site, moment in sites.items():
        x = (norms | readers)[site]
        torch.testing.assert_close(moment, x.T @ x / len(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("split", SPLITS)
def test_trials_are_plain_transformers_however_they_are_split(project: Path, workers: Group, split: str) -> None:
    ranks, overrides = SPLITS[split]
    path = measured_recipe(project, "trials", "greedy", 3)
    found = workers(ranks).run(trials_of, path, LEFT_OUT, overrides)
    trials, measured, moments = found[0]
    assert all(others == trials for others, _, _ in found)
    assert [trial.left_out for trial in trials] == [frozenset(blocks) for blocks in LEFT_OUT]
    for trial in trials:
        assert trial.loss == pytest.approx(plain_loss(project, path, trial.left_out), rel=1e-6)
    assert trials[0].influence == pytest.approx(plain_influence(project, path), rel=1e-4, abs=1e-6)
    assert_measured(measured, moments, project, path, LEFT_OUT[-1])


def test_greedy_and_influence_keep_what_plain_torch_says(project: Path, workers: Group) -> None:
    path = measured_recipe(project, "greedy", "greedy", 3)
    workers(2).run(pretrain_recipe, path, (), "student")
    gone: set[int] = set()
    for _ in range(3):
        there = [block for block in range(BLOCKS) if block not in gone]
        gone.add(min(there, key=lambda block: plain_loss(project, path, gone | {block})))
    written = json.loads((project / "greedy/calibration/blocks.json").read_text())
    assert written["kept"] == sorted(set(range(BLOCKS)) - gone)
    assert set(written["kept"]) != {0, 2, 5}  # what uniform keeps: the measure can fail
    assert written["losses"][-1] == pytest.approx(plain_loss(project, path, gone), rel=1e-6)
    assert (project / "greedy/calibration/blocks.png").stat().st_size > 1000
    student = AutoModelForCausalLM.from_pretrained(project / "greedy/initial_student")
    teacher = AutoModelForCausalLM.from_pretrained(project / "teacher")
    for block, kept in enumerate(written["kept"]):
        ours, theirs = student.model.layers[block].state_dict(), teacher.model.layers[kept].state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    path = measured_recipe(project, "influence", "influence", 3)
    workers(1).run(pretrain_recipe, path, (), "student")
    influence = plain_influence(project, path)
    most = sorted(sorted(range(BLOCKS), key=lambda block: -influence[block])[:3])
    assert json.loads((project / "influence/calibration/blocks.json").read_text())["kept"] == most


def test_width_is_cut_by_what_the_sample_shows(project: Path, workers: Group) -> None:
    init = {"blocks": [0, 2, 3, 5], "hidden_size": 12, "intermediate_size": 40, "calibration_tokens": ROWS * SEQUENCE}
    prepared = str(project / "narrow-data")  # for all of them
    path = write_recipe(
        project, "narrow", method="kd", student={"dtype": "float32", "init": init}, data__prepared=prepared
    )
    students = {}
    for ranks in (1, 2):
        workers(ranks).run(pretrain_recipe, path, (f"--output_dir={project}/narrow{ranks}",), "student")
        students[ranks] = AutoModelForCausalLM.from_pretrained(project / f"narrow{ranks}/initial_student").eval()
        shutil.rmtree(project / f"narrow{ranks}/initial_student")
        workers(ranks).run(
            pretrain_recipe, path, (f"--output_dir={project}/narrow{ranks}",), "student"
        )  # from its file
    # a run that an earlier version began has no such file
    shutil.rmtree(project / "narrow2/calibration")
    workers(2).run(pretrain_recipe, path, (f"--output_dir={project}/narrow2",), "student")
    assert not (project / "narrow2/calibration").exists()
    assert_corrected(students[2], project, path, {1, 4}, project / "narrow1/calibration/width.safetensors")
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        one, two = (student(ids).logits for student in students.values())
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)
    again = AutoModelForCausalLM.from_pretrained(project / "narrow2/initial_student")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), students[2].parameters(), strict=True))
    assert (again.config.hidden_size, again.config.intermediate_size, again.config.num_hidden_layers) == (12, 40, 4)


def assert_corrected(student: Any, project: Path, recipe: Path, left_out: set[int], width: Path) -> None:
    """What stays makes up for what is gone: all matrices that read less, against least squares of the sample itself."""
    norms, readers, _ = plain_states(project, recipe, left_out)
    basis = Measurements.load(width).basis[:, :12].double()
    weights = AutoModelForCausalLM.from_pretrained(project / "teacher").double().state_dict()

    def least_squares(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        noise = (RIDGE * x.square().mean() * len(x)).sqrt() * torch.eye(x.shape[1]).double()
        seen = torch.cat([x, noise])
        return torch.linalg.lstsq(seen @ kept, seen).solution.T

    kept_blocks = [block for block in range(BLOCKS) if block not in left_out]
    own = {name: tensor.double() for name, tensor in student.state_dict().items()}
    for block, old in enumerate(kept_blocks):
        x, down = readers[f"{old}.mlp.down_proj.weight"], weights[f"model.layers.{old}.mlp.down_proj.weight"]
        units = (x.square().mean(0) * down.square().sum(0)).argsort(descending=True)[:40].sort().values
        expected = basis.T @ down @ least_squares(x, torch.eye(x.shape[1]).double()[:, units])
        assert_near(own[f"model.layers.{block}.mlp.down_proj.weight"], expected)
        gain = weights[f"model.layers.{old}.post_attention_layernorm.weight"]
        up = weights[f"model.layers.{old}.mlp.up_proj.weight"][units] * gain
        expected = up @ least_squares(norms[f"{old}.post_attention_layernorm.weight"], basis)
        assert_near(own[f"model.layers.{block}.mlp.up_proj.weight"], expected)
    head = weights["lm_head.weight"] * weights["model.norm.weight"]
    assert_near(own["lm_head.weight"], head @ least_squares(norms["norm.weight"], basis))
    assert_near(own["model.embed_tokens.weight"], weights["model.embed_tokens.weight"] @ basis)


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def plain_score(student: Path, recipe: Path) -> float:
    """Nats a token of a student on the sample."""
    batch, model = plain_sample(recipe), AutoModelForCausalLM.from_pretrained(student).eval()
    with torch.no_grad():
        logits = model(batch.input_ids).logits
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()))


@pytest.mark.parametrize("policy", ["greedy", slow("influence")])
def test_a_budget_takes_the_shape_of_the_least_loss(project: Path, workers: Group, policy: str) -> None:
    init = {"parameters": "12.0K", "blocks": policy, "calibration_tokens": ROWS * SEQUENCE}
    path = write_recipe(project, f"budget-{policy}", method="kd", student={"dtype": "float32", "init": init})
    folder, overrides = project / f"budget-{policy}", ("--train.micro_batch_size=2",)
    workers(2).run(pretrain_recipe, path, overrides, "student")
    shapes = json.loads((folder / "calibration/shapes.json").read_text())
    assert [shape["loss"] for shape in shapes] == sorted(shape["loss"] for shape in shapes)
    assert {shape["hidden_size"] for shape in shapes} == {None, 16}
    assert len({shape["num_blocks"] for shape in shapes}) > 2
    assert any(shape["intermediate_size"] for shape in shapes)
    for i, shape in enumerate(shapes):
        gone = tuple(block for block in range(BLOCKS) if block not in shape["blocks"])
        _, measured, _ = workers(2).run(trials_of, path, [gone])[0]
        sizes = {name: shape[name] for name in ("hidden_size", "intermediate_size")}
        cut = InitConfig(blocks=shape["blocks"], **sizes)
        init_student(str(project / "teacher"), cut, folder / f"shape-{i}", measured=measured)
        student = AutoModelForCausalLM.from_pretrained(folder / f"shape-{i}")
        assert student.num_parameters() == shape["parameters"] <= 12_000
        assert plain_score(folder / f"shape-{i}", path) == pytest.approx(shape["loss"], rel=1e-4)
    made = AutoModelForCausalLM.from_pretrained(folder / "initial_student")
    assert made.num_parameters() == shapes[0]["parameters"]
    # the next start takes it from the folder
    shutil.rmtree(folder / "initial_student")
    workers(2).run(pretrain_recipe, path, overrides, "student")
    again = AutoModelForCausalLM.from_pretrained(folder / "initial_student")
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (2000, "student.init.parameters is 2,000, and no shape that is tried of teacher"),
        ("1M", "student.init.parameters is 1,000,000, the teacher has"),
    ],
)
def test_a_budget_that_no_shape_meets_is_refused(
    project: Path, workers: Group, parameters: object, message: str
) -> None:
    path = write_recipe(project, f"none-{parameters}", method="kd", student={"init": {"parameters": parameters}})
    (found,) = workers(1).run(pretrain_error, path, (), "student")
    assert found.startswith(message)


def test_filters_start_at_the_rotation(project: Path, workers: Group) -> None:
    """So that the layer loss begins with what the cut has lost, and with nothing else."""
    init = {"blocks": [0, 1, 2, 3, 4, 5], "hidden_size": 16, "calibration_tokens": ROWS * SEQUENCE}
    path = write_recipe(
        project,
        "rotated",
        student={"dtype": "float32", "init": init},
        filters={"learn": "always", "steps": 1, "skip_last": 0},
    )
    student = workers(2).run(first_filters, path, ("--method=lwd",))[0]
    basis = Measurements.load(project / "rotated/calibration/width.safetensors").basis
    assert basis is not None
    assert all(filter_.equal(basis[:, :16]) for filter_ in student) and len(student) == BLOCKS
    shutil.rmtree(project / "rotated")
    student = workers(2).run(first_filters, path)[0]
    plan = json.loads((project / "rotated/teacher_filters/filters.json").read_text())["plan"]
    assert (plan["width"], plan["output_dim"]) == (WIDTH, 16)
    # after one step of Stage I at a rate of 0.001
    found = load_file(project / "rotated/teacher_filters/filters.safetensors")
    teacher = [tensor for name, tensor in found.items() if name.endswith("weight")]
    for ours, start in ((teacher, basis[:, :16].T), (student, torch.eye(16))):
        assert len(ours) == BLOCKS
        for filter_ in ours:
            torch.testing.assert_close(filter_, start.contiguous(), rtol=0, atol=0.02)


def test_pairs_match_the_blocks_that_were_kept(project: Path, workers: Group) -> None:
    short = {"filters": {"learn": "always", "steps": 1, "skip_last": 0}, "train__steps": 1, "train__save_every": 0}
    init = {"blocks": [0, 3, 4], "num_blocks": None}
    path = write_recipe(project, "matched", student={"dtype": "float32", "init": init}, **short)
    workers(2).run(pretrain_recipe, path)
    plans = [json.loads((project / f"matched/{side}_filters/filters.json").read_text())["plan"] for side in SIDES]
    assert [plan["blocks"] for plan in plans] == [[2, 3, 5], [0, 1, 2]]


SIDES = ("teacher", "student")


def test_a_calibration_that_was_killed_starts_over(project: Path, workers: Group) -> None:
    path = measured_recipe(project, "killed", "influence", 2)
    half = project / "killed/calibration.tmp"
    half.mkdir(parents=True)
    (half / "blocks.json").write_text('{"kept": [')
    workers(1).run(pretrain_recipe, path, (), "student")
    assert not half.exists()
    kept = json.loads((project / "killed/calibration/blocks.json").read_text())["kept"]
    assert len(kept) == 2


def test_a_task_s_trials_are_plain_transformers(tmp_path: Path, workers: Group) -> None:
    project = make_task_project(tmp_path, "sst2")
    init = {"num_blocks": 2, "calibration_tokens": 7 * 32}
    path = write_task_recipe(project, "sst2", "kd", student={"dtype": "float32", "init": init})
    run = load_config(path, [])
    found, measured, moments = workers(2).run(trials_of, path, [(), (1, 2)])[0]
    model = AutoModelForSequenceClassification.from_pretrained(project / "teacher").eval()
    model.bert.encoder.layer = nn.ModuleList([model.bert.encoder.layer[i] for i in (0, 3)])
    rows = EncodedRows(run.prepared_folder / "train")
    one_by_one = {"global_batch_size": 1, "micro_batch_size": 1, "rank": 0, "world_size": 1}
    sample = BucketedRows(rows, seed=run.seed, **one_by_one)
    count = -(-7 * 32 // run.data.sequence_length)
    batches = [batch for step in range(count) for batch in sample.micro_batches(step)]
    read: list[torch.Tensor] = []  # by the last block's FFN, without padding

    def look(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        read.append(inputs[0].double()[batches[len(read)].attention_mask.bool()])

    model.bert.encoder.layer[1].output.dense.register_forward_pre_hook(look)
    with torch.no_grad():
        losses = [
            nn.functional.cross_entropy(model(b.input_ids, attention_mask=b.attention_mask).logits, b.targets)
            for b in batches
        ]
    assert found[1].loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    x, site = torch.cat(read), "3.output.dense.weight"
    assert any(not b.attention_mask.all() for b in batches)
    torch.testing.assert_close(measured.energies[site], x.square().mean(0), rtol=1e-5, atol=1e-8)
    (moment,) = [part[site] for part in moments if site in part]
    torch.testing.assert_close(moment, x.T @ x / len(x), rtol=1e-5, atol=1e-6)


def test_more_blocks_than_the_teacher_has_are_refused(project: Path, workers: Group) -> None:
    path = measured_recipe(project, "many", "greedy", 9)
    (message,) = workers(1).run(pretrain_error, path, (), "student")
    assert message == "student.init.num_blocks is 9, the teacher has 6 blocks"


def test_a_width_that_cannot_be_is_refused_before_the_teacher_reads(tmp_path: Path, workers: Group) -> None:
    project = make_project(tmp_path, family="phi3")
    init = {"num_blocks": 2, "hidden_size": 8}
    path = write_recipe(project, "narrow", student={"dtype": "float32", "init": init})
    (message,) = workers(1).run(pretrain_error, path, (), "student")
    assert "cannot be cut so" in message
    assert not list((project / "narrow").glob("calibration*")) and not (project / "narrow/data").exists()


def test_a_module_that_the_student_would_lose_is_named(tmp_path: Path, workers: Group) -> None:
    """An ELECTRA maps its narrow embeddings to its width; one of their width would have no such map."""
    project = make_task_project(tmp_path, "sst2", family="electra")
    init = {"num_blocks": 2, "hidden_size": 12}
    path = write_task_recipe(project, "sst2", "narrow", student={"dtype": "float32", "init": init})
    (message,) = workers(1).run(pretrain_error, path, (), "student")
    assert "the student has no place for electra.embeddings_project." in message
