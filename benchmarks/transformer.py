"""Whole transformers before and after `fuse_transformer`, part by part.

    forward     SD3.5-M's forward pass without gradient: time of each variant, and how many times the peers' it is
    training    its forward and backward pass, with and without gradient checkpointing: time and peak memory
    breakdown   GPU time by kind of kernel, of both passes; of FLUX's blocks too, at half the batch
    accuracy    output and gradients in bfloat16 against float32, and the losses of some optimizer steps
    fp8         the error of FP8's velocity, and of the difference of two networks that nearly agree
    flux        forward and training of a transformer of FLUX's blocks

Nothing is timed whose output or gradients lie far from those of the stock module in the same run; how far, to the
digit, is what the part "accuracy" is for.
"""

from __future__ import annotations

import copy
import gc
import math
import re
import statistics
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gpu_time
import networks
import timing
import torch
from networks import PEERS, VARIANTS, Inputs
from torch import Tensor, nn

PARTS = ("forward", "training", "breakdown", "accuracy", "fp8", "flux")
DTYPE = torch.bfloat16
BATCHES = {"forward": (4, 8), "training": (4,), "breakdown": (4,), "accuracy": (1,), "fp8": (4,), "flux": (1, 2)}

WARMUP = 3
ROUNDS = 2
SECONDS = 1.5  # for one variant in one round
FEWEST_CALLS = 3
# How far, in relative norm, a variant may be from the stock module in bfloat16 for its time to count. The two in
# bfloat16 are each some 1 to 3 % from float32 after all blocks.
LIMITS = {"eager": 0.1, "compiled": 0.1, "fused": 0.1, "fused_selective": 0.1, "fused_fp8": 0.3}
PASSES_OF = {"fused_fp8": ("forward",), "fused_selective": ("checkpointing",)}  # the others are for all
SAMPLED = 8  # the gradients of every 8th parameter are compared before timing

DRAWS = 3  # of inputs, over which squared errors are summed: some gradients of one sample are one vector's
STEPS = 20
LEARNING_RATE = 1e-5
DIFFERENCES = (0.01, 0.05, 0.2)  # of a critic's velocity from its teacher's

Call = Callable[[], dict[str, float]]  # seconds of the whole and of its parts


@dataclass(frozen=True)
class State:
    """What every part gets."""

    run: Any  # run.py's: the device, and lists of rows, failures and what was left out
    size: str  # of networks.NETWORKS
    chosen_batches: tuple[int, ...] | None
    chosen_variants: tuple[str, ...] | None
    note: Callable[[dict[str, Any]], None]  # called after every row, which may be the last before the run is cut off

    @property
    def device(self) -> torch.device:
        return self.run.device

    def network(self, name: str) -> networks.Network:
        return networks.NETWORKS[self.size][name]

    def batches(self, part: str) -> tuple[int, ...]:
        return self.chosen_batches or BATCHES[part]

    def variants(self, which: str) -> list[str]:
        """Those that are for this pass and are wanted: for a CPU nothing is compiled unless asked for."""
        default = [variant for variant in VARIANTS if variant != "compiled" or self.device.type == "cuda"]
        wanted = self.chosen_variants or default
        return [variant for variant in VARIANTS if variant in wanted and which in PASSES_OF.get(variant, (which,))]

    def add(self, **row: Any) -> None:
        self.run.transformer.append(row)
        self.note(row)


def run_part(state: State, part: str) -> None:
    torch.backends.cudnn.allow_tf32 = False  # the float32 reference would be none; matrix products have no TF32 anyway
    for batch in state.batches(part):
        try:
            RUNS[part](state, batch)
        except Exception as error:  # the other parts should not go with it
            traceback.print_exc()
            state.run.failures.append(f"transformer, {part}, batch {batch}: {_said(error)}")
        _free()


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _free() -> None:
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


# The passes


def _forward_pass(model: nn.Module, inputs: Inputs, upstream: Tensor) -> Call:
    def call() -> dict[str, float]:
        with torch.no_grad():
            begin = _now()
            model(**inputs)
            return {"forward": _now() - begin}

    return call


