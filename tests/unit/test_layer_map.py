"""Layer maps and kept blocks, against values worked out by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest

from ted_ds.errors import ModelError
from ted_ds.models.layer_map import keep_blocks, resolve_layer_map


@pytest.mark.parametrize(
    ("spec", "student", "teacher", "pairs"),
    [
        ("uniform", 2, 6, ((0, 2), (1, 5))),
        ("uniform", 6, 12, tuple((k, 2 * k + 1) for k in range(6))),
        ("uniform", 3, 3, ((0, 0), (1, 1), (2, 2))),
        ("uniform", 3, 4, ((0, 0), (1, 1), (2, 3))),
        ("uniform", 4, 2, ((1, 0), (3, 1))),
        ("last", 2, 6, ((0, 4), (1, 5))),
        ("last", 4, 2, ((2, 0), (3, 1))),
        ([[0, 1], [1, 5]], 2, 6, ((0, 1), (1, 5))),
    ],
)
def test_layer_map(spec: str, student: int, teacher: int, pairs: tuple[tuple[int, int], ...]) -> None:
    assert resolve_layer_map(spec, student, teacher) == pairs


@pytest.mark.parametrize(
    ("kept", "pairs"),
    [
        ((0, 3, 4), ((0, 2), (1, 3), (2, 5))),
        ((0, 1, 2), ((0, 0), (1, 1), (2, 5))),
        ((3, 4, 5), ((0, 3), (1, 4), (2, 5))),
        ((2,), ((0, 5),)),
    ],
)
def test_matched_is_the_block_before_the_next_kept_one(kept: tuple[int, ...], pairs: object) -> None:
    assert resolve_layer_map("matched", len(kept), 6, kept) == pairs


def test_the_last_pairs_of_a_policy_can_be_left_out() -> None:
    whole = resolve_layer_map("uniform", 4, 8)
    assert resolve_layer_map("uniform", 4, 8, skip_last=1) == whole[:-1]
    assert resolve_layer_map(whole, 4, 8, skip_last=1) == whole  # a list is what it says
    with pytest.raises(ModelError, match=r"filters\.skip_last is 4, filters\.layer_map uniform has 4 pairs: leave one"):
        resolve_layer_map("uniform", 4, 8, skip_last=4)


def test_matched_needs_a_cut() -> None:
    with pytest.raises(ModelError, match="matched needs a student that was cut from the teacher"):
        resolve_layer_map("matched", 2, 6)


@pytest.mark.parametrize("policy", ["greedy", "influence"])
def test_a_policy_that_needs_data_is_named(policy: str) -> None:
    with pytest.raises(ModelError, match=f"student.init.blocks: {policy} needs a run's data"):
        keep_blocks(policy, 2, 6)
    assert keep_blocks(policy, None, 3) == keep_blocks(policy, 3, 3) == (0, 1, 2)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("middle", "'middle' is not known: matched, uniform, last"),
        ([[0, 6]], r"pair \[0, 6\].*student has blocks 0 to 1, the teacher 0 to 5"),
        ([[2, 0]], r"pair \[2, 0\]"),
        ([[0, 3], [1, 3]], r"\[0, 3\] and \[1, 3\] repeat a block or cross"),
        ([[1, 3], [0, 5]], "repeat a block or cross"),
    ],
)
def test_wrong_layer_map(spec: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve_layer_map(spec, 2, 6)


@pytest.mark.parametrize(
    ("policy", "keep", "total", "kept"),
    [
        ("uniform", 6, 12, (0, 2, 4, 7, 9, 11)),
        ("uniform", 3, 5, (0, 2, 4)),
        ("uniform", 2, 12, (0, 11)),
        ("uniform", 1, 5, (4,)),
        ("uniform", None, 4, (0, 1, 2, 3)),
        ("first", 2, 5, (0, 1)),
        ("last", 2, 5, (3, 4)),
        ([0, 3], None, 5, (0, 3)),
    ],
)
def test_keep_blocks(policy: str, keep: int | None, total: int, kept: tuple[int, ...]) -> None:
    assert keep_blocks(policy, keep, total) == kept


@pytest.mark.parametrize("total", range(2, 40))
def test_uniform_never_repeats_a_block(total: int) -> None:
    for keep in range(2, total + 1):
        kept = keep_blocks("uniform", keep, total)
        gaps = [b - a for a, b in pairwise(kept)]
        assert kept[0] == 0 and kept[-1] == total - 1 and len(kept) == keep
        assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("policy", "keep", "message"),
    [
        ("uniform", 7, "num_blocks is 7, the teacher has 6 blocks"),
        ([0, 6], None, r"blocks \[0, 6\] must rise and lie within the teacher's blocks 0 to 5"),
        ([3, 1], None, "must rise"),
    ],
)
def test_wrong_blocks(policy: str | list[int], keep: int | None, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        keep_blocks(policy, keep, 6)
