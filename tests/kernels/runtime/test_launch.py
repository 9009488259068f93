"""What concerns the Triton kernels alone: registration, layouts, launches; and on a GPU sizes, streams and graphs."""

import pytest
import torch

from dpdmd.kernels import (
    Philox,
    dmd_loss,
    flow_matching_loss,
    guided_euler_step,
    renoise,
    use_backend,
    v_prediction_loss,
    x_prediction_loss,
)
from dpdmd.kernels.losses.squared import _total_kernel
from dpdmd.kernels.runtime import launch, layout

pytest.importorskip("triton")

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
T = (0.3, 0.6)


def calls(x, y, z):
    """Each public operation with each of its kernels, by name."""
    t = torch.tensor(T, device=x.device)
    return {
        "dmd_loss": lambda: dmd_loss(x, y, z, teacher_uncond=x.detach() + 1, guidance_scale=3.5),
        "dmd_loss, converted": lambda: dmd_loss(x, y, z, x_t=y, to_x0=(1.0, -t), normalizer="sample"),
        "dmd_loss, no normalizer": lambda: dmd_loss(x, y, z, x_t=y, to_x0=(t, -t), normalizer="none"),
        "v_prediction_loss": lambda: v_prediction_loss(x, y, z, t),
        "flow_matching_loss": lambda: flow_matching_loss(x, y, z),
        "x_prediction_loss": lambda: x_prediction_loss(x, y, (1.0, t), z),
        "renoise": lambda: renoise(x, y, t),
        "renoise, Philox": lambda: renoise(x, Philox(3), t),
        "guided_euler_step": lambda: guided_euler_step(x, y, t, 0.0, v_uncond=z, guidance_scale=3.5),
    }


