"""Whether a model has rows for the ids that occur: on the CPU, before a GPU would end the process over one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import AutoTokenizer

from ted_ds.config.schema import RunConfig
from ted_ds.config.tasks import TASKS
from ted_ds.data.encoded import EncodedRows
from ted_ds.data.encoding import ensure_encoded
from ted_ds.data.packed import PackedBlocks
from ted_ds.data.prepare import prepare
from ted_ds.data.tokenizers import Tokenizer, load_tokenizer
from ted_ds.errors import DataError, ModelError
from ted_ds.evaluation.lambada import lambada
from ted_ds.models.fit import check_fit, check_ids
from ted_ds.pipeline.stage0 import ModelPaths, check_models
from ted_ds.tasks.causal_lm import CausalLM
from ted_ds.tasks.registry import open_data
from tests.alone import Alone
from tests.project import VOCAB, make_project, recipe
from tests.tiny_models import tiny_model


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A teacher and student with a row for each word, and a tokenizer with one token more: <image>, id 61."""
    make_project(tmp_path)
    fast = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    for name in ("tokenizer", "teacher"):
        fast.save_pretrained(tmp_path / name)
    return tmp_path


def packed(project: Path, text: str) -> PackedBlocks:
    path = project / "text.txt"
    path.write_text(text)
    return prepare([str(path)], load_tokenizer(str(project / "tokenizer")), 4, project / "data", processes=1)


def test_a_token_past_the_rows_that_no_text_holds_is_accepted(project: Path) -> None:
    run = RunConfig.model_validate(recipe(project, "run", student__init={"num_blocks": 2}))
    tokenizer = load_tokenizer(run.data.tokenizer)
    assert (tokenizer.vocab_size, tokenizer.text_vocab_size) == (VOCAB + 1, VOCAB)
    teacher = str(project / "teacher")
    rows = check_models(run, ModelPaths(teacher, teacher), tokenizer, Alone())
    assert rows == VOCAB
    check_ids(tokenizer, rows, {"train": packed(project, "w1 w2 w3 w4 w5")})


def test_heads_are_compared_on_the_rows_that_all_have(project: Path) -> None:
    run = RunConfig.model_validate(recipe(project, "run"))
    tokenizer = load_tokenizer(run.data.tokenizer)
    world: Any = SimpleNamespace(on_main=lambda work: work())
    tasks = [open_data(run, world, tokenizer, rows).task for rows in (VOCAB, VOCAB + 1, VOCAB + 9, None)]
    assert [cast("CausalLM", task).vocab_size for task in tasks] == [VOCAB, VOCAB + 1, VOCAB + 1, VOCAB + 1]


@pytest.mark.parametrize("known", [True, False])
def test_prepared_data_that_holds_such_a_token_is_refused(project: Path, known: bool) -> None:
    """Also in a folder whose manifest does not know its largest id."""
    blocks = packed(project, "w1 w2 <image> w4 w5")
    if not known:
        path = project / "data/manifest.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "largest_id"}))
        blocks = PackedBlocks(project / "data")
        assert blocks.manifest.largest_id is None
    tokenizer = load_tokenizer(str(project / "tokenizer"))
    with pytest.raises(ModelError, match=r"prepared train data holds the id 61 \('<image>'\), a model has 61 vocab"):
        check_ids(tokenizer, VOCAB, {"train": blocks})
    check_ids(tokenizer, VOCAB + 1, {"train": blocks})


def test_data_is_not_read_if_every_id_has_a_row(project: Path) -> None:
    unread: Any = SimpleNamespace()
    check_ids(load_tokenizer(str(project / "tokenizer")), VOCAB + 1, {"train": unread})


def encoded(project: Path, tokenizer: Tokenizer, text: str) -> EncodedRows:
    path = project / "rows.jsonl"
    path.write_text("".join(json.dumps({"sentence": t, "label": 1}) + "\n" for t in ("w1 w2", text)))
    spec = TASKS["sst2"]
    return ensure_encoded([str(path)], spec, tokenizer, project / "rows", max_length=8, stride=0, training=True)


def test_labelled_rows_are_looked_at_too_with_their_padding(project: Path) -> None:
    tokenizer = load_tokenizer(str(project / "tokenizer"))
    check_ids(tokenizer, VOCAB, {"train": encoded(project, tokenizer, "w3 w4 w5")})
    shutil.rmtree(project / "rows")
    with pytest.raises(ModelError, match=r"held-out data holds the id 61 \('<image>'\)"):
        check_ids(tokenizer, VOCAB, {"held-out": encoded(project, tokenizer, "w3 <image>")})
    fast = AutoTokenizer.from_pretrained(project / "tokenizer", pad_token="<image>")
    padded = Tokenizer(fast, str(project / "tokenizer"))
    shutil.rmtree(project / "rows")
    with pytest.raises(ModelError, match=r"holds the id 61 \('<image>'\)"):
        check_ids(padded, VOCAB, {"train": encoded(project, padded, "w3 w4")})


def test_pieces_of_texts_past_the_rows_are_refused_before_data_is_prepared(project: Path) -> None:
    tokenizer = load_tokenizer(str(project / "tokenizer"))
    with pytest.raises(ModelError, match=r"the teacher x has 50 vocabulary rows, data\.tokenizer has 61 ids: use the"):
        check_fit("teacher", "x", tiny_model("llama", vocab=50), "causal-lm", tokenizer, 8)


def test_a_lambada_passage_that_holds_such_a_token_is_refused(project: Path) -> None:
    model, tokenizer = tiny_model("llama", vocab=VOCAB), load_tokenizer(str(project / "tokenizer"))
    options: dict[str, Any] = {"batch_size": 2, "device": torch.device("cpu")}
    assert lambada(model, tokenizer, ["w1 w2 w3"], **options)["examples"] == 1
    with pytest.raises(DataError, match=r"passage 2 has the id 61 \('<image>'\), the model has 61 vocabulary"):
        lambada(model, tokenizer, ["w1 w2 w3", "w1 <image> w2"], **options)


@pytest.mark.parametrize("side", ["teacher", "student", "neither"])
def test_a_model_that_is_trusted_brings_a_tokenizer_that_is(project: Path, side: str) -> None:
    changes: dict[str, Any] = {"student__model": "s", "student__init": None, "data__tokenizer": side}
    changes |= {} if side == "neither" else {f"{side}__model": side, f"{side}__trust_remote_code": True}
    run = RunConfig.model_validate(recipe(project, "run", **changes))
    assert run.data.trust_remote_code is (side != "neither")


def test_trust_in_the_data_s_tokenizer_is_none_in_a_model_s(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(project / "modules"))
    run = RunConfig.model_validate(
        recipe(project, "run", student__init={"num_blocks": 2}, data__trust_remote_code=True)
    )
    tokenizer = load_tokenizer(run.data.tokenizer)
    models = ModelPaths(str(project / "teacher"), str(project / "teacher"))
    with_own_code(project / "teacher")
    with pytest.raises(DataError, match=r"teacher' has code of its own.*or for a model's tokenizer the model's"):
        check_models(run, models, tokenizer, Alone())
    # what Stage 0 puts into the run's folder has the run's own
    own = with_own_code(Path(shutil.copytree(project / "teacher", run.output_dir / "initial_student")))
    (project / "teacher/tokenizer_config.json").write_text((project / "tokenizer/tokenizer_config.json").read_text())
    assert check_models(run, ModelPaths(str(project / "teacher"), str(own)), tokenizer, Alone()) == VOCAB


def with_own_code(folder: Path) -> Path:
    code = "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast): ...\n"
    (folder / "own.py").write_text(code)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}))
    return folder
