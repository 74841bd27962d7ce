"""lift: a CNN carried to its fully-connected net of 110.6 million weights.

What: the VanillaCNN of d'Ascoli et al. 2019 at 32x32 with the padding kept, 143,178 -> 110,606,602 parameters,
float32, on one thread. CPU seconds of

- ours: `build_lifted`, after the plan (timed apart), which copies the module too;
- by pixels: the usual way, written anew: a loop over output pixels that writes the kernel into a dense zero matrix
  slice by slice;
- its mask: the same with ones, which the usual way needs to know what is local;
- write: `torch.empty(shape).fill_(0.5)` for the three weights, on fresh memory: what writing them once takes.

They alternate within each round; medians; the first round warms up. The weights of ours and by pixels are compared
before: they must be equal to the bit. Peak memory is the largest resident size of a process that lifts less that of
one which imports and plans only, over the bytes of the lifted weights.

Run: `python benchmarks/lift.py [--rounds 7]`; it needs 2 GB of memory.

Measured on a CPU (AMD EPYC, 2 cores, shared with other work: load average 3.9), torch 2.13.0, Python 3.11.7, one
thread; n = 7 rounds, medians with least and most, CPU seconds:

    plan          0.013   (0.009 to 0.016)
    ours          0.601   (0.504 to 0.657)
    by pixels     0.920   (0.756 to 1.153)
    its mask      0.840   (0.749 to 1.136)
    write         0.470   (0.401 to 0.516)

Ours takes 1.28 times the time to write the weights once (1.34 in a run before): fresh pages are nearly all of it. By
pixels takes 1.53 times ours, 2.93 times with its mask, which ours does without. Peak memory is 1.002 times the
442,423,808 bytes of the lifted weights.
"""

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from thalweg.lifting.layers import LiftPlan, lift_plan
from thalweg.lifting.lift import build_lifted
from thalweg.nets import vanilla_cnn

# Of each convolution: side of its padded input, stride, side of its output.
LAYERS = {"conv1": (36, 2, 17), "conv2": (12, 1, 8), "conv3": (5, 1, 3)}
PARAMETERS = 110_606_602


def prepared() -> tuple[nn.Module, LiftPlan]:
    net = vanilla_cnn()
    return net, lift_plan(net, torch.zeros(1, 3, 32, 32), padded=True)


def by_pixels(net: nn.Module, *, is_mask: bool = False) -> Iterator[Tensor]:
    for name, (side, stride, made) in LAYERS.items():
        kernel = net.get_parameter(f"{name}.weight").detach()
        kernel = torch.ones_like(kernel) if is_mask else kernel
        outs, ins, size, _ = kernel.shape
        dense = torch.zeros(outs, made, made, ins, side, side)
        for o in range(outs):
            for y in range(made):
                for x in range(made):
                    dense[o, y, x, :, y * stride : y * stride + size, x * stride : x * stride + size] = kernel[o]
        yield dense.view(outs * made * made, ins * side * side)


def seconds(action: Callable[[], object]) -> float:
    """Time an action; what it made is freed after the clock has stopped."""
    start = time.process_time()
    made = action()
    elapsed = time.process_time() - start
    del made
    return elapsed


def require_equal(net: nn.Module, plan: LiftPlan) -> None:
    lifted = build_lifted(net, plan)[0]
    count = sum(p.numel() for p in lifted.parameters())
    if count != PARAMETERS:
        raise SystemExit(f"Expected {PARAMETERS:,} parameters. Got {count:,}.")
    for name, dense in zip(LAYERS, by_pixels(net), strict=True):
        if not torch.equal(lifted.get_parameter(f"{name}.linear.weight"), dense):
            raise SystemExit(f"Expected equal weights of {name}. Got others.")
    print(f"{count:,} parameters, equal to the bit to those written pixel by pixel")


def peak(is_lifted: bool) -> int:
    """Largest resident size of a process that plans, and lifts or not."""
    command = [sys.executable, __file__, "--peak", "lift" if is_lifted else "plan"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def compare(rounds: int) -> None:
    net, plan = prepared()
    # Before anything large is made here: on Linux a child starts with its parent's largest size.
    ratios = [(peak(True) - peak(False)) * 1024 / plan.num_bytes for _ in range(3)]
    print(f"peak memory {statistics.median(ratios):.3f} times the {plan.num_bytes:,} bytes of the lifted weights")
    require_equal(net, plan)
    shapes = [layer.weight_shape for layer in plan.layers]
    actions: dict[str, Callable[[], object]] = {
        "plan": prepared,
        "ours": lambda: build_lifted(net, plan),
        "by pixels": lambda: list(by_pixels(net)),
        "its mask": lambda: list(by_pixels(net, is_mask=True)),
        "write": lambda: [torch.empty(shape).fill_(0.5) for shape in shapes],
    }
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds + 1):
        for name, action in actions.items():
            times[name].append(seconds(action))
    found = {name: statistics.median(row[1:]) for name, row in times.items()}
    for name, value in found.items():
        print(f"{name:>12} {value:8.3f} CPU s   (least {min(times[name][1:]):.3f}, most {max(times[name][1:]):.3f})")
    print(f"ours takes {found['ours'] / found['write']:.2f} times the time to write the weights once")
    print(f"by pixels takes {found['by pixels'] / found['ours']:.2f} times ours, ", end="")
    print(f"with its mask {(found['by pixels'] + found['its mask']) / found['ours']:.2f} times")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peak", choices=("lift", "plan"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.peak is not None:
        made = build_lifted(*prepared()) if given.peak == "lift" else prepared()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        del made
        return
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, {platform.machine()}, {os.cpu_count()} cores")
    print(f"load average at the start: {os.getloadavg()[0]:.1f}")
    compare(given.rounds)


if __name__ == "__main__":
    main()
