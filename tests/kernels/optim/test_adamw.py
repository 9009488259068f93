import math

import pytest
import torch

from dpdmd.kernels import Float8State, Philox, adamw_step, use_backend
from dpdmd.kernels.optim import adamw
from dpdmd.kernels.optim.adamw import (
    BLOCK,
    Coefficients,
    Moments,
    adamw_step_reference,
    decode,
    encode,
    exp_avg_of,
    exp_avg_sq_of,
    random_halves,
    round_to_bfloat16,
)
from dpdmd.kernels.runtime.launch import kernel, tl
from dpdmd.kernels.runtime.philox import philox4x32

ON_GPU = torch.cuda.is_available()
gpu = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")]

FORMS = ["float32", "bfloat16", "float8"]
# One element; part of a block; a block less one, whole, and one more; an odd number of blocks, all but the last whole; a
# multiple of the largest program; one more than that.
SIZES = [1, 113, 255, 256, 257, 1023, 4096, 4097]
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-4, "weight_decay": 0.1}


def implementations(test):
    """Runs a test on those there are."""
    test = pytest.mark.usefixtures("implementation")(test)
    return pytest.mark.parametrize("implementation", ["reference", "triton"], indirect=True)(test)


def zeros(form, size):
    if form == "float8":
        return Float8State.zeros(size), Float8State.zeros(size)
    return tuple(torch.zeros(size, dtype=getattr(torch, form)) for _ in range(2))


def tensors_of(*values):
    """All tensors, those of states included."""
    parts = [[value.values, value.scales] if isinstance(value, Float8State) else [value] for value in values]
    return [tensor for part in parts for tensor in part]


def copies(*values):
    return [
        Float8State(value.values.clone(), value.scales.clone()) if isinstance(value, Float8State) else value.clone()
        for value in values
    ]


def moments(exp_avg, exp_avg_sq):
    """What the states stand for, float32."""
    if isinstance(exp_avg, Float8State):
        return exp_avg_of(exp_avg), exp_avg_sq_of(exp_avg_sq)
    return exp_avg.float(), exp_avg_sq.float()


def bits(tensor):
    """That NaN equals NaN."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return tensor.cpu().view(integers[tensor.itemsize])


def same(ones, others):
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(tensors_of(*ones), tensors_of(*others), strict=True))


class Torchs:
    """torch.optim.AdamW on a copy."""

    def __init__(self, master, dtype):
        self.parameter = torch.nn.Parameter(master.to(dtype, copy=True))
        self.optimizer = torch.optim.AdamW([self.parameter], **SETTINGS)

    def step(self, gradient):
        self.parameter.grad = gradient.to(self.parameter.dtype)
        self.optimizer.step()

    @property
    def state(self):
        return self.optimizer.state[self.parameter]


# The arithmetic.


@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_float32_is_torchs_adamw(randn, relative_error, size, dtype):
    """Over 20 steps, three of them skipped, as far from float64 as torch's float32 is."""
    start = randn(size)
    master, (exp_avg, exp_avg_sq) = start.clone(), zeros("float32", size)
    weight = torch.full((size,), torch.nan, dtype=torch.bfloat16)
    exact, peer = Torchs(start, torch.float64), Torchs(start, torch.float32)
    scale, step = torch.tensor(0.3), 0
    for call in range(20):
        skipped = call in (0, 7, 8)
        gradient = randn(size, seed=call + 1, dtype=dtype) * 10.0 ** (call % 5 - 2)
        apply = torch.tensor(not skipped)
        step += not skipped
        adamw_step(
            *(master, exp_avg, exp_avg_sq, gradient),
            **{"weight": weight, "scale": scale, "apply": apply, "step": max(step, 1), **SETTINGS},
        )
        if not skipped:
            exact.step(gradient.double() * scale.double())
            peer.step(gradient.float() * scale)
    assert step == 17
    assert torch.equal(weight, master.bfloat16())
    for got, name in ((exp_avg, "exp_avg"), (exp_avg_sq, "exp_avg_sq")):
        assert relative_error(got, exact.state[name]) < 1e-6
    moved, peers = (each.double() - start.double() for each in (master, peer.parameter))
    exactly = exact.parameter - start.double()
    assert relative_error(moved, exactly) < 2e-5  # of 17 roundings of numbers of size 1, moved by 0.05 in all
    if size > 1000:
        assert relative_error(moved, exactly) < 1.2 * relative_error(peers, exactly)


