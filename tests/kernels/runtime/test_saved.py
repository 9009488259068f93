"""What autograd functions keep of parameters: nothing that hooks see, and nothing that may change unnoticed."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dpdmd.kernels import gated_residual, packed_linear


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return [torch.nn.Linear(6, 4) for _ in range(2)]


def out_of(layers, x):
    return packed_linear(x, tuple(layer.weight for layer in layers))


def test_hooks_see_no_parameters(layers):
    seen = []
    x = torch.randn(3, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        out = out_of(layers, x)
    assert [t.data_ptr() for t in seen] == [x.data_ptr()]
    out.sum().backward()
    torch.testing.assert_close(x.grad, sum(layer.weight.sum(0) for layer in layers).expand(3, 6))


def test_tensors_made_from_parameters_are_saved_as_ever(layers):
    seen = []
    x = torch.randn(3, 6)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        packed_linear(x, tuple(2 * layer.weight for layer in layers))
    assert len(seen) == 3


def test_a_parameter_that_was_written_to(layers):
    out = out_of(layers, torch.randn(3, 6))
    with torch.no_grad():
        layers[1].weight += 1
    with pytest.raises(RuntimeError, match=r"a parameter of shape \(4, 6\) .* modified by an inplace operation"):
        out.sum().backward()


def test_backward_once(layers):
    out = out_of(layers, torch.randn(3, 6)).sum()
    out.backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(layers, use_reentrant):
    x = torch.randn(2, 3, 6, requires_grad=True)
    gate, bias = torch.randn(2, 8, requires_grad=True), torch.nn.Parameter(torch.randn(8))

    def run(x, gate):
        y = out_of(layers, x)
        return gated_residual(y, gate, y, bias=bias).square().sum()

    leaves = [x, gate, bias, *(layer.weight for layer in layers)]

    def gradients(loss):
        for leaf in leaves:
            leaf.grad = None
        loss.backward()
        return [leaf.grad for leaf in leaves]

    expected = gradients(run(x, gate))
    assert all(map(torch.equal, gradients(checkpoint(run, x, gate, use_reentrant=use_reentrant)), expected))
