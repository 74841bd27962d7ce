"""The permutation stage of 784-2000-10: free slots against swaps of pairs.

What: a network trained on 4,000 MNIST digits goes to itself with its 2,000 hidden units in a random order. Number of
legs; largest change of an output along a leg on 200 digits, in float64, at s = 1/3, 2/3 and 1 of every leg on which
units travel; largest loss along the path (1,000 digits, at the middle of every leg; of "swaps" of every 20th).
Units are freed with a ridge fit (1e-4) of the layer that reads them.

Run: `OMP_NUM_THREADS=1 THALWEG_DATA=... python benchmarks/permutation.py [--slots 20 100 200]`.

Measured on a busy machine, one thread, torch 2.13.0+cpu, one run; loss of the network 0.06504:

                              legs  change of output  worst loss
    free slots, 100             45           2.1e-14     0.06507
    reflections, 50 at once     40                       0.07048
    reflections, 100 at once    20                       0.07594
    reflections, 250 at once     8                       0.09080
    swaps                     1992                       0.06538
"""

import argparse
import time
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from thalweg.data import mnist
from thalweg.matching import refit
from thalweg.paths import LazyLeg, Path, permutation_path
from thalweg.space import Space
from thalweg.structure import View
from thalweg.structure.sites import Site

UNITS, LIMIT = 2000, 1e-12
State = Mapping[str, Tensor]


def outputs(state: State, images: Tensor) -> Tensor:
    hidden = (images @ state["0.weight"].T + state["0.bias"]).relu()
    return hidden @ state["2.weight"].T + state["2.bias"]


def trained(images: Tensor, classes: Tensor) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(784, UNITS), nn.ReLU(), nn.Linear(UNITS, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(6):
        for batch in torch.randperm(len(images), generator=generator).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[batch]), classes[batch]).backward()
            optimizer.step()
    return net


def travelled(path: Path, images: Tensor) -> float:
    """Largest change of an output on the legs on which units travel."""
    largest = 0.0
    for leg in path.legs:
        if isinstance(leg, LazyLeg):
            made = leg.straight()
            before = outputs(made.parameters(0.0), images)
            for s in (1 / 3, 2 / 3, 1.0):
                largest = max(largest, float((outputs(made.parameters(s), images) - before).abs().max()))
    return largest


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--slots", type=int, nargs="*", default=[20, 100, 200])
    slots = parser.parse_args().slots
    torch.set_num_threads(1)
    digits = mnist(num_samples=4000)
    images, classes = digits.inputs.flatten(1), digits.targets
    net = trained(images, classes).double()
    images = images.double()
    view = View.of_spec(net, {"hidden": [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)]})
    state = {name: p.detach() for name, p in net.named_parameters()}
    order = np.random.default_rng(0).permutation(UNITS)

    def loss(parameters: State) -> float:
        return float(nn.functional.cross_entropy(outputs(parameters, images[:1000]), classes[:1000]))

    def kill(given: State, units: np.ndarray) -> State:
        hidden = (images @ given["0.weight"].T + given["0.bias"]).relu()
        wanted = outputs(given, images)
        hidden[:, units] = 0
        weight = given["2.weight"].clone()
        weight[:, units] = 0
        own = {"weight": weight, "bias": given["2.bias"], "ridge": 1e-4, "prior": True}
        fit = refit(Site("2.weight", "2.bias", 0), hidden, wanted, **own)
        return {**given, "2.weight": fit.weight, "2.bias": fit.bias}

    print(f"loss of the network {loss(state):.5f}")
    print(f"{'':<28}{'legs':>6}{'change of output':>18}{'worst loss':>12}{'made in s':>11}")
    rows = [(f"free slots, {m}", {"slots": m, "kill": kill}) for m in slots]
    rows += [(f"reflections, {k} at once", {"kind": "reflections", "at_once": k}) for k in (50, 100, 250)]
    rows += [("swaps", {"kind": "swaps"})]
    for name, options in rows:
        begun = time.process_time()
        path = permutation_path(Space.of(net), view, state, "hidden", order, **options)
        made = time.process_time() - begun
        is_free = name.startswith("free")
        change = travelled(path, images[:200]) if is_free else float("nan")
        looked = path.legs[:: 20 if name == "swaps" else 1]
        worst = max(loss(leg.parameters(0.5)) for leg in looked)
        print(f"{name:<28}{len(path.legs):>6}{change:>18.1e}{worst:>12.5f}{made:>11.2f}", flush=True)
        if is_free and change > LIMIT:
            raise SystemExit("outputs changed by more than 1e-12")


if __name__ == "__main__":
    main()
