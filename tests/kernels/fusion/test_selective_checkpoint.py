"""Checkpoints that keep attention's outputs: what is computed twice, what once, and the same gradients as without."""

import copy
import functools
import sys
import warnings

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from dpdmd.kernels import attention, selective_checkpoint
from dpdmd.kernels.attention import choice, flash
from dpdmd.kernels.runtime import backend

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


class Block(nn.Module):
    """Takes and gives what blocks do: keywords, tensors in containers, others that are none, None."""

    def __init__(self, width=8, dropout=0.0):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.unused = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.calls = 0

    def forward(self, x, pair, *, power=2, options=None):
        self.calls += 1
        factor = pair[0] if options is None else options["factor"]
        hidden = self.dropout(torch.tanh(self.first(x)) ** power)
        return None, [self.second(hidden) * factor + pair[1], {"as it came": x, "rank": x.ndim}]


def make_block(**config):
    torch.manual_seed(0)
    return Block(**config).to(DEVICE)


def make_inputs():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 8, generator=generator).to(DEVICE).requires_grad_() for _ in range(3)]


def outputs_and_gradients(block, checkpoint=None, **kwargs):
    x, *pair = make_inputs()
    if checkpoint is None:
        nothing, (y, others) = block(x, tuple(pair), **kwargs)
    else:
        nothing, (y, others) = checkpoint(block, x, tuple(pair), **kwargs)
    assert nothing is None and others["rank"] == 2 and torch.equal(others["as it came"], x)
    block.zero_grad()
    (y.square().sum() + others["as it came"].sum()).backward()
    return y, [tensor.grad for tensor in (x, *pair, *block.parameters())]


def equal(got, expected):
    pairs = zip(got[1], expected[1], strict=True)
    return torch.equal(got[0], expected[0]) and all(
        mine is theirs if theirs is None else torch.equal(mine, theirs) for mine, theirs in pairs
    )


@pytest.mark.parametrize("options", [{}, {"power": 3}, {"options": {"factor": torch.full((8,), 2.0, device=DEVICE)}}])
def test_same_outputs_and_gradients(options):
    block = make_block()
    expected = outputs_and_gradients(block, **options)
    assert expected[1][-1] is None and sum(gradient is not None for gradient in expected[1]) >= 6
    assert equal(outputs_and_gradients(block, selective_checkpoint, **options), expected)
    assert block.calls == 3


def test_two_passes_add_up():
    block = make_block()
    (x, *pair), (x2, *pair2) = make_inputs(), make_inputs()
    for y in (selective_checkpoint(block, x, pair)[1][0], selective_checkpoint(block, x2, pair2)[1][0]):
        y.sum().backward()
    expected = make_block()
    for _ in range(2):
        expected(x.detach(), [each.detach() for each in pair])[1][0].sum().backward()
    for mine, theirs in zip(block.parameters(), expected.parameters(), strict=True):
        assert mine.grad is theirs.grad if theirs.grad is None else torch.equal(mine.grad, theirs.grad)


def test_grad_of_parameters_alone_and_twice():
    """torch.autograd.grad reaches the parameters, and a graph that is kept serves again."""
    block = make_block()
    x, *pair = (tensor.detach() for tensor in make_inputs())
    wanted = block.first.weight, block.second.bias
    expected = torch.autograd.grad(block(x, pair)[1][0].square().sum(), wanted)
    y = selective_checkpoint(block, x, pair)[1][0].square().sum()
    for again in (True, False):
        assert all(map(torch.equal, torch.autograd.grad(y, wanted, retain_graph=again), expected))
    assert all(parameter.grad is None for parameter in block.parameters())


def test_frozen_parameters():
    block = make_block().requires_grad_(False)
    expected = outputs_and_gradients(block)
    assert equal(outputs_and_gradients(block, selective_checkpoint), expected)
    block.second.bias.requires_grad_()
    assert equal(outputs_and_gradients(block, selective_checkpoint), outputs_and_gradients(block))


def test_nothing_to_do():
    """Without gradients it is a plain call."""
    block = make_block()
    x, *pair = make_inputs()
    with torch.no_grad():
        assert not selective_checkpoint(block, x, pair)[1][0].requires_grad
    block.requires_grad_(False)
    assert not selective_checkpoint(block, x.detach(), [each.detach() for each in pair])[1][0].requires_grad
    assert block.calls == 2


