"""`python docs/families.py > docs/families.md`: every family of causal LMs through a whole run, against transformers.

About 10 minutes on a core. `python docs/families.py llama gpt2` prints these rows alone.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).parents[1]))

from ted_ds.job.world import World, init_world
from tests.families import PARTS, RIGHT, check_family

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


LIMIT_S = 120
"""For a family; some have kernels for GPUs alone, and loops in their place elsewhere."""


class _TooLong(BaseException):
    """The family's time is over; no other handler must take it for a fault."""


def _end(number: int, frame: Any) -> None:
    raise _TooLong


def row(world: World, family: str) -> tuple[str, dict[str, str]]:
    """The family's line of the table, and what was said of the parts that are not right."""
    with tempfile.TemporaryDirectory() as folder:
        signal.alarm(LIMIT_S)
        try:
            found = check_family(world, Path(folder) / "project", family)
        except _TooLong:
            found = dict.fromkeys(PARTS, f"not run: its plain torch code takes more than {LIMIT_S} s")
        except Exception as error:  # a family whose default config is not one that can be built
            found = dict.fromkeys(PARTS, f"no default config: {type(error).__name__}")
        finally:
            signal.alarm(0)
    words = [found[part].partition(":")[0] for part in PARTS]
    said = {part: re.sub(r"\S*/project/", "", text) for part, text in found.items() if text != RIGHT}
    return f"| {family} | {' | '.join(words)} |", said


def main(families: list[str]) -> None:
    """Prints the page, or the rows of `families`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    world = init_world()
    signal.signal(signal.SIGALRM, _end)
    if not families:
        print(INTRODUCTION, end="")
    sentences: dict[str, dict[str, str]] = {}
    for family in families or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        line, sentences[family] = row(world, family)
        print(line, flush=True)
    print("\n## What is not right, and why\n")
    for family, said in sentences.items():
        for text in dict.fromkeys(said.values()):
            parts = [part for part, other in said.items() if other == text]
            print(f"* {family}, {'all parts' if len(parts) == len(PARTS) else ', '.join(parts)}: {text}")


if __name__ == "__main__":
    main(sys.argv[1:])
