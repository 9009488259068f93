"""The algorithm against the paper (arXiv 2602.03139), written out once more, in float64, on a real (small) SD3 transformer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dpdmd.config import DistillConfig
from dpdmd.diffusion import Flow, VariancePreserving
from dpdmd.distill import Distillation, Draws, guided, rollout

BATCH, SHAPE, SCALE = 3, (4, 8, 8), 3.5


def make_transformer(seed):
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(seed)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return model.double()


def make_diffusion(kind):
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    if kind == "flow":
        return Flow(FlowMatchEulerDiscreteScheduler(shift=3.0))
    # SDXL's noise schedule.
    return VariancePreserving(
        DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing")
    )


def call(model, diffusion):
    def network(x, t, cond):
        return model(
            hidden_states=x,
            timestep=diffusion.timestep(t),
            encoder_hidden_states=cond["prompt_embeds"],
            pooled_projections=cond["pooled_prompt_embeds"],
            return_dict=False,
        )[0]

    return network


def make_cond(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        "prompt_embeds": torch.randn(BATCH, 5, 12, generator=generator, dtype=torch.float64),
        "pooled_prompt_embeds": torch.randn(BATCH, 10, generator=generator, dtype=torch.float64),
    }


class Paper:
    """The paper, plainly: no kernels, no batching of guidance, float64 throughout; times are given as float32 numbers."""

    def __init__(self, kind, diffusion, config, teacher, critic, cond, uncond):
        self.flow = kind == "flow"
        self.diffusion, self.config = diffusion, config
        self.teacher, self.critic, self.cond, self.uncond = teacher, critic, cond, uncond
        # The independent source of the noise schedule.
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
        self.alphabar = torch.cumprod(1.0 - betas, 0).double()

    def bar(self, t):
        return self.alphabar[int(t)] if t >= 0 else torch.tensor(1.0, dtype=torch.float64)

    def net(self, network, z, t, cond):
        return network(z, torch.full((BATCH,), float(t), dtype=torch.float32), cond)

    def cfg(self, z, t):
        cond, uncond = self.net(self.teacher, z, t, self.cond), self.net(self.teacher, z, t, self.uncond)
        return uncond + SCALE * (cond - uncond)

    def step(self, z, prediction, t, t_next):
        if self.flow:
            return z + (float(t_next) - float(t)) * prediction
        a, a_next = self.bar(t), self.bar(t_next)
        x0 = (z - (1 - a).sqrt() * prediction) / a.sqrt()
        return a_next.sqrt() * x0 + (1 - a_next).sqrt() * prediction

    def x0(self, z, prediction, t):
        if self.flow:
            return z - float(t) * prediction
        return (z - (1 - self.bar(t)).sqrt() * prediction) / self.bar(t).sqrt()

    def noised(self, x, noise, t):
        if self.flow:
            return (1 - float(t)) * x + float(t) * noise
        return self.bar(t).sqrt() * x + (1 - self.bar(t)).sqrt() * noise

    def student_loss(self, student, eps, renoise_time, fresh, student_times, teacher_times):
        config = self.config
        with torch.no_grad():
            z = eps
            for k in range(config.anchor):
                z = self.step(z, self.cfg(z, teacher_times[k]), teacher_times[k], teacher_times[k + 1])
            t_anchor = teacher_times[config.anchor]
        first = self.net(student, eps, student_times[0], self.cond)
        if self.flow:
            diversity = (first - (eps - z) / (1 - float(t_anchor))).square().mean()
        else:
            with torch.no_grad():
                target = self.x0(z, self.cfg(z, t_anchor), t_anchor) if config.anchor < config.teacher_steps else z
            diversity = (self.x0(eps, first, student_times[0]) - target).square().mean()
        x = self.step(eps, first, student_times[0], student_times[1])
        if config.detach:
            x = x.detach()
        for n in range(1, config.student_steps):
            prediction = self.net(student, x, student_times[n], self.cond)
            x = self.step(x, prediction, student_times[n], student_times[n + 1])
        with torch.no_grad():
            t = renoise_time
            x_t = self.noised(x, fresh, t)
            x_real = self.x0(x_t, self.cfg(x_t, t), t)
            x_fake = self.x0(x_t, self.net(self.critic, x_t, t, self.cond), t)
            reference = {"teacher": x_t, "sample": x}.get(config.normalizer)
            weight = 1.0
            if reference is not None:
                weight = (reference - x_real).abs().mean(dim=(1, 2, 3), keepdim=True)
            target = x - (x_fake - x_real) / weight
        dmd = 0.5 * (x - target).square().mean()
        return dmd + config.diversity_weight * diversity, dmd, diversity


def setup(kind, **options):
    diffusion = make_diffusion(kind)
    config = DistillConfig(teacher_steps=6, anchor=2, guidance_scale=SCALE, **options)
    models = {role: make_transformer(seed) for seed, role in enumerate(("teacher", "student", "critic"))}
    networks = {role: call(model, diffusion) for role, model in models.items()}
    distillation = Distillation(diffusion, config)
    eps = torch.randn(BATCH, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    return diffusion, config, models, networks, distillation, eps


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", ["flow", "noise"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"detach": False},
        {"normalizer": "sample"},
        {"normalizer": "none", "student_grid": "uniform"},
        {"anchor": 6},  # K = T: the rollout reaches the data
        {"student_steps": 2},
    ],
    ids=str,
)
def test_student_update_is_the_papers(kind, options):
    options = {"anchor": 2, **options}
    diffusion = make_diffusion(kind)
    config = DistillConfig(teacher_steps=6, guidance_scale=SCALE, diversity_weight=0.05, **options)
    _, _, models, networks, _, eps = setup(kind)
    distillation = Distillation(diffusion, config)
    cond, uncond = make_cond(1), make_cond(2)

    loss = distillation.student_loss(*networks_of(networks), eps, cond, uncond, Draws(0, 5, "student", 0))
    loss.remaining.backward()
    ours = gradient(models["student"])
    assert all(p.grad is None for role in ("teacher", "critic") for p in models[role].parameters())

    models["student"].zero_grad()
    draws = Draws(0, 5, "student", 0)
    t = diffusion.renoise_times[draws.index(1000, 1)]
    fresh = draws.noise((BATCH, *SHAPE), torch.float64)
    paper = Paper(kind, diffusion, config, networks["teacher"], networks["critic"], cond, uncond)
    total, dmd, diversity = paper.student_loss(
        networks["student"], eps, t, fresh, distillation.student_times, distillation.teacher_times
    )
    total.backward()
    assert relative(ours, gradient(models["student"])) < 1e-6
    assert float(loss.dmd) == pytest.approx(float(dmd), rel=1e-6)
    assert float(loss.diversity) == pytest.approx(float(diversity), rel=1e-6)
    assert float(diversity) > 1e-3 and float(dmd) > 1e-6  # neither term is hidden by being nothing


def networks_of(networks):
    return networks["student"], networks["teacher"], networks["critic"]


@pytest.mark.parametrize("kind", ["flow", "noise"])
def test_critic_update_is_the_papers(kind):
    diffusion, config, models, networks, distillation, eps = setup(kind)
    cond = make_cond(1)
    distillation.critic_loss(networks["critic"], networks["student"], eps, cond, Draws(0, 0, "critic", 0)).backward()
    ours = gradient(models["critic"])
    assert all(p.grad is None for p in models["student"].parameters())

    models["critic"].zero_grad()
    draws = Draws(0, 0, "critic", 0)
    t = diffusion.renoise_times[draws.index(1000, 1)]
    fresh = draws.noise((BATCH, *SHAPE), torch.float64)
    paper = Paper(kind, diffusion, config, networks["teacher"], networks["critic"], cond, None)
    with torch.no_grad():
        x = eps
        for n in range(config.student_steps):
            times = distillation.student_times
            x = paper.step(x, paper.net(networks["student"], x, times[n], cond), times[n], times[n + 1])
    target = fresh - x if kind == "flow" else fresh
    (paper.net(networks["critic"], paper.noised(x, fresh, t), t, cond) - target).square().mean().backward()
    assert relative(ours, gradient(models["critic"])) < 1e-6


class SeparateSteps(nn.Module):
    """A network with parameters of its own for each time that it is asked at."""

    def __init__(self, times):
        super().__init__()
        self.times = [float(time) for time in times]
        self.maps = nn.ModuleList(nn.Linear(6, 6, dtype=torch.float64) for _ in self.times)

    def forward(self, x, t, cond):
        return self.maps[self.times.index(float(t[0]))](x) + cond


@pytest.mark.parametrize("kind", ["flow", "noise"])
@pytest.mark.parametrize("options, calls", [({}, 1), ({"detach": False}, 0), ({"method": "dmd"}, 0)], ids=str)
def test_first_step_differentiated_by_itself_gives_the_same_gradient(kind, options, calls):
    """Before the second step's forward pass, where the two share no graph; else all is left for the end."""
    config = DistillConfig(teacher_steps=6, anchor=2, guidance_scale=SCALE, **options)
    distillation = Distillation(make_diffusion(kind), config)
    gradients, totals = [], []
    for in_parts in (False, True):
        _, _, models, networks, _, eps = setup(kind)
        passes, seen = [], []
        student, teacher, critic = networks_of(networks)

        def counted(x, t, cond, passes=passes, student=student):
            passes.append(torch.is_grad_enabled())
            return student(x, t, cond)

        def backward(loss, passes=passes, seen=seen):
            seen.append(len(passes))
            loss.backward()

        draws = Draws(0, 5, "student", 0)
        losses = distillation.student_loss(
            counted, teacher, critic, eps, make_cond(1), make_cond(2), draws, backward if in_parts else None
        )
        losses.remaining.backward()
        assert len(passes) == config.student_steps and seen == [1] * (calls if in_parts else 0)
        gradients.append(gradient(models["student"]))
        totals.append(float(losses.total))
    assert relative(gradients[1], gradients[0]) < 1e-6 and totals[0] == totals[1]
    assert not losses.total.requires_grad


