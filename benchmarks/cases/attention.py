"""Attention's forward and backward pass by every backend: TFLOP/s, and the error against float32.

    forward   4 B H S S D operations: two matmuls of S x S x D for each sample and head
    backward  2.5 times that: five matmuls

A backend whose error exceeds twice that of plain PyTorch in the same dtype is not timed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from harness import accuracy, timing
from harness.accuracy import Error
from harness.operation import Checked, Draw, Implementation, Operation, Run, Tensors
from torch import Tensor

from dpdmd.kernels import attention

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
ERROR_LIMIT = 2.0  # times the error of plain PyTorch in the same dtype
SETS = 2  # of inputs: q, k and v of one take 160 MB at the large sizes, more than L2


def _make(shape: tuple[int, ...], draw: Draw) -> Tensors:
    return {name: draw(*shape) for name in ("q", "k", "v", "upstream")}


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), v)


def _slice(tensor: Tensor) -> Tensor:
    """One sample and two heads, independent of the others: the whole in float32 would not fit."""
    return tensor[:1, :, :2]


@dataclass(frozen=True, kw_only=True)
class Attention(Operation):
    """Ours and the peers are backends of one function. On a GPU it is timed in CUDA graphs only: a short attention takes the
    host longer than the GPU."""

    outputs: tuple[str, ...] = ("o",)

    table: ClassVar[str] = "attention"
    poisoned: ClassVar[bool] = False  # most backends are torch's
    each_alone: ClassVar[bool] = True
    on_host: ClassVar[bool] = False
    gpu_seconds: ClassVar[float] = 0.2  # for a backend and pass, both rounds together

    def num_sets(self, inputs: Tensors, cache_bytes: int) -> int:
        return SETS

    def implementations(self, run: Run, size: str) -> list[Implementation]:
        """One for each backend, which may not be installed or not support the shape."""
        backends = BACKENDS if run.device.type == "cuda" else CPU_BACKENDS
        functions = {name: functools.partial(self.ours, backend=name) for name in backends}
        return [Implementation(name, name not in OURS, each, may_be_missing=True) for name, each in functions.items()]

    def leaves(self, inputs: Tensors) -> Tensors:
        return {name: inputs[name].detach().requires_grad_() for name in ("q", "k", "v")}

    def upstream(self, inputs: Tensors, outputs: Tensors) -> list[Tensor]:
        return [inputs["upstream"]]

    def results(self, function: Any, inputs: Tensors) -> Tensors:
        named = self.leaves(inputs)
        o = function(**named)
        gradients = torch.autograd.grad(o, list(named.values()), self.upstream(inputs, {"o": o}))
        return {"o": o.detach(), **{f"d{name}": each for name, each in zip(named, gradients, strict=True)}}

    def truth(self, inputs: Tensors) -> tuple[Tensors, dict[str, float]]:
        """Results in float32 on the slice, and the errors of plain PyTorch in bfloat16."""
        part = {name: _slice(tensor) for name, tensor in inputs.items()}
        exact = self.results(self.peer, {name: tensor.float() for name, tensor in part.items()})
        plain = self.results(self.peer, part)
        return exact, {name: accuracy.relative(plain[name], exact[name]) for name in exact}

    def errors(self, implementation: Implementation, inputs: Tensors, outcome: Tensors, truth: Any) -> dict[str, Error]:
        exact, plain = truth
        return {
            name: Error(accuracy.relative(_slice(got), exact[name]), ERROR_LIMIT * plain[name])
            for name, got in outcome.items()
        }

    def problem(self, name: str, error: Error) -> str:
        plain = f"{ERROR_LIMIT:.0f} times plain PyTorch's {error.limit / ERROR_LIMIT:.1e}"
        return f"relative error of {name} {error.value:.1e}, allowed {plain}"

    def facts(
        self, implementation: Implementation, size: str, inputs: Tensors, outcome: Any, truth: Any
    ) -> dict[str, Any]:
        return {"shape": list(self.sizes[size]), "errors_plain": truth[1]}

    def work(self, implementation: Implementation, inputs: Tensors, outcome: Tensors) -> dict[str, float]:
        B, S, H, D = inputs["q"].shape
        forward = 4 * B * H * S * S * D
        return {"forward": forward, "backward": 2.5 * forward}

    def ways(self, device: torch.device) -> list[tuple[str, ...]]:
        return [("forward", "backward")]

    def subject(self, implementation: Implementation, way: str) -> timing.Subject:
        subject = super().subject(implementation, way)
        return dataclasses.replace(subject, call=torch.no_grad()(subject.call)) if way == "forward" else subject

    def compared_with(self, implementation: Implementation, found: list[Implementation]) -> list[str]:
        return [each.name for each in found if each is not implementation]

    def row(self, name: str, ways: tuple[str, ...], checked: dict[str, Checked]) -> dict[str, Any]:
        errors = checked[name].errors
        cudnn = checked["cudnn"].errors if "cudnn" in checked else {}
        to_cudnn = {which: errors[which] / error for which, error in cudnn.items()}
        return {"operations": checked[name].work, "errors": errors, "errors_to_cudnn": to_cudnn}

    def rates(self, own: dict[str, timing.Time], work: dict[str, float], copy_tb_s: float) -> dict[str, Any]:
        return {"tflop_s": {way: work[way.removeprefix("gpu_")] / taken.median_us / 1e6 for way, taken in own.items()}}


OPERATIONS = (Attention(name="attention", sizes=SIZES, make=_make, ours=attention, peer=_plain),)
