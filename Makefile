# Everything runs in .venv, which needs only Python >= 3.11.1: requirements.lock has the packages of the program, for
# `up` and `demo`; requirements-dev.lock adds those of tests and linters. Each is installed once, and again only when
# its lock, pyproject.toml or the folder changes: the stamp's name holds their hash.

PYTHON ?=
ARGS ?=
# Not that of an environment: other programs use this name, too.
PORT :=

VENV := .venv
BIN := $(VENV)/bin
hash = $(shell (pwd; cat pyproject.toml $(1)) | (sha256sum 2>/dev/null || shasum -a 256) | cut -c1-16)
STAMP := $(VENV)/.made-$(call hash,requirements.lock)
DEV_STAMP := $(VENV)/.dev-$(call hash,requirements.lock requirements-dev.lock)
# Prints errors only.
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input
# The locks are complete: without --no-deps the pip of Python 3.11 refuses extras (gql[requests]) as unpinned. Wheels
# only, so that no code of a distribution runs while it is installed.
INSTALL_LOCK := $(PIP) install --no-deps --require-hashes --only-binary :all: -r

# Two more than the processors, because many tests mostly wait for servers; six at most, because each worker runs
# its own databases and servers.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); \
	n=$$((n + 2)); [ $$n -gt 6 ] && n=6; echo $$n)

.DEFAULT_GOAL := help
.PHONY: help env demo test test-fast test-slow coverage up down bench docs pictures lint format lock wheel clean

help:
	@echo "make demo    runs everything on a local market and reports; KEEP=1 leaves the servers up"
	@echo "make test    runs the test suite; ARGS='...' are passed to pytest"
	@echo "make test-fast runs the tests that need no server, in less than a minute"
	@echo "make test-slow runs the long scenarios that make test skips, including an hour of real time"
	@echo "make coverage runs make test and reports the lines that it does not run; also as pages in htmlcov"
	@echo "make up      starts database, Dagster and daemon with real providers; PORT=3001 is the port of the UI"
	@echo "make down    stops them"
	@echo "make bench   measures performance against the references"
	@echo "make docs    rewrites what documents quote: the references of commands and settings, the session of the tutorial"
	@echo "make pictures creates docs/pictures from simulated backfills and the demo, with a headless Chromium"
	@echo "make lint    runs ruff, and mypy over package, tests, bench and docs; make format formats the code"
	@echo "make wheel   builds the wheel into dist/"
	@echo "make env     creates the environment of tests and linters; make up and make demo create a smaller one"
	@echo "make lock    resolves both lock files from pyproject.toml; ARGS=--upgrade selects newer versions"
	@echo "make clean   removes the environment and caches, never the data in .fks"
	@echo "PYTHON=...   the interpreter of the environment (>= 3.11.1)"

env: $(DEV_STAMP)
	@:

demo: $(STAMP)
	@$(BIN)/fks-backfill demo $(if $(filter-out 0,$(KEEP)),--keep)

# In the order of conftest.py, not by the number of tests of a module.
test: $(DEV_STAMP)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder -m 'not slow' $(ARGS)

# Tests that start no process and open no connection: rules and pure functions.
test-fast: $(DEV_STAMP)
	@$(BIN)/python -m pytest -n $(WORKERS) -m 'not slow and not server' $(ARGS)

# Distributed by test, not by module: the longest are cases of one function. Then the property tests with all examples.
test-slow: $(DEV_STAMP)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m slow $(ARGS)
	@FKS_TEST_THOROUGH=1 $(BIN)/python -m pytest -n $(WORKERS) -m 'hypothesis and not server' $(ARGS)

# Of the processes of the tests, not of those that they start: see docs/testing.md.
coverage: $(DEV_STAMP)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder -m 'not slow' \
		--cov --cov-report=term:skip-covered --cov-report=html $(ARGS)

