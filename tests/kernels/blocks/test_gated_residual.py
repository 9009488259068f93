import itertools

import pytest
import torch
import torch.nn.functional as F

from dpdmd.kernels import adaln_modulate, gated_residual, gated_residual_adaln
from dpdmd.kernels.blocks import adaln

pytestmark = [
    pytest.mark.usefixtures("implementation"),
    pytest.mark.parametrize("implementation", ["reference", "triton"], indirect=True),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# One token; tokens that fill no chunk and no tile; a single channel; channels that are no power of two, fill no warp,
# fill no block (1536 of 2048).
SHAPES = [(1, 1, 1536), (1, 37, 24), (3, 5, 1), (1, 9, 96), (9, 2, 40)]
NORMS = {"layer": F.layer_norm, "rms": F.rms_norm}
PARTS = ("residual", "gate", "y", "bias", "scale", "shift")


@pytest.fixture
def inputs(randn):
    """What the operations take by name, in lists of two but for residual; the vectors as chunks of one linear's
    columns as blocks have them."""

    def make(*shape, dtype=torch.float32):
        B, _, C = shape
        chunks = randn(B, 6 * C, seed=1, dtype=dtype).chunk(6, dim=1)
        ys = [randn(*shape, seed=seed, dtype=dtype) for seed in (2, 3)]
        biases = [randn(C, seed=seed, dtype=dtype) for seed in (4, 5)]
        return {
            "residual": [randn(*shape, dtype=dtype)],
            **{"gate": chunks[:2], "y": ys, "bias": biases, "scale": chunks[2:4], "shift": chunks[4:]},
        }

    return make


def first(inputs, gates=1, modulations=1):
    """So many of each."""
    counts = {"scale": modulations, "shift": modulations, "residual": 1}
    return {name: list(part[: counts.get(name, gates)]) for name, part in inputs.items()}


def leaves(inputs, dtype=None):
    return {
        name: [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in part]
        for name, part in inputs.items()
    }


def flat(inputs):
    return [t for name in PARTS for t in inputs[name] if t is not None]


def call(inputs, **options):
    """The operation that the inputs are for. Returns a tuple."""
    arguments = {name: part[0] if len(part) == 1 else tuple(part) for name, part in inputs.items() if part}
    if all(bias is None for bias in inputs["bias"]):
        del arguments["bias"]
    if inputs["scale"]:
        return gated_residual_adaln(**arguments, **options)
    return (gated_residual(**arguments),)


def exact_h(inputs):
    (h,) = inputs["residual"]
    for gate, y, bias in zip(inputs["gate"], inputs["y"], inputs["bias"], strict=True):
        h = h + gate[:, None] * (y if bias is None else y + bias)
    return h


def exact_outs(h, inputs, norm, eps):
    n = NORMS[norm](h, h.shape[-1:], eps=eps)
    return [n * (1 + a[:, None]) + b[:, None] for a, b in zip(inputs["scale"], inputs["shift"], strict=True)]


@pytest.fixture
def check(randn, relative_error, check_rounded_once, implementation):
    """Compare results and all gradients with float64. What is normalised is h as it was rounded: the truth of what
    follows starts from there. `used` says which results have an upstream gradient."""

    def compare(inputs, norm="layer", eps=1e-6, used=(True, True, True)):
        inputs, exact = leaves(inputs), leaves(inputs, torch.float64)  # of the same strides
        h, *_ = results = call(inputs, **({"norm": norm, "eps": eps} if inputs["scale"] else {}))
        rounded = h.detach().double().requires_grad_()
        right_h, right_outs = exact_h(exact), exact_outs(rounded, exact, norm, eps)
        assert all(result.dtype == inputs["residual"][0].dtype for result in results)
        for got, right in zip(results, [right_h, *right_outs], strict=True):
            check_rounded_once(got, right)

        upstream = [randn(*h.shape, seed=90 + i, dtype=h.dtype) for i in range(len(results))]
        at = [i for i in range(len(results)) if used[i]]
        gradients = torch.autograd.grad(
            [results[i] for i in at], flat(inputs), [upstream[i] for i in at], allow_unused=True
        )
        vectors = exact["scale"] + exact["shift"]
        wide = [part.double() * use for part, use in zip(upstream, used, strict=False)]
        dh, *dvectors = torch.autograd.grad([1 * rounded, *right_outs], [rounded, *vectors], wide)
        branches = [t for name in PARTS[:4] for t in exact[name] if t is not None]
        expected = [*torch.autograd.grad(right_h, branches, dh), *dvectors]
        for tensor, got, right in zip(flat(inputs), gradients, expected, strict=True):
            if got is None:
                assert not right.any()
            elif implementation == "reference" and len(results) > 1:  # which rounds dh on its way through h
                assert relative_error(got, right) < max(4 * torch.finfo(t.dtype).eps for t in (got, h))
            else:
                check_rounded_once(got, right)
            assert got is None or got.dtype == tensor.dtype
        return results, gradients

    return compare


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["layer", "rms", None])
def test_dtypes(inputs, check, norm, dtype):
    """Of so many channels that a value next to a tie is less than one in a hundred."""
    tensors = inputs(2, 7, 120, dtype=dtype)
    check(first(tensors, modulations=1), norm) if norm else check(first(tensors, modulations=0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("modulations", [0, 1])
def test_shapes(inputs, check, monkeypatch, modulations, shape):
    if shape[-1] > 1000:
        monkeypatch.setattr(adaln, "SUM_COLUMNS", 256)  # fewer programs, which the interpreter takes its time for
    if shape[-1] > 1 or modulations == 0:  # the deviation of one channel from its mean is 0
        check(first(inputs(*shape), modulations=modulations))


@pytest.mark.parametrize("modulations", [0, 1, 2])
@pytest.mark.parametrize("biased", [(False,), (True, True), (False, False), (False, True), (True, False)])
def test_one_or_two_of_everything(inputs, check, biased, modulations):
    tensors = first(inputs(2, 5, 24), len(biased), modulations)
    tensors["bias"] = [bias if use else None for bias, use in zip(tensors["bias"], biased, strict=True)]
    check(tensors)


@pytest.mark.parametrize("used", [(True, False, False), (False, True, True), (False, False, True), (True, True, False)])
def test_results_of_which_not_all_are_used(inputs, check, used):
    check(inputs(2, 5, 24), used=used)


@pytest.mark.parametrize("programs, rows", [(1, 2), (3, 4), (1000, 64)])
def test_sums_of_any_number_of_chunks(inputs, check, monkeypatch, programs, rows):
    """One chunk a sample, chunks with a rest, one token a chunk; added up a few at a time, with a rest, and at once."""
    monkeypatch.setattr(adaln, "PROGRAMS", programs)
    monkeypatch.setattr(adaln, "MIN_CHUNK", 1)
    monkeypatch.setattr(adaln, "SUM_ROWS", rows)
    check(inputs(3, 11, 40))


def test_eps(inputs, check):
    tensors = inputs(2, 7, 40)
    for name in ("residual", "y", "bias"):
        tensors[name] = [0.1 * t for t in tensors[name]]
    check(tensors, eps=0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_one_operation_after_the_other(inputs, dtype):
    """It is the rounded h that is normalised: to the bit in bfloat16, while in float32 compilers may contract the norm's
    sums differently in the two kernels."""
    tensors = inputs(2, 7, 40, dtype=dtype)
    h, *outs = call(tensors, norm="rms")
    assert torch.equal(h, call(tensors | {"scale": [], "shift": []})[0])
    expected = adaln_modulate(h, tuple(tensors["scale"]), tuple(tensors["shift"]), norm="rms")
    if dtype == torch.float32:
        torch.testing.assert_close(tuple(outs), expected, rtol=1e-6, atol=1e-6)
    else:
        assert all(map(torch.equal, outs, expected))


def test_quantized(inputs, relative_error):
    """As adaln_modulate quantises, but for values that the last bit of a norm turns over; h stays as it is."""
    tensors = inputs(2, 7, 40, dtype=torch.bfloat16)
    h, *outs = call(tensors, quantize=True)
    assert torch.equal(h, call(tensors)[0])
    expected = adaln_modulate(h, tuple(tensors["scale"]), tuple(tensors["shift"]), quantize=True)
    for got, right in zip(outs, expected, strict=True):
        torch.testing.assert_close(got.scale, right.scale, rtol=1e-6, atol=0)
        assert relative_error(got.values.float() * got.scale, right.values.float() * right.scale) < 0.003
    h, out = call(first(tensors), quantize=True)
    assert out.values.dtype == torch.float8_e4m3fn and out.scale.shape == (2, 7, 1) and h.dtype == torch.bfloat16


@pytest.mark.parametrize("name", PARTS)
def test_quantized_has_no_gradient(inputs, name):
    tensors = first(inputs(2, 3, 24))
    tensors[name] = [t.detach().requires_grad_() for t in tensors[name]]
    with pytest.raises(ValueError, match=f"{name} requires a gradient"):
        call(tensors, quantize=True)
    with torch.no_grad():
        assert not call(tensors, quantize=True)[1].scale.requires_grad


def test_without_a_norm_the_residuals_gradient_is_the_results(inputs, randn):
    tensors, upstream = leaves(first(inputs(2, 3, 24), modulations=0)), randn(2, 3, 24, seed=9)
    (h,) = call(tensors)
    (gradient,) = torch.autograd.grad(h, tensors["residual"], upstream)
    assert torch.equal(gradient, upstream)


@pytest.mark.parametrize("shape", [(0, 5, 24), (3, 0, 24), (2, 5, 0)])
@pytest.mark.parametrize("modulations", [0, 2])
def test_empty(inputs, shape, modulations):
    tensors = leaves(first(inputs(*shape), 2, modulations))
    results = call(tensors)
    assert all(result.shape == shape for result in results)
    gradients = torch.autograd.grad(sum(result.sum() for result in results), flat(tensors))
    for tensor, gradient in zip(flat(tensors), gradients, strict=True):
        assert gradient.shape == tensor.shape and not gradient.any()


LAYOUTS = {
    "joint": lambda t: torch.cat([t.new_full((len(t), 3, t.shape[2]), torch.nan), t], 1)[:, 3:],  # a stream's tokens
    "odd": lambda t: torch.cat([t, t.new_full((*t.shape[:2], 3), torch.nan)], 2)[..., :-3],  # no 16-byte boundaries
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(inputs, randn, layout):
    """Of all the tokens of a kind, and of one upstream gradient but not of the other."""
    tensors = first(inputs(2, 3, 32))
    upstream = [randn(2, 3, 32, seed=seed) for seed in (8, 9)]
    results = []
    for which in ((), ("residual",), ("y",), ("upstream",), ("residual", "y", "upstream")):
        parts = leaves(
            tensors | {name: [LAYOUTS[layout](t) for t in tensors[name]] for name in which if name in tensors}
        )
        outs = call(parts)
        above = [LAYOUTS[layout](upstream[0]) if "upstream" in which else upstream[0], upstream[1]]
        results.append((*outs, *torch.autograd.grad(outs, flat(parts), above)))
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["gate", "scale", "bias"])
def test_vectors_of_different_strides(inputs, check, name):
    tensors = inputs(3, 5, 24)
    vector = tensors[name][0]
    column = torch.stack([vector, vector * torch.nan], -1)[..., 0]
    tensors[name] = [column, vector[:1].expand_as(vector)]
    check(tensors)


def test_mixed_dtypes(inputs, check):
    """Float32 tokens beside a bfloat16 branch, as under autocast, and the other way round."""
    tensors = first(inputs(2, 7, 120))
    single, half, brain = torch.float32, torch.float16, torch.bfloat16
    for dtypes in ((single, brain, brain, single, half, single), (brain, single, half, brain, single, half)):
        parts = zip(tensors.items(), dtypes, strict=True)
        check({name: [t.to(dtype) for t in part] for (name, part), dtype in parts})


def test_pair_of_different_dtypes(inputs, check):
    tensors = inputs(2, 7, 120)
    for name in PARTS[1:]:
        tensors[name] = [tensors[name][0], tensors[name][1].bfloat16()]
    check(tensors)


@pytest.mark.parametrize("modulations", [0, 1])
def test_gradients_where_needed_only(inputs, randn, modulations):
    """What is computed for some inputs is to the bit what is computed for all."""
    tensors = first(inputs(1, 2, 8), modulations=modulations)
    upstream = [randn(1, 2, 8, seed=seed) for seed in (8, 9)][: 1 + modulations]
    names = PARTS if modulations else PARTS[:4]
    gradients = {}
    for needed in itertools.product((True, False), repeat=len(names)):
        if sum(needed) > 1 and needed[4:] in ((True, False), (False, True)):
            continue  # scale and shift go together
        parts = {name: [t.detach() for t in part] for name, part in tensors.items()}
        for name, need in zip(names, needed, strict=True):
            parts[name][0].requires_grad_(need)
        results = call(parts)
        assert [result.requires_grad for result in results] == [any(needed[:4]), any(needed)][: 1 + modulations]
        wanted = [(result, part) for result, part in zip(results, upstream, strict=True) if result.requires_grad]
        if wanted:
            torch.autograd.backward(*zip(*wanted, strict=True))
        for name, need in zip(names, needed, strict=True):
            gradient = parts[name][0].grad
            assert (gradient is not None) == need
            if need:
                assert torch.equal(gradient, gradients.setdefault(name, gradient))


def test_one_of_a_pair_needs_gradients(inputs, randn):
    tensors, upstream = inputs(2, 5, 24), [randn(2, 5, 24, seed=seed) for seed in (7, 8, 9)]
    every = leaves(tensors)
    expected = dict(zip(map(id, flat(every)), torch.autograd.grad(call(every), flat(every), upstream), strict=True))
    for i in (0, 1):
        some = {
            n: [t.requires_grad_(len(p) == 2 and j == i) for j, t in enumerate(p)] for n, p in leaves(tensors).items()
        }
        torch.autograd.backward(call(some), upstream)
        for name in PARTS[1:]:
            assert some[name][1 - i].grad is None
            assert torch.equal(some[name][i].grad, expected[id(every[name][i])])


def test_keeps_h_and_y_for_the_backward_pass(inputs, implementation):
    if implementation == "reference":
        pytest.skip("the definition keeps what autograd keeps")
    for needs_gate in (True, False):
        tensors = leaves(first(inputs(2, 7, 40), modulations=2))
        tensors["gate"][0].requires_grad_(needs_gate)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # noqa: B023
            h, *_ = call(tensors)
        y = tensors["y"][0]
        sizeable = [t.data_ptr() for t in kept if t.numel() == y.numel()]
        assert sorted(sizeable) == sorted([h.data_ptr()] + [y.data_ptr()] * needs_gate)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # noqa: B023
            call(tensors | {"scale": [], "shift": []})
        assert [t.data_ptr() for t in kept if t.numel() == y.numel()] == [y.data_ptr()] * needs_gate


def test_inputs_written_to_before_the_backward_pass_are_an_error(inputs):
    tensors = leaves(first(inputs(2, 3, 24)))
    h, out = call(tensors)
    with torch.no_grad():
        tensors["gate"][0] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (h + out).sum().backward()


@pytest.mark.float64
@pytest.mark.parametrize("modulations", [0, 2])
def test_gradcheck(inputs, modulations):
    tensors = leaves(first(inputs(2, 3, 5, dtype=torch.float64), 2, modulations))
    order = [(name, i) for name in PARTS for i in range(len(tensors[name]))]

    def function(*entries):
        parts = {name: [] for name in PARTS}
        for (name, _), entry in zip(order, entries, strict=True):
            parts[name].append(entry)
        return call(parts)

    assert torch.autograd.gradcheck(function, flat(tensors))


@pytest.mark.parametrize("modulations", [0, 2])
def test_compiles_to_one_graph_and_repeats(inputs, randn, modulations):
    torch._dynamo.reset()
    tensors = leaves(first(inputs(2, 7, 40, dtype=torch.bfloat16), 2, modulations))
    tensors["bias"][0] = None
    upstream = [randn(2, 7, 40, seed=seed, dtype=torch.bfloat16) for seed in (7, 8, 9)][: 1 + modulations]
    results = []
    for run in (call, call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        outs = run(tensors)
        results.append((*outs, *torch.autograd.grad(outs, flat(tensors), upstream)))
    assert all(map(torch.equal, results[0], results[1]))
    if modulations == 0 or not torch.cuda.is_available():
        assert all(map(torch.equal, results[0], results[2]))


def test_compiles_without_gradient(inputs):
    torch._dynamo.reset()
    tensors = inputs(2, 7, 40)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(tensors), call(tensors)))
    (_, *outs), (_, *expected) = compiled(tensors, quantize=True), call(tensors, quantize=True)
    for got, right in zip(outs, expected, strict=True):
        assert torch.equal(got.values.float(), right.values.float()) and torch.equal(got.scale, right.scale)


OPERATIONS = {
    "adaln_triton": {
        "two": lambda x, v, b: (x, [v, -v], [x + 1, -x], [b, None], [v + 1, v], [v - 1, v], True, 1e-6, False),
        "no norm": lambda x, v, b: (x, [v], [x + 1], [b], [], [], False, 1e-6, False),
        "no gate": lambda x, v, b: (x, [], [], [], [v], [v - 1], False, 1e-6, False),
        "quantized": lambda x, v, b: (x, [v], [x + 1], [b], [v + 1], [v - 1], False, 1e-6, True),
    },
    "adaln_backward_triton": {
        "all of it": lambda x, v, b: (
            *(x, [v, v], [x, -x], [None, b], [v], x + 1, [x - 1], torch.half, torch.half, False, 1e-6),
            *(True, True, True, True, True),
        ),
        "no norm": lambda x, v, b: (
            *(None, [v], [x], [b], [], x + 1, [], x.dtype, None, False, 1e-6),
            *(False, True, True, True, False),
        ),
        "no gate": lambda x, v, b: (
            *(x, [], [], [], [v, -v], None, [x - 1, -x], None, x.dtype, True, 1e-6),
            *(True, False, False, False, True),
        ),
        "vectors alone": lambda x, v, b: (
            *(x, [v], [x], [None], [v], x + 1, [x - 1], x.dtype, x.dtype, False, 1e-6),
            *(False, True, False, False, True),
        ),
    },
}


@pytest.mark.parametrize("name, case", [(name, case) for name, cases in OPERATIONS.items() for case in cases])
def test_opcheck(randn, implementation, name, case):
    if implementation == "reference":
        pytest.skip("the definition is no registered operation")
    arguments = OPERATIONS[name][case](randn(1, 2, 8), randn(1, 8, seed=1), randn(8, seed=2))
    torch.library.opcheck(getattr(torch.ops.dpdmd, name).default, arguments)


X, V, BIAS = torch.zeros(2, 3, 8), torch.zeros(2, 8), torch.zeros(8)
ARGUMENTS = {"residual": X, "gate": V, "y": X, "bias": BIAS, "scale": V, "shift": V}


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"residual": None}, TypeError, "residual is a NoneType; it needs to be a torch.Tensor"),
        ({"residual": X[0], "y": X[0]}, ValueError, r"residual has shape \(3, 8\); .* three dimensions: \(B, S, C\)"),
        ({"y": X[:, :2]}, ValueError, r"y has shape \(2, 2, 8\); it needs residual's shape \(2, 3, 8\)"),
        ({"y": X.int()}, TypeError, "y has dtype torch.int32"),
        ({"y": X.to("meta")}, ValueError, "y is on meta; it needs to be on residual's device cpu"),
        ({"gate": V[:, None]}, ValueError, r"gate has shape \(2, 1, 8\); .* needs \(2, 8\), without a dim.* tokens"),
        ({"gate": (V, V)}, ValueError, "gate is a pair and y is a tensor; both need to be the same"),
        ({"gate": (V, V), "y": (X, X)}, ValueError, "bias is a tensor and y is a pair; both need to be the same"),
        ({"gate": (V, V), "y": (X, X, X)}, ValueError, "y has 3 entries; it needs to be a tensor or a pair"),
        ({"gate": (V, V), "y": (X, X), "bias": (None, V)}, ValueError, r"bias\[1\] has shape \(2, 8\); .* \(8,\)"),
        ({"bias": BIAS[:4]}, ValueError, r"bias has shape \(4,\); with residual \(2, 3, 8\) it needs \(8,\)"),
        ({"bias": 1.0}, TypeError, "bias is a float; it needs to be a torch.Tensor"),
        ({"scale": V[:1]}, ValueError, r"scale has shape \(1, 8\); with residual \(2, 3, 8\) it needs \(2, 8\)"),
        ({"scale": (V, V)}, ValueError, "shift is a tensor and scale is a pair"),
        ({"norm": "batch"}, ValueError, "norm is 'batch'; it needs to be one of 'layer', 'rms'"),
        ({"eps": None}, TypeError, "eps is a NoneType; it needs to be a float"),
    ],
)
def test_errors(changes, error, message):
    with pytest.raises(error, match=message):
        gated_residual_adaln(**(ARGUMENTS | changes))
    changes = {name: value for name, value in changes.items() if name not in ("scale", "shift", "norm", "eps")}
    if changes:
        with pytest.raises(error, match=message):
            gated_residual(**{name: (ARGUMENTS | changes)[name] for name in PARTS[:4]})
