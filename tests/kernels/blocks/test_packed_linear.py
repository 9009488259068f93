import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dpdmd.kernels.blocks.packed_linear import packed_linear

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SIZES = (24, 40, 7)


@pytest.fixture(autouse=True)
def device():
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
    yield torch.get_default_device()
    torch.set_default_device(None)


@pytest.fixture
def make(randn):
    """x (..., K), weights and biases of the sizes."""

    def tensors(*shape, sizes=SIZES, dtype=torch.float32):
        weights = tuple(randn(size, shape[-1], seed=1 + i, dtype=dtype) for i, size in enumerate(sizes))
        biases = tuple(randn(size, seed=11 + i, dtype=dtype) for i, size in enumerate(sizes))
        return randn(*shape, dtype=dtype), weights, biases

    return tensors


def separate(x, weights, biases=None):
    biases = biases or [None] * len(weights)
    return torch.cat([F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)], dim=-1)


def everything(function, x, weights, biases, upstream):
    """The result and every gradient."""
    weights, biases = tuple(weights), None if biases is None else tuple(biases)
    leaves = [tensor for tensor in (x, *weights, *(biases or ())) if tensor.requires_grad]
    out = function(x, weights, biases)
    return [out, *torch.autograd.grad(out, leaves, upstream)]


@pytest.fixture
def check(randn, relative_error):
    """No more than twice the error of separate layers of the same dtype, and the dtype's rounding."""

    def against_truth(x, weights, biases):
        as_leaves = lambda tensors, kind: [tensor.detach().to(kind).requires_grad_() for tensor in tensors]  # noqa: E731
        leaves = [as_leaves([x], x.dtype)[0], as_leaves(weights, x.dtype), biases and as_leaves(biases, x.dtype)]
        exact = [as_leaves([x], torch.float64)[0], as_leaves(weights, torch.float64)]
        exact.append(biases and as_leaves(biases, torch.float64))
        upstream = randn(*x.shape[:-1], sum(map(len, weights)), seed=99, dtype=x.dtype)
        got, peer = everything(packed_linear, *leaves, upstream), everything(separate, *leaves, upstream)
        truth = everything(separate, *exact, upstream.double())
        for one, other, right in zip(got, peer, truth, strict=True):
            assert one.dtype == x.dtype and one.shape == right.shape
            assert relative_error(one, right) <= max(2 * relative_error(other, right), 4 * torch.finfo(x.dtype).eps)

    return against_truth


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(make, check, dtype, with_bias):
    x, weights, biases = make(2, 5, 32, dtype=dtype)
    check(x, weights, biases if with_bias else None)


