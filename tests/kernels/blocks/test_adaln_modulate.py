import itertools

import pytest
import torch
import torch.nn.functional as F

from dpdmd.kernels import adaln_modulate
from dpdmd.kernels.blocks import adaln

pytestmark = [
    pytest.mark.usefixtures("implementation"),
    pytest.mark.parametrize("implementation", ["reference", "triton"], indirect=True),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# One token; tokens that fill no chunk and no tile; channels that are no power of two, fill no warp, fill no block
# (1536 of 2048).
SHAPES = [(1, 1, 1536), (1, 113, 24), (1, 9, 96), (9, 2, 40)]


def truth(x, scale, shift, norm, eps=1e-6):
    normalised = {"layer": F.layer_norm, "rms": F.rms_norm}[norm](x.double(), x.shape[-1:], eps=eps)
    return torch.stack([n * (1 + one) + other for n, one, other in zip(normalised, scale, shift, strict=True)])


@pytest.fixture
def inputs(randn):
    """x, scale and shift, the vectors as chunks of one linear's columns as blocks have them."""

    def make(*shape, dtype=torch.float32):
        B, _, C = shape
        chunks = randn(B, 6 * C, seed=1, dtype=dtype).chunk(6, dim=1)
        return randn(*shape, dtype=dtype), chunks[1], chunks[4]

    return make


@pytest.fixture
def check(randn, check_rounded_once):
    """Compare the result and all gradients with float64."""

    def compare(x, scale, shift, norm, eps=1e-6):
        tensors = [tensor.detach().requires_grad_() for tensor in (x, scale, shift)]
        exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
        out, expected = adaln_modulate(*tensors, norm=norm, eps=eps), truth(*exact, norm, eps)
        assert out.dtype == x.dtype
        check_rounded_once(out, expected)
        upstream = randn(*out.shape, seed=99, dtype=out.dtype)
        gradients = torch.autograd.grad(out, tensors, upstream)
        for tensor, got, right in zip(
            tensors, gradients, torch.autograd.grad(expected, exact, upstream.double()), strict=True
        ):
            assert got.dtype == tensor.dtype
            check_rounded_once(got, right)

    return compare


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_dtypes(inputs, check, norm, dtype):
    """Of so many channels that a value next to a tie is less than one in a hundred."""
    check(*inputs(2, 7, 120, dtype=dtype), norm)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_shapes(inputs, check, monkeypatch, norm, shape):
    if shape[-1] > 1000:
        monkeypatch.setattr(adaln, "SUM_COLUMNS", 256)  # fewer programs, which the interpreter takes its time for
    check(*inputs(*shape), norm)


def test_one_channel(inputs):
    """It is its own mean, and its own size."""
    x, scale, shift = inputs(3, 5, 1)
    assert torch.equal(adaln_modulate(x, scale, shift), shift[:, None].expand_as(x))
    out = adaln_modulate(x, scale, shift, norm="rms")
    torch.testing.assert_close(out, truth(x, scale, shift, "rms"), check_dtype=False)


@pytest.mark.parametrize("shape", [(0, 5, 24), (3, 0, 24), (2, 5, 0)])
def test_empty(inputs, shape):
    x, scale, shift = (tensor.detach().requires_grad_() for tensor in inputs(*shape))
    out = adaln_modulate(x, scale, shift)
    assert out.shape == shape
    for tensor, gradient in zip((x, scale, shift), torch.autograd.grad(out.sum(), (x, scale, shift)), strict=True):
        assert gradient.shape == tensor.shape and not gradient.any()
    with torch.no_grad():
        values, row_scale = adaln_modulate(x, scale, shift, quantize=True)
    assert values.shape == shape and row_scale.shape == (*shape[:2], 1) and (row_scale == 1).all()


@pytest.mark.parametrize("programs, rows", [(1, 2), (3, 4), (1000, 64)])
def test_sums_of_any_number_of_chunks(inputs, check, monkeypatch, programs, rows):
    """One chunk a sample, chunks with a rest, one token a chunk; added up a few at a time, with a rest, and at once."""
    monkeypatch.setattr(adaln, "PROGRAMS", programs)
    monkeypatch.setattr(adaln, "MIN_CHUNK", 1)
    monkeypatch.setattr(adaln, "SUM_ROWS", rows)
    check(*inputs(2, 11, 40), "layer")


def test_pair_is_two_modulations_of_one_norm(inputs, randn):
    x, *vectors = inputs(2, 7, 40)
    vectors += [randn(2, 40, seed=seed) for seed in (5, 6)]
    tensors = [tensor.detach().requires_grad_() for tensor in (x, *vectors)]
    x, scale_1, shift_1, scale_2, shift_2 = tensors
    outs = adaln_modulate(x, (scale_1, scale_2), (shift_1, shift_2))
    singles = adaln_modulate(x, scale_1, shift_1), adaln_modulate(x, scale_2, shift_2)
    assert isinstance(outs, tuple) and all(map(torch.equal, outs, singles))
    upstream = [randn(2, 7, 40, seed=seed) for seed in (7, 8)]
    for got, expected in zip(
        torch.autograd.grad(outs, tensors, upstream), torch.autograd.grad(singles, tensors, upstream), strict=True
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("used", [0, 1])
def test_pair_of_which_one_is_used(inputs, randn, used):
    x, *vectors = inputs(2, 7, 40)
    tensors = [tensor.detach().requires_grad_() for tensor in (x, *vectors, *(v.flip(1) for v in vectors))]
    x, scale_1, shift_1, scale_2, shift_2 = tensors
    scale, shift = ((scale_1, shift_1), (scale_2, shift_2))[used]
    out = adaln_modulate(x, (scale_1, scale_2), (shift_1, shift_2))[used]
    single = adaln_modulate(x, scale, shift)
    upstream = randn(2, 7, 40, seed=7)
    got = torch.autograd.grad(out, (x, scale, shift), upstream)
    for one, other in zip(got, torch.autograd.grad(single, (x, scale, shift), upstream), strict=True):
        torch.testing.assert_close(one, other)
    unused = ((scale_2, shift_2), (scale_1, shift_1))[used]
    out = adaln_modulate(x, (scale_1, scale_2), (shift_1, shift_2))[used]
    for gradient in torch.autograd.grad(out, unused, upstream, allow_unused=True):
        assert gradient is None or not gradient.any()


LAYOUTS = {
    "joint": lambda t: torch.cat([t.new_full((len(t), 3, t.shape[2]), torch.nan), t], 1)[:, 3:],  # a stream's tokens
    "wider": lambda t: torch.cat([t, t.new_full(t.shape, torch.nan)], 2)[..., : t.shape[2]],
    "odd": lambda t: torch.cat([t, t.new_full((*t.shape[:2], 3), torch.nan)], 2)[..., :-3],  # no 16-byte boundaries
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "every_other": lambda t: torch.stack([t, t * torch.nan], 3).flatten(2)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_tokens(inputs, randn, layout):
    """Of x, of the upstream gradient, and of both."""
    x, scale, shift = inputs(2, 6, 32)
    upstream = randn(2, 6, 32, seed=9)
    results = []
    for which in ((False, False), (True, False), (False, True), (True, True)):
        strided = [LAYOUTS[layout](t) if use else t for t, use in zip((x, upstream), which, strict=True)]
        tensors = [tensor.detach().requires_grad_() for tensor in (strided[0], scale, shift)]
        out = adaln_modulate(*tensors)
        results.append((out, *torch.autograd.grad(out, tensors, strided[1])))
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, expected)


def test_strides_of_expanded_tensors(inputs):
    """The upstream gradient of a sum has stride 0, and so has a vector that all samples share."""
    x, scale, shift = inputs(2, 6, 32)
    results = []
    for expand in (lambda t: t, torch.clone):
        tensors = [x.detach(), *(expand(vector[:1].expand(2, -1)) for vector in (scale, shift))]
        tensors = [tensor.requires_grad_() for tensor in tensors]
        out = adaln_modulate(*tensors)
        results.append((out, *torch.autograd.grad(out, tensors, expand(x.new_ones(1, 1, 1).expand_as(x)))))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("scale_layout", ["column", "transposed", "contiguous"])
def test_vectors_of_different_strides(inputs, check, scale_layout):
    x, scale, shift = inputs(3, 5, 24)
    layouts = {
        "column": lambda t: torch.stack([t, t * torch.nan], 2)[..., 0],
        "transposed": lambda t: t.t().contiguous().t(),
        "contiguous": torch.Tensor.contiguous,
    }
    check(x, layouts[scale_layout](scale), shift, "layer")


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_mixed_dtypes(randn, check, norm):
    """A modulation kept in float32 beside bfloat16 tokens, and the other way round."""
    x, scale, shift = randn(2, 7, 120, dtype=torch.bfloat16), randn(2, 120, seed=1), randn(2, 120, seed=2)
    check(x, scale, shift.half(), norm)
    check(x.float(), scale.bfloat16(), shift.half(), norm)


def test_gradients_where_needed_only(inputs, randn):
    """What is computed for some inputs is to the bit what is computed for all."""
    tensors, upstream = inputs(2, 7, 40), randn(2, 7, 40, seed=9)
    gradients = {}
    for needed in itertools.product((True, False), repeat=3):
        leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, needed, strict=True)]
        out = adaln_modulate(*leaves)
        assert out.requires_grad == any(needed)
        if any(needed):
            out.backward(upstream)
        for i, (leaf, need) in enumerate(zip(leaves, needed, strict=True)):
            assert (leaf.grad is not None) == need
            if need:
                assert torch.equal(leaf.grad, gradients.setdefault(i, leaf.grad))


