# `make demo` and `make test` set up $(VENV) themselves; they need Python 3.11+ only.
VENV    ?= .venv
WORKERS ?= 2
# Which tests `make test` runs: a pytest marker expression.
MARK    ?= not slow and not heavy
# How a target's dependencies are installed; CI puts another resolver here.
INSTALL ?= packaging/install.sh $(VENV)/bin/python

PY := $(VENV)/bin/python

# Compiled programs are kept from one test run to the next.
test heavy full pages notebooks: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
test heavy full pages notebooks: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0
test heavy full pages notebooks: export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES ?= -1
# Most of the time of a test is compilation; `full`, and the tests of CI on the
# newest versions, compile as users do.
test heavy pages: export XLA_FLAGS ?= --xla_backend_optimization_level=0

PYTEST   := $(PY) -m pytest
DOCTESTS := $(PYTEST) -n $(WORKERS) --doctest-modules --doctest-glob='*.md' hypergrad README.md

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test heavy lint types docs pages notebooks release peers full clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' $(MAKEFILE_LIST)

demo: $(VENV)/.has-cli ## clean a noisy training set, ten seeds; writes demo/
	$(VENV)/bin/hypergrad run cleaning --seeds 10 --workers $(WORKERS) --out demo

test: $(VENV)/.has-test ## the fast tests, then doctests
	$(PYTEST) -n $(WORKERS) -m '$(MARK)'
	$(DOCTESTS)

heavy: $(VENV)/.has-test ## the heavy tests, which are neither fast nor slow
	$(PYTEST) -n $(WORKERS) -m 'heavy and not slow'

full: $(VENV)/.has-test ## all tests, slow ones included, then doctests
	$(PYTEST) -n $(WORKERS) -ra --durations=0 --durations-min=1
	$(DOCTESTS)

lint: $(VENV)/.has-dev ## rules and formatting
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

types: $(VENV)/.has-dev ## static types
	$(VENV)/bin/pyright --pythonpath $(PY)

docs: $(VENV)/.has-dev ## build the site into site/, with a page of every table and the report
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	$(VENV)/bin/hypergrad report benchmarks/results --out site/tables
	$(PY) -c 'import typst; typst.compile("docs/report/report.typ", output="site/report.pdf", root=".")'

pages: $(VENV)/.has-dev ## run the code of every page of the site
	$(PYTEST) -n $(WORKERS) -m page

# A notebook NAME.ipynb and its text twin NAME.py must hold the same cells.
TWIN := $(PY) -m jupytext --quiet --to py:percent --opt notebook_metadata_filter=-all

notebooks: $(VENV)/.has-test $(VENV)/.has-notebooks ## run every notebook; check it against its text twin
	@rm -rf .cache/twins && mkdir -p .cache/twins
	@for file in $$(ls notebooks/*.ipynb notebooks/*.py); do \
	    twin=.cache/twins/$$(basename $$file).txt; \
	    $(TWIN) --output - $$file > $$twin || exit 1; \
	done; \
	for name in $$(ls notebooks/*.ipynb notebooks/*.py | sed 's/\.[a-z]*$$//' | sort -u); do \
	    twin=.cache/twins/$$(basename $$name); \
	    diff $$twin.py.txt $$twin.ipynb.txt \
	        || { echo "$$name: .py and .ipynb differ; CONTRIBUTING.md says what to run"; exit 1; }; \
	done
	$(PYTEST) -n $(WORKERS) --nbmake --nbmake-timeout=300 notebooks

release: $(VENV)/.has-dev ## build wheel and sdist, and try the wheel without this checkout
	packaging/try_release.sh $(PY)

peers: | $(VENV)/pyvenv.cfg ## install the libraries that the table `peer_speed` runs
	$(PY) -m benchmarks.peers.environments

clean: ## remove caches and built files; environments and results stay
	rm -rf .cache .hypothesis .pytest_cache .ruff_cache build dist site

# Environments. $(VENV)/.has-X says that extra X is installed; a change of
# pyproject.toml makes it stale. A larger extra brings the smaller ones.
covered_cli  := cli
covered_test := cli test
covered_notebooks := notebooks
covered_dev  := cli test notebooks dev

$(VENV)/.has-%: pyproject.toml | $(VENV)/pyvenv.cfg
	@echo "Installing hypergrad[$*] into $(VENV): less than a minute with uv, two with pip"
	@$(INSTALL) --editable '.[$*]'
	@touch $(addprefix $(VENV)/.has-,$(covered_$*))

$(VENV)/pyvenv.cfg:
	@for python in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	    if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
	        2> /dev/null; then exec $$python -m venv $(VENV); fi; \
	done; \
	echo "No Python 3.11 or newer with its venv module was found." \
	    "Install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1