def _training_pass(model: nn.Module, inputs: Inputs, upstream: Tensor) -> Call:
    """Gradients are made anew, not added to. Waiting for the GPU between forward and backward costs the host's lead,
    some 0.1 ms."""

    def call() -> dict[str, float]:
        model.zero_grad(set_to_none=True)
        begin = _now()
        (output,) = model(**inputs)
        middle = _now()
        output.backward(upstream)
        end = _now()
        return {"training": end - begin, "training_forward": middle - begin, "training_backward": end - middle}

    return call


def _now() -> float:
    timing.synchronize()
    return time.perf_counter()


PASSES = {"forward": _forward_pass, "training": _training_pass}


# forward, training, flux


def _forward(state: State, batch: int) -> None:
    model = networks.build(state.network("sd35"), state.device, DTYPE)
    _time(state, "forward", "sd35", model, "forward", batch)


def _training(state: State, batch: int) -> None:
    model = networks.build(state.network("sd35"), state.device, DTYPE)
    for checkpointing in (False, True):
        _time(state, "training", "sd35", model, "training", batch, checkpointing)


def _flux(state: State, batch: int) -> None:
    model = networks.build(state.network("flux"), state.device, DTYPE)
    for which in PASSES:
        _time(state, "flux", "flux", model, which, batch)


