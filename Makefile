# make setup   virtual environment .venv with everything (CUDA vLLM when an NVIDIA driver is there, CPU vLLM otherwise)
# make demo    simulate an atlas, build puzzles, distill, SFT, GRPO with vLLM, evaluate, report: runs/demo/report.html
# make pbmc    the same on real cells (PBMC 68k, shipped inside scanpy): runs/pbmc/report.html
# make test    the whole test suite: 10 to 12 minutes on 2 cores
# make test-fast   what needs neither vLLM nor several seconds: about 80 seconds
# make lint    ruff
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: setup demo pbmc test test-fast lint

setup: $(VENV)/.ready

$(VENV)/.ready: setup.cfg launch/setup.sh
	@PYTHON="$(PYTHON)" VENV="$(VENV)" sh launch/setup.sh

demo: setup
	@echo "[make] demo: about 10 minutes on 2 cores; results in runs/demo"
	@$(RUN) launch/demo.py

pbmc: setup
	@mkdir -p runs/pbmc
	@$(RUN) -W ignore -c "import scanpy; scanpy.datasets.pbmc68k_reduced().write_h5ad('runs/pbmc/pbmc68k_reduced.h5ad')"
	@$(RUN) launch/demo.py --recipe launch/recipes/pbmc.yaml

# two files at a time, in the order of conftest.py; commands share the two cores, so each of them gets one thread
TEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: setup
	@echo "[make] test"
	@$(TEST)

test-fast: setup
	@echo "[make] test-fast"
	@$(TEST) -m "not vllm and not slow"

lint: setup
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
