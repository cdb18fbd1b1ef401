"""The classics of meta-reinforcement learning as pixel environments, each a task distribution of one's own.

    python3 main.py --world.gym-id tests.benchmarks.classics:HiddenGoal-v0

A grid is drawn in which only the body is seen (on the lake the goal too). Everything else is hidden and depends on the
task. Settings are published ones, and what differs is said:

- HiddenGoal: 5x5, the goal in one of 21 cells, four episodes of 15 steps, -0.1 a step off the goal and 1 on it
  (Zintgraf et al., "VariBAD", ICLR 2020, `GridNavi`).
- Darkroom: 9x9, from the centre, ten episodes of 20 steps, 1 a step on the goal (Laskin et al., "In-context
  Reinforcement Learning with Algorithm Distillation", ICLR 2023); 49 goals to train on, where peers have 73.
- DarkroomPermuted: the goal in the far corner and known, five actions permuted, 12 of 120 permutations held out, four
  episodes of 50 steps (Son et al., "Distilling Reinforcement Learning Algorithms for In-Context Model-Based Planning",
  ICLR 2025; the idea is Lee et al.'s, "Decision-Pretrained Transformer", NeurIPS 2023, on a larger grid).
- DarkKeyToDoor: 1 for the first step on the key, then 1 for the first one on the door, from the centre, eight episodes
  of 50 steps; 5% of the 6561 pairs held out, and as many for validation (the same).
- FrozenLakeMeta: a lake for every lifetime, whose holes are not shown, two actions swapped with probability one half,
  after AMAGO's `MetaFrozenLake` (github.com/UT-Austin-RPL/amago, Grigsby et al., ICLR 2024). A move slips to either
  side with probability 0.1 each; AMAGO's hard mode has noisy positions and breaking ice instead.
"""

from __future__ import annotations

import itertools
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.toy_text.frozen_lake import generate_random_map

from environment import SPLITS

STEPS = ((-1, 0), (1, 0), (0, -1), (0, 1), (0, 0))  # up, down, left, right, stay: (row, column)
SIDES = ((2, 3), (2, 3), (0, 1), (0, 1), (4, 4))  # where a move may slip to
PATCH = 4  # pixels along each side of a cell
PLANS: dict[tuple[type, int], np.ndarray] = {}  # by family and task


