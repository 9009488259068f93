import itertools

import pytest
import torch

from dpdmd.kernels import guided_euler_step

pytestmark = pytest.mark.usefixtures("implementation")

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# One element; sizes that fill no vector, warp or block; one dimension only; a latent.
SHAPES = [(1, 1), (1, 113), (3, 1023), (2, 4097), (5,), (3, 4, 6, 10)]


def truth(x, v, t, t_next, uncond, guidance_scale):
    """Each sample apart, in float64. Guidance from the conditional side: v + (s - 1) (v - uncond)."""
    rows = []
    for i in range(len(x)):
        one, cond, other = (tensor[i].double() for tensor in (x, v, uncond))
        rows.append(one - (t[i].double() - t_next[i].double()) * (cond + (guidance_scale - 1) * (cond - other)))
    return torch.stack(rows)


def make(randn, shape, dtype=torch.float32):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    t = torch.linspace(1, 0.5, shape[0], dtype=wide)
    x, v, uncond = (randn(*shape, seed=seed, dtype=dtype) for seed in range(3))
    # A step of 0.3 would put (1 - 3.5) 0.3 g = -0.75 g next to ties of the rounding.
    return x, v, t, 0.77 * t - 0.113, uncond


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 3.5, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(randn, check_rounded_once, shape, dtype, guidance_scale):
    x, v, t, t_next, uncond = make(randn, shape, dtype)
    got = guided_euler_step(x, v, t, t_next, v_uncond=uncond, guidance_scale=guidance_scale)
    assert got.dtype == dtype
    check_rounded_once(got, truth(x, v, t, t_next, uncond, guidance_scale))


@pytest.mark.parametrize(
    "layout", ["channels_last", "transposed", "sliced", "batch_sliced", "padded", "chunked", "expanded"]
)
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1, 2)])
def test_strides(randn, restride, check_rounded_once, which, layout):
    x, v, t, t_next, uncond = make(randn, (3, 4, 6, 10))
    x, v, uncond = (restride(y, layout) if i in which else y for i, y in enumerate((x, v, uncond)))
    got = guided_euler_step(x, v, t, t_next, v_uncond=uncond, guidance_scale=3.5)
    check_rounded_once(got, truth(x, v, t, t_next, uncond, 3.5))


def test_result_has_the_samples_dtype(randn, check_rounded_once):
    x, v, t, t_next, uncond = make(randn, (3, 1023))
    v, uncond = v.bfloat16(), uncond.half()
    got = guided_euler_step(x, v, t, t_next, v_uncond=uncond, guidance_scale=3.5)
    assert got.dtype == torch.float32
    check_rounded_once(got, truth(x, v, t, t_next, uncond, 3.5))
    assert guided_euler_step(v, x, t, t_next).dtype == torch.bfloat16


@pytest.mark.parametrize(("as_t", "as_t_next"), [(float, float), (float, None), (None, float)])
def test_times_as_floats(randn, as_t, as_t_next):
    x, v, *_ = make(randn, (3, 113))
    t, t_next = torch.full((3,), 0.858), torch.full((3,), 0.602)
    got = guided_euler_step(x, v, 0.858 if as_t else t, 0.602 if as_t_next else t_next)
    torch.testing.assert_close(got, guided_euler_step(x, v, t, t_next))


def test_one_step_from_noise_along_the_true_velocity_is_the_sample(randn):
    noise, clean = randn(2, 113), randn(2, 113, seed=1)
    torch.testing.assert_close(guided_euler_step(noise, noise - clean, 1.0, 0.0), clean)


def test_guidance_of_one_does_not_read_the_unconditional_velocity(randn):
    x, v, t, t_next, uncond = make(randn, (3, 113))
    uncond.fill_(float("nan"))
    assert torch.equal(guided_euler_step(x, v, t, t_next, v_uncond=uncond), guided_euler_step(x, v, t, t_next))


@pytest.mark.float64
def test_two_steps_of_a_student_gradcheck(randn):
    """The student's rollout: the second velocity depends on the first step, the gradient goes through both."""
    weight = 0.4 * randn(5, 5, seed=3, dtype=torch.float64)
    times = [torch.ones(3).double(), torch.tensor([0.858, 0.7, 0.6]).double(), 0.0]

    def student(x, weight):
        for t, t_next in itertools.pairwise(times):
            x = guided_euler_step(x, torch.tanh(x @ weight), t, t_next, v_uncond=x @ weight.T, guidance_scale=3.5)
        return x

    noise = randn(3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(student, (noise.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_against_float64(randn, check_rounded_once, dtype):
    x, v, t, t_next, uncond = make(randn, (3, 1023), dtype)
    leaves = [tensor.requires_grad_() for tensor in (x, v, uncond)]
    upstream = randn(3, 1023, seed=9, dtype=dtype)
    out = guided_euler_step(x, v, t, t_next, v_uncond=uncond, guidance_scale=3.5)
    wide = [tensor.detach().double().requires_grad_() for tensor in leaves]
    exact = torch.autograd.grad(truth(*wide[:2], t, t_next, wide[2], 3.5), wide, upstream.double())
    for got, expected in zip(torch.autograd.grad(out, leaves, upstream), exact, strict=True):
        assert got.dtype == dtype
        check_rounded_once(got, expected)


def test_only_what_requires_a_gradient_receives_one(randn):
    x, v, t, t_next, uncond = make(randn, (3, 113))
    v.requires_grad_()
    guided_euler_step(x, v, t, t_next, v_uncond=uncond, guidance_scale=3.5).sum().backward()
    torch.testing.assert_close(v.grad, (3.5 * (t_next - t))[:, None].expand(3, 113))
    assert x.grad is None and uncond.grad is None
    with torch.no_grad():
        assert not guided_euler_step(x, v, t, t_next).requires_grad


def test_saves_no_activations(randn):
    x, v, t, t_next, uncond = make(randn, (3, 1023))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        guided_euler_step(x.requires_grad_(), v.requires_grad_(), t, t_next, v_uncond=uncond, guidance_scale=3.5)
    assert sum(tensor.numel() for tensor in saved) <= 6  # the times of each sample


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_batch(dtype):
    empty, none = torch.empty(0, 4, 3, dtype=dtype), torch.empty(0)
    assert guided_euler_step(empty, empty, none, none, v_uncond=empty, guidance_scale=2.0).shape == (0, 4, 3)


def test_compiles_to_one_graph_and_repeats(randn):
    torch._dynamo.reset()
    compiled = torch.compile(guided_euler_step, fullgraph=True, backend="aot_eager")
    x, v, t, t_next, uncond = make(randn, (3, 113), torch.bfloat16)
    v.requires_grad_()
    for times in ((t, t_next), (1.0, 0.858), (t, 0.1)):
        options = {"v_uncond": uncond, "guidance_scale": 3.5}
        plain = guided_euler_step(x, v, *times, **options)
        assert torch.equal(plain, guided_euler_step(x, v, *times, **options))
        out = compiled(x, v, *times, **options)
        torch.testing.assert_close(out, plain)
        expected = torch.autograd.grad(plain.sum(), v)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), v), expected)


def test_guidance_needs_the_unconditional_velocity(randn):
    with pytest.raises(ValueError, match=r"guidance_scale=3\.5 needs v_uncond, the unconditional output, and got None"):
        guided_euler_step(randn(2, 5), randn(2, 5), 1.0, 0.5, guidance_scale=3.5)
