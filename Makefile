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
# Test files side by side.
WORKERS ?= 2

.PHONY: install train train-seq2seq test test-slow test-gpu quality style lock clean

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
	$(BIN)/python -m pytest -m "not slow and not gpu" --durations=10 --numprocesses $(WORKERS) --dist loadfile

test-slow: install
	$(BIN)/python -m pytest -m slow --durations=10

test-gpu: install
	$(BIN)/python -m pytest -m gpu --durations=10

quality: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# CUDA libraries are left to torch's own requirements: a CPU build has none. The extra `quantization` is not in the set:
# transformers imports torchao wherever it is installed, which takes every process that a test starts 2 s.
lock:
	uv pip compile pyproject.toml --extra plots --extra tensorboard --extra translation --extra test --universal --python-version 3.10 --no-annotate --no-header \
		--constraint requirements.constraints --quiet --output-file requirements.lock.partial
	grep -vE '^(nvidia-|cuda-|triton)' requirements.lock.partial > requirements.lock
	rm requirements.lock.partial

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
