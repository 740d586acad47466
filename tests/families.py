"""A family of causal LMs through all that a run does, from its config alone, against plain transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ted_ds.config.load import load_config
from ted_ds.data.loader import EvaluationRows
from ted_ds.data.packed import PackedBlocks
from ted_ds.errors import TedError
from ted_ds.job.world import World
from ted_ds.models.layer_map import keep_blocks
from ted_ds.models.loading import on_meta
from ted_ds.models.probe import skipped_blocks
from ted_ds.models.structure import find_blocks, find_structure
from ted_ds.models.tiny import tiny_model
from ted_ds.pipeline.run import run_recipe
from ted_ds.telemetry.recorder import read_metrics
from tests.plain_training import plain_stage1, plain_stage2
from tests.project import VOCAB, make_project, write_recipe

SETTINGS: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.4},
    "cohere2": {"logit_scale": 0.4},
    "falcon_h1": {"lm_head_multiplier": 3.0},
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0},
    "granitemoe": {"logits_scaling": 4.0},
    "hyperclovax": {"logits_scaling": 0.25, "residual_multiplier": 0.5},
    "olmo": {"clip_qkv": 1.0},
}
"""What a family can do beside its defaults, which are 1 or off."""

TOLERANCE = 2e-4
PARTS = ("both stages", "kd", "Stage 0: blocks", "Stage 0: width", "export")
SHORT: dict[str, Any] = {
    "filters__steps": 2,
    "train__steps": 2,
    "train__evaluate_every": 2,
    "train__save_every": 0,
    "train__micro_batch_size": 4,
    "optimizer__warmup_steps": 0,
    "optimizer__learning_rate": 1e-3,
}


@dataclass
class Outcome:
    """What became of a family: part -> "right", or what was wrong; or the sentence that refuses it."""

    family: str
    parts: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def wrong(self) -> dict[str, str]:
        """The parts that gave something else than plain transformers."""
        return {part: said for part, said in self.parts.items() if said != "right"}


def family_config(family: str) -> PreTrainedConfig:
    """The family's default config, with what `SETTINGS` has for it."""
    return AutoConfig.for_model(family, **SETTINGS.get(family, {}))


def check_family(world: World, folder: Path, family: str) -> Outcome:
    """Both stages, kd, Stage 0 by blocks and by width, and the export, on one rank; each is compared."""
    outcome = Outcome(family)
    try:
        model = on_meta(family_config(family), "causal-lm")
        find_structure(model)
        model.config.get_text_config().vocab_size = VOCAB
        teacher = tiny_model(model)
    except TedError as error:
        outcome.refused["all"] = str(error)
        return outcome
    project = make_project(folder, blocks=1)
    teacher.save_pretrained(project / "teacher")
    blocks = find_blocks(teacher).num_blocks

    def part(name: str, *checks: Any) -> bool:
        try:
            for check in checks:
                check()
        except TedError as error:
            outcome.refused[name] = str(error)
        except Exception as error:  # whatever it is, the other families are looked at too
            outcome.parts[name] = f"{type(error).__name__}: {error}"
        else:
            outcome.parts[name] = "right"
        return outcome.parts.get(name) == "right"

    def run(name: str, **changes: Any) -> Path:
        path = write_recipe(project, name, **{**SHORT, **changes})
        run_recipe(load_config(path, []), world)
        return path

    def cut_blocks() -> None:
        run("cut", method="ce", student__init={"num_blocks": blocks - 1}, **{"train__steps": 1})
        student = AutoModelForCausalLM.from_pretrained(project / "cut/initial_student").eval()
        kept = keep_blocks("uniform", blocks - 1, blocks)
        with skipped_blocks(teacher, set(range(blocks)) - set(kept)):
            expected = _logits(teacher)
        _same("logits", _logits(student), expected)

    def cut_width() -> None:
        text = teacher.config.get_text_config()
        sizes = {"hidden_size": text.hidden_size // 2, "num_heads": text.num_attention_heads // 2}
        run("narrow", method="kd", student__init={**sizes}, **{"train__steps": 1, "train__evaluate_every": 1})
        student = AutoModelForCausalLM.from_pretrained(project / "narrow/initial_student")
        assert student.config.get_text_config().hidden_size == sizes["hidden_size"]
        _same_held_out(project / "narrow", student, 0)

    part("Stage 0: blocks", cut_blocks)
    part("Stage 0: width", cut_width)
    cut = outcome.parts.get("Stage 0: blocks") == "right"
    init = {"num_blocks": blocks - 1} if cut else None
    student = {"dtype": "float32"} | ({"init": init} if init else {"model": str(project / "teacher")})

    def both_stages() -> None:
        path = run("ted", student=student)
        expected = plain_stage2(path, steps=2)[0]
        for line, plain in zip([x for x in read_metrics(project / "ted") if "loss" in x], expected, strict=True):
            for name, value in plain.items():
                _close(f"{name} of step {line['step']}", line[name], value)
        ours = [line["loss"] for line in read_metrics(project / "ted/teacher_filters")]
        for value, plain in zip(ours, plain_stage1(path, "teacher", steps=2), strict=True):
            _close("Stage I", value, plain)

    def export() -> None:
        _same_held_out(project / "ted", AutoModelForCausalLM.from_pretrained(project / "ted/student"), -1)

    def kd() -> None:
        path = run("kd", method="kd", student=student)
        first, plain = next(x for x in read_metrics(project / "kd") if "loss" in x), plain_stage2(path, steps=1)
        _close("kl_loss", first["kl_loss"], plain[0][0]["kl_loss"])

    if part("both stages", both_stages):
        part("export", export)
    part("kd", kd)
    return outcome


def _logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits: torch.Tensor = model(ids).logits
    return logits


def _same_held_out(folder: Path, model: PreTrainedModel, line: int) -> None:
    """The held-out loss of a line of metrics.jsonl is what the plain model's own logits give."""
    rows = EvaluationRows(PackedBlocks(folder / "data/validation"), batch_size=2, rank=0, world_size=1)
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in rows:
            logits = model.eval()(batch.input_ids).logits[..., :61].float().flatten(0, 1)
            targets = batch.targets.flatten()
            total += float(F.cross_entropy(logits, targets, reduction="sum"))
            count += int((targets != -100).sum())
    scored = [x for x in read_metrics(folder) if "validation_loss" in x]
    _close("validation_loss", scored[line]["validation_loss"], total / count)


def _same(what: str, ours: torch.Tensor, plain: torch.Tensor) -> None:
    worst = float((ours - plain).abs().max() / plain.abs().max())
    assert worst < TOLERANCE, f"{what} differ by {worst:.2g}"


def _close(what: str, ours: float, plain: float) -> None:
    assert abs(ours - plain) <= TOLERANCE * max(1.0, abs(plain)), f"{what}: {ours:.6g}, plain transformers {plain:.6g}"
