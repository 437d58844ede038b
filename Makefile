# What a newcomer needs: `make quickstart`, `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow coverage lint docs bench results clean

help: ## print this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "setuptools>=77" "torch==$$(sed -n 's/^torch==//p' constraints.txt | cut -d+ -f1)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

install: $(STAMP) ## create .venv and install the project with everything the tests need

quickstart: $(STAMP) ## compile the embedded network under a latency budget and print dense against compiled
	$(BIN)/tdcompile demo -o out/quickstart

# Two processes of one thread each: the tests' tensors are small, and threads that wait for each other cost minutes.
test: export OMP_NUM_THREADS = 1
test: $(STAMP) ## run the tests (under 10 minutes on 2 cores)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

test-slow: $(STAMP) ## run the tests that take longer
	$(BIN)/python -m pytest -q -m slow --timeout 3600

# The floor is fail_under in pyproject.toml. Two processes write one report: pytest-cov joins them.
coverage: export OMP_NUM_THREADS = 1
coverage: $(STAMP) ## run the tests with line coverage; fail below the floor in pyproject.toml
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --cov --cov-report=term:skip-covered

# mypy and import-linter read the tree as it installs: passes/ and models/ inside the package.
HOUSE := build/lint

lint: $(STAMP) ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(HOUSE)
	mkdir -p $(HOUSE)
	cp -Rp tdcompile $(HOUSE)/
	cp -Rp passes models $(HOUSE)/tdcompile/
	cd $(HOUSE) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p tdcompile
	cd $(HOUSE) && PYTHONPATH=. $(CURDIR)/$(BIN)/lint-imports $(CURDIR)/pyproject.toml --no-cache
	cd $(HOUSE) && MYPYPATH=. $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache $(CURDIR)/tests/typed_calls.py
	MYPYPATH=docs/hooks $(BIN)/mypy docs/hooks
	MYPYPATH=$(HOUSE):benchmarks $(BIN)/mypy --cache-dir .mypy_cache/benchmarks --no-warn-unused-ignores --no-warn-return-any --allow-untyped-calls benchmarks/*.py

# The theme announces a successor at every build; the variable keeps that out of the log.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(STAMP) ## build the site into out/site/; every warning is an error
	$(BIN)/python -m mkdocs build --quiet --clean

bench: $(STAMP) ## the benchmarks that need no data: latency, never slower, compile time
	$(BIN)/python benchmarks/latency.py --json out/bench/latency.json
	$(BIN)/python benchmarks/latency.py --budget 1.0 --networks resnet18,resnet50,vgg16,mobilenet_v2 --json out/bench/never_slower.json
	$(BIN)/python benchmarks/compile_time.py --json out/bench/compile_time.json

results: $(STAMP) ## rewrite the tables in docs/results/ from docs/measurements/
	$(BIN)/python benchmarks/results.py

clean: ## remove what the targets above made
	rm -rf $(VENV) out build *.egg-info .mypy_cache .ruff_cache .pytest_cache .coverage