def simulated(form, size, steps, gradients):
    """Masters after some steps from 0, and those of float64 without any rounding of the state."""
    master, (exp_avg, exp_avg_sq) = torch.zeros(size), zeros(form, size)
    exact = Torchs(master, torch.float64)
    for step in range(1, steps + 1):
        gradient = gradients(step)
        adamw_step(
            master, exp_avg, exp_avg_sq, gradient, step=step, key=Philox.of(step), **SETTINGS | {"weight_decay": 0.0}
        )
        exact.optimizer.param_groups[0]["weight_decay"] = 0.0
        exact.step(gradient)
    return master, (exp_avg, exp_avg_sq), exact


# Found: 1e-6, 0.007 and 0.063, which rounding to the nearest makes 0.4; of sqrt(v) 2e-6, 0.013 and 0.087.
@pytest.mark.parametrize(
    ("form", "limit", "root_limit"), [("float32", 1e-5, 1e-5), ("bfloat16", 0.012, 0.02), ("float8", 0.1, 0.12)]
)
def test_forms_against_float64(randn, relative_error, form, limit, root_limit):
    size = 8 * BLOCK
    spread = torch.exp(randn(size, seed=1))  # of magnitudes in a block
    master, states, exact = simulated(form, size, 600, lambda step: spread * (0.3 + randn(size, seed=step + 1)))
    assert relative_error(master, exact.parameter) < limit
    root = moments(*states)[1].double().sqrt()
    assert relative_error(root, exact.state["exp_avg_sq"].sqrt()) < root_limit
    assert abs((root / exact.state["exp_avg_sq"].sqrt()).mean() - 1) < 0.1 * limit + 1e-6


# Both implementations, to the bit.


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_triton_is_the_reference_to_the_bit(randn, form, size, dtype):
    """On a GPU, too, where the reference runs on the CPU. Magnitudes over eight decades, and zeros among them."""
    master, states = randn(size), zeros(form, size)
    weight = torch.full((size,), torch.nan, dtype=dtype)
    expected = [each.clone().cpu() for each in tensors_of(master, *states, weight)]
    if form == "float8":
        expected = [expected[0], Float8State(*expected[1:3]), Float8State(*expected[3:5]), expected[5]]
    for step in range(1, 4):
        spread = torch.exp(4 * randn(size, seed=10 + step)).clamp(1e-4, 1e4) * (randn(size, seed=20 + step) > -1)
        gradient = (randn(size, seed=step) * spread).to(dtype)
        scale, apply = torch.tensor(0.37 / step), torch.tensor(step != 2)
        options = {"step": step, "key": Philox.of(step), **SETTINGS}
        adamw_step(master, *states, gradient, weight=weight, scale=scale, apply=apply, **options)
        with use_backend("reference"):
            adamw_step(
                *(*expected[:3], gradient.cpu()),
                **{"weight": expected[3], "scale": scale.cpu(), "apply": apply.cpu(), **options},
            )
    assert same([master, *states, weight], expected)
    assert weight.isfinite().all()


@implementations
@pytest.mark.parametrize("form", FORMS[1:])
def test_bits_depend_on_key_and_index_alone(randn, monkeypatch, form):
    """Not on the launch, nor on what follows; and they repeat."""
    start, gradient = randn(4097), randn(4097, seed=1)

    def run(size, key, rows=adamw.ROWS, chunk=adamw.CHUNK):
        for name, value in (("ROWS", rows), ("ROWS_FLOAT8", rows), ("CHUNK", chunk)):
            monkeypatch.setattr(adamw, name, value)
        master, states = start[:size].clone(), zeros(form, size)
        adamw_step(master, *states, gradient[:size].contiguous(), step=1, key=key, **SETTINGS)
        return [master, *states]

    expected = run(4097, Philox(5))
    for rows, chunk in ((1, BLOCK), (2, 2 * BLOCK), (16, 8 * BLOCK)):
        assert same(run(4097, Philox(5), rows, chunk), expected)
    part = tensors_of(*run(1024, Philox(5)))
    assert all(torch.equal(bits(a), bits(b[: len(a)])) for a, b in zip(part, tensors_of(*expected), strict=True))
    for key in (6, 5 + 2**32):
        other = run(4097, Philox(key))
        assert same(other[:1], expected[:1])  # an update takes the moments as they are before they are rounded
        for one, another in zip(moments(*other[1:]), moments(*expected[1:]), strict=True):
            assert 0.2 < (one != another).double().mean() < 0.8


