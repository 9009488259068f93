"""AdamW's step on a flat shard: ours with each form of the moments, torch's fused AdamW, torch.compile of the formula.

    read     master 4, exp_avg, exp_avg_sq 4 or 2 or 1 each, gradient 2     bytes a parameter
    written  master 4, exp_avg, exp_avg_sq, weight 2

so 28 with float32 moments, 20 with bfloat16 ones, 16.06 with 8-bit ones and their scales. (A float32 gradient makes 2 more.)
torch's fused AdamW wants a gradient in float32 and knows of no weight: it is timed with the conversion before it and the
copy after it, as trainers do it.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import accuracy
import timing
import torch
from torch import Tensor

from dpdmd.kernels import Float8State, Philox, adamw_step, use_backend
from dpdmd.kernels.optim.adamw import BLOCK, exp_avg_of, exp_avg_sq_of

DTYPE = torch.bfloat16  # of gradient and weight
SIZES = {
    "16m": 2**24,  # parameters; 22 bytes of each hold a set of inputs with all forms of the moments
    "256m": 2**28,
    "awkward": 100_003,  # no whole number of blocks
}
CPU_SIZES = ("awkward",)
FORMS = ("float32", "bfloat16", "float8")
PEER_FORM = "float32"
LR, BETAS, EPS, WEIGHT_DECAY = 1e-4, (0.9, 0.999), 1e-8, 0.01
STEP = 2
KEY = Philox(20260203)
CHECKED = 2**20  # elements at either end that are compared with float64: none depends on another
# Relative errors: of the master's change, which its rounding allows 1e-5; of a copy in bfloat16; of the moments as stored.
CHANGE_LIMIT = 1e-3
MOMENT_LIMITS = {"float32": 1e-6, "bfloat16": 2**-7, "float8": 2**-3}

Moments = tuple[Tensor, Tensor] | tuple[Float8State, Float8State]


@dataclass(frozen=True)
class Shard:
    """What a step works on, in place."""

    master: Tensor
    gradient: Tensor
    weight: Tensor
    moments: dict[str, Moments]  # by form

    def bytes(self, form: str) -> int:
        """The fewest that any implementation can do with."""
        kept = [self.master, *(part for moment in self.moments[form] for part in _parts(moment))]
        return 2 * sum(each.nbytes for each in kept) + self.gradient.nbytes + self.weight.nbytes

    def copy(self, form: str) -> Shard:
        moments = tuple(
            Float8State(*(part.clone() for part in _parts(moment)))
            if isinstance(moment, Float8State)
            else moment.clone()
            for moment in self.moments[form]
        )
        # A weight that nothing writes shows.
        return Shard(self.master.clone(), self.gradient, torch.full_like(self.weight, math.nan), {form: moments})


def _parts(moment: Tensor | Float8State) -> list[Tensor]:
    return [moment.values, moment.scales] if isinstance(moment, Float8State) else [moment]


@dataclass(frozen=True)
class Implementation:
    name: str
    peer: bool
    form: str
    prepare: Callable[[Shard], Callable[[], None]]  # what one step on a shard is
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


def make_shard(size: int, device: torch.device, seed: int) -> Shard:
    """Random masters and gradients, and the moments after one step."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(scale: float) -> Tensor:
        return torch.randn(size, generator=generator, device=device).mul_(scale)

    master, before, moments = randn(0.02), randn(1e-3).to(DTYPE), {}
    for form in FORMS:
        if form == "float8":
            moments[form] = Float8State.zeros(size, device), Float8State.zeros(size, device)
        else:
            moments[form] = tuple(torch.zeros(size, dtype=getattr(torch, form), device=device) for _ in range(2))
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


def _prepare_torchs(shard: Shard) -> Callable[[], None]:
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


def implementations(run) -> list[Implementation]:
    """Ours first, a form after the other, then the peers. run: what run.py keeps."""
    found = []
    for name in [name for name in run.ours if name != "cuda"] or ["reference"]:
        for form in FORMS:

            def prepare(shard: Shard, form: str = form) -> Callable[[], None]:
                return lambda: _ours(shard, form)

            found.append(Implementation(f"{name} {form}", False, form, prepare, lambda name=name: use_backend(name)))
    if run.peers is None or "eager" in run.peers:
        found.append(Implementation("eager", True, PEER_FORM, _prepare_torchs))
    if "compile" in run.peers if run.peers is not None else run.device.type == "cuda":
        torch._dynamo.reset()
        compiled = torch.compile(_in_place, dynamic=False)

        def prepare_compiled(shard: Shard) -> Callable[[], None]:
            tensors = shard.master, *shard.moments[PEER_FORM], shard.gradient, shard.weight
            return lambda: compiled(*tensors)

        found.append(Implementation("compile", True, PEER_FORM, prepare_compiled, torch.no_grad))
    return found


