# To try the project: `make demo`, `make test`. Both create the virtual environment .venv from python3.
# To work on it: lint, docs, kernels (compiles csrc/), wheel, test-range.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Processes of the demo: one for each GPU, or two without a GPU.
PROCESSES ?= $(shell n=$$(nvidia-smi -L 2>/dev/null | wc -l); [ $$n -gt 0 ] && echo $$n || echo 2)
OUT ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)

# The tested versions, for Python 3.11 and newer. CONSTRAINTS=/dev/null lets pip choose.
CONSTRAINTS ?= constraints.txt
# Tests to run (default: all): make test TESTS=tests/kernels/losses
TESTS ?=
# Installs into the virtual environment $(1).
INSTALL = PIP_CONSTRAINT=$(abspath $(CONSTRAINTS)) $(1)/bin/python -m pip install --disable-pip-version-check -q

.PHONY: demo test lint docs kernels headers wheel test-range install clean

install: $(VENV)/installed

# torch first: DeepSpeed's installation looks for it.
$(VENV)/installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(call INSTALL,$(VENV)) torch numpy
	$(call INSTALL,$(VENV)) -e '.[train,eval,dev,docs]'
	touch $@

demo: install
	PATH="$(abspath $(BIN)):$$PATH" deepspeed --num_accelerators $(PROCESSES) dpdmd/train.py run.output_dir=$(OUT)

test: install
	OMP_NUM_THREADS=1 PATH="$(abspath $(BIN)):$$PATH" python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder $(TESTS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

docs: install
	PATH="$(abspath $(BIN)):$$PATH" NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet

# cublasLt.h is part of a full CUDA toolkit and of CUDA builds of torch. Otherwise this installs a package of 420 MB.
headers: install
	if $(BIN)/python kernels/runtime/build.py --check 2>&1 | grep -q 'pip install nvidia-cublas'; then \
	  $(call INSTALL,$(VENV)) 'nvidia-cublas==13.1.*'; fi

kernels: headers
	$(BIN)/python kernels/runtime/build.py

# Builds the source distribution in dist/, and from it a wheel with the compiled library, tagged with the oldest glibc that it
# runs with. Then installs the wheel in a fresh environment, where the library must load.
wheel: export PYTHONPATH =
wheel: headers
	$(BIN)/python kernels/runtime/build.py --check
	$(call INSTALL,$(VENV)) -e '.[release]'
	rm -rf build dist
	$(BIN)/python -m build --no-isolation --outdir build/dist
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --plat auto --exclude 'libtorch*' --wheel-dir dist build/dist/*-linux_*.whl
	mv build/dist/*.tar.gz dist/
	$(PYTHON) -m venv build/fresh
	$(call INSTALL,build/fresh) dist/*.whl
	cd / && XDG_CACHE_HOME=$(CURDIR)/build $(CURDIR)/build/fresh/bin/python -I -c "$$LOADS"
	build/fresh/bin/dpdmd --version

define LOADS
import sys, dpdmd.kernels
from dpdmd.kernels.runtime import csrc
found, reason = csrc.find(), csrc.load()
assert found and found.is_relative_to(sys.prefix) and not reason, reason or f'the wheel has no library; found {found}'
print(f'{found} loads')
endef
export LOADS

# The tests with the oldest and the newest torch of pyproject.toml's range, each in a new environment. On Linux pip installs
# CUDA builds, several GB each. The oldest torch's triton has an interpreter that fails with numpy 2.4.
test-range:
	mkdir -p build
	for pins in "torch==2.11.0 numpy==2.3.5" "torch==2.14.1 numpy==2.4.6"; do \
	  torch=$${pins%% *} && (grep -vE '^(torch|triton|numpy)==' constraints.txt; printf '%s\n' $$pins) > build/$$torch.txt && \
	  $(MAKE) test VENV=.venv-$$torch CONSTRAINTS=build/$$torch.txt || exit 1; \
	done

clean:
	rm -rf $(VENV) .venv-torch==* build dist site *.egg-info
