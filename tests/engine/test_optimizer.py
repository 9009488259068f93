"""AdamW: torch's own to float32's rounding, a state of the size that is said, and a resumed run that repeats bit for bit."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from dpdmd.engine.optimizer import STATE_DTYPES, AdamW
from dpdmd.kernels import Float8State, Philox, adamw_step

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
# A scalar, a vector, a matrix, whole blocks of 256 and one element more, and nothing.
SHAPES = [(), (113,), (31, 33), (2, 256), (513,), (0, 4)]


def make_parameters(seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def set_gradients(parameters, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def run(optimizer, steps):
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step in steps:
        set_gradients(parameters, step)
        optimizer.step()


def tensors(optimizer):
    """Parameters and state, in order."""
    found = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found += [parameter.detach(), *(v for v in optimizer.state[parameter].values() if torch.is_tensor(v))]
    return found


def same(one, other):
    pairs = zip(tensors(one), tensors(other), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def relative_error(got, exact):
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_step_is_torchs_adamw(layout):
    """Two groups of different settings, a parameter that has a gradient now and then and one that never has, 20 steps."""

    def build(dtype):
        parameters = [p.detach().to(dtype, copy=True).requires_grad_() for p in make_parameters()]
        image = torch.randn(4, 3, 5, 7, generator=torch.Generator().manual_seed(9)).to(dtype)
        if layout == "channels_last":
            image = image.to(memory_format=torch.channels_last)
        parameters.append(image.clone(memory_format=torch.preserve_format).requires_grad_())
        return parameters

    exact, plain, ours = build(torch.float64), build(torch.float32), build(torch.float32)
    start = [parameter.detach().clone() for parameter in exact]
    optimizers = [
        kind([{"params": each[:3]}, {"params": each[3:], "lr": 3e-3, "weight_decay": 0.0}], **SETTINGS)
        for kind, each in ((torch.optim.AdamW, exact), (torch.optim.AdamW, plain), (AdamW, ours))
    ]
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        for index in range(len(ours)):
            gradient = torch.randn(ours[index].shape, generator=generator)
            for parameters in (exact, plain, ours):
                absent = index == 0 or (index == 2 and step % 3)
                parameters[index].grad = None if absent else gradient.to(parameters[index].dtype)
        for optimizer in optimizers:
            optimizer.step()
    assert not optimizers[2].state[ours[0]] and torch.equal(ours[0].detach(), start[0].float())
    assert optimizers[2].state[ours[2]]["step"] == 7 and optimizers[2].state[ours[1]]["step"] == 20
    for i in (1, 2, 3, 4, 6):
        moved, plainly = (each[i].detach().double() - start[i] for each in (ours, plain))
        error = relative_error(moved, exact[i] - start[i])
        assert error < 2e-5 and error < 1.5 * relative_error(plainly, exact[i] - start[i]) + 1e-6
        assert ours[i].stride() == plain[i].stride()


def test_a_gradient_in_bfloat16():
    """Which autograd keeps beside a float32 parameter where it is told to."""
    parameters = make_parameters(shapes=[(113,)] * 2)
    parameters[1].data.copy_(parameters[0])
    gradient = torch.randn(113, generator=torch.Generator().manual_seed(0)).bfloat16()
    parameters[0].grad_dtype = torch.bfloat16
    parameters[0].grad, parameters[1].grad = gradient, gradient.float()
    AdamW(parameters, **SETTINGS).step()
    assert torch.equal(*parameters)


def test_a_closure_and_a_schedule():
    (parameter,) = make_parameters(shapes=[(5,)])
    optimizer = AdamW([parameter], **SETTINGS | {"weight_decay": 0.0})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)

    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    before, expected = parameter.detach().clone(), parameter.detach().square().sum()
    assert torch.equal(optimizer.step(closure).detach(), expected)
    torch.testing.assert_close(parameter.detach(), before - 0.01 * before.sign(), rtol=0, atol=1e-6)
    scheduler.step()
    after = parameter.detach().clone()
    optimizer.step(closure)
    assert torch.equal(parameter.detach(), after)  # a rate of 0


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update_takes_a_gradient_from_elsewhere(dtype, state_dtype):
    """It is the operation, with the group's settings and a key of seed, place and step."""
    parameters = make_parameters(shapes=[(7,), (1023,)])
    optimizer = AdamW(
        [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.5}], **SETTINGS, state_dtype=state_dtype, seed=3
    )
    master = parameters[1].detach().clone()
    weight = torch.full((1023,), torch.nan, dtype=torch.bfloat16)
    states = [Float8State.zeros(1023) for _ in range(2)]
    if state_dtype != "float8":
        states = [torch.zeros(1023, dtype=getattr(torch, state_dtype)) for _ in range(2)]
    for step in (1, 2):
        gradient = torch.randn(1023, generator=torch.Generator().manual_seed(step)).to(dtype)
        scale = torch.tensor(0.25)
        optimizer.update(parameters[1], gradient, weight=weight, scale=scale, apply=torch.tensor(True))
        adamw_step(
            *(master, *states, gradient),
            **{**SETTINGS, "lr": 0.5, "step": step, "scale": scale, "key": Philox.of("adamw", 3, 1, step)},
        )
    assert torch.equal(parameters[1].detach(), master) and torch.equal(weight, master.bfloat16())
    state = optimizer.state[parameters[1]]
    first, second = (each.values if state_dtype == "float8" else each for each in states)
    assert torch.equal(state["exp_avg"], first) and torch.equal(state["exp_avg_sq"], second)
    assert parameters[1].grad is None and not optimizer.state[parameters[0]]


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_a_skipped_update(state_dtype):
    """Leaves everything but the step; where that is taken back the run goes on as if there had been none."""
    (parameter,), (other,) = make_parameters(shapes=[(1023,)]), make_parameters(shapes=[(1023,)])
    optimizer, expected = (AdamW([each], **SETTINGS, state_dtype=state_dtype) for each in (parameter, other))
    for step in range(6):
        gradient = torch.randn(1023, generator=torch.Generator().manual_seed(step))
        skipped = step in (0, 3)
        if skipped:
            before = [tensor.clone() for tensor in tensors(optimizer)]
            optimizer.update(parameter, gradient * math.nan, apply=torch.tensor(False))
            if step:
                assert all(map(torch.equal, before, tensors(optimizer)))
            optimizer.state[parameter]["step"] -= 1
        else:
            optimizer.update(parameter, gradient, apply=torch.tensor(True))
            expected.update(other, gradient)
    assert same(optimizer, expected) and optimizer.state[parameter]["step"] == 4


