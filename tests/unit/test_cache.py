"""The teacher cache's parts: where rows lie, what is read back, what a fingerprint notices."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ted_ds.batch import Batch
from ted_ds.config.load import load_config
from ted_ds.config.schema import RunConfig
from ted_ds.data.encoded import EncodedRows
from ted_ds.data.packed import PackedBlocks
from ted_ds.data.tokenizers import load_tokenizer
from ted_ds.errors import CheckpointError, ConfigError
from ted_ds.ops import Head
from ted_ds.tasks.base import Field
from ted_ds.tasks.causal_lm import CausalLM, TopLogits
from ted_ds.tasks.labelled import RowLogits
from ted_ds.tasks.question_answering import SpanLogits
from ted_ds.tasks.registry import TASK_CLASSES
from ted_ds.teacher import cache_layout as layout
from ted_ds.teacher.cache_layout import Manifest, Places, fits, plan_shards, refuse_difference, shard_path
from ted_ds.teacher.fingerprints import model_fingerprint
from ted_ds.teacher.recorded import AnnouncedRows, CachedTeacher, ShardReader, load_head
from ted_ds.teacher.recording import write_head
from tests.project import make_project, recipe
from tests.task_project import make_task_project, write_task_recipe
from tests.tiny_models import tiny_model

LENGTHS = np.array([3, 5, 2, 4, 1])
FIELDS = {"states.1": Field("bfloat16", 4), "logits": Field("float32", 2, per_row=True)}
"""8 bytes a token and 8 a row: the rows take 32, 48, 24, 40 and 16 bytes."""


def manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "data": "d" * 64,
        "rows": 5,
        "tokens": 15,
        "teacher": "gpt2",
        "weights": "w" * 64,
        "dtype": "bfloat16",
        "filters": "f" * 64,
        "fields": FIELDS,
        "settings": {},
        "head": None,
        "firsts": (0, 2, 4),
    }
    return Manifest(**{**values, **changes})


@pytest.mark.parametrize(
    ("limit", "firsts"),
    [(1 << 20, (0,)), (80, (0, 2)), (79, (0, 1, 3)), (40, (0, 1, 2, 3, 4)), (1, (0, 1, 2, 3, 4))],
)
def test_shards_are_as_large_as_may_be(monkeypatch: pytest.MonkeyPatch, limit: int, firsts: tuple[int, ...]) -> None:
    monkeypatch.setattr(layout, "SHARD_BYTES", limit)
    assert plan_shards(LENGTHS, FIELDS) == firsts


def test_places_of_rows() -> None:
    places = Places(LENGTHS, (0, 2, 4))
    assert places.num_shards == 3
    assert [places.rows(i) for i in range(3)] == [range(0, 2), range(2, 4), range(4, 5)]
    assert [places.tokens(i) for i in range(3)] == [8, 6, 1]
    assert [places.shard_of(row) for row in range(5)] == [0, 0, 1, 1, 2]
    assert [places.bytes(i, FIELDS) for i in range(3)] == [80, 64, 16]
    assert places.within(1, 3, FIELDS["states.1"]) == slice(2, 6)
    assert places.within(1, 3, FIELDS["logits"]) == slice(1, 2)


def stored(folder: Path) -> dict[str, list[torch.Tensor]]:
    """A cache of `LENGTHS` in three shards; its fields' values by row."""
    torch.manual_seed(0)
    rows = {
        "states.1": [torch.randn(int(n), 4).bfloat16() for n in LENGTHS],
        "logits": [torch.randn(1, 2) for _ in LENGTHS],
    }
    for shard, (start, end) in enumerate([(0, 2), (2, 4), (4, 5)]):
        save_file({name: torch.cat(values[start:end]) for name, values in rows.items()}, shard_path(folder, shard))
    return rows


def reader(folder: Path) -> ShardReader:
    return ShardReader(folder, manifest(), LENGTHS, pinned=False)


def test_rows_are_read_padded_with_zeros(tmp_path: Path) -> None:
    rows = stored(tmp_path)
    found = reader(tmp_path).read(["states.1", "logits"], torch.tensor([3, 0, 4, 3]), 6)
    assert found["states.1"].shape == (4, 6, 4) and found["logits"].shape == (4, 2)
    for i, row in enumerate((3, 0, 4, 3)):
        length = LENGTHS[row]
        assert torch.equal(found["states.1"][i, :length], rows["states.1"][row])
        assert not found["states.1"][i, length:].any()
        assert torch.equal(found["logits"][i], rows["logits"][row][0])


