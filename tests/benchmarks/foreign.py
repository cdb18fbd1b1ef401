"""Learning in a MiniGrid world with shuffled actions: `python3 -m tests.benchmarks.foreign RUN [RUN ...]`.

RUNs are trained with --world.gym-id MiniGrid-.... Return by step of the lifetime, beside a random agent and a planner that
knows the rule and takes a shortest path; all live under the same held-out rules. Figure to foreign.png beside the first run.
Needs tests/requirements.txt.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from minigrid.core.constants import DIR_TO_VEC
from torch import Tensor

from agent import RandomAgent, rollout
from environment import ExternalWorlds
from main import EVALUATION_SEEDS, bootstrap_ci, load_system, mean, format_ci
from memory import WorldStep
from tests.benchmarks import named_runs

LIFETIMES, BIN = 64, 32
LEFT, RIGHT, FORWARD = range(3)


class ShortestPathAgent:
    """Knows the hidden rule and the way: breadth-first search over places and directions. Privileged."""

    def __init__(self, worlds: ExternalWorlds) -> None:
        self.worlds = worlds

    def reset(self, frames: Tensor) -> None:
        """Nothing to remove_stale."""

    def observe(self, action: Tensor, step: WorldStep) -> None:
        """Nothing to learn."""

    def act(self) -> Tensor:
        """The first actions (B,) int64 of shortest paths to the goal."""
        own = (first_action(env.unwrapped) for env in self.worlds.vector.envs)
        return torch.tensor([int(np.argmax(env.action_map == a)) for env, a in zip(self.worlds.vector.envs, own)])


def first_action(env) -> int:
    """The world's own first action on a shortest path to the goal; turning left where there is none."""
    start = (*map(int, env.agent_pos), int(env.agent_dir))
    queue, seen = deque([(start, None)]), {start}
    while queue:
        (x, y, direction), first = queue.popleft()
        ahead = np.add((x, y), DIR_TO_VEC[direction])
        there = env.grid.get(*ahead)
        moves = [(LEFT, (x, y, (direction - 1) % 4)), (RIGHT, (x, y, (direction + 1) % 4))]
        if there is None or there.can_overlap():
            moves.append((FORWARD, (*map(int, ahead), direction)))
            if there is not None and there.type == "goal":
                return FORWARD if first is None else first
        for action, place in moves:
            if place not in seen:
                seen.add(place)
                queue.append((place, action if first is None else first))
    return LEFT


def main(runs: list[Path]) -> None:
    """Print the table and draw the figure."""
    systems = [load_system(run)[0] for run in runs]
    world, seed = systems[0].settings.world, EVALUATION_SEEDS["test"]

    def live(make) -> np.ndarray:
        worlds = ExternalWorlds(world, LIFETIMES, "test", seed, systems[0].device)
        return rollout(worlds, make(worlds)).reward.numpy()

    found = {
        "agent": [live(lambda _, system=system: system.controller()) for system in systems],
        "known rule, shortest path": [live(ShortestPathAgent)],
        "random": [live(lambda _: RandomAgent(seed, world.sizes.actions))],
    }
    bins = range(0, world.lifetime - BIN + 1, BIN)
    print("| agent | return | " + " | ".join(f"steps {low} to {low + BIN - 1}" for low in bins) + " |\n|" + "---|" * (2 + len(bins)))
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, each in found.items():
        returns = [reward.sum(1)[None].astype(float) for reward in each]
        by_bin = np.concatenate(each)[:, : len(bins) * BIN].reshape(-1, len(bins), BIN).sum(2).mean(0)
        print(f"| {name} | {format_ci(float(np.mean(returns)), bootstrap_ci(mean, *returns), 2)} | {' | '.join(f'{x:.2f}' for x in by_bin)} |")
        axes.plot(np.array(bins) + BIN / 2, by_bin / BIN, marker=".", label=name)
    axes.set(xlabel="step of the lifetime", ylabel="reward a step", title=world.gym_id)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    figure.savefig(runs[0] / "foreign.png", dpi=120)
    print(f"\n{LIFETIMES} lifetimes under held-out rules, {len(runs)} runs; figure in {runs[0] / 'foreign.png'}")


if __name__ == "__main__":
    main(named_runs("foreign"))
