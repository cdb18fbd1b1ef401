"""How an agent adapts in a MiniGrid environment with shuffled actions, beside a shortest-path planner.

RUNs are trained with --world.gym-id MiniGrid-.... Compares the return by step of the lifetime with a random agent's
and with a planner's that knows the rule and takes a shortest path, all under the same held-out rules. Figure:
external.png in the first run's folder. Needs tests/requirements.txt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path

import gymnasium
import numpy as np
import torch
from matplotlib.figure import Figure
from minigrid.core.constants import DIR_TO_VEC
from torch import Tensor
from tyro.conf import Positional

from agent import AgentController, System
from context_engine import RandomAgent, rollout
from environment import ExternalWorlds
from main import EVALUATION_SEEDS
from memory import UserError, WorldStep
from tests.benchmarks import command_line, load_systems
from world_model import bootstrap_ci, format_ci, mean

LIFETIMES, BIN = 64, 32
LEFT, RIGHT, FORWARD = range(3)  # MiniGrid's own actions


class ShortestPathAgent:
    """Knows the hidden rule and the map: breadth-first search over positions and directions. Privileged."""

    def __init__(self, worlds: ExternalWorlds) -> None:
        self.worlds = worlds

    def reset(self, frames: Tensor) -> None:
        """Nothing to do: it reads the environments."""

    def observe(self, action: Tensor, step: WorldStep) -> None:
        """Nothing to learn."""

    def act(self) -> Tensor:
        """The first actions (B,) int64 of shortest paths to the goal."""
        actions = []
        for env in self.worlds.vector.envs:
            actions.append(int(np.argmax(env.action_map == first_action(env.unwrapped))))
        return torch.tensor(actions)


def first_action(env: gymnasium.Env) -> int:
    """MiniGrid's own first action on a shortest path to the goal; LEFT where there is no path."""
    start = (*map(int, env.agent_pos), int(env.agent_dir))
    queue, visited = deque([(start, None)]), {start}
    while queue:
        (x, y, direction), first = queue.popleft()
        ahead = np.add((x, y), DIR_TO_VEC[direction])
        content = env.grid.get(*ahead)
        moves = [(LEFT, (x, y, (direction - 1) % 4)), (RIGHT, (x, y, (direction + 1) % 4))]
        if content is None or content.can_overlap():
            moves.append((FORWARD, (*map(int, ahead), direction)))
            if content is not None and content.type == "goal":
                return FORWARD if first is None else first
        for action, state in moves:
            if state not in visited:
                visited.add(state)
                queue.append((state, action if first is None else first))
    return LEFT


def rewards(systems: list[System]) -> dict[str, list[np.ndarray]]:
    """Rewards (LIFETIMES, T) by agent; one array for each run of the trained agent."""
    world, seed = systems[0].settings.world, EVALUATION_SEEDS["test"]

    def rewards_of(make: Callable) -> np.ndarray:
        worlds = ExternalWorlds(world, LIFETIMES, "test", seed, systems[0].device)
        return rollout(worlds, make(worlds)).reward.numpy()

    return {
        "agent": [rewards_of(lambda _, system=system: AgentController(system)) for system in systems],
        "known rule, shortest path": [rewards_of(ShortestPathAgent)],
        "random": [rewards_of(lambda _: RandomAgent(seed, world.sizes.actions))],
    }


def main(runs: Positional[tuple[Path, ...]]) -> None:
    """Print the table and save the figure.

    Args:
        runs: Folders of runs trained in one MiniGrid environment.
    """
    systems = load_systems(runs)
    world = systems[0].settings.world
    if "MiniGrid" not in world.gym_id:
        raise UserError(f"{runs[0]} was not trained in MiniGrid: python3 main.py --world.gym-id MiniGrid-Empty-5x5-v0.")
    bins = range(0, world.lifetime - BIN + 1, BIN)
    heads = ["agent", "return", *(f"steps {low} to {low + BIN - 1}" for low in bins)]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, each in rewards(systems).items():
        returns = [reward.sum(1)[None].astype(float) for reward in each]
        total = format_ci(float(np.mean(returns)), bootstrap_ci(mean, *returns), 2)
        by_bin = np.concatenate(each)[:, : len(bins) * BIN].reshape(-1, len(bins), BIN).sum(2).mean(0)
        print("| " + " | ".join([name, total, *(f"{x:.2f}" for x in by_bin)]) + " |")
        axes.plot(np.array(bins) + BIN / 2, by_bin / BIN, marker=".", label=name)
    axes.set(xlabel="step of the lifetime", ylabel="reward per step", title=world.gym_id)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    figure.savefig(runs[0] / "external.png", dpi=120)
    print(f"\n{LIFETIMES} lifetimes under held-out rules, {len(runs)} runs; figure in {runs[0] / 'external.png'}")


if __name__ == "__main__":
    command_line(main)
