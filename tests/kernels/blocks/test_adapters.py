"""What an adapter adds to a base product: values and gradients against float64, in place, and no more than is needed."""

from itertools import chain

import pytest
import torch
import torch.nn.functional as F

from dpdmd.kernels import packed_linear
from dpdmd.kernels.blocks.adapters import Adapter, lowered, raised
from dpdmd.kernels.fusion.linear import _rows_linear

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
K, SIZES, RANKS, SCALES = 24, (16, 40, 7), (3, 1, 5), (5 / 3, 1.0, 0.5)


@pytest.fixture
def make(randn):
    """x, weights, A's, B's."""

    def tensors(*shape, dtype=torch.float32):
        x = randn(*shape, K, dtype=dtype)
        weights = [randn(N, K, seed=1 + i, dtype=dtype) * K**-0.5 for i, N in enumerate(SIZES)]
        downs = [randn(r, K, seed=4 + i, dtype=dtype) * K**-0.5 for i, r in enumerate(RANKS)]
        ups = [randn(N, r, seed=7 + i, dtype=dtype) for i, (N, r) in enumerate(zip(SIZES, RANKS, strict=True))]
        return x, weights, downs, ups

    return tensors


def ours(x, weights, downs, ups, which=(0, 1, 2)):
    columns = [sum(SIZES[:i]) for i in which]
    adapters = [Adapter(downs[i], ups[i], SCALES[i], column) for i, column in zip(which, columns, strict=True)]
    (x,), h = lowered((x,), adapters)
    return raised(packed_linear(x, tuple(weights)), h, adapters)


def by_the_book(x, weights, downs, ups, which=(0, 1, 2)):
    added = [
        s * (x @ a.t()) @ b.t() if i in which else 0 for i, (s, a, b) in enumerate(zip(SCALES, downs, ups, strict=True))
    ]
    return torch.cat([x @ weight.t() + each for weight, each in zip(weights, added, strict=True)], dim=-1)


def everything(function, tensors, needed, upstream, **settings):
    """The result, and the gradients of the needed tensors: 0 is x, then come weights, A's and B's, three each."""
    x, *others = [tensor.detach().requires_grad_(i in needed) for i, tensor in enumerate(tensors)]
    out = function(x, others[:3], others[3:6], others[6:], **settings)
    wanted = [tensor for tensor in (x, *others) if tensor.requires_grad]
    return [out, *torch.autograd.grad(out, wanted, upstream.to(out.dtype))] if wanted else [out]


ALL = tuple(range(10))
ADAPTERS = (4, 5, 6, 7, 8, 9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5), (113,), (1, 1), (2, 0), (2, 3, 2)])
@pytest.mark.parametrize("needed", [ALL, (0, *ADAPTERS), ADAPTERS, (0,), (5, 9), ()])
def test_against_float64(make, randn, relative_error, dtype, shape, needed):
    x, *others = make(*shape, dtype=dtype)
    tensors = [x, *chain(*others)]
    upstream = randn(*shape, sum(SIZES), seed=99)
    got = everything(ours, tensors, needed, upstream)
    truth = everything(by_the_book, [tensor.double() for tensor in tensors], needed, upstream.double())
    assert len(got) == len(needed) + 1
    for one, right in zip(got, truth, strict=True):
        assert one.dtype == dtype and one.shape == right.shape
        if right.norm() > 0:
            assert relative_error(one, right) < (8 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-14)
        else:
            assert not one.any()


@pytest.mark.parametrize("which", [(0,), (2,), (0, 2), (1, 2)])
def test_some_of_the_layers(make, randn, relative_error, which):
    x, *others = make(2, 5, dtype=torch.float64)
    tensors, upstream = [x, *chain(*others)], randn(2, 5, sum(SIZES), seed=99).double()
    needed = (0, *[4 + i for i in which], *[7 + i for i in which])
    got = everything(ours, tensors, needed, upstream, which=which)
    truth = everything(by_the_book, tensors, needed, upstream, which=which)
    for one, right in zip(got, truth, strict=True):
        assert relative_error(one, right) < 1e-14


