# make demo | test | test-gpu | sanitize-gpu | sanitize | fuzz | emulate | bench | bench-gpu | lint | format | clean. Each makes its own .venv when there is none.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
CXX_SOURCES = find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu'
NATIVE := setup.py CMakeLists.txt $(shell find csrc -type f -name '*.[ch]*')

.DEFAULT_GOAL := test
.PHONY: install demo test test-gpu sanitize-gpu bench-gpu sanitize fuzz emulate bench lint format clean

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
	$(CXX_SOURCES) | xargs $(BIN)/clang-format --dry-run --Werror

# Two workers on two cores: a thread each.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# On a GPU; elsewhere it says why not. Each of the three ends within nine minutes, whatever happens: what was found until
# then is kept, and the exit code tells. All tests that need one, a record of them in build/test_gpu.xml; some of them under
# compute-sanitizer; the table of the benchmarks.
GPU := $(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "skipped: torch " + torch.__version__ + " finds no CUDA GPU on this machine")'
WITHIN := timeout --foreground --signal=INT --kill-after=20
# Processes compile Triton's kernels side by side and share the GPU.
GPU_WORKERS ?= 8
GPU_RECORD ?= build/test_gpu.xml
GPU_TESTS := tests/kernels tests/cuda tests/ops/test_backend.py tests/data/test_batches.py tests/train/test_graph.py tests/train/test_waits.py tests/bench
CHECKER := compute-sanitizer
CHECKED := tests/kernels -k "test_parity_over_shapes or test_parity_over_head_widths or test_many_bodies_and_views or test_few_and_all_visible or test_masked_tokens_alone or test_short_floats or test_parts_of_the_stream or test_mlp_over_lengths or test_norm_and_head or test_a_whole_grid"

test-gpu: install
	@if $(GPU); then \
	  OMP_NUM_THREADS=1 $(WITHIN) 520 $(BIN)/python -m pytest -q -n $(GPU_WORKERS) --junitxml=$(GPU_RECORD) $(GPU_TESTS); \
	fi

sanitize-gpu: install
	@if $(GPU); then \
	  command -v $(CHECKER) > /dev/null || { echo "skipped: $(CHECKER) not found (it comes with the CUDA toolkit)"; exit 0; }; \
	  failed=; \
	  for tool in memcheck racecheck; do \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(WITHIN) 250 $(CHECKER) --tool $$tool --error-exitcode 1 \
	      $(BIN)/python -m pytest -q -p no:cacheprovider $(CHECKED) || failed="$$failed $$tool"; \
	  done; \
	  test -z "$$failed" || { echo "failed:$$failed"; exit 1; }; \
	fi

# The kernels' tests once more, on every instruction set, in a build that checks each access and each operation. Leaks
# are not looked for: Python and torch keep memory until they end. torch.compile would build with the sanitizers loaded
# into the compiler, and the test of memory use would measure theirs.
SANITIZED := build/sanitize
NATIVE_TESTS := tests/test_host.py tests/data/test_text_rows.py $(wildcard tests/ops/test_*_cpu.py)
NATIVE_CHOICE := not compile and not memory_does_not_grow

sanitize: install
	JMM_FAST_SANITIZE=1 $(BIN)/python setup.py -q build --build-lib $(SANITIZED)
	@$(BIN)/python -c 'import json, sys; sys.exit("; ".join(t["reason"] for name, t in json.load(open("$(SANITIZED)/jmm_fast/_build.json"))["targets"].items() if name != "_cuda" and t["reason"]) or 0)'
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 \
	PYTHONPATH=$(SANITIZED) PYTHONSAFEPATH=1 \
	$(BIN)/python -m pytest -q --capture=sys -p no:cacheprovider $(NATIVE_TESTS) -k "$(NATIVE_CHOICE)"

# Each parser of text on made-up bytes, one after the other, FUZZ_SECONDS each. What ends it is kept in build/fuzz.
FUZZ_SECONDS ?= 600
FUZZ_CXX ?= clang++
FUZZED := $(basename $(notdir $(wildcard csrc/host/fuzz/*.cpp)))
.PHONY: $(FUZZED:%=fuzz-%)

fuzz: $(FUZZED:%=fuzz-%)

$(FUZZED:%=build/fuzz/%): build/fuzz/%: csrc/host/fuzz/%.cpp csrc/host/%.cpp csrc/host/%.h
	@command -v $(FUZZ_CXX) > /dev/null || { echo "$(FUZZ_CXX) not found (apt-get install clang libclang-rt-14-dev)"; exit 1; }
	mkdir -p build/fuzz
	$(FUZZ_CXX) -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -Icsrc $(filter %.cpp,$^) -o $@

$(FUZZED:%=fuzz-%): fuzz-%: build/fuzz/%
	mkdir -p build/fuzz/corpus/$*
	$< -max_total_time=$(FUZZ_SECONDS) -max_len=8192 -print_final_stats=1 -artifact_prefix=build/fuzz/ \
	  build/fuzz/corpus/$* csrc/host/fuzz/corpus/$*

# The wheel on an emulated processor without AVX-512: an instruction that it does not have ends the program. The emulator
# reads the whole vector of a load under a mask, which a processor does not: tests that protect the page behind a tensor
# crash there for that alone.
EMULATED := build/emulated
EMULATOR := qemu-x86_64 -cpu Haswell

emulate: install
	@command -v $(firstword $(EMULATOR)) > /dev/null || { echo "$(firstword $(EMULATOR)) not found (apt-get install qemu-user)"; exit 1; }
	rm -rf $(EMULATED)
	$(BIN)/pip wheel --disable-pip-version-check -q --no-build-isolation --no-deps -w $(EMULATED)/wheel .
	$(BIN)/pip install --disable-pip-version-check -q --no-deps --target $(EMULATED)/site $(EMULATED)/wheel/*.whl
	PYTHONPATH=$(EMULATED)/site PYTHONSAFEPATH=1 OMP_NUM_THREADS=1 \
	$(EMULATOR) $(BIN)/python -m pytest -q -p no:cacheprovider $(NATIVE_TESTS) -k "$(NATIVE_CHOICE) and not behind_the_last"

# Both records of bench/results: the table in pairs, and every case by itself. Some 16 minutes on two quiet cores.
RECORD ?= bench/results/bench.json

bench: install
	$(BIN)/jmm-fast bench --json $(RECORD)
	$(BIN)/python -m pytest bench -q --benchmark-only --benchmark-columns=median,iqr,rounds --benchmark-json=bench/results/cases.json

GPU_BENCH ?= bench/results/bench_gpu.json

bench-gpu: install
	@if $(GPU); then \
	  $(WITHIN) 535 $(BIN)/jmm-fast bench --device cuda --minutes 7 --json $(GPU_BENCH); \
	fi

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(CXX_SOURCES) | xargs $(BIN)/clang-format -i

clean:
	rm -rf build dist demo *.egg-info jmm_fast/_build.json jmm_fast/*.so .pytest_cache .ruff_cache
	rm -f $(VENV)/install.stamp
