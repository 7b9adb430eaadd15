# `make demo` needs only the core packages; `make test` the models' packages too. Both make .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all torture bench lint clean

demo: $(VENV)/core
	@echo "One batch over the bundled instrumental:"
	@$(BIN)/python run_pipeline.py once pipeline/demo
	@echo
	@find outbox -mindepth 1 -not -name .gitkeep | sort
	@echo
	@echo "Listen to outbox/paper-lanterns--*/variations/*.wav. Drop your own tracks into inbox/ and run:"
	@echo "    $(BIN)/python run_pipeline.py once"
	@echo "Add the models (MusicGen, CLAP; about 6 GB of packages and as much of weights):"
	@echo "    $(BIN)/pip install -r requirements.txt && $(BIN)/python run_pipeline.py models fetch"

# In two processes, as much of it waits; a file's tests stay together, they share what they make.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/full
	$(PYTEST)

# With the tests that are long by nature, and with the coverage that is asked for.
test-all: $(VENV)/full
	$(PYTEST) -m "not torture" --cov --cov-report=term

# The long part of the fault harness: about an hour.
torture: $(VENV)/full
	$(BIN)/python -m pytest tests/faults -m torture

# MusicGen against its peers, on random weights of the true size (6 GB, made once): about half an hour.
bench: $(VENV)/full
	$(BIN)/python bench/musicgen.py

lint: $(VENV)/full
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps rather than the folder: a changed list of requirements installs again.
$(VENV)/core: requirements-core.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-core.txt
	touch $@

$(VENV)/full: requirements.txt requirements-core.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@ $(VENV)/core
