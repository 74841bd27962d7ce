"""relaxed_step: training the relaxed forms of a CNN, dense with and without its padding, and locally connected.

What: one step of SGD (gradient and update) on a batch of 250, of the VanillaCNN of d'Ascoli et al. 2019 at 32x32
lifted in three ways, all the same function of the same inputs: "padded" with the zeros around each map as inputs, as
the paper's code has it; "folded" without them; "local" with a kernel for each position. Before they are timed, their
losses must agree to 1e-5.

Then single layers: forward and backward pass, inputs' gradient included, of a locally-connected layer against the
dense layer of the same map, at batch 1 and 250. Float32, one thread; sides alternate; medians of CPU seconds, the
first round warms up.

Run: `python benchmarks/relaxed_step.py [--rounds 5]`; it needs 3 GB of memory.

Measured on a CPU (AMD EPYC, 2 cores, shared with other work: load average 2.9), torch 2.13.0, Python 3.11.7; n = 3
rounds, medians:

    padded   110,606,602 parameters    3.725 CPU s a step
    folded    73,952,522 parameters    2.542 CPU s a step: padded takes 1.47 times as long
    local      7,797,002 parameters    0.579 CPU s a step: padded takes 6.44, folded 4.39 times as long

    one layer, forward and backward, CPU ms         batch      dense      local   dense / local
    3 -> 64, 4x4 on 32x32, stride 2, padding 2          1     351.46       7.62           46.14
    3 -> 64, 4x4 on 32x32, stride 2, padding 2        250    2277.16     122.83           18.54
    64 -> 64, 5x5 on 8x8, stride 1, padding 2           1     102.32      16.77            6.10
    64 -> 64, 5x5 on 8x8, stride 1, padding 2         250     687.97     373.44            1.84
    64 -> 64, 3x3 on 3x3, stride 1, padding 1           1       0.77       2.13            0.36
    64 -> 64, 3x3 on 3x3, stride 1, padding 1         250      12.78      22.80            0.56
    32 -> 32, 3x3 on 16x16, stride 1, padding 1         1     338.15       8.88           38.06
    32 -> 32, 3x3 on 16x16, stride 1, padding 1       250    2197.77     171.85           12.79
    16 -> 16, 3x3 on 8x8, stride 1, padding 1           1       1.33       2.11            0.63
    16 -> 16, 3x3 on 8x8, stride 1, padding 1         250      28.30      16.87            1.68

So the goal of 10 times for the local form is missed. Its second convolution, whose kernels see 28 % of the map, is
nearly two thirds of the step and bound by its matrix products. Where a kernel sees the whole image (3x3 on 3x3), or
there are few weights and one sample, the dense layer is faster: it is one matrix product, ours is a dozen operations.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from thalweg.lifting import lift
from thalweg.nets import vanilla_cnn

BATCH, RATE, MAX_ERROR = 250, 0.01, 1e-5
FORMS = {"padded": ("fc", True), "folded": ("fc", False), "local": ("local", False)}
# Channels in and out, kernel, side of the inputs, stride, padding.
LAYERS = (
    (3, 64, 4, 32, 2, 2),
    (64, 64, 5, 8, 1, 2),
    (64, 64, 3, 3, 1, 1),
    (32, 32, 3, 16, 1, 1),
    (16, 16, 3, 8, 1, 1),
)


def seconds(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def medians(actions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds + 1):
        for name, action in actions.items():
            times[name].append(seconds(action))
    return {name: statistics.median(row[1:]) for name, row in times.items()}


def step(module: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, classes: Tensor) -> float:
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(module(images), classes)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.item()


def networks(rounds: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator)
    classes = torch.randint(10, (BATCH,), generator=generator)
    net = vanilla_cnn()
    modules = {
        name: lift(net, images[:2], to=kind, padded=padded).module  # type: ignore[arg-type]
        for name, (kind, padded) in FORMS.items()
    }
    actions = {}
    for name, module in modules.items():
        optimizer = torch.optim.SGD(module.parameters(), lr=RATE)
        actions[name] = lambda m=module, o=optimizer: step(m, o, images, classes)
    losses = {name: action() for name, action in actions.items()}
    if not max(losses.values()) - min(losses.values()) <= MAX_ERROR:
        raise SystemExit(f"Expected equal losses. Got {losses}.")
    found = medians(actions, rounds)
    print(f"the CNN: {sum(p.numel() for p in net.parameters()):,} parameters")
    for name, value in found.items():
        count = sum(p.numel() for p in modules[name].parameters())
        print(f"{name:>8} {count:13,} parameters {value:8.3f} CPU s a step")
    for slow, fast in (("padded", "folded"), ("folded", "local"), ("padded", "local")):
        print(f"{slow} takes {found[slow] / found[fast]:.2f} times {fast}")


def pass_through(module: nn.Module, inputs: Tensor, slope: Tensor) -> None:
    for parameter in module.parameters():
        parameter.grad = None
    inputs.grad = None
    module(inputs).backward(slope)


def layers(rounds: int) -> None:
    print("\none layer, forward and backward, CPU ms         batch      dense      local   dense / local")
    for ins, outs, kernel, side, stride, padding in LAYERS:
        net = nn.Sequential(nn.Conv2d(ins, outs, kernel, stride, padding))
        example = torch.randn(1, ins, side, side)
        both = {kind: lift(net, example, to=kind).module for kind in ("fc", "local")}  # type: ignore[arg-type]
        for batch in (1, BATCH):
            inputs = torch.randn(batch, ins, side, side, requires_grad=True)
            slope = torch.ones_like(net(inputs))
            actions = {
                name: lambda m=module, x=inputs, s=slope: pass_through(m, x, s) for name, module in both.items()
            }
            found = medians(actions, rounds)
            label = f"{ins} -> {outs}, {kernel}x{kernel} on {side}x{side}, stride {stride}, padding {padding}"
            print(
                f"{label:48}{batch:5}{found['fc'] * 1e3:11.2f}{found['local'] * 1e3:11.2f}"
                f"{found['fc'] / found['local']:16.2f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, {platform.machine()}, {os.cpu_count()} cores")
    print(f"load average at the start: {os.getloadavg()[0]:.1f}", flush=True)
    networks(rounds)
    layers(rounds)


if __name__ == "__main__":
    main()
