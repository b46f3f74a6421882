# Everything runs in .venv, which is made from Python >= 3.11.1 alone: out of requirements.lock what the program
# needs, for `up` and `demo`; on top of it, out of requirements-dev.lock, what tests and linters need. Each is
# installed once, and again only when its lock, pyproject.toml or the folder changes: the stamp's name holds their
# hash.

PYTHON ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
hash = $(shell (pwd; cat pyproject.toml $(1)) | (sha256sum 2>/dev/null || shasum -a 256) | cut -c1-16)
STAMP := $(VENV)/.made-$(call hash,requirements.lock)
DEV_STAMP := $(VENV)/.dev-$(call hash,requirements.lock requirements-dev.lock)
# Quiet about everything but errors.
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input
# The locks are complete: without --no-deps the pip of Python 3.11 refuses extras (gql[requests]) as unpinned. Wheels
# only, so that no code of a distribution runs while it is installed.
INSTALL_LOCK := $(PIP) install --no-deps --require-hashes --only-binary :all: -r

# Two more than processors, for many tests wait for servers more than they compute; six at most, for each
# worker keeps databases and servers of its own.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); \
	n=$$((n + 2)); [ $$n -gt 6 ] && n=6; echo $$n)

.DEFAULT_GOAL := help
.PHONY: help env demo test test-fast test-slow up down bench pictures lint format lock wheel clean

help:
	@echo "make demo    runs the whole on a local market and reports; KEEP=1 leaves the servers up"
	@echo "make test    runs the test suite; ARGS='...' go to pytest"
	@echo "make test-fast runs those tests that need no server, below a minute"
	@echo "make test-slow runs the long scenarios that make test leaves out, an hour of real time among them"
	@echo "make up      starts database, Dagster and daemon on real providers; make down stops them"
	@echo "make bench   measures against the references"
	@echo "make pictures takes docs/pictures anew from a demo, with a headless Chromium"
	@echo "make lint    ruff and mypy; make format rewrites"
	@echo "make wheel   builds the wheel into dist/"
	@echo "make env     makes the environment of tests and linters; make up and make demo need less of it"
	@echo "make lock    resolves both lock files from pyproject.toml; ARGS=--upgrade takes newer versions"
	@echo "make clean   removes the environment and caches, never the data in .fks"
	@echo "PYTHON=...   the interpreter to make the environment from (>= 3.11.1)"

env: $(DEV_STAMP)
	@:

demo: $(STAMP)
	@$(BIN)/fks-backfill demo $(if $(filter-out 0,$(KEEP)),--keep)

# In the order of conftest.py, not by the number of tests in a module.
test: $(DEV_STAMP)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder -m 'not slow' $(ARGS)

# What starts no process and opens no connection: rules, and whatever else is a function of its arguments.
test-fast: $(DEV_STAMP)
	@$(BIN)/python -m pytest -n $(WORKERS) -m 'not slow and not server' $(ARGS)

# By test, not by module: the longest are cases of one function. Then the property tests with all their examples.
test-slow: $(DEV_STAMP)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m slow $(ARGS)
	@FKS_TEST_THOROUGH=1 $(BIN)/python -m pytest -n $(WORKERS) -m 'hypothesis and not server' $(ARGS)

up: $(STAMP)
	@$(BIN)/fks-backfill up

down: $(STAMP)
	@$(BIN)/fks-backfill down

bench: $(DEV_STAMP)
	@$(BIN)/python -m bench $(ARGS)

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

# requirements.lock: what the program imports, and the build backend that installs the checkout. requirements-dev.lock:
# what the extra dev needs besides, at the versions of the first. uv is not locked itself: a tool of the maintainer,
# kept out of everybody's environment.
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
	rm -rf $(VENV) $(VENV)-lock .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Sets $$python, or says what is missing. A candidate is one that runs, is new enough and can make
# environments: Debian takes ensurepip out of Python and puts it into python3-venv.
define find_python
python=; old=; bare=; \
for name in $(or $(PYTHON),python3.14 python3.13 python3.12 python3.11 python3 python); do \
	"$$name" -c 'pass' >/dev/null 2>&1 || continue; \
	if ! "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11, 1))'; then old="$$old $$name"; continue; fi; \
	if ! "$$name" -c 'import venv, ensurepip' 2>/dev/null; then bare="$$bare $$name"; continue; fi; \
	python=$$name; break; \
done; \
if [ -z "$$python" ] && [ -n "$$bare" ]; then \
	echo "make: Python is here ($${bare# }) but cannot make environments." \
		"On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; \
fi; \
if [ -z "$$python" ]; then \
	echo "make: no Python >= 3.11.1 found$${old:+ (too old:$$old)}. Install one, or name it: make PYTHON=/path/to/python3" >&2; \
	exit 1; \
fi
endef

# An environment of another folder (a copied checkout) or of a Python that is gone is made anew.
$(STAMP): | requirements.lock pyproject.toml
	@if ! { grep -qF "$(CURDIR)/$(VENV)" $(VENV)/pyvenv.cfg && $(BIN)/python -c 'import pip'; } 2>/dev/null; then \
		$(find_python); \
		echo "Making the environment in $(VENV) with $$("$$python" --version) (once; a minute or two) ..." >&2; \
		"$$python" -m venv --clear $(VENV) || exit 1; \
	else \
		echo "Bringing the environment in $(VENV) up to date ..." >&2; \
	fi
	@rm -f $(VENV)/.made-*
	@$(INSTALL_LOCK) requirements.lock
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(DEV_STAMP): $(STAMP) | requirements-dev.lock
	@echo "Adding what tests and linters need ..." >&2
	@rm -f $(VENV)/.dev-*
	@$(INSTALL_LOCK) requirements-dev.lock
	@touch $@