class Classic(gymnasium.Env):
    """A grid whose tasks are tables over n tasks, S cells and F stages of an episode; the agent sees the body alone.

    Args:
        size: cells along each side; episode: steps of an episode; lifetime: steps of a task.
        reward: (n, F, S), for a step into a cell; a positive one leads to the next stage, if there is any.
        ends: (n, F, S) bool, where an episode ends.
        moves: (n, A), which of STEPS each action makes.
        start: cell in which an episode begins; goal: a cell that is drawn, if any.
        slip: probability of slipping to each side.
        held_out: share of the tasks held out for the test, and as many for validation.
        alike: so many tasks in a row are for the same split.
        fold: which of the tasks, in a random order, are held out.
    """

    observation_space: gymnasium.spaces.Box
    action_space = gymnasium.spaces.Discrete(len(STEPS))
    metadata = {"render_modes": [], "patch": PATCH}

    def __init__(
        self,
        size: int,
        episode: int,
        lifetime: int,
        reward: np.ndarray,
        ends: np.ndarray,
        moves: np.ndarray,
        start: int,
        goal: int | None = None,
        slip: float = 0.0,
        held_out: float = 0.2,
        alike: int = 1,
        fold: int = 0,
    ) -> None:
        self.size, self.episode, self.start, self.goal, self.slip = size, episode, start, goal, slip
        self.reward, self.ends, self.moves = reward, ends, moves
        self.metadata = self.metadata | {"lifetime": lifetime}
        self.observation_space = gymnasium.spaces.Box(0, 255, (size * PATCH, size * PATCH, 3), np.uint8)
        order = np.random.default_rng(7).permutation(np.arange(len(reward)).reshape(-1, alike))
        held = round(held_out * len(order))
        order = np.roll(order, fold * held, axis=0)
        parts = (part.flatten() for part in np.split(order, [len(order) - 2 * held, len(order) - held]))
        self.tasks = {split: part.tolist() for split, part in zip(SPLITS, parts, strict=True)}
        place = np.arange(size**2)
        row, column = place // size, place % size
        to = [(np.clip(row + y, 0, size - 1), np.clip(column + x, 0, size - 1)) for y, x in STEPS]
        self.to = np.stack([row * size + column for row, column in to])  # (step, S): the cell that a step leads to
        self.task, self.sampler = 0, np.random.default_rng()

    def set_task(self, task: int) -> None:
        """A lifetime in a task begins: posterior sampling starts from the uniform prior over all tasks."""
        self.task, self.log_posterior = task, np.zeros(len(self.reward))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Begin an episode in the present task, for which posterior sampling samples anew."""
        super().reset(seed=seed)
        if seed is not None:  # a stream of its own, so that all agents meet the same starts and slips
            self.sampler = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))
        self.sample = None
        self.cell, self.stage, self.steps = self.start, 0, 0
        return self.draw(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Move, and update the posterior over tasks."""
        move, chance = self.moves[self.task, action], self.np_random.random()
        if chance < 2 * self.slip:
            move = SIDES[move][int(chance < self.slip)]
        before, self.cell = self.cell, int(self.to[move, self.cell])
        reward, ended = self.reward[self.task, self.stage, self.cell], self.ends[self.task, self.stage, self.cell]
        self._infer(before, action, reward, ended)
        self.stage = min(self.stage + int(reward > 0), self.reward.shape[1] - 1)
        self.steps += 1
        return self.draw(), float(reward), bool(ended), self.steps >= self.episode, {}

    def draw(self) -> np.ndarray:
        """The frame: (H, W, 3) uint8."""
        cells = np.full((self.size**2, 3), 20, np.uint8)
        if self.goal is not None:
            cells[self.goal] = (60, 200, 80)
        cells[self.cell] = (220, 60, 60)
        return cells.reshape(self.size, self.size, 3).repeat(PATCH, 0).repeat(PATCH, 1)

    def expert_action(self) -> int:
        """The best action of one who knows the task."""
        return int(self.plan(self.task)[self.stage, self.cell])

    def thompson_action(self) -> int:
        """The best action in a task sampled from the exact posterior, anew in every episode and when it turns out to be
        impossible."""
        if self.sample is None or np.isneginf(self.log_posterior[self.sample]):
            weight = np.exp(self.log_posterior - self.log_posterior.max())
            self.sample = int(self.sampler.choice(len(weight), p=weight / weight.sum()))
        return int(self.plan(self.sample)[self.stage, self.cell])

    def _infer(self, before: int, action: int, reward: float, ended: bool) -> None:
        """Bayes' rule for every task."""
        reached = self.to[:, before] == self.cell  # (step,)
        by_move = (1 - 2 * self.slip) * reached + self.slip * reached[np.array(SIDES)].sum(1)
        likelihood = by_move[self.moves[:, action]]
        likelihood = likelihood * (self.reward[:, self.stage, self.cell] == reward)
        with np.errstate(divide="ignore"):
            self.log_posterior += np.log(likelihood * (self.ends[:, self.stage, self.cell] == ended))

    def plan(self, task: int, discount: float = 0.97) -> np.ndarray:
        """The best action (F, S) in a task, by value iteration, computed once for all environments of a family.

        An episode that ends leads to the next one, at the start cell, because returns are those of lifetimes.
        """
        if (type(self), task) not in PLANS:
            reward, ends, last = self.reward[task], self.ends[task], self.reward.shape[1] - 1
            value, stage = np.zeros(reward.shape), np.minimum(np.arange(last + 1)[:, None] + (reward > 0), last)
            for _ in range(1000):
                following = np.where(ends, value[0, self.start], value[stage, np.arange(reward.shape[1])])
                entered = reward + discount * following  # (F, S)
                by_step = entered[:, self.to]  # (F, step, S)
                mixed = (1 - 2 * self.slip) * by_step + self.slip * by_step[:, np.array(SIDES)].sum(2)
                q = mixed[:, self.moves[task]]  # (F, A, S)
                previous, value = value, q.max(1)
                if np.abs(value - previous).max() < 1e-6:
                    break
            PLANS[type(self), task] = q.argmax(1)
        return PLANS[type(self), task]


