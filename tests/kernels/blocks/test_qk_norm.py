import functools
import importlib

import pytest
import torch

from dpdmd.kernels import TokenStream, qk_norm, qk_norm_rope, use_backend
from dpdmd.kernels.runtime import launch

module = importlib.import_module("dpdmd.kernels.blocks.qk_norm")  # the package has the function under that name

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
VECTORS = ("q_weight", "k_weight", "q_bias", "k_bias", "v_bias")


def implementations(*names):
    """Runs a test, or those of a class, on these."""

    def decorate(test):
        test = pytest.mark.usefixtures("implementation")(test)
        return pytest.mark.parametrize("implementation", names, indirect=True)(test)

    return decorate


both = implementations("reference", "triton")


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter takes some 20 ms for a program, however little there is to add up in it."""
    if launch.INTERPRETED:
        monkeypatch.setattr(module, "SUM_COLUMNS", 1024)


@pytest.fixture
def make(randn):
    """Streams with so many tokens each, and all their tensors by name, such as q_weight1."""

    def streams(batch, lengths, heads, dim, dtype=torch.float32, packed=True, vectors=VECTORS, vector_dtype=None):
        leaves = {}
        for i, length in enumerate(lengths, start=1):
            qkv = 0.5 + randn(batch, length, 3, heads, dim, seed=i, dtype=dtype)
            parts = {"qkv": qkv} if packed else dict(zip("qkv", (x.contiguous() for x in qkv.unbind(2)), strict=True))
            for seed, name in enumerate(VECTORS, start=10 * i):
                if name in vectors:
                    size = dim if name.endswith("weight") else heads * dim
                    parts[name] = randn(size, seed=seed, dtype=vector_dtype or dtype)
            leaves |= {f"{name}{i}": x.requires_grad_() for name, x in parts.items()}
        return of(leaves), leaves

    return streams


def of(leaves):
    """The streams of such tensors."""
    streams = []
    for i in (1, 2):
        get = {name[:-1]: x for name, x in leaves.items() if name.endswith(str(i))}.get
        if get("qkv") is not None or get("q") is not None:
            qkv = (get("q"), get("k"), get("v")) if get("qkv") is None else get("qkv")
            bias = get("q_bias"), get("k_bias"), get("v_bias")
            if all(x is None for x in bias):
                bias = None
            streams.append(TokenStream(qkv, get("q_weight"), get("k_weight"), bias))
    return streams


def truth(leaves, eps, cos=None, sin=None, interleaved=True):
    """In float64, by the book."""

    def turned(x):
        dim = x.shape[-1]
        i = torch.arange(dim)
        pair, other, minus = (i // 2, i ^ 1, i % 2 == 0)
        if not interleaved:
            pair, other, minus = i % (dim // 2), (i + dim // 2) % dim, i < dim // 2
        column = i if cos.shape[1] == dim else pair
        c, s = (angle.double()[:, None, column] for angle in (cos, sin))
        return x * c + torch.where(minus, -x[..., other], x[..., other]) * s

    joint = {"q": [], "k": [], "v": []}
    for stream in of({name: x.double() for name, x in leaves.items()}):
        parts = stream.qkv.unbind(2) if isinstance(stream.qkv, torch.Tensor) else stream.qkv
        weights = {"q": stream.q_weight, "k": stream.k_weight, "v": None}
        for name, x, bias in zip("qkv", parts, stream.bias or (None, None, None), strict=True):
            if bias is not None:
                x = (x.flatten(2) + bias).view(x.shape)
            if eps is not None and name != "v":
                x = x / ((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps) ** 0.5
            joint[name].append(x if weights[name] is None else x * weights[name])
    q, k, v = (torch.cat(streams, 1) for streams in joint.values())
    return (q, k, v) if cos is None else (turned(q), turned(k), v)


@pytest.fixture
def check(randn, check_rounded_once, relative_error):
    """Results and the gradients of all tensors against float64, each one rounding from it."""

    def against_truth(made, eps=1e-6, **rotation):
        streams, leaves = made
        got = qk_norm_rope(*streams, eps=eps, **rotation) if rotation else qk_norm(*streams, eps=eps)
        exact = truth(leaves, eps, **rotation)
        for one, right in zip(got, exact, strict=True):
            assert one.is_contiguous() and one.dtype == next(iter(leaves.values())).dtype
            check_rounded_once(one, right)
        upstream = [randn(*one.shape, seed=90 + i, dtype=one.dtype) for i, one in enumerate(got)]
        gradients = torch.autograd.grad(got, list(leaves.values()), upstream)
        doubles = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
        exact = truth(doubles, eps, **rotation)
        exact = torch.autograd.grad(exact, list(doubles.values()), [one.double() for one in upstream])
        for (name, x), one, right in zip(leaves.items(), gradients, exact, strict=True):
            assert one.dtype == x.dtype and one.shape == x.shape
            # Sums over tokens add float32's rounding to that of the result.
            limit = {torch.float64: 1e-12, torch.float32: 3e-6}.get(x.dtype, 0.6 * torch.finfo(x.dtype).eps)
            assert relative_error(one, right) < limit, name

    return against_truth


def angles(tokens, width):
    """Numbers that are no angle's, so that each one's part in the result shows."""
    generator = torch.Generator("cpu").manual_seed(5)
    both = torch.randn(2, tokens, width, generator=generator, device="cpu").to(torch.get_default_device())
    return both.unbind(0)


@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [True, False])
def test_two_streams(make, check, dtype, packed):
    check(make(2, (2, 3), 3, 16, dtype, packed))


# One token, head and element; heads that are no power of two, in several groups of which the last one is not full;
# elements that are none; a number of them that is odd; more rows than a tile of the forward pass has.
@both
@pytest.mark.parametrize(
    ("batch", "lengths", "heads", "dim"),
    [(1, (1,), 1, 2), (1, (2,), 24, 64), (1, (1, 2), 9, 64), (1, (2, 3), 4, 96), (1, (3, 1), 5, 128), (2, (3,), 3, 7)],
)
def test_shapes(make, check, batch, lengths, heads, dim):
    check(make(batch, lengths, heads, dim))


@both
@pytest.mark.parametrize("programs", [1, 5])
def test_many_tokens(make, check, monkeypatch, programs):
    """113: several tiles, the last one not full. In the backward pass one walk along all tokens of a stream, and four
    of 32 at most."""
    monkeypatch.setattr(module, "PROGRAMS", programs)
    module._chunk.cache_clear()
    check(make(1, (113, 7), 2, 24))
    module._chunk.cache_clear()


@both
def test_the_constants_of_the_sums(make, check, monkeypatch):
    """Several programs, whose columns are of a bias and a weight, and the second stream's."""
    monkeypatch.setattr(module, "SUM_COLUMNS", 32)
    monkeypatch.setattr(module, "SUM_ROWS", 2)
    check(make(3, (3, 2), 3, 16))


