# make demo: the whole pipeline on the shipped model.  make test: all tests but vLLM's.  Each sets .venv up by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export OMP_NUM_THREADS ?= 2

.PHONY: demo test coverage mutation faults fuzz gpu test-vllm .venv-vllm lint format pipeline results llm latency bench docs generated schemas tutorial families dist release-check clean FORCE

demo: $(READY)
	$(BIN)/spd-calib demo -o runs/demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests --ignore tests/with_vllm

# Lines of spd_calib that the tests run, in processes they start, too; fails below 90 %.
coverage: $(READY)
	rm -rf runs/coverage && mkdir -p runs/coverage
	COVERAGE_FILE=$(CURDIR)/runs/coverage/data OMP_NUM_THREADS=1 $(BIN)/python -m coverage run -m pytest tests --ignore tests/with_vllm
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --fail-under 90

# Which changes of the code the tests would not notice, in results/mutation/ (most of an hour; EVERY=4: a quarter of them).
EVERY ?= 1
mutation: $(READY)
	$(BIN)/python benchmarks/mutation.py --every $(EVERY)

# Every command killed, interrupted, out of disk, two at once, a rank dying, in results/reliability/ (most of an hour).
faults: $(READY)
	$(BIN)/python benchmarks/faults.py -o results/reliability/faults.json

# An hour of files that no reader may half accept; make test runs a hundred of each kind.
FUZZ_EXAMPLES ?= 60000
fuzz: $(READY)
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest tests/test_hypothesis.py

# What one GPU says in ten minutes, in results/gpu/; by the Python that has its torch. No vLLM, no network.
GPU_PYTHON ?= python3
gpu:
	$(GPU_PYTHON) benchmarks/gpu.py

# The vLLM plugin on a real vLLM (CPU build, two to four ranks), in an environment of its own.
test-vllm: $(VENV)-vllm/.ready
	OMP_NUM_THREADS=1 $(VENV)-vllm/bin/python -m pytest tests/with_vllm -rs

.venv-vllm: $(VENV)-vllm/.ready

# Beside the environment: its Linux build wants CUDA's torch (tests/with_vllm/torchvision_on_a_cpu.py).
TORCHVISION := torchvision==0.28.0

$(VENV)-vllm/.ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet --no-deps -r constraints-vllm.txt
	$(VENV)-vllm/bin/python -m pip install --quiet --no-deps --target $(VENV)-vllm/torchvision $(TORCHVISION)
	$(VENV)-vllm/bin/python -m pip install --quiet --no-deps -e .
	touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python docs/generate.py --check

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,docs]'
	touch $@

# make pipeline RECIPE=recipes/demo.yaml: profile, plan, eval and report into results/demo, only what is out of date.
# Each step depends on its own section of the recipe and on the step before.
RECIPE ?= recipes/demo.yaml
OUT ?= $(patsubst recipes/%.yaml,results/%,$(RECIPE))
SECTIONS := runs/sections/$(patsubst recipes/%.yaml,%,$(RECIPE))
RESULTS := $(if $(shell grep -s '^eval:' $(RECIPE)),$(OUT)/results.json)

pipeline: $(OUT)/report.html

$(SECTIONS)/%.yaml: FORCE | $(READY)
	@$(BIN)/python recipes/section.py $(RECIPE) $* $@

$(OUT)/profile.json: $(SECTIONS)/profile.yaml | $(READY)
	@mkdir -p $(OUT)
	$(BIN)/spd-calib profile --recipe $(RECIPE) -o $@

$(OUT)/plan.json: $(OUT)/profile.json $(SECTIONS)/plan.yaml
	$(BIN)/spd-calib plan $< --recipe $(RECIPE) -o $@

$(OUT)/results.json: $(OUT)/plan.json $(SECTIONS)/eval.yaml
	$(BIN)/spd-calib eval $< --recipe $(RECIPE) -o $@

$(OUT)/report.html: $(OUT)/profile.json $(OUT)/plan.json $(RESULTS)
	$(BIN)/spd-calib report $(OUT) -o $@ --png $(OUT)/sensitivity.png

# Everything in results/ that needs no GPU and no model beyond the shipped one and ../shared.
results: $(READY)
	$(MAKE) pipeline RECIPE=recipes/demo.yaml
	$(MAKE) pipeline RECIPE=recipes/stories260k/tp2.yaml
	$(MAKE) pipeline RECIPE=recipes/stories260k/tp4.yaml

# What dropping attention syncs costs SmolLM2 135M and Gemma 3 270M, and what is won back, in results/llm/ (a day on two
# cores; goes on where it stopped): the paper's table of each, and what every method without training leaves of SmolLM2.
LLMS := build/llms
TEXTS := --data ../shared/data/wikitext2-a.txt --second ../shared/data/tinystories-eval.jsonl
llm: $(READY)
	test -d $(LLMS)/smollm2-135m || ../shared/models/real_llms.sh $(LLMS) $(BIN)/python
	$(BIN)/python benchmarks/paper_table.py $(LLMS)/smollm2-135m --tp 3 $(TEXTS) --tasks ../shared/tasks/make.py
	$(BIN)/python benchmarks/paper_table.py $(LLMS)/gemma3-270m --tp 4 $(TEXTS) --shares 1 --sequences 48 --trained 144 \
		--measured 12 --steps 60 --methods "as is, no estimate;as is;free at run time;distilled"
	$(BIN)/python benchmarks/recovery_llm.py $(LLMS)/smollm2-135m --tp 3 $(TEXTS) --sequences 72 --judged 8 --measured 16 \
		--methods "grouping, mean, refit;grouping, predictors, refit" --output results/llm/smollm2-135m-tp3-minutes.json
	$(BIN)/python benchmarks/quantised_syncs.py $(LLMS)/smollm2-135m --tp 3 --data ../shared/data/wikitext2-a.txt \
		--seq-len 96 --choose 2 --verify 8 -o results/llm/quantised_syncs.json

# What plans save over a link with a delay, or of a limited rate, and what a choice for each phase could: needs root, ip,
# tc and /dev/net/tun; the first without them on loopback only.
latency: $(READY)
	$(BIN)/python benchmarks/link.py
	$(BIN)/python benchmarks/limited_link.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/two_phases.py

# What the tool itself costs, kept in results/benchmarks/.
bench: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/profiling.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/memory_per_rank.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/budgets.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/planning.py
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/streaming.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/latency_model.py

# The pages that are generated: schemas and formats.md from the formats, cli.md from the commands. make lint fails on drift.
generated: $(READY)
	$(BIN)/python docs/generate.py

schemas: generated

# What happens with every causal language model of transformers, into docs/families.md (some minutes).
families: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/families.py

# Runs every command of the tutorial and puts what it printed behind it (some minutes).
tutorial: $(READY)
	$(BIN)/python docs/rerun.py docs/tutorial.md

# The documentation as HTML in build/docs; warnings and broken links between pages are errors. No network.
docs: $(READY)
	$(BIN)/python docs/generate.py --check
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

# Wheel and sdist in dist/.
dist: $(READY)
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .

# Before a release: what is built is complete, and the wheel alone, in an empty environment, runs the demo offline.
release-check: lint docs dist
	$(BIN)/python -m twine check --strict dist/*
	rm -rf build/release && $(PYTHON) -m venv build/release
	build/release/bin/python -m pip install --quiet -c constraints.txt dist/*.whl
	cd build/release && HF_HUB_OFFLINE=1 bin/spd-calib demo -o demo
	cd build/release && bin/spd-calib check demo/plan.json

clean:
	rm -rf runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
