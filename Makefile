# Two commands on a fresh machine: `make train` runs the main job, `make test` the tests.
# To install torch from an index of your choice (CPU builds, say), set PIP_INDEX_URL or PIP_EXTRA_INDEX_URL.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RECIPE ?= configuration/recipes/embedded-cpu.yaml
OUTPUT ?= runs/embedded-cpu
SEQ2SEQ_RECIPE ?= configuration/recipes/code-summary-cpu.yaml
SEQ2SEQ_OUTPUT ?= runs/code-summary
# Test files side by side; a file's tests run in one process, where fixtures of the file are made once. (By file and not by
# group: pytest-xdist 3.8 forms no groups under pytest 9.2.)
WORKERS ?= 2
FAST_TESTS = -m pytest -m "not slow and not gpu" --durations=10 --numprocesses $(WORKERS) --dist loadfile
# What the locked, the oldest and the newest set cover.
EXTRAS := plots tensorboard translation test
# Both ends take another torch where they are told one, a CPU build for example: `make test-oldest TORCH=torch==2.13.0`.
TORCH ?=

.PHONY: install train train-seq2seq test test-model test-oldest test-newest test-clients test-slow test-gpu quality style lock clean

install: $(INSTALLED)

$(INSTALLED): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# Freed memory stays with the process: on a CPU the gradients of all experts would else be new pages every step.
train train-seq2seq: export MALLOC_MMAP_MAX_ ?= 0
train train-seq2seq: export MALLOC_TRIM_THRESHOLD_ ?= 100000000000

train: install
	$(BIN)/python scripts/run_clm.py $(RECIPE) --output_dir $(OUTPUT) --overwrite_output_dir
	$(BIN)/python scripts/generate.py $(OUTPUT) --prompt "The import statement"

train-seq2seq: install
	$(BIN)/python scripts/run_translation.py $(SEQ2SEQ_RECIPE) --output_dir $(SEQ2SEQ_OUTPUT) --overwrite_output_dir
	echo "def count_lines(path): return sum(1 for line in open(path))" | $(BIN)/python scripts/translate.py $(SEQ2SEQ_OUTPUT)

test: quality
	$(BIN)/python $(FAST_TESTS)

# The lower bounds of pyproject.toml.
test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python $(FAST_TESTS)

# An environment for each requirements.NAME: the oldest set, and those of programs that people use on models.
.venv-%/.installed: requirements.% pyproject.toml
	$(PYTHON) -m venv .venv-$*
	grep -v '^torch==' $< > .venv-$*/requirements
	.venv-$*/bin/python -m pip install --quiet $(or $(TORCH),$(shell grep '^torch==' requirements.$*)) \
		--requirement .venv-$*/requirements
	.venv-$*/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# The newest releases that go together, looked up anew each time.
test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager $(or $(TORCH),torch) \
		$(foreach extra,$(EXTRAS),--editable ".[$(extra)]")
	.venv-newest/bin/python $(FAST_TESTS)

# docs/clients.md: tests skip where their program is not in the environment.
test-clients: .venv-clients/.installed .venv-clients-llm-compressor/.installed
	.venv-clients/bin/python -m pytest tests/clients
	.venv-clients-llm-compressor/bin/python -m pytest tests/clients -k llm_compressor

# After a change to the models: their tests and those of the solvers, in a minute or two.
test-model: install
	$(BIN)/python $(FAST_TESTS) tests/model tests/solvers

test-slow: install
	$(BIN)/python -m pytest -m slow --durations=10

test-gpu: install
	$(BIN)/python -m pytest -m gpu --durations=10

quality: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

style: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# CUDA libraries are left to torch's own requirements: a CPU build has none. The extra `quantization` is not in the set:
# transformers imports torchao wherever it is installed, which takes every process that a test starts 2 s.
COMPILE = uv pip compile pyproject.toml $(EXTRAS:%=--extra %) --universal --python-version 3.10 --no-annotate --no-header --quiet
lock:
	$(COMPILE) --constraint requirements.constraints --output-file requirements.lock.partial
	$(COMPILE) --resolution lowest-direct --output-file requirements.oldest.partial
	grep -vE '^(nvidia-|cuda-|triton)' requirements.lock.partial > requirements.lock
	grep -vE '^(nvidia-|cuda-|triton)' requirements.oldest.partial > requirements.oldest
	rm requirements.lock.partial requirements.oldest.partial

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-clients* build *.egg-info .pytest_cache .ruff_cache .hypothesis
