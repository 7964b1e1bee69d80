# Everything starts from a bare clone with Python 3.11+ and make; each target makes its own .venv once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Tests run side by side, each on one thread; those of one file stay together, since they share what they measured.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

.PHONY: venv demo test test-shown test-sample test-slow check bench docs clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps torchvision
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: venv
	$(BIN)/rankfold demo

test: check
	$(PYTEST) -m 'not slow'

test-shown: venv # what users see first: the examples, the commands of the README, the demo with its figures
	$(BIN)/python -m pytest -m slow tests/test_examples.py tests/digits/test_demo.py tests/cli/test_demo.py

test-sample: venv # one in ten of the random networks with random budgets
	$(PYTEST) -m slow tests/allocation/test_random_networks.py -k "0]"

test-slow: venv
	$(PYTEST) -m slow

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: venv
	$(BIN)/python -m benchmarks.run

docs: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site demo-out
