"""Shards in FP8: how far off, in how many bytes. What is gathered when is in test_role.py, on two processes."""

from __future__ import annotations

import pytest
import torch

from dpdmd.engine.residency import GROUP, from_float8, to_float8


# One element, less than a group, groups exactly, and a rest.
@pytest.mark.parametrize("size", [1, 113, 256, 1023])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_is_a_sixteenth_off_at_most(size, dtype):
    generator = torch.Generator().manual_seed(size)
    x = (torch.randn(size, generator=generator) * torch.rand(size, generator=generator).pow(4)).to(dtype)
    codes, scales = to_float8(x)
    assert codes.dtype == torch.uint8 and codes.numel() == -(-size // GROUP) * GROUP
    assert codes.nbytes + scales.nbytes == codes.numel() * (1 + 4 / GROUP)
    back = from_float8(codes, scales, torch.float64)[:size]
    exact = x.double()
    groups = torch.nn.functional.pad(exact.abs(), (0, -size % GROUP)).view(-1, GROUP)
    largest = groups.amax(dim=1).repeat_interleave(GROUP)[:size]
    assert ((back - exact).abs() <= torch.maximum(exact.abs() / 16, largest * 2**-18) * (1 + 1e-6)).all()
    assert (back - exact).norm() < 0.03 * exact.norm()


def test_a_group_has_a_scale_of_its_own():
    x = torch.cat([torch.full((GROUP,), 1e-4), torch.full((GROUP,), 1e4), torch.zeros(GROUP)])
    back = from_float8(*to_float8(x), torch.float32)
    torch.testing.assert_close(back, x, rtol=1e-6, atol=0)


def test_rows_of_processes_come_back_as_rows():
    rows = [to_float8(torch.randn(300, generator=torch.Generator().manual_seed(seed))) for seed in (0, 1)]
    codes, scales = (torch.stack(each) for each in zip(*rows, strict=True))
    both = from_float8(codes, scales, torch.bfloat16)
    assert both.shape == (2, 384)
    assert all(torch.equal(both[i], from_float8(*row, torch.bfloat16)) for i, row in enumerate(rows))