def _time(
    state: State,
    part: str,
    name: str,
    model: nn.Module,
    which: str,
    batch: int,
    checkpointing: bool = False,
) -> None:
    """Every variant in turn, in two rounds; the first round also checks, and measures memory."""
    variants = state.variants("checkpointing" if checkpointing else which)
    inputs, upstream = networks.make_inputs(state.network(name), batch, state.device, DTYPE)
    title = f"{name} {which} b{batch}{' checkpointing' if checkpointing else ''}"
    call = PASSES[which](model, inputs, upstream)
    stock = _stock(model, which, inputs, upstream)
    (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
    facts: dict[str, dict[str, Any]] = {}
    seconds: dict[str, list[list[dict[str, float]]]] = {variant: [] for variant in variants}
    for variant in ROUNDS * variants:
        if seconds[variant] and variant not in facts:
            continue
        try:
            with networks.as_variant(model, variant):
                if variant in facts:
                    call()  # what the switch undid is made again: FP8 weights
                else:
                    facts[variant] = _prepare(state, variant, model, which, inputs, upstream, stock)
                seconds[variant].append(_repeated(call))
        except Exception as error:  # whatever it is (memory, a compiler), the other variants should not go with it
            facts.pop(variant, None)
            seconds[variant].append([])
            _note_problem(state, f"{title}, {variant}", variant, error)
        else:
            median = statistics.median(each[which] for each in seconds[variant][-1])
            print(f"  {title}, {variant}: {1e3 * median:.2f} ms", file=sys.stderr, flush=True)
        model.zero_grad(set_to_none=True)
        _free()
    times = {variant: _times(seconds[variant]) for variant in facts}
    for variant in facts:
        state.add(
            part=part,
            operation="transformer",
            size=title,
            implementation=variant,
            peer=variant in PEERS,
            times={way: taken.json() for way, taken in times[variant].items()},
            ratios=timing.ratios(
                times[variant], {peer: times[peer] for peer in facts if peer in PEERS and peer != variant}
            ),
            **facts[variant],
        )


def _note_problem(state: State, title: str, variant: str, error: Exception) -> None:
    no_fault = variant in PEERS or isinstance(error, torch.OutOfMemoryError)
    (state.run.left_out if no_fault else state.run.failures).append(f"{title}: {_said(error)}")
    print(f"  {title}: {_said(error)}", file=sys.stderr, flush=True)


def _times(rounds: list[list[dict[str, float]]]) -> dict[str, timing.Time]:
    return {way: timing.summary([[call[way] for call in calls] for calls in rounds]) for way in rounds[0][0]}


def _prepare(
    state: State, variant: str, model: nn.Module, which: str, inputs: Inputs, upstream: Tensor, stock: list[Tensor]
) -> dict[str, Any]:
    """Warms a variant up, checks it against the stock module and measures its memory. RuntimeError where it is wrong."""
    call = PASSES[which](model, inputs, upstream)
    begin, before, graphs = time.perf_counter(), _allocated(state), networks.graphs_and_breaks()
    for _ in range(WARMUP):
        call()
    facts: dict[str, Any] = {"warmup_seconds": time.perf_counter() - begin}
    graphs = [now - then for now, then in zip(networks.graphs_and_breaks(), graphs, strict=True)]
    model.zero_grad(set_to_none=True)
    if variant == "fused_fp8":
        facts["weights_bytes"] = _allocated(state) - before
    if variant == "compiled":
        facts["graphs"], facts["graph_breaks"] = graphs
    facts["difference"] = _difference(variant, _results(model, which, inputs, upstream), stock)
    return facts | _memory(state, model, which, inputs, upstream)


def _difference(variant: str, got: list[Tensor], stock: list[Tensor]) -> float:
    """Of the output or of the gradients from the stock module's, the larger. RuntimeError where it is too large."""
    difference = max(_relative(got[:1], stock[:1]), _relative(got[1:], stock[1:]))
    if not difference <= LIMITS[variant]:  # NaN must not pass
        raise RuntimeError(f"its results are {difference:.1e} from the stock module's, allowed {LIMITS[variant]:.0e}")
    return difference


def _stock(model: nn.Module, which: str, inputs: Inputs, upstream: Tensor) -> list[Tensor]:
    model.enable_gradient_checkpointing()  # so that it fits where the pass to be measured does
    try:
        with networks.as_variant(model, "eager"):
            return _results(model, which, inputs, upstream)
    finally:
        model.disable_gradient_checkpointing()


def _results(model: nn.Module, which: str, inputs: Inputs, upstream: Tensor) -> list[Tensor]:
    """The output and, of a training pass, some of the gradients."""
    if which == "forward":
        with torch.no_grad():
            return [model(**inputs)[0]]
    model.zero_grad(set_to_none=True)
    (output,) = model(**inputs)
    output.backward(upstream)
    gradients = [parameter.grad.clone() for parameter in list(model.parameters())[::SAMPLED]]
    model.zero_grad(set_to_none=True)
    return [output.detach(), *gradients]


def _relative(got: list[Tensor], exact: list[Tensor]) -> float:
    """In norm, all together; 0 of nothing."""
    square = sum((a.float() - b.float()).square().sum().item() for a, b in zip(got, exact, strict=True))
    return math.sqrt(square / sum(b.float().square().sum().item() for b in exact)) if exact else 0.0


def _repeated(call: Call) -> list[dict[str, float]]:
    taken, end = [], time.perf_counter() + SECONDS
    while len(taken) < FEWEST_CALLS or time.perf_counter() < end:
        taken.append(call())
    return taken


def _allocated(state: State) -> int:
    return torch.cuda.memory_allocated() if state.device.type == "cuda" else 0


def _memory(state: State, model: nn.Module, which: str, inputs: Inputs, upstream: Tensor) -> dict[str, int]:
    """Bytes beside the parameters and inputs: at the peak, gradients included, and between forward and backward."""
    if state.device.type != "cuda":
        return {}
    model.zero_grad(set_to_none=True)
    _free()
    torch.cuda.reset_peak_memory_stats()
    before, kept = torch.cuda.memory_allocated(), {}
    with torch.set_grad_enabled(which == "training"):
        output = model(**inputs)[0]
    if which == "training":
        kept = {"kept_bytes": torch.cuda.memory_allocated() - before}
        output.backward(upstream)
    torch.cuda.synchronize()
    return {**kept, "peak_bytes": torch.cuda.max_memory_allocated() - before}


# breakdown


def _breakdown(state: State, batch: int) -> None:
    if state.device.type != "cuda":
        state.run.left_out.append("transformer, breakdown: there is no GPU whose time could be broken down")
        return
    _break_down(state, "sd35", batch)
    _free()
    _break_down(state, "flux", max(1, batch // 2))


def _break_down(state: State, name: str, batch: int) -> None:
    model = networks.build(state.network(name), state.device, DTYPE)
    inputs, upstream = networks.make_inputs(state.network(name), batch, state.device, DTYPE)
    for which in PASSES:
        call = PASSES[which](model, inputs, upstream)
        title = f"{name} {which} b{batch}"
        stock = _stock(model, which, inputs, upstream)
        for variant in state.variants(which):
            try:
                with networks.as_variant(model, variant):
                    for _ in range(WARMUP):
                        call()
                    _difference(variant, _results(model, which, inputs, upstream), stock)
                    wall = statistics.median(each[which] for each in _repeated(call))
                    kernels = gpu_time.record(call)
            except Exception as error:
                _note_problem(state, f"breakdown of {title}, {variant}", variant, error)
                continue
            finally:
                model.zero_grad(set_to_none=True)
                _free()
            state.add(
                part="breakdown",
                operation="transformer",
                size=title,
                implementation=variant,
                wall_ms=1e3 * wall,
                **gpu_time.by_kind(kernels, 1e6 * wall),
            )


# accuracy

COMPARED = ("eager", "fused")
RATIO_LIMIT = 1.25  # of fused to eager
Squares = tuple[float, float]  # of the difference from the exact tensor, and of the exact tensor


def _loss(model: nn.Module, inputs: Inputs, target: Tensor) -> tuple[Tensor, Tensor]:
    """A regression on one fixed batch, and the output."""
    (output,) = model(**inputs)
    return (output.float() - target.float()).square().mean(), output.detach()


def _accuracy(state: State, batch: int) -> None:
    network = state.network("sd35")
    model = networks.build(network, state.device, DTYPE)
    model.enable_gradient_checkpointing()  # float32 with all activations would not fit
    squares: dict[str, dict[str, list[Squares]]] = {variant: defaultdict(list) for variant in COMPARED}
    for draw in range(DRAWS):
        inputs, target = networks.make_inputs(network, batch, state.device, DTYPE, seed=10 + draw)
        exact_output, exact = _gradients(copy.deepcopy(model).float(), networks.in_float32(inputs), target)
        for variant in COMPARED:
            with networks.as_variant(model, variant):
                output, gradients = _gradients(model, inputs, target)
            squares[variant]["output"].append(_squares(output, exact_output))
            for name in exact:
                squares[variant][name].append(_squares(gradients[name], exact[name]))
            del output, gradients
            _free()
        del exact
        _free()
    _add_errors(state, batch, squares)
    _add_steps(state, batch, model, inputs, target)


def _gradients(model: nn.Module, inputs: Inputs, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss, output = _loss(model, inputs, target)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return output, gradients


def _squares(got: Tensor, exact: Tensor) -> Squares:
    return (got.float() - exact).square().sum().item(), exact.square().sum().item()


def group_of(name: str) -> str:
    """A parameter's name without the number of its block."""
    return re.sub(r"\.\d+\.", ".*.", name, count=1)


def _add_errors(state: State, batch: int, squares: dict[str, dict[str, list[Squares]]]) -> None:
    """Relative errors of the output, of all gradients as one vector, and of each group of parameters."""
    parameters = [name for name in squares["eager"] if name != "output"]
    groups = defaultdict(list)
    for name in parameters:
        groups[group_of(name)].append(name)
    single = {name: _compared(squares, [name])["ratio"] for name in parameters}
    worst = max(single, key=single.get)
    for group, names in {"output": ["output"], "all gradients": parameters, **groups}.items():
        counted = {} if group == "output" else {"parameters": len(names)}
        state.add(part="accuracy", group=group, batch=batch, draws=DRAWS, **counted, **_compared(squares, names))
    state.add(
        part="accuracy of single parameters",
        batch=batch,
        parameters=len(single),
        median_ratio=statistics.median(single.values()),
        worst_ratio=single[worst],
        worst_parameter=worst,
        limit=RATIO_LIMIT,
        above_limit={name: ratio for name, ratio in single.items() if not ratio <= RATIO_LIMIT},
    )


def _compared(squares: dict[str, dict[str, list[Squares]]], names: list[str]) -> dict[str, Any]:
    errors = {}
    for variant, by_name in squares.items():
        difference, exact = (
            sum(each) for each in zip(*(pair for name in names for pair in by_name[name]), strict=True)
        )
        # What the last block's text asks for is dropped: the gradient of its queries is 0, and should be.
        errors[variant] = math.sqrt(difference / exact) if exact else math.inf if difference else 0.0
    eager, fused = (errors[variant] for variant in COMPARED)
    return {"errors": errors, "ratio": fused / eager if eager else math.inf if fused else 1.0}


def _add_steps(state: State, batch: int, model: nn.Module, inputs: Inputs, target: Tensor) -> None:
    """Losses of AdamW's steps from the same start. Weights are kept in float32, as the trainer keeps them: bfloat16 ones
    would lose updates of this size."""
    losses = {"float32": _losses(copy.deepcopy(model).float(), networks.in_float32(inputs), target)}
    _free()
    for variant in COMPARED:
        trained = copy.deepcopy(model)
        with networks.as_variant(trained, variant):
            losses[variant] = _losses(trained, inputs, target)
        del trained
        _free()
    deviation = {
        variant: max(abs(a - b) / b for a, b in zip(losses[variant], losses["float32"], strict=True))
        for variant in COMPARED
    }
    state.add(part="steps", batch=batch, learning_rate=LEARNING_RATE, losses=losses, deviation=deviation)


def _losses(model: nn.Module, inputs: Inputs, target: Tensor) -> list[float]:
    parameters = list(model.parameters())
    # clone(): of a model in float32 a master weight would be the parameter itself
    masters = [parameter.detach().float().clone().requires_grad_() for parameter in parameters]
    fused = parameters[0].is_cuda  # the other form makes temporary tensors of the size of all weights
    optimizer = torch.optim.AdamW(masters, lr=LEARNING_RATE, weight_decay=0.0, fused=fused)
    losses = []
    for _ in range(STEPS):
        model.zero_grad(set_to_none=True)
        loss, _ = _loss(model, inputs, target)
        loss.backward()
        losses.append(loss.item())
        for master, parameter in zip(masters, parameters, strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, parameters, strict=True):
                parameter.copy_(master)
        optimizer.zero_grad()
    return losses


# fp8


def _fp8(state: State, batch: int) -> None:
    """Two networks, a teacher and a critic: its weights with noise in them, so much that its velocity differs by about so
    much. What DMD's gradient is made of is the difference, and so is what its error counts against."""
    teacher = networks.build(state.network("sd35"), state.device, DTYPE)
    inputs, _ = networks.make_inputs(state.network("sd35"), batch, state.device, DTYPE)
    exact = _velocity(copy.deepcopy(teacher).float(), networks.in_float32(inputs))
    variants = ("eager", "fused", "fused_fp8")
    velocities = {variant: _velocity(teacher, inputs, variant) for variant in variants}
    errors = {variant: _relative([velocity], [exact]) for variant, velocity in velocities.items()}
    strength = 0.01
    for wanted in DIFFERENCES:
        for _ in range(4):  # the difference grows nearly in proportion, so this converges at once
            critic = _perturbed(teacher, strength)
            exact_critic = _velocity(copy.deepcopy(critic).float(), networks.in_float32(inputs))
            difference = _relative([exact_critic], [exact])
            if abs(difference / wanted - 1) < 0.05:
                break
            strength *= wanted / difference
        differences = {variant: _velocity(critic, inputs, variant) - velocities[variant] for variant in variants}
        state.add(
            part="fp8",
            batch=batch,
            difference=difference,
            velocity_errors=errors,
            difference_errors={
                variant: _relative([each], [exact_critic - exact]) for variant, each in differences.items()
            },
        )
        del critic
        _free()


def _velocity(model: nn.Module, inputs: Inputs, variant: str = "eager") -> Tensor:
    with networks.as_variant(model, variant), torch.no_grad():
        return model(**inputs)[0].float()


def _perturbed(model: nn.Module, strength: float) -> nn.Module:
    """A copy, every weight with noise of `strength` times the spread of its tensor, rounded as the weights are."""
    model = copy.deepcopy(model)
    for index, parameter in enumerate(model.parameters()):
        generator = torch.Generator(parameter.device).manual_seed(index)
        noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
        parameter.data = (parameter.float() + strength * parameter.float().std() * noise).to(parameter.dtype).detach()
    return model


RUNS = {
    "forward": _forward,
    "training": _training,
    "breakdown": _breakdown,
    "accuracy": _accuracy,
    "fp8": _fp8,
    "flux": _flux,
}
