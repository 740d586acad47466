"""A family of causal LMs through all that a run does, from its config alone, against plain transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ted_ds.batch import IGNORED
from ted_ds.config.load import load_config
from ted_ds.config.student_section import InitConfig
from ted_ds.data.loader import EvaluationRows
from ted_ds.data.packed import PackedBlocks
from ted_ds.errors import TedError
from ted_ds.job.world import World
from ted_ds.models.layer_map import keep_blocks
from ted_ds.models.loading import on_meta
from ted_ds.models.probe import probe_cut, skipped_blocks
from ted_ds.models.pruning import check_cut, init_student
from ted_ds.models.structure import find_blocks, find_structure, set_dropout
from ted_ds.models.tiny import tiny_model
from ted_ds.pipeline.run import run_recipe
from ted_ds.telemetry.recorder import read_metrics
from tests.plain_measurements import plain_measurements
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
PARTS = ("Stage 0: blocks", "Stage 0: width", "both stages", "export", "kd")
RIGHT = "right"
SHORT: dict[str, Any] = {
    "filters__steps": 2,
    "train__steps": 2,
    "train__evaluate_every": 2,
    "train__save_every": 0,
    "train__micro_batch_size": 4,
    "optimizer__warmup_steps": 0,
    "optimizer__learning_rate": 1e-3,
}


def check_family(world: World, folder: Path, family: str) -> dict[str, str]:
    """For each of `PARTS` "right", "refused: SENTENCE", "not compared: WHY", or "WRONG: what differs".

    On one rank, under ZeRO-3 on both sides, with a tiny model of the family's default config and `SETTINGS`.
    """
    try:
        model = on_meta(AutoConfig.for_model(family, **SETTINGS.get(family, {})), "causal-lm")
        find_structure(model)
        model.config.get_text_config().vocab_size = VOCAB
        check = _FamilyCheck(world, make_project(folder, blocks=1), tiny_model(model))
    except TedError as error:
        return dict.fromkeys(PARTS, f"refused: {error}")
    found = {
        part: _outcome(look)
        for part, look in zip(
            PARTS, (check.cut_blocks, check.cut_width, check.both_stages, check.export, check.kd), strict=True
        )
    }
    if found["both stages"] != RIGHT:  # whose student is exported
        found["export"] = found["both stages"]
    return found


class _NotComparedError(Exception):
    pass


def _outcome(look: Callable[[], None]) -> str:
    try:
        look()
    except TedError as error:
        return f"refused: {error}"
    except _NotComparedError as error:
        return f"not compared: {error}"
    except Exception as error:  # whatever it is: the other parts and families are looked at too
        return f"WRONG: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return RIGHT


class _FamilyCheck:
    """A project whose teacher is of the family; a student is cut from it if possible, else a copy of it."""

    def __init__(self, world: World, project: Path, teacher: PreTrainedModel) -> None:
        self._world, self._project, self._teacher = world, project, teacher
        self._path = str(project / "teacher")
        teacher.save_pretrained(self._path)

    def cut_blocks(self) -> None:
        """A student that lacks a block has the logits of the teacher whose block is skipped."""
        total = find_blocks(self._teacher).num_blocks
        init = InitConfig(blocks="uniform", num_blocks=total - 1)
        probe_cut(self._path, init, "causal-lm")
        init_student(self._path, init, self._project / "shallow")
        with skipped_blocks(self._teacher, set(range(total)) - set(keep_blocks("uniform", total - 1, total))):
            expected = _logits(self._teacher)
        found = _logits(_loaded(self._project / "shallow"))
        worst = float((found - expected).abs().max() / expected.abs().max())
        assert worst < TOLERANCE, f"logits differ by {worst:.2g}"

    def cut_width(self) -> None:
        """A student of half the width and heads; it is what kd trains."""
        text = self._teacher.config.get_text_config()
        heads = getattr(text, "num_attention_heads", None)
        init = InitConfig(hidden_size=text.hidden_size // 2, num_heads=heads and heads // 2)
        probe_cut(self._path, init, "causal-lm")
        check_cut(self._path, init, "causal-lm", False)
        measured = plain_measurements(self._teacher, _ids())
        init_student(self._path, init, self._project / "narrow", measured=measured)
        assert _loaded(self._project / "narrow").config.get_text_config().hidden_size == init.hidden_size

    def both_stages(self) -> None:
        """Losses of Stage I and of two steps of Stage II are those of a plain loop."""
        path = self._run("ted", "shallow")
        lines = [line for line in read_metrics(self._project / "ted") if "loss" in line]
        for line, plain in zip(lines, plain_stage2(path, steps=2)[0], strict=True):
            for name, value in plain.items():
                _close(f"{name} of step {line['step']}", line[name], value)
        found = [line["loss"] for line in read_metrics(self._project / "ted/teacher_filters")]
        for value, plain_loss in zip(found, plain_stage1(path, "teacher", steps=2), strict=True):
            _close("Stage I", value, plain_loss)

    def export(self) -> None:
        """The exported student's own logits give the last held-out loss."""
        self._held_out("ted", self._project / "ted/student", -1)

    def kd(self) -> None:
        """The first held-out loss and the KL of kd are those of plain logits."""
        path = self._run("kd", "narrow")
        first = next(line for line in read_metrics(self._project / "kd") if "loss" in line)
        _close("kl_loss", first["kl_loss"], plain_stage2(path, steps=1)[0][0]["kl_loss"])
        self._held_out("kd", self._student("narrow"), 0)

    def _student(self, cut: str) -> Path:
        folder = self._project / cut
        return folder if folder.exists() else self._project / "teacher"

    def _run(self, method: str, cut: str) -> Path:
        config = copy.deepcopy(self._teacher.config)
        config.dtype = self._teacher.dtype  # saving made it a string, which Apertus does not take
        set_dropout(config, 0.0)
        trained = type(self._teacher)(config).train()
        if not torch.equal(_logits(trained), _logits(trained)):  # PhiMoE's router
            raise _NotComparedError("its forward draws at random while it trains, also without dropout")
        student = {"dtype": "float32", "model": str(self._student(cut))}
        path = write_recipe(self._project, method, **SHORT, method=method, student=student)
        run_recipe(load_config(path, []), self._world)
        return path

    def _held_out(self, run: str, student: Path, line: int) -> None:
        model, total, count = _loaded(student), 0.0, 0
        blocks = PackedBlocks(self._project / run / "data/validation")
        with torch.no_grad():
            for batch in EvaluationRows(blocks, batch_size=4, rank=0, world_size=1):
                logits, targets = model(batch.input_ids).logits.float().flatten(0, 1), batch.targets.flatten()
                total += float(F.cross_entropy(logits, targets, reduction="sum"))
                count += int((targets != IGNORED).sum())
        scored = [x for x in read_metrics(self._project / run) if "validation_loss" in x]
        _close("validation_loss", scored[line]["validation_loss"], total / count)


def _loaded(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.use_cache = False  # DeepSeek-V4 with a cache rounds what it compresses in another way
    return model.eval()


def _ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))


def _logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(_ids()).logits
    return logits


def _close(what: str, ours: float, plain: float) -> None:
    assert abs(ours - plain) <= TOLERANCE * max(1.0, abs(plain)), f"{what}: {ours:.6g}, plain transformers {plain:.6g}"
