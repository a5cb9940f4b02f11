# make demo: the whole pipeline on the shipped model.  make test: all tests.  Each sets .venv up by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export OMP_NUM_THREADS ?= 2

.PHONY: demo test test-vllm lint format pipeline results schemas latency clean FORCE

demo: $(READY)
	$(BIN)/spd-calib demo -o runs/demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore tests/with_vllm

# The vLLM plugin on a real vLLM (CPU build, two to four ranks), in an environment of its own.
test-vllm: $(VENV)-vllm/.ready
	OMP_NUM_THREADS=1 $(VENV)-vllm/bin/python -m pytest tests/with_vllm -rs

$(VENV)-vllm/.ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet --no-deps -r constraints-vllm.txt
	$(VENV)-vllm/bin/python -m pip install --quiet --no-deps -e .
	touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# make pipeline RECIPE=recipes/demo.yaml: profile, plan, eval and figure into results/demo, only what is out of date.
# Each step depends on its own section of the recipe and on the step before.
RECIPE ?= recipes/demo.yaml
OUT ?= $(patsubst recipes/%.yaml,results/%,$(RECIPE))
SECTIONS := runs/sections/$(patsubst recipes/%.yaml,%,$(RECIPE))
STEPS := $(OUT)/sensitivity.png $(if $(shell grep -s '^eval:' $(RECIPE)),$(OUT)/results.json)

pipeline: $(STEPS)

$(SECTIONS)/%.yaml: FORCE | $(READY)
	@$(BIN)/python recipes/section.py $(RECIPE) $* $@

$(OUT)/profile.json: $(SECTIONS)/profile.yaml | $(READY)
	@mkdir -p $(OUT)
	$(BIN)/spd-calib profile --recipe $(RECIPE) -o $@

$(OUT)/plan.json: $(OUT)/profile.json $(SECTIONS)/plan.yaml
	$(BIN)/spd-calib plan $< --recipe $(RECIPE) -o $@

$(OUT)/results.json: $(OUT)/plan.json $(SECTIONS)/eval.yaml
	$(BIN)/spd-calib eval $< --recipe $(RECIPE) -o $@

$(OUT)/sensitivity.png: $(OUT)/profile.json $(OUT)/plan.json
	$(BIN)/spd-calib report $< --plan $(OUT)/plan.json --png $@

# Everything in results/ that needs no GPU and no model beyond the shipped one and ../shared.
results: $(READY)
	$(MAKE) pipeline RECIPE=recipes/demo.yaml
	$(MAKE) pipeline RECIPE=recipes/stories260k/tp2.yaml
	$(MAKE) pipeline RECIPE=recipes/stories260k/tp4.yaml

# What dropped sync points save over a link with a delay; needs root, ip and /dev/net/tun, else loopback only.
latency: $(READY)
	$(BIN)/python benchmarks/link.py

# The JSON Schemas of the travelling files, for who reads them in another language; a test fails when they drift.
schemas: $(READY)
	mkdir -p docs/schemas
	$(BIN)/python -c "from pathlib import Path; from spd_calib.formats.files import FORMATS, schema; \
	[Path(f'docs/schemas/{name}.schema.json').write_text(schema(name)) for name in FORMATS]"

clean:
	rm -rf runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