@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("pair", [False, True])
def test_fork(inputs, randn, check_rounded_once, implementation, pair, used):
    """x's gradient is that of both ways, rounded once."""
    tensors = [tensor.detach().requires_grad_() for tensor in inputs(2, 7, 120, dtype=torch.bfloat16)]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    x, scale, shift = tensors
    residual, *outs = (
        adaln_modulate(x, (scale, shift), (shift, scale), fork=True)
        if pair
        else adaln_modulate(x, scale, shift, fork=True)
    )
    assert torch.equal(residual, x) and residual.data_ptr() == x.data_ptr() and len(outs) == 1 + pair
    expected = [exact[0], truth(*exact, "layer"), truth(exact[0], exact[2], exact[1], "layer")]
    upstream = [randn(*x.shape, seed=90 + i, dtype=x.dtype) for i in range(2 + pair)]
    chosen = [i for i in range(2 + pair) if used[i > 0]]
    results = [residual, *outs]
    gradients = torch.autograd.grad(
        [results[i] for i in chosen], tensors, [upstream[i] for i in chosen], allow_unused=True
    )
    right = torch.autograd.grad(
        [expected[i] for i in chosen], exact, [upstream[i].double() for i in chosen], allow_unused=True
    )
    for got, one in zip(gradients, right, strict=True):
        assert (got is None) == (one is None)
    if implementation == "triton":  # autograd, which has the definition, rounds twice
        check_rounded_once(gradients[0], right[0])


