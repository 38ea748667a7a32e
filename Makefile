# `make demo` and `make test` set everything up in .venv; PYTHON chooses the interpreter it is made with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow test-native lint clean

demo: $(STAMP)
	$(BIN)/teal demo --output teal-demo --overwrite

test: lint
	$(BIN)/python -m pytest -n 2

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# The CPU kernels alone, under address and undefined-behaviour sanitizers, on every instruction set of this machine.
test-native:
	cmake -S . -B build/driver -DTEAL_DRIVER=ON
	cmake --build build/driver
	build/driver/teal_driver

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable .
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist teal-demo
