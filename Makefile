# make demo: the whole pipeline on its embedded data.  make ablation: the tables of docs/RESULTS.md.
# make docs: the documentation as a site.
# make test: all checks, as CI runs them.  make test-fast: those that start no process and train little.
# make test-nightly: the long repeats too.  make test-gpu: on a CUDA device.  make test-one T=...: one file or test.
# Each installs what it needs into .venv first.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
CPU_ENV := DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PATH="$(abspath $(VENV))/bin:$$PATH"

# Test files side by side, in the order of tests/conftest.py; each file's fixtures are made once. One more than two cores have: tests
# wait for the processes that they start.
TEST_PROCESSES ?= 3
PARALLEL := -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

# of make ablation: cells at once; the split that is scored
JOBS ?= 1
SPLIT ?= test
# of make test-one: a folder, a file, or one test as in T='tests/unit/data/test_data.py::test_...'
T ?= tests
export T

.PHONY: install demo reproduce ablation test test-fast test-nightly test-gpu test-one soak lint docs clean

install: $(VENV)/.installed

# The package in place, its command in $(VENV)/bin/clkd, and what `make test` uses.
# torch first: another package's looser range would pull gigabytes of CUDA wheels.
$(VENV)/.installed: pyproject.toml setup.py requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q "torch==2.13.0"
	$(PY) -m pip install -q "torch==2.13.0" -r requirements-dev.txt
	$(CPU_ENV) $(PY) -m tools.build_ops
	touch $@

demo: install
	$(VENV)/bin/clkd run demo

# Teacher and base student from random weights, and the demo with them.
reproduce: install
	$(VENV)/bin/clkd run teacher
	$(VENV)/bin/clkd run base data.processor=runs/teacher/jobs/teacher/model
	$(VENV)/bin/clkd run reproduce

# Settings are chosen with SPLIT=val; the test split is scored once per row and seed.
ablation: install
	$(PY) -m tools.ablation.run ablation --split $(SPLIT) --jobs $(JOBS) --document docs/RESULTS.md

test: lint docs
	$(CPU_ENV) $(PY) -m pytest -q $(PARALLEL) -m "not slurm and not nightly and not gpu"
	$(CPU_ENV) $(PY) -m pytest -q -m "slurm and not nightly"

test-fast: install
	$(CPU_ENV) $(PY) -m pytest -q $(PARALLEL) -m "not slow and not nightly and not gpu"

test-nightly: lint docs
	$(CPU_ENV) $(PY) -m pytest -q $(PARALLEL) -m "not slurm and not gpu"
	$(CPU_ENV) $(PY) -m pytest -q -m slurm
	$(MAKE) soak

test-gpu: install
	HF_HUB_OFFLINE=1 $(PY) -m pytest -q -m gpu

test-one: install
	$(CPU_ENV) $(PY) -m pytest "$$T"

# 30 random faults on a Slurm of this machine's own (root, and Debian's packages for it: see .ci/run).
soak: install
	$(CPU_ENV) PYTHONPATH=. $(PY) tests/cluster/slurm_soak.py

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# README.md, docs/ and what lies beside them as a site in site/; a dead link is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

clean:
	rm -rf runs site
