"""Measure which attention kernel is the fastest on this GPU, by head dimension and length, for the package to ship.

python benchmarks/attention_times.py [FILE]         kernels/attention/attention_times.json unless given
"""

import json
import sys
from pathlib import Path

import torch

from dpdmd.kernels import attention
from dpdmd.kernels.attention.choice import HEAD_DIMS, LENGTHS, SHIPPED, measure

SHORT = ("H100", "H200")  # what a device is called in the table, if its full name has it


def main() -> None:
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else SHIPPED
    name = torch.cuda.get_device_name()
    gpu = next((short for short in SHORT if short in name), name)
    table = json.loads(file.read_text()) if file.exists() else {}
    table[gpu] = {}
    for head_dim in HEAD_DIMS:
        for length in LENGTHS:
            times = measure(attention, torch.cuda.current_device(), head_dim, length)
            table[gpu][f"{head_dim},{length}"] = times
            for kind, by in times.items():
                print(
                    gpu, f"D = {head_dim}, S = {length}, {kind} [us]:", dict(sorted(by.items(), key=lambda one: one[1]))
                )
    file.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