@both
@pytest.mark.parametrize("one_angle", [False, True])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("lengths", "heads", "dim"), [((2, 5), 3, 16), ((5,), 2, 40)])
def test_rotation(make, check, lengths, heads, dim, interleaved, one_angle):
    cos, sin = angles(sum(lengths), dim // 2 if one_angle else dim)
    check(make(1, lengths, heads, dim), cos=cos, sin=sin, interleaved=interleaved)


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rotation_of_other_dtypes(make, check, dtype):
    cos, sin = (x.double() if dtype == torch.float64 else x for x in angles(7, 16))
    check(make(1, (2, 5), 3, 16, dtype), cos=cos, sin=sin)


@both
@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_is_that_of_diffusers(make, interleaved):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    streams, _ = make(2, (3, 4), 2, 16)
    cos, sin = angles(7, 16)
    *q_and_k, v = qk_norm(*streams)
    got = qk_norm_rope(*streams, cos=cos, sin=sin, interleaved=interleaved)
    for one, plain in zip(got[:2], q_and_k, strict=True):
        dim = -1 if interleaved else -2
        turned = embeddings.apply_rotary_emb(plain, (cos, sin), use_real_unbind_dim=dim, sequence_dim=1)
        torch.testing.assert_close(one, turned)
    assert torch.equal(got[2], v)


@both
def test_rotation_is_that_of_complex_numbers(make):
    """Qwen-Image's: parts of complex frequencies, which have a number between each and the next."""
    streams, _ = make(2, (3, 4), 2, 16)
    frequencies = torch.polar(torch.ones(7, 8), angles(7, 8)[0])
    q, _, _ = qk_norm(*streams)
    got, _, _ = qk_norm_rope(*streams, cos=frequencies.real, sin=frequencies.imag)
    turned = torch.view_as_complex(q.unflatten(-1, (-1, 2))) * frequencies[:, None]
    torch.testing.assert_close(got, torch.view_as_real(turned).flatten(-2))


@both
def test_angles_receive_no_gradient(make):
    streams, _ = make(1, (3,), 2, 16)
    cos, sin = (x.requires_grad_() for x in angles(3, 16))
    q, _, _ = qk_norm_rope(*streams, cos=cos, sin=sin)
    assert torch.autograd.grad(q.sum(), (cos, sin), allow_unused=True) == (None, None)
    q, _, _ = qk_norm_rope(TokenStream(streams[0].qkv.detach()), cos=cos, sin=sin)
    assert not q.requires_grad


@both
@pytest.mark.parametrize("vectors", [(), ("q_weight", "k_weight"), ("v_bias",), ("q_bias", "k_weight")])
def test_vectors_that_are_not_there(make, check, vectors):
    check(make(1, (5, 3), 3, 16, vectors=vectors))


@both
@pytest.mark.parametrize("missing", ["q_weight1", "v_bias2"])
def test_streams_that_are_not_alike(make, check, missing):
    """Each has a launch of its own."""
    _, leaves = make(2, (5, 3), 3, 16)
    del leaves[missing]
    check((of(leaves), leaves))


@both
@pytest.mark.parametrize("vectors", [(), ("q_bias", "k_bias", "v_bias")])
@pytest.mark.parametrize("rotation", [False, True])
def test_no_norm(make, check, vectors, rotation):
    cos, sin = angles(5, 16)
    check(make(1, (2, 3), 3, 16, vectors=vectors), eps=None, **({"cos": cos, "sin": sin} if rotation else {}))


@both
def test_packing_alone_changes_no_bit(make):
    (stream,), _ = make(2, (5,), 3, 16, torch.bfloat16, vectors=())
    for got, x in zip(qk_norm(stream, eps=None), stream.qkv.unbind(2), strict=True):
        assert torch.equal(got, x)


@both
@pytest.mark.parametrize("eps", [3.0, 1])
def test_eps_of_the_size_of_the_elements(make, check, eps):
    check(make(1, (5,), 2, 16), eps=eps)


@both
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_no_eps_added(make, check):
    """The rows past the last token, all zero, have no norm then."""
    check(make(1, (5,), 3, 16, vectors=("q_weight", "k_weight")), eps=0.0)


@both
def test_mixed_dtypes(make, check):
    check(make(1, (5, 3), 2, 16, torch.bfloat16, vector_dtype=torch.float32))
    _, leaves = make(1, (5, 3), 2, 16, torch.float16)
    leaves["q_weight1"] = leaves["q_weight1"].detach().bfloat16().requires_grad_()
    leaves["k_bias2"] = leaves["k_bias2"].detach().float().requires_grad_()
    check((of(leaves), leaves))


def everything(streams, leaves, upstream, **rotation):
    """Results and gradients, those of a packed projection apart."""
    out = qk_norm_rope(*streams, **rotation) if rotation else qk_norm(*streams)
    named = dict(zip("QKV", out, strict=True))
    for name, x in zip(leaves, torch.autograd.grad(out, list(leaves.values()), upstream), strict=True):
        if name.startswith("qkv"):
            named |= {f"{part}{name[3:]}": x[:, :, i] for i, part in enumerate("qkv")}
        else:
            named[name] = x
    return named


def check_same(got, expected, implementation):
    """To the bit; PyTorch's sums may take another order for other strides."""
    assert got.keys() == expected.keys()
    for name, x in got.items():
        if implementation == "reference":
            torch.testing.assert_close(x, expected[name], msg=name)
        else:
            assert torch.equal(x, expected[name]), name


@both
def test_packed_and_separate_projections_agree_to_the_bit(make, randn, implementation):
    upstream = [randn(1, 5, 3, 16, seed=seed, dtype=torch.bfloat16) for seed in range(3)]
    streams, leaves = make(1, (2, 3), 3, 16, torch.bfloat16)
    _, separate = make(1, (2, 3), 3, 16, torch.bfloat16, packed=False)
    expected = everything(streams, leaves, upstream)
    for unpacked in ("12", "1", "2"):
        some = {name: x for name, x in leaves.items() if name[-1] not in unpacked}
        some |= {name: x for name, x in separate.items() if name[-1] in unpacked}
        check_same(everything(of(some), some, upstream), expected, implementation)


def nan_like(x):
    return torch.full_like(x, float("nan"))


LAYOUTS = {
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other token": lambda x: torch.stack([x, nan_like(x)], 2).flatten(1, 2)[:, ::2],
    "of a larger product": lambda x: torch.cat([x, nan_like(x)], 2)[:, :, : x.shape[2]],
    "every other element": lambda x: torch.stack([x, nan_like(x)], -1).flatten(-2)[..., ::2],
    "elements first": lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
}


@both
@pytest.mark.parametrize("packed", [True, False])
def test_strides_of_projections(make, randn, implementation, packed):
    upstream = [randn(2, 3, 3, 16, seed=seed) for seed in range(3)]
    _, leaves = make(2, (3,), 3, 16, packed=packed)
    expected = everything(of(leaves), leaves, upstream)
    names = [name for name in leaves if name[:-1] not in VECTORS]
    cases = [(layout, names) for layout in LAYOUTS] + ([] if packed else [("every other token", ["k1"])])
    for layout, changed in cases:
        new = {name: LAYOUTS[layout](leaves[name].detach()).requires_grad_() for name in changed}
        check_same(everything(of(leaves | new), leaves | new, upstream), expected, implementation)


@implementations("triton")
def test_projections_of_a_larger_product_are_not_copied():
    """Slices of its rows: what the kernels read is what was given."""
    packed = torch.zeros(2, 5, 200)[..., 8:152].unflatten(-1, (3, 3, 16))
    tensors, distance = module._readable(packed, None, None)
    assert all(x is packed for x in tensors) and distance == 48
    parts = packed.unbind(2)
    tensors, distance = module._readable(*parts)
    assert all(x is part for x, part in zip(tensors, parts, strict=True)) and distance == 0
    for other in (LAYOUTS["heads first"](parts[0]), torch.zeros(2, 5, 3, 16)):
        tensors, _ = module._readable(other, *parts[1:])
        assert len({x.stride() for x in tensors}) == 1


@both
def test_strides_of_upstream_gradients(make, randn, implementation):
    """An attention's backward pass may hand over (B, H, S, D) transposed; a sum one element for all."""
    streams, leaves = make(2, (2, 3), 3, 16)
    upstream = [randn(2, 5, 3, 16, seed=seed) for seed in range(3)]
    expected = everything(streams, leaves, upstream)
    for layout in ("heads first", "every other token", "every other element"):
        changed = [LAYOUTS[layout](x) for x in upstream]
        check_same(everything(streams, leaves, changed), expected, implementation)
    one_like_no_other = [upstream[0], LAYOUTS["heads first"](upstream[1]), upstream[2]]
    check_same(everything(streams, leaves, one_like_no_other), expected, implementation)
    one_for_all = [x[:1, :1, :1, :1].expand_as(x) for x in upstream]
    expected = everything(streams, leaves, [x.contiguous() for x in one_for_all])
    check_same(everything(streams, leaves, one_for_all), expected, implementation)


@both
@pytest.mark.parametrize("packed", [True, False])
def test_results_that_nothing_uses(make, randn, packed):
    """They have no gradient, which is 0."""
    streams, leaves = make(1, (2, 3), 2, 16, packed=packed)
    upstream = [randn(1, 5, 2, 16, seed=i) for i in range(3)]
    for used in ((0,), (1, 2)):
        zeroed = [upstream[i] if i in used else torch.zeros_like(upstream[i]) for i in range(3)]
        expected = torch.autograd.grad(qk_norm(*streams), list(leaves.values()), zeroed)
        out = qk_norm(*streams)
        some = [out[i] for i in used], list(leaves.values()), [upstream[i] for i in used]
        got = torch.autograd.grad(*some, allow_unused=True)
        for name, one, right in zip(leaves, got, expected, strict=True):
            assert torch.equal(torch.zeros_like(right) if one is None else one, right), name


@both
@pytest.mark.parametrize("packed", [True, False])
def test_gradients_go_where_they_are_needed(make, randn, implementation, packed):
    """The same, bit for bit, whatever else is needed."""
    streams, leaves = make(1, (2, 3), 2, 16, packed=packed)
    upstream = [randn(1, 5, 2, 16, seed=seed) for seed in range(3)]
    gradients = torch.autograd.grad(qk_norm(*streams), list(leaves.values()), upstream)
    expected = dict(zip(leaves, gradients, strict=True))
    if packed:
        cases = [("qkv1",), ("qkv2", "q_weight1"), ("k_weight2",), ("k_bias1", "v_bias2"), ("qkv1", "q_bias2")]
    else:
        cases = [("q1",), ("k2",), ("v1",), ("v2", "q2", "k_bias2"), ("k1", "k_weight2")]
    for needed in cases:
        for name, x in leaves.items():
            x.requires_grad_(name in needed)
            x.grad = None
        with_gradient = [(x, d) for x, d in zip(qk_norm(*streams), upstream, strict=True) if x.requires_grad]
        torch.autograd.backward(*zip(*with_gradient, strict=True))
        assert {name for name, x in leaves.items() if x.grad is not None} == set(needed)
        got = {name: leaves[name].grad for name in needed}
        check_same(got, {name: expected[name] for name in needed}, implementation)


@both
def test_no_gradient_is_asked_for(make):
    streams, leaves = make(1, (5,), 2, 16)
    with torch.no_grad():
        assert not qk_norm(*streams)[0].requires_grad
    for x in leaves.values():
        x.requires_grad_(False)
    assert not qk_norm(*streams)[0].requires_grad


@both
@pytest.mark.parametrize(("batch", "lengths"), [(0, (3, 2)), (2, (0, 3)), (2, (3, 0)), (1, (0,))])
def test_empty(make, randn, batch, lengths):
    """What there is, is as it is alone, and the gradients of the rest are 0."""
    streams, leaves = make(batch, lengths, 2, 16)
    out = qk_norm(*streams)
    assert all(x.shape == (batch, sum(lengths), 2, 16) for x in out)
    upstream = [randn(*x.shape, seed=i) for i, x in enumerate(out)]
    gradients = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), upstream), strict=True))
    alone = [name for name in leaves if batch and lengths[int(name[-1]) - 1]]
    for name, x in leaves.items():
        assert gradients[name].shape == x.shape and (name in alone or not gradients[name].any())
    if alone:
        (there,) = (stream for stream, length in zip(streams, lengths, strict=True) if length)
        expected = qk_norm(there)
        assert all(map(torch.equal, out, expected))
        expected = torch.autograd.grad(expected, [leaves[name] for name in alone], upstream)
        assert all(torch.equal(gradients[name], x) for name, x in zip(alone, expected, strict=True))


