# make demo | test | bench | lint | format | clean. Each makes its own .venv when there is none.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
NATIVE := setup.py CMakeLists.txt $(shell find csrc -type f -name '*.[ch]*')

.DEFAULT_GOAL := test
.PHONY: install demo test bench lint format clean

# The torch we test comes first and alone, so that nothing later pulls in another one.
$(VENV)/torch.stamp:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q "$(TORCH)"
	touch $@

$(VENV)/install.stamp: $(VENV)/torch.stamp pyproject.toml $(NATIVE)
	$(BIN)/pip install --disable-pip-version-check -q "setuptools>=77" "cmake>=3.18" ninja "pybind11>=2.12"
	$(BIN)/pip install --disable-pip-version-check -q --no-build-isolation -e ".[viz,tensorboard,dev]"
	@$(BIN)/python -c 'import json; [print(name, "built" if t["built"] else "NOT BUILT: " + t["reason"]) for name, t in json.load(open("jmm_fast/_build.json"))["targets"].items()]'
	touch $@

install: $(VENV)/install.stamp

demo: install
	$(BIN)/jmm-fast prepare synthetic --out $(DEMO)/synthetic.safetensors
	$(BIN)/jmm-fast pretrain demo --data $(DEMO)/synthetic.safetensors --out $(DEMO)/run --overwrite
	$(BIN)/jmm-fast probe $(DEMO)/run --data $(DEMO)/synthetic.safetensors
	$(BIN)/jmm-fast probe $(DEMO)/run --data $(DEMO)/synthetic.safetensors --encoder untrained
	$(BIN)/jmm-fast knn $(DEMO)/run --data $(DEMO)/synthetic.safetensors
	$(BIN)/jmm-fast knn $(DEMO)/run --data $(DEMO)/synthetic.safetensors --encoder untrained
	$(BIN)/jmm-fast report $(DEMO)/run

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc -name '*.[ch]*' | xargs $(BIN)/clang-format --dry-run --Werror

# Two workers on two cores: a thread each.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Both records of bench/results: the table in pairs, and every case by itself. About twelve quiet minutes.
bench: install
	$(BIN)/jmm-fast bench --json bench/results/bench.json
	$(BIN)/python -m pytest bench -q --benchmark-only --benchmark-columns=median,iqr,rounds --benchmark-json=bench/results/cases.json

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.[ch]*' | xargs $(BIN)/clang-format -i

clean:
	rm -rf build dist demo *.egg-info jmm_fast/_build.json jmm_fast/*.so .pytest_cache .ruff_cache
	rm -f $(VENV)/install.stamp
