"""Started by test_agreement.py in two processes: which attention each takes on a GPU that measures otherwise in each.

Argument: an empty folder. Prints one JSON line.
"""

import contextlib
import io
import json
import os
import sys
from types import SimpleNamespace

import torch

from dpdmd.config import parse_config
from dpdmd.engine.start import start
from dpdmd.engine.world import World
from dpdmd.kernels import attention
from dpdmd.kernels.attention import choice
from dpdmd.run.agreement import agree_on_attention

SHAPES = [(64, 1024), (64, 4429), (128, 4429)]
backbone = SimpleNamespace(attention_shapes=lambda: SHAPES[:2])


def main():
    world = start(parse_config({"prompts": {"file": "unused"}, "engine": {"device": "cpu"}}).engine)
    on_gpu = World(world.rank, world.size, torch.device("cuda", world.rank))
    os.environ["XDG_CACHE_HOME"] = os.path.join(sys.argv[-1], str(world.rank))  # as on two machines
    measured = []

    def measure(attention, index, head_dim, length):
        measured.append(length)
        fast = ("cudnn", "triton")[(world.rank + generation) % 2]
        return {name: {"cudnn": 2.0, "triton": 2.0, fast: 1.0} for name in ("forward", "training")}

    def chosen():
        return [choice.fastest(attention, world.rank, *shape, shape[1], True) for shape in SHAPES]

    def started_anew():
        choice._measured.cache_clear()
        choice.agree_on(None)
        measured.clear()

    def agreed(stored=None):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            table = agree_on_attention(on_gpu, backbone, stored)
        return {"chosen": chosen(), "table": table, "measured": list(measured), "said": said.getvalue()}

    choice.measure = measure
    choice.gpu_name = lambda index: gpus[world.rank]
    torch.cuda.is_current_stream_capturing = lambda: False
    generation, gpus, results = 0, ["NVIDIA B200", "NVIDIA B200"], {}
    results["by itself"] = {"chosen": chosen()}
    started_anew()
    results["together"] = agreed()
    stored = results["together"]["table"]

    # Another day, when the same GPUs would measure the other way round, and without the cache of the first.
    generation = 1
    os.environ["XDG_CACHE_HOME"] += "-later"
    for name, checkpoint, names in (
        ("resumed", stored, ["NVIDIA B200", "NVIDIA B200"]),
        ("resumed beside another gpu", stored, ["NVIDIA B200", "NVIDIA B300"]),
        ("resumed on another gpu", stored, ["NVIDIA B300", "NVIDIA B200"]),
        ("resumed from a damaged one", {"gpu": "NVIDIA B200", "times": 3}, ["NVIDIA B200", "NVIDIA B200"]),
    ):
        started_anew()
        gpus[:] = names
        results[name] = agreed(checkpoint if world.main else None)
    started_anew()
    results["on the cpu"] = {"table": agree_on_attention(world, backbone, None), "agreed": choice._agreed}
    everyone = world.gather(results)
    if world.main:
        print("RESULT " + json.dumps(everyone), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
