import re
import sys
from pathlib import Path

import pytest
import torch
from processes import run_command

from dpdmd.kernels import dmd_loss, renoise, use_backend
from dpdmd.kernels.runtime import backend, launch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ALL = {"reference": "R", "triton": "T", "cuda": "C"}


@pytest.fixture
def everything_runs(monkeypatch):
    """As on a machine where every implementation runs on every device."""
    monkeypatch.setattr(backend, "MISSING", dict.fromkeys(backend.MISSING, lambda device_type, index: ""))
    monkeypatch.setattr(backend, "_served", {})


def test_import_brings_torch_and_triton_and_nothing_else():
    """Nor torch._dynamo, a second of everybody's time."""
    code = """
import sys
import torch
try:
    import triton
except ImportError:
    pass
before = set(sys.modules)
import dpdmd.kernels
new = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(sorted(new - {"dpdmd", "torch", "triton"}), "torch._dynamo" in sys.modules)
"""
    done = run_command([sys.executable, "-c", code])
    assert done.stdout.strip() == "[] False", done.stderr


def test_the_documentation_says_what_an_import_brings():
    root = Path(__file__).parents[3]
    for file in ("README.md", "docs/kernels.md", "kernels/__init__.py"):
        sentences = re.split(r"(?<=[.:])\s", (root / file).read_text(encoding="utf-8"))
        said = [each for each in sentences if "nothing else" in each and "torch" in each]
        assert said and all("Triton" in each for each in said), file


def test_without_triton_the_reference_runs():
    code = """
import sys
sys.modules["triton"] = None
import torch
from dpdmd.kernels import Philox, dmd_loss, renoise, use_backend
x = torch.ones(2, 5, requires_grad=True)
dmd_loss(renoise(x, Philox(1), 0.5), x, 2 * x).backward()
assert x.grad is not None
with use_backend("triton"):
    renoise(x, x, 0.5)
"""
    done = run_command([sys.executable, "-c", code])
    assert "renoise has no 'triton' implementation here: Triton is not installed (pip install triton" in done.stderr


def test_on_the_cpu_triton_needs_its_interpreter(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    launch.missing.cache_clear()
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"interpreter only \(TRITON_INTERPRET=1 before"):
        renoise(torch.zeros(2, 5), torch.zeros(2, 5), 0.5)
    launch.missing.cache_clear()


def test_auto_takes_the_fastest_that_serves(everything_runs):
    assert backend.choose("op", ALL, CPU, torch.float32) == "R"
    assert backend.choose("op", ALL, CUDA, torch.float32) == "C"
    assert backend.choose("op", {"reference": "R"}, CUDA, torch.float32) == "R"
    assert backend.choose("op", ALL, CUDA, torch.float64) == "R"


def test_auto_passes_over_what_the_device_lacks(monkeypatch):
    lacking = set()
    served = {name: lambda *device, name=name: "none" if name in lacking else "" for name in backend.MISSING}
    monkeypatch.setattr(backend, "MISSING", served)
    for lacks, expected in ((set(), "C"), ({"cuda"}, "T"), ({"cuda", "triton"}, "R")):
        monkeypatch.setattr(backend, "_served", {})
        lacking = lacks
        assert backend.choose("op", ALL, CUDA, torch.float32) == expected


def test_auto_passes_over_what_the_operation_lacks(everything_runs):
    assert backend.choose("op", {"reference": "R", "triton": "T"}, CUDA, torch.float32) == "T"


def test_environment_overrides_auto_and_the_context_manager_overrides_it(monkeypatch, everything_runs):
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


def test_an_implementation_asked_for_that_does_not_serve_is_an_error(randn, monkeypatch):
    tensors = randn(2, 5), randn(2, 5), randn(2, 5)
    monkeypatch.setattr(backend, "MISSING", {"cuda": lambda *device: "csrc/ is not built (make it so)"})
    message = r"^op has no 'cuda' implementation here: csrc/ is not built \(make it so\). DPDMD_KERNELS=auto, or "
    with use_backend("cuda"), pytest.raises(RuntimeError, match=message):
        backend.choose("op", ALL, CPU, torch.float32)
    message = "^dmd_loss has no 'cuda' implementation here: "
    with use_backend("cuda"), pytest.raises(RuntimeError, match=message):
        dmd_loss(*tensors)
    monkeypatch.setenv("DPDMD_KERNELS", "cuda")
    with pytest.raises(RuntimeError, match=message):
        dmd_loss(*tensors)
    with use_backend("auto"):
        dmd_loss(*tensors)


def test_an_operation_without_the_implementation_or_float64_is_an_error(everything_runs):
    with use_backend("triton"):
        with pytest.raises(RuntimeError, match="op has no 'triton' implementation here: this operation has only refer"):
            backend.choose("op", {"reference": "R"}, CUDA, torch.float32)
        with pytest.raises(RuntimeError, match=r"op has no 'triton' .* only the reference takes float64 tensors"):
            backend.choose("op", ALL, CUDA, torch.float64)


def test_unknown_names(randn, monkeypatch):
    with pytest.raises(ValueError, match="use_backend got 'fast'; it takes one of auto, reference, triton, cuda"):
        use_backend("fast").__enter__()
    monkeypatch.setenv("DPDMD_KERNELS", "fast")
    with pytest.raises(ValueError, match="DPDMD_KERNELS='fast' in the environment; it takes one of auto, reference"):
        renoise(randn(2, 5), randn(2, 5), 0.5)


def test_compiled_code_follows_the_context_manager(randn, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(backend, "MISSING", {"cuda": lambda *device: "csrc/ is not built"})
    compiled = torch.compile(renoise, fullgraph=True, backend="eager")
    compiled(randn(2, 5), randn(2, 5), 0.5)
    with use_backend("cuda"), pytest.raises(Exception, match="renoise has no 'cuda' implementation"):
        compiled(randn(2, 5), randn(2, 5), 0.5)


def test_compiled_code_asks_what_the_device_serves(everything_runs):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + len(backend.served(None)), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(())) == 3
