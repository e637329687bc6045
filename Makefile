# make demo and make test need nothing but Python, a C++20 compiler and make.
# PYTHON=/path/to/python uses an environment that already has torch, instead of making .venv.

VENV := .venv
ifdef PYTHON
ENVIRONMENT :=
else
PYTHON := $(VENV)/bin/python
ENVIRONMENT := $(VENV)/.environment
endif
BASE_PYTHON ?= python3
STATE := build/.state/$(subst /,_,$(PYTHON))

SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu') setup.py setup_cuda.py pyproject.toml
CLANG_FORMAT := -c 'import clang_format; clang_format.clang_format()'
CLANG_FORMATTED := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.DEFAULT_GOAL := help
.PHONY: help env build demo test lint format bench gpu-check docs notebooks dist clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 18
	@echo
	@echo '  PYTHON=/path/to/python uses an environment that already has torch; BASE_PYTHON makes the new one.'

$(VENV)/.environment: pyproject.toml
	@command -v $(BASE_PYTHON) >/dev/null || { echo "make: no $(BASE_PYTHON); name a Python in BASE_PYTHON" >&2; exit 1; }
	$(BASE_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet "torch>=2.10" torchvision
	@touch $@

env: $(ENVIRONMENT)  ## make the environment in .venv

$(STATE): $(ENVIRONMENT) $(SOURCES)
	$(PYTHON) -m pip install --quiet "setuptools>=77" wheel ninja "pybind11>=2.13"
	$(PYTHON) -m pip install --quiet --no-build-isolation --editable ".[data,timm,hf,train,viz,dev]"
	@mkdir -p $(dir $@) && touch $@

build: $(STATE)  ## environment, and the package built in place

demo: build  ## train an Associative Transformer and a ViT on handwritten digits
	$(PYTHON) experiments/demo.py

test: build  ## the whole test suite
	$(PYTHON) -m pytest -n 2 --dist loadgroup

lint: $(STATE)  ## formatting, lint and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) $(CLANG_FORMAT) --dry-run --Werror $(CLANG_FORMATTED)

format: $(STATE)  ## format the sources in place
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(PYTHON) $(CLANG_FORMAT) -i $(CLANG_FORMATTED)

bench: build  ## the operators against plain PyTorch; writes build/bench.json and build/bench.md
	$(PYTHON) experiments/bench/operators.py --out build/bench.json

gpu-check: build  ## build, test and measure the CUDA kernels on this machine's GPU; writes gpu_check.json
	$(PYTHON) experiments/bench/gpu_check.py

docs: $(STATE)  ## the documentation, as a site in site/
	$(PYTHON) -m mkdocs build --strict

notebooks: build  ## run the notebooks anew, in place
	$(PYTHON) notebooks/execute.py

dist: $(STATE)  ## source distribution and wheel in dist/
	$(PYTHON) -m build --no-isolation --outdir dist .

clean:  ## remove what was built; the environment stays
	rm -rf build dist runs site *.egg-info ait/*.so ait/_build_info.py .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
