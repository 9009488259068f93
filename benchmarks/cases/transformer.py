"""Whole transformers before and after `fuse_transformer`, part by part.

    forward     SD3.5-M's forward pass without gradient: time of each variant, and the peers' times beside it
    training    its forward and backward pass, with and without gradient checkpointing: time and peak memory
    breakdown   GPU time of both passes by kind of kernel; also for FLUX's blocks, at half the batch
    accuracy    output and gradients in bfloat16 against float32, and the losses of some optimizer steps
    fp8         FP8's error of the velocity, and of the difference of two networks that nearly agree
    flux        forward and training of a transformer of FLUX's blocks

A variant is timed only if its output and gradients are close to the stock module's; the part "accuracy" gives exact errors.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import re
import statistics
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from harness import accuracy, profile, timing
from harness.accuracy import Error
from harness.operation import DTYPE, Checked, Implementation, Operation, Run, Times, gate, measure
from torch import Tensor, nn

from cases import networks
from cases.networks import PEERS, VARIANTS, Inputs

PARTS = ("forward", "training", "breakdown", "accuracy", "fp8", "flux")
BATCHES = {"forward": (4, 8), "training": (4,), "breakdown": (4,), "accuracy": (1,), "fp8": (4,), "flux": (1, 2)}

WARMUP = 3
SECONDS = 1.5  # for one variant in one round
# Largest relative difference from the stock module in bfloat16 that is timed. Both are 1 to 3 % from float32 after all blocks.
LIMITS = {"eager": 0.1, "compiled": 0.1, "fused": 0.1, "fused_selective": 0.1, "fused_fp8": 0.3}
PASSES_OF = {"fused_fp8": ("forward",), "fused_selective": ("checkpointing",)}  # the other variants run all
SAMPLED = 8  # gradients of every 8th parameter are compared before timing

DRAWS = 3  # of inputs, over which squared errors are summed: at one sample some gradients stem from one vector
STEPS = 20
LEARNING_RATE = 1e-5
DIFFERENCES = (0.01, 0.05, 0.2)  # of a critic's velocity from its teacher's

Call = Callable[[], dict[str, float]]  # returns the seconds of the whole and of its parts


@dataclass(frozen=True)
class State:
    """The options that every part gets."""

    run: Run
    size: str  # of networks.NETWORKS
    chosen_batches: Sequence[int] | None
    chosen_variants: Sequence[str] | None

    @property
    def device(self) -> torch.device:
        return self.run.device

    def network(self, name: str) -> networks.Network:
        return networks.NETWORKS[self.size][name]

    def build(self, name: str) -> nn.Module:
        return networks.build(self.network(name), self.device, DTYPE)

    def variants(self, which: str) -> list[str]:
        """The chosen variants of this pass; by default all, on a CPU without the compiled one."""
        default = [variant for variant in VARIANTS if variant != "compiled" or self.device.type == "cuda"]
        wanted = self.chosen_variants or default
        return [variant for variant in VARIANTS if variant in wanted and which in PASSES_OF.get(variant, (which,))]

    def add(self, **row: Any) -> None:
        self.run.add("transformer", row)


def run_part(state: State, part: str) -> None:
    torch.backends.cudnn.allow_tf32 = False  # keeps the float32 reference exact; matmuls use no TF32 anyway
    for batch in state.chosen_batches or BATCHES[part]:
        try:
            RUNS[part](state, batch)
        except Exception as error:  # the other parts go on
            traceback.print_exc()
            state.run.failures.append(f"transformer, {part}, batch {batch}: {accuracy.said(error)}")
        _free()


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
    """A pass with fresh gradients. Waiting for the GPU between forward and backward costs the host's lead, about 0.1 ms."""

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
    _measure(state, whole_pass(state, "forward", state.build("sd35"), "sd35", "forward", batch))


def _training(state: State, batch: int) -> None:
    model = state.build("sd35")
    for checkpointing in (False, True):
        _measure(state, whole_pass(state, "training", model, "sd35", "training", batch, checkpointing))


