import math

import pytest
import torch

from dpdmd.kernels import Philox, renoise, use_backend
from dpdmd.kernels.runtime.philox import _box_muller, philox4x32

COUNT = 1 << 20


def words(*values):
    return tuple(torch.tensor([value]) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the published vectors of Random123
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_published_vectors(counter, key, expected):
    assert philox4x32(words(*counter), key) == words(*expected)


def test_the_formula():
    """Elements 4 and 7: counter 1, its first pair's cosine and its second's sine, in float64."""
    r0, r1, r2, r3 = (word.item() for word in philox4x32(words(1, 0, 0, 0), (5, 3)))
    noise = Philox(3 * 2**32 + 5).normal((3, 3)).flatten()

    def radius(r):
        return math.sqrt(-2 * math.log((r + 0.5) / 2**32))

    assert noise[4].item() == pytest.approx(radius(r0) * math.cos(2 * math.pi * r1 / 2**32), rel=1e-6)
    assert noise[7].item() == pytest.approx(radius(r2) * math.sin(2 * math.pi * r3 / 2**32), rel=1e-6)


def test_the_largest_radius():
    """Of r_0 = 0, where 1 / 2 is what keeps the logarithm finite; and of the largest r_0, 0."""
    cos, sin = _box_muller(torch.tensor([0, 2**32 - 1]), torch.tensor([0, 2**30]))
    assert cos[0].item() == pytest.approx(math.sqrt(66 * math.log(2)), rel=1e-6) and sin[0] == 0
    assert cos[1] == 0 and sin[1] == 0


def test_moments_and_tails():
    """Of a million: each within five standard errors."""
    noise = Philox.of(0, "moments").normal((COUNT,)).double()
    error = 1 / math.sqrt(COUNT)
    assert abs(noise.mean()) < 5 * error
    assert abs(noise.var() - 1) < 5 * error * math.sqrt(2)
    assert abs((noise**3).mean()) < 5 * error * math.sqrt(15)
    assert abs((noise**4).mean() - 3) < 5 * error * math.sqrt(96)
    for threshold in (1, 2, 3, 4):
        share = math.erfc(threshold / math.sqrt(2))
        assert abs((noise.abs() > threshold).double().mean() - share) < 5 * error * math.sqrt(share)
    assert 4.5 < noise.abs().max() < 6.8
    assert noise.isfinite().all()


def test_neighbours_and_keys_are_uncorrelated():
    noise = Philox(12345).normal((COUNT,)).double()
    bound = 5 / math.sqrt(COUNT)
    for step in (1, 2, 3, 4, 64):
        for power in (1, 2):  # the squares of a pair that shares its radius would correlate
            one, other = noise[:-step] ** power, noise[step:] ** power
            assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < bound
    for key in (12344, 12345 + 2**32, Philox.of(12345).key):
        other = Philox(key).normal((COUNT,)).double()
        assert abs(torch.corrcoef(torch.stack([noise, other]))[0, 1]) < bound


def test_noise_depends_on_key_and_index_alone():
    noise = Philox(7).normal((4, 5, 6))
    assert torch.equal(noise, Philox(7).normal((4, 5, 6)))
    assert torch.equal(noise[:2], Philox(7).normal((2, 5, 6)))
    assert torch.equal(noise.flatten()[:7], Philox(7).normal((7,)))
    assert torch.equal(Philox(7).normal((4, 5, 6), dtype=torch.bfloat16), noise.bfloat16())
    assert not torch.equal(noise, Philox(8).normal((4, 5, 6)))
    assert Philox(7).normal((0, 3)).shape == (0, 3)


def test_keys():
    assert Philox.of(0, 3, "student", 1) == Philox.of(0, 3, "student", 1)
    keys = {
        Philox.of(seed, iteration, role, shard).key
        for seed in range(3)
        for iteration in range(20)
        for role in ("student", "critic")
        for shard in (0, 1, "shared")
    }
    assert len(keys) == 3 * 20 * 2 * 3
    assert all(0 <= key < 2**63 for key in keys) and max(keys) > 2**62


@pytest.mark.parametrize("key", [-1, 2**63])
def test_key_out_of_range(key):
    with pytest.raises(ValueError, match=rf"^key is {key}; it needs to be in \[0, 2\*\*63\)"):
        Philox(key)


@pytest.mark.parametrize("key", [1.0, True, None])
def test_key_of_another_type(key):
    with pytest.raises(TypeError, match=f"^key is a {type(key).__name__}; it needs to be an int"):
        Philox(key)


class TestRenoise:
    pytestmark = pytest.mark.usefixtures("implementation")

    # One element; samples that end within a counter; a block, one more, and three less, which with the shift of the
    # fifth sample fill a block; a multiple of 8 but not of 16; a latent.
    @pytest.mark.parametrize("shape", [(1, 1), (5,), (3, 113), (2, 4097), (2, 4096), (5, 4093), (3, 40), (3, 4, 6, 10)])
    @pytest.mark.parametrize("key", [0, 5, 2**63 - 1])
    @pytest.mark.parametrize("form", ["flow", "alpha_sigma", "float"])
    def test_is_that_noise(self, randn, relative_error, shape, key, form):
        x, t = randn(*shape), torch.linspace(0.1, 0.9, shape[0])
        t = {"flow": t, "alpha_sigma": (0.5 * t, t), "float": 0.3}[form]
        noise = Philox(key).normal(shape, device=x.device)
        with use_backend("reference"):
            expected = renoise(x, noise, t)
        assert relative_error(renoise(x, Philox(key), t), expected) < 3e-6

    def test_noise_itself(self, randn, relative_error):
        """sigma = 1, alpha = 0: to the rounding of log, cos and sin."""
        x = randn(3, 1023)
        noise = Philox(3).normal((3, 1023), device=x.device)
        torch.testing.assert_close(renoise(x, Philox(3), 1.0), noise, rtol=0, atol=2e-6)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_noise_is_not_rounded_before_the_sum(self, randn, check_rounded_once, dtype):
        x, t = randn(3, 113, dtype=dtype), torch.linspace(0.1, 0.9, 3)
        noise = Philox(1).normal((3, 113), device=x.device).double()
        truth = (1 - t.double())[:, None] * x.double() + t.double()[:, None] * noise
        check_rounded_once(renoise(x, Philox(1), t), truth)

    @pytest.mark.parametrize(
        "layout", ["channels_last", "transposed", "sliced", "batch_sliced", "padded", "chunked", "expanded"]
    )
    def test_strides_do_not_matter(self, randn, restride, layout):
        x = randn(3, 4, 6, 10)
        strided = restride(x, layout)
        torch.testing.assert_close(renoise(strided, Philox(1), 0.3), renoise(strided.contiguous(), Philox(1), 0.3))

    def test_gradient_goes_to_the_sample(self, randn):
        x, t = randn(3, 113).requires_grad_(), torch.linspace(0.1, 0.9, 3)
        upstream = randn(3, 113, seed=1)
        (gradient,) = torch.autograd.grad(renoise(x, Philox(1), t), x, upstream)
        torch.testing.assert_close(gradient, (1 - t)[:, None] * upstream)

    def test_repeats_and_keys_differ(self, randn):
        x = randn(3, 4097)
        assert torch.equal(renoise(x, Philox(1), 0.5), renoise(x, Philox(1), 0.5))
        assert not torch.equal(renoise(x, Philox(1), 0.5), renoise(x, Philox(2), 0.5))

    def test_compiles_to_one_graph(self, randn):
        torch._dynamo.reset()
        compiled = torch.compile(renoise, fullgraph=True, backend="aot_eager")
        x = randn(3, 113)
        for key in (1, 2**62 + 1):
            assert torch.equal(compiled(x, Philox(key), 0.5), renoise(x, Philox(key), 0.5))

    def test_empty_batch(self):
        assert renoise(torch.empty(0, 4), Philox(1), 0.5).shape == (0, 4)
        assert renoise(torch.empty(2, 0), Philox(1), torch.ones(2)).shape == (2, 0)
