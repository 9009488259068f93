"""How tests share a machine: the number of workers, memory of the GPU, caches, and what is said of a worker that died.

A plugin of pytest, for tests/conftest.py. `pytest -n auto` starts no more workers than the machine's memory and the GPU's
are enough for. Each may have GPU_GIB_HELD of the GPU at any time, CUDA's own share included; a test that takes more says
how much at its peak:

    @pytest.mark.gpu_memory(20)  # GiB

It waits until as much of what is left of the GPU is free, takes it from the others meanwhile, and is skipped where the
GPU never has it. What a test leaves with torch's allocator goes back to the GPU.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from processes import LIMIT
from slots import slots

T = TypeVar("T")
HOST_GIB_A_WORKER = 4  # the worker has up to 1; two processes of a training run 1, compilers 3
GPU_GIB_A_WORKER = 8
GPU_GIB_HELD = 4
ASKING = 0  # the slot of whoever counts what is free; each GiB has one of those from 1 on
# Where libraries keep what they compile and download. A run of the tests starts with nothing there, leaves nothing, and
# needs no home that can be written to; a variable that is set stands.
RUN = "DPDMD_TESTS_FOLDER"  # what all workers of a run of the tests share
CACHES = ("XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu_memory(gib): takes so much of a GPU's memory at its peak, more than 4 GiB")
    if hasattr(config, "workerinput"):  # which inherits the variables
        return
    folder = tempfile.TemporaryDirectory(prefix="dpdmd-tests-", ignore_cleanup_errors=True)
    config.add_cleanup(folder.cleanup)
    os.environ[RUN] = folder.name
    for name in CACHES:
        if not os.environ.get(name):
            os.environ[name] = os.path.join(folder.name, name.lower())
    config.stash[KILLED] = killed_for_memory()


# Workers

KILLED, DIED = pytest.StashKey[int](), pytest.StashKey[bool]()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """For `-n auto`. PYTEST_XDIST_AUTO_NUM_WORKERS is xdist's own, and stands."""
    if os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS"):
        return None
    return num_workers(len(os.sched_getaffinity(0)), memory_gib("MemTotal"), gpu_gib())


def num_workers(cores: int, host_gib: float, gpu_gib: float | None) -> int:
    limits = [cores, host_gib / HOST_GIB_A_WORKER, *([gpu_gib / GPU_GIB_A_WORKER] if gpu_gib else [])]
    return max(1, int(min(limits)))


def memory_gib(name: str) -> float:
    """Of the machine: MemTotal or MemAvailable."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines[name].split()[0]) / 2**20


def gpu_gib() -> float | None:
    return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """Where a worker dies xdist gives its tests to another, that at which it died with them, and so on until no more
    workers are started. What a file says was begun and not ended is not run again."""
    begun = Path(os.environ[RUN], hashlib.sha256(item.nodeid.encode()).hexdigest())
    item.stash[DIED] = begun.exists()
    begun.touch()
    result = yield
    begun.unlink()
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if item.stash[DIED]:
        pytest.skip("the worker that ran it has died")


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(report, sched):
    """xdist names the test; the kernel does not tell it why the worker died."""
    killed = killed_for_memory() - sched.config.stash[KILLED]
    report.longrepr = (
        f"{report.longrepr}\n{killed} processes of this machine were killed for want of memory since the tests began (see "
        f"dmesg); {memory_gib('MemAvailable'):.1f} of its {memory_gib('MemTotal'):.1f} GiB are available now."
    )


def killed_for_memory() -> int:
    lines = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(lines.get("oom_kill", 0))


# Memory of the GPU


@pytest.fixture(autouse=True)
def _share_of_the_gpu(request):
    marker = request.node.get_closest_marker("gpu_memory")
    with contextlib.ExitStack() as held:
        if marker and torch.cuda.is_available():
            workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
            held.enter_context(share(*marker.args, total=shared_gib(gpu_gib(), workers)))
        yield
        if torch.cuda.is_initialized():
            let_go(everything=marker is not None)


def shared_gib(total: float, workers: int) -> int:
    """What is left for tests that ask, of the GPU's memory."""
    return int(total - GPU_GIB_HELD * workers)


@contextlib.contextmanager
def share(gib: int, *, total: int, limit: float = LIMIT) -> Iterator[None]:
    """Waits for `gib` of the `total` that all processes share, and for the GPU to have them. Skips the test where they can
    never be had, and fails it where they cannot for `limit` seconds."""
    if gib > total:
        pytest.skip(f"needs {gib} GiB of the GPU's memory, and the workers leave {max(0, total)} GiB; -n 1 leaves most")
    gpu, taken = slots("gpu"), []
    try:
        taken = _until(lambda: _take(gpu, gib, total), limit, lambda: f"other tests have the {gib} GiB")
        let_go(everything=True)
        _until(
            lambda: free_gib() >= gib,
            limit,
            lambda: f"of the {gib} GiB {free_gib():.1f} are free, others have the rest",
        )
        yield
    finally:
        for slot in taken:
            gpu.give_back(slot)


def free_gib() -> float:
    return torch.cuda.mem_get_info()[0] / 2**30


def _until(ready: Callable[[], T], limit: float, problem: Callable[[], str]) -> T:
    deadline = time.monotonic() + limit
    while not (found := ready()):
        if time.monotonic() >= deadline:
            pytest.fail(f"waited {limit:g} s for memory of the GPU: {problem()}", pytrace=False)
        time.sleep(0.1)
    return found


def _take(gpu, gib: int, total: int) -> list[int]:
    """As many slots, or none. One process counts at a time: two that each got a part would wait for each other."""
    if not gpu.take(ASKING):
        return []
    try:
        free = [slot for slot in range(1, total + 1) if gpu.take(slot)]
        for slot in free[gib if len(free) >= gib else 0 :]:
            gpu.give_back(slot)
        return free[:gib] if len(free) >= gib else []
    finally:
        gpu.give_back(ASKING)


def let_go(everything: bool) -> None:
    """Gives the allocator's memory back, where it is much. pytest keeps the traceback of a test that failed, and with it
    the tensors of its frames."""
    error = getattr(sys, "last_value", None)
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    if everything or torch.cuda.memory_reserved() > 2**30:
        gc.collect()
        torch.cuda.empty_cache()