def test_outputs_that_are_not_differentiated():
    block = make_block()

    def run(x):
        return block.first(x), x.argmax(-1), block.second(x)

    x = make_inputs()[0]
    y, index, _ = selective_checkpoint(run, x, parameters=block.parameters())
    assert torch.equal(index, x.argmax(-1)) and not index.requires_grad
    y.sum().backward()
    assert block.second.weight.grad is None
    torch.testing.assert_close(x.grad, block.first.weight.sum(0).expand(3, 8))


def test_outputs_that_depend_on_nothing():
    x = make_inputs()[0]
    y = selective_checkpoint(lambda x: torch.ones_like(x), x, parameters=())
    (y + x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_outputs_may_be_written_to():
    """Blocks' outputs are views at times, and ControlNets add to slices of them."""
    block = make_block()

    def run(x):
        return block.first(x)[:, :4]

    def written(y):
        y[:, 1:] += 1
        return y.square().sum()

    written(selective_checkpoint(run, make_inputs()[0], parameters=block.parameters())).backward()
    gradient = block.first.weight.grad
    block.zero_grad()
    written(run(make_inputs()[0])).backward()
    assert torch.equal(gradient, block.first.weight.grad)


def test_random_numbers():
    """The second run drops what the first one did, and what is drawn elsewhere stays as it would have been."""
    block = make_block(dropout=0.5)
    draws = []
    for checkpoint in (None, selective_checkpoint):
        torch.manual_seed(5)
        result = outputs_and_gradients(block, checkpoint)
        draws.append((result, torch.randn(3, device=DEVICE), torch.randn(3)))
    (expected, *others), (got, *mine) = draws
    assert equal(got, expected)
    assert all(map(torch.equal, mine, others))


def test_autocast_is_that_of_the_first_run():
    block = make_block()
    kinds = []
    block.second.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    x, *pair = make_inputs()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = selective_checkpoint(block, x, pair)[1][0]
    y.sum().backward()
    with torch.autocast(DEVICE.type, torch.bfloat16):  # which casts the parameters once for both
        selective_checkpoint(block, x, pair)[1][0].sum().backward()
    assert kinds == 4 * [torch.bfloat16]
    assert x.grad.dtype == block.first.weight.grad.dtype == torch.float32


# Attention


@pytest.fixture
def runs(monkeypatch):
    """The times attention's Triton forward kernel runs."""
    reason = backend.why_not("triton", DEVICE.type, DEVICE.index)
    if reason:
        pytest.skip(reason)
    monkeypatch.setenv("DPDMD_ATTENTION", "triton")
    calls, forward = [], flash.forward

    def counted(*args):
        calls.append(args)
        return forward(*args)

    monkeypatch.setattr(flash, "forward", counted)
    return calls


class Attending(nn.Module):
    def __init__(self, times=2):
        super().__init__()
        self.qkv, self.times = nn.Linear(32, 96), times

    def forward(self, x):
        for _ in range(self.times):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).unbind(2)
            x = x + attention(q, k, v).flatten(2)
        return x


def attending(checkpoint=None, module=None):
    torch.manual_seed(0)
    made = Attending().to(DEVICE, torch.bfloat16)
    module = made if module is None else module
    x = torch.randn(2, 19, 32, device=DEVICE).bfloat16().requires_grad_()
    y = module(x) if checkpoint is None else checkpoint(module, x)
    y.float().square().sum().backward()
    return y, [x.grad, *(parameter.grad for parameter in module.parameters())]


def test_attention_runs_once(runs):
    expected = attending()
    assert len(runs) == 2
    for checkpoint, further in (
        (selective_checkpoint, 2),
        (lambda *args: torch.utils.checkpoint.checkpoint(*args, use_reentrant=False), 4),
    ):
        runs.clear()
        assert equal(attending(checkpoint), expected)
        assert len(runs) == further


