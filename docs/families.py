"""`python docs/families.py > docs/families.md`: every family of causal LMs through a whole run, against transformers.

About a quarter of an hour on 2 cores. `python docs/families.py llama gpt2` prints these rows alone.
"""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).parents[1]))

with contextlib.redirect_stdout(sys.stderr):  # where DeepSpeed logs to as it is imported
    from tests.families import PARTS, RIGHT, check_family
    from tests.workers import Workers

INTRODUCTION = f"""# Families of causal LMs

This page is made by `python docs/families.py > docs/families.md`, here with transformers {transformers.__version__}.

Each family goes through a run on one rank, under ZeRO-3 on both sides, with a tiny model of its default config: the
student cut by blocks and by width, both stages, kd, and the export. Each part is compared with plain transformers:
logits of a cut with the teacher's whose block is skipped, the losses of every step with a plain loop's, held-out losses
with those of the loaded folder. "right": equal to 2e-4 or better. "refused": with one sentence, before data is packed.

A run measures its own models in the same way before it begins, whatever their family: see `ted_ds/models/probe.py`.

| family | {" | ".join(PARTS)} |
|---|{"---|" * len(PARTS)}
"""


def row(family: str) -> tuple[str, dict[str, str]]:
    """The family's line of the table, and what was said of the parts that are not right."""
    workers = Workers(1)  # for each family a new process: DeepSpeed keeps memory of its engines
    with tempfile.TemporaryDirectory() as folder:
        try:
            (found,) = workers.run(check_family, Path(folder) / "project", family)
        except AssertionError as error:
            reason = "it takes minutes" if "came back" in str(error) else str(error).strip().splitlines()[-1][:200]
            found = dict.fromkeys(PARTS, f"not run: {reason}")
        finally:
            workers.close()
    words = [found[part].partition(":")[0] for part in PARTS]
    said = {part: re.sub(r"\S*/project/", "", text) for part, text in found.items() if text != RIGHT}
    return f"| {family} | {' | '.join(words)} |", said


def main(families: list[str]) -> None:
    """Prints the page, or the rows of `families`."""
    if not families:
        print(INTRODUCTION, end="")
    sentences: dict[str, dict[str, str]] = {}
    families = families or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    with ThreadPoolExecutor(2) as pool:
        for family, (line, said) in zip(families, pool.map(row, families), strict=True):
            print(line, flush=True)
            sentences[family] = said
    print("\n## What is not right, and why\n")
    for family, said in sentences.items():
        for text in dict.fromkeys(said.values()):
            parts = [part for part, other in said.items() if other == text]
            print(f"* {family}, {'all parts' if len(parts) == len(PARTS) else ', '.join(parts)}: {text}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