@both
def test_repeats_and_compiles(make, randn):
    """One stream packed, one not."""
    upstream = [randn(1, 5, 2, 16, seed=seed, dtype=torch.bfloat16) for seed in range(3)]
    cos, sin = angles(5, 16)

    def call(leaves):
        return qk_norm_rope(*of(leaves), cos=cos, sin=sin)

    def results(function):
        _, leaves = make(1, (2, 3), 2, 16, torch.bfloat16)
        _, others = make(1, (2, 3), 2, 16, torch.bfloat16, packed=False)
        leaves = {name: x for name, x in leaves.items() if name.endswith("1")}
        leaves |= {name: x for name, x in others.items() if name.endswith("2")}
        out = function(leaves)
        return [*out, *torch.autograd.grad(out, list(leaves.values()), upstream)]

    torch._dynamo.reset()
    first = results(call)
    assert all(map(torch.equal, results(call), first))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, results(compiled), first))


@both
def test_second_derivatives_are_refused_or_right(make, implementation):
    (stream,), leaves = make(1, (3,), 2, 16)
    q, _, _ = qk_norm(stream)
    (gradient,) = torch.autograd.grad(q.square().sum(), leaves["qkv1"], create_graph=True)
    if implementation == "reference":
        assert gradient.requires_grad
    else:
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