def test_what_is_saved(runs):
    """The input, and attention's outputs with their sums; nothing else of the block."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        selective_checkpoint(Attending().to(DEVICE, torch.bfloat16), torch.randn(2, 19, 32, device=DEVICE).bfloat16())
    assert sizes[:2] == [2 * 19 * 32, 2 * 19 * 32] and sizes[3] == 2 * 19 * 32 and len(sizes) == 5
    assert all(2 * 2 * 19 <= size <= 2 * 2 * 128 for size in (sizes[2], sizes[4]))


def test_what_is_kept_joins_no_graph(runs):
    """A graph that hung on it would live as long as the checkpoint's."""
    x = torch.randn(2, 19, 32, device=DEVICE).bfloat16().requires_grad_()
    y = selective_checkpoint(Attending().to(DEVICE, torch.bfloat16), x)
    gradients = [torch.autograd.grad(y.float().sum(), x, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*gradients)
    assert all(tensor.grad_fn is None for tensor in y.grad_fn.saved_tensors)


@pytest.mark.parametrize("inner", ["selective", "torch"])
def test_nested(runs, inner):
    """The attention of a checkpoint inside another one is not taken for the outer's."""

    def within(module, x):
        if inner == "selective":
            return selective_checkpoint(module, x)
        return torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)

    class Outer(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(within(self.module, x))

    class Plain(Outer):
        def forward(self, x):
            return self.module(self.module(x))

    torch.manual_seed(0)
    module = Attending().to(DEVICE, torch.bfloat16)
    expected = attending(module=Plain(copy.deepcopy(module)))
    assert equal(attending(selective_checkpoint, Outer(module)), expected)


@pytest.mark.parametrize("second", [1, 3])
def test_another_function_the_second_time(runs, second):
    module = Attending().to(DEVICE, torch.bfloat16)
    x = torch.randn(2, 19, 32, device=DEVICE).bfloat16().requires_grad_()
    y = selective_checkpoint(module, x)
    module.times = second
    with pytest.raises(RuntimeError, match="did not call attention as often in the backward pass"):
        y.sum().backward()
    module.times = 2
    assert torch.isfinite(attention(*3 * [x.unflatten(-1, (2, 16))])).all(), "nothing is left behind"


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_where_cudnn_is_the_faster(runs, monkeypatch):
    monkeypatch.delenv("DPDMD_ATTENTION")
    monkeypatch.setattr(choice, "fastest", lambda *arguments: "cudnn")  # whatever this GPU's times are
    torch.use_deterministic_algorithms(False)
    x = torch.randn(1, 4608, 24 * 128, device="cuda").bfloat16().requires_grad_()

    def run(x):
        return attention(*3 * [x.unflatten(-1, (24, 128))])

    run(x).sum().backward()
    gradient, x.grad = x.grad, None
    runs.clear()
    selective_checkpoint(run, x, parameters=()).sum().backward()
    assert len(runs) == 1
    torch.testing.assert_close(x.grad, gradient, rtol=0.05, atol=0.05 * gradient.abs().max().item())


# Left to torch


@pytest.fixture
def torchs(monkeypatch):
    """The calls of torch's own checkpoint."""
    calls, checkpoint = [], torch.utils.checkpoint.checkpoint

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", counted)
    return calls


def test_sharded_parameters(torchs):
    """As ZeRO-3 leaves them between gatherings: empty, and gathered by hooks inside the call."""
    block = make_block()
    expected = outputs_and_gradients(block)
    weight = block.first.weight
    whole = weight.data
    weight.ds_numel = weight.numel()

    def gather(module, inputs):
        weight.data = whole

    def release(module, inputs, output):
        weight.data = whole.new_empty(0)

    block.zero_grad()
    gather_handle = block.first.register_forward_pre_hook(gather)
    x, *pair = make_inputs()
    release(None, None, None)
    y = selective_checkpoint(block, x, tuple(pair))[1][0]
    assert torchs == [{"use_reentrant": False}]
    assert torch.equal(y, expected[0])
    gather_handle.remove()
    gather(None, None)
    outputs_and_gradients(block, selective_checkpoint)
    assert len(torchs) == 1, "gathered parameters are no reason"


def gradients_of(module, run, *tensors):
    module.zero_grad()
    for tensor in tensors:
        tensor.grad = None
    run().square().sum().backward()
    return [tensor.grad for tensor in (*module.parameters(), *tensors)]


def assert_same_gradients(module, function, checkpointed, *tensors):
    expected = gradients_of(module, function, *tensors)
    got = gradients_of(module, checkpointed, *tensors)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine is theirs if theirs is None else torch.equal(mine, theirs)


class Marked(torch.Tensor):
    """A subclass, as DTensor is one."""


def test_parameters_of_a_subclass(torchs):
    linear = nn.Linear(8, 8).to(DEVICE)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Marked))
    x = make_inputs()[0]
    assert_same_gradients(linear, lambda: linear(x), lambda: selective_checkpoint(linear, x), x)
    assert len(torchs) == 1


