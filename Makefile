# The whole chain, or any stage of it:  make RUN=pipelines/demo.toml [STORE=dir] [RUNS=dir] [SET="a.b=c ..."] [FORCE=1]
# The stages decide by content whether there is work; make only orders them. Works with GNU Make 3.81.

RUN ?= pipelines/demo.toml
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Which MLX: Apple GPUs need no extra; elsewhere an NVIDIA driver decides.
ifeq ($(shell uname -s),Darwin)
EXTRA ?=
else ifneq ($(shell command -v nvidia-smi 2>/dev/null),)
EXTRA ?= cuda13
else
EXTRA ?= cpu
endif
COMMA := ,
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := all
.PHONY: all demo install test faults learn check clean

include pipelines/rules.mk

# One thread of OpenBLAS: two are a fifth quicker on idle cores, but wait for each other many times as long on busy ones.
demo:
	@OPENBLAS_NUM_THREADS=1 $(MAKE) --no-print-directory all RUN=pipelines/demo.toml

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".$(if $(EXTRA),[$(EXTRA)])"
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[$(if $(EXTRA),$(EXTRA)$(COMMA))dev]"
	@touch $@

# Files in their order: xdist puts those of few tests last, but some of them are long, and one core waits.
test: $(VENV)/installed-dev
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# Every fault, not the samples of `make test`; ends with a table of what must hold and what was measured.
# Over an hour on two cores, eight minutes on 32.
faults: $(VENV)/installed-dev
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults --full --numprocesses auto --dist loadgroup

# What a LoRA learns, in figures: all pictures, variations and broken trainings. Half an hour on two cores at most.
learn: $(VENV)/installed-dev
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest tests/learning --full --numprocesses 2 --dist loadfile

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# Never the store, never the results.
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -not -path "./$(VENV)/*" -exec rm -rf {} +
