import subprocess
import sys

import pytest
import torch

from dpdmd.kernels import backend, dmd_loss, renoise, use_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ALL = {"reference": "R", "triton": "T", "cuda": "C"}


def test_import_brings_torch_and_nothing_else():
    code = """
import sys
import torch
before = set(sys.modules)
import dpdmd.kernels
new = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(sorted(new - {"dpdmd", "torch", "triton"}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_auto_takes_the_fastest_that_serves():
    assert backend.choose("op", ALL, CPU, torch.float32) == "R"
    assert backend.choose("op", ALL, CUDA, torch.float32) == "C"
    assert backend.choose("op", {"reference": "R", "triton": "T"}, CUDA, torch.float32) == "T"
    assert backend.choose("op", {"reference": "R"}, CUDA, torch.float32) == "R"
    assert backend.choose("op", ALL, CUDA, torch.float64) == "R"


def test_environment_overrides_auto_and_the_context_manager_overrides_it(monkeypatch):
    monkeypatch.setenv("DPDMD_KERNELS", "triton")
    assert backend.choose("op", ALL, CPU, torch.float32) == "T"
    with use_backend("cuda"):
        assert backend.choose("op", ALL, CPU, torch.float32) == "C"
        with use_backend("auto"):
            assert backend.choose("op", ALL, CPU, torch.float32) == "R"
        assert backend.choose("op", ALL, CPU, torch.float32) == "C"
    assert backend.choose("op", ALL, CPU, torch.float32) == "T"
    monkeypatch.setenv("DPDMD_KERNELS", "")
    assert backend.requested() == "auto"


def test_context_manager_ends_with_an_error():
    with pytest.raises(ZeroDivisionError), use_backend("triton"):
        raise ZeroDivisionError
    assert backend.requested() == "auto"


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_missing_implementation(randn, monkeypatch, name):
    tensors = randn(2, 5), randn(2, 5), randn(2, 5)
    message = (
        f"dmd_loss has no '{name}' implementation in this version of dpdmd, only: reference. Set DPDMD_KERNELS=auto"
    )
    with use_backend(name), pytest.raises(RuntimeError, match=message):
        dmd_loss(*tensors)
    monkeypatch.setenv("DPDMD_KERNELS", name)
    with pytest.raises(RuntimeError, match=message):
        dmd_loss(*tensors)
    with use_backend("auto"):
        dmd_loss(*tensors)


def test_unknown_names(randn, monkeypatch):
    with pytest.raises(ValueError, match="use_backend got 'fast'; it takes one of auto, reference, triton, cuda"):
        use_backend("fast").__enter__()
    monkeypatch.setenv("DPDMD_KERNELS", "fast")
    with pytest.raises(ValueError, match="DPDMD_KERNELS='fast' in the environment; it takes one of auto, reference"):
        renoise(randn(2, 5), randn(2, 5), 0.5)


def test_compiled_code_follows_the_context_manager(randn):
    torch._dynamo.reset()
    compiled = torch.compile(renoise, fullgraph=True, backend="eager")
    compiled(randn(2, 5), randn(2, 5), 0.5)
    with use_backend("triton"), pytest.raises(Exception, match="renoise has no 'triton' implementation"):
        compiled(randn(2, 5), randn(2, 5), 0.5)
