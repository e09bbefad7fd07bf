# Two commands for a stranger: `make demo` and `make test`. Each sets up .venv first. `make soak`: docs/reliability.md.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO ?= runs/demo

.PHONY: demo test lint soak clean

demo: $(VENV)/.demo
	$(BIN)/python launch/study.py --config=configs/study.py:demo --workdir=$(DEMO)

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 tests

soak: $(VENV)/.test
	$(BIN)/python -m tests.faults.soak

lint: $(VENV)/.test
	$(BIN)/ruff check .

# $(VENV)/.demo and $(VENV)/.test say that the extra of this name is installed.
$(VENV)/.%: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "mednext_jax needs Python 3.11, 3.12 or 3.13; $$($(PYTHON) --version) found. Use: make PYTHON=python3.12 ..."; exit 1; }
	@echo "setting up $(VENV): packages are downloaded once, a minute or more (1.3 GB on the disk)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --quiet --editable ".[$*]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