OPERATIONS = {
    "dmd_loss_triton": lambda x, y, z, t: (x, y, z, x, 3.5, y, None, 1.0, t, 0.0, "sample", "mean"),
    "v_prediction_loss_triton": lambda x, y, z, t: (x, y, z, t, 0.0, "none"),
    "flow_matching_loss_triton": lambda x, y, z, t: (x, y, z, "mean"),
    "x_prediction_loss_triton": lambda x, y, z, t: (x, y, t, 0.0, None, 2.0, z, "sum"),
    "renoise_triton": lambda x, y, z, t: (x, y, None, None, t, 0.0),
    "renoise_philox_triton": lambda x, y, z, t: (x, 5, t, None, None, 0.5),
    "guided_euler_step_triton": lambda x, y, z, t: (x, y, z, t, 0.0, None, 0.25, 3.5),
    "multiply_triton": lambda x, y, z, t: (x, t, 0.0, None, 0.5, 2.0, torch.bfloat16),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_opcheck(randn, restride, name, layout):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y, z = (restride(randn(2, 3, 4, 5, seed=seed), layout).to(device) for seed in range(3))
    arguments = OPERATIONS[name](x, y, z, torch.tensor(T, device=device))
    torch.library.opcheck(getattr(torch.ops.dpdmd, name).default, arguments)


@pytest.mark.parametrize("how", ["contiguous", "channels_last", "batch_sliced", "padded", "chunked", "expanded"])
def test_dense_samples_are_not_copied(randn, restride, how):
    x, y, z = (restride(randn(2, 3, 4, 5, seed=seed), how) for seed in range(3))
    for one, other in zip(layout.align(x, y, None, z), (x, y, None, z), strict=True):
        assert one is other


@pytest.mark.parametrize("first", ["contiguous", "channels_last", "transposed", "sliced", "expanded"])
@pytest.mark.parametrize("second", ["contiguous", "channels_last", "transposed", "sliced", "expanded"])
def test_aligned_tensors_walk_alike(randn, restride, first, second):
    """Element i of a sample in memory is the same element in all of them, and in an empty tensor made for them."""
    x, y = restride(randn(2, 3, 4, 5), first), restride(randn(2, 3, 4, 5, seed=1), second)
    one, other = layout.align(x, y)
    out = layout.empty_like(x, torch.float32)
    assert torch.equal(one, x) and torch.equal(other, y)
    assert one.stride()[1:] == other.stride()[1:] == out.stride()[1:]
    assert sorted(one.stride()[1:])[0] == 1 and out.stride(0) == 60
    assert out.shape == x.shape


def test_a_dimension_of_one_may_have_any_stride(randn):
    x = randn(2, 1, 4, 5)
    y = x.as_strided(x.shape, (20, 777, 5, 1))
    one, other = layout.align(y.transpose(2, 3).contiguous().transpose(2, 3), x)
    assert torch.equal(one, x) and torch.equal(other, x)
    assert layout.align(x, y)[1] is y


@pytest.mark.parametrize("count", [1, 1024, 1025, 5000])
def test_total_of_more_sums_than_a_block(randn, count):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sums, out = randn(2 * count).to(device), torch.empty(2, device=device)
    _total_kernel(2, sums, out, count, 0.5, 1024)
    torch.testing.assert_close(out, 0.5 * sums.double().view(2, count).sum(1), check_dtype=False)


class TestLaunch:
    """`launch.Kernel` on a GPU."""

    pytestmark = gpu

    @pytest.fixture(autouse=True)
    def on_the_gpu(self):
        torch.set_default_device("cuda")
        with use_backend("triton"):
            yield
        torch.set_default_device(None)

    @pytest.mark.parametrize("name", calls(*[torch.zeros(2, 1)] * 3))
    def test_cuda_graph(self, randn, name):
        """The second replay reads new values at the same addresses."""
        tensors = [randn(2, 5000, seed=seed) for seed in range(3)]
        tensors[0].requires_grad_()
        call = calls(*tensors)[name]

        def step():
            out = call()
            return out, *torch.autograd.grad(out, tensors[0], torch.ones_like(out))

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for seed in (3, 6):
            for i, tensor in enumerate(tensors):
                tensor.detach().copy_(randn(2, 5000, seed=seed + i))
            graph.replay()
            replayed = [tensor.clone() for tensor in captured]
            assert all(map(torch.equal, replayed, step()))

    def test_unaligned_tensors_and_new_sizes_after_aligned_ones(self, randn):
        """Each is another specialisation, or none: the launch must not take one for another."""
        for size in (4096, 4097, 1, 16, 8192):
            for offset in (0, 1):
                x, y, z = (randn(2 * size + offset, seed=seed)[offset:].view(2, size) for seed in range(3))
                for name, call in calls(x.requires_grad_(), y, z).items():
                    out = call()
                    (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out))
                    with use_backend("reference"):
                        expected = call()
                        (expected_gradient,) = torch.autograd.grad(expected, x, torch.ones_like(out))
                    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-6, msg=name)
                    torch.testing.assert_close(gradient, expected_gradient, rtol=2e-5, atol=2e-6, msg=name)

    def test_a_change_of_numbers_compiles_nothing(self, randn):
        from dpdmd.kernels.sampling.guided_euler_step import _guided_euler_step_kernel as kernel

        x, v, u = (randn(2, 4096, seed=seed) for seed in range(3))
        guided_euler_step(x, v, 1.0, 0.5, v_uncond=u, guidance_scale=2.0)
        count = len(kernel._compiled)
        for scale in (0.0, 3, 7.5):
            guided_euler_step(x, v, 1.0, scale / 10, v_uncond=u, guidance_scale=scale)
        for size in (16, 32, 4096 * 16):
            guided_euler_step(*(randn(3, size) for _ in range(2)), 1, 0, v_uncond=randn(3, size), guidance_scale=2.0)
        assert len(kernel._compiled) == count

    def test_on_a_stream_and_a_device_that_is_not_current(self, randn):
        x, y, z = (randn(2, 4096, seed=seed) for seed in range(3))
        expected = flow_matching_loss(x, y, z)
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(10_000_000)
            later = flow_matching_loss(x.mul(1), y, z)
            assert torch.equal(later, expected)
        if torch.cuda.device_count() > 1:
            with torch.cuda.device(1):
                assert torch.equal(flow_matching_loss(x, y, z), expected)

    def test_many_samples(self, randn, relative_error):
        """More than 65535, which ends a grid's second axis."""
        x, y, z = (randn(70_000, 3, seed=seed) for seed in range(3))
        t = torch.linspace(0, 0.9, 70_000)
        for reduction in ("mean", "none"):
            for call in (
                lambda reduction=reduction: dmd_loss(x, y, z, reduction=reduction),
                lambda reduction=reduction: v_prediction_loss(x, y, z, t, reduction=reduction),
                lambda: renoise(x, y, t),
            ):
                with use_backend("reference"):
                    expected = call()
                assert relative_error(call(), expected) < 1e-5

    @pytest.mark.gpu_memory(24)
    def test_more_than_2_to_31_elements(self, randn, relative_error):
        size = 2**30 + 4096 + 16
        x = torch.randn(1, 4096, dtype=torch.bfloat16).repeat(2, size // 4096 + 1)[:, :size].contiguous()
        last = slice(size - 5000, size)
        x[1, last] = randn(5000, dtype=torch.bfloat16)
        assert x.numel() > 2**31
        out = renoise(x, x, (0.5, torch.tensor([0.25, 2.0])))
        torch.testing.assert_close(out[1, last], (2.5 * x[1, last].float()).bfloat16())
        del out
        v = x.requires_grad_()
        loss = flow_matching_loss(v, v.detach(), v.detach(), reduction="sum")  # residual x
        expected = sum((part.float() ** 2).sum(dtype=torch.float64) for part in x.detach().view(-1).split(2**28))
        assert relative_error(loss, expected) < 1e-5
        (gradient,) = torch.autograd.grad(loss, v)
        torch.testing.assert_close(gradient[1, last], 2 * x.detach()[1, last])
        del gradient, loss
        loss = dmd_loss(v, v.detach(), torch.zeros(1, 1, dtype=torch.bfloat16).expand_as(v), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, v)
        w = sum(part.float().abs().sum(dtype=torch.float64) for part in x.detach()[1].split(2**28)) / size
        assert relative_error(gradient[1, last], x.detach()[1, last].double() / w) < 2**-8


@pytest.mark.skipif(not launch.INTERPRETED, reason="a launch that runs shows as much")
def test_stub_of_a_launch(randn, monkeypatch):
    """The short launch gets what Triton's own would, by position, addresses in place of tensors, and the stream of the
    device."""
    seen = []

    class Compiled:
        run = staticmethod(lambda *arguments: seen.append(arguments))
        function, packed_metadata = "function", "metadata"

    class Jit:
        def __getitem__(self, grid):
            return lambda *arguments, num_warps: seen.append((grid, num_warps)) or Compiled

    kernel = launch.kernel(4)(lambda x, out, size, BLOCK: None)
    kernel._jit, kernel._num_varying, kernel._specialised = Jit(), 3, [0, 1, 2]
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: ("stream", device), raising=False)
    x = randn(64)
    kernel(7, x, None, 5, 16)
    assert seen == [((7,), 4)]
    kernel(9, x, None, 6, 16)  # another integer: the same kernel
    assert seen[1:] == [(9, 1, 1, ("stream", -1), "function", "metadata", None, None, None, x.data_ptr(), None, 6, 16)]
    for others in ((x.bfloat16(), None, 5, 16), (x[1:], None, 5, 16), (x, x, 5, 16), (x, 1.0, 5, 16), (x, None, 5, 32)):
        seen.clear()
        kernel(7, *others)
        assert seen == [((7,), 4)], "another specialisation"
    hook = type("Hook", (), {"calls": [print]})()
    monkeypatch.setattr(launch.knobs.runtime, "launch_enter_hook", hook)
    seen.clear()
    kernel(7, x, None, 5, 16)
    assert seen == [((7,), 4)], "a profiler that listens"
