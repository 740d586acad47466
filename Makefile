# make quickstart: the whole pipeline on this machine.   make test: lint, types, and a test of everything that holds.
# make test-all: also the slow cases, each of which has its like in `make test`.
# make torture: kills and damages without end.   make bench-check: the CPU ratios against the committed ones.
# All of them make their own environment in $(VENV) first; what they need is Python 3.11 to 3.14 and a C++ compiler.

VENV ?= .venv
PYTHON ?= python3
STAMP := $(VENV)/.installed

# DeepSpeed compiles an op at its first start and looks for ninja on PATH
export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: quickstart test test-all torture bench-check venv

quickstart: $(STAMP)
	$(VENV)/bin/python -m ted_ds.cli.main quickstart

test: $(STAMP)
	ruff format --check .
	ruff check .
	mypy
	pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-all: $(STAMP)
	pytest

# tests/faults, with 60 kills and 1000 damaged checkpoints; a quarter of an hour on 2 cores
torture: $(STAMP)
	TED_DS_TORTURE=10 pytest -s tests/faults

# about 3 minutes on 2 cores that do nothing else; up to three times that if a ratio seems lost; nothing on a kind of
# machine of which no results are committed
bench-check: $(STAMP)
	$(VENV)/bin/python -m benchmarks.check

venv: $(STAMP)

# pip's own variables say where packages come from, e.g. PIP_EXTRA_INDEX_URL an index of torch's CPU wheels
$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 14) else \
	  "ted_ds needs Python 3.11 to 3.14, $(PYTHON) is %d.%d: run make PYTHON=python3.13" % v)'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@
