PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROCESSES ?= 2

.PHONY: demo test tests test-slow test-kills test-oldest fuzz check docs bench clean

demo: $(VENV)/installed          ## train, convert, measure: the main job on a small network
	$(BIN)/ghostify demo

test: $(VENV)/installed          ## lint, types and the tests, warnings as errors
	$(MAKE) --no-print-directory -j2 check tests

tests: $(VENV)/installed         ## the tests by themselves
	$(BIN)/python -m pytest -q -n $(PROCESSES) --dist worksteal

test-slow: $(VENV)/installed     ## the sweeps that take minutes
	$(BIN)/python -m pytest -q -m slow

test-kills: $(VENV)/installed    ## 200 processes killed while they write
	$(BIN)/python -m tests.kill_writers --count 200 --seed 0

fuzz: $(VENV)/installed          ## 20,000 changed folders, read under a watch
	$(BIN)/python -m tests.fuzz_folders --count 20000 --seed 0 --jobs $(PROCESSES) --output tests/data/fuzz-folders.json

test-oldest:                     ## the tests on the oldest versions supported
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet -e '.[test]' -c tests/oldest.txt
	$(VENV)-oldest/bin/python -m pytest -q -n $(PROCESSES) --dist worksteal

docs: $(VENV)/installed          ## the site, in build/site
	$(BIN)/python -m mkdocs build -q

check: $(VENV)/installed         ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/bench             ## quick forms of two benchmarks
	$(BIN)/python benchmarks/experiments/accuracy.py --quick
	$(BIN)/python benchmarks/experiments/craft.py --quick

$(VENV)/bench: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -e '.[bench]'
	touch $@

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -e '.[test]'
	$(BIN)/python -m compileall -q -j 0 -x "/tests/|torch/testing/_internal" $(VENV)/lib >/dev/null || true
	touch $@

clean:
	rm -rf $(VENV)
