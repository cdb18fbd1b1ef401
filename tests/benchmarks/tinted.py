"""What inferring the appearance is worth: `python3 -m tests.benchmarks.tinted RUN [RUN ...]`.

RUNs are trained with --preset tinted, and for comparison with --preset tinted --context.appearance 0. In the held-out
lifetimes that each agent lives: how well pictures are rebuilt, how well codes tell the colours apart, and the return. A
patch counts as seen rightly if the colour that its code mostly stands for in that lifetime is its own. Figure to tinted.png
beside the first run.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from agent import System, rollout
from environment import HiddenRulesWorld, make_worlds
from main import EVALUATION_SEEDS, evaluate, load_system, statistics
from memory import WorldStep
from tests.benchmarks import named_runs, scores

LIFETIMES = 512
BACKGROUND = 3  # number of the colour that is none


class Eye:
    """Watches an agent: which colour truly lies on each patch, which code it got, and the squared error of its picture."""

    def __init__(self, world: HiddenRulesWorld, agent, system: System) -> None:
        self.world, self.agent, self.system = world, agent, system
        self.colours, self.codes, self.errors, self.pictures = [], [], [], []

    def reset(self, frames: Tensor) -> None:
        """See where everything begins."""
        self.obs, self.colour = frames, self._colours()

    def observe(self, action: Tensor, step: WorldStep) -> None:
        """Note what the agent saw before its action."""
        self.colours.append(self.colour)
        self.codes.append(self.agent.codes.long())
        with torch.no_grad():
            rebuilt = self.system.vae.decode(self.agent.codes, self.agent.visual_context)
        self.errors.append((rebuilt - self.obs / 255).square().mean((1, 2, 3)))
        self.pictures.append((self.obs[:6], rebuilt[:6]))
        self.obs, self.colour = step.obs, self._colours()

    def _colours(self) -> Tensor:
        """(B, S) int64: the colour on each patch, what is drawn last on top."""
        world, grid = self.world, self.world.settings.grid
        colour = torch.full((world.batch, grid, grid), BACKGROUND)
        if world.walls is not None:
            colour[world.walls] = world.rule.colours.shape[1]
        for role in reversed(range(world.position.shape[1])):  # the body covers what it stands on
            colour[world.rows, world.position[:, role, 0], world.position[:, role, 1]] = world.rule.colours[:, role]
        return colour.flatten(1)


def code_accuracy(codes: Tensor, colours: Tensor, n_codes: int) -> tuple[float, float]:
    """Share of the coloured patches that are seen rightly, and of the pictures in which all of them are; (B, T, S) each."""
    B = len(codes)
    pair = (torch.arange(B)[:, None, None] * n_codes + codes) * (BACKGROUND + 1) + colours
    counts = pair.flatten().bincount(minlength=B * n_codes * (BACKGROUND + 1)).view(B, n_codes, -1)
    # A code's meaning: the colour of which it takes the largest share, because most patches are background.
    meaning = (counts / counts.sum(1, keepdim=True).clamp_min(1)).argmax(2)
    right = meaning.gather(1, codes.flatten(1)).view_as(codes) == colours
    coloured = colours != BACKGROUND
    return float(right[coloured].float().mean()), float((right | ~coloured).all(2).float().mean())


def measure(system: System) -> dict:
    """Figures of one run, pictures beside their reconstructions, and its evaluation."""
    settings = system.settings
    world = make_worlds(settings.world, LIFETIMES, "test", EVALUATION_SEEDS["test"], system.device)
    agent = system.controller()
    eye = Eye(world, agent, system)
    rollout(world, agent, [eye])
    patches, pictures = code_accuracy(torch.stack(eye.codes, 1), torch.stack(eye.colours, 1), settings.vae.num_codes)
    error = float(torch.stack(eye.errors).mean().sqrt())
    result = evaluate(system, "test", LIFETIMES)
    return {"error": error, "patches": patches, "pictures": pictures, "result": result, "seen": eye.pictures[0]}


def draw(kinds: dict[str, list[dict]], path: Path) -> None:
    """Six worlds as they are in the first step, and as each kind of agent rebuilds them, to `path` (PNG)."""
    figure = Figure(figsize=(8, 1.5 * (1 + len(kinds))), layout="constrained")
    axes = figure.subplots(1 + len(kinds), len(next(iter(kinds.values()))[0]["seen"][0]))
    rows = [("seen", next(iter(kinds.values()))[0]["seen"][0] / 255)]
    rows += [(f"rebuilt {name}", found[0]["seen"][1].clamp(0, 1)) for name, found in kinds.items()]
    for row, (name, pictures) in zip(axes, rows):
        for place, picture in zip(row, pictures):
            place.imshow(picture.numpy())
            place.set(xticks=[], yticks=[])
        row[0].set_ylabel(name.replace(" with", "\nwith"), fontsize="small")
    figure.savefig(path, dpi=120)


def main(runs: list[Path]) -> None:
    """Print the table and draw the figure."""
    kinds: dict[str, list[dict]] = {}
    for run in runs:
        system = load_system(run)[0]
        name = "with appearance" if system.appearance else "without it"
        kinds.setdefault(name, []).append(measure(system))
    print("| agent | error of a pixel | patches right | pictures right | return | normalised | each run |\n|" + "---|" * 7)
    for name, found in kinds.items():
        said = statistics(*(one["result"] for one in found))
        means = {key: np.mean([one[key] for one in found]) for key in ("error", "patches", "pictures")}
        each = ", ".join(f"{one['result']['return_mean']:.2f}" for one in found)
        print(f"| {name} | {means['error']:.4f} | {means['patches']:.1%} | {means['pictures']:.1%} | {' | '.join(scores(said))} | {each} |")
    draw(kinds, runs[0] / "tinted.png")
    print(f"\n{LIFETIMES} lifetimes on the test split for each run; figure in {runs[0] / 'tinted.png'}")


if __name__ == "__main__":
    main(named_runs("tinted"))
