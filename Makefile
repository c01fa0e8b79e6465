# SPDX-License-Identifier: Apache-2.0
# Every target starts from nothing but Python, g++ and cmake: it makes the environment it needs.

PYTHON ?= python3
VENV ?= .venv
# The version that is tested. Any torch >= 2.6 works: make test TORCH=torch
TORCH ?= torch==2.13.0
# Processes that tests run in; each takes up to 3 GB.
JOBS ?= 2
BIN := $(VENV)/bin
NATIVE := $(shell find csrc python -type f) CMakeLists.txt setup.py pyproject.toml
SOURCES := $(shell find csrc python tests/emulation -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# What .pre-commit-config.yaml looks for in the sources.
GUARDS := no-fast-math lazy-triton torch-free-kernels no-pickle

.PHONY: demo environment test long-life wheel wheel-check sanitize sanitize-quick emulate fuzz lint format bench study gpu-check docs clean

demo: $(VENV)/.installed
	$(BIN)/grcsf demo

environment: $(VENV)/.installed

# Threads that wait for others must not spin: there are more of them than cores. Tests of a group
# share what is slow to make.
test: $(VENV)/.installed
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n $(JOBS) --dist loadgroup

# An sdist, and a wheel of it, in build/wheel/dist; then its operators' tests in an environment that
# has nothing else.
wheel:
	$(PYTHON) tests/wheel.py build

wheel-check:
	$(PYTHON) tests/wheel.py check --torch "$(TORCH)"

# A thousand calls of every command in one process, which must leave nothing behind: an hour.
long-life: $(VENV)/.installed
	GRCSF_LONG_LIFE=1000 $(BIN)/pytest -s -q tests/engine/test_long_life.py

# The CPU kernels under address and undefined, or with SANITIZER=thread: about 15 minutes on two
# cores. The quick form is what guards main.
sanitize: $(VENV)/.installed
	$(BIN)/python tests/native/sanitize.py $(if $(SANITIZER),--sanitizer $(SANITIZER))

sanitize-quick: $(VENV)/.installed
	$(BIN)/python tests/native/sanitize.py --quick

# The CUDA kernels without a GPU: compiled as C++, every thread a fiber, under sanitizers. Of some
# tests only: make emulate TESTS="tests/ops/test_gcu.py -k cuda-emulated"
emulate: $(VENV)/.installed
	$(BIN)/python tests/native/sanitize.py --sanitizer emulated -- $(TESTS)

# Random calls of operators and random damaged files, until the time is up; each case has a number by
# which it can be run again. Other cases: make fuzz SEED=1
fuzz: $(VENV)/.installed
	$(BIN)/python tests/fuzz --seconds $(or $(SECONDS),300) --seed $(or $(SEED),0) $(FUZZ)

# The whole suite, then the report: about 80 minutes on two cores. BENCH="--quick" takes minutes.
bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.run $(if $(OUT),--out $(OUT)) $(BENCH)

# What the units add to a backbone (docs/study.md): 75 minutes on two cores. Goes on where it was.
# On a GPU: make study STUDY="--scale gpu"
study: $(VENV)/.installed
	$(BIN)/python -m benchmarks.study $(if $(OUT),--out $(OUT)) $(STUDY)

# On a machine with a GPU and no network, in the environment that is there: no environment is made.
gpu-check:
	$(PYTHON) -m benchmarks.gpu.check $(if $(OUT),--out $(OUT)) $(CHECK)

# The site, from docs/, the docstrings and the commands: build/site/index.html.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file docs/site/mkdocs.yml

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
# What is loaded late has types too.
	$(BIN)/mypy --config-file= --ignore-missing-imports --follow-imports=silent -c "import grcsf_kernels; unit: grcsf_kernels.nn.GCU = grcsf_kernels.nn.GCU(4)"
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)
	for guard in $(GUARDS); do $(BIN)/pre-commit run $$guard --all-files || exit 1; done

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

# torch comes first, so that no other package chooses its version.
$(VENV)/.installed: $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[demo,test,dev]"
# Without what they say they need: timm, for networks that no test uses, would bring a torchvision
# and with it another torch.
	$(BIN)/pip install --quiet --no-deps "nnunetv2>=2.6" dynamic-network-architectures
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info grcsf_kernels/_C.* grcsf_kernels/_build_info.json
