# Two commands for a first look: `make demo` and `make test`. Each makes a virtual environment of its own from python3.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Processes of the demo: two on a machine without a GPU, one for each GPU otherwise.
PROCESSES ?= $(shell n=$$(nvidia-smi -L 2>/dev/null | wc -l); [ $$n -gt 0 ] && echo $$n || echo 2)
OUT ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test lint install clean

install: $(VENV)/installed

# torch first: DeepSpeed's own installation looks for it.
$(VENV)/installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip install --disable-pip-version-check -q torch numpy
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip install --disable-pip-version-check -q -e '.[train,eval,dev]'
	touch $@

demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed --num_accelerators $(PROCESSES) dpdmd/train.py run.output_dir=$(OUT)

test: install
	OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info