def test_views_in_the_place_of_parameters(torchs):
    """As FSDP1 has them inside its hooks: parts of one flat parameter."""
    linear = nn.Linear(8, 8, bias=False).to(DEVICE)
    flat = nn.Parameter(torch.randn(64, device=DEVICE))
    x = make_inputs()[0]

    def gather(module, inputs):
        module._parameters["weight"] = flat.view(8, 8)

    linear.register_forward_pre_hook(gather)
    linear.forward = functools.partial(checkpointed_forward, linear)
    linear(x).square().sum().backward()
    expected = torch.autograd.grad(torch.nn.functional.linear(x, flat.view(8, 8)).square().sum(), flat)[0]
    assert torch.equal(flat.grad, expected) and len(torchs) == 1


def checkpointed_forward(linear, x):
    return selective_checkpoint(functools.partial(nn.Linear.forward, linear), x, parameters=linear.parameters())


@pytest.mark.parametrize("attribute", [False, True])
def test_weights_that_hooks_compute(attribute):
    """Inside the call and outside of it."""
    linear = nn.Linear(8, 8).to(DEVICE)
    if attribute:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.utils.weight_norm(linear)
    else:
        nn.utils.parametrizations.weight_norm(linear)
    x = make_inputs()[0]
    assert_same_gradients(linear, lambda: linear(x), lambda: selective_checkpoint(linear, x), x)

    inner = linear.forward
    parameters = list(linear.parameters())

    def outside():
        linear.forward = lambda x: selective_checkpoint(inner, x, parameters=parameters)
        try:
            return linear(x)
        finally:
            linear.forward = inner

    assert_same_gradients(linear, lambda: linear(x), outside, x)


def test_cached_parametrizations():
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8).to(DEVICE))
    x = make_inputs()[0]

    def cached(function):
        with nn.utils.parametrize.cached():
            return gradients_of(linear, function, x)

    expected = cached(lambda: linear(x))
    assert all(map(torch.equal, cached(lambda: selective_checkpoint(linear, x)), expected))


def test_compiled():
    block = make_block()
    x = make_inputs()[0]

    def run(x):
        return selective_checkpoint(block.first, x).square().sum()

    run(x).backward()
    expected, x.grad = x.grad, None
    torch.compile(run, backend="aot_eager", fullgraph=True)(x).backward()
    torch.testing.assert_close(x.grad, expected)


# Tensors that a function reads by itself

OTHERS = r"depends on a tensor \(8,\) of torch.float32 that requires a gradient and is neither among its arguments"


def test_a_tensor_that_is_no_parameter():
    block, scale = make_block(), torch.ones(8, device=DEVICE)
    x = make_inputs()[0]

    def run(x):
        return block.first(x) * scale

    def loss():
        return selective_checkpoint(run, x, parameters=block.parameters()).sum()

    loss().backward()  # it has no gradient
    scale.requires_grad_()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=OTHERS):
            loss().backward()
    assert scale.grad is None
    x.grad = None
    selective_checkpoint(run, x, parameters=[*block.parameters(), scale]).sum().backward()
    assert scale.grad is not None
    gradients = x.grad, scale.grad
    x.grad = scale.grad = None
    run(x).sum().backward()
    assert all(map(torch.equal, gradients, (x.grad, scale.grad)))