def _flux(state: State, batch: int) -> None:
    model = state.build("flux")
    for which in PASSES:
        _measure(state, whole_pass(state, "flux", model, "flux", which, batch))


def _measure(state: State, operation: Pass) -> None:
    measure(state.run, operation, *operation.sizes)


def whole_pass(
    state: State, part: str, model: nn.Module, name: str, which: str, batch: int, checkpointing: bool = False
) -> Pass:
    """The operation: a pass of one network at one batch."""
    return Pass(
        name="transformer",
        sizes={f"{name} {which} b{batch}{' checkpointing' if checkpointing else ''}": batch},
        make=lambda batch, draw: networks.make_inputs(state.network(name), batch, draw.device, DTYPE),
        ours=PASSES[which],
        peer=PASSES[which],
        part=part,
        which=which,
        model=model,
        checkpointing=checkpointing,
        variants=tuple(state.variants("checkpointing" if checkpointing else which)),
    )


@dataclass(frozen=True, kw_only=True)
class Pass(Operation):
    """Variants of a network, which switch it in place. `ours` and `peer` make a call from model, inputs and upstream gradient;
    the truth is the stock module's result. Each call is timed: it is longer than the harness's batches."""

    part: str
    which: str  # of PASSES
    model: nn.Module
    checkpointing: bool
    variants: tuple[str, ...]

    table: ClassVar[str] = "transformer"
    poisoned: ClassVar[bool] = False  # it would select torch's deterministic kernels
    each_alone: ClassVar[bool] = True

    def title(self, size: str) -> str:
        return size

    def num_sets(self, inputs: Any, cache_bytes: int) -> int:
        return 1

    def implementations(self, run: Run, size: str) -> list[Implementation]:
        return [
            Implementation(variant, variant in PEERS, self.ours, lambda variant=variant: self._as_variant(variant))
            for variant in self.variants
        ]

    @contextlib.contextmanager
    def _as_variant(self, variant: str) -> Iterator[None]:
        try:
            with networks.as_variant(self.model, variant):
                yield
        finally:
            self.model.zero_grad(set_to_none=True)
            _free()

    def truth(self, inputs: Any) -> list[Tensor]:
        """Results of the stock module, checkpointed to fit in memory; then checkpointing is set for the timed pass."""
        self.model.enable_gradient_checkpointing()
        try:
            with self._as_variant("eager"):
                return _results(self.model, self.which, *inputs)
        finally:
            if not self.checkpointing:
                self.model.disable_gradient_checkpointing()

    def once(self, implementation: Implementation, inputs: Any) -> tuple[list[Tensor], dict[str, Any]]:
        """Warm a variant up. Returns its results and facts."""
        call = self.ours(self.model, *inputs)
        begin, before, graphs = time.perf_counter(), self._allocated(), networks.graphs_and_breaks()
        for _ in range(WARMUP):
            call()
        facts: dict[str, Any] = {"warmup_seconds": time.perf_counter() - begin}
        graphs = [now - then for now, then in zip(networks.graphs_and_breaks(), graphs, strict=True)]
        self.model.zero_grad(set_to_none=True)
        if implementation.name == "fused_fp8":
            facts["weights_bytes"] = self._allocated() - before
        if implementation.name == "compiled":
            facts["graphs"], facts["graph_breaks"] = graphs
        return _results(self.model, self.which, *inputs), facts | self._memory(*inputs)

    def errors(
        self, implementation: Implementation, inputs: Any, outcome: Any, truth: list[Tensor]
    ) -> dict[str, Error]:
        """The larger of the output's and the gradients' difference from the stock module."""
        got, _ = outcome
        apart = [accuracy.relative(got[:1], truth[:1]), accuracy.relative(got[1:], truth[1:])]
        larger = max(apart, key=lambda each: (math.isnan(each), each))
        return {"difference": Error(larger, LIMITS[implementation.name])}

    def problem(self, name: str, error: Error) -> str:
        return f"its results are {error.value:.1e} from the stock module's, allowed {error.limit:.0e}"

    def facts(self, implementation: Implementation, size: str, inputs: Any, outcome: Any, truth: Any) -> dict[str, Any]:
        return {"part": self.part, **outcome[1]}

    def work(self, implementation: Implementation, inputs: Any, outcome: Any) -> dict[str, float]:
        return {}

    def ways(self, device: torch.device) -> list[tuple[str, ...]]:
        return [(self.which,)]

    def subject(self, implementation: Implementation, way: str) -> timing.Subject:
        def prepare(inputs: Any) -> Call:
            call = self.ours(self.model, *inputs)
            call()  # makes the FP8 weights, which switching variants dropped
            return call

        return timing.Subject(lambda call: call(), implementation.context, prepare)

    def take(self, run: Run, title: str, found: list[Implementation], ways: tuple[str, ...], sets: list[Any]) -> Times:
        subjects = {each.name: self.subject(each, self.which) for each in found}
        times, reasons = timing.call_by_call(subjects, sets[0], SECONDS)
        for each in (each for each in found if each.name in reasons):
            run.went_wrong(f"{title}, {each.name}", each, reasons[each.name])
        return times

    def compared_with(self, implementation: Implementation, found: list[Implementation]) -> list[str]:
        return [each.name for each in found if each.peer and each is not implementation]

    def row(self, name: str, ways: tuple[str, ...], checked: dict[str, Checked]) -> dict[str, Any]:
        return checked[name].errors

    def rates(self, own: dict[str, timing.Time], work: dict[str, float], copy_tb_s: float) -> dict[str, Any]:
        return {}

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if _on_gpu(self.model) else 0

    def _memory(self, inputs: Inputs, upstream: Tensor) -> dict[str, int]:
        """Bytes beside parameters and inputs: at the peak (with gradients), and between forward and backward."""
        if not _on_gpu(self.model):
            return {}
        self.model.zero_grad(set_to_none=True)
        _free()
        torch.cuda.reset_peak_memory_stats()
        before, kept = torch.cuda.memory_allocated(), {}
        with torch.set_grad_enabled(self.which == "training"):
            output = self.model(**inputs)[0]
        if self.which == "training":
            kept = {"kept_bytes": torch.cuda.memory_allocated() - before}
            output.backward(upstream)
        torch.cuda.synchronize()
        return {**kept, "peak_bytes": torch.cuda.max_memory_allocated() - before}