def _words_kernel(out_ptr, key: tl.int64, first_block: tl.int64, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.arange(0, ROWS).to(tl.int64)
    words = adamw._random_words(key, first_block + blocks, BLOCK)
    tl.store(out_ptr + (blocks * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :], words.to(tl.int64))


@pytest.mark.parametrize("first", [0, 2**31 - 256, 2**34 - 256])
def test_random_words(first):
    """Element 4 c + j has the j-th word of counter c, also where c has more than 32 bits, in both implementations."""
    pytest.importorskip("triton")
    device = "cuda" if ON_GPU else "cpu"
    key = Philox(2**40 + 7)
    words = torch.empty(512, dtype=torch.int64, device=device)
    kernel(4)(_words_kernel)(1, words, key.key, first // BLOCK, 2, BLOCK)
    for i in (0, 3, 255, 256, 511):
        counter = (first + i) // 4
        parts = [torch.tensor([part]) for part in (counter % 2**32, counter // 2**32, 0, 0)]
        assert words[i].item() == philox4x32(tuple(parts), key.words)[i % 4].item()
    upper, lower = random_halves(key, first, 512, torch.device("cpu"))
    assert torch.equal(upper.long() * 65536 + lower, words.cpu())


def test_random_halves_of_both_moments_are_uncorrelated():
    halves = torch.stack(random_halves(Philox(1), 0, 1 << 18, torch.device("cpu"))).double()
    assert ((halves.mean(1) / 65535 - 0.5).abs() < 5 * 0.29 / 512).all()
    assert abs(torch.corrcoef(halves)[0, 1]) < 5 / 512


# Stochastic rounding.


@pytest.mark.parametrize("form", FORMS[1:])
def test_rounding_is_unbiased(randn, form):
    """Of 2000 blocks that hold the same: the mean of what is stored is the value, within five standard errors."""
    repeats = 2000
    spread = torch.exp(randn(BLOCK, seed=3))  # none so small that it is rounded up
    m, root = spread * randn(BLOCK), spread * (0.1 + randn(BLOCK, seed=1).abs())
    states, gradient = zeros(form, BLOCK * repeats), torch.zeros(BLOCK * repeats)
    exact_m, exact_v = 0.9 * m, 0.999 * root.square()
    if form == "bfloat16":
        m, root = m.bfloat16().float(), root.square().bfloat16().float().sqrt()
        states = m.bfloat16().repeat(repeats), root.square().bfloat16().repeat(repeats)
        exact_m, exact_v = 0.9 * m, 0.999 * root.square()
        exact = exact_m, exact_v
    else:
        signs = (m < 0).int() << 7
        half = torch.full((1, BLOCK), 1 << 15, dtype=torch.int32)
        codes = [encode(m.abs()[None], half, adamw.MANTISSA), encode(root[None], half, adamw.ROOT_MANTISSA)]
        parts = [codes[0][0] | signs, codes[1][0]]
        states = [
            Float8State(part[0].to(torch.uint8).repeat(repeats), each[1].flatten().repeat(repeats))
            for part, each in zip(parts, codes, strict=True)
        ]
        m, v = exp_avg_of(states[0])[:BLOCK], exp_avg_sq_of(states[1])[:BLOCK]
        exact = 0.9 * m, (0.999 * v).sqrt()
    adamw_step(torch.zeros(BLOCK * repeats), *states, gradient, step=1, key=Philox(3), **SETTINGS)
    stored = moments(*states)
    got = stored if form == "bfloat16" else (stored[0], stored[1].sqrt())
    for one, truth in zip(got, exact, strict=True):
        one = one.view(repeats, BLOCK).double()
        assert (one.amax(0) > one.amin(0)).double().mean() > 0.8  # most lie between neighbours
        error = (one.mean(0) - truth.double()).abs()
        # Five standard errors, or where the way to the neighbour is short, five of the rare ones that go there.
        assert (error <= 5 * (one.std(0) / math.sqrt(repeats) + 2**-3 * truth.abs() / repeats)).all()


@pytest.mark.parametrize("form", FORMS[1:])
def test_to_the_nearest_v_would_stand_still(form, monkeypatch):
    """Without a gradient v falls by 0.1 % a step, to 1 / e after a thousand. The nearest of what 8 or 16 bits hold is
    where it was."""
    size = 8 * BLOCK

    def after_a_thousand():
        states = torch.zeros(size), torch.ones(size)
        if form == "bfloat16":
            states = tuple(each.bfloat16() for each in states)
        else:
            half = torch.full((8, BLOCK), 1 << 15, dtype=torch.int32)
            states = [
                Float8State(codes.to(torch.uint8).flatten(), scales.flatten())
                for codes, scales in (encode(each.view(8, BLOCK), half, adamw.ROOT_MANTISSA) for each in states)
            ]
        master, gradient = torch.zeros(size), torch.zeros(size)
        for step in range(1, 1001):
            adamw_step(master, *states, gradient, step=step, key=Philox.of(step), **SETTINGS)
        return moments(*states)[1]

    v = after_a_thousand()
    mean = v.mean() if form == "bfloat16" else v.sqrt().mean() ** 2  # of which the expectation is exact
    assert mean == pytest.approx(0.999**1000, rel=0.03)

    def middle(key, first, count, device):
        return (torch.full((count,), 1 << 15, dtype=torch.int32, device=device),) * 2

    monkeypatch.setattr(adamw, "random_halves", middle)
    assert (after_a_thousand() == 1).all()


@implementations
def test_bfloat16_rounds_to_a_neighbour(randn):
    """What bfloat16 holds stays; anything else goes to one of the two beside it; NaN and infinity stay."""
    x = torch.cat([randn(5000) * 10.0 ** torch.arange(-20, 30).repeat(100), randn(100).bfloat16().float()])
    random = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32)
    got = round_to_bfloat16(x, random)
    lower = (x.view(torch.int32) & -65536).view(torch.float32)
    upper = torch.where(lower == x, x, ((x.view(torch.int32) & -65536) + 65536).view(torch.float32))
    assert ((got.float() == lower) | (got.float() == upper)).all()
    assert torch.equal(got[5000:].float(), x[5000:])
    # NaN of all bits set is what GPUs make, and would overflow to -0.
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    special = torch.cat([special, torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)])
    states = special.bfloat16(), torch.ones(6, dtype=torch.bfloat16)
    gradient, master = special.clone(), torch.zeros(6)
    adamw_step(master, *states, gradient, step=1, key=Philox(2**63 - 1), **SETTINGS)
    rounded = round_to_bfloat16(special, torch.full((6,), 65535, dtype=torch.int32)).float()
    assert torch.equal(rounded.isnan(), special.isnan()) and torch.equal(rounded[1:4], special[1:4])
    assert states[0][[0, 4, 5]].isnan().all() and torch.equal(states[0][1:4].float(), special[1:4])


# The 8-bit form.


def numbers(mantissa):
    """Those of all codes without a sign, as the module's docstring has it."""
    steps = 2**mantissa
    return torch.tensor(
        [
            c / steps if c < steps else (1 + (c % steps) / steps) * 2.0 ** (c // steps - 1)
            for c in range(16 * 2**mantissa)
        ],
        dtype=torch.float64,
    )


def test_what_a_state_stands_for():
    """The first moment has a sign and three bits, the second is the square of four."""
    state = Float8State(torch.arange(256).to(torch.uint8), torch.tensor([0.25]))
    positive = 0.25 * numbers(3)
    assert torch.equal(exp_avg_of(state).double(), torch.cat([positive, -positive]))
    assert torch.equal(exp_avg_sq_of(state).double(), (0.25 * numbers(4)).square())


@pytest.mark.parametrize("mantissa", [3, 4])
def test_codes(mantissa):
    """Every code has its number, and a number keeps its code whatever the random bits, at every scale there is."""
    count = 16 * 2**mantissa
    codes = torch.arange(count, dtype=torch.int32).repeat(BLOCK // count)[None]
    exact = numbers(mantissa).repeat(BLOCK // count)[None]
    for exponent in (-126, -60, 0, 1, 100, 112):
        scale = torch.tensor([[2.0**exponent]])
        x = decode(codes, scale, mantissa)
        assert torch.equal(x.double(), exact * 2.0**exponent) and x.isfinite().all()
        for random in (0, 1, 32768, 65535):
            got, got_scale = encode(x, torch.full((1, BLOCK), random, dtype=torch.int32), mantissa)
            # The largest code's number is the next scale's: rounded up, nothing may pass the largest.
            assert got_scale.item() in (2.0**exponent, 2.0 ** (exponent + 1))
            large = exact >= 2  # of half the scale, normal numbers still have a code
            assert torch.equal(decode(got, got_scale, mantissa)[large], x[large])
            if exponent < 112:
                top = x.where(codes < count - 1, 0)
                again, again_scale = encode(top, torch.full((1, BLOCK), random, dtype=torch.int32), mantissa)
                assert torch.equal(again, codes.where(codes < count - 1, 0)) and torch.equal(again_scale, scale)


@pytest.mark.parametrize("mantissa", [3, 4])
def test_encoded_values_are_neighbours(randn, mantissa):
    """At all magnitudes of float32, next to every power of two, by any random bits: one of the two numbers beside x."""
    exponents = torch.arange(-149, 128).double()
    near = torch.tensor([1.0, 1 + 2**-23, 1.5, 1.75, 1.9, 1.97, 2 - 2**-23], dtype=torch.float64)
    largest = (near[:, None] * 2.0**exponents).flatten().float()
    largest = largest[largest.isfinite()]
    x = largest[:, None] * torch.exp(-4 * randn(len(largest), BLOCK).abs())
    x[:, 0], x[:, 1] = largest, 0.0
    grid = numbers(mantissa)
    for random in (0, 65535, None):
        noise = torch.randint(0, 1 << 16, x.shape) if random is None else torch.full(x.shape, random)
        codes, scales = encode(x, noise.int(), mantissa)
        assert (codes >= 0).all() and (codes < 16 * 2**mantissa).all() and scales.isfinite().all()
        quotient = x.double() / scales.double()
        below = (torch.searchsorted(grid, quotient.flatten(), right=True) - 1).view_as(codes)
        assert ((codes == below) | ((codes == below + 1) & (quotient > grid[below]))).all()
        assert (scales.log2() == scales.log2().round()).all() and (scales >= 2.0**-126).all()
        # As large as it can be: the largest is in the upper octaves, but where the scale is float32's smallest.
        assert (codes[:, 0] >= 14 * 2**mantissa)[scales[:, 0] > 2.0**-126].all()


def test_what_does_not_change_keeps_its_value_when_the_scale_does(randn):
    """A neighbour a thousand times as large comes and goes."""
    half = torch.full((1, BLOCK), 3, dtype=torch.int32)
    x = decode(*encode(randn(1, BLOCK).abs() + 0.1, half, adamw.ROOT_MANTISSA), adamw.ROOT_MANTISSA)
    for largest in (1000.0, 1.0, 50.0):
        x[0, 7] = largest
        again = decode(*encode(x, torch.randint(0, 1 << 16, x.shape, dtype=torch.int32), 4), 4)
        others = torch.arange(BLOCK) != 7
        assert torch.equal(again[0, others], x[0, others])


def heavy_tails(randn, size, seed):
    """Gradients whose magnitudes span ten decades in a block, the same elements large each time: Cauchy times log-normal,
    and none here and there."""
    spread = torch.exp(3 * randn(size, seed=1)) * (randn(size, seed=2) > -1.5)
    return spread * randn(size, seed=seed) / (randn(size, seed=seed + 1).abs() + 1e-3)


@pytest.mark.parametrize("eps", [1e-8, 1e-30])
def test_heavy_tails_do_not_blow_up(randn, eps):
    """No update of any element is much larger than float32's could be; without the smallest code for v > 0 some are
    divided by eps. A weak element beside a strong one moves less, the rest as in float32."""
    size, settings = 16 * BLOCK, SETTINGS | {"eps": eps, "weight_decay": 0.0, "lr": 1.0}
    master, states = torch.zeros(size), zeros("float8", size)
    plain, plain_states = torch.zeros(size), zeros("float32", size)
    for step in range(1, 101):
        gradient, before = heavy_tails(randn, size, 10 * step), master.clone()
        adamw_step(master, *states, gradient, step=step, key=Philox.of(step), **settings)
        adamw_step(plain, *plain_states, gradient, step=step, **settings)
        # (1 - beta1) / sqrt(1 - beta2) and its bias correction bound what |m| / sqrt(v) can be: 7.3.
        assert (master - before).abs().max() < 7.3
        assert (states[1].values > 0)[plain_states[1] > 0].all()
        assert not states[0].scales.isnan().any() and not states[1].scales.isnan().any()
    assert master.isfinite().all()
    root, exact = exp_avg_sq_of(states[1]).sqrt(), plain_states[1].sqrt()
    strong = exact > 2**-12 * exact.view(-1, BLOCK).amax(1).repeat_interleave(BLOCK)
    assert 0.3 < strong.double().mean() < 0.95
    assert ((root / exact)[strong] - 1).abs().mean() < 0.1
    moved, truly = master[strong], plain[strong]
    assert (moved - truly).norm() / truly.norm() < 0.15
    weak = ~strong & (exact > 0)
    assert (root[weak] >= 0.3 * exact[weak]).all()


def test_an_element_without_gradient_stays_where_it_is(randn):
    """v is 0, m is 0, and 0 / eps is no update, beside whatever neighbours."""
    gradient = randn(BLOCK) * 1e3
    gradient[::3] = 0
    master, states = torch.zeros(BLOCK), zeros("float8", BLOCK)
    for step in range(1, 20):
        adamw_step(master, *states, gradient, step=step, key=Philox.of(step), **SETTINGS)
    assert (master[::3] == 0).all() and (states[1].values[::3] == 0).all() and (master[1::3] != 0).all()


# What is written, and when.


@implementations
@pytest.mark.parametrize("size", [1, 256, 1023])
@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_written_where_apply_is_false(randn, form, size):
    master, weight, states = randn(size), randn(size, seed=1, dtype=torch.bfloat16), zeros(form, size)
    options = {"weight": weight, "key": Philox(1), **SETTINGS}
    adamw_step(master, *states, randn(size, seed=2), step=1, **options)
    before = copies(master, weight, *states)
    for bad in (torch.nan, torch.inf, 1.0):
        gradient = torch.full((size,), bad)
        for scale in (None, torch.tensor(torch.nan), torch.tensor(1.0)):
            adamw_step(master, *states, gradient, scale=scale, apply=torch.tensor(False), step=2, **options)
    assert same([master, weight, *states], before)
    adamw_step(master, *states, randn(size, seed=2), apply=torch.tensor(True), step=2, **options)
    assert not same([master], before[:1]) and not same(states, before[2:])


@implementations
@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_that_is_not_finite_shows(randn, form):
    """In its element, in 8 bits at the next step in its block, and nowhere else."""
    size = 3 * BLOCK
    gradient = randn(size, seed=1)
    for bad in (torch.nan, torch.inf, -torch.inf):
        results = []
        for value in (1.0, bad):
            gradient[300] = value
            master, states = randn(size), zeros(form, size)
            adamw_step(master, *states, gradient, step=1, key=Philox(1), **SETTINGS)
            results.append([master, *moments(*states)])
        block = torch.arange(size) // BLOCK == 1
        touched = block if form == "float8" else torch.arange(size) == 300
        for good, broken in zip(*results, strict=True):
            assert not broken[300].isfinite()
            assert torch.equal(good[~touched], broken[~touched])
        assert results[1][0][torch.arange(size) != 300].isfinite().all()
        assert form != "float8" or results[1][2][block].isnan().all()


@implementations
@pytest.mark.parametrize("form", FORMS)
def test_scale_is_a_factor_of_the_gradient(randn, form):
    gradient = randn(1023, seed=1)
    results = []
    for factor, scale in ((1.0, None), (1.0, 1.0), (0.25, 4.0)):  # powers of two: no rounding
        master, states = randn(1023), zeros(form, 1023)
        scale = None if scale is None else torch.tensor(scale)
        adamw_step(master, *states, gradient * factor, scale=scale, step=1, key=Philox(1), **SETTINGS)
        results.append([master, *states])
    assert same(results[0], results[1]) and same(results[0], results[2])


@implementations
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("offset", [1, 3])
def test_tensors_that_start_anywhere(randn, form, offset):
    """Slices of larger tensors, whose rest stays as it is."""
    size = 1023
    gradient = randn(size + 5, seed=1, dtype=torch.bfloat16)
    part = slice(offset, offset + size)
    larger, weight = torch.full((size + 5,), torch.nan), torch.full((size + 5,), torch.nan, dtype=torch.bfloat16)
    larger[part] = randn(size)
    states = zeros(form, size + 5)
    cut = [Float8State(s.values[part], s.scales[:4]) if form == "float8" else s[part] for s in states]
    options = {"step": 1, "key": Philox(1), **SETTINGS}
    adamw_step(larger[part], *cut, gradient[part], weight=weight[part], **options)
    master, expected = randn(size), zeros(form, size)
    adamw_step(master, *expected, gradient[part].clone(), **options)
    assert same([larger[part], weight[part], *cut], [master, master.bfloat16(), *expected])
    assert larger[[0, -1]].isnan().all() and weight[[0, -1]].isnan().all()
    for state in tensors_of(*states)[:: 2 if form == "float8" else 1]:
        assert (state[[0, -1]] == 0).all()


@implementations
@pytest.mark.parametrize("form", FORMS)
def test_empty(form):
    adamw_step(torch.empty(0), *zeros(form, 0), torch.empty(0), step=1, key=Philox(1), **SETTINGS)


@implementations
def test_autograd_knows_of_the_write(randn):
    """A weight that a backward pass wants is an error there, and masters that require gradients may be written."""
    weight, x = randn(113), randn(113, seed=1).requires_grad_()
    out = (weight * x).sum()
    master = randn(113).requires_grad_()
    adamw_step(master, *zeros("float32", 113), randn(113, seed=2), weight=weight, step=1, **SETTINGS)
    assert master.is_leaf and torch.equal(weight, master.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@implementations
@pytest.mark.parametrize("form", FORMS)
def test_compiles_to_one_graph(randn, form):
    torch._dynamo.reset()
    results = []
    for run in (adamw_step, torch.compile(adamw_step, fullgraph=True, backend="aot_eager")):
        master, weight, states = randn(1023), torch.zeros(1023, dtype=torch.bfloat16), zeros(form, 1023)
        options = {"weight": weight, "key": Philox(2**62 + 1), "scale": torch.tensor(0.5), "apply": torch.tensor(True)}
        run(master, *states, randn(1023, seed=1), step=3, **options, **SETTINGS)
        results.append([master, weight, *states])
    assert same(*results)


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(randn, form):
    pytest.importorskip("triton")
    device = "cuda" if ON_GPU else "cpu"
    exp_avg, exp_avg_sq = (
        (each.values, each.scales) if form == "float8" else (each, None) for each in zeros(form, 1023)
    )
    tensors = (randn(1023), *exp_avg, *exp_avg_sq, randn(1023, seed=1), randn(1023).bfloat16())
    tensors = [tensor if tensor is None else tensor.to(device) for tensor in tensors]
    scalars = torch.tensor(0.5, device=device), torch.tensor(True, device=device)
    coefficients = list(Coefficients.of(step=3, **SETTINGS))
    torch.library.opcheck(torch.ops.dpdmd.adamw_step_triton.default, (*tensors, *scalars, coefficients, 5))


class TestOnGpu:
    pytestmark = gpu

    @pytest.fixture(autouse=True)
    def on_the_gpu(self):
        torch.use_deterministic_algorithms(False)  # which fills what is 20 GB
        torch.set_default_device("cuda")
        yield
        torch.set_default_device(None)

    @pytest.mark.parametrize("name", ["reference", "triton"])
    @pytest.mark.parametrize("form", FORMS)
    def test_the_host_does_not_wait(self, randn, form, name):
        master, states, gradient = randn(5000), zeros(form, 5000), randn(5000, seed=1)
        scale, apply = torch.tensor(0.5), torch.tensor(True)
        options = {"scale": scale, "apply": apply, "key": Philox(1), "step": 1, **SETTINGS}
        with use_backend(name):
            adamw_step(master, *states, gradient, **options)
            torch.cuda.set_sync_debug_mode("error")
            try:
                adamw_step(master, *states, gradient, **options)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("form", FORMS)
    def test_cuda_graph(self, randn, form):
        """A replay reads the gradient, the scale and `apply` of the time."""
        master, states, gradient = randn(5000), zeros(form, 5000), randn(5000, seed=1)
        scale, apply = torch.tensor(0.5), torch.tensor(True)
        options = {"scale": scale, "apply": apply, "key": Philox(1), "step": 1, **SETTINGS}
        expected = copies(master, *states)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            adamw_step(*copies(master, *states), gradient, **options)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            adamw_step(master, *states, gradient, **options)
        for seed in range(3):
            gradient.copy_(randn(5000, seed=seed + 2))
            scale.fill_(0.1 + seed)
            apply.fill_(seed != 1)
            graph.replay()
            adamw_step(*expected, gradient, **options)
            assert same([master, *states], expected)

    @pytest.mark.gpu_memory(36)  # master and moments 24, gradient and weights 8, what is counted 2
    @pytest.mark.parametrize("form", ["float32", "float8"])
    def test_more_than_2_to_31_elements(self, randn, form):
        """The first and the last chunk, where the last is not a whole block."""
        size, part = 2**31 + 4 * BLOCK + 113, 16 * BLOCK
        first = size // BLOCK * BLOCK - part
        master, gradient = torch.zeros(size), torch.zeros(size, dtype=torch.bfloat16)
        weight, states = torch.zeros(size, dtype=torch.bfloat16), zeros(form, size)
        spans = {start: slice(start, min(start + part + 113, size)) for start in (0, first)}
        for start, span in spans.items():
            master[span] = randn(span.stop - start, seed=1)
            gradient[span] = randn(span.stop - start, seed=2, dtype=torch.bfloat16)
        expected = {}
        for start, span in spans.items():
            scales = slice(start // BLOCK, -(-span.stop // BLOCK))
            stored = [
                (s.values[span].clone(), s.scales[scales].clone()) if form == "float8" else (s[span].clone(), None)
                for s in states
            ]
            expected[start] = master[span].clone(), Moments(*stored[0], *stored[1]), scales
            key = Philox(3) if form == "float8" else None
            arguments = gradient[span], None, None, None, Coefficients.of(step=1, **SETTINGS), key
            adamw_step_reference(*expected[start][:2], *arguments, first=start)
        with use_backend("triton"):
            adamw_step(master, *states, gradient, weight=weight, step=1, key=Philox(3), **SETTINGS)
        # The chunk at 0 ends inside a block that the tensor does not end in: its last block's scale differs.
        for start in spans:
            whole = slice(start, start + part)
            exact, stored, scales = expected[start]
            assert torch.equal(master[whole], exact[:part]) and torch.equal(weight[whole], exact[:part].bfloat16())
            if form == "float8":
                assert torch.equal(states[0].values[whole], stored.exp_avg[:part])
                assert torch.equal(states[1].values[whole], stored.exp_avg_sq[:part])
            else:
                assert torch.equal(states[1][whole], stored.exp_avg_sq[:part])
        assert torch.equal(master[-113:], expected[first][0][-113:])
        assert master[part + 113 : first].count_nonzero() == 0


# Errors.

N = 300
ZERO = torch.zeros(N)
STATE = Float8State.zeros(N)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"master": [1.0]}, TypeError, "master is a list; it needs to be a torch.Tensor"),
        ({"master": ZERO.bfloat16()}, TypeError, "master has dtype torch.bfloat16; it needs torch.float32"),
        ({"master": ZERO.view(2, -1)}, ValueError, r"master has shape \(2, 150\); it needs one dimension: \(n,\)"),
        ({"gradient": ZERO.double()}, TypeError, "gradient has dtype torch.float64; it needs torch.float32 or"),
        ({"gradient": ZERO[:5]}, ValueError, r"gradient has shape \(5,\); with master \(300,\) it needs \(300,\)"),
        ({"gradient": torch.zeros(2 * N)[::2]}, ValueError, r"gradient has strides \(2,\); it needs to be contiguous"),
        ({"gradient": ZERO.to("meta")}, ValueError, "gradient is on meta; it needs to be on master's device cpu"),
        ({"exp_avg": ZERO.half()}, TypeError, "exp_avg has dtype torch.float16; it needs torch.float32 or torch.bf"),
        (
            {"exp_avg_sq": ZERO.bfloat16()},
            TypeError,
            "exp_avg_sq has dtype torch.bfloat16; it needs exp_avg's, torch.f",
        ),
        ({"exp_avg": STATE}, TypeError, "exp_avg is a Float8State and exp_avg_sq a Tensor; both need to be the same"),
        (
            {"exp_avg": Float8State(ZERO, ZERO), "exp_avg_sq": STATE},
            TypeError,
            "exp_avg.values has dtype torch.float32; it needs torch.uint8",
        ),
        (
            {"exp_avg": STATE, "exp_avg_sq": Float8State(STATE.values, torch.zeros(3))},
            ValueError,
            r"exp_avg_sq.scales has shape \(3,\); with master \(300,\) it needs \(2,\)",
        ),
        ({"weight": ZERO.double()}, TypeError, "weight has dtype torch.float64"),
        ({"weight": ZERO[1:]}, ValueError, r"weight has shape \(299,\)"),
        ({"scale": 0.5}, TypeError, "scale is a float; it needs to be a torch.Tensor"),
        ({"scale": torch.ones(1)}, ValueError, r"scale has shape \(1,\); with master \(300,\) it needs \(\)"),
        ({"scale": torch.ones((), dtype=torch.bfloat16)}, TypeError, "scale has dtype torch.bfloat16"),
        ({"apply": torch.ones(())}, TypeError, "apply has dtype torch.float32; it needs torch.bool"),
        ({"lr": -1.0}, ValueError, "lr is -1.0; it needs to be finite, and 0 or above"),
        ({"lr": torch.tensor(1.0)}, TypeError, "lr is a Tensor; it needs to be a float"),
        ({"eps": math.inf}, ValueError, "eps is inf; it needs to be finite"),
        ({"weight_decay": math.nan}, ValueError, "weight_decay is nan"),
        ({"betas": 0.9}, ValueError, "betas is 0.9; it needs to be a pair"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] is 1.0; it needs to be in \[0, 1\)"),
        ({"step": 0}, ValueError, "step is 0; it needs to be 1 for the first"),
        ({"step": 1.0}, TypeError, "step is a float; it needs to be an int"),
        ({"key": 5}, TypeError, "key is a int; it needs to be a Philox"),
        (
            {"exp_avg": STATE, "exp_avg_sq": STATE},
            ValueError,
            "key is None; moments of fewer than 4 bytes need a Philox",
        ),
    ],
)
def test_errors(changed, error, message):
    arguments = {
        "master": ZERO,
        "exp_avg": ZERO,
        "exp_avg_sq": ZERO,
        "gradient": ZERO,
        "step": 1,
        **SETTINGS,
        **changed,
    }
    with pytest.raises(error, match=message):
        adamw_step(**arguments)


def test_there_is_no_cuda_kernel():
    with use_backend("cuda"), pytest.raises(RuntimeError, match="adamw_step has no 'cuda' implementation here"):
        adamw_step(ZERO.clone(), ZERO.clone(), ZERO.clone(), ZERO, step=1, **SETTINGS)
