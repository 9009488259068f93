"""The Triton kernels as the compiler makes them for Hopper, on any machine: it needs no GPU, the interpreter does not mind
what it refuses, and an access that lost its width shows."""

import os
import sys
from pathlib import Path

import pytest
from processes import run_command

pytest.importorskip("triton")

DRIVER = Path(__file__).parents[2] / "drivers" / "compile_for_hopper.py"
WIDE = "16-byte reads"
AHEAD = f"{WIDE}, asynchronous copies"  # of what is worked on next
MATRICES = "tensor copies, warpgroup products"
EXPECTED = {
    "losses": {
        "_dmd_loss_kernel": WIDE,
        "_guided_euler_step_kernel": WIDE,
        "_multiply_kernel": WIDE,
        "_normalizer_kernel": WIDE,
        "_renoise_kernel": WIDE,
        "_renoise_philox_kernel": WIDE,
        "_scale_kernel": WIDE,
        "_squared_loss_kernel": WIDE,
        "_total_kernel": "",
    },
    "blocks": {
        "_activation_backward_kernel": WIDE,
        "_activation_kernel": WIDE,
        "_adaln_backward_kernel": AHEAD,
        "_adaln_kernel": WIDE,
        "_chunk_sums_kernel": WIDE,
        "_column_sums_kernel": "",
        "_quantize_kernel": WIDE,
        "_sum_partials_kernel": WIDE,
    },
    "qk_norm": {"_qk_norm_backward_kernel": AHEAD, "_qk_norm_kernel": WIDE, "_vectors_kernel": WIDE},
    "adamw": {"_adamw_kernel": WIDE},
    "attention": {"_dkv_kernel": MATRICES, "_dq_kernel": MATRICES, "_forward_kernel": MATRICES},
}


@pytest.mark.parametrize("group", EXPECTED)
def test_kernels_compile(group, tmp_path):
    environment = {"PATH": "", "PYTHONPATH": os.pathsep.join(sys.path[1:]), "HOME": str(tmp_path)}
    done = run_command([sys.executable, DRIVER, group], env=environment)
    assert done.returncode == 0, done.stderr
    assert dict(line.partition(", ")[::2] for line in done.stdout.splitlines()) == EXPECTED[group]