up: $(STAMP)
	@$(BIN)/fks-backfill up $(if $(PORT),--port $(PORT))

down: $(STAMP)
	@$(BIN)/fks-backfill down

bench: $(DEV_STAMP)
	@$(BIN)/python -m bench $(ARGS)

docs: $(DEV_STAMP)
	@$(BIN)/python docs/generate.py

pictures: $(DEV_STAMP)
	@$(BIN)/python docs/pictures.py $(ARGS)

lint: $(DEV_STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(DEV_STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

wheel: $(STAMP)
	@$(BIN)/python -m hatchling build -t wheel -d dist

# requirements.lock: the packages of the program, and the build backend that installs the checkout.
# requirements-dev.lock: the additional packages of the extra dev, at the versions of the first. uv is not locked: it is
# a tool of the maintainer, and not part of the environment.
COMPILE = $(VENV)-lock/bin/uv pip compile -q $(ARGS) --universal --python-version 3.11.1 --generate-hashes \
	--only-binary :all: --no-emit-index-url --no-annotate --no-header pyproject.toml

lock:
	@$(find_python); \
	"$$python" -m venv $(VENV)-lock && \
	$(VENV)-lock/bin/python -m pip --disable-pip-version-check -q install 'uv>=0.9' && \
	$(COMPILE) --extra build -o requirements.lock && \
	$(COMPILE) --extra build --extra dev --constraints requirements.lock -o requirements-dev.lock \
		$$(sed -n 's/^\([A-Za-z0-9._-]*\)==.*/--no-emit-package \1/p' requirements.lock | sort -u) && \
	{ echo '-r requirements.lock'; cat requirements-dev.lock; } >$(VENV)-lock/dev && \
	cp $(VENV)-lock/dev requirements-dev.lock; \
	status=$$?; rm -rf $(VENV)-lock; exit $$status

clean:
	rm -rf $(VENV) $(VENV)-lock .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage* htmlcov dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Sets $$python, or reports what is missing. A candidate runs, is new enough and can create environments: Debian moves
# ensurepip from Python to python3-venv.
define find_python
python=; old=; bare=; \
for name in $(or $(PYTHON),python3.14 python3.13 python3.12 python3.11 python3 python); do \
	"$$name" -c 'pass' >/dev/null 2>&1 || continue; \
	if ! "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11, 1))'; then old="$$old $$name"; continue; fi; \
	if ! "$$name" -c 'import venv, ensurepip' 2>/dev/null; then bare="$$bare $$name"; continue; fi; \
	python=$$name; break; \
done; \
if [ -z "$$python" ] && [ -n "$$bare" ]; then \
	echo "make: Python is installed ($${bare# }) but cannot create environments." \
		"On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; \
fi; \
if [ -z "$$python" ]; then \
	echo "make: no Python >= 3.11.1 found$${old:+ (too old:$$old)}. Install one, or name it: make PYTHON=/path/to/python3" >&2; \
	exit 1; \
fi
endef

# An environment of another folder (a copied checkout) or of a missing Python is created again.
$(STAMP): | requirements.lock pyproject.toml
	@if ! { grep -qF "$(CURDIR)/$(VENV)" $(VENV)/pyvenv.cfg && $(BIN)/python -c 'import pip'; } 2>/dev/null; then \
		$(find_python); \
		echo "Creating the environment in $(VENV) with $$("$$python" --version) (once; a minute or two) ..." >&2; \
		"$$python" -m venv --clear $(VENV) || exit 1; \
	else \
		echo "Updating the environment in $(VENV) ..." >&2; \
	fi
	@rm -f $(VENV)/.made-*
	@$(INSTALL_LOCK) requirements.lock
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(DEV_STAMP): $(STAMP) | requirements-dev.lock
	@echo "Adding the packages of tests and linters ..." >&2
	@rm -f $(VENV)/.dev-*
	@$(INSTALL_LOCK) requirements-dev.lock
	@touch $@
