"""AdamW's step on a flat shard: ours with each form of the moments, torch's fused AdamW, torch.compile of the formula.

    read     master 4, exp_avg, exp_avg_sq 4 or 2 or 1 each, gradient 2     bytes a parameter
    written  master 4, exp_avg, exp_avg_sq, weight 2

In all 28 with float32 moments, 20 with bfloat16 ones, 16.06 with 8-bit ones and their scales. torch's fused AdamW needs a
float32 gradient and writes no bfloat16 weight: its time includes the conversion before and the copy after, as in trainers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from harness import accuracy, timing
from harness.accuracy import Error
from harness.operation import DTYPE, Checked, Draw, Implementation, Operation, Run
from torch import Tensor

from dpdmd.kernels import Float8State, Philox, adamw_step, use_backend
from dpdmd.kernels.optim.adamw import BLOCK, exp_avg_of, exp_avg_sq_of

SIZES = {
    "16m": 2**24,  # parameters; a set of inputs with all forms of the moments takes 22 bytes of each
    "256m": 2**28,
    "awkward": 100_003,  # not a multiple of the block
}
FORMS = ("float32", "bfloat16", "float8")
PEER_FORM = "float32"
LR, BETAS, EPS, WEIGHT_DECAY = 1e-4, (0.9, 0.999), 1e-8, 0.01
STEP = 2
KEY = Philox(20260203)
CHECKED = 2**20  # elements at each end that are compared with float64; elements are independent
# Limits of relative errors: of the master's change (its rounding alone makes 1e-5), and of the stored moments.
CHANGE_LIMIT = 1e-3
MOMENT_LIMITS = {"float32": 1e-6, "bfloat16": 2**-7, "float8": 2**-3}

Moments = tuple[Tensor, Tensor] | tuple[Float8State, Float8State]


@dataclass(frozen=True)
class Shard:
    """The tensors that a step updates in place."""

    master: Tensor
    gradient: Tensor
    weight: Tensor
    moments: dict[str, Moments]  # by form

    def bytes(self, form: str) -> int:
        """The fewest bytes that a step must move."""
        kept = [self.master, *(part for moment in self.moments[form] for part in _parts(moment))]
        return 2 * sum(each.nbytes for each in kept) + self.gradient.nbytes + self.weight.nbytes

    def copy(self, form: str) -> Shard:
        moments = tuple(
            Float8State(*(part.clone() for part in _parts(moment)))
            if isinstance(moment, Float8State)
            else moment.clone()
            for moment in self.moments[form]
        )
        # NaN shows a weight that is not written.
        return Shard(self.master.clone(), self.gradient, torch.full_like(self.weight, math.nan), {form: moments})


def _parts(moment: Tensor | Float8State) -> list[Tensor]:
    return [moment.values, moment.scales] if isinstance(moment, Float8State) else [moment]


def make_shard(size: int, draw: Draw) -> Shard:
    """Random masters and gradients, and the moments after one step; gradient and weight in bfloat16."""

    def randn(scale: float) -> Tensor:
        return draw(size, dtype=torch.float32).mul_(scale)

    master, before, moments = randn(0.02), randn(1e-3).to(DTYPE), {}
    for form in FORMS:
        if form == "float8":
            moments[form] = Float8State.zeros(size, draw.device), Float8State.zeros(size, draw.device)
        else:
            moments[form] = tuple(torch.zeros(size, dtype=getattr(torch, form), device=draw.device) for _ in range(2))
        with use_backend("auto"):
            _ours(Shard(master.clone(), before, torch.empty_like(before), {form: moments[form]}), form, STEP - 1)
    return Shard(master, randn(1e-3).to(DTYPE), master.to(DTYPE), moments)


def _ours(shard: Shard, form: str, step: int = STEP) -> None:
    adamw_step(
        *(shard.master, *shard.moments[form], shard.gradient),
        weight=shard.weight,
        lr=LR,
        betas=BETAS,
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
        step=step,
        key=KEY,
    )


def _formula(master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """master, exp_avg and exp_avg_sq after the step."""
    exp_avg = BETAS[0] * exp_avg + (1 - BETAS[0]) * gradient
    exp_avg_sq = BETAS[1] * exp_avg_sq + (1 - BETAS[1]) * gradient * gradient
    denominator = exp_avg_sq.sqrt() / math.sqrt(1 - BETAS[1] ** STEP) + EPS
    decayed = (1 - LR * WEIGHT_DECAY) * master
    return decayed - LR / (1 - BETAS[0] ** STEP) * exp_avg / denominator, exp_avg, exp_avg_sq


def _in_place(master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, gradient: Tensor, weight: Tensor) -> None:
    after = _formula(master, exp_avg, exp_avg_sq, gradient.float())
    for target, value in zip((master, exp_avg, exp_avg_sq, weight), (*after, after[0]), strict=True):
        target.copy_(value)


def _torchs(shard: Shard) -> Callable[[], None]:
    device = shard.master.device
    parameter = torch.nn.Parameter(shard.master)
    settings = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}
    optimizer = torch.optim.AdamW([parameter], fused=True, capturable=device.type == "cuda", **settings)
    exp_avg, exp_avg_sq = shard.moments[PEER_FORM]
    step = torch.tensor(float(STEP - 1), device=device)
    optimizer.state[parameter] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}

    def call() -> None:
        parameter.grad = shard.gradient.float()
        optimizer.step()
        shard.weight.copy_(parameter.detach())

    return call


@dataclass(frozen=True, kw_only=True)
class Step(Operation):
    """`ours` makes a step on a shard with one form of moments; `peer` takes a shard and returns the function that does."""

    table: ClassVar[str] = "optimizer"
    compile_context: ClassVar[Callable] = torch.no_grad

    def set_bytes(self, inputs: Shard) -> int:
        return inputs.bytes("float8")

    def implementations(self, run: Run, size: str) -> list[Implementation]:
        """Each of ours once for every form of the moments, then the peers."""
        found = super().implementations(run, size)
        ours = [
            dataclasses.replace(each, name=f"{each.name} {form}", function=functools.partial(self.ours, form=form))
            for each in found
            if not each.peer
            for form in FORMS
        ]
        return [*ours, *(each for each in found if each.peer)]

    def prepare(self, implementation: Implementation, shard: Shard) -> Callable[[], None]:
        """The function that makes one step on the shard."""
        if not implementation.peer:
            return functools.partial(implementation.function, shard)
        if implementation.name == "eager":
            return implementation.function(shard)
        tensors = shard.master, *shard.moments[PEER_FORM], shard.gradient, shard.weight
        return functools.partial(implementation.function, *tensors)

    def truth(self, inputs: Shard) -> None:
        """`compare` computes the truth, at both ends of the shard."""

    def once(self, implementation: Implementation, inputs: Shard) -> Shard:
        mine = inputs.copy(form_of(implementation))
        self.prepare(implementation, mine)()
        return mine

    def errors(self, implementation: Implementation, inputs: Shard, outcome: Shard, truth: None) -> dict[str, Error]:
        form = form_of(implementation)
        limits = {"change": CHANGE_LIMIT, "weight": accuracy.RESULT_LIMIT}
        found = compare(inputs, outcome, form)
        return {name: Error(error, limits.get(name, MOMENT_LIMITS[form])) for name, error in found.items()}

    def facts(self, implementation: Implementation, size: str, inputs: Shard, *checked: Any) -> dict[str, Any]:
        form, parameters = form_of(implementation), self.sizes[size]
        moved = inputs.bytes(form)
        return {"form": form, "parameters": parameters, "bytes": moved, "bytes_a_parameter": moved / parameters}

    def work(self, implementation: Implementation, inputs: Shard, outcome: Shard) -> dict[str, float]:
        return {"step": inputs.bytes(form_of(implementation))}

    def ways(self, device: torch.device) -> list[tuple[str, ...]]:
        return [("step",)]

    def subject(self, implementation: Implementation, way: str) -> timing.Subject:
        prepare = functools.partial(self.prepare, implementation)
        return timing.Subject(lambda step: step(), implementation.context, prepare)

    def row(self, name: str, ways: tuple[str, ...], checked: dict[str, Checked]) -> dict[str, Any]:
        return {"errors": checked[name].errors}


def form_of(implementation: Implementation) -> str:
    return PEER_FORM if implementation.peer else implementation.name.split()[-1]


def compare(before: Shard, after: Shard, form: str) -> dict[str, float]:
    """Relative errors of the master's change, the weight and the moments at both ends of the shard."""
    size = before.master.numel()
    ends = [slice(0, min(CHECKED, size)), slice(max(0, size - CHECKED) // BLOCK * BLOCK, size)]
    errors: dict[str, list[float]] = {}
    for end in ends:
        start = before.master[end].double()
        gradient = before.gradient[end].double()
        exact, *exact_moments = _formula(start, *_values(before.moments[form], end), gradient)
        pairs = {
            "change": (after.master[end].double() - start, exact - start),
            "weight": (after.weight[end].double(), exact),
        }
        stored = _values(after.moments[form], end)
        pairs |= dict(zip(("exp_avg", "exp_avg_sq"), zip(stored, exact_moments, strict=True), strict=True))
        for name, (got, truth) in pairs.items():
            errors.setdefault(name, []).append(accuracy.relative(got, truth))
    # max() may lose a NaN.
    return {name: math.nan if any(map(math.isnan, found)) else max(found) for name, found in errors.items()}


def _values(moments: Moments, part: slice) -> list[Tensor]:
    """Both moments of a slice in float64; it starts at a block."""
    if not isinstance(moments[0], Float8State):
        return [moment[part].double() for moment in moments]
    blocks = slice(part.start // BLOCK, -(-part.stop // BLOCK))
    cut = [Float8State(moment.values[part], moment.scales[blocks]) for moment in moments]
    return [exp_avg_of(cut[0]).double(), exp_avg_sq_of(cut[1]).double()]


OPERATIONS = (Step(name="adamw_step", sizes=SIZES, make=make_shard, ours=_ours, peer=_torchs, compiled=_in_place),)