# A vector, a matrix, one token, one channel, four dimensions, one layer, many.
@pytest.mark.parametrize(
    "shape, sizes",
    [((8,), SIZES), ((3, 8), SIZES), ((1, 1, 1), (1, 1)), ((2, 3, 5, 8), SIZES), ((3, 8), (5,)), ((3, 8), [2] * 7)],
)
def test_shapes(make, check, shape, sizes):
    check(*make(*shape, sizes=sizes))


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)])
def test_empty_batch(make, shape):
    x, weights, biases = make(*shape)
    tensors = [tensor.requires_grad_() for tensor in (x, *weights, *biases)]
    out = packed_linear(x, weights, biases)
    assert out.shape == (*shape[:-1], sum(SIZES))
    for gradient, tensor in zip(torch.autograd.grad(out, tensors, torch.ones_like(out)), tensors, strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


@pytest.mark.parametrize("layout", ["transposed", "rows of a joint tensor", "every other", "expanded"])
@pytest.mark.parametrize("which", ["x", "weights", "upstream"])
def test_strides(make, randn, which, layout):
    def restride(tensor):
        if layout == "transposed":
            return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
        if layout == "rows of a joint tensor":
            return torch.cat([tensor, tensor + 1], dim=-2)[..., : tensor.shape[-2], :]
        if layout == "every other":
            return torch.stack([tensor, tensor + 1], dim=-1)[..., 0]
        return tensor[..., :1, :].expand_as(tensor)

    x, weights, biases = make(2, 5, 8)
    upstream = randn(2, 5, sum(SIZES), seed=99)
    x = restride(x) if which == "x" else x
    weights = tuple(map(restride, weights)) if which == "weights" else weights
    upstream = restride(upstream) if which == "upstream" else upstream
    arguments = [tensor.detach().requires_grad_() for tensor in (x, *weights, *biases)]
    arguments = arguments[0], arguments[1:4], arguments[4:], upstream
    for one, other in zip(everything(packed_linear, *arguments), everything(separate, *arguments), strict=True):
        torch.testing.assert_close(one, other)


NEEDED = [
    (True, (False, False, False), (False, False, False)),  # frozen layers, as LoRA has them
    (False, (True, True, True), (True, True, True)),
    (False, (False, True, False), (False, False, False)),
    (False, (False, False, False), (True, False, True)),
    (True, (True, False, True), (False, True, True)),
    (True, (True, True, True), None),
    (False, (True, False, True), None),
]


@pytest.mark.parametrize("for_x, for_weights, for_biases", NEEDED)
def test_gradients_go_where_they_are_needed(make, randn, for_x, for_weights, for_biases):
    x, weights, biases = make(2, 5, 8)
    x.requires_grad_(for_x)
    for tensor, needed in zip((*weights, *biases), (*for_weights, *(for_biases or ())), strict=False):
        tensor.requires_grad_(needed)
    arguments = x, weights, None if for_biases is None else biases, randn(2, 5, sum(SIZES), seed=99)
    got, expected = everything(packed_linear, *arguments), everything(separate, *arguments)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


class Products(TorchDispatchMode):
    """The shapes of the matrix products made meanwhile."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        if function.overloadpacket.__name__ in ("mm", "addmm", "bmm"):
            self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize(
    "needed, expected",
    [
        ((True, True, True, True), [(10, 71), (10, 8), (71, 8)]),
        ((True, False, False, False), [(10, 71), (10, 8)]),
        ((False, False, True, False), [(10, 71), (40, 8)]),
    ],
)
def test_products_made(make, needed, expected):
    """One forward, one for x and one for all weights; no more than what somebody needs."""
    x, weights, biases = make(2, 5, 8)
    for tensor, wanted in zip((x, *weights), needed, strict=True):
        tensor.requires_grad_(wanted)
    with Products() as products:
        packed_linear(x, weights, biases).backward(torch.ones(2, 5, sum(SIZES)))
    assert products.shapes == expected


def test_no_gradient_no_graph(make):
    x, weights, biases = make(2, 5, 8)
    assert not packed_linear(x, weights, biases).requires_grad
    with torch.no_grad():
        assert not packed_linear(x.requires_grad_(), weights, biases).requires_grad


def test_gradients_accumulate(make, randn):
    """Slices of one tensor are kept as they are; adding to them, and scaling one, leaves the others alone."""
    x, weights, biases = make(2, 5, 8)
    parameters = [tensor.requires_grad_() for tensor in (*weights, *biases)]
    upstreams = [randn(2, 5, sum(SIZES), seed=seed) for seed in (98, 99)]
    expected = [
        sum(pair) for pair in zip(*(everything(separate, x, weights, biases, u)[1:] for u in upstreams), strict=True)
    ]
    for upstream in upstreams:
        packed_linear(x, weights, biases).backward(upstream)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
        assert parameter.grad.is_contiguous()
    weights[1].grad.mul_(0.5)  # with grad mode on, as some trainers clip
    biases[0].grad.zero_()
    weights[2].grad = None
    for parameter, gradient, scale in zip(parameters, expected, (1, 0.5, None, 0, 1, 1), strict=True):
        if scale is not None:
            torch.testing.assert_close(parameter.grad, scale * gradient)


def test_gradients_are_not_cloned(make):
    x, weights, _ = make(2, 5, 8)
    for weight in weights:
        weight.requires_grad_()
    packed_linear(x, weights).sum().backward()
    assert len({weight.grad.untyped_storage().data_ptr() for weight in weights}) == 1
    assert weights[0].grad.untyped_storage().nbytes() == 4 * 8 * sum(SIZES)


def test_same_weight_twice(make, randn):
    x, weights, _ = make(2, 5, 8)
    weight = weights[0].requires_grad_()
    arguments = x, (weight, weight), None, randn(2, 5, 48, seed=99)
    for one, other in zip(everything(packed_linear, *arguments), everything(separate, *arguments), strict=True):
        torch.testing.assert_close(one, other)


def test_stack_is_not_kept_for_backward(make):
    x, weights, biases = make(2, 5, 8)
    tensors = [tensor.requires_grad_() for tensor in (x, *weights, *biases)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        packed_linear(x, weights, biases)
    assert {tensor.data_ptr() for tensor in kept} <= {tensor.data_ptr() for tensor in tensors}


@pytest.mark.parametrize("needed", [0, 1, 4])
def test_x_is_kept_for_weights_alone(make, needed):
    """Frozen weights ask for no activations; neither do biases."""
    x, weights, biases = make(2, 5, 8)
    (x, *weights, *biases)[needed].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        packed_linear(x, weights, biases)
    assert any(tensor.data_ptr() == x.data_ptr() for tensor in kept) == (needed == 1)


def test_weight_written_to_before_the_backward_pass_is_an_error(make):
    x, weights, _ = make(2, 5, 8)
    out = packed_linear(x.requires_grad_(), weights)
    weights[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast(make, randn, relative_error, dtype, device):
    """As F.linear: the product is in the autocast dtype, gradients in each tensor's own."""
    x, weights, biases = make(2, 5, 8)
    leaves = [
        tensor.to(kind).requires_grad_()
        for tensor, kind in zip((x, *weights, *biases), (dtype, *[torch.float32] * 6), strict=True)
    ]
    upstream = randn(2, 5, sum(SIZES), seed=99, dtype=torch.bfloat16)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        outs = [function(leaves[0], tuple(leaves[1:4]), tuple(leaves[4:])) for function in (packed_linear, separate)]
    got, expected = ([out, *torch.autograd.grad(out, leaves, upstream)] for out in outs)
    for one, other, dtype in zip(got, expected, (torch.bfloat16, *(leaf.dtype for leaf in leaves)), strict=True):
        assert one.dtype == other.dtype == dtype
        assert relative_error(one, other) < 2**-7


def test_autocast_leaves_float64_alone(make, device):
    x, weights, biases = make(2, 5, 8, dtype=torch.float64)
    expected = packed_linear(x, weights, biases)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(packed_linear(x, weights, biases), expected)


def test_second_derivative(make):
    x, weights, biases = make(2, 3, 4, sizes=(2, 3), dtype=torch.float64)
    tensors = [tensor.requires_grad_() for tensor in (x, *weights, *biases)]
    assert torch.autograd.gradgradcheck(lambda x, *others: packed_linear(x, others[:2], others[2:]), tensors)


def test_compiles_to_one_graph_and_repeats(make, randn):
    x, weights, biases = make(2, 5, 8)
    upstream = randn(2, 5, sum(SIZES), seed=99)
    for for_x, for_weights in ((True, True), (True, False), (False, True)):
        torch._dynamo.reset()
        compiled = torch.compile(packed_linear, fullgraph=True, backend="aot_eager")
        for needed, tensors in ((for_x, [x]), (for_weights, [*weights, *biases])):
            for tensor in tensors:
                tensor.requires_grad_(needed)
        for some_biases in (biases, None):
            results = [
                everything(f, x, weights, some_biases, upstream) for f in (compiled, packed_linear, packed_linear)
            ]
            for one, other, again in zip(*results, strict=True):
                assert torch.equal(one, other) and torch.equal(other, again)


X, W, B = torch.zeros(2, 4), (torch.zeros(3, 4), torch.zeros(5, 4)), (torch.zeros(3), torch.zeros(5))


@pytest.mark.parametrize(
    "x, weights, bias, error, message",
    [
        (1.0, W, None, TypeError, "x is a float; it needs to be a torch.Tensor"),
        (X.long(), W, None, TypeError, "x has dtype torch.int64; it needs float32"),
        (torch.zeros(()), W, None, ValueError, r"x has shape \(\); it needs a dimension of channels"),
        (X, W[0], None, TypeError, "weights is a Tensor; it needs to be a tuple of tensors, one a layer"),
        (X, (), None, ValueError, "weights is empty; it needs one tensor at least"),
        (X, W, B[0], TypeError, "bias is a Tensor; it needs to be a tuple of tensors, one a layer"),
        (X, W, B[:1], ValueError, "bias has 1 entries; it needs one for each of the 2 weights, or None"),
        (X, W, (B[0], None), TypeError, r"bias\[1\] is a NoneType; it needs to be a torch.Tensor"),
        (
            X,
            (W[0], torch.zeros(5)),
            None,
            ValueError,
            r"weights\[1\] has shape \(5,\); with x \(2, 4\) it needs \(N, 4\)",
        ),
        (X, (W[0], torch.zeros(5, 3)), None, ValueError, r"weights\[1\] has shape \(5, 3\); .* needs \(N, 4\)"),
        (X, (W[0].bfloat16(), W[1]), None, TypeError, r"weights\[0\] has dtype torch.bfloat16; it needs x's dtype"),
        (X, (W[0], W[1].to("meta")), None, ValueError, r"weights\[1\] is on meta; it needs to be on x's device cpu"),
        (X, W, (B[0], B[0]), ValueError, r"bias\[1\] has shape \(3,\); with weights\[1\] \(5, 4\) it needs \(5,\)"),
        (
            X,
            W,
            (B[0].double(), B[1]),
            TypeError,
            r"bias\[0\] has dtype torch.float64; it needs x's dtype torch.float32",
        ),
    ],
)
def test_errors(x, weights, bias, error, message):
    with pytest.raises(error, match=message):
        packed_linear(x, weights, bias)
