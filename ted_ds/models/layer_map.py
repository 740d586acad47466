"""Layer maps and kept blocks: integers only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import get_args

from ted_ds.config.choices import Measured
from ted_ds.errors import ModelError

LayerMap = tuple[tuple[int, int], ...]
"""Pairs (student block, teacher block), 0-based, in the order of the blocks."""


def resolve_layer_map(
    spec: str | Sequence[Sequence[int]],
    num_student: int,
    num_teacher: int,
    kept: Sequence[int] | None = None,
    *,
    skip_last: int = 0,
) -> LayerMap:
    """K pairs. `matched`: each student block with the teacher's block before the next one that was kept, so that the
    next block gets what it knows; `uniform`: every n-th teacher block, n = depth ratio, ending on the last
    (arXiv 2210.01351); `last`: the last blocks of both; or explicit pairs, which are checked.

    kept: of `matched`, the teacher's blocks that the student was cut from; None: it was not cut from this teacher.
    skip_last: pairs at the end of a policy's map that are left out.

    Raises ModelError for an unknown policy, a pair outside either model, pairs that repeat or cross, or no pair.
    """
    if not isinstance(spec, str):
        return _checked(spec, num_student, num_teacher)
    layer_map = _by_policy(spec, num_student, num_teacher, kept)
    if skip_last >= len(layer_map):
        raise ModelError(
            f"filters.skip_last is {skip_last}, filters.layer_map {spec} has {len(layer_map)} pairs: leave one at least"
        )
    return layer_map[: len(layer_map) - skip_last]


def _by_policy(policy: str, num_student: int, num_teacher: int, kept: Sequence[int] | None) -> LayerMap:
    if policy == "matched":
        if kept is None:
            raise ModelError(
                "filters.layer_map: matched needs a student that was cut from the teacher: give student.init, or "
                "layer_map: uniform"
            )
        return tuple(enumerate([block - 1 for block in kept[1:]] + [num_teacher - 1]))
    pairs = min(num_student, num_teacher)
    if policy == "uniform":
        return tuple(((k + 1) * num_student // pairs - 1, (k + 1) * num_teacher // pairs - 1) for k in range(pairs))
    if policy == "last":
        return tuple((num_student - pairs + k, num_teacher - pairs + k) for k in range(pairs))
    raise ModelError(f"filters.layer_map {policy!r} is not known: matched, uniform, last, or a list of pairs")


def _checked(spec: Sequence[Sequence[int]], num_student: int, num_teacher: int) -> LayerMap:
    pairs = tuple((int(s), int(t)) for s, t in spec)
    for s, t in pairs:
        if not (0 <= s < num_student and 0 <= t < num_teacher):
            raise ModelError(
                f"filters.layer_map pair [{s}, {t}] (student block, teacher block) lies outside the models: the "
                f"student has blocks 0 to {num_student - 1}, the teacher 0 to {num_teacher - 1}"
            )
    for (s, t), (s_next, t_next) in pairwise(pairs):
        if not (s < s_next and t < t_next):
            raise ModelError(
                f"filters.layer_map pairs [{s}, {t}] and [{s_next}, {t_next}] repeat a block or cross: "
                "both sides must rise from pair to pair"
            )
    return pairs


def keep_blocks(policy: str | Sequence[int], keep: int | None, total: int) -> tuple[int, ...]:
    """The teacher's blocks that Stage 0 keeps. `uniform`: as far apart as can be, first and last included;
    `first`; `last`; or a list. keep None: all (of a list: its length).

    Raises ModelError if more blocks are asked for than there are, a list is out of range or order, or the policy needs
    data.
    """
    if isinstance(policy, str):
        keep = total if keep is None else keep
        if not 1 <= keep <= total:
            raise ModelError(f"student.init.num_blocks is {keep}, the teacher has {total} blocks")
        if policy == "first" or keep == total:
            return tuple(range(keep))
        if policy in get_args(Measured):
            raise ModelError(
                f"student.init.blocks: {policy} needs a run's data, as `ted-ds init-student` has it: give uniform, "
                "first, last, or the numbers of the blocks"
            )
        if policy == "last" or keep == 1:
            return tuple(range(total - keep, total))
        return tuple(round(k * (total - 1) / (keep - 1)) for k in range(keep))
    kept = tuple(policy)
    if any(not 0 <= b < total for b in kept) or any(a >= b for a, b in pairwise(kept)):
        raise ModelError(
            f"student.init.blocks {list(kept)} must rise and lie within the teacher's blocks 0 to {total - 1}"
        )
    return kept
