"""`python docs/families.py > docs/families.md`: families of causal LMs through a whole run, against transformers.

About 10 minutes on 2 cores. `python docs/families.py llama gpt2` prints these rows alone: any family of
transformers can be named.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["DS_ACCELERATOR"] = "cpu"
PAGE = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)  # DeepSpeed prints as it is imported and as it builds an op, here and in the workers

from tests.families import PARTS, RIGHT, check_family  # noqa: E402
from tests.workers import Workers  # noqa: E402

FAMILIES = (
    *("afmoe", "apertus", "arcee", "bailing_hybrid", "bamba", "biogpt", "bitnet", "bloom", "codegen", "cohere"),
    *("cohere2", "ctrl", "cwm", "deepseek_v3", "deepseek_v4", "diffllama", "doge", "ernie4_5", "ernie4_5_moe"),
    *("exaone4", "falcon", "falcon_h1", "falcon_mamba", "flex_olmo", "gemma", "gemma2", "gemma3", "gemma3_text"),
    *("glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe"),
    *("granitemoehybrid", "helium", "hyperclovax", "internlm3", "jamba", "jetmoe", "kimi_linear", "laguna", "lfm2"),
    *("llama", "llama4_text", "mamba", "mamba2", "minicpm3", "minimax", "mistral", "mixtral", "modernbert-decoder"),
    *("mpt", "nanochat", "nemotron_h", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi", "phi3", "phimoe"),
    *("qwen2", "qwen2_moe", "qwen3", "qwen3_5_text", "qwen3_moe", "qwen3_next", "recurrent_gemma", "seed_oss"),
    *("smollm3", "stablelm", "starcoder2", "vaultgemma", "xglm", "zamba"),
)
"""Decoders whose default config is whole, and a few that are refused; all encoders are refused as causal LMs."""

INTRODUCTION = f"""# Families of causal LMs

This page is made by `python docs/families.py > docs/families.md`, here with transformers {transformers.__version__}.

Each family goes through a run on one rank, under ZeRO-3 on both sides, with a tiny model of its default config: the
student cut by blocks and by width, both stages, kd, and the export. Each part is compared with plain transformers:
logits of a cut with the teacher's whose block is skipped, the losses of every step with a plain loop's, held-out losses
with those of the loaded folder. "right": equal to 2e-4 or better. "refused": with one sentence. "not compared": its
forward draws at random while it trains.

A run measures its own models in the same way before it begins, also those of families that are not listed here: see
`ted_ds/models/probe.py`.

| family | {" | ".join(PARTS)} | why |
|---|{"---|" * len(PARTS)}---|
"""


def row(family: str) -> str:
    """The family's line of the table."""
    workers = Workers(1)  # for each family a new process: DeepSpeed keeps memory of its engines
    with tempfile.TemporaryDirectory() as folder:
        try:
            (found,) = workers.run(check_family, Path(folder) / "project", family)
        except AssertionError as error:
            reason = "it takes minutes" if "came back" in str(error) else str(error).strip().splitlines()[-1][:200]
            found = dict.fromkeys(PARTS, f"not run: {reason}")
        finally:
            workers.close()
    said = [text.partition(": ")[2].replace("|", "/") for text in found.values() if text != RIGHT]
    why = re.sub(r"(?:the )?(teacher|student|model) '?\S*/project/\w+'?", r"the \1", "; ".join(dict.fromkeys(said)))
    return f"| {family} | {' | '.join(found[part].partition(':')[0] for part in PARTS)} | {why} |"


def main(families: list[str]) -> None:
    """Prints the page, or the rows of `families`."""
    if not families:
        print(INTRODUCTION, end="", file=PAGE)
    with ThreadPoolExecutor(2) as pool:
        for line in pool.map(row, families or FAMILIES):
            print(line, file=PAGE, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
