"""What it costs on a GPU's host that operations are visible to torch, at image-latent size: `python dispatch_cost.py`.

Prints JSON: ns of the question whether anybody looks (registration.observed, with dmd_loss's arguments), and us of a
dmd_loss call with each implementation, directly and through the dispatcher (a TorchFunctionMode that lets all pass is
active for both, so that its own cost cancels out: "forced" calls the dispatcher by hand).
"""

import itertools
import json
import statistics
import sys
import time

import torch

from dpdmd.kernels import dmd_loss, use_backend
from dpdmd.kernels.runtime import registration

SHAPE = (1, 16, 128, 128)


def microseconds(function, calls=2000, repeats=15):
    """Of a call on the host; the median of the repeats."""
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times[1:])


def main():
    x, teacher, critic = (torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    arguments = x, teacher, critic, None, 1.0, None, None, 1.0, None, -1.0, "teacher", "mean"
    result = {
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(),
        "observed_ns": round(1e3 * microseconds(lambda: registration.observed(arguments), 100_000), 1),
        "empty_call_ns": round(1e3 * microseconds(lambda: None, 100_000), 1),
    }
    observed = registration.observed
    for implementation, (name, seen) in itertools.product(
        ("triton", "cuda"), (("direct", observed), ("dispatcher", lambda arguments: True))
    ):
        registration.observed = seen
        with use_backend(implementation):
            result[f"dmd_loss_{implementation}_{name}_us"] = round(microseconds(lambda: dmd_loss(x, teacher, critic)), 2)
    registration.observed = lambda arguments: False
    with use_backend("triton"):
        result["dmd_loss_triton_unasked_us"] = round(microseconds(lambda: dmd_loss(x, teacher, critic)), 2)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