def test_fork_without_a_gradient_of_x(inputs):
    x, scale, shift = inputs(2, 3, 24)
    residual, out = adaln_modulate(x, scale.detach().requires_grad_(), shift, fork=True)
    assert residual is x and not residual.requires_grad and out.requires_grad
    with torch.no_grad():
        residual, quantised = adaln_modulate(x, scale, shift, fork=True, quantize=True)
    assert residual is x and quantised.scale.shape == (2, 3, 1)


def test_mean_far_from_zero(inputs, relative_error):
    """The variance as mean of squares less square of mean would have no digit left."""
    x, scale, shift = inputs(2, 7, 40)
    x = (300 + x).requires_grad_()
    exact = x.detach().double().requires_grad_()
    out, expected = adaln_modulate(x, scale, 0 * shift), truth(exact, scale, 0 * shift, "layer")
    assert relative_error(out, expected) < 1e-4
    upstream = torch.ones_like(out).cumsum(2)
    (got,), (right,) = (torch.autograd.grad(o, t, upstream.to(o.dtype)) for o, t in ((out, x), (expected, exact)))
    assert relative_error(got, right) < 1e-3


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.25])
def test_eps(inputs, check, norm, eps):
    """Seen where tokens are small; a token of zeros divides by nothing else."""
    x, scale, shift = inputs(2, 7, 40)
    check(1e-2 * x, scale, shift, norm, eps)
    if eps:
        zeros = torch.zeros_like(x, requires_grad=True)
        out = adaln_modulate(zeros, scale, shift, norm=norm, eps=eps)
        assert torch.equal(out, shift[:, None].expand_as(out))
        assert torch.autograd.grad(out.sum(), zeros)[0].isfinite().all()


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_quantized(inputs, relative_error, norm):
    x, scale, shift = inputs(2, 7, 120, dtype=torch.bfloat16)
    scale[1], shift[1] = -1, 0  # a sample of zeros
    values, row_scale = adaln_modulate(x, scale, shift, norm=norm, quantize=True)
    assert values.dtype == torch.float8_e4m3fn and values.shape == x.shape
    assert row_scale.dtype == torch.float32 and row_scale.shape == (2, 7, 1)
    assert not values[1].float().any() and (row_scale[1] == 1).all()
    expected = truth(x.double(), scale.double(), shift.double(), norm)[0]
    largest = expected.abs().amax(1, keepdim=True)
    assert relative_error(row_scale[0], largest / 448) < 1e-6
    # Rounded once, and not by way of bfloat16: to the bit, but for values next to a tie.
    once = (expected / largest * 448).float().to(torch.float8_e4m3fn).float()
    assert (values[0].float() != once).double().mean() < 0.01


