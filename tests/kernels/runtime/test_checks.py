"""Every operation refuses what it cannot use, and says which argument, what it got and what it needs."""

import pytest
import torch

from dpdmd.kernels import (
    dmd_loss,
    flow_matching_loss,
    guided_euler_step,
    renoise,
    v_prediction_loss,
    x_prediction_loss,
)

X = torch.zeros(2, 5)
T = torch.full((2,), 0.5)


def dmd(x=X, teacher=X, critic=X, **rest):
    return dmd_loss(x, teacher, critic, **rest)


def v_prediction(v=X, noise=X, z=X, **rest):
    return v_prediction_loss(v, noise, z, 0.5, **rest)


def flow_matching(v=X, noise=X, x=X, **rest):
    return flow_matching_loss(v, noise, x, **rest)


def x_prediction(prediction=X, x_t=X, x0_target=X, **rest):
    return x_prediction_loss(prediction, x_t, (T, T), x0_target, **rest)


def renoised(x=X, noise=X):
    return renoise(x, noise, T)


def stepped(x=X, v=X, **rest):
    return guided_euler_step(x, v, T, T, **rest)


# Each operation on its tensors by name, and the names of those tensors.
OPERATIONS = {
    "dmd_loss": (dmd, ("x", "teacher", "critic", "teacher_uncond", "x_t")),
    "v_prediction_loss": (v_prediction, ("v", "noise", "z")),
    "flow_matching_loss": (flow_matching, ("v", "noise", "x")),
    "x_prediction_loss": (x_prediction, ("prediction", "x_t", "x0_target")),
    "renoise": (renoised, ("x", "noise")),
    "guided_euler_step": (stepped, ("x", "v", "v_uncond")),
}
TENSORS = [(operation, name) for operation, (_, names) in OPERATIONS.items() for name in names]
OTHERS = [(operation, name, names[0]) for operation, (_, names) in OPERATIONS.items() for name in names[1:]]
LOSSES = [operation for operation in OPERATIONS if operation.endswith("_loss")]

# Each operation on one coefficient per sample by name, with float32 tensors unless told otherwise.
COEFFICIENTS = {
    "v_prediction_loss's t": ("t", lambda t, x=X: v_prediction_loss(x, x, x, t)),
    "x_prediction_loss's a": ("to_x0's a", lambda t, x=X: x_prediction_loss(x, x, (t, 1.0), x)),
    "x_prediction_loss's b": ("to_x0's b", lambda t, x=X: x_prediction_loss(x, x, (1.0, t), x)),
    "dmd_loss's a": ("to_x0's a", lambda t, x=X: dmd_loss(x, x, x, x_t=x, to_x0=(t, 1.0))),
    "dmd_loss's b": ("to_x0's b", lambda t, x=X: dmd_loss(x, x, x, x_t=x, to_x0=(1.0, t))),
    "renoise's t": ("t", lambda t, x=X: renoise(x, x, t)),
    "renoise's alpha": ("t's alpha", lambda t, x=X: renoise(x, x, (t, 1.0))),
    "renoise's sigma": ("t's sigma", lambda t, x=X: renoise(x, x, (1.0, t))),
    "guided_euler_step's t": ("t", lambda t, x=X: guided_euler_step(x, x, t, 0.0)),
    "guided_euler_step's t_next": ("t_next", lambda t, x=X: guided_euler_step(x, x, 1.0, t)),
}
coefficients = pytest.mark.parametrize(("name", "run"), COEFFICIENTS.values(), ids=COEFFICIENTS)


@pytest.mark.parametrize(("operation", "name"), TENSORS)
def test_dtype(operation, name):
    run, _ = OPERATIONS[operation]
    with pytest.raises(
        TypeError, match=f"^{name} has dtype torch.int64; it needs float32, float16, bfloat16 or float64"
    ):
        run(**{name: X.long()})


