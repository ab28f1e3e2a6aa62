"""What waiting threads cost when two quantizing processes share the cores: one layer, alone and beside its twin.

    python benchmarks/contention.py

Prints seconds a layer (3072 x 576, scale search, range search, GPTQ rounding, refinement) with OpenMP's default
waiting, which is faster on an idle machine and stays the product's, and with OMP_WAIT_POLICY=PASSIVE, which is
faster beside another busy process.
"""

from __future__ import annotations

import os
import subprocess
import sys

WORK = """
import time, torch
from quantkit.maths.affine import search_grid
from quantkit.maths.compensate import round_compensated
from quantkit.maths.gram_factor import factored
from quantkit.maths.fold import search_scale
from quantkit.maths.refine import damped, refine
from quantkit.tensors import Grid
torch.manual_seed(0)
weight, inputs, grid = torch.randn(3072, 576), torch.randn(4096, 576), Grid(4, 64, True)
gram = inputs.T @ inputs
def once():
    search_scale(weight, inputs.abs().mean(dim=0), gram, grid, [step / 20 for step in range(20)])
    scale, zero = search_grid(weight, grid, gram.diagonal())
    with factored(gram, 0.01, True) as factor:
        codes = round_compensated(weight, scale, zero, grid, factor)
    with damped(gram, 0.01) as matrix:
        refine(weight, codes, scale, zero, grid, matrix, 2)
once()
times = []
for _ in range(5):
    started = time.perf_counter()
    once()
    times.append(time.perf_counter() - started)
print(sorted(times)[2])
"""


def seconds(processes: int, policy: str | None) -> list[float]:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    if policy:
        environment["OMP_WAIT_POLICY"] = policy
    started = [
        subprocess.Popen([sys.executable, "-c", WORK], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    return [float(process.communicate()[0]) for process in started]


if __name__ == "__main__":
    print("waiting\tprocesses\tseconds a layer (median of 5, each process)")
    for policy in (None, "PASSIVE"):
        for processes in (1, 2):
            found = " ".join(f"{value:.2f}" for value in seconds(processes, policy))
            print(f"{policy or 'default'}\t{processes}\t{found}", flush=True)
