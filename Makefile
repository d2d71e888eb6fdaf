# Two commands on a fresh machine: `make demo` and `make test`. Both build the environment first (.venv).
# The CPU is enough; on a GPU or TPU machine install the extra too: `.venv/bin/pip install -e .[cuda]`.

PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/demo
BIN := $(VENV)/bin
export JAX_PLATFORMS ?= cpu

.PHONY: help demo demo-sim test test-slow test-gate lint clean

help:
	@echo "make demo      train tokenizer, policy and baseline on the sample data, write $(RUN)/report/report.html"
	@echo "make demo-sim  make demo, then closed-loop rollouts with videos (installs the sim extra)"
	@echo "make test      fast test suite;  make test-slow: the rest;  make lint: ruff"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# One stamp per set of extras: nothing is reinstalled while setup.py stands still.
$(VENV)/.core: setup.py | $(BIN)/python
	@echo "installing qdepth_jax into $(VENV)"
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.test: setup.py | $(BIN)/python
	@echo "installing qdepth_jax[test] into $(VENV)"
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/.sim: setup.py $(VENV)/.core
	@echo "installing qdepth_jax[sim] into $(VENV) (about 2 GB)"
	$(BIN)/python -m pip install --quiet --editable '.[sim]'
	touch $@

demo: $(VENV)/.core
	$(BIN)/python tools/index_rlds.py data/libero_object
	$(BIN)/python tools/index_rlds.py data/libero_spatial
	$(BIN)/python -m qdepth_jax.train --config=experiments/demo.py:tokenizer --workdir=$(RUN)/tokenizer
	$(BIN)/python tools/tokenize_depth.py --tokenizer=$(RUN)/tokenizer
	$(BIN)/python -m qdepth_jax.train --config=experiments/demo.py --workdir=$(RUN)/policy \
	  --config.tokenizer=$(RUN)/tokenizer
	$(BIN)/python -m qdepth_jax.train --config=experiments/baseline.py:demo --workdir=$(RUN)/baseline
	$(BIN)/python tools/report.py --tokenizer=$(RUN)/tokenizer --policy=qdepth=$(RUN)/policy \
	  --policy=baseline=$(RUN)/baseline --output=$(RUN)/report

# The demo policy is trained for minutes from random weights: expect it to reach towards things, not to solve tasks.
demo-sim: demo $(VENV)/.sim
	$(BIN)/python tools/evaluate.py --checkpoint=$(RUN)/policy --suite=libero_object --tasks=1,2 --episodes=2 --image_size=128
	$(BIN)/python tools/evaluate.py --checkpoint=$(RUN)/policy --suite=libero_spatial --tasks=0,3 --episodes=2 --image_size=128

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=15

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

# The slow tests that the gate runs too: real BridgeData through every command (skips without the sample), every mesh,
# several processes, elastic resume, fewer kills than `make test-slow`, damaged checkpoints, weights in and out, and all
# that is slow about data and conversion.
test-gate: $(VENV)/.test
	QDEPTH_KILLS=2 $(BIN)/python -m pytest -n 2 --dist loadfile --durations=25 -m slow tests/test_bridge.py \
	  tests/test_train_step.py tests/test_resume.py tests/test_elastic.py tests/test_multihost.py \
	  tests/test_distributed.py tests/test_checkpoint.py tests/test_optim.py \
	  tests/test_data_changes.py tests/data tests/convert tests/weights tests/test_earlier_stages.py \
	  tests/test_tokenisation.py tests/tools/test_export_checkpoint.py tests/models/test_real_time.py

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

clean:
	rm -rf $(RUN)