def test_a_shard_is_mapped_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many fields are read of it: a process may have 65530 maps."""
    stored(tmp_path)
    opened: list[Path] = []

    def counting(path: Path, framework: str) -> Any:
        opened.append(path)
        return safe_open(path, framework=framework)

    monkeypatch.setattr("ted_ds.teacher.recorded.safe_open", counting)
    reader(tmp_path).read(["states.1", "logits"], torch.tensor([3, 0, 4, 3]), 6)
    assert len(opened) == len(set(opened)) > 1


def test_a_torn_shard_is_named(tmp_path: Path) -> None:
    stored(tmp_path)
    shard_path(tmp_path, 1).write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"shard-00001\.safetensors is torn .*: delete its folder"):
        reader(tmp_path).read(["logits"], torch.tensor([3]), 6)


class Rows:
    """Two steps of two micro-batches."""

    def micro_batches(self, step: int) -> list[Batch]:
        ids = torch.zeros(2, 5, dtype=torch.int64)
        return [Batch(ids, ids, rows=torch.tensor([i, (i + step) % 5])) for i in range(2)]

    def tokens(self, step: int) -> int:
        return 20


def test_what_was_announced_is_read_ahead_and_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = stored(tmp_path)
    reads: list[list[int]] = []
    read = ShardReader.read

    def counted(self: ShardReader, names: Any, numbers: torch.Tensor, width: int) -> Any:
        reads.append(numbers.tolist())
        return read(self, names, numbers, width)

    monkeypatch.setattr(ShardReader, "read", counted)
    teacher = CachedTeacher(reader(tmp_path), torch.device("cpu"), blocks=(1,), width=4, output=None, head=None)
    announced = AnnouncedRows(Rows(), teacher)
    assert announced.tokens(0) == 20
    seen: list[torch.Tensor] = []
    teacher.sources[1].register_forward_hook(lambda _m, _i, out: seen.append(teacher.target(0, out)))

    def check(batch: Batch) -> None:
        teacher.stream(batch)
        assert batch.rows is not None
        for state, row in zip(seen.pop(), batch.rows.tolist(), strict=True):
            assert torch.equal(state[: LENGTHS[row]], rows["states.1"][row])

    for step in range(2):
        for i, batch in enumerate(announced.micro_batches(step)):
            assert teacher._next is not None
            teacher._next[1].result()
            assert len(reads) == 2 * step + i + 1, "before it is asked for"
            check(batch.to(torch.device("cpu")))
    assert reads == [[0, 0], [1, 1], [0, 1], [1, 2]]
    (skipped, taken), (other, _) = announced.micro_batches(2), Rows().micro_batches(3)
    for batch in (other, skipped, taken):  # rows that were not announced, and what was passed over
        check(batch)


@pytest.mark.requires_gpu
def test_reading_waits_for_no_device(tmp_path: Path) -> None:
    rows, device = stored(tmp_path), torch.device("cuda")
    records = ShardReader(tmp_path, manifest(), LENGTHS, pinned=True)
    teacher = CachedTeacher(
        records, device, blocks=(1,), width=4, output=RowLogits(2, "float32"), head=Head(torch.zeros(1, 1), None)
    )
    seen: list[torch.Tensor] = []
    teacher.sources[1].register_forward_hook(lambda _m, _i, out: seen.append(out))
    batches = [batch.to(device) for batch in Rows().micro_batches(1)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        teacher.expect(batches)
        for batch in batches:
            teacher.stream(batch, lambda logits, head: seen.append(logits))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (states, logits), batch in zip((seen[:2], seen[2:]), batches, strict=True):
        assert batch.rows is not None and states.is_cuda and logits.is_cuda
        for i, row in enumerate(batch.rows.tolist()):
            assert torch.equal(states[i, : LENGTHS[row]].cpu(), rows["states.1"][row])
            assert torch.equal(logits[i].cpu(), rows["logits"][row][0])


def test_an_lm_head_comes_back(tmp_path: Path) -> None:
    head = Head(torch.randn(5, 4).bfloat16(), torch.randn(5).bfloat16(), softcap=30.0, scale=0.5)
    write_head(tmp_path, head)
    found = load_head(tmp_path, manifest(head={"softcap": 30.0, "scale": 0.5, "bytes": 50}), torch.device("cpu"))
    assert found is not None and found.bias is not None and head.bias is not None
    assert torch.equal(found.weight, head.weight) and torch.equal(found.bias, head.bias)
    assert (found.softcap, found.scale) == (30.0, 0.5)
    assert load_head(tmp_path, manifest(), torch.device("cpu")) is None


def test_logits_of_spans_and_of_a_top_k_come_back() -> None:
    spans = torch.randn(2, 2, 6)
    kept = SpanLogits("float32").record(spans, None)
    assert kept["logits"].shape == (2, 6, 2) and torch.equal(SpanLogits("float32").restore(kept), spans)

    hidden, head = torch.randn(2, 3, 8), Head(torch.randn(11, 8), None)
    output = TopLogits(4, 2.5, 9)
    top = output.restore(output.record(hidden, head))
    expected = ((hidden.flatten(0, 1) @ head.weight.t())[:, :9] / 2.5).double().log_softmax(-1)
    values, ids = expected.topk(4)
    assert torch.equal(top.ids.long(), ids)
    torch.testing.assert_close(top.log_probs.double(), values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(top.log_rest.double(), (1 - values.exp().sum(-1)).log(), rtol=1e-4, atol=1e-4)
    assert TopLogits(20, 2.0, 9).fields["top_ids"] == Field("int32", 9)


def test_a_manifest_comes_back_and_counts_its_bytes(tmp_path: Path) -> None:
    written = manifest(head={"softcap": None, "scale": 1.0, "bytes": 640})
    written.write(tmp_path / "manifest.json")
    assert Manifest.read(tmp_path / "manifest.json") == written
    assert Manifest.read(tmp_path / "nothing.json") is None
    assert written.bytes() == 15 * 8 + 5 * 8 + 640 + 3 * 2 * layout.HEADER_BYTES
    (tmp_path / "manifest.json").write_text(json.dumps({"rows": 5}))
    with pytest.raises(CheckpointError, match="is no manifest of a teacher cache"):
        Manifest.read(tmp_path / "manifest.json")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "data": ({"data": "e" * 64}, "other training data (5 rows, dddddddddddd, this run's 5 rows, eeeeeeeeeeee)"),
    "teacher": (
        {"weights": "v" * 64, "teacher": "gpt3"},
        "another teacher (gpt2, weights wwwwwwwwwwww, this run's gpt3, weights vvvvvvvvvvvv): give",
    ),
    "dtype": ({"dtype": "float32"}, "another teacher.dtype (bfloat16, this run's float32)"),
    "filters": ({"filters": "g" * 64}, "other filters (ffffffffffff, this run's gggggggggggg): give another"),
    "lwd": ({"filters": ""}, "other filters (ffffffffffff, this run's none, as lwd)"),
    "width": ({"fields": {"states.1": Field("bfloat16", 5)}}, "is a cache without states.1"),
    "block": ({"fields": {**FIELDS, "states.2": Field("bfloat16", 4)}}, "without states.2 (it holds states.1, logits)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_differs_is_named(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=re.escape(message)):
        refuse_difference(Path("cache"), manifest(), manifest(**changes))
    assert not fits(manifest(), manifest(**changes))


def test_a_cache_that_holds_more_fits() -> None:
    less = manifest(fields={"logits": FIELDS["logits"]}, filters="", teacher="a/copy", firsts=(0,))
    assert fits(manifest(), less) and not fits(less, manifest())


def test_a_fingerprint_is_of_config_and_weights_alone(tmp_path: Path) -> None:
    model = tiny_model("llama", blocks=1)
    model.save_pretrained(tmp_path / "a")
    before = model_fingerprint(str(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "split", max_shard_size="8KB")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 1
    assert {model_fingerprint(str(tmp_path / name)) for name in ("copy", "split")} == {before}

    path = tmp_path / "copy/model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        changed = {**tensors, name: tensors[name] + 0.01}
        save_file(changed, path)
        assert model_fingerprint(str(tmp_path / "copy")) != before, name
    save_file(tensors, path)
    config = json.loads((tmp_path / "copy/config.json").read_text())
    (tmp_path / "copy/config.json").write_text(json.dumps({**config, "transformers_version": "6.0", "_name": "b"}))
    assert model_fingerprint(str(tmp_path / "copy")) == before
    (tmp_path / "copy/config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert model_fingerprint(str(tmp_path / "copy")) != before


def test_the_fingerprint_of_blocks_is_of_ids_and_length(tmp_path: Path) -> None:
    make_project(tmp_path)

    def blocks(name: str, **changes: Any) -> PackedBlocks:
        run = RunConfig.model_validate(recipe(tmp_path, name, data__validation=[], **changes))
        return CausalLM.prepare(run.data, run.spec, load_tokenizer(run.data.tokenizer), run.prepared_folder)["train"]

    first = blocks("one")
    assert first.lengths.tolist() == [12] * (first.lengths.size) and first.lengths.size > 100
    assert first.batch(np.array([3, 1])).input_ids.shape == (2, 12)
    shutil.copyfile(tmp_path / "train.txt", tmp_path / "moved.txt")
    assert blocks("moved", data__train=[str(tmp_path / "moved.txt")]).fingerprint() == first.fingerprint()
    words = (tmp_path / "train.txt").read_text().split(" ")
    words[700], words[701] = words[701], words[700]
    (tmp_path / "train.txt").write_text(" ".join(words))
    assert blocks("edited").fingerprint() != first.fingerprint()
    other = blocks("shorter", data__sequence_length=6, data__train=[str(tmp_path / "moved.txt")])
    assert other.fingerprint() != first.fingerprint()


def test_the_fingerprint_of_examples_knows_where_second_texts_begin(tmp_path: Path) -> None:
    project = make_task_project(tmp_path, "mnli")
    run = load_config(write_task_recipe(project, "mnli", "one"))
    TASK_CLASSES[run.spec.kind].prepare(run.data, run.spec, load_tokenizer(run.data.tokenizer), run.prepared_folder)
    encoded = EncodedRows(run.prepared_folder / "train")
    before = encoded.fingerprint()
    longest = int(encoded.lengths[[4, 9]].max())
    assert encoded.batch(np.array([4, 9])).input_ids.shape == (2, longest)
    manifest = encoded.manifest
    encoded.manifest = dataclasses.replace(manifest, pad_id=manifest.pad_id + 1)
    assert encoded.fingerprint() != before
    encoded.manifest = manifest
    assert encoded.fingerprint() == before
    encoded._columns["second"] = encoded._columns["second"] - (np.arange(len(encoded)) == 7)
    assert encoded.fingerprint() != before


COUNTED = {"loss__mask_padding": False, "teacher__cache": "cache"}


@pytest.mark.parametrize(
    ("task", "changes", "refused"),
    [
        ("sst2", {}, True),
        ("sst2", {"method": "kd", "loss__mse_alpha": None}, False),
        ("squad", {"method": "kd", "loss__mse_alpha": None}, True),
        ("squad", {"method": "kd", "loss__mse_alpha": None, "loss__mask_padding": True}, False),
    ],
)
def test_padding_that_counts_is_not_cached(tmp_path: Path, task: str, changes: dict[str, Any], refused: bool) -> None:
    path = write_task_recipe(tmp_path, task, "r", **{**COUNTED, **changes})
    if not refused:
        assert load_config(path).teacher is not None
        return
    with pytest.raises(ConfigError, match=r"teacher\.cache holds real tokens alone, but loss\.mask_padding: false"):
        load_config(path)


def test_states_are_not_read_once_no_pair_needs_them() -> None:
    asked: list[list[str]] = []

    class Reader:
        def read(self, names: list[str], rows: torch.Tensor, width: int) -> dict[str, torch.Tensor]:
            asked.append(list(names))
            return {name: torch.zeros(len(rows), width, 4) for name in names}

    reader: Any = Reader()
    teacher = CachedTeacher(reader, torch.device("cpu"), blocks=(1, 3), width=4, output=None, head=None)
    batch = Batch(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long), rows=torch.arange(2))
    teacher.expect([batch])
    teacher.stream(batch)
    assert [len(names) for names in asked] == [2]
    teacher.end_states()
    teacher.expect([batch])
    teacher.stream(batch)
    assert [len(names) for names in asked] == [2, 0]  # nothing ahead, and nothing of what `stream` asks for
