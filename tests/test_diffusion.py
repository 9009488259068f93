"""Time grids against the schedulers themselves, conversions against their definitions."""

from __future__ import annotations

import pytest
import torch

from dpdmd.diffusion import Flow, VariancePreserving


def sd3_scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def sdxl_scheduler(**options):
    from diffusers import EulerDiscreteScheduler

    options = {"timestep_spacing": "leading", "steps_offset": 1, **options}
    return EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **options)


def test_student_grid_of_the_scheduler_is_the_papers():
    times = Flow(sd3_scheduler()).student_times(4, "scheduler")
    torch.testing.assert_close(times, torch.tensor([1, 0.858, 0.602, 0.009, 0]), atol=5e-4, rtol=0)


def test_uniform_grid_is_uniform_before_the_shift():
    times = Flow(sd3_scheduler()).student_times(4, "uniform")
    torch.testing.assert_close(times, torch.tensor([1, 0.9, 0.75, 0.5, 0]))


def test_explicit_grid():
    times = Flow(sd3_scheduler()).student_times(3, [1.0, 0.8, 0.3])
    torch.testing.assert_close(times, torch.tensor([1, 0.8, 0.3, 0]))
    with pytest.raises(ValueError, match=r"student_grid = \[0.9, 0.3\]: starts at 0.9000"):
        Flow(sd3_scheduler()).student_times(2, [0.9, 0.3])
    with pytest.raises(ValueError, match=r"student_grid = \[2.0, 0.3\]: starts at 2.0000"):
        Flow(sd3_scheduler()).student_times(2, [2.0, 0.3])
    with pytest.raises(ValueError, match=r"in float32 it is \[1.0, 0.0, 0.0\], and must fall"):
        Flow(sd3_scheduler()).student_times(2, [1.0, 1e-320])


@pytest.mark.parametrize("grid", ["scheduler", "uniform", [1.0, 0.77, 0.4, 0.1]])
def test_a_pipeline_given_the_sigmas_walks_the_grid(grid):
    """Bit for bit: the exported student is sampled by stock pipelines too."""
    flow, scheduler = Flow(sd3_scheduler()), sd3_scheduler()
    scheduler.set_timesteps(sigmas=flow.pipeline_sigmas(4, grid))
    assert torch.equal(scheduler.sigmas, flow.student_times(4, grid))
    assert torch.equal(scheduler.timesteps, flow.timestep(flow.student_times(4, grid)[:-1]))


def test_teacher_and_training_grids_are_the_schedulers():
    flow, scheduler = Flow(sd3_scheduler()), sd3_scheduler()
    assert torch.equal(flow.train_times, scheduler.sigmas) and len(flow.train_times) == 1000
    scheduler.set_timesteps(30)
    assert torch.equal(flow.times(30), scheduler.sigmas)
    assert flow.times(30).dtype == torch.float32


def test_renoise_times_are_those_of_set_timesteps_1000():
    flow, scheduler = Flow(sd3_scheduler()), sd3_scheduler()
    scheduler.set_timesteps(1000)
    assert torch.equal(flow.renoise_times, scheduler.sigmas[:-1])
    assert flow.renoise_times.dtype == torch.float32 and len(flow.renoise_times) == 1000
    assert flow.renoise_times[0] == 1 and flow.renoise_times[-1].item() == pytest.approx(0.00893, abs=1e-5)
    assert flow.train_times[-1].item() == pytest.approx(0.00299, abs=1e-5)