@implementations("reference")
def test_gradcheck(make):
    _, leaves = make(1, (2, 1), 1, 4, torch.float64)
    cos, sin = (x.double() for x in angles(3, 4))

    def run(*tensors):
        return qk_norm_rope(*of(dict(zip(leaves, tensors, strict=True))), cos=cos, sin=sin)

    assert torch.autograd.gradcheck(run, tuple(leaves.values()))


@implementations("triton")
class TestTriton:
    """What concerns the kernels alone."""

    def test_opcheck(self, make, randn):
        _, leaves = make(1, (5, 3), 2, 16)
        packed = [leaves.get(f"{name}{i}") for i in (1, 2) for name in ("qkv", "", "", *VECTORS[2:], *VECTORS[:2])]
        _, leaves = make(1, (5,), 2, 16, packed=False, vectors=("q_weight", "v_bias"))
        separate = [leaves.get(f"{name}1") for name in ("q", "k", "v", *VECTORS[2:], *VECTORS[:2])]
        packed, separate = ([None if x is None else x.detach() for x in inputs] for inputs in (packed, separate))
        for inputs, lengths in ((packed, [5, 3]), (separate, [5])):
            cos, sin = angles(sum(lengths), 8)
            torch.library.opcheck(torch.ops.dpdmd.qk_norm_triton.default, (inputs, cos, sin, True, 1e-6))
            q, k, v = (randn(1, sum(lengths), 2, 16, seed=seed) for seed in range(3))
            needed = [x is not None for x in inputs]
            options = needed, cos, sin, True, 1e-6, lengths, [x is None for x in inputs[1::8]], torch.float32
            upstream = (q, k, v) if len(lengths) == 2 else (None, k, None)
            torch.library.opcheck(torch.ops.dpdmd.qk_norm_backward_triton.default, (upstream, inputs, *options))

    def test_launches(self, make, randn, monkeypatch):
        """One for two streams that are alike, as compiled code does for nothing else; in the backward pass one more where
        a vector's gradient is needed."""
        seen = []
        for name in ("_qk_norm_kernel", "_qk_norm_backward_kernel", "_vectors_kernel"):
            original = getattr(module, name)
            monkeypatch.setattr(
                module, name, lambda *a, name=name, original=original: (seen.append(name), original(*a))
            )
        upstream = [randn(1, 8, 2, 16, seed=seed) for seed in range(3)]
        streams, leaves = make(1, (5, 3), 2, 16)
        out = qk_norm(*streams)
        torch.autograd.grad(out, list(leaves.values()), upstream, retain_graph=True)
        assert seen == ["_qk_norm_kernel", "_qk_norm_backward_kernel", "_vectors_kernel"]
        seen.clear()
        for name, x in leaves.items():
            x.requires_grad_("qkv" in name)
        torch.autograd.backward(qk_norm(*streams), upstream)
        assert seen == ["_qk_norm_kernel", "_qk_norm_backward_kernel"]
        seen.clear()
        torch.autograd.backward(qk_norm(streams[0]._replace(bias=None), streams[1]), upstream)
        assert seen == 2 * ["_qk_norm_kernel"] + 2 * ["_qk_norm_backward_kernel"]

    @pytest.mark.parametrize(("packed", "eps"), [(True, 1e-6), (False, 1e-6), (True, None)])
    def test_what_is_kept_for_the_backward_pass(self, make, packed, eps):
        """q and k, no v but in a packed projection, and nothing where there is no norm."""
        streams, leaves = make(2, (5, 3), 3, 16, packed=packed, vectors=VECTORS if eps else VECTORS[2:])
        kept = {}

        def pack(x):
            kept[x.untyped_storage().data_ptr()] = x
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            qk_norm(*streams, eps=eps)
        given = {x.data_ptr(): name for name, x in leaves.items()}
        projections = {given[pointer] for pointer in kept} - {f"{name}{i}" for name in VECTORS for i in (1, 2)}
        if eps is None:
            assert not projections
        else:
            assert projections == ({"qkv1", "qkv2"} if packed else {"q1", "k1", "q2", "k2"})

    def test_programs_of_the_backward_pass(self):
        """At the sizes of SD3.5-M and FLUX: no more than run at once, and few idle."""
        for batch, lengths, groups, tokens_each in (
            (4, (4096, 333), 3, 2),
            (8, (4096, 333), 3, 2),
            (4, (4096,), 3, 2),
            (1, (512, 4096), 6, 2),
            (2, (4608,), 6, 2),
        ):
            chunk = module._chunk(batch, lengths, groups, tokens_each)
            programs = groups * sum(batch * -(-length // chunk) for length in lengths)
            assert chunk % tokens_each == 0 and 0.9 * module.PROGRAMS < programs <= module.PROGRAMS

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.gpu
    @pytest.mark.gpu_memory(8)
    @pytest.mark.parametrize(
        ("batch", "lengths", "heads", "dim", "rotation"),
        [(4, (4096, 333), 24, 64, False), (2, (512, 4096), 24, 128, True), (2, (4096, 333), 38, 64, True)],
    )
    def test_sizes_of_models(self, make, randn, relative_error, batch, lengths, heads, dim, rotation):
        """As compiled, with the copies that run ahead: against the reference, and the same bits again."""
        streams, leaves = make(batch, lengths, heads, dim, torch.bfloat16)
        upstream = [randn(batch, sum(lengths), heads, dim, seed=i, dtype=torch.bfloat16) for i in range(3)]
        cos, sin = angles(sum(lengths), dim)
        run = functools.partial(everything, streams, leaves, upstream, **({"cos": cos, "sin": sin} if rotation else {}))
        first = run()
        with use_backend("reference"):
            expected = run()
        for name, x in run().items():
            assert torch.equal(x, first[name]), name
            assert relative_error(x, expected[name]) < 4e-3, name

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.gpu
    @pytest.mark.gpu_memory(24)
    def test_more_than_2_to_31_elements(self, make, randn, relative_error):
        """Projections of 2^31 elements and more: the last tokens of a long sample."""
        heads, dim, length = 24, 128, 2**31 // (3 * 24 * 128) + 100
        qkv = torch.randn(1, 512, 3, heads, dim, dtype=torch.bfloat16).repeat(1, length // 512 + 1, 1, 1, 1)
        qkv = qkv[:, :length].contiguous().requires_grad_()
        last = qkv.detach()[:, -100:].clone().requires_grad_()
        out, expected = qk_norm(TokenStream(qkv)), qk_norm(TokenStream(last))
        upstream = [randn(1, 100, heads, dim, seed=i, dtype=torch.bfloat16) for i in range(3)]
        for one, other in zip(out, expected, strict=True):
            assert torch.equal(one[:, -100:], other)
        (gradient,) = torch.autograd.grad([x[:, -100:] for x in out], qkv, upstream)
        (expected,) = torch.autograd.grad(expected, last, upstream)
        assert torch.equal(gradient[:, -100:], expected) and not gradient[:, :-100].any()


@both
def test_errors(make, implementation):
    (stream,), _ = make(1, (3,), 2, 16)
    (separate,), _ = make(1, (3,), 2, 16, packed=False)
    q, k, v = separate.qkv
    cos, sin = angles(3, 16)

    def refused(error, match, *streams, **options):
        with pytest.raises(error, match=match):
            qk_norm_rope(*streams, **options) if "cos" in options else qk_norm(*streams, **options)

    refused(ValueError, "got 0 streams of tokens; it needs one or two")
    refused(ValueError, "got 3 streams", stream, stream, stream)
    refused(TypeError, "a stream is a Tensor; it needs to be a TokenStream", stream.qkv)
    refused(TypeError, "qkv is a tuple of 2; it needs to be a tensor", stream._replace(qkv=(q, k)))
    refused(TypeError, "qkv is a NoneType", stream._replace(qkv=None))
    refused(TypeError, "k is a NoneType; it needs to be a torch.Tensor", stream._replace(qkv=(q, None, v)))
    refused(TypeError, "qkv has dtype torch.int64", stream._replace(qkv=stream.qkv.long()))
    refused(ValueError, r"qkv has shape \(1, 3, 2, 16\); it needs \(B, S, 3, H, D\)", stream._replace(qkv=q))
    refused(ValueError, r"qkv has shape \(1, 3, 2, 2, 16\); it", stream._replace(qkv=stream.qkv[:, :, :2]))
    refused(ValueError, r"v has shape \(1, 3, 32\); it needs \(B, S, H, D\)", stream._replace(qkv=(q, k, v.flatten(2))))
    refused(ValueError, r"v has shape \(1, 2, 2, 16\); it needs .* and S = 3", stream._replace(qkv=(q, k, v[:, :2])))
    refused(ValueError, "it needs B, H, D = 1, 2, 16", stream, stream._replace(qkv=stream.qkv[:, :, :, :1]))
    refused(
        TypeError, "k has dtype torch.bfloat16; it needs .*torch.float32", stream._replace(qkv=(q, k.bfloat16(), v))
    )
    refused(ValueError, "v is on meta; it needs to be on", stream._replace(qkv=(q, k, v.to("meta"))))
    refused(ValueError, r"q_weight has shape \(8,\); it needs \(16,\)", stream._replace(q_weight=stream.q_weight[:8]))
    refused(TypeError, "k_weight is a float; it needs to be a torch.Tensor", stream._replace(k_weight=1.0))
    refused(
        ValueError, r"bias of v has shape \(16,\); it needs \(32,\)", stream._replace(bias=(None, None, v[0, 0, 0]))
    )
    refused(ValueError, "bias of q is on meta", stream._replace(bias=(stream.bias[0].to("meta"), None, None)))
    refused(TypeError, "bias is a Tensor; it needs to be those of q, k and v", stream._replace(bias=stream.bias[0]))
    refused(ValueError, "eps is None, which means no norm, but there is a weight", stream, eps=None)
    refused(TypeError, "eps is a str; it needs to be a float", stream, eps="1")
    refused(ValueError, r"cos has shape \(2, 16\); it needs \(3, 16\) or \(3, 8\)", stream, cos=cos[:2], sin=sin)
    refused(ValueError, r"sin has shape \(3, 8\); it needs cos's shape \(3, 16\)", stream, cos=cos, sin=sin[:, :8])
    refused(TypeError, "cos has dtype torch.bfloat16; it needs float32", stream, cos=cos.bfloat16(), sin=sin)
    refused(TypeError, "cos has dtype torch.complex64", stream, cos=torch.complex(cos, sin), sin=sin)
    refused(ValueError, "sin is on meta", stream, cos=cos, sin=sin.to("meta"))
    refused(TypeError, "interleaved is a int; it needs to be a bool", stream, cos=cos, sin=sin, interleaved=1)
    (odd,), _ = make(1, (3,), 2, 5)
    refused(ValueError, "the projections have D = 5; a rotary embedding needs an even one", odd, cos=cos, sin=sin)
    if implementation == "triton":
        double = stream._replace(q_weight=stream.q_weight.double())
        refused(RuntimeError, "qk_norm has no 'triton' implementation here: only the reference takes float64", double)