@pytest.mark.parametrize("needed", [(0, 4, 7), (0,), (4, 7)])
def test_rows_apart_in_memory(make, randn, relative_error, needed):
    """The image's rows of an attention's output."""
    x, weights, downs, ups = make(2, 7)
    upstream = randn(2, 5, SIZES[0], seed=99)

    def rows(x, weights, downs, ups):
        adapter = Adapter(downs[0], ups[0], SCALES[0])
        (part,), h = lowered((x[:, 2:],), [adapter])
        assert part.stride() == x[:, 2:].stride(), "nothing is copied"
        return raised(_rows_linear(part, weights[0]), h, [adapter])

    def book(x, weights, downs, ups):
        x = x[:, 2:]
        return x @ weights[0].t() + SCALES[0] * (x @ downs[0].t()) @ ups[0].t()

    tensors = [x, *weights, *downs, *ups]
    got = everything(rows, tensors, needed, upstream)
    truth = everything(book, [tensor.double() for tensor in tensors], needed, upstream.double())
    for one, right in zip(got, truth, strict=True):
        assert relative_error(one, right) < 1e-6


@pytest.mark.parametrize("needed", [(0, 4, 7), (0,), (4, 7)])
def test_two_tensors_side_by_side(make, randn, relative_error, needed):
    x, weights, downs, ups = make(2, 7)
    upstream = randn(2, 7, SIZES[0], seed=99)

    def parts(x, weights, downs, ups):
        adapter = Adapter(downs[0], ups[0], SCALES[0])
        (a, b), h = lowered((x[..., :10].contiguous(), x[..., 10:].contiguous()), [adapter])
        return raised(F.linear(torch.cat((a, b), dim=-1), weights[0]), h, [adapter])

    def book(x, weights, downs, ups):
        return x @ weights[0].t() + SCALES[0] * (x @ downs[0].t()) @ ups[0].t()

    tensors = [x, *weights, *downs, *ups]
    got = everything(parts, tensors, needed, upstream)
    truth = everything(book, [tensor.double() for tensor in tensors], needed, upstream.double())
    for one, right in zip(got, truth, strict=True):
        assert relative_error(one, right) < 1e-6


def test_in_place(make):
    x, weights, downs, ups = make(2, 5)
    adapter = Adapter(downs[0], ups[0], SCALES[0])
    for needed in (False, True):
        y = F.linear(x, weights[0].requires_grad_(needed))
        assert raised(y, lowered((x,), [adapter])[1], [adapter]).data_ptr() == y.data_ptr()


def test_h_alone_is_used(make):
    """Whoever has no use for the base product."""
    x, _, downs, ups = make(2, 5)
    x.requires_grad_()
    (_,), h = lowered((x,), [Adapter(downs[0], ups[0], 1.0)])
    (gradient,) = torch.autograd.grad(h.sum(), x)
    torch.testing.assert_close(gradient, downs[0].sum(0).expand_as(x))


def test_x_is_passed_on_as_it_needs(make):
    """An input without a gradient has none afterwards, so that the base product makes none either."""
    x, _, downs, ups = make(2, 5)
    adapter = Adapter(downs[0].requires_grad_(), ups[0], 1.0)
    (passed,), h = lowered((x,), [adapter])
    assert passed is x and h.requires_grad
    (passed,), h = lowered((x.requires_grad_(),), [adapter])
    assert passed is not x and passed.requires_grad and passed.data_ptr() == x.data_ptr()
    with torch.no_grad():
        assert not lowered((x,), [adapter])[1].requires_grad


@pytest.mark.parametrize("needed, kept", [(ADAPTERS, True), ((0,), False)])
def test_x_is_kept_for_adapters_alone(make, needed, kept):
    """Frozen weights and adapters ask for no activations."""
    x, weights, downs, ups = make(64)
    tensors = [tensor.requires_grad_(i in needed) for i, tensor in enumerate((x, *weights, *downs, *ups))]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        ours(tensors[0], tensors[1:4], tensors[4:7], tensors[7:])
    assert any(tensor.data_ptr() == x.data_ptr() for tensor in saved) == kept
    assert max(tensor.numel() for tensor in saved) <= max(x.numel() if kept else 0, 40 * K)


def test_gradients_of_a_group_are_not_cloned(make):
    x, weights, downs, ups = make(2, 5)
    downs = [torch.nn.Parameter(down) for down in downs]
    ours(x, weights, downs, ups).sum().backward()
    assert len({down.grad.untyped_storage().data_ptr() for down in downs}) == 1
    assert all(down.grad.is_contiguous() for down in downs)


def test_repeats_to_the_bit(make, randn):
    x, *others = make(2, 113)
    tensors, upstream = [x, *chain(*others)], randn(2, 113, sum(SIZES), seed=99)
    results = [everything(ours, tensors, ALL, upstream) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
