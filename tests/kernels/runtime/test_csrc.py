"""The compiled library around its kernels: building, finding and loading it. (The kernels run in the other tests.)"""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import LIMIT, run_command

from dpdmd.kernels import dmd_loss, use_backend
from dpdmd.kernels.runtime import backend, build, csrc

# Two roundings of the gradient, and another where d is kept as bfloat16.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}

compiled = pytest.mark.skipif(csrc.find() is None, reason="csrc/ is not compiled: make kernels, with nvcc")
needs_nvcc = pytest.mark.skipif(bool(build.unable()), reason="needs nvcc, ninja and cublasLt.h: make kernels")


@compiled
def test_loads_without_a_gpu_and_knows_its_shapes():
    """In a process of its own, where nothing else registered anything. Meta tensors ask the fakes."""
    code = """
import torch
from dpdmd.kernels.runtime import csrc
assert csrc.load() == ""
x = torch.empty(3, 4, 6, 10, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
loss, gradient = torch.ops.dpdmd.dmd_loss(x, x, x, x, 3.5, None, None, 1.0, None, -1.0, 0, 1.0, 1.0, False)
assert loss.shape == () and loss.dtype == torch.float32
assert gradient.shape == x.shape and gradient.stride() == x.stride() and gradient.dtype == x.dtype
loss, _ = torch.ops.dpdmd.velocity_loss(x, x, x, None, 0.0, 1.0, 1.0, True)
assert loss.shape == (3,)
assert torch.ops.dpdmd.multiply(x, None, 0.0, None, 1.0, 1.0, torch.float32).dtype == torch.float32
try:
    torch.ops.dpdmd.guided_euler_step(*[torch.ones(2, 5)] * 3, 2.0, None, 1.0, None, 0.5)
except NotImplementedError as error:
    print("CPU" in str(error))
"""
    done = run_command([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"


@compiled
def test_every_operation_has_a_fake():
    assert csrc.load() == ""
    schemas = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("dpdmd::")}
    from_cpp = {name.removeprefix("dpdmd::") for name in schemas if not name.endswith("_triton")}
    assert from_cpp == set(csrc.FAKES)


def test_name_changes_with_the_sources(tmp_path, monkeypatch):
    for source in build.SOURCES.glob("*"):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    before = build.file_name()
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert build.file_name() == before
    (tmp_path / "dmd_loss.cu").write_text("// changed")
    assert build.file_name() != before


@needs_nvcc
def test_what_does_not_compile_says_why_and_leaves_nothing(tmp_path, monkeypatch):
    sources, target = tmp_path / "csrc", tmp_path / "built"
    sources.mkdir()
    (sources / "ops.cpp").write_text("int missing_semicolon")
    monkeypatch.setattr(build, "SOURCES", sources)
    with pytest.raises(RuntimeError, match=r"(?s)do not compile with .*nvcc:.*ops.cpp"):
        build.build(target)
    assert list(target.iterdir()) == []


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ({"_nvcc": None, "_ninja": "ninja"}, "nvcc, CUDA's compiler, is not on PATH"),
        ({"_nvcc": "nvcc", "_ninja": None}, r"ninja is not installed \(pip install ninja\)"),
        (
            {"_nvcc": "nvcc", "_ninja": "ninja", "_cublas_headers": None},
            "cublasLt.h is neither in nvcc's toolkit ",
        ),
    ],
)
def test_missing_tools_are_named(tmp_path, monkeypatch, tools, reason):
    for name, path in tools.items():
        monkeypatch.setattr(build, name, lambda path=path: path)
    with pytest.raises(RuntimeError, match=f"cannot be compiled: {reason}"):
        build.build(tmp_path)


def test_the_header_of_cublas_is_sought_in_the_toolkit_and_in_packages(tmp_path, monkeypatch):
    """Each kind of package has a folder of its own: nvidia-cublas-cu12, and nvidia-cublas with those that it needs."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setattr(build, "_nvcc", lambda: str(tmp_path / "toolkit" / "bin" / "nvcc"))
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    assert build._cublas_headers() is None
    package = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: package if name == "nvidia" else None)
    assert build._cublas_headers() is None
    for folder in (tmp_path / "nvidia/cublas/include", tmp_path / "nvidia/cu13/include", tmp_path / "toolkit/include"):
        folder.mkdir(parents=True)
        (folder / "cublasLt.h").touch()
        if folder.parts[-2] != "cublas":
            assert build._cublas_headers() == folder


def _build_once(folder: str, log: str) -> None:
    def built(target: Path) -> None:
        with open(log, "a") as file:
            file.write("built\n")
        (target / build.file_name()).write_bytes(b"library")

    build.build = built
    assert csrc._build_once(Path(folder)).read_bytes() == b"library"


def test_of_several_processes_one_compiles(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_build_once, args=(str(tmp_path / "cache"), str(tmp_path / "log"))) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT)
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "log").read_text() == "built\n"


def test_library_is_sought_beside_the_package_and_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "file_name", lambda: "_ops_of_no_such_sources.so")
    assert csrc.find() is None
    path = tmp_path / "dpdmd" / "_ops_of_no_such_sources.so"
    path.parent.mkdir()
    path.touch()
    assert csrc.find() == path


def test_a_damaged_library_is_named(tmp_path, monkeypatch):
    """One in a cache that something else wrote to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "file_name", lambda: "_ops_of_no_such_sources.so")
    path = tmp_path / "dpdmd" / "_ops_of_no_such_sources.so"
    path.parent.mkdir()
    path.write_bytes(b"half a library")
    with pytest.warns(
        RuntimeWarning, match=r"runs without its CUDA kernels: .*_ops_of_no_such_sources\.so does not load"
    ):
        reason = csrc.load.__wrapped__()
    assert "delete it, and it is compiled again" in reason