@pytest.mark.parametrize("kind", ["flow", "noise"])
@pytest.mark.parametrize("detach", [True, False])
def test_detach_keeps_the_dmd_gradient_from_the_first_step(kind, detach):
    diffusion = make_diffusion(kind)
    config = DistillConfig(teacher_steps=6, anchor=2, guidance_scale=1.0, detach=detach, diversity_weight=0.0)
    distillation = Distillation(diffusion, config)
    torch.manual_seed(0)
    student = SeparateSteps(distillation.student_times[:-1])
    teacher, critic = (lambda x, t, cond, w=w: torch.tanh(w * x) + cond for w in (0.5, 0.8))
    eps, cond = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    distillation.student_loss(student, teacher, critic, eps, cond, None, Draws(0, 0, "student", 0)).remaining.backward()
    first, *later = [step.weight.grad for step in student.maps]
    assert all(grad.abs().sum() > 0 for grad in later)
    # With weight 0 the diversity term's gradient is exactly 0, so whatever is there came from DMD.
    assert (first.abs().sum() > 0) == (not detach)


def test_diversity_alone_trains_the_first_step_alone():
    distillation = Distillation(make_diffusion("flow"), DistillConfig(teacher_steps=6, anchor=2, guidance_scale=1.0))
    torch.manual_seed(0)
    student = SeparateSteps(distillation.student_times[:-1])
    same = lambda x, t, cond: torch.tanh(x) + cond  # noqa: E731  teacher and critic agree: no DMD gradient
    eps, cond = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    distillation.student_loss(student, same, same, eps, cond, None, Draws(0, 0, "student", 0)).remaining.backward()
    first, *later = [step.weight.grad for step in student.maps]
    assert first.abs().sum() > 0
    assert all(grad.abs().sum() == 0 for grad in later)


