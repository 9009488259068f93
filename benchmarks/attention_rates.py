"""Attention forward and backward, each alone, by every backend: TFLOP/s, and the error against float32.

    forward   4 B H S S D operations: two products of S x S x D for each sample and head
    backward  2.5 times that: five products

A backend whose error is more than twice that of plain PyTorch in the same dtype is not timed.
"""

from __future__ import annotations

import math
from typing import Any

import timing
import torch
from torch import Tensor

from dpdmd.kernels import attention

DTYPE = torch.bfloat16
OURS = ("auto", "triton", "triton+cudnn")
BACKENDS = (*OURS, "cudnn", "flash", "efficient", "sdpa", "xformers")  # sdpa: what torch picks
CPU_BACKENDS = ("auto", "sdpa", "flash")

SIZES = {  # (B, S, H, D)
    "4x4429x24x64": (4, 4429, 24, 64),  # SD3.5-M's joint attention, 1024 x 1024
    "8x4429x24x64": (8, 4429, 24, 64),
    "4x4096x24x64": (4, 4096, 24, 64),  # its second attention, of the image alone
    "4x1024x24x64": (4, 1024, 24, 64),  # 512 x 512
    "4x4429x24x96": (4, 4429, 24, 96),
    "1x4608x24x128": (1, 4608, 24, 128),  # FLUX.1, 1024 x 1024
    "2x4608x24x128": (2, 4608, 24, 128),
    "awkward": (2, 113, 3, 24),
}
CPU_SIZES = ("awkward",)
ERROR_LIMIT = 2.0  # times the error of plain PyTorch in the same dtype
SECONDS = 0.2  # for one backend and one pass, both rounds together
SETS = 2  # q, k and v of one set are 160 MB where L2 matters
RESULTS = ("o", "dq", "dk", "dv")

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # q, k, v and the gradient of o


def operations(size: str) -> dict[str, float]:
    B, S, H, D = SIZES[size]
    forward = 4 * B * H * S * S * D
    return {"forward": forward, "backward": 2.5 * forward}


def make_inputs(size: str, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    return tuple(torch.randn(SIZES[size], generator=generator, device=device, dtype=DTYPE) for _ in range(4))


def run_size(run, size: str) -> None:
    """Every backend at one size: checked, then timed. run: what run.py keeps."""
    sets = [make_inputs(size, run.device, seed) for seed in range(SETS)]
    backends = BACKENDS if run.device.type == "cuda" else CPU_BACKENDS
    errors = {}
    exact, plain = _exact(sets[0])
    for backend in backends:
        try:
            got = _results(sets[0], lambda q, k, v, backend=backend: attention(q, k, v, backend=backend))
        except (RuntimeError, NotImplementedError, ValueError) as error:  # it does not serve this shape, or is not here
            run.left_out.append(f"attention {size}, {backend}: {str(error).strip().partition(chr(10))[0]}")
            continue
        errors[backend] = {name: _error(got[name], exact[name]) for name in RESULTS}
        for name, error in errors[backend].items():
            if not error <= ERROR_LIMIT * plain[name]:  # NaN must not pass
                run.failures.append(
                    f"attention {size}, {backend}: relative error of {name} {error:.1e}, "
                    f"allowed {ERROR_LIMIT:.0f} times that of plain PyTorch, {plain[name]:.1e}"
                )
                del errors[backend]
                break
    times = {name: time_pass(run, size, list(errors), name, sets) for name in ("forward", "backward")}
    run.attention += make_rows(run, size, errors, plain, times)


def _results(inputs: Inputs, function) -> dict[str, Tensor]:
    q, k, v = (tensor.detach().requires_grad_() for tensor in inputs[:3])
    o = function(q, k, v)
    gradients = torch.autograd.grad(o, (q, k, v), inputs[3].to(o.dtype))
    return dict(zip(RESULTS, (o.detach(), *gradients), strict=True))


def _slice(inputs: Inputs) -> Inputs:
    """One sample and two heads, which depend on no others: float32 of the whole would not fit."""
    return tuple(tensor[:1, :, :2] for tensor in inputs)


def _exact(inputs: Inputs) -> tuple[dict[str, Tensor], dict[str, float]]:
    """float32's results on the slice, and the errors of plain PyTorch in bfloat16."""
    part = _slice(inputs)
    exact = _results(tuple(tensor.float() for tensor in part), _plain)
    plain = _results(part, _plain)
    return exact, {name: _error(plain[name], exact[name]) for name in RESULTS}


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), v)


def _error(got: Tensor, exact: Tensor) -> float:
    (got,) = _slice((got,))
    return (got.double() - exact.double()).norm().item() / exact.double().norm().item()


def time_pass(run, size: str, backends: list[str], name: str, sets: list[Inputs]) -> dict[str, timing.Time]:
    """By backend. On a GPU that of a replayed CUDA graph, as a short attention takes the host longer."""
    subjects = {backend: _subject(backend, name) for backend in backends}
    if run.device.type != "cuda":
        return timing.in_turns(subjects, sets)
    times, reasons = timing.on_gpu_in_turns(subjects, sets, SECONDS)
    run.left_out += [f"attention {size}, {backend}, {name}: {reason}" for backend, reason in reasons.items()]
    return times


def _subject(backend: str, name: str) -> timing.Subject:
    def prepare(inputs: Inputs) -> Any:
        q, k, v = (tensor.detach().requires_grad_() for tensor in inputs[:3])
        if name == "forward":
            return q, k, v
        return attention(q, k, v, backend=backend), (q, k, v), inputs[3]

    def forward(prepared: Any) -> Any:
        with torch.no_grad():
            return attention(*prepared, backend=backend)

    def backward(prepared: Any) -> Any:
        o, wanted, upstream = prepared
        return torch.autograd.grad(o, wanted, upstream, retain_graph=True)

    return timing.Subject(forward if name == "forward" else backward, prepare=prepare)


def make_rows(
    run,
    size: str,
    errors: dict[str, dict[str, float]],
    plain: dict[str, float],
    times: dict[str, dict[str, timing.Time]],
) -> list[dict[str, Any]]:
    way = "gpu_" if run.device.type == "cuda" else ""
    counted = {way + name: number for name, number in operations(size).items()}
    named = timing.by_name({way + name: by_backend for name, by_backend in times.items()})
    rows = []
    for backend in errors:
        own = named.get(backend, {})
        others = {each: named.get(each, {}) for each in errors if each != backend}
        rows.append(
            {
                "operation": "attention",
                "size": size,
                "implementation": backend,
                "peer": backend not in OURS,
                "shape": list(SIZES[size]),
                "operations": operations(size),
                "errors": errors[backend],
                "errors_plain": plain,
                # Its own error over cuDNN's.
                "errors_to_cudnn": {name: errors[backend][name] / errors["cudnn"][name] for name in RESULTS}
                if "cudnn" in errors
                else {},
                "times": {name: taken.json() for name, taken in own.items()},
                "tflop_s": {name: counted[name] / taken.median_us / 1e6 for name, taken in own.items()},
                "ratios": timing.ratios(own, others),
            }
        )
    return rows