def test_a_library_follows_the_umask(tmp_path, monkeypatch):
    """And nothing else is left beside it."""

    def compile_nothing(command, **_):
        (Path(command[2]) / "ops.so").write_bytes(b"library")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(build, "unable", lambda: "")
    monkeypatch.setattr(build, "_ninja", lambda: "ninja")
    monkeypatch.setattr(build.subprocess, "run", compile_nothing)
    before = os.umask(0o027)
    try:
        path = build.build(tmp_path / "built")
    finally:
        os.umask(before)
    assert path.read_bytes() == b"library" and list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o640


def test_cpu_tensors_get_a_reason():
    assert csrc.missing("cpu", None) == "the CUDA kernels need tensors on an NVIDIA GPU, and these are on cpu"


def test_same_dtype():
    a, b = torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float16)
    assert csrc.same_dtype(a, None, a)[0] is a
    assert [t.dtype for t in csrc.same_dtype(a, b)] == [torch.float32] * 2


def on_gpu(test):
    reason = backend.why_not("cuda", "cuda", 0) if torch.cuda.is_available() else "needs a CUDA device"
    return pytest.mark.gpu(pytest.mark.skipif(bool(reason), reason=reason)(test))


@on_gpu
@pytest.mark.parametrize(
    ("shape", "dtype", "networks"),
    [
        ((7, 16, 128, 128), torch.bfloat16, torch.bfloat16),  # no room for clusters side by side: a counter in memory
        ((3, 16, 21, 60, 104), torch.float16, torch.bfloat16),  # too large for a cluster
        ((2, 2**24 + 8), torch.bfloat16, torch.bfloat16),  # too large for the chip: d goes by way of the gradient
        ((2, 2**24 + 8), torch.float32, torch.bfloat16),  # the same in float32
        ((2, 2**23 + 8), torch.float16, torch.float32),  # d is computed again
        ((2, 2**23 + 1), torch.bfloat16, torch.float16),  # ... one element at a time
    ],
)
@pytest.mark.parametrize("form", ["velocity", "sample"])
def test_dmd_loss_of_large_samples(relative_error, shape, dtype, networks, form):
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda dtype: torch.randn(shape, generator=generator, device="cuda").to(dtype)  # noqa: E731
    x, x_t, teacher, critic = draw(dtype).requires_grad_(), draw(dtype), draw(networks), draw(networks)
    t = torch.linspace(0.3, 0.8, shape[0], device="cuda")
    options = {"x_t": x_t, "to_x0": (1.0, -t), "normalizer": "sample"} if form == "sample" else {}

    def run():
        loss = dmd_loss(x, teacher, critic, **options, reduction="sum")
        return loss, *torch.autograd.grad(loss, x)

    with use_backend("cuda"):
        loss, gradient = run()
        for _ in range(100):
            again, gradient_again = run()
            assert torch.equal(again, loss) and torch.equal(gradient_again, gradient)
    exact_loss = 0
    for i in range(shape[0]):
        v, fake = teacher[i].double(), critic[i].double()
        exact = v - fake
        if form == "sample":
            exact = -t[i].double() * (fake - v)
            exact = exact / (x[i].detach().double() - x_t[i].double() + t[i].double() * v).abs().mean()
        else:
            exact = exact / v.abs().mean()
        assert relative_error(gradient[i], exact) < TOLERANCE[dtype]
        exact_loss += 0.5 * exact.square().sum()
    assert relative_error(loss, exact_loss) < 1e-6


@on_gpu
def test_opcheck():
    csrc.load()
    x = [torch.randn(3, 4, 10, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    t, ops = torch.rand(3, device="cuda"), torch.ops.dpdmd
    torch.library.opcheck(ops.dmd_loss, (*x[:3], None, 1.0, x[3], t, 0.0, None, -0.5, 1, 1.0, 1.0, True))
    torch.library.opcheck(ops.velocity_loss, (*x[:3], t, 0.0, 1.0, 1.0, False))
    torch.library.opcheck(ops.x_prediction_loss, (*x[:3], t, 0.0, None, 0.5, 1.0, 1.0, False))
    torch.library.opcheck(ops.renoise, (x[0], x[1], 0, True, None, 0.0, t, 0.0))
    torch.library.opcheck(ops.renoise, (x[0], None, 5, False, None, 0.5, t, 0.0))
    torch.library.opcheck(ops.guided_euler_step, (*x[:3], 3.0, t, 0.0, None, 0.5))
    torch.library.opcheck(ops.multiply, (x[0], None, 0.0, t, 0.0, 2.0, torch.float32))
    torch.library.opcheck(ops.scale_, (x[0], torch.ones((), device="cuda"), 0.5))


@on_gpu
@pytest.mark.skipif(os.environ.get("DPDMD_KERNELS", "") != "", reason="DPDMD_KERNELS chooses")
def test_gpu_tensors_take_the_cuda_kernels_by_themselves():
    x = torch.randn(2, 113, device="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        dmd_loss(x, x + 1, x - 1)
        torch.cuda.synchronize()
    assert any("dmd_loss_kernel" in event.name for event in profile.events())