def test_method_dmd_trains_every_step_without_a_teacher_rollout():
    distillation = Distillation(make_diffusion("flow"), DistillConfig(method="dmd", guidance_scale=1.0))
    student = SeparateSteps(distillation.student_times[:-1])
    calls = []

    def teacher(x, t, cond):
        calls.append(float(t[0]))
        return 0.5 * x

    eps = torch.randn(4, 6, dtype=torch.float64)
    loss = distillation.student_loss(student, teacher, lambda x, t, c: x, eps, eps, None, Draws(0, 0, "student", 0))
    loss.remaining.backward()
    assert len(calls) == 1 and float(loss.diversity) == 0.0
    assert all(step.weight.grad.abs().sum() > 0 for step in student.maps)


@pytest.mark.parametrize(
    "kind, anchor, evaluations", [("flow", 2, 3), ("flow", 6, 7), ("noise", 2, 4), ("noise", 6, 7)]
)
def test_teacher_is_asked_no_more_than_needed(kind, anchor, evaluations):
    """K steps and the score; for noise prediction once more at the anchor, unless that is the data."""
    config = DistillConfig(teacher_steps=6, anchor=anchor, guidance_scale=1.0)
    distillation = Distillation(make_diffusion(kind), config)
    student = SeparateSteps(distillation.student_times[:-1])
    calls = []

    def teacher(x, t, cond):
        calls.append(float(t[0]))
        return 0.5 * x

    eps = torch.randn(4, 6, dtype=torch.float64)
    distillation.student_loss(student, teacher, lambda x, t, c: x, eps, eps, None, Draws(0, 0, "student", 0))
    assert len(calls) == evaluations


