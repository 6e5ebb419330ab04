# Needs Python 3.10 to 3.13, git and make; everything else goes into a virtual environment, once.
PYTHON ?= python3
VENV = .venv
# The versions to install. An empty file (/dev/null) lets pip choose the newest ones.
CONSTRAINTS = constraints.txt
# The extra to install.
EXTRA = dev
# What pip is to be told when it installs torch, e.g. the index of the builds without CUDA:
#   make demo TORCH_INDEX="--index-url https://download.pytorch.org/whl/cpu"
TORCH_INDEX ?=
# Test processes, with one torch thread each: more threads only wait for each other.
WORKERS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

DOCS_STAMP := $(VENV)/.installed-docs

.PHONY: demo test test-all fuzz check docs test-wheel test-pythons test-lowest test-newest clean

demo: $(STAMP)
	$(BIN)/sb3-pg demo

# The tests that take less than some seconds each; test-all adds the slow ones.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# Random arguments, spaces and faulty envs: each case learns, or says what is wrong. SEED=1 runs other ones.
CASES ?= 10000
SEED ?= 0
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --cases $(CASES) --seed $(SEED)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Warnings are errors: a broken link, a notebook that fails, an example that no longer fits.
docs: $(DOCS_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

# The README's first lines, run with the built wheel in an empty environment.
test-wheel: $(STAMP)
	.ci/test-wheel

# On each supported Python that is found; PYTHONS="3.10 3.13" chooses.
test-pythons:
	.ci/test-pythons

# With the lower bound of each dependency, then with the newest release of each.
test-lowest:
	$(PYTHON) .ci/lowest_constraints.py > .venv-lowest.txt
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=.venv-lowest.txt EXTRA=tests

test-newest:
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=/dev/null

# torch comes first and by its exact version, so that no later requirement can pull in another build.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH_INDEX) $$(grep '^torch==' $(CONSTRAINTS) || echo torch)
	$(BIN)/python -m pip install --constraint $(CONSTRAINTS) --editable '.[$(EXTRA)]'
	touch $(STAMP)

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --constraint $(CONSTRAINTS) --editable '.[dev,docs]'
	touch $(DOCS_STAMP)

clean:
	rm -rf docs/_build docs/_tables docs/_figures .venv .venv-* build dist .mypy_cache .pytest_cache .ruff_cache
	find sb3_pg tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