def test_quantized_pair(inputs):
    x, scale, shift = inputs(2, 7, 40)
    one, other = adaln_modulate(x, (scale, shift), (shift, scale), quantize=True)
    for (values, row_scale), arguments in ((one, (scale, shift)), (other, (shift, scale))):
        single = adaln_modulate(x, *arguments, quantize=True)
        assert torch.equal(values.float(), single.values.float()) and torch.equal(row_scale, single.scale)


def test_quantized_has_no_gradient(inputs):
    for i, name in enumerate(("x", "scale", "shift")):
        tensors = [tensor.detach() for tensor in inputs(2, 3, 24)]
        tensors[i].requires_grad_()
        with pytest.raises(ValueError, match=f"{name} requires a gradient"):
            adaln_modulate(*tensors, quantize=True)
        with torch.no_grad():
            assert not adaln_modulate(*tensors, quantize=True).scale.requires_grad


def test_keeps_x_for_the_backward_pass_and_nothing_else_of_its_size(inputs, implementation):
    if implementation == "reference":
        pytest.skip("the definition keeps what autograd keeps")
    x, scale, shift = (tensor.detach().requires_grad_() for tensor in inputs(2, 7, 40))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adaln_modulate(x, (scale, scale), (shift, shift))
    assert [t.data_ptr() for t in kept if t.numel() == x.numel()] == [x.data_ptr()]


