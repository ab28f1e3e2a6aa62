# make demo    quantize a real 135M model with all five methods, measure every artifact, print the table
# make test    lint, types and tests; offline once the environment is there
# make model   the demo's model alone, into models/, for trying the commands of README.md
# make report  recipes/table.yaml on the demo's model, and on stories15M where its data lie beside: reports/table-*
# make bench   the committed comparisons with other engines: benchmarks/results/ and docs/performance.md; hours
# make venv    the environment alone: .venv, installed from requirements.lock; made again when the lock changes

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The name of the stamp holds the content of the lock, so a changed lock is a missing stamp.
STAMP := $(VENV)/.installed-$(shell cksum < requirements.lock | tr -d ' \t')
PIP := $(BIN)/python -m pip --disable-pip-version-check
OUT ?= reports/demo
RUNS ?= 3

.DEFAULT_GOAL := help
.PHONY: help venv demo model report bench test test-slow lint format readme docs lock wheel clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile
	@echo "also: make lint, format, test-slow, readme, docs, lock, wheel, clean"
	@echo "make demo MODEL=... takes another model: a folder, a .gguf file or a hub id"

venv: $(STAMP)

# The tools that build come first and from the lock, so that no build fetches others for itself.
$(STAMP): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; name another: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.installed-*
	$(PIP) install $$(grep -E '^(pip|setuptools|wheel|hatchling)==' requirements.lock)
	$(PIP) install --no-build-isolation -r requirements.lock
	$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m quantkit.demo --out $(OUT) $(if $(MODEL),--model $(MODEL))

model: $(STAMP)
	$(BIN)/python -m quantkit.demo --fetch models

# The table of recipes/table.yaml on both models; the stock tasks take their questions from files where those lie beside.
# REPORTS=DIR writes elsewhere, such as for benchmarks/repeat.py.
REPORTS ?= reports
DATA := ../shared/data
TABLE = $(BIN)/quantkit run table --force
TASKS = $(if $(wildcard $(DATA)/tasks),arc_easy,basics)
QUESTIONS = --set 'bench.accuracy.tasks=[$(TASKS)]' \
	$(if $(wildcard $(DATA)/tasks),--set 'bench.accuracy.data={arc_easy: $(DATA)/tasks/arc_easy.test.jsonl}')
report: model
	$(TABLE) --model models/SmolLM2-135M-Instruct.Q4_1.gguf --out $(REPORTS)/table-smollm2 $(QUESTIONS) --set method.group_size=64
	@if test -d $(DATA)/models/stories15M; then \
		$(TABLE) --model $(DATA)/models/stories15M --out $(REPORTS)/table-stories15m $(QUESTIONS) \
			--set method.group_size=32 --set method.block_size=32 --set model.dtype=float32 \
			--set calibration.length=256 --set bench.throughput.prompt_tokens=[64,192] \
			--set bench.divergence.set=$(DATA)/text/tinystories.txt --set calibration.set=$(DATA)/text/tinystories.txt; \
	else echo "no $(DATA)/models/stories15M: its table is left as it is" >&2; fi

# MODEL is a Hugging Face folder, which is all that the other engines read; the committed figures are of SmolLM2-135M,
# re-gauged. SET='KEY=VALUE ...' changes the recipes, such as the texts they name; ENGINES leaves engines out;
# MAX_MEMORY=SIZE makes our rows of GPTQ and AWQ once more under it, 600MB in the committed figures.
COMPARE = $(BIN)/quantkit compare --model $(MODEL) --runs $(RUNS) $(if $(ENGINES),--engines $(ENGINES)) \
	$(foreach setting,$(SET),--set $(setting)) --force
GPTQ = benchmarks/compare_gptq
LIMITED = $(if $(MAX_MEMORY),--max-memory $(MAX_MEMORY))
bench: $(STAMP)
	@test -n "$(MODEL)" || { echo "name a Hugging Face folder: make bench MODEL=DIR" >&2; exit 1; }
	$(COMPARE) $(GPTQ).yaml $(GPTQ)_unquantized.yaml $(GPTQ)_one_pass.yaml $(GPTQ)_plain.yaml $(LIMITED) \
		--out benchmarks/results/gptq.json
	$(COMPARE) $(GPTQ)_asymmetric.yaml $(GPTQ)_asymmetric_corrected.yaml --out benchmarks/results/gptq_asymmetric.json
	$(COMPARE) benchmarks/compare_awq.yaml benchmarks/compare_awq_nearest.yaml \
		benchmarks/compare_awq_nearest_balanced.yaml $(LIMITED) --out benchmarks/results/awq.json
	$(COMPARE) benchmarks/compare_nf4.yaml --out benchmarks/results/nf4.json
	$(COMPARE) benchmarks/compare_int8.yaml --out benchmarks/results/int8.json
	$(BIN)/python benchmarks/fill_performance.py

test: $(STAMP) lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

test-slow: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "slow and not gpu"

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Fills the generated parts of README.md: the demo's table, the recipe reference, the help of every command.
readme: $(STAMP)
	$(BIN)/python docs/fill_readme.py

# The documents as a site in build/site, to be opened from the disk; its tools have an environment of their own.
docs: build/docs/.installed
	NO_MKDOCS_2_WARNING=1 build/docs/bin/python -m mkdocs build --strict --quiet
	@echo build/site/index.html

build/docs/.installed: docs/requirements.lock
	$(PYTHON) -m venv build/docs
	build/docs/bin/python -m pip --disable-pip-version-check install --quiet -r docs/requirements.lock
	@touch $@

wheel: $(STAMP)
	$(PIP) wheel --no-build-isolation --no-deps -w dist .

# A clean resolve of pyproject.toml; numpy as gptqmodel pins it, so that the `gptq` extra fits on top.
lock:
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install -U pip setuptools wheel hatchling
	build/lock/bin/python -m pip install ".[dev,llama-cpp,compressed-tensors]" numpy==2.2.6
	grep '^#' requirements.lock > build/requirements.lock
	build/lock/bin/python -m pip freeze --all | grep -v '^quantkit' | sed 's/+[a-z0-9.]*$$//' >> build/requirements.lock
	mv build/requirements.lock requirements.lock
	rm -rf build/lock

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
	find quantkit tests -name __pycache__ -type d -exec rm -rf {} +
