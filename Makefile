# Two commands: `make demo` and `make test`. Both make a virtual environment of their own on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# A worker for each core: more threads of NumPy's products would only wait for each other, awake.
PARALLEL := OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# Tests that four threads run at once: not those of files of one name, torch's own generator or modules that change; of the
# libraries without kernels, one.
THREADED := tests/ops tests/features tests/backends/numba/test_kernels.py tests/backends/numba/test_gradients.py \
	$(addprefix tests/test_,linear_attention.py streaming.py regression.py vjp.py errors.py nonfinite.py exact.py)

# What a wheel is tried with: the least that pyproject.toml asks for, and the newest Python found here with what it gets.
OLDEST := 'numpy==2.0.0' 'array-api-compat==1.12.0'
NEWEST ?= $(shell for p in python3.14 python3.13 python3.12 \
	$$(ls -d "$$(pyenv root 2>/dev/null)"/versions/3.1[2-9]*/bin/python3 2>/dev/null | sort -Vr) $(PYTHON); \
	do $$p -c '' 2>/dev/null && echo $$p && break; done)

# What is tried beside a wheel: extras without torch and JAX, which are hundreds of megabytes.
EXTRAS := cpu sobol sklearn dask datasets cli

.PHONY: help demo test test-loopback test-kernels test-cuda test-jax test-slow test-sweep test-parallel test-models test-architectures bench lint types layers docs wheel-check gpu-bundle gpu-check clean

help:
	@echo "make demo   compare exact attention, landmarks and features on real heads, leave a picture"
	@echo "make test   what every change must pass; the other tests of CI are below"
	@echo "make bench  the kernels against what else a CPU can run"
	@echo "make test-loopback test-kernels test-cuda test-jax test-slow test-sweep test-parallel test-models test-architectures lint types layers docs wheel-check clean"
	@echo "make gpu-check  what only an NVIDIA GPU can show, and how fast it is; make gpu-bundle for one without a network"

$(VENV)/made:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	touch $@

# The first calls compile the kernels, so that `make demo` times none that compiles.
$(VENV)/cli: $(VENV)/made pyproject.toml
	$(PIP) --editable '.[cli,cpu]'
	$(BIN)/favorsharp compare --lengths 64,640 --seeds 1 --output $(VENV)/first-calls.png > /dev/null
	touch $@

$(VENV)/test: $(VENV)/made pyproject.toml
	$(PIP) 'torch==2.13.0'
	$(PIP) --editable '.[test]'
	touch $@

$(VENV)/docs: $(VENV)/made pyproject.toml
	$(PIP) 'torch==2.13.0'
	$(PIP) --editable '.[docs]'
	touch $@

demo: $(VENV)/cli
	$(BIN)/favorsharp compare --output favorsharp-compare.png

test: $(VENV)/test
	$(PARALLEL)

test-loopback: $(VENV)/test
	$(PARALLEL) -q --backend loopback tests/ops tests/test_linear_attention.py tests/test_streaming.py tests/test_regression.py

test-kernels: $(VENV)/test
	$(PARALLEL) -m "kernels and not slow"
	$(PARALLEL) -q --backend any tests/ops tests/landmarks tests/features tests/modules tests/transformers tests/test_*.py

test-cuda: $(VENV)/test
	$(PARALLEL) -m "cuda and not slow and not sweep"

test-jax: $(VENV)/test
	$(PARALLEL) -m "jax and not slow"

test-slow: $(VENV)/test
	$(PARALLEL) --backend any -m "slow and not models"

$(VENV)/models: $(VENV)/test
	$(PIP) --editable '.[models]'
	touch $@

test-models: $(VENV)/models
	$(BIN)/python -m pytest -m models

test-architectures: $(VENV)/test
	$(PARALLEL) -m architectures tests/transformers/test_architectures.py

test-sweep: $(VENV)/test
	$(PARALLEL) -m sweep

test-parallel: $(VENV)/test
	$(BIN)/python -m pytest -q --backend any --parallel-threads=4 -m "not jax" -k "not strict-static and not strict-device1" $(THREADED)

bench: $(VENV)/test
	$(BIN)/python -m benchmarks.report

lint: $(VENV)/test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/numpydoc lint $$(find favorsharp -name '*.py')

types: $(VENV)/test
	$(BIN)/mypy

layers: $(VENV)/test
	$(BIN)/lint-imports

docs: $(VENV)/docs
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	$(BIN)/sphinx-build -q -b doctest -D plot_gallery=0 docs docs/_build/doctest

wheel-check: $(VENV)/test
	rm -rf dist
	$(BIN)/python -m build --quiet
	$(PYTHON) -m venv --clear dist/oldest
	dist/oldest/bin/python -m pip --disable-pip-version-check install --quiet dist/*.whl $(OLDEST)
	cd dist && oldest/bin/python ../tests/wheel_smoke.py
	$(NEWEST) -m venv --clear dist/newest
	dist/newest/bin/python -m pip --disable-pip-version-check install --quiet dist/*.tar.gz
	cd dist && newest/bin/python ../tests/wheel_smoke.py
	dist/newest/bin/python -m pip --disable-pip-version-check install --quiet \
		"$$(ls dist/*.whl)[$$(echo $(EXTRAS) | tr ' ' ,)]"
	cd dist && newest/bin/python ../tests/extras_smoke.py $(EXTRAS)

gpu-bundle: $(VENV)/made
	$(BIN)/python tests/gpu/bundle.py

gpu-check: $(VENV)/test
	@$(BIN)/python tests/gpu/run.py --seconds 3600 --peers 600

clean:
	rm -rf $(VENV) dist docs/_build favorsharp-compare.png
