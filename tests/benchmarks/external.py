"""How an agent adapts in a MiniGrid environment with shuffled actions, beside a shortest-path planner.

RUNs are trained with --world.gym-id MiniGrid-.... Compares the return by step of the lifetime with a random agent's
and with a planner's that knows the rule and takes a shortest path, all under the same held-out rules. How much of the
latter's return is reached once the rule should be known is compared lifetime by lifetime; a death is an episode that
terminates without reward. Figure: external.png in the first run's folder. Needs tests/requirements.txt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
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
from main import EVALUATION_SEEDS, HeldOut
from memory import UserError, WorldStep
from tests.benchmarks import command_line, load_systems
from world_model import Trajectories, bootstrap_ci, format_ci, mean, ratio_of_means

BIN, LATE = 32, 32  # steps that are averaged in a column; step from which on the rule should be known
LEFT, RIGHT, FORWARD, PICKUP, TOGGLE = 0, 1, 2, 3, 5  # MiniGrid's own actions
SHORTEST = "known rule, shortest path"
State = tuple[int, int, int, bool, bool]  # x, y, direction, whether it has the key, whether it has opened the door


class ShortestPathAgent:
    """Knows the hidden rule and the map: breadth-first search over states, see `State`. Privileged."""

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


def following_states(env: gymnasium.Env, state: State) -> Iterator[tuple[int, State]]:
    """MiniGrid's own actions that change something in `state` and do not end in lava, and the states they lead to."""
    x, y, direction, key, opened = state
    ahead = tuple(map(int, np.add((x, y), DIR_TO_VEC[direction])))
    content = env.grid.get(*ahead)
    kind = "empty" if content is None else content.type
    yield LEFT, (x, y, (direction - 1) % 4, key, opened)
    yield RIGHT, (x, y, (direction + 1) % 4, key, opened)
    if kind == "key" and not key:
        yield PICKUP, (x, y, direction, True, opened)
    elif kind == "door" and not (content.is_open or opened):
        if key or not content.is_locked:
            yield TOGGLE, (x, y, direction, key, True)
    elif kind in ("empty", "key", "door") or (content.can_overlap() and kind != "lava"):
        yield FORWARD, (*ahead, direction, key, opened)


def first_action(env: gymnasium.Env) -> int:
    """MiniGrid's own first action on a shortest path to the goal, by way of one key and one door at most; LEFT where
    there is no path."""
    start = (*map(int, env.agent_pos), int(env.agent_dir), env.carrying is not None, False)
    queue, visited = deque([(start, None)]), {start}
    while queue:
        state, first = queue.popleft()
        for action, after in following_states(env, state):
            content = env.grid.get(*after[:2])
            if content is not None and content.type == "goal":
                return action if first is None else first
            if after not in visited:
                visited.add(after)
                queue.append((after, action if first is None else first))
    return LEFT


def rollouts(systems: list[System], lifetimes: int, split: HeldOut) -> dict[str, list[Trajectories]]:
    """What happened by agent, the trained agent's first; one item for each run of the trained agent."""
    world, seed = systems[0].settings.world, EVALUATION_SEEDS[split]

    def rollout_of(make: Callable) -> Trajectories:
        worlds = ExternalWorlds(world, lifetimes, split, seed, systems[0].device)
        return rollout(worlds, make(worlds))

    return {
        "agent": [rollout_of(lambda _, system=system: AgentController(system)) for system in systems],
        SHORTEST: [rollout_of(ShortestPathAgent)],
        "random": [rollout_of(lambda _: RandomAgent(seed, world.sizes.actions))],
    }


def late_cells(each: list[Trajectories], shortest: Trajectories) -> list[str]:
    """Two cells of the table, both of the steps from LATE on: the return as a share of the shortest path's with its
    interval, and deaths per episode won."""
    best = shortest.reward[:, LATE:].sum(1).numpy().astype(float)
    pairs = [np.stack([one.reward[:, LATE:].sum(1).numpy().astype(float), best]) for one in each]
    won = sum(int((one.terminated & (one.reward > 0))[:, LATE:].sum()) for one in each)
    died = sum(int((one.terminated & (one.reward <= 0))[:, LATE:].sum()) for one in each)
    share = float(ratio_of_means(*np.concatenate(pairs, 1))) if best.any() else None
    return [format_ci(share, bootstrap_ci(ratio_of_means, *pairs), 3), f"{died / won:.3f}" if won else "-"]


def main(runs: Positional[tuple[Path, ...]], lifetimes: int = 64, split: HeldOut = "test") -> None:
    """Print the table and save the figure.

    Args:
        runs: Folders of runs trained in one MiniGrid environment.
        lifetimes: Lifetimes of each agent.
        split: Which rules.
    """
    systems = load_systems(runs)
    world = systems[0].settings.world
    if "MiniGrid" not in world.gym_id:
        raise UserError(f"{runs[0]} was not trained in MiniGrid: python3 main.py --world.gym-id MiniGrid-Empty-5x5-v0.")
    bins = range(0, world.lifetime - BIN + 1, BIN)
    late = (f"after step {LATE}, share of the shortest path", f"deaths per episode won after step {LATE}")
    heads = ["agent", "return", *late, *(f"steps {low} to {low + BIN - 1}" for low in bins)]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    found = rollouts(systems, lifetimes, split)
    for name, each in found.items():
        returns = [one.reward.sum(1).numpy()[None].astype(float) for one in each]
        total = format_ci(float(np.mean(returns)), bootstrap_ci(mean, *returns), 2)
        reward = np.concatenate([one.reward.numpy() for one in each])
        by_bin = reward[:, : len(bins) * BIN].reshape(-1, len(bins), BIN).sum(2).mean(0)
        cells = [name, total, *late_cells(each, found[SHORTEST][0]), *(f"{x:.2f}" for x in by_bin)]
        print("| " + " | ".join(cells) + " |")
        axes.plot(np.array(bins) + BIN / 2, by_bin / BIN, marker=".", label=name)
    axes.set(xlabel="step of the lifetime", ylabel="reward per step", title=world.gym_id)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    figure.savefig(runs[0] / "external.png", dpi=120)
    held_out = f"{lifetimes} lifetimes under rules of the {split} split"
    print(f"\n{held_out}, {len(runs)} runs; figure in {runs[0] / 'external.png'}")


if __name__ == "__main__":
    command_line(main)
