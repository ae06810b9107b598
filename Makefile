# Each target sets up what it needs in a virtual environment of its own, by itself.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Many small operations: a second thread per process would only wait for the first.
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test trainers lanes wheel lint docs bench clean

help:
	@echo "make demo   distil a small detector, print a table, draw toy_distillation.png"
	@echo "make test   run all tests"
	@echo "make trainers  test in RF-DETR, pydfine, Ultralytics and LibreYOLO as they are published: half a gigabyte"
	@echo "make lanes  run the core tests on the lowest, the pinned and the newest versions: gigabytes"
	@echo "make wheel  build what a release uploads, and use it as a newcomer would"
	@echo "make lint   ruff, mypy, import-linter"
	@echo "make docs   build the site: pages, notebooks, reference"
	@echo "make bench  measure matching and losses on this machine"

# One stamp per dependency group, renewed when the requirements change.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pip>=25.1'
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[fast,offline,plot,testing]' --group $*
	@touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/python examples/toy_detector/demo.py

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --dist loadfile

trainers: $(VENV)/.installed-test
	tests/trainers.sh $(BIN)/python

lanes:
	tests/lanes.sh

wheel:
	tests/wheel.sh

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -q -W --keep-going -c docs . build/site
	@echo "build/site/docs/index.html"

bench: $(VENV)/.installed-test
	$(BIN)/python examples/benchmarks/assignment.py
	$(BIN)/python examples/benchmarks/matching_page.py
	$(BIN)/python examples/benchmarks/criterion.py
	$(BIN)/python examples/benchmarks/loss_memory.py
	$(BIN)/python examples/benchmarks/term_costs.py
	$(BIN)/python examples/benchmarks/feature_bandwidth.py
	PYTHONPATH=examples $(BIN)/python examples/benchmarks/kd_cost_table.py
	PYTHONPATH=examples $(BIN)/python examples/benchmarks/full_size.py
	$(BIN)/python examples/benchmarks/offline.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis toy_distillation.png