def test_random_rollout_gradient_is_that_of_one_step():
    """Every remaining step is chosen sometimes, only it has a gradient, and the sample is the full chain's."""
    config = DistillConfig(
        teacher_steps=6, anchor=2, guidance_scale=1.0, rollout_gradient="random", diversity_weight=0.0
    )
    diffusion = make_diffusion("flow")
    distillation = Distillation(diffusion, config)
    full = Distillation(diffusion, config.model_copy(update={"rollout_gradient": "full"}))
    teacher, critic = (lambda x, t, cond, w=w: torch.tanh(w * x) + cond for w in (0.5, 0.8))
    eps, cond = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    chosen = set()
    for iteration in range(20):
        student = SeparateSteps(distillation.student_times[:-1])
        arguments = (student, teacher, critic, eps, cond, None)
        loss = distillation.student_loss(*arguments, Draws(0, iteration, "student", 0))
        torch.testing.assert_close(
            loss.sample, full.student_loss(*arguments, Draws(0, iteration, "student", 0)).sample, rtol=0, atol=0
        )
        loss.remaining.backward()
        with_gradient = [
            n for n, step in enumerate(student.maps) if step.weight.grad is not None and step.weight.grad.any()
        ]
        assert len(with_gradient) == 1
        chosen.update(with_gradient)
        others = {Draws(0, iteration, "student", shard).shared_index(3) for shard in range(4)}
        assert others == {with_gradient[0] - 1}  # every process chooses the same step
    assert chosen == {1, 2, 3}


@pytest.mark.parametrize("per", ["batch", "sample"])
@pytest.mark.parametrize("distribution", ["scheduler", "training", "uniform"])
@pytest.mark.parametrize("kind", ["flow", "noise"])
def test_renoise_times(kind, per, distribution):
    diffusion = make_diffusion(kind)
    config = DistillConfig(renoise={"per": per, "distribution": distribution, "low": 0.2, "high": 0.6})
    distillation = Distillation(diffusion, config)
    times = torch.stack([distillation._renoise_time(8, Draws(0, iteration, "critic", 0)) for iteration in range(200)])
    assert times.dtype == torch.float32 and times.shape == (200, 8)
    assert (times.std(dim=1) > 0).any() == (per == "sample")
    if distribution != "uniform":
        grid = diffusion.renoise_times if distribution == "scheduler" else diffusion.train_times
        assert torch.isin(times, grid).all()
        assert times.max() - times.min() > 0.9 * (grid.max() - grid.min())
    else:
        low, high = (float(diffusion.uniform_time(torch.tensor(share))) for share in (0.2, 0.6))
        assert low <= times.min() < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < times.max() <= high


