"""Embedding VGG16 into twice its width, against copying the wide weights once.

What: `Embedding.state` carries the 15.0 million weights of `thalweg.nets.vgg16()` (float32) into twice the width in
all 14 groups of its view (13 convolutions and the hidden linear layer), 59.9 million weights; the copy clones every
one of those wide tensors. Both write fresh memory; they alternate within each round; medians over the rounds; the
ratio is that of the medians. Before it is timed, the wide network's outputs are compared with the narrow one's
(largest difference ≤ 1e-5 of the largest output, else the script fails). Tracing and verifying are timed apart and
are no part of the ratio: they are done once for a network, whatever is carried over its view.

Run: `python benchmarks/embed_vgg16.py [--rounds 21]`.

Measured on a CPU (AMD EPYC, 2 cores, shared with other work: load average 1.2), torch 2.13.0, Python 3.11.7, float32;
n = 21 rounds, medians in ms, and the ratios of two further runs (load average up to 2.9):

                             copy       embed    ratio    further runs
    1 thread,  equal         40.0        57.4     1.43      1.12, 1.31
    1 thread,  random        39.3        85.4     2.17      1.25, 1.23
    2 threads, equal         25.6        29.5     1.16      1.78, 1.73
    2 threads, random        24.2        47.5     1.96      1.75, 1.76

A fourth run (load average 1.4) gave 1.49, 2.92, 1.88 and 1.46: the second row is the nearest to the bound of 3.

The times themselves move by a factor of 5 with the other work and with how much memory is new to the process. With an
index_select for each dim, in place of one repetition of whole blocks, the ratios were 2.25, 9.4, 2.25 and 2.95 (one
run, load average 2.7). Tracing takes 0.2 s, tracing and verifying 2.5 s (medians of 3).
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from thalweg.embeddings import Embedding, split_plan
from thalweg.nets import vgg16
from thalweg.space import Space
from thalweg.structure import View, trace

BATCH = (2, 3, 32, 32)
FACTOR = 2
MAX_ERROR = 1e-5
THREADS = (1, 2)


def copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def seconds(action: Callable[[], object]) -> float:
    """Time an action; what it made is freed after the clock has stopped."""
    start = time.perf_counter()
    made = action()
    elapsed = time.perf_counter() - start
    del made
    return elapsed


def require_equal(narrow: torch.nn.Module, embedding: Embedding, shares: str) -> None:
    images = torch.randn(BATCH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, made = narrow(images), embedding.wide(narrow)(images)
    error = float((made - expected).abs().max() / expected.abs().max())
    print(f"{shares} shares: outputs change by {error:.1e} of the largest")
    if not error <= MAX_ERROR:
        raise SystemExit(f"Expected a relative change of at most {MAX_ERROR}. Got {error}.")


def compare(embedding: Embedding, state: Mapping[str, Tensor], rounds: int, label: str) -> None:
    wide = embedding.state(state)
    times: dict[str, list[float]] = {"copy": [], "embed": []}
    for _ in range(rounds + 1):
        times["copy"].append(seconds(lambda: copied(wide)))
        times["embed"].append(seconds(lambda: embedding.state(state)))
    copy, embed = (statistics.median(found[1:]) for found in times.values())  # the first round warms up
    print(
        f"{label:>24}{copy * 1e3:12.1f}{embed * 1e3:12.1f}{embed / copy:9.2f}"
        f"{min(times['copy'][1:]) * 1e3:12.1f}{min(times['embed'][1:]) * 1e3:12.1f}",
        flush=True,
    )


def traced(net: torch.nn.Module, rounds: int) -> View:
    images = torch.randn(BATCH, generator=torch.Generator().manual_seed(0))
    for verify in (False, True):
        found = [seconds(lambda: trace(net, images, verify=verify)) for _ in range(rounds)]  # noqa: B023 - called at once
        print(f"trace{' and verify' if verify else ''}: {statistics.median(found):.2f} s (median of {rounds})")
    return trace(net, images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, {platform.machine()}, {os.cpu_count()} cores")
    print(f"load average at the start: {os.getloadavg()[0]:.1f}")
    torch.set_num_threads(THREADS[0])
    net = vgg16().eval()
    state = {name: p.detach() for name, p in net.named_parameters()}
    view = traced(net, 3)
    widths = {group.name: FACTOR * group.size for group in view.groups}
    plans = {
        "equal": split_plan(view, widths),
        "random": split_plan(view, widths, shares="random", generator=torch.Generator().manual_seed(0)),
    }
    embeddings = {shares: Embedding(view, Space.of(net), plan) for shares, plan in plans.items()}
    for shares, embedding in embeddings.items():
        require_equal(net, embedding, shares)
    print(f"\n{Space.of(net).num_params:,} -> {embedding.wide_space.num_params:,} weights, {rounds} rounds")
    print(f"{'':24}{'copy ms':>12}{'embed ms':>12}{'ratio':>9}{'copy min':>12}{'embed min':>12}")
    for threads in THREADS:
        torch.set_num_threads(threads)
        for shares, embedding in embeddings.items():
            compare(embedding, state, rounds, f"{threads} threads, {shares}")


if __name__ == "__main__":
    main()