@pytest.mark.parametrize("even_steps", [False, True])
@pytest.mark.parametrize(
    "settings, mu",
    [
        ({"shift": 3.0, "use_dynamic_shifting": True}, 0.7),
        ({"shift": 3.0, "use_dynamic_shifting": True, "time_shift_type": "linear"}, 0.7),
        ({"use_dynamic_shifting": True, "shift_terminal": 0.02}, 0.7),
        ({"shift": 3.0}, None),
        ({"shift": 3.0, "use_karras_sigmas": True}, None),
        ({"shift": 5.0, "num_train_timesteps": 500}, None),
    ],
    ids=str,
)
def test_renoise_times_of_other_schedulers(settings, mu, even_steps):
    """However the pipeline makes its steps: they are the scheduler's own, as many as it was trained with."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    flow = Flow(scheduler, mu=mu, even_steps=even_steps)
    count = len(scheduler.sigmas)
    scheduler.set_timesteps(count, mu=mu)
    assert torch.equal(flow.renoise_times, scheduler.sigmas[:-1]) and len(flow.renoise_times) == count


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_renoise_times_of_noise_prediction_are_the_trained_steps(spacing):
    process = VariancePreserving(sdxl_scheduler(timestep_spacing=spacing))
    assert process.renoise_times.tolist() == list(range(999, -1, -1))


def test_a_shift_by_resolution_must_be_told():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match=r"mu = None: a scheduler with use_dynamic_shifting needs"):
        Flow(scheduler)
    flow = Flow(scheduler, mu=0.7)
    scheduler.set_timesteps(30, mu=0.7)
    assert torch.equal(flow.times(30), scheduler.sigmas)


def test_a_shift_by_the_number_of_steps():
    from diffusers import FlowMatchEulerDiscreteScheduler

    def mu(num_steps):
        return 0.5 + 1 / num_steps

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    flow, fixed = Flow(scheduler, mu=mu, even_steps=True), Flow(scheduler, mu=mu(1000), even_steps=True)
    for num_steps in (4, 30):
        scheduler.set_timesteps(sigmas=flow.pipeline_sigmas(num_steps, "scheduler"), mu=mu(num_steps))
        assert torch.equal(flow.times(num_steps), scheduler.sigmas)
        assert not torch.allclose(flow.times(num_steps), fixed.times(num_steps))
    times = flow.student_times(3, [1.0, 0.8, 0.3])
    torch.testing.assert_close(times, torch.tensor([1, 0.8, 0.3, 0]))
    assert torch.equal(flow.train_times, fixed.train_times) and torch.equal(flow.renoise_times, fixed.renoise_times)


def test_the_model_s_scheduler_is_not_changed():
    scheduler = sd3_scheduler()
    before = scheduler.sigmas.clone()
    flow = Flow(scheduler)
    flow.times(30), flow.student_times(4, "uniform")
    assert torch.equal(scheduler.sigmas, before)


def test_variance_preserving_grids():
    process = VariancePreserving(sdxl_scheduler())
    scheduler = sdxl_scheduler()
    scheduler.set_timesteps(30)
    assert torch.equal(process.times(30)[:-1], scheduler.timesteps.float()) and process.times(30)[-1] == -1
    assert process.student_times(4, "uniform").tolist() == [999, 749, 499, 249, -1]
    assert process.student_times(2, [999.0, 300.0]).tolist() == [999, 300, -1]
    with pytest.raises(ValueError, match="starts above the last training step, 999"):
        process.student_times(1, [1500.0])


def test_variance_preserving_needs_noise_prediction():
    with pytest.raises(ValueError, match="prediction_type = 'v_prediction': only 'epsilon'"):
        VariancePreserving(sdxl_scheduler(prediction_type="v_prediction"))


def test_alpha_and_sigma():
    process, scheduler = VariancePreserving(sdxl_scheduler()), sdxl_scheduler()
    t = torch.tensor([999.0, 500.0, 0.0, -1.0])
    alpha, sigma = process.alpha_sigma(t)
    bar = torch.cat([scheduler.alphas_cumprod[[999, 500, 0]].double(), torch.ones(1, dtype=torch.float64)])
    torch.testing.assert_close(alpha, bar.sqrt())
    torch.testing.assert_close(sigma, (1 - bar).sqrt(), atol=1e-12, rtol=1e-7)


def test_steps_are_those_of_the_euler_scheduler():
    """diffusers works in (x / alpha, sigma / alpha); the step here, taken on x itself, is the same one."""
    process, scheduler = VariancePreserving(sdxl_scheduler()), sdxl_scheduler()
    scheduler.set_timesteps(5)
    times = process.times(5)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, generator=generator)
    ours, theirs = x, x * (1 + scheduler.sigmas[0] ** 2).sqrt()
    for index in range(5):
        prediction = torch.randn(2, 4, generator=generator)
        ours = process.step(ours, prediction, times[index].expand(2), times[index + 1].expand(2))
        theirs = scheduler.step(prediction, scheduler.timesteps[index], theirs).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # at the data both scalings are 1


@pytest.mark.parametrize("make", [lambda: Flow(sd3_scheduler()), lambda: VariancePreserving(sdxl_scheduler())])
def test_conversion_to_x0_undoes_renoising(make):
    process = make()
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    t = process.train_times[[10, 500, 990]]
    prediction = noise - x if process.prediction == "velocity" else noise
    a, b = process.to_x0(t, torch.float64)
    x0 = a[:, None] * process.renoise(x, noise, t) + b[:, None] * prediction
    torch.testing.assert_close(x0, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [lambda: Flow(sd3_scheduler()), lambda: VariancePreserving(sdxl_scheduler())])
def test_normaliser_with_conversion_agrees_with_the_form_without_t(make):
    """Only for flows is there a form without t; both must give the same gradient."""
    process = make()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    real, fake, uncond, noise = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(4))
    t = process.train_times[[50, 300, 800]]
    x_t = process.renoise(x.detach(), noise, t)
    options = {"teacher_uncond": uncond, "guidance_scale": 3.0}
    (ours,) = torch.autograd.grad(process.dmd_loss(x, real, fake, x_t, t, normalizer="teacher", **options), x)
    a, b = (each[:, None] for each in process.to_x0(t, torch.float64))
    guided = uncond + 3.0 * (real - uncond)
    x_real, x_fake = a * x_t + b * guided, a * x_t + b * fake
    expected = (x_fake - x_real) / (x_t - x_real).abs().mean(1, keepdim=True) / x.numel()
    assert float((ours - expected).norm() / expected.norm()) < 1e-9
