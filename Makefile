# `make demo` needs only the core packages; `make test` the models' packages too. Both make .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-all test-demucs test-audiocraft test-audiobox torture bench lint clean

demo: $(VENV)/core
	@echo "One batch over the bundled instrumental:"
	@$(BIN)/python run_pipeline.py demo
	@echo
	@find outbox -mindepth 1 -not -name .gitkeep | sort
	@echo
	@echo "Listen: open $(CURDIR)/outbox/index.html. Drop your own tracks into inbox/ and run:"
	@echo "    $(BIN)/python run_pipeline.py once"
	@echo "Add the models (MusicGen, CLAP; about 6 GB of packages and as much of weights):"
	@echo "    $(BIN)/pip install -r requirements.txt && $(BIN)/python run_pipeline.py models fetch"

# In two processes, since many tests wait; tests/conftest.py says which tests share a process.
PYTEST := -m pytest -n 2 --dist loadfile

test: $(VENV)/full
	$(BIN)/python $(PYTEST)

# Also the tests that take long by nature; fails if the coverage is below the limit in pyproject.toml.
test-all: $(VENV)/all
	$(BIN)/python $(PYTEST) -m "not torture and not demucs and not audiocraft and not audiobox" --cov --cov-report=term

# The tests that need an optional package, each in an environment that has it.
test-demucs: $(VENV)/with-demucs/done
	$(VENV)/with-demucs/bin/python -m pytest -m demucs tests/engines/musicgen/test_melody.py

test-audiocraft: $(VENV)/with-audiocraft/done
	$(VENV)/with-audiocraft/bin/python -m pytest -m audiocraft tests/engines/audiocraft

test-audiobox: $(VENV)/with-audiobox/done
	$(VENV)/with-audiobox/bin/python -m pytest -m audiobox tests/engines/test_audiobox.py

# The long part of the fault harness: about an hour.
torture: $(VENV)/full
	$(BIN)/python -m pytest tests/faults -m torture

# MusicGen against its peers, on random weights of the true size (6 GB, made once): about a quarter of an hour.
bench: $(VENV)/bench
	$(BIN)/python bench/musicgen.py

lint: $(VENV)/full
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The targets are stamp files and not the folder, so that a changed list of requirements is installed again.
$(VENV)/core: requirements-core.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP_INSTALL) -r requirements-core.txt
	touch $@

$(VENV)/full: requirements.txt requirements-core.txt requirements-models.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP_INSTALL) -r requirements.txt
	touch $@ $(VENV)/core

$(VENV)/all: requirements-test-all.txt requirements-bench.txt requirements-s3.txt requirements-search.txt requirements-ray.txt $(VENV)/full
	$(BIN)/$(PIP_INSTALL) -r requirements-test-all.txt
	touch $@

$(VENV)/bench: requirements-bench.txt $(VENV)/full
	$(BIN)/$(PIP_INSTALL) -r requirements-bench.txt
	touch $@

# An environment on top of the first: it uses the packages of the first by way of a .pth file, and installs only what
# is missing or needed in another version, by the command that the program tells its users to run.
$(VENV)/with-demucs/done: MODULE := pipeline.engines.musicgen.demucs
$(VENV)/with-audiobox/done: MODULE := pipeline.engines.audiobox
$(VENV)/with-audiocraft/done: MODULE := pipeline.engines.audiocraft
$(VENV)/with-audiocraft/done: requirements-audiocraft.txt
$(VENV)/with-%/done: $(VENV)/full
	rm -rf $(@D)
	$(BIN)/python -m venv $(@D)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> "$$($(@D)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/first.pth"
	command="$$($(BIN)/python -c "from $(MODULE) import INSTALL_COMMAND; print(INSTALL_COMMAND)")" && \
		PATH="$(abspath $(@D))/bin:$$PATH" PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1 sh -c "$$command"
	touch $@
