"""How an agent adapts in an external environment, beside one who knows the rule.

RUNs are trained with --world.gym-id in one environment. Who knows the rule is the environment's own expert, or in
MiniGrid a planner that takes a shortest path. Compares the returns in equal parts of the lifetime, such as episodes,
with those of posterior sampling, where the environment offers it, and of a random agent, all on the same held-out
tasks. Shares of the expert's return are compared lifetime by lifetime; a death is an episode that terminates without
reward. Figure: external.png in the first run's folder. Needs tests/requirements.txt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from operator import methodcaller
from pathlib import Path

import gymnasium
import numpy as np
import torch
from matplotlib.figure import Figure
from minigrid.core.constants import DIR_TO_VEC
from torch import Tensor
from tyro.conf import Positional

from agent import AgentController, System
from context_engine import references, rollout
from environment import ExternalWorlds, Split, make_inner_env
from main import EVALUATION_SEEDS
from memory import UserError, WorldStep, require
from tests.benchmarks import command_line, load_systems, run_folders
from world_model import AGENTS, Trajectories, bootstrap_ci, format_ci, mean, ratio_of_means

SEARCH = "nearest cell that may be rewarded"
LEFT, RIGHT, FORWARD, PICKUP, TOGGLE = 0, 1, 2, 3, 5  # MiniGrid's own actions
State = tuple[int, int, int, bool, bool]  # x, y, direction, whether it has the key, whether it has opened the door


class PrivilegedAgent:
    """Does in every environment what `action_of` says, one of the environment's own actions; knows the hidden rule."""

    def __init__(self, worlds: ExternalWorlds, action_of: Callable[[gymnasium.Env], int]) -> None:
        self.worlds, self.action_of = worlds, action_of

    def reset(self, frames: Tensor) -> None:
        """Nothing to do: it reads the environments."""

    def observe(self, action: Tensor, step: WorldStep) -> None:
        """Nothing to learn."""

    def act(self) -> Tensor:
        """Actions (B,) int64."""
        envs = self.worlds.vector.envs
        return torch.tensor([int(np.argmax(env.action_map == self.action_of(env.unwrapped))) for env in envs])


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


def rollouts(systems: list[System], lifetimes: int, split: Split) -> dict[str, list[Trajectories]]:
    """What happened by agent, the trained agent's first, one item for each run; UserError if nobody knows the rule."""
    world, seed = systems[0].settings.world, EVALUATION_SEEDS.get(split, EVALUATION_SEEDS["test"])
    found = {name: [one] for name, one in references(world, lifetimes, split, seed, systems[0].device).items()}

    def rollout_of(make: Callable) -> Trajectories:
        worlds = ExternalWorlds(world, lifetimes, split, seed, systems[0].device)
        return rollout(worlds, make(worlds))

    if "known_rule" not in found and "MiniGrid" not in world.gym_id:
        raise UserError(
            f"{world.gym_id} offers no expert_action() and is not one of MiniGrid's: nothing to compare with."
        )
    if "known_rule" not in found:
        found["known_rule"] = [rollout_of(lambda worlds: PrivilegedAgent(worlds, first_action))]
    if make_inner_env(world.gym_id, world.cell).has_wrapper_attr("search_action"):
        found[SEARCH] = [rollout_of(lambda worlds: PrivilegedAgent(worlds, methodcaller("search_action")))]
    return {"agent": [rollout_of(lambda _, system=system: AgentController(system)) for system in systems]} | found


def cells(each: list[Trajectories], best: Trajectories, columns: int) -> list[str]:
    """The row of an agent: return; shares of the return of `best` after the first part and in the last part; episodes
    that ended in the last part and were won; deaths for each episode won after the first part; returns by part."""
    size = best.reward.shape[1] // columns
    reward = np.stack([one.reward[:, : size * columns].double().numpy() for one in (*each, best)])
    by_part = reward.reshape(*reward.shape[:2], columns, size).sum(3)  # (runs and best, lifetimes, part)
    row = [format_ci(float(reward[:-1].sum(2).mean()), bootstrap_ci(mean, *reward[:-1].sum(2)[:, None]), 2)]
    for part in (slice(1, None), slice(-1, None)):
        earned = by_part[:, :, part].sum(2)
        pairs = [np.stack([own, earned[-1]]) for own in earned[:-1]]
        share = float(earned[:-1].mean() / earned[-1].mean()) if earned[-1].any() else None
        row.append(format_ci(share, bootstrap_ci(ratio_of_means, *pairs), 3))
    won = torch.cat([one.terminated & (one.reward > 0) for one in each])
    died = torch.cat([one.terminated & (one.reward <= 0) for one in each])
    ended = torch.cat([one.terminated | one.truncated for one in each])
    last = slice(size * (columns - 1), None)
    row.append(f"{won[:, last].sum() / ended[:, last].sum():.3f}" if won.any() and ended[:, last].any() else "-")
    row.append(f"{died[:, size:].sum() / won[:, size:].sum():.3f}" if won[:, size:].any() else "-")
    return [*row, *(f"{x:.2f}" for x in by_part[:-1].mean((0, 1)))]


def main(runs: Positional[tuple[Path, ...]], lifetimes: int = 64, split: Split = "test", columns: int = 8) -> None:
    """Print the table and save the figure.

    Args:
        runs: Folders of runs trained in one external environment.
        lifetimes: Lifetimes of each agent.
        split: Which tasks; where few are held out, those of training say what luck with them did.
        columns: Equal parts of the lifetime, at least 2; for episodes of a fixed length, how many there are.
    """
    runs = run_folders(runs)
    systems = load_systems(runs)
    world = systems[0].settings.world
    require("columns", columns, 2, world.lifetime)
    if world.lifetime % columns:
        raise UserError(f"columns is {columns}, but must divide the lifetime of {world.lifetime} steps.")
    if not world.gym_id:
        raise UserError(f"{runs[0]} was not trained in an external environment: python3 main.py --world.gym-id ID.")
    found, size = rollouts(systems, lifetimes, split), world.lifetime // columns
    shares = (f"of known rule after step {size}", "of known rule in the last part")
    counts = ("episodes won in the last part", f"deaths per episode won after step {size}")
    heads = ["agent", "return", *shares, *counts, *(f"part {k + 1}" for k in range(columns))]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, each in found.items():
        row, label = cells(each, found["known_rule"][0], columns), AGENTS.get(name, name)
        print("| " + " | ".join([label, *row]) + " |")
        middle = (np.arange(columns) + 0.5) * size
        axes.plot(middle, np.array(row[-columns:], float) / size, marker=".", label=label)
    axes.set(xlabel="step of the lifetime", ylabel="reward per step", title=world.gym_id)
    axes.legend(fontsize="small")
    figure.savefig(runs[0] / "external.png", dpi=120)
    held_out = f"{lifetimes} lifetimes under rules of the {split} split, parts of {size} steps"
    print(f"\n{held_out}, {len(runs)} runs; figure in {runs[0] / 'external.png'}")


if __name__ == "__main__":
    command_line(main)
