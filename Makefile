# Two commands do all the set-up: `make demo` (the main job on real scans) and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Most tests wait for SLURM, most of their time.
WORKERS := 2
READY := $(VENV)/.ready
# A server's 90 packages stay out of ours.
MLFLOW := .cache/mlflow
MLFLOW_READY := $(MLFLOW)/.ready

.PHONY: setup demo test soak recipes check clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.12"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch torchvision
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[jobs,formats,compress,nets,mlflow,dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/python -m jobs.demo

$(MLFLOW_READY): tests/mlflow-constraints.txt
	$(PYTHON) -m venv $(MLFLOW)
	$(MLFLOW)/bin/python -m pip install --quiet --disable-pip-version-check -c tests/mlflow-constraints.txt mlflow
	touch $(MLFLOW_READY)

test: check $(MLFLOW_READY)
	bash tests/install.sh
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

# The full counts of what `make test` plays once; the faults leave a line each in docs/soak.txt.
soak: $(READY)
	bash tests/install.sh
	HPC_SOAK=1 $(BIN)/python -m pytest tests/test_faults.py tests/test_scenarios.py tests/test_drill.py tests/test_strategies_speed.py

# The tiny form of every recipe on real data; `make test` plays one of each task.
recipes: $(READY)
	HPC_RECIPES=all $(BIN)/python -m pytest tests/test_recipes.py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-data: $(READY)
	$(BIN)/python -m tests.bench.data
	$(BIN)/python -m tests.bench.augmentation
	$(BIN)/python -m tests.bench.packing

bench-logs: $(READY) $(MLFLOW_READY)
	$(BIN)/python -m tests.bench.logs
	$(BIN)/python -m tests.bench.home

bench-%: $(READY)
	$(BIN)/python -m tests.bench.$*

clean:
	rm -rf $(VENV) demo recipes-data .cache .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
