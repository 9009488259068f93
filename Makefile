# Two commands for a first look: `make demo` and `make test`. Each makes a virtual environment of its own from python3.
# For work on the project: lint, docs, kernels (compiles csrc/), wheel, test-range.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Processes of the demo: two on a machine without a GPU, one for each GPU otherwise.
PROCESSES ?= $(shell n=$$(nvidia-smi -L 2>/dev/null | wc -l); [ $$n -gt 0 ] && echo $$n || echo 2)
OUT ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)

# The versions that the project was tested with, for Python 3.11 and newer; CONSTRAINTS=/dev/null for what pip finds.
CONSTRAINTS ?= constraints.txt
# Which tests, all by default: make test TESTS=tests/kernels/losses
TESTS ?=
# Installs into a virtual environment.
INSTALL = PIP_CONSTRAINT=$(abspath $(CONSTRAINTS)) $(1)/bin/python -m pip install --disable-pip-version-check -q

.PHONY: demo test lint docs kernels headers wheel test-range install clean

install: $(VENV)/installed

# torch first: DeepSpeed's own installation looks for it.
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

# cublasLt.h comes with a whole CUDA toolkit and with CUDA builds of torch. Where there is neither, the package is 420 MB.
headers: install
	if $(BIN)/python kernels/runtime/build.py --check 2>&1 | grep -q 'pip install nvidia-cublas'; then \
	  $(call INSTALL,$(VENV)) 'nvidia-cublas==13.1.*'; fi

kernels: headers
	$(BIN)/python kernels/runtime/build.py

# In dist/: the source distribution, and a wheel made of it, with the compiled library and the tag of the oldest glibc that it
# runs with. Then the wheel is installed in a fresh environment, where the library must load.
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
assert found and found.is_relative_to(sys.prefix) and not reason, reason or f'the wheel has no library, but there is {found}'
print(f'{found} loads')
endef
export LOADS

# The tests with the oldest and the newest torch of pyproject.toml's range, each in an environment of its own. On Linux pip
# takes CUDA builds of them, several GB each. The interpreter of the oldest one's triton does not know numpy 2.4.
test-range:
	mkdir -p build
	for pins in "torch==2.11.0 numpy==2.3.5" "torch==2.14.1 numpy==2.4.6"; do \
	  torch=$${pins%% *} && (grep -vE '^(torch|triton|numpy)==' constraints.txt; printf '%s\n' $$pins) > build/$$torch.txt && \
	  $(MAKE) test VENV=.venv-$$torch CONSTRAINTS=build/$$torch.txt || exit 1; \
	done

clean:
	rm -rf $(VENV) .venv-torch==* build dist site *.egg-info
