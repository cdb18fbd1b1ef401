"""What inferring a lifetime's appearance contributes in environments with hidden tints.

RUNs are trained with --preset tinted, and for comparison with --preset tinted --context.appearance 0. In held-out
lifetimes of each agent: the error of reconstructed frames, how well codes identify colours, and the return. A patch
counts as right if its code stands for its colour in that lifetime: see `code_accuracy`. Figure: appearance.png in the
first run's folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tyro.conf import Positional

from agent import AgentController, System
from context_engine import rollout
from environment import HiddenRulesWorld, make_worlds
from main import EVALUATION_SEEDS, evaluate
from memory import WorldStep
from tests.benchmarks import command_line, load_systems, run_folders, score_cells
from world_model import statistics

LIFETIMES = 512
BACKGROUND = 3  # number that stands for the background; below are colours
SHOWN = 6  # environments in the figure


class PerceptionObserver:
    """Records true colours, codes and reconstruction errors beside an agent; see `context_engine.rollout`."""

    def __init__(self, world: HiddenRulesWorld, agent: AgentController, system: System) -> None:
        self.world, self.agent, self.system = world, agent, system
        self.colours: list[Tensor] = []  # (B, S) int64 for each step
        self.codes: list[Tensor] = []  # (B, S) int64 for each step
        self.errors: list[Tensor] = []  # (B,) float for each step: mean squared error of a channel in [0, 1]
        self.frames: tuple[Tensor, Tensor] | None = None  # of the first step and its reconstruction, SHOWN rows each

    def reset(self, frames: Tensor) -> None:
        """Keep the first frames (B, H, W, 3) uint8."""
        self.obs, self.colour = frames, self._colours()

    def observe(self, action: Tensor, step: WorldStep) -> None:
        """Record what the agent saw before its action."""
        self.colours.append(self.colour)
        self.codes.append(self.agent.codes.long())
        with torch.no_grad():
            rebuilt = self.system.vae.decode(self.agent.codes, self.agent.visual_context)
        self.errors.append((rebuilt - self.obs / 255).square().mean((1, 2, 3)))
        self.frames = self.frames or (self.obs[:SHOWN], rebuilt[:SHOWN])
        self.obs, self.colour = step.obs, self._colours()

    def _colours(self) -> Tensor:
        """(B, S) int64: the colour on each patch; the body covers what it stands on."""
        world, grid = self.world, self.world.settings.grid
        colour = torch.full((world.batch, grid, grid), BACKGROUND)
        if world.walls is not None:
            colour[world.walls] = world.rule.colours.shape[1]
        for role in reversed(range(world.position.shape[1])):
            colour[world.rows, world.position[:, role, 0], world.position[:, role, 1]] = world.rule.colours[:, role]
        return colour.flatten(1)


def code_accuracy(codes: Tensor, colours: Tensor, n_codes: int) -> tuple[float, float]:
    """Share of the coloured patches that are right, and share of the frames in which all of them are.

    Args:
        codes: (B, T, S) int64, from 0 to n_codes - 1.
        colours: (B, T, S) int64, from 0 to BACKGROUND.
    """
    B = len(codes)
    pair = (torch.arange(B)[:, None, None] * n_codes + codes) * (BACKGROUND + 1) + colours
    counts = pair.flatten().bincount(minlength=B * n_codes * (BACKGROUND + 1)).view(B, n_codes, -1)
    # A code stands for the colour of which it has the largest share, not for its most frequent one: most patches are
    # background.
    meaning = (counts / counts.sum(1, keepdim=True).clamp_min(1)).argmax(2)
    right = meaning.gather(1, codes.flatten(1)).view_as(codes) == colours
    coloured = colours != BACKGROUND
    return float(right[coloured].float().mean()), float((right | ~coloured).all(2).float().mean())


def measure(system: System) -> dict[str, Any]:
    """Measurements of one run.

    Returns:
        error: root mean squared error of a pixel in [0, 1]; patches, frames: see `code_accuracy`; shown: first frames
        and their reconstructions; result: see `main.evaluate`.
    """
    settings = system.settings
    world = make_worlds(settings.world, LIFETIMES, "test", EVALUATION_SEEDS["test"], system.device)
    agent = AgentController(system)
    seen = PerceptionObserver(world, agent, system)
    rollout(world, agent, [seen])
    patches, frames = code_accuracy(torch.stack(seen.codes, 1), torch.stack(seen.colours, 1), settings.vae.num_codes)
    return {
        "error": float(torch.stack(seen.errors).mean().sqrt()),
        "patches": patches,
        "frames": frames,
        "shown": seen.frames,
        "result": evaluate(system, "test", LIFETIMES),
    }


def plot(kinds: dict[str, list[dict]], path: Path) -> None:
    """First frames of some environments, and each kind of agent's reconstructions of them, to `path` (PNG).

    Args:
        kinds: results of `measure` by kind of agent.
    """
    original = next(iter(kinds.values()))[0]["shown"][0]
    rows = [("observed", original / 255)]
    rows += [(f"reconstructed\n{kind}", found[0]["shown"][1].clamp(0, 1)) for kind, found in kinds.items()]
    figure = Figure(figsize=(8, 1.5 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(original), squeeze=False)
    for row, (label, frames) in zip(grid, rows, strict=True):
        for axes, frame in zip(row, frames, strict=True):
            axes.imshow(frame.numpy())
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(label, fontsize="small")
    figure.savefig(path, dpi=120)


def main(runs: Positional[tuple[Path, ...]]) -> None:
    """Print the table and save the figure.

    Args:
        runs: Folders of trained runs of --preset tinted, with and without inferred appearance.
    """
    kinds: dict[str, list[dict]] = {}
    runs = run_folders(runs)
    for system in load_systems(runs):
        kind = "with appearance" if system.appearance else "without appearance"
        kinds.setdefault(kind, []).append(measure(system))
    print(
        "| agent | error of a pixel | patches right | frames right | return | normalised | each run |\n|" + "---|" * 7
    )
    for kind, found in kinds.items():
        error, patches, frames = (np.mean([one[key] for one in found]) for key in ("error", "patches", "frames"))
        scores = score_cells(statistics(*(one["result"] for one in found)))
        each = ", ".join(f"{one['result']['return_mean']:.2f}" for one in found)
        print("| " + " | ".join([kind, f"{error:.4f}", f"{patches:.1%}", f"{frames:.1%}", *scores, each]) + " |")
    plot(kinds, runs[0] / "appearance.png")
    print(f"\n{LIFETIMES} lifetimes on the test split for each run; figure in {runs[0] / 'appearance.png'}")


if __name__ == "__main__":
    command_line(main)