@pytest.mark.parametrize(("operation", "name"), TENSORS)
def test_no_tensor(operation, name):
    run, _ = OPERATIONS[operation]
    with pytest.raises(TypeError, match=f"^{name} is a list; it needs to be a torch.Tensor"):
        run(**{name: [1.0]})


@pytest.mark.parametrize(("operation", "name", "first"), OTHERS)
def test_shape(operation, name, first):
    run, _ = OPERATIONS[operation]
    # (2, 1) would broadcast.
    with pytest.raises(ValueError, match=rf"^{name} has shape \(2, 1\); it needs {first}'s shape \(2, 5\)"):
        run(**{name: X[:, :1]})


@pytest.mark.parametrize(("operation", "name", "first"), OTHERS)
def test_device(operation, name, first):
    run, _ = OPERATIONS[operation]
    with pytest.raises(ValueError, match=f"^{name} is on meta; it needs to be on {first}'s device cpu"):
        run(**{name: X.to("meta")})


@pytest.mark.parametrize(("operation", "name"), [(operation, names[0]) for operation, (_, names) in OPERATIONS.items()])
def test_batch_dimension(operation, name):
    run, names = OPERATIONS[operation]
    with pytest.raises(ValueError, match=rf"^{name} has shape \(\); it needs a batch dimension: \(B, ...\)"):
        run(**{each: torch.zeros(()) for each in names})


@pytest.mark.parametrize("operation", LOSSES)
def test_reduction(operation):
    run, _ = OPERATIONS[operation]
    with pytest.raises(ValueError, match=r"^reduction is 'max'; it needs to be one of 'mean', 'sum', 'none'"):
        run(reduction="max")


@coefficients
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_coefficient_dtype(name, run, dtype):
    with pytest.raises(TypeError, match=f"^{name} has dtype {dtype}; it needs float32"):
        run(T.to(dtype))


@coefficients
def test_coefficient_of_float64_goes_with_float64(name, run):
    run(T.double(), X.double())
    run(T, X.double())


@coefficients
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1)])
def test_coefficient_shape(name, run, shape):
    message = rf"^{name} has shape \({', '.join(map(str, shape))},?\); it needs one entry a sample: \(2,\)"
    with pytest.raises(ValueError, match=message):
        run(torch.full(shape, 0.5))


@coefficients
def test_coefficient_device(name, run):
    with pytest.raises(ValueError, match=f"^{name} is on meta; it needs to be on cpu like the other tensors"):
        run(T.to("meta"))


@coefficients
@pytest.mark.parametrize("value", ["0.5", True, None])
def test_coefficient_type(name, run, value):
    with pytest.raises(
        TypeError, match=f"^{name} is a {type(value).__name__}; it needs to be a float or a float32 tensor"
    ):
        run(value)


@pytest.mark.parametrize(
    ("parameter", "parts", "run"),
    [
        ("to_x0", "a, b", lambda pair: x_prediction_loss(X, X, pair, X)),
        ("to_x0", "a, b", lambda pair: dmd_loss(X, X, X, x_t=X, to_x0=pair)),
        ("t", "alpha, sigma", lambda pair: renoise(X, X, pair)),
    ],
)
def test_pair(parameter, parts, run):
    with pytest.raises(ValueError, match=rf"^{parameter} has 3 entries; it needs to be a pair \({parts}\)"):
        run((T, T, T))
    if parameter == "to_x0":
        with pytest.raises(TypeError, match=rf"^to_x0 is a Tensor; it needs to be a pair \({parts}\)"):
            run(torch.stack([T, T]))


@pytest.mark.parametrize("scale", ["3.5", None, True, torch.tensor(3.5)])
def test_guidance_scale(scale):
    message = f"^guidance_scale is a {type(scale).__name__}; it needs to be a float"
    with pytest.raises(TypeError, match=message):
        dmd_loss(X, X, X, teacher_uncond=X, guidance_scale=scale)
    with pytest.raises(TypeError, match=message):
        guided_euler_step(X, X, 1.0, 0.5, v_uncond=X, guidance_scale=scale)
