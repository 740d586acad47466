#!/usr/bin/env bash
""":"
# How fast a recipe trains on these ranks; see `ted-ds bench --help`.
#
#   deepspeed launchers/bench.sh --config launchers/recipes/NAME.yaml [--section.key=value ...]
#   bash launchers/bench.sh ...                      the same: starts the deepspeed launcher itself, see start.sh
#   deepspeed --no_python launchers/bench.sh ...     and torchrun --nproc_per_node N launchers/bench.sh ...
#
# Valid bash and valid Python: bash runs the lines down to `source`, which does not return; Python takes them for a
# docstring.
source "$(dirname "${BASH_SOURCE[0]}")/start.sh" || exit 1
":"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # a clone needs no installation; DeepSpeed compiles an op at the first start and looks for ninja on PATH
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

    from ted_ds.cli.bench import main

    sys.exit(main(sys.argv[1:]))
