"""FLOPs of a step by formula, and what a device can do at most."""

from __future__ import annotations

from benchmarks.shapes import Shape, Side

PEAK_FLOPS = {"H100": 989.4e12, "H200": 989.4e12}
"""Part of a device's name -> dense bf16 FLOP/s with sparsity off (NVIDIA's data sheets, SXM)."""


def peak_flops(device_name: str | None, dtype: str) -> float | None:
    """The device's bf16 peak; None, never a guess, for another device or dtype."""
    if device_name is None or dtype != "bfloat16":
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def block_flops(side: Side, shape: Shape) -> int:
    """Forward of all blocks: 2 a weight and token, and causal attention's 2 S^2 D a row and block (half of 4 S^2 D)."""
    keys = side.width // side.heads * side.kv_heads
    weights = 2 * side.width**2 + 2 * side.width * keys + 3 * side.width * side.units
    attention = 2 * shape.sequence**2 * side.width * shape.rows
    return side.blocks * (2 * weights * shape.tokens + attention)


def head_flops(side: Side, shape: Shape) -> int:
    """Forward of the LM head."""
    return 2 * side.width * shape.vocab * shape.tokens


def student_flops(shape: Shape) -> int:
    """The student's forward and backward with its LM head: backward is two forwards. Recomputation is not counted."""
    return 3 * (block_flops(shape.student, shape) + head_flops(shape.student, shape))


def teacher_flops(shape: Shape) -> int:
    """The teacher's forward with its LM head."""
    return block_flops(shape.teacher, shape) + head_flops(shape.teacher, shape)


def filter_flops(shape: Shape, *, student: bool, teacher: bool) -> int:
    """K filters to F = the teacher's width: three GEMMs each for the student, one for the teacher."""
    pairs, width = min(shape.student.blocks, shape.teacher.blocks), shape.teacher.width
    gemm = 2 * shape.tokens * width
    return pairs * gemm * (3 * student * shape.student.width + teacher * shape.teacher.width)


def step_flops(method: str, shape: Shape) -> int:
    """Forward and backward of one micro-batch: ce, kd, lwd, ted, `plain` (teacher forward + student CE), `teacher`."""
    teacher, student = teacher_flops(shape), student_flops(shape)
    both = teacher + student
    return {
        "ce": student,
        "kd": both,
        "lwd": both + filter_flops(shape, student=True, teacher=False),
        "ted": both + filter_flops(shape, student=True, teacher=True),
        "plain": both,
        "teacher": teacher,
    }[method]
