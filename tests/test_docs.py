"""The documentation's code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def test_the_example_replaces_the_loss_of_a_dmd2_style_trainer():
    (code,) = re.findall(r"```python\n(# In a DMD2.*?)```", (ROOT / "docs" / "kernels.md").read_text(), re.DOTALL)
    assert len(code.strip().splitlines()) <= 15
    names: dict = {}
    exec(compile(code, "docs/kernels.md", "exec"), names)

    torch.manual_seed(0)
    shift = torch.randn(4, 1, 1)
    networks = {"teacher": lambda x, t, text: x * t[0] + text, "critic": lambda x, t, text: x * t[0] - shift}
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    text, no_text = torch.ones(1), torch.zeros(1)
    loss = names["generator_loss"](x, networks["teacher"], networks["critic"], text, no_text, guidance_scale=3.0)
    loss.backward()
    assert loss > 0 and x.grad.isfinite().all()

    # What such trainers write out: x0 estimates, their difference, a pseudo-target.
    torch.manual_seed(0)
    torch.randn(4, 1, 1), torch.randn(2, 4, 8, 8)
    t = torch.rand(2)
    noise = torch.randn_like(x)
    at = t.view(-1, 1, 1, 1)
    x_t = (1 - at) * x.detach() + at * noise
    cond, uncond = (networks["teacher"](x_t, t, each) for each in (text, no_text))
    real = x_t - at * (uncond + 3.0 * (cond - uncond))
    fake = x_t - at * networks["critic"](x_t, t, text)
    gradient = (fake - real) / (x_t - real).abs().mean(dim=(1, 2, 3), keepdim=True)
    target = (x - gradient).detach()
    expected = 0.5 * torch.nn.functional.mse_loss(x, target)
    (expected_gradient,) = torch.autograd.grad(expected, x)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(x.grad, expected_gradient, rtol=1e-3, atol=1e-8)


def test_the_example_of_the_optimizers_step():
    """Clipped, rounded and written, and skipped where the gradient is not finite."""
    (code,) = re.findall(
        r"```python\n(import torch\n\nfrom dpdmd.kernels import Float8State.*?)```",
        (ROOT / "docs" / "kernels.md").read_text(),
        re.DOTALL,
    )
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(code, "docs/kernels.md", "exec"), names)
    torch.manual_seed(0)
    before = torch.randn(names["n"])
    clipped = names["gradient"].float() / names["norm"]
    # The first step of Adam: the sign of the gradient, but for eps.
    expected = (1 - 1e-7) * before - 1e-5 * clipped / (clipped.abs() + 1e-8)
    torch.testing.assert_close(names["master"], expected, rtol=1e-6, atol=1e-8)
    assert torch.equal(names["weight"], names["master"].bfloat16()) and names["exp_avg_sq"].values.any()

    broken = code.replace("norm = ", "gradient[7] = torch.inf\nnorm = ")
    torch.manual_seed(0)
    exec(compile(broken, "docs/kernels.md", "exec"), names)
    assert torch.equal(names["master"], before) and not names["exp_avg_sq"].values.any()
