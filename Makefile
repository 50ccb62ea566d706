# make generate PROMPT="..." | make app | make demo | make train DATA=FOLDER [MINUTES=30] | make check test | make test-slow | make test-rounding | make format | make bench [PARTS=train_small]
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out/demo
BENCH_VENV ?= .venv-bench
BENCH_OUT ?= out/bench
PARTS ?= all
MODEL ?= checkpoints/emoji-64
PROMPT ?= a red heart, Noto style
PORT ?= 7860
MINUTES ?= 30
PARALLEL ?= --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: generate app demo train check test test-slow test-rounding format bench clean

generate: $(VENV)/.demo
	$(BIN)/python scripts/generate.py --model $(MODEL) --prompt "$(PROMPT)"

app: $(VENV)/.app
	$(BIN)/python scripts/app.py --model $(MODEL) --port $(PORT)

demo: $(VENV)/.demo
	$(BIN)/python scripts/demo.py --out $(OUT)

train: $(VENV)/.demo
	$(BIN)/python scripts/train.py "$(DATA)" --minutes $(MINUTES)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest tests/test_words.py

test: $(VENV)/.dev
	$(BIN)/pytest $(PARALLEL)

test-slow: $(VENV)/.dev
	$(BIN)/pytest $(PARALLEL) -m slow

# torch's plain loops, the oldest instructions of oneDNN and of MKL, and a processor that is acted out
test-rounding: $(VENV)/.dev
	for rounding in ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE \
	TEST_ROUNDING=1; do echo "$$rounding"; env $$rounding $(BIN)/pytest $(PARALLEL) || exit 1; done

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(BENCH_VENV)/.bench
	$(BENCH_VENV)/bin/python -m benchmarks --parts $(PARTS) --out $(BENCH_OUT)

clean:
	rm -rf $(VENV) $(BENCH_VENV) out

$(VENV)/.demo: pyproject.toml requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements-dev.txt -e '.[demo-data]'
	touch $@

$(VENV)/.app: pyproject.toml requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements-dev.txt -e '.[app]'
	touch $@

$(VENV)/.dev: pyproject.toml requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements-dev.txt -e '.[demo-data,eval,dev]'
	touch $@ $(VENV)/.demo

# dalle-pytorch has a dependency that no longer builds; benchmarks/peers.py stubs what its import misses.
$(BENCH_VENV)/.bench: pyproject.toml requirements-dev.txt
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/pip install -q -r requirements-dev.txt -e '.[bench,demo-data]'
	$(BENCH_VENV)/bin/pip install -q --no-deps dalle-pytorch==1.6.6
	touch $@