def run_size(run, size: str) -> None:
    """Every implementation at one size: checked, then timed. run: what run.py keeps."""
    try:
        shard = make_shard(SIZES[size], run.device, 0)
        count = max(2, math.ceil((2 * timing.cache_bytes(run.device) + 1) / shard.bytes("float8")))
        sets = [shard, *(make_shard(SIZES[size], run.device, seed) for seed in range(1, count))]
    except torch.OutOfMemoryError as error:
        run.left_out.append(f"adamw_step {size}: {_first_line(error)}")
        return
    found = implementations(run)
    errors, wrong = check_all(run, size, found, shard)
    if wrong:
        run.failures += wrong
        return
    found = [each for each in found if each.name in errors]
    subjects = {each.name: _subject(each) for each in found}
    times = {"step": timing.in_turns(subjects, sets)}
    if run.device.type == "cuda":
        times["gpu_step"], reasons = timing.on_gpu_in_turns(subjects, sets)
        run.left_out += [f"adamw_step {size}, {name}, GPU time alone: {reason}" for name, reason in reasons.items()]
    run.optimizer += make_rows(run, size, found, shard, errors, times)


def _subject(implementation: Implementation) -> timing.Subject:
    return timing.Subject(lambda step: step(), implementation.context, implementation.prepare)


def check_all(
    run, size: str, found: list[Implementation], shard: Shard
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """The errors of each against float64 of the same inputs, and what is wrong. A peer that cannot run here is left out."""
    errors: dict[str, dict[str, float]] = {}
    wrong: list[str] = []
    for each in found:
        title = f"adamw_step {size}, {each.name}"
        begin, mine = time.perf_counter(), shard.copy(each.form)
        try:
            with each.context(), contextlib.nullcontext() if each.peer else accuracy.poisoned_memory():
                each.prepare(mine)()
        except Exception as error:  # whatever it is, the other figures should not go with it
            (run.left_out if each.peer else wrong).append(f"{title}: {type(error).__name__}: {_first_line(error)}")
            continue
        finally:
            if each.name == "compile":
                run.compile_seconds += time.perf_counter() - begin
        errors[each.name] = compare(shard, mine, each.form)
        limits = {"change": CHANGE_LIMIT, "weight": accuracy.RESULT_LIMIT}
        for name, error in errors[each.name].items():
            limit = limits.get(name, MOMENT_LIMITS[each.form])
            if not error <= limit:  # NaN must not pass
                wrong.append(f"{title}: relative error of {name} {error:.1e}, allowed {limit:.1e}")
    return errors, wrong


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


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
            errors.setdefault(name, []).append(((got - truth).norm() / truth.norm()).item())
    # NaN is what max() may lose.
    return {name: math.nan if any(map(math.isnan, found)) else max(found) for name, found in errors.items()}


def _values(moments: Moments, part: slice) -> list[Tensor]:
    """Both moments of some elements, whole blocks from the first on, in float64."""
    if not isinstance(moments[0], Float8State):
        return [moment[part].double() for moment in moments]
    blocks = slice(part.start // BLOCK, -(-part.stop // BLOCK))
    cut = [Float8State(moment.values[part], moment.scales[blocks]) for moment in moments]
    return [exp_avg_of(cut[0]).double(), exp_avg_sq_of(cut[1]).double()]


def make_rows(
    run,
    size: str,
    found: list[Implementation],
    shard: Shard,
    errors: dict[str, dict[str, float]],
    times: dict[str, dict[str, timing.Time]],
) -> list[dict[str, Any]]:
    peers = [each.name for each in found if each.peer]
    return [
        {
            "operation": "adamw_step",
            "size": size,
            "implementation": each.name,
            "peer": each.peer,
            "form": each.form,
            "parameters": SIZES[size],
            "bytes": shard.bytes(each.form),
            "bytes_a_parameter": shard.bytes(each.form) / SIZES[size],
            "errors": errors[each.name],
            **timing.rates(each.name, times, shard.bytes(each.form), run.copy_tb_s, peers),
        }
        for each in found
    ]
