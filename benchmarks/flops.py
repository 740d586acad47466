"""FLOPs of a step by formula, counted as `ted_ds.telemetry.flops` counts a run's."""

from __future__ import annotations

from benchmarks.shapes import Shape, Side
from ted_ds.telemetry.flops import gemm_flops


def block_flops(side: Side, shape: Shape) -> int:
    """Forward of all blocks: 2 a weight and token, and attention's 4 S^2 D a row and block, causal or not."""
    keys = side.width // side.heads * side.kv_heads
    weights = 2 * side.width**2 + 2 * side.width * keys + 3 * side.width * side.units
    attention = 4 * shape.sequence**2 * side.width * shape.rows
    return side.blocks * (2 * weights * shape.tokens + attention)


def head_flops(side: Side, shape: Shape) -> int:
    """Forward of the LM head."""
    return gemm_flops(shape.tokens, side.width, shape.vocab)


def student_flops(shape: Shape) -> int:
    """The student's forward and backward with its LM head: backward is two forwards. Recomputation is not counted."""
    return 3 * (block_flops(shape.student, shape) + head_flops(shape.student, shape))


def teacher_flops(shape: Shape) -> int:
    """The teacher's forward with its LM head."""
    return block_flops(shape.teacher, shape) + head_flops(shape.teacher, shape)


def filter_flops(shape: Shape, *, student: bool, teacher: bool) -> int:
    """K filters to F = the teacher's width: three GEMMs each for the student, one for the teacher."""
    pairs, width = min(shape.student.blocks, shape.teacher.blocks), shape.teacher.width
    sides = [gemm_flops(shape.tokens, side.width, width) for side in (shape.student, shape.teacher)]
    return pairs * (3 * student * sides[0] + teacher * sides[1])


def step_flops(method: str, shape: Shape) -> int:
    """Forward and backward of one micro-batch: ce, kd, lwd, ted, `plain` (teacher forward + student CE), `teacher`.

    A cached teacher's LM head is run, or with a top k nothing of it.
    """
    teacher, student = teacher_flops(shape), student_flops(shape)
    both = teacher + student
    filters = filter_flops(shape, student=True, teacher=False)
    return {
        "ce": student,
        "kd": both,
        "lwd": both + filters,
        "ted": both + filter_flops(shape, student=True, teacher=True),
        "ted cached": student + filters + head_flops(shape.teacher, shape),
        "ted cached top 64": student + filters,
        "plain": both,
        "teacher": teacher,
    }[method]
