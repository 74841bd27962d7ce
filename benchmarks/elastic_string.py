"""elastic_string: one step of the elastic string between two fully-connected nets that a CNN was lifted to.

What: setting up a string of 3 free images between two ends (5 points), and one step of each on a batch of 50. The
nets are the VanillaCNN of d'Ascoli et al. 2019 at 32x32, lifted to linear layers. End A is the CNN itself, lifted one
tensor at a time whenever it is asked for; end B is a file. Both sides run in a process of their own, on one thread:
CPU seconds of set-up and step, and the process's largest resident size, imports included.

- ours: `elastic_string` on the lift with the padding folded into the map, 73,952,522 parameters; the losses at the
  five points, which it measures before and after the step, are part of the time.
- theirs: what the paper's code does, written anew from its description: the padded lift, 110,606,602 parameters; a
  deep copy of the network for each free point, whose gradients stay, and an explicit elastic force with its
  temporaries, and its energy. `--folded` gives them the smaller net.

Run: `python benchmarks/elastic_string.py [--folded] [--rounds 3]`; it needs 6 GB of memory and 0.8 GB of disk.

Measured on a busy 2-core AMD EPYC, one thread, torch 2.13.0+cpu, Python 3.11.7, medians of 3 rounds (one with
`--folded`); the system's seconds are those of handing out pages of memory, and depend on the machine:

    ours    73,952,522 parameters   1.46 GB    8.8 CPU s +  3.0 of the system's
    theirs 110,606,602 parameters   4.82 GB   12.6 CPU s + 25.0 of the system's
    theirs  73,952,522 parameters   3.46 GB    9.0 CPU s + 14.1 of the system's   (--folded)

Verdict: less than a third of the memory (3.29 times less; 2.36 times less on the same net), and no more CPU time:
1.43 times less on the smaller net, about the same on the same one. Of ours, the images take 0.89 GB, the largest
slope 0.23 GB and what is imported 0.30 GB; a third of the time is measuring the losses, a sixth the springs.
"""

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from thalweg.checkpoint import save_state
from thalweg.lifting import lift
from thalweg.objective import Objective
from thalweg.paths import StateFile, elastic_string, hollow

RATE, STIFFNESS, IMAGES, BATCH, CLASSES = 0.1, 5.0, 3, 50, 10


def lifted(padded: bool) -> tuple[nn.Module, Mapping[str, Tensor]]:
    """The VanillaCNN as linear layers, without weights, and its own weights there, made when they are asked for."""
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        cnn = nn.Sequential(
            *(nn.Conv2d(3, 64, 4, stride=2, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(64, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Flatten(), nn.Linear(64, CLASSES)),
        )
    found = lift(cnn, batch()[0], padded=padded)
    return hollow(found.module), found.lifting.lazily(cnn.state_dict())


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, 3, 32, 32, generator=generator), torch.randint(CLASSES, (BATCH,), generator=generator)


def prepare(file: Path, padded: bool) -> None:
    """Write end B: the lifted CNN, moved away from the CNNs."""
    generator = torch.Generator().manual_seed(2)
    end = lifted(padded)[1]
    save_state(file, {name: end[name] + 1e-3 * torch.randn(end[name].shape, generator=generator) for name in end})


def ours(file: Path, padded: bool) -> None:
    module, end = lifted(padded)
    objective = Objective(module, nn.CrossEntropyLoss(), batch())
    begun = spent()
    run = elastic_string(
        *(objective, end, StateFile(file)),
        generator=torch.Generator().manual_seed(0),
        images=IMAGES,
        stiffness=STIFFNESS,
        learning_rate=RATE,
        batch_size=BATCH,
        cycles=1,
        steps=1,
        insert=False,
        between=0,
    )
    report(begun, objective.num_params, run.losses[0])


def theirs(file: Path, padded: bool) -> None:
    module, end = lifted(padded)
    nets = []
    for state in (end, StateFile(file)):
        net = copy.deepcopy(module)
        net.load_state_dict({name: state[name] for name in state}, assign=True)
        nets.append(net.requires_grad_())
    inputs, targets = batch()
    begun = spent()
    points, optimizers = [nets[0]], []
    for k in range(1, IMAGES + 1):
        share, point = k / (IMAGES + 1), copy.deepcopy(nets[0])
        for moved, first, last in zip(*(net.parameters() for net in (point, *nets)), strict=True):
            moved.data.copy_((1 - share) * first.data + share * last.data)
        points.append(point)
        optimizers.append(torch.optim.SGD(point.parameters(), lr=RATE))
    points.append(nets[1])
    energy, losses = 0.0, []
    for k, optimizer in enumerate(optimizers, 1):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(points[k](inputs), targets)
        losses.append(loss.item())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        neighbours = (points[j].parameters() for j in (k - 1, k, k + 1))
        with torch.no_grad():
            for before, here, after in zip(*neighbours, strict=True):
                energy += 0.5 * ((here - before).norm().pow(2) + (here - after).norm().pow(2)).item()
                here.data += RATE * STIFFNESS * (after.data + before.data - 2 * here.data)
    report(begun, sum(p.numel() for p in nets[0].parameters()), max(losses))


def spent() -> tuple[float, float]:
    """CPU seconds of this process so far: its own, and the system's, which mostly hands out pages of memory."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime, usage.ru_stime


def report(begun: tuple[float, float], parameters: int, loss: float) -> None:
    user, system = (now - before for now, before in zip(spent(), begun, strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
    print(json.dumps({"user": user, "system": system, "bytes": peak, "parameters": parameters, "loss": loss}))


def measured(side: str, file: Path, padded: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--side", side, "--file", str(file), *(() if padded else ("--folded",))]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def compare(rounds: int, folded: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = {padded: Path(folder) / f"end-{padded}.safetensors" for padded in (False, not folded)}
        for padded, file in files.items():
            subprocess.run(
                [sys.executable, __file__, "--side", "prepare", "--file", file, *(() if padded else ("--folded",))],
                check=True,
            )
        sides = {"ours": False, "theirs": not folded}
        found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(rounds):
            for side, padded in sides.items():
                found[side].append(measured(side, files[padded], padded))
    middle = {
        side: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for side, rows in found.items()
    }
    for side, row in middle.items():
        print(
            f"{side:7} {row['parameters']:11,.0f} parameters  {row['bytes'] / 1e9:5.2f} GB  {row['user']:5.1f} CPU s"
            f" + {row['system']:4.1f} of the system's   highest loss of the line {row['loss']:.4f}"
        )
    memory, user = (middle["theirs"][key] / middle["ours"][key] for key in ("bytes", "user"))
    print(f"theirs takes {memory:.2f} times the memory and {user:.2f} times the CPU time without the system's")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", choices=("ours", "theirs", "prepare"))
    parser.add_argument("--file", type=Path)
    parser.add_argument("--folded", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.side is None:
        compare(given.rounds, given.folded)
    else:
        {"ours": ours, "theirs": theirs, "prepare": prepare}[given.side](given.file, not given.folded)


if __name__ == "__main__":
    main()