def _on_gpu(model: nn.Module) -> bool:
    return next(model.parameters()).is_cuda


def _results(model: nn.Module, which: str, inputs: Inputs, upstream: Tensor) -> list[Tensor]:
    """The output; for a training pass also the gradients of every SAMPLED-th parameter."""
    if which == "forward":
        with torch.no_grad():
            return [model(**inputs)[0]]
    model.zero_grad(set_to_none=True)
    (output,) = model(**inputs)
    output.backward(upstream)
    gradients = [parameter.grad.clone() for parameter in list(model.parameters())[::SAMPLED]]
    model.zero_grad(set_to_none=True)
    return [output.detach(), *gradients]


# breakdown


def _breakdown(state: State, batch: int) -> None:
    if state.device.type != "cuda":
        state.run.left_out.append("transformer, breakdown: needs a GPU")
        return
    _break_down(state, "sd35", batch)
    _free()
    _break_down(state, "flux", max(1, batch // 2))


def _break_down(state: State, name: str, batch: int) -> None:
    model = state.build(name)
    for which in PASSES:
        operation = whole_pass(state, "breakdown", model, name, which, batch)
        (size,) = operation.sizes
        title = f"breakdown of {size}"
        inputs = operation.draw(size, state.device, 0)
        found = operation.implementations(state.run, size)
        checked = gate(state.run, operation, size, title, found, inputs)
        for each in (each for each in found if each.name in checked):
            subject = operation.subject(each, which)
            try:
                with subject.around():
                    call = subject.prepare(inputs)
                    wall = statistics.median(taken[which] for taken in timing.repeat(call, SECONDS))
                    kernels = profile.record(call)
            except Exception as error:  # the other variants go on
                state.run.went_wrong(f"{title}, {each.name}", each, error)
                continue
            state.add(
                part="breakdown",
                operation="transformer",
                size=size,
                implementation=each.name,
                wall_ms=1e3 * wall,
                **profile.by_kind(kernels, 1e6 * wall),
            )


# accuracy

COMPARED = ("eager", "fused")
RATIO_LIMIT = 1.25  # of fused's error to eager's; parameters above it are listed
Squares = tuple[float, float]  # squared norms of the difference from the exact tensor, and of the exact tensor


def _loss(model: nn.Module, inputs: Inputs, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error against the target, and the output."""
    (output,) = model(**inputs)
    return (output.float() - target.float()).square().mean(), output.detach()


def _accuracy(state: State, batch: int) -> None:
    network = state.network("sd35")
    model = state.build("sd35")
    model.enable_gradient_checkpointing()  # float32 with all activations would not fit
    squares: dict[str, dict[str, list[Squares]]] = {variant: defaultdict(list) for variant in COMPARED}
    for draw in range(DRAWS):
        inputs, target = networks.make_inputs(network, batch, state.device, DTYPE, seed=10 + draw)
        exact_output, exact = _gradients(copy.deepcopy(model).float(), networks.in_float32(inputs), target)
        for variant in COMPARED:
            with networks.as_variant(model, variant):
                output, gradients = _gradients(model, inputs, target)
            squares[variant]["output"].append(accuracy.squared(output, exact_output))
            for name in exact:
                squares[variant][name].append(accuracy.squared(gradients[name], exact[name]))
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


def group_of(name: str) -> str:
    """A parameter's name without the number of its block."""
    return re.sub(r"\.\d+\.", ".*.", name, count=1)


def _add_errors(state: State, batch: int, squares: dict[str, dict[str, list[Squares]]]) -> None:
    """Add relative errors of the output, of all gradients as one vector, and of each group of parameters."""
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
        # The last block drops its text output: the gradient of the text's queries is rightly 0.
        errors[variant] = accuracy.root(difference, exact)
    eager, fused = (errors[variant] for variant in COMPARED)
    return {"errors": errors, "ratio": fused / eager if eager else math.inf if fused else 1.0}


def _add_steps(state: State, batch: int, model: nn.Module, inputs: Inputs, target: Tensor) -> None:
    """Add the losses of AdamW's steps from the same start, with float32 masters: bfloat16 would lose such small updates."""
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
    # clone(): float() returns a float32 parameter itself
    masters = [parameter.detach().float().clone().requires_grad_() for parameter in parameters]
    fused = parameters[0].is_cuda  # unfused AdamW makes temporary tensors of the size of all weights
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
    """Errors of the velocity of a teacher, and of its difference from a critic's, which DMD's gradient is made of. The critic
    is the teacher with noise in its weights, scaled until the velocities differ by about each of DIFFERENCES."""
    teacher = state.build("sd35")
    inputs, _ = networks.make_inputs(state.network("sd35"), batch, state.device, DTYPE)
    exact = _velocity(copy.deepcopy(teacher).float(), networks.in_float32(inputs))
    variants = ("eager", "fused", "fused_fp8")
    velocities = {variant: _velocity(teacher, inputs, variant) for variant in variants}
    errors = {variant: accuracy.relative(velocity, exact) for variant, velocity in velocities.items()}
    strength = 0.01
    for wanted in DIFFERENCES:
        for _ in range(4):  # converges at once: the difference is nearly proportional to the strength
            critic = _perturbed(teacher, strength)
            exact_critic = _velocity(copy.deepcopy(critic).float(), networks.in_float32(inputs))
            difference = accuracy.relative(exact_critic, exact)
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
                variant: accuracy.relative(each, exact_critic - exact) for variant, each in differences.items()
            },
        )
        del critic
        _free()


def _velocity(model: nn.Module, inputs: Inputs, variant: str = "eager") -> Tensor:
    with networks.as_variant(model, variant), torch.no_grad():
        return model(**inputs)[0].float()


def _perturbed(model: nn.Module, strength: float) -> nn.Module:
    """A copy with noise in each weight: `strength` times the tensor's standard deviation, in the weights' dtype."""
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