def test_second_derivative_is_refused(inputs, implementation):
    if implementation == "reference":
        pytest.skip("autograd has it")
    x, scale, shift = (tensor.detach().requires_grad_() for tensor in inputs(2, 3, 24))
    (gradient,) = torch.autograd.grad(adaln_modulate(x, scale, shift).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.float64
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_gradcheck(inputs, norm):
    tensors = [tensor.detach().requires_grad_() for tensor in inputs(2, 3, 5, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *args: adaln_modulate(*args, norm=norm), tensors)


def test_compiles_to_one_graph_and_repeats(inputs, randn):
    torch._dynamo.reset()
    x, scale, shift = inputs(2, 7, 40, dtype=torch.bfloat16)
    tensors = [x, scale, shift, randn(2, 40, seed=5), randn(2, 40, seed=6)]
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    upstream = [randn(2, 7, 40, seed=seed, dtype=torch.bfloat16) for seed in (7, 8)]

    def call(x, scale_1, shift_1, scale_2, shift_2):
        return adaln_modulate(x, (scale_1, scale_2), (shift_1, shift_2), norm="rms")

    results = []
    for run in (call, call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        outs = run(*tensors)
        results.append((*outs, *torch.autograd.grad(outs, tensors, upstream)))
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


def test_compiles_quantized(inputs):
    torch._dynamo.reset()
    call = torch.compile(lambda *args: tuple(adaln_modulate(*args, quantize=True)), fullgraph=True, backend="aot_eager")
    tensors = inputs(2, 7, 40)
    for got, expected in zip(call(*tensors), adaln_modulate(*tensors, quantize=True), strict=True):
        assert torch.equal(got.float(), expected.float())


@pytest.mark.gpu
@pytest.mark.gpu_memory(
    20
)  # x, its copies of the result, of the gradient and of its upstream: 4 each, and as much to spare
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_than_2_to_31_elements(inputs, randn, implementation):
    if implementation == "reference":
        pytest.skip("what counts elements is PyTorch")
    x, scale, shift = inputs(1, 1000, 1536, dtype=torch.bfloat16)
    upstream = randn(1, 1000, 1536, seed=9, dtype=torch.bfloat16)
    results = []
    for repeats in (1, 1400):
        leaf = x.repeat(1, repeats, 1).requires_grad_()
        out = adaln_modulate(leaf, scale, shift)
        (gradient,) = torch.autograd.grad(out, leaf, upstream.repeat(1, repeats, 1))
        results.append((out[:, -1000:].detach().clone(), gradient[:, -1000:].clone()))
    assert out.numel() > 2**31
    assert all(map(torch.equal, *results))


X, V = torch.zeros(2, 3, 8), torch.zeros(2, 8)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (([1.0], V, V), TypeError, "x is a list; it needs to be a torch.Tensor"),
        ((X.int(), V, V), TypeError, "x has dtype torch.int32"),
        ((X[0], V, V), ValueError, r"x has shape \(3, 8\); it needs three dimensions: \(B, S, C\)"),
        ((X, V.int(), V), TypeError, "scale has dtype torch.int32"),
        ((X, V[:, None], V), ValueError, r"scale has shape \(2, 1, 8\); .* needs \(2, 8\), without a dim.* tokens"),
        ((X, V, V[:1]), ValueError, r"shift has shape \(1, 8\); with x \(2, 3, 8\) it needs \(2, 8\)"),
        ((X, V, V[:, :4]), ValueError, r"shift has shape \(2, 4\)"),
        ((X, V, V.to("meta")), ValueError, "shift is on meta; it needs to be on x's device cpu"),
        ((X, (V, V, V), V), ValueError, "scale has 3 entries; it needs to be a tensor or a pair"),
        ((X, (V, V), V), ValueError, "shift is a tensor and scale is a pair; both need to be the same"),
        ((X, V, (V, V)), ValueError, "shift is a pair and scale is a tensor"),
        ((X, (V, V[:1]), (V, V)), ValueError, r"scale\[1\] has shape \(1, 8\)"),
    ],
)
def test_errors(implementation, arguments, error, message):
    with torch.device("cpu"), pytest.raises(error, match=message):
        adaln_modulate(*arguments)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"norm": "batch"}, ValueError, "norm is 'batch'; it needs to be one of 'layer', 'rms'"),
        ({"eps": "1e-6"}, TypeError, "eps is a str; it needs to be a float"),
    ],
)
def test_errors_of_options(options, error, message):
    with pytest.raises(error, match=message):
        adaln_modulate(X, V, V, **options)