@pytest.mark.parametrize("of", ["a leaf", "a result", "an output", "an argument"])
def test_how_a_tensor_is_read(of):
    first, x = make_block().first, make_inputs()[0]
    scale = torch.ones(8, device=DEVICE, requires_grad=True)
    functions = {
        "a leaf": lambda x: first(x) * scale,
        "a result": lambda x, made=scale * 2: first(x) * made,
        "an output": lambda x: (first(x), scale),
        "an argument": lambda x, made={"within": [scale]}: first(x) * made["within"][0],
    }
    outputs = selective_checkpoint(functions[of], x, parameters=first.parameters())
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    with pytest.raises(RuntimeError, match=OTHERS):
        sum(output.sum() for output in outputs).backward()


class Scaled(nn.Module):
    def __init__(self, scale, kind):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        if kind == "buffer":
            self.register_buffer("scale", scale)
        elif kind == "parameter":
            self.scale = nn.Parameter(scale)
        elif kind == "attribute":
            self.scale = scale
        else:
            self.held = [scale]

    def forward(self, x):
        return self.linear(x) * (self.scale if hasattr(self, "scale") else self.held[0])


@pytest.mark.parametrize("kind", ["parameter", "buffer", "attribute", "list"])
def test_what_a_module_holds(kind):
    scale = torch.ones(8, device=DEVICE)
    module, x = Scaled(scale, kind).to(DEVICE), make_inputs()[0]
    selective_checkpoint(module, x).sum().backward()
    if kind == "parameter":
        assert module.scale.grad is not None
        return
    scale.requires_grad_()
    if kind == "buffer":
        assert_same_gradients(module, lambda: module(x), lambda: selective_checkpoint(module, x), x, scale)
        return
    # A module is looked at again before long; one that has not been called yet, at once.
    with pytest.raises(RuntimeError, match=OTHERS):
        for _ in range(32):
            selective_checkpoint(module, x).sum().backward()
    with pytest.raises(RuntimeError, match=OTHERS):
        selective_checkpoint(Scaled(scale, kind).to(DEVICE), x).sum().backward()


def test_parameters_that_leave_some_out():
    block, x = make_block(), make_inputs()[0]
    for _ in range(2):
        with pytest.raises(RuntimeError, match=OTHERS):
            selective_checkpoint(block.first, x, parameters=[block.first.weight]).sum().backward()
    block.first.bias.requires_grad_(False)
    selective_checkpoint(block.first, x, parameters=[block.first.weight]).sum().backward()


def test_modules_are_looked_at_now_and_then(monkeypatch):
    """0.1 ms for a block, where the host counts."""
    module = sys.modules["dpdmd.kernels.fusion.selective_checkpoint"]
    looks, look = [], module._look_through
    monkeypatch.setattr(module, "_look_through", lambda *args: looks.append(1) or look(*args))
    block, x = make_block(), make_inputs()[0]
    forward, parameters = block.first.forward, list(block.first.parameters())

    def wrapped(x):  # as dpdmd.lora.remember_role makes them, a new one each time
        return forward(x)

    wrapped.__wrapped__ = forward
    for function in (block.first, forward, wrapped):
        for _ in range(40):
            selective_checkpoint(function, x, parameters=parameters).sum().backward()
    assert len(looks) == 4
    looks.clear()
    block.second.requires_grad_(False)
    block.first.weight.requires_grad_(False)
    selective_checkpoint(block.first, x).sum().backward()
    assert len(looks) == 1, "other parameters"
    looks.clear()
    for _ in range(3):
        selective_checkpoint(lambda x: forward(x), x, parameters=parameters).sum().backward()
    assert len(looks) == 3, "it may be of other tensors each time"


def test_arguments_that_are_written_to():
    linear, x = make_block().first, make_inputs()[0].detach()
    with pytest.raises(ValueError, match="function writes to a tensor among its arguments"):
        selective_checkpoint(lambda x: linear(x.mul_(2)), x, parameters=linear.parameters())


# Errors


def test_errors():
    x = make_inputs()[0]
    with pytest.raises(TypeError, match=r"function is a Tensor; it needs to be an nn\.Module or another callable"):
        selective_checkpoint(x, x)
    with pytest.raises(
        TypeError, match=r"function is a function, not an nn\.Module; it needs to come with parameters="
    ):
        selective_checkpoint(lambda x: x, x)
    y = selective_checkpoint(make_block().first, x).square().sum()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (gradient,) = torch.autograd.grad(y, x, create_graph=True)
        gradient.sum().backward()