class HiddenCells(Classic):
    """What is rewarded is hidden, but the moves are known: one can search."""

    def search_action(self) -> int:
        """A step towards the nearest cell that may be rewarded next."""
        possible = np.isfinite(self.log_posterior)
        cells = (self.reward[possible, self.stage] > 0).any(0).nonzero()[0]
        place, target = np.divmod(self.cell, self.size), np.stack(np.divmod(cells, self.size), -1)
        away = target - place
        down, right = away[np.abs(away).sum(1).argmin()] if len(cells) else (0, 0)
        wanted = (int(down > 0) if down else 2 + int(right > 0)) if down or right else 4
        return int((self.moves[self.task] == wanted).argmax())


class HiddenGoal(HiddenCells):
    """VariBAD's grid."""

    def __init__(self, fold: int = 0) -> None:
        cells = [cell for cell in range(25) if cell not in (0, 1, 5, 6)]
        reward = np.where(np.arange(25) == np.array(cells)[:, None], 1.0, -0.1)[:, None]
        moves = np.tile(np.arange(5), (len(cells), 1))
        super().__init__(5, 15, 60, reward, np.zeros_like(reward, bool), moves, start=0, fold=fold)


class Darkroom(HiddenCells):
    """Algorithm Distillation's dark room."""

    def __init__(self) -> None:
        reward = np.eye(81)[:, None]
        super().__init__(9, 20, 200, reward, np.zeros_like(reward, bool), np.tile(np.arange(5), (81, 1)), start=40)


class DarkroomPermuted(Classic):
    """The dark room with its goal in the corner and permuted actions."""

    def __init__(self) -> None:
        moves = np.array(list(itertools.permutations(range(5))))
        reward = np.tile(np.arange(81) == 80, (len(moves), 1, 1)).astype(float)
        super().__init__(9, 50, 200, reward, np.zeros_like(reward, bool), moves, start=0, held_out=0.1)


class DarkKeyToDoor(HiddenCells):
    """First the key, then the door; whether one has the key is not seen."""

    def __init__(self) -> None:
        pairs = np.array(list(itertools.product(range(81), repeat=2)))  # (key, door)
        reward = np.zeros((len(pairs), 3, 81))  # stages: nothing yet, with the key, done
        for stage in (0, 1):
            np.put_along_axis(reward[:, stage], pairs[:, stage : stage + 1], 1.0, 1)
        moves = np.tile(np.arange(5), (len(pairs), 1))
        super().__init__(9, 50, 400, reward, np.zeros_like(reward, bool), moves, start=40, held_out=0.05)


class FrozenLakeMeta(Classic):
    """Lakes whose holes are not shown; down and right may be swapped."""

    LAKES = 2000

    def __init__(self) -> None:
        lakes = np.array([list("".join(generate_random_map(5, seed=seed))) for seed in range(self.LAKES)])
        lakes = np.unique(lakes, axis=0).repeat(2, 0)  # (n, 25)
        reward = (lakes == "G").astype(float)[:, None]
        ends = ((lakes == "G") | (lakes == "H"))[:, None]
        moves = np.tile([[0, 1, 2, 3, 4], [0, 3, 2, 1, 4]], (len(lakes) // 2, 1))
        super().__init__(5, 25, 200, reward, ends, moves, start=0, goal=24, slip=0.1, alike=2)


for family in (HiddenGoal, Darkroom, DarkroomPermuted, DarkKeyToDoor, FrozenLakeMeta):
    gymnasium.register(f"{family.__name__}-v0", entry_point=family, disable_env_checker=True, order_enforce=False)
for fold in range(1, 5):  # the same with other goals held out
    gymnasium.register(
        f"HiddenGoal{fold}-v0", HiddenGoal, disable_env_checker=True, order_enforce=False, kwargs={"fold": fold}
    )
