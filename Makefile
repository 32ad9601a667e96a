# make demo: the whole pipeline on its embedded data.  make test: all tests.  Both install what they need into .venv first.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
CPU_ENV := DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PATH="$(abspath $(VENV))/bin:$$PATH"

.PHONY: install demo reproduce test test-fast check lint clean

install: $(VENV)/.installed

# torch first: another package's looser range would pull gigabytes of CUDA wheels.
$(VENV)/.installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q "torch==2.13.0"
	$(PY) -m pip install -q "torch==2.13.0" -r requirements-dev.txt
	$(CPU_ENV) $(PY) tools/build_ops.py
	touch $@

demo: install
	$(PY) -m pipeline.demo --config pipeline/recipes/demo.yaml

reproduce: install
	$(PY) -m pipeline.demo --config pipeline/recipes/reproduce.yaml

test: check

check: lint
	$(CPU_ENV) $(PY) -m pytest -q

test-fast: install
	$(CPU_ENV) $(PY) -m pytest -q -m "not slow"

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf runs
