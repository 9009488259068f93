"""Checkpoints that keep attention's outputs: what is computed twice, what once, and the same gradients as without."""

import copy

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from dpdmd.kernels import _attention, attention, backend, selective_checkpoint

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
    calls, forward = [], _attention.forward

    def counted(*args):
        calls.append(args)
        return forward(*args)

    monkeypatch.setattr(_attention, "forward", counted)
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


def test_compiled():
    block = make_block()
    x = make_inputs()[0]

    def run(x):
        return selective_checkpoint(block.first, x).square().sum()

    run(x).backward()
    expected, x.grad = x.grad, None
    torch.compile(run, backend="aot_eager", fullgraph=True)(x).backward()
    torch.testing.assert_close(x.grad, expected)


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
