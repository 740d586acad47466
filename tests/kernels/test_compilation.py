"""The kernels compile to a GPU's machine code, which needs no GPU: what the interpreter lets pass need not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from typing import Any
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ted_ds.ops import layer_kernels, logit_kernels

def compiled(kernel: Any, pointers: dict[str, str], **constants: Any) -> str:
    types = pointers | dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    # pointers are multiples of 16 bytes, as the JIT finds them
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    signature = {name: types[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=aligned)
    done = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": 8})
    assert done.asm["cubin"]
    return done.asm["ptx"]

losses = {"x_s": "*bf16", "targets": "*i64", "weights": "*fp32", "ce": "*fp32", "kl": "*fp32"}
common = {"V": 50257, "END": 50264, "STRIDE": 50304, "CAP_S": 3.0, "GRADIENT": True, "BLOCK": logit_kernels._BLOCK}
for kind in range(4):
    ptx = compiled(logit_kernels._dense_rows, losses | {"x_t": "*bf16"}, T=2.5, CAP_T=3.0, KIND=kind, **common)
    assert "ld.global.v4" in ptx and "st.global.v4" in ptx, "rows of an odd V are not read 16 bytes at a time"
top = {"ids": "*i32", "log_probs": "*fp16", "log_rest": "*fp32"}
compiled(logit_kernels._top_k_rows, losses | top, T=2.0, K=50, BLOCK_K=64, **common)
sides = {"output": "*bf16", "target": "*bf16", "mask": "*i1", "sums": "*fp32"}
compiled(layer_kernels._residual_rows, sides, F=3072, MASKED=True, BLOCK=layer_kernels._BLOCK)
print("all compiled")
"""


@pytest.mark.parametrize("sm", [80, 90, 100], ids=["A100", "H100", "B200"])
def test_every_kernel_compiles(sm: int, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(sm)], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "all compiled", done.stderr
