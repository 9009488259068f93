"""Time the attention kernels on this GPU by head dimension and length, for the table that ships with the package.

python benchmarks/attention_times.py [FILE]         default: kernels/attention/attention_times.json
"""

import json
import sys
from pathlib import Path

import torch

from dpdmd.kernels import attention
from dpdmd.kernels.attention.choice import HEAD_DIMS, LENGTHS, SHIPPED, measure

SHORT = ("H100", "H200")  # the table's key for a GPU whose full name contains it


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
            for kind, by_kernel in times.items():
                fastest_first = sorted(by_kernel.items(), key=lambda item: item[1])
                print(gpu, f"D = {head_dim}, S = {length}, {kind} [us]:", dict(fastest_first))
    file.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
