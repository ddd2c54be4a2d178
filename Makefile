# Everything runs in .venv, which the targets make where it is missing or out of date.
# A newcomer needs Python 3.11 or later, git and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# torch's CPU build where pip offers one; the pin in pyproject.toml keeps it to 2.13. The rest is
# found by uv: pip takes minutes to find versions that fit each other.
PIP_INSTALL := $(BIN)/pip install --disable-pip-version-check --quiet
UV_INSTALL := $(BIN)/uv pip install --quiet --compile-bytecode --python $(VENV)

# Workers share the tests by file, since what is dear to make is shared within one; in the order of
# their names, so that what takes long comes early. Tests that load servers run one at a time.
TEST_WORKERS ?= 2
SHARED := $(BIN)/pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

# Image -> its extras; each gets a lock file with hashes.
IMAGES := serve=cpu+openvino+image+text+s3 serve-onnxruntime=cpu+image+text+s3 serve-gpu=gpu+image+text+s3 \
  optimizer=cpu+openvino+optimizer+service+telemetry+postgres+distributed+image+text+s3+loadtest loadtest=loadtest \
  optimizer-cpu=cpu+openvino+optimizer+service+telemetry+postgres+distributed+image+text+s3+loadtest
LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes
LOCK_optimizer-cpu := --override locks/torch-cpu.override locks/torch-cpu.in

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help venv demo demo-cifar10 check test test-full image-optimizer format proto locks clean

help: ## Show this help
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-16s %s\n", $$1, $$2}'

venv: $(STAMP) ## Make .venv with all that development needs

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch==2.13.0 'uv==0.13.*'
	$(UV_INSTALL) --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## Train, optimize, serve and load-test a small network, in minutes
	$(BIN)/python examples/digits/demo.py

demo-cifar10: $(STAMP) ## The same for ResNet-56 (needs TRIMSERVE_DATA and TRIMSERVE_WEIGHTS)
	$(BIN)/python examples/cifar10/run.py

check: $(STAMP) ## Lint, format, types, generated code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python proto/generate.py --check

test: $(STAMP) ## The tests that pip's packages suffice for, under 10 minutes
	$(SHARED) -m 'not full'

test-full: $(STAMP) ## Also those that need Debian's packages (installed here) or minutes
	./.ci/packages
	$(SHARED) -m 'full and not alone'
	$(BIN)/pytest -m 'full and alone'

image-optimizer: $(STAMP) ## Build the optimizer's image without CUDA and run a small study in it
	./.ci/packages
	TRIMSERVE_IMAGE_OPTIMIZER=1 $(BIN)/pytest -m full tests/images/test_optimizer_image.py

format: $(STAMP) ## Format and sort imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(STAMP) ## Generate the modules of proto/*.proto
	$(BIN)/python proto/generate.py

locks: $(STAMP) ## Lock the dependencies of the images (locks/*.txt)
	$(foreach image,$(IMAGES),$(LOCK) --override locks/unused.override pyproject.toml \
	  $(addprefix --extra ,$(subst +, ,$(lastword $(subst =, ,$(image))))) \
	  $(LOCK_$(firstword $(subst =, ,$(image)))) -o locks/$(firstword $(subst =, ,$(image))).txt &&) true
	$(LOCK) locks/build.in -o locks/build.txt

clean: ## Remove the environment and caches
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis demo-output