def test_flat_shards_in_the_place_of_parameters():
    """As DeepSpeed does it to an optimizer that was built on the network's parameters, in whatever dtype."""
    parameters = [torch.nn.Parameter(each.detach().bfloat16()) for each in make_parameters(shapes=[(30, 10), (7,)])]
    optimizer = AdamW(parameters, **SETTINGS)
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters]).float()
    optimizer.param_groups[0]["params"] = [flat]
    weight = flat.bfloat16()
    optimizer.update(flat, torch.ones_like(flat), weight=weight)
    assert optimizer.state[flat]["step"] == 1 and torch.equal(weight, flat.bfloat16())
    with pytest.raises(ValueError, match=r"a tensor of shape \(30, 10\) is none of the optimizer's parameters"):
        optimizer.update(parameters[0], torch.ones(30, 10))


# What the state is.


@pytest.mark.parametrize(
    ("state_dtype", "bytes_of"),
    [
        ("float32", lambda n: 8 * n),
        ("bfloat16", lambda n: 4 * n),
        ("float8", lambda n: 2 * n + 2 * 4 * -(-n // 256)),  # 2.03 an element
    ],
)
def test_memory(state_dtype, bytes_of):
    parameters = make_parameters()
    optimizer = AdamW(parameters, **SETTINGS, state_dtype=state_dtype)
    for parameter in parameters:
        assert parameter not in optimizer.state
        state = optimizer.create_state(parameter)
        held = [value for value in state.values() if torch.is_tensor(value)]
        assert sum(each.untyped_storage().nbytes() for each in held) == bytes_of(parameter.numel())
        assert state["step"] == 0 and state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
        assert optimizer.create_state(parameter) is state is optimizer.state[parameter]
        assert not any(each.any() for each in held)
    lazy = AdamW(make_parameters(), **SETTINGS, state_dtype=state_dtype)
    run(optimizer, range(2))
    run(lazy, range(2))
    assert same(lazy, optimizer)


def test_names():
    (parameter,) = make_parameters(shapes=[(300,)])
    scales = {"exp_avg_scale": torch.float32, "exp_avg_sq_scale": torch.float32}
    for state_dtype, dtype, more in (
        ("float32", torch.float32, {}),
        ("bfloat16", torch.bfloat16, {}),
        ("float8", torch.uint8, scales),
    ):
        state = AdamW([parameter], state_dtype=state_dtype).create_state(parameter)
        dtypes = {name: value.dtype for name, value in state.items() if name != "step"}
        assert dtypes == {"exp_avg": dtype, "exp_avg_sq": dtype, **more} and type(state["step"]) is int


@pytest.mark.parametrize("state_dtype", STATE_DTYPES[1:])
def test_every_parameter_step_and_seed_has_its_own_bits(state_dtype):
    """Equal parameters with equal gradients move alike and are stored unlike."""
    stored = []
    for seed in (0, 1):
        parameters = [torch.nn.Parameter(torch.ones(1024)) for _ in range(2)]
        optimizer = AdamW(parameters, **SETTINGS, state_dtype=state_dtype, seed=seed)
        gradient = torch.randn(1024, generator=torch.Generator().manual_seed(0))
        for parameter in parameters:
            optimizer.update(parameter, gradient)
            stored.append(optimizer.state[parameter]["exp_avg"].clone())
        assert torch.equal(*parameters)
        optimizer.state[parameters[0]]["exp_avg"].zero_(), optimizer.state[parameters[0]]["exp_avg_sq"].zero_()
        optimizer.update(parameters[0], gradient)  # the same at another step
        stored.append(optimizer.state[parameters[0]]["exp_avg"].clone())
    for i, one in enumerate(stored):
        for other in stored[:i]:
            assert 0.2 < (one != other).double().mean() < 0.8


# Saved and restored.


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_a_resumed_run_repeats_bit_for_bit(state_dtype, tmp_path):
    """From a file, with an optimizer that was built with another seed and another rate."""
    through = AdamW(make_parameters(), **SETTINGS, state_dtype=state_dtype, seed=7)
    run(through, range(6))

    first = AdamW(make_parameters(), **SETTINGS, state_dtype=state_dtype, seed=7)
    run(first, range(3))
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    parameters = [torch.nn.Parameter(parameter.detach().clone()) for parameter in first.param_groups[0]["params"]]
    resumed = AdamW(parameters, lr=1.0, state_dtype=state_dtype, seed=1)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert same(resumed, first)
    run(resumed, range(3, 6))
    assert same(resumed, through) and not same(resumed, first)
    assert resumed.state[parameters[1]]["step"] == 6 and resumed.param_groups[0]["lr"] == 1e-2


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_goes_on_alike(state_dtype, duplicate):
    optimizer = AdamW(make_parameters(), **SETTINGS, state_dtype=state_dtype, seed=7)
    run(optimizer, range(2))
    copied = duplicate(optimizer)
    run(optimizer, range(2, 4))
    assert not same(optimizer, copied)
    run(copied, range(2, 4))
    assert same(optimizer, copied)


def test_what_is_loaded_is_not_shared():
    optimizer, other = (AdamW(make_parameters(), **SETTINGS) for _ in range(2))
    run(optimizer, range(2))
    other.load_state_dict(optimizer.state_dict())
    before = [tensor.clone() for tensor in tensors(optimizer)]
    run(other, range(2))
    assert all(map(torch.equal, before, tensors(optimizer)))


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_loaded_on_another_device(state_dtype):
    """The dtypes stay and the devices are the parameters'."""
    optimizer = AdamW(make_parameters(), **SETTINGS, state_dtype=state_dtype)
    run(optimizer, range(2))
    saved = optimizer.state_dict()
    there = [torch.nn.Parameter(p.detach().to("meta")) for p in optimizer.param_groups[0]["params"]]
    moved = AdamW(there, **SETTINGS, state_dtype=state_dtype)
    moved.load_state_dict(saved)
    for index, parameter in enumerate(there):
        for name, value in saved["state"][index].items():
            got = moved.state[parameter][name]
            if name == "step":
                assert got == value == 2
            else:
                assert (got.dtype, got.shape, got.device.type) == (value.dtype, value.shape, "meta")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_from_cpu_to_gpu_and_back(state_dtype):
    """Wherever the steps are made, the bits are the same."""
    through = AdamW(make_parameters(), **SETTINGS, state_dtype=state_dtype, seed=7)
    run(through, range(6))
    optimizer = AdamW(make_parameters(), **SETTINGS, state_dtype=state_dtype, seed=7)
    for first, device in ((0, "cpu"), (2, "cuda"), (4, "cpu")):
        parameters = [torch.nn.Parameter(p.detach().to(device)) for p in optimizer.param_groups[0]["params"]]
        moved = AdamW(parameters, **SETTINGS, state_dtype=state_dtype)
        if first:
            moved.load_state_dict(optimizer.state_dict())
        else:
            moved.param_groups[0]["seed"] = 7
        optimizer = moved
        for step in range(first, first + 2):
            generator = torch.Generator().manual_seed(1000 + step)
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
            optimizer.step()
    assert same(optimizer, through)


# Errors.


def test_state_dicts_that_do_not_fit():
    saved = AdamW(make_parameters(), state_dtype="float8").state_dict()
    with pytest.raises(
        ValueError, match=r"param_groups\[0\] of the state_dict has state_dtype 'float8'; this .* 'float32'"
    ):
        AdamW(make_parameters()).load_state_dict(saved)
    torchs = torch.optim.AdamW(make_parameters()).state_dict()
    with pytest.raises(ValueError, match=r"state_dict has state_dtype None; this optimizer's has 'float32'"):
        AdamW(make_parameters()).load_state_dict(torchs)
    two = AdamW([{"params": each} for each in make_parameters()]).state_dict()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        AdamW(make_parameters()).load_state_dict(two)
    with pytest.raises(ValueError, match="doesn't match the size"):
        AdamW(make_parameters()[:2]).load_state_dict(AdamW(make_parameters()).state_dict())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"state_dtype": "fp8"}, ValueError, "state_dtype is 'fp8'; it needs to be one of float32, bfloat16, float8"),
        ({"seed": 1.5}, TypeError, "seed is a float; it needs to be an int"),
        ({"lr": -1.0}, ValueError, "lr is -1.0"),
        ({"betas": 0.9}, ValueError, "betas is 0.9; it needs to be a pair"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] is 1.0"),
    ],
)
def test_settings_that_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        AdamW(make_parameters(), **settings)
    with pytest.raises(error, match=message):
        AdamW([{"params": make_parameters(), **settings}])


def test_a_parameter_of_another_dtype():
    parameter = torch.nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))
    parameter.grad = torch.zeros(5, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"master has dtype torch\.bfloat16; it needs torch\.float32"):
        AdamW([parameter]).step()
