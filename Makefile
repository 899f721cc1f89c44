# What a developer types. Each target makes .venv first if it is missing or older than its pins.
#   make train ARGS="tokens.train_steps=100"     make test WORKERS=4 ARGS="-k loader"     make setup PYTHON=python3.12

ARGS ?=
WORKERS ?= 2

BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup train test test-long test-mutations test-gpu lint format docs docs-check wheel clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt tools/make_venv.sh
	@sh tools/make_venv.sh

# A .venv that was copied here from another folder, or whose Python is gone, is made again.
ifneq ($(shell test -x $(BIN)/python && cat $(READY) 2>/dev/null),$(shell pwd -P))
.PHONY: $(READY)
endif

train: $(READY)
	@$(BIN)/pentode train examples/char_gpt.yaml $(ARGS)

test: lint
	$(BIN)/pytest -m "not long and not gpu" -n $(WORKERS) --dist worksteal $(ARGS)

test-long: $(READY)
	$(BIN)/pytest -m "long and not gpu" -n $(WORKERS) --dist worksteal --ignore=tests/mutation $(ARGS)

test-mutations: $(READY)
	$(BIN)/python -m tests.mutation.campaign $(ARGS)

test-gpu: $(READY)
	$(BIN)/pytest -m gpu $(ARGS)

lint: $(READY)
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY)
	$(BIN)/python -m pentode.config.manual >docs/config.md

docs-check: $(READY)
	$(BIN)/pytest tests/arch/test_docs.py tests/arch/test_yaml_files.py

wheel: $(READY)
	$(BIN)/python -m pip wheel -q . --no-deps --no-build-isolation -w dist

clean:
	rm -rf .venv dist build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
