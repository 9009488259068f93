"""What it costs on a GPU's host that operations are visible to torch, at image-latent size: `python dispatch_cost.py`.

Prints JSON: ns of the question whether anybody looks (registration.observed, with dmd_loss's arguments) and of a call of
nothing, as timed here; us of a dmd_loss call in Triton directly, through the dispatcher, and without the question; and of
one in CUDA, which always takes the dispatcher.
"""

import json
import statistics
import sys
import time

import torch

from dpdmd.kernels import dmd_loss, use_backend
from dpdmd.kernels.runtime import registration

SHAPE = (1, 16, 128, 128)


def microseconds(function, calls=200, repeats=50):
    """Time of a call on the host, the median of the repeats: of so few calls that the GPU's queue never fills up."""
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
        "observed_ns": round(1e3 * microseconds(lambda: registration.observed(arguments), 20_000), 1),
        "empty_call_ns": round(1e3 * microseconds(lambda: None, 20_000), 1),
    }
    observed = registration.observed
    ways = {"direct": observed, "dispatcher": lambda arguments: True, "unasked": lambda arguments: False}
    for implementation, names in (("triton", ways), ("cuda", ["direct"])):
        for name in names:
            registration.observed = ways[name]
            with use_backend(implementation):
                us = microseconds(lambda: dmd_loss(x, teacher, critic))
            result[f"dmd_loss_{implementation}_{name}_us"] = round(us, 2)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