@pytest.mark.parametrize("settings", [{"shift": 3.0}, {"shift": 6.0, "num_train_timesteps": 500}], ids=str)
def test_renoise_times_of_the_scheduler_are_those_of_its_set_timesteps(settings):
    """To the bit, at every index: those of a scheduler that was told how many steps to make, or never told."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    class Every:  # every index of the grid, in the place of one drawn
        def index(self, high, count):
            assert count == high
            return torch.arange(high)

    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    training = scheduler.sigmas
    count = len(training)
    scheduler.set_timesteps(count)
    for distribution, expected in (("scheduler", scheduler.sigmas[:-1]), ("training", training)):
        config = DistillConfig(renoise={"per": "sample", "distribution": distribution})
        diffusion = Flow(FlowMatchEulerDiscreteScheduler(**settings))
        assert torch.equal(Distillation(diffusion, config)._renoise_time(count, Every()), expected)
    assert DistillConfig().renoise.distribution == "scheduler"
    assert not torch.equal(scheduler.sigmas[:-1], training)


def test_draws_differ_by_every_part_of_their_key_and_repeat():
    keys = [(0, 0, "student", 0), (1, 0, "student", 0), (0, 1, "student", 0), (0, 0, "critic", 0), (0, 0, "student", 1)]
    noises = [Draws(*key).noise((64,)) for key in keys]
    for i, a in enumerate(noises):
        assert torch.equal(a, Draws(*keys[i]).noise((64,)))
        for b in noises[:i]:
            assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.6 and not torch.equal(a, b)


def test_guidance_needs_unconditional_embeddings():
    network = lambda x, t, cond: x  # noqa: E731
    x, t = torch.zeros(2, 4), torch.ones(2)
    with pytest.raises(ValueError, match=r"guidance_scale = 3.5 needs unconditional embeddings, but uncond is None"):
        guided(network, x, t, x, None, 3.5)
    assert guided(network, x, t, x, None, 1.0)[1] is None


def test_broken_score_network_shows_in_the_loss():
    """The kernel zeroes non-finite gradient entries; a network that is broken must not pass for one that agrees."""
    distillation = Distillation(make_diffusion("flow"), DistillConfig(method="dmd", guidance_scale=1.0))
    student = SeparateSteps(distillation.student_times[:-1])
    eps = torch.randn(2, 6, dtype=torch.float64)
    broken = lambda x, t, cond: x * torch.nan  # noqa: E731
    loss = distillation.student_loss(student, lambda x, t, c: x, broken, eps, eps, None, Draws(0, 0, "student", 0))
    assert loss.total.isnan()
    loss.remaining.backward()
    assert not student.maps[0].weight.grad.isfinite().any()


def test_rollout_with_one_step_grid_reaches_the_data():
    diffusion = make_diffusion("flow")
    eps, data = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    x = rollout(diffusion, lambda z, t, cond: eps - data, eps, torch.tensor([1.0, 0.0]), None)
    torch.testing.assert_close(x, data)


def test_times_stay_float32():
    """A bfloat16 time is off by up to 0.4 %, and (1 - t) in the target by several percent."""
    for kind in ("flow", "noise"):
        diffusion = make_diffusion(kind)
        distillation = Distillation(diffusion, DistillConfig())
        seen = []

        def network(x, t, cond, seen=seen):
            seen.append(t.dtype)
            return x.bfloat16()

        eps = torch.randn(2, 6)
        distillation.critic_loss(network, network, eps, eps, Draws(0, 0, "critic", 0))
        distillation.student_loss(network, network, network, eps, eps, eps, Draws(0, 0, "student", 0))
        assert set(seen) == {torch.float32}
        assert distillation.student_times.dtype == distillation.teacher_times.dtype == torch.float32
