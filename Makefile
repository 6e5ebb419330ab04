# Needs Python (3.10 or newer), git and make; everything else goes into .venv, once.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test check clean

demo: $(STAMP)
	$(BIN)/sb3-pg demo

# Two workers with one torch thread each: more threads only wait for each other.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch comes first and by its exact version, so that no later requirement can pull in another build.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache
	find sb3_pg tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
