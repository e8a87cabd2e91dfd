# make help lists the commands. Everything runs in .venv, which is made at the first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NBS := $(sort $(wildcard nbs/*.ipynb nbs/toolbox/*.ipynb))
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help run test lab exercises docs preview bench clean-check notebooks pytest
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*##/ {printf "%-12s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/installed: settings.ini setup.py
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing the project and its tools into $(VENV): a few minutes, once."
	@$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

run: $(VENV)/installed  ## train a Vision Transformer on the bundled images and show where it looks
	@$(BIN)/vit-course fit --config quickstart
	@echo "Next: make lab opens the lessons."

lab: $(VENV)/installed  ## open the lessons in JupyterLab
	@$(BIN)/jupyter lab --notebook-dir=nbs

exercises: $(VENV)/installed  ## make the learners' notebooks in exercises/ from the lessons
	@$(BIN)/python scripts/make_exercises.py

docs: $(VENV)/installed  ## build the site in _docs/ (by Quarto where it is installed)
	@$(BIN)/python scripts/make_docs.py

preview: $(VENV)/installed  ## build the site and serve it on this machine
	@$(BIN)/python scripts/make_docs.py --serve

bench: $(VENV)/installed  ## measure the speed beside other libraries, and make again what the lessons quote (CIFAR10=folder for real images)
	@$(BIN)/python benchmarks/speed.py $(if $(CIFAR10),--data $(CIFAR10))
	@$(BIN)/python benchmarks/attention.py
	@$(BIN)/python benchmarks/faithfulness.py
	@$(BIN)/python benchmarks/pooling.py --epochs 8 --again

test: notebooks clean-check pytest  ## run every notebook and every test
	@echo "No test failed. What was skipped, and why, stands above."

notebooks: $(VENV)/installed  ## run the notebooks as tests
	@OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing --flags slow

clean-check: $(VENV)/installed  ## check that modules, README, notebooks and exercises agree, and the style
	@$(BIN)/ruff check --quiet
	@$(BIN)/python scripts/check_clean.py
	@$(BIN)/python scripts/make_exercises.py --check

pytest: $(VENV)/installed  ## run what a notebook cannot test
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs --numprocesses 2 --dist loadfile tests
