"""The pixel environment whose rules are hidden: rules as data, the batched world, Gymnasium interfaces; and external
environments with shuffled actions.

Time alignment is in memory.py.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import gymnasium
import numpy as np
import scipy.ndimage
import torch
from gymnasium.vector.utils import batch_space
from torch import Tensor

from memory import WorldStep, require, require_all, make_generator


MOVES = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1], [0, 0]])  # (move, (row, column)); the last one moves nothing
MOVE_NAMES = ("up", "down", "left", "right", "nothing")
DIRECTIONS, NOTHING = 4, 4
PALETTE = torch.tensor(
    [[220, 60, 60], [60, 200, 80], [70, 110, 230], [230, 210, 70], [200, 80, 220]], dtype=torch.uint8
)
PALETTE_NAMES = ("red", "green", "blue", "yellow", "magenta")
WALL, BACKGROUND = 128, 20
WIND_STRENGTHS = {"train": (1, 3, 5), "validation": (2,), "test": (4,)}  # fifths of the strongest
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
WORLDS: dict[str, dict[str, Any]] = {  # what presets change in the world
    "default": {},
    "switching": {"lifetime": 128, "switch": 0.01},
    "tinted": {"tint": 0.8},
    "large": {"grid": 8, "episode_limit": 24},
    "everything": {
        "lifetime": 96,
        "walls": 4,
        "edges": "hidden",
        "wind": 0.4,
        "actions": 5,
        "reward_values": (1.0, 0.5, -1.0),
    },
    "quick": {"grid": 4, "lifetime": 48, "episode_limit": 10, "noise": 0.05, "slip": 0.1},
}


@dataclass(frozen=True)
class WorldSettings:
    """The world and its ladder of difficulty."""

    grid: int = 6
    """Cells along each side of the square world, 3 to 16."""
    cell: int = 4
    """Pixels along each side of a cell, at least 1."""
    lifetime: int = 64
    """Steps that one task lasts, at least 2."""
    episode_limit: int = 18
    """Steps after which an episode ends without a goal or hazard, at least 1."""
    slip: float = 0.15
    """Probability in [0, 1] that an action slips."""
    slip_random: float = 0.5
    """Share in [0, 1] of the slips in which a random action is taken; in the others nothing moves."""
    noise: float = 0.1
    """Standard obs_std of the Gaussian pixel noise, as a share of the range 0..255, at least 0."""
    switch: float = 0.0
    """Probability in [0, .5] that the rule is drawn anew after a step, unannounced: the picture stays as it is."""
    switch_step: int = 0
    """To measure how fast an agent recovers: rules are drawn anew after this step and no other, while the references go
    on expecting `switch`, which must be above 0; 0 for at random."""
    tint: float = 0.0
    """How differently lifetimes look, in [0, 1): a hidden gain of each colour channel, from 1 - tint to 1, and a hidden
    brightness, up to tint * 100 of 255, drawn for every lifetime."""
    reward_values: tuple[float, ...] = (1.0, -1.0)
    """What it is worth to reach each of the things, 1 to 4 of them, which ends the episode; which colour is which is hidden."""
    actions: int = 4
    """Actions, 4 to 8; those beyond the four moves do nothing, and which these are is hidden."""
    walls: int = 0
    """Cells that are walls, at most a third of all; where they stand is drawn for every lifetime, and seen."""
    edges: Literal["block", "wrap", "hidden"] = "block"
    """What happens at the edges: the body stops or comes in on the other side; hidden: the one in half of the rules, the other
    in the rest."""
    wind: float = 0.0
    """Greatest probability, in [0, .9], that a gust carries the body a cell in a hidden direction, whatever the action; the
    hidden probability is 1 to 5 fifths of it."""
    gym_id: str = ""
    """A Gymnasium world to live in instead: Discrete actions, pictures; its actions are shuffled anew for every lifetime.
    MiniGrid-...: seen whole, `cell` pixels a tile. Of the other settings lifetime, slip (always to a random action) and
    noise count. `package:Id-v0` imports the package that registers the world first."""
    shuffled: tuple[int, ...] = ()
    """Which actions of that world are shuffled, 4 to 20 of them; empty for all."""
    holdout: Literal["combinations", "permutations"] = "combinations"
    """What is never trained on: 28 of 144 pairs of action map and roles, or a quarter of the action maps; besides, a fifth of
    the layouts of walls and a strength of the wind."""

    def __post_init__(self) -> None:
        require_all(
            "world", self, grid=(3, 16), cell=(1, 64), lifetime=(2, 10_000), episode_limit=(1, 10_000), slip=(0, 1),
            slip_random=(0, 1), noise=(0, 10), switch=(0, 0.5), switch_step=(0, 10_000), tint=(0, 0.99), actions=(4, 8),
            walls=(0, self.grid**2 // 3), wind=(0, 0.9),
        )  # fmt: skip
        if self.edges not in ("block", "wrap", "hidden"):
            raise ValueError(f"world.edges is {self.edges!r}: choose block, wrap or hidden.")
        if self.holdout not in ("combinations", "permutations"):
            raise ValueError(f"world.holdout is {self.holdout!r}: choose combinations or permutations.")
        for worth in self.reward_values:
            require("world.reward_values", worth, -1000, 1000)
        different = len(set(self.reward_values)) == len(
            self.reward_values
        )  # equal ones would make one rule of two tasks
        if (
            not 1 <= len(self.reward_values) < len(PALETTE)
            or 0 in self.reward_values
            or max(self.reward_values) <= 0
            or not different
        ):
            raise ValueError(
                f"world.reward_values is {self.reward_values}, but must be 1 to 4 different numbers that are not 0, one above 0: such as 1 -1."
            )
        if self.switch_step and not self.switch:
            raise ValueError(
                f"world.switch_step is {self.switch_step} and world.switch 0: give world.switch, such as 0.01."
            )
        house = ("switch", "tint", "reward_values", "actions", "walls", "edges", "wind")
        own = [name for name in house if self.gym_id and getattr(self, name) != getattr(WorldSettings, name)]
        if own:
            raise ValueError(f"world.{own[0]} is not for a world of other people's: leave it out with {self.gym_id}.")
        if self.shuffled and not self.gym_id:
            raise ValueError(
                f"world.shuffled is {self.shuffled}, but is for a world of other people's: give world.gym_id."
            )

    @property
    def sizes(self) -> Sizes:
        """Of pictures and actions; ValueError where there is no such world, or none to live in."""
        return (
            external_sizes(self.gym_id, self.cell, self.shuffled)
            if self.gym_id
            else Sizes((self.pixels, self.pixels, 3), self.actions)
        )

    @property
    def pixels(self) -> int:
        """Height and width of the picture in pixels."""
        return self.grid * self.cell

    @property
    def roles(self) -> tuple[str, ...]:
        """Names of the roles: the body, and the things by what they are worth."""
        named = {1.0: "goal", -1.0: "hazard"}
        return ("body", *(named.get(worth, f"{worth:+g}") for worth in self.reward_values))


class Sizes(NamedTuple):
    """What a world shows and what can be done in it."""

    obs_shape: tuple[int, int, int]
    """(height, width, 3)."""
    actions: int


def checked(split: str) -> str:
    """The name of a split; ValueError for any other."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, but must be one of {', '.join(SPLITS)}.")
    return split


class Rule(NamedTuple):
    """Hidden rules as data, one row for each world."""

    action_map: Tensor
    """(B, action) int64: the move (row of MOVES) that an action makes."""
    colours: Tensor
    """(B, role) int64: the colour (row of PALETTE) that plays a role: the body, then the things."""
    wraps: Tensor
    """(B,) bool: whether who leaves over an edge comes in on the other side."""
    wind: Tensor
    """(B,) int64: the move that a gust makes."""
    strength: Tensor
    """(B,) float32: probability of a gust."""


@dataclass(frozen=True, eq=False)
class RuleSpace:
    """Every rule that a world may have. A task's number has the digits wind, wrapping, action map, colours."""

    action_maps: Tensor
    """(M, action) int64: every way in which four of the actions make the moves and the others nothing."""
    colours: Tensor
    """(R, role) int64: every way in which the colours rollout the roles."""
    wraps: Tensor
    """(E,) bool."""
    wind: Tensor
    """(W,) int64."""
    strength: Tensor
    """(W,) float32."""

    def __len__(self) -> int:
        return self.pairs * len(self.wraps) * len(self.wind)

    @property
    def pairs(self) -> int:
        """Number of pairs of an action map and roles."""
        return len(self.action_maps) * len(self.colours)

    def rule(self, task: Tensor) -> Rule:
        """The rules behind task numbers (B,) int64."""
        weather, pair = task // self.pairs, task % self.pairs
        wind, wraps = weather // len(self.wraps), weather % len(self.wraps)
        parts = (self.action_maps, self.colours, self.wraps, self.wind, self.strength)
        maps, colours, edges, winds, strengths = (part.to(task.device) for part in parts)
        return Rule(
            maps[pair // len(self.colours)],
            colours[pair % len(self.colours)],
            edges[wraps],
            winds[wind],
            strengths[wind],
        )


@functools.cache
def rule_space(reward_values: int, actions: int, edges: str, wind: float) -> RuleSpace:
    """Of worlds with so many things and actions, see `WorldSettings`; `HiddenRulesWorld.space` is its own world's."""
    moves = sorted(set(itertools.permutations([*range(DIRECTIONS), *[NOTHING] * (actions - DIRECTIONS)])))
    colours = list(itertools.permutations(range(1 + reward_values)))
    wraps = {"block": [False], "wrap": [True], "hidden": [False, True]}[edges]
    fifths = [k / 5 * wind for k in range(1, 6)] if wind else [0.0]
    winds = range(DIRECTIONS if wind else 1)
    return RuleSpace(
        torch.tensor(moves), torch.tensor(colours), torch.tensor(wraps),
        torch.tensor([direction for direction in winds for _ in fifths]), torch.tensor(fifths).repeat(len(winds)),
    )  # fmt: skip


def rule_space_of(settings: WorldSettings) -> RuleSpace:
    """Every rule that a world with these settings may have."""
    return rule_space(len(settings.reward_values), settings.actions, settings.edges, settings.wind)


def order_by_role(seen: Tensor, rule: Rule) -> Tensor:
    """What is seen of positions by colour (B, colour, 2), ordered by role (B, role, 2) under `rule`."""
    return seen.gather(1, rule.colours[:, :, None].expand(-1, -1, 2))


def task_split(settings: WorldSettings, split: str) -> Tensor:
    """Task numbers (n,) int64 of one split of a world's rules; the splits are disjoint.

    By pairs of action map and roles: `combinations` holds 28 of 144 out for the test and 16 for validation, so that every
    map and every assignment of roles occurs in training; `permutations` holds out every pair of a quarter of the maps. Where
    wind blows, each split has strengths of its own besides.
    """
    space, fixed = (
        rule_space_of(settings),
        torch.Generator().manual_seed(7),
    )  # for ever: what is held out is part of the benchmark
    pairs, maps, validation = space.pairs, len(space.action_maps), space.pairs * 16 // 144
    if settings.holdout == "combinations":
        order = torch.randperm(pairs, generator=fixed)
        test, rest = order[: pairs * 28 // 144], order[pairs * 28 // 144 :]
    else:
        held = torch.randperm(maps, generator=fixed)[: maps // 4]
        is_test = torch.isin(torch.arange(pairs) // len(space.colours), held)
        test, rest = is_test.nonzero()[:, 0], (~is_test).nonzero()[:, 0]
        rest = rest[torch.randperm(len(rest), generator=fixed)]
    pair = {"train": rest[validation:], "validation": rest[:validation], "test": test}[checked(split)].sort().values
    fifth = torch.arange(len(space.wind)) % 5 + 1
    blows = (
        torch.isin(fifth, torch.tensor(WIND_STRENGTHS[split])).nonzero() if settings.wind else torch.zeros(1, 1).long()
    )
    weather = (blows * len(space.wraps) + torch.arange(len(space.wraps))).view(-1, 1)
    return (weather * pairs + pair).flatten()


@functools.cache
def layouts(grid: int, walls: int) -> dict[str, Tensor]:
    """Where walls can stand in each split, 3 : 1 : 1 of up to 500 layouts: (n, grid, grid) bool each. What is free hangs
    together, and no layout occurs twice."""
    fixed, found = np.random.default_rng(7), {}
    for _ in range(1000):
        layout = np.zeros((grid, grid), bool)
        for cell in fixed.permutation(grid**2):
            if layout.sum() == walls:
                break
            layout.flat[cell] = True
            layout.flat[cell] = scipy.ndimage.label(~layout)[1] == 1
        if layout.sum() == walls:
            found[layout.tobytes()] = layout
        if len(found) == 500:
            break
    made = torch.from_numpy(np.stack(list(found.values())))
    sizes = (len(made) - 2 * (len(made) // 5), len(made) // 5, len(made) // 5)
    return dict(zip(SPLITS, made.split(sizes)))


class HiddenRulesWorld:
    """B worlds that step and draw together on one device, without a loop over worlds.

    Every call draws the same amount of randomness whatever the agents do, so worlds made with one seed give every agent
    the same tasks, starts and slips: comparisons between agents are paired. Pixel noise has a generator of its own.

    Args:
        settings: the world's settings.
        batch: number of worlds, B.
        tasks: the split whose tasks and walls are drawn, each with equal probability; or task numbers (n,) int64, with all walls.
        seed: of the world's two generators.
        device: where all tensors live.

    Raises:
        ValueError: no world or no task is asked for; at a step, actions for another number of worlds.
    """

    NOISE = (
        1 << 20
    )  # samples kept (int16); pictures read random windows of them, which is 20 times cheaper than new noise
    PATCHES = 4096  # of noise, for single cells, at most

    def __init__(
        self, settings: WorldSettings, batch: int, tasks: Tensor | Split, seed: int, device: torch.device | str = "cpu"
    ) -> None:  # fmt: skip
        splits = [tasks] if isinstance(tasks, str) else SPLITS
        tasks = task_split(settings, tasks) if isinstance(tasks, str) else tasks
        if batch < 1 or len(tasks) < 1:
            raise ValueError(f"a world needs at least one row and one task, not batch={batch} and {len(tasks)} tasks.")
        self.settings, self.batch, self.device = settings, batch, torch.device(device)
        self.task_pool = tasks.to(self.device)
        self.generator = make_generator(seed, stream=0, device=self.device)
        self.noise_generator = make_generator(seed, stream=1, device=self.device)
        self.switch_generator = make_generator(seed, stream=6, device=self.device)
        self.tint_generator = make_generator(seed, stream=7, device=self.device)
        self.wind_generator = make_generator(seed, stream=9, device=self.device)
        self.wall_generator = make_generator(seed, stream=10, device=self.device)
        self.space, self.rows = rule_space_of(settings), torch.arange(batch, device=self.device)
        self.reward_values = torch.tensor(settings.reward_values, dtype=torch.float32, device=self.device)
        self.walls: Tensor | None = None  # (B, grid, grid) bool
        self._layouts: Tensor | None = None  # (n, grid, grid) bool
        if settings.walls:
            made = layouts(settings.grid, settings.walls)
            self._layouts = torch.cat([made[split] for split in splits]).to(self.device)
        self._moves = MOVES.to(self.device)
        grey = torch.tensor([[WALL], [BACKGROUND]]).expand(-1, 3)
        self._plain = torch.cat([PALETTE, grey]).to(self.device, torch.int16)  # ((colours, wall, background), channel)
        # A cell of every colour as it is format_ci, alike in all worlds or not: (1 or B, colours, numbers in a cell).
        self._shades = self._plain.repeat(1, settings.cell**2)[None]
        grid = torch.arange(settings.grid, device=self.device)
        self._cells = torch.cartesian_prod(grid, grid)  # (cell, (row, column))
        size, inside = 3 * settings.pixels**2, 3 * settings.cell**2
        # A row of a cell is written in the longest words that it is made of, four times as fast as in single numbers.
        long = math.gcd(3 * settings.cell, 8)
        self._words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[long]
        at = torch.arange(size // long, device=self.device).view(settings.grid, settings.cell, settings.grid, -1)
        self._at = at.transpose(1, 2).reshape(
            settings.grid**2, -1
        )  # (cell, word): where in a picture the words of a cell lie
        self._noise: Tensor | None = None  # for empty worlds, which are windows of it
        self._noisy = torch.zeros(
            (1, inside), dtype=torch.int16, device=self.device
        )  # (patches, numbers), for what is in a cell
        if settings.noise:
            samples = torch.randn(self.NOISE + size, generator=self.noise_generator, device=self.device)
            self._noise = samples.mul_(255 * settings.noise).round_().to(torch.int16)
            self._noisy = self._noise[: len(self._noise) // inside * inside].view(-1, inside)[: self.PATCHES]
        # Where all worlds look the same, both are made ready: noise on an empty world, and cells of every colour.
        self._ground: Tensor | None = None
        if settings.noise and not settings.tint:
            self._ground = (self._noise + BACKGROUND).clamp_(0, 255).to(torch.uint8)
            self._ready = (self._shades[0, :, None] + self._noisy).clamp_(0, 255).to(torch.uint8)

    def reset(self) -> Tensor:
        """Begin a lifetime in newly drawn tasks; returns the first pictures (B, H, W, 3) uint8."""
        drawn = torch.randint(len(self.task_pool), (self.batch,), generator=self.generator, device=self.device)
        if self.settings.tint:
            self._tint()
        if self._layouts is not None:
            layout = torch.randint(len(self._layouts), (self.batch,), generator=self.wall_generator, device=self.device)
            self.walls = self._layouts[layout]
        self.set_state(self.task_pool[drawn], self._starts(), torch.zeros_like(drawn), self.walls)
        return self.render()

    def _tint(self) -> None:
        """Draw how every lifetime looks: `gains` (B, channel) and `brightness` (B, 1), float."""
        strength = self.settings.tint * torch.rand((self.batch, 4), generator=self.tint_generator, device=self.device)
        self.gains, self.brightness = 1 - strength[:, :3], 100 * strength[:, 3:]
        shades = (self._plain * self.gains[:, None] + self.brightness[:, None]).round().to(torch.int16)
        self._shades = shades.repeat(1, 1, self.settings.cell**2)

    def set_state(self, task: Tensor, position: Tensor, age: Tensor, walls: Tensor | None = None) -> None:
        """Instead of `reset`: go on from tasks (B,), positions (B, role, 2) and steps of the episode (B,), all int64, and walls
        (B, grid, grid) bool where there are any."""
        self.task, self.rule, self.walls = task, self.space.rule(task), walls
        self.position, self.episode_step = (
            position.clone(),
            age.clone(),
        )  # (B, role, (row, column)); steps of the present episode
        self.segment, self.steps = torch.zeros_like(age), 0  # number of the present rule; steps of the lifetime

    def step(self, action: Tensor) -> WorldStep:
        """Take `action` (B,) int64 in every world; see `WorldStep`."""
        if action.shape != (self.batch,):
            raise ValueError(f"action has shape {tuple(action.shape)}, but {self.batch} worlds need ({self.batch},).")
        reward, terminated, truncated, starts = self._move(action)
        frame, over = self.render(), terminated | truncated
        ended = over.nonzero()[:, 0]
        final_obs = frame.index_select(0, ended)
        self._restart(over, starts)
        if len(ended):
            frame.index_copy_(0, ended, self.render(ended))
        return WorldStep(frame, reward, terminated, truncated, final_obs)

    def step_unseen(self, action: Tensor) -> WorldStep:
        """As `step`, but without pictures (None, and so no `next_obs`), for planners that imagine with the world itself."""
        reward, terminated, truncated, starts = self._move(action)
        self._restart(terminated | truncated, starts)
        return WorldStep(None, reward, terminated, truncated, None)

    def _move(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the action does, before any restart: reward, terminated, truncated, and where episodes would restart."""
        s, batch = self.settings, self.batch
        chance = torch.rand(batch, generator=self.generator, device=self.device)
        random_action = torch.randint(s.actions, (batch,), generator=self.generator, device=self.device)
        starts = self._starts()  # drawn whether used or not: see the class docstring
        taken = torch.where(chance < s.slip * s.slip_random, random_action, action)
        move = self._moves.index_select(0, self.rule.action_map.gather(1, taken[:, None])[:, 0])
        stands_still = (chance >= s.slip * s.slip_random) & (chance < s.slip)
        move = move.masked_fill(stands_still[:, None], 0)
        if s.wind:
            gust = torch.rand(batch, generator=self.wind_generator, device=self.device) < self.rule.strength
            move = torch.where(gust[:, None], self._moves[self.rule.wind], move)
        self.position[:, 0] = destination(self.position[:, 0], move, self.rule.wraps, s.grid, self.walls)
        reached = (self.position[:, :1] == self.position[:, 1:]).all(-1)  # (B, thing)
        self.episode_step += 1
        terminated = reached.any(1)
        # Of the step, before any restart or switch, for the exact filter and for training; agents never see them.
        self.next_position, self.step_segment, self.step_rule = self.position.clone(), self.segment, self.rule
        return (
            reached.float() @ self.reward_values,
            terminated,
            (self.episode_step >= s.episode_limit) & ~terminated,
            starts,
        )

    def _restart(self, ended: Tensor, starts: Tensor) -> None:
        self.position = torch.where(ended[:, None, None], starts, self.position)
        self.episode_step.masked_fill_(ended, 0)
        self.steps += 1
        if self.settings.switch:
            self._switch()

    def _switch(self) -> None:
        """Draw some rules anew; every colour stays where it is, so the next picture shows nothing of it."""
        chance = torch.rand(self.batch, generator=self.switch_generator, device=self.device)
        drawn = torch.randint(len(self.task_pool), (self.batch,), generator=self.switch_generator, device=self.device)
        switched = chance < self.settings.switch
        if self.settings.switch_step:
            switched = torch.full_like(switched, self.steps == self.settings.switch_step)
        seen = self.order_by_colour(self.position)
        self.task = torch.where(switched, self.task_pool[drawn], self.task)
        self.rule = self.space.rule(self.task)
        self.position = order_by_role(seen, self.rule)
        self.segment = self.segment + switched

    def render(self, rows: Tensor | None = None) -> Tensor:
        """The present pictures of all worlds, or of those in `rows` (n,) int64: (n, H, W, 3) uint8.

        Empty worlds are copied out of the noise in whole rows, which is as fast as memory, and so are the cells that something
        stands in; of two things in one cell both write the same.
        """
        s = self.settings
        rows = self.rows if rows is None else rows
        n, size, look, start = len(rows), 3 * s.pixels**2, rows % len(self._shades), torch.zeros_like(rows)
        if self._noise is not None:
            start = torch.randint(len(self._noise) - size + 1, (n,), generator=self.noise_generator, device=self.device)
        if self._ground is not None:
            picture = self._ground.unfold(0, size, 1).index_select(0, start)
        else:
            empty = self._shades[look, -1].repeat(1, s.grid**2)
            if self._noise is not None:
                empty += self._noise.unfold(0, size, 1).index_select(0, start)
            picture = empty.clamp_(0, 255).to(torch.uint8)

        place, colour = (
            x.index_select(0, rows) for x in (self.position, self.rule.colours)
        )  # (n, things, 2), (n, things)
        colour = torch.where(
            (place == place[:, :1]).all(-1), colour[:, :1], colour
        )  # the body covers what it stands on
        if self.walls is not None:
            walls = self.walls[rows].nonzero()[:, 1:].view(n, -1, 2)
            wall = torch.full(walls.shape[:2], len(self._plain) - 2, device=self.device)
            place, colour = torch.cat([place, walls], 1), torch.cat([colour, wall], 1)
        cell = place[..., 0] * s.grid + place[..., 1]  # (n, things)
        patch = (start[:, None] + 61 * cell) % len(self._noisy)  # another for each cell
        words = self._patches(look, colour, patch).view(self._words).view(n, -1)
        picture.view(self._words).scatter_(1, self._at.index_select(0, cell.flatten()).view(n, -1), words)
        return picture.view(n, s.pixels, s.pixels, 3)

    def _patches(self, look: Tensor, colour: Tensor, patch: Tensor) -> Tensor:
        """Cells (n * m, numbers in a cell) uint8 of `colour` (n, m) as worlds that look like `look` (n,) show them, with the noise
        of number `patch` (n, m) on them, all int64."""
        if self._ground is not None:
            return self._ready.flatten(0, 1).index_select(0, (colour * len(self._noisy) + patch).flatten())
        shade = self._shades.flatten(0, 1).index_select(0, (look[:, None] * len(self._plain) + colour).flatten())
        shade += self._noisy.index_select(0, patch.flatten())
        return shade.clamp_(0, 255).to(torch.uint8)

    def describe_rule(self, row: int) -> str:
        """What is hidden in one world in words, for captions."""
        rule, s = self.rule, self.settings
        said = [", ".join(f"{a}: {MOVE_NAMES[m]}" for a, m in enumerate(rule.action_map[row].tolist()))]
        said.append(", ".join(f"{role} {PALETTE_NAMES[c]}" for role, c in zip(s.roles, rule.colours[row].tolist())))
        if s.edges != "block" or s.wind:
            said.append(f"edges {'wrap' if rule.wraps[row] else 'block'}")
            said[-1] += f", wind {MOVE_NAMES[rule.wind[row]]} {rule.strength[row]:.2f}" if s.wind else ""
        if s.tint:
            gains = " ".join(f"{gain:.2f}" for gain in self.gains[row].tolist())
            said.append(f"gains {gains}, brightness {self.brightness[row].item():.0f}")
        return "\n".join(said)

    def order_by_colour(self, position: Tensor, rule: Rule | None = None) -> Tensor:
        """What a perfect eye sees of positions (B, role, 2): the same, ordered by colour (B, colour, 2), under `rule` or
        the present one."""
        colours = (rule or self.rule).colours
        return torch.zeros_like(position).scatter_(1, colours[:, :, None].expand(-1, -1, 2), position)

    def _starts(self) -> Tensor:
        """Distinct random free cells for the body and the things: (B, role, 2) int64."""
        taken = torch.empty((self.batch, 0), dtype=torch.int64, device=self.device)
        free = self.settings.grid**2 - self.settings.walls
        for role in range(1 + len(self.reward_values)):
            cell = torch.randint(free - role, (self.batch,), generator=self.generator, device=self.device)
            for other in taken.sort(1).values.unbind(1):
                cell = cell + (cell >= other)  # skip what is taken, so that all ways are equally min_branch_prob
            taken = torch.cat([taken, cell[:, None]], 1)
        if self.walls is not None:
            taken = (~self.walls).flatten(1).nonzero()[:, 1].view(self.batch, free).gather(1, taken)
        return self._cells.index_select(0, taken.flatten()).view(*taken.shape, 2)


def destination(place: Tensor, move: Tensor, wraps: Tensor, grid: int, walls: Tensor | None) -> Tensor:
    """Where bodies at `place` (B, ..., 2) come to by `move` (B, ..., 2), both int64, and all ways round: (B, ..., 2).

    Args:
        wraps: (B, ...) bool, whether edges wrap; grid: cells along each side.
        walls: (B, grid, grid) bool, or None where there are none.
    """
    to = place + move
    to = torch.where(wraps[..., None], to % grid, to.clamp(0, grid - 1))
    if walls is None:
        return to
    row = torch.arange(len(walls), device=walls.device).view(-1, *[1] * (to.ndim - 2))
    return torch.where(walls[row, to[..., 0], to[..., 1]][..., None], place, to)


def with_slips(settings: WorldSettings, by_move: Tensor) -> Tensor:
    """What to expect of the action that makes a move, which may slip, if the move itself leads to `by_move` (..., MOVES) float."""
    still = by_move[..., NOTHING:]
    anything = (
        by_move[..., :DIRECTIONS].sum(-1, keepdim=True) + (settings.actions - DIRECTIONS) * still
    ) / settings.actions
    slipped = settings.slip_random * anything + (1 - settings.slip_random) * still
    return (1 - settings.slip) * by_move + settings.slip * slipped


def seed_from(generator: np.random.Generator) -> int:
    """A seed for a torch generator, drawn from a Gymnasium environment's own generator."""
    return int(generator.integers(2**31))


class PixelEnv(gymnasium.Env):
    """One hidden-rule world behind Gymnasium's interface; an episode, to the outside, is one lifetime.

    `terminated` is always False and `truncated` comes at the lifetime's end. The episodes inside show in `info`:
    `episode_terminated` and `episode_truncated` (bool), and where one ended `final_frame`, the last picture before the
    restart. Observations are (H, W, 3) uint8 pictures, actions are Discrete. Every reset draws a new task.

    Args:
        settings: the world's settings.
        split: which tasks are drawn: train, validation or test.
        render_mode: None or "rgb_array" (a large picture).
        reveal_rule: tell the hidden rule in every info as `rule`: the fields of `Rule`, such as `action_map` (the row of MOVES
            that each action is) and `colours` (the row of PALETTE that is the body, the goal, ...). For cheats and debugging.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 8}

    def __init__(
        self, settings: WorldSettings = WorldSettings(), split: Split = "train", render_mode: str | None = None,
        reveal_rule: bool = False,
    ) -> None:  # fmt: skip
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode is {render_mode!r}, but must be None or 'rgb_array'.")
        self.settings, self.render_mode, self.reveal_rule = settings, render_mode, reveal_rule
        self.split = checked(split)
        self.observation_space = gymnasium.spaces.Box(0, 255, (settings.pixels, settings.pixels, 3), np.uint8)
        self.action_space = gymnasium.spaces.Discrete(settings.actions)
        self.world: HiddenRulesWorld | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Begin a lifetime in a newly drawn task; a seed fixes this and all later lifetimes."""
        super().reset(seed=seed)
        if self.world is None or seed is not None:
            self.world = HiddenRulesWorld(self.settings, 1, self.split, seed_from(self.np_random))
        self.steps = 0
        self._picture = self.world.reset()[0].numpy()
        return self._picture, self._info(False, False)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Take an action; Gymnasium's five-tuple. Raises ValueError for an action outside the space."""
        if self.world is None:
            raise gymnasium.error.ResetNeeded("step() was called before reset(): call reset() first.")
        if not self.action_space.contains(action):
            raise ValueError(f"action is {action!r}, but must be an integer from 0 to {self.settings.actions - 1}.")
        frame, reward, terminated, truncated, final_obs = self.world.step(torch.tensor([int(action)]))
        self.steps += 1
        info = self._info(bool(terminated), bool(truncated))
        if terminated or truncated:
            info["final_frame"] = final_obs[0].numpy()
        self._picture = frame[0].numpy()
        return self._picture, float(reward), False, self.steps >= self.settings.lifetime, info

    def _info(self, terminated: bool, truncated: bool) -> dict[str, Any]:
        info: dict[str, Any] = {"episode_terminated": terminated, "episode_truncated": truncated}
        if self.reveal_rule:
            info["rule"] = {name: part[0].tolist() for name, part in self.world.rule._asdict().items()}
        return info

    def render(self) -> np.ndarray | None:
        """The present picture, enlarged to at least 384 pixels, (H', W', 3) uint8."""
        if self.render_mode is None:
            return None
        if self.world is None:
            raise gymnasium.error.ResetNeeded("render() was called before reset(): call reset() first.")
        scale = math.ceil(384 / self.settings.pixels)
        return self._picture.repeat(scale, 0).repeat(scale, 1)


class HiddenRulesWrapper(gymnasium.Wrapper, gymnasium.utils.RecordConstructorArgs):
    """Makes a world with hidden rules of any Gymnasium world with Discrete actions and pictures.

    Every reset begins a lifetime of several inner episodes under a new rule: which action does what. To the outside an
    episode is one lifetime; infos are as in `PixelEnv`.

    Args:
        env: the world; observations (H, W, 3) uint8.
        lifetime: steps that one rule lasts, at least 2.
        split: which permutations are drawn; a fifth of them are for validation, a fifth for the test.
        shuffled: actions that are permuted among themselves, 4 to 20; empty for all of them.
        slip: probability in [0, 1] that an action turns into a random one.
        noise: standard obs_std of the Gaussian pixel noise, as a share of the range 0..255, at least 0.

    Raises:
        ValueError: a world that is none of this kind; at a step, a reward that is no number.
    """

    def __init__(
        self, env: gymnasium.Env, lifetime: int = 256, split: Split = "train", shuffled: tuple[int, ...] = (),
        slip: float = 0.0, noise: float = 0.0,
    ) -> None:  # fmt: skip
        gymnasium.utils.RecordConstructorArgs.__init__(
            self, lifetime=lifetime, split=split, shuffled=shuffled, slip=slip, noise=noise
        )
        gymnasium.Wrapper.__init__(self, env)
        if not isinstance(env.action_space, gymnasium.spaces.Discrete) or env.action_space.start != 0:
            raise ValueError(f"actions are {env.action_space}, but must be Discrete, from 0 on: discretise them first.")
        seen = env.observation_space
        if (
            not isinstance(seen, gymnasium.spaces.Box)
            or seen.dtype != np.uint8
            or len(seen.shape) != 3
            or seen.shape[2] != 3
        ):
            raise ValueError(
                f"observations are {seen}, but must be pictures, Box (height, width, 3) uint8: wrap the world in one of "
                "gymnasium.wrappers, such as AddRenderObservation, first."
            )
        self.shuffled = np.array(shuffled or range(env.action_space.n))
        known = (
            len(set(self.shuffled)) == len(self.shuffled) and np.isin(self.shuffled, range(env.action_space.n)).all()
        )
        if (
            not known or not 4 <= len(self.shuffled) <= 20
        ):  # the number of a permutation of 20 is the last to fit 64 bits
            raise ValueError(
                f"shuffled is {shuffled or 'all'}, but must be 4 to 20 different actions of {env.action_space}."
            )
        require("lifetime", lifetime, 2, 10_000), require("slip", slip, 0, 1), require("noise", noise, 0, 10)
        self.lifetime, self.split, self.slip, self.noise = lifetime, checked(split), slip, noise
        self._random: np.random.Generator | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Begin a lifetime under a newly drawn rule; a seed fixes this and all later lifetimes."""
        if self._random is None or seed is not None:
            # A stream of its own: make_generator like the world inside, the rule could be read off where things begin.
            self._random = np.random.default_rng(None if seed is None else np.random.SeedSequence(seed, spawn_key=(8,)))
        picture, _ = self.env.reset(seed=seed, options=options)
        while True:
            order = self._random.permutation(len(self.shuffled))
            self.task = permutation_rank(order)
            if permutation_split(self.task) == self.split:
                break
        self.action_map = np.arange(self.env.action_space.n)  # action -> the world's own
        self.action_map[self.shuffled] = self.shuffled[order]
        self.steps = 0
        return self._noisy(picture), {"episode_terminated": False, "episode_truncated": False}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Take an action under the hidden rule; Gymnasium's five-tuple."""
        chance, other = self._random.random(), self._random.integers(len(self.action_map))
        taken = self.action_map[other if chance < self.slip else action]
        picture, reward, terminated, truncated, _ = self.env.step(taken)
        if not math.isfinite(reward):
            raise ValueError(f"the world {self.env} gave the reward {reward}, which is no number.")
        info: dict[str, Any] = {
            "episode_terminated": bool(terminated),
            "episode_truncated": bool(truncated and not terminated),
        }
        if terminated or truncated:
            info["final_frame"] = self._noisy(picture)
            picture, _ = self.env.reset()
        self.steps += 1
        return self._noisy(picture), float(reward), False, self.steps >= self.lifetime, info

    def describe_rule(self) -> str:
        """The rule in words, for captions."""
        return "actions stand for the world's own " + " ".join(map(str, self.action_map.tolist()))

    def _noisy(self, picture: np.ndarray) -> np.ndarray:
        if not self.noise:
            return picture
        noisy = picture + self._random.normal(0, 255 * self.noise, picture.shape)
        return noisy.round().clip(0, 255).astype(np.uint8)


SPLIT_SHARES = {"train": range(0, 3), "validation": range(3, 4), "test": range(4, 5)}


def permutation_rank(order: np.ndarray) -> int:
    """The place of a permutation of 0, 1, ..., n - 1 in lexicographic order, from 0 on."""
    rank = 0
    for place, value in enumerate(order):
        rank = rank * (len(order) - place) + int((order[place + 1 :] < value).sum())
    return rank


def permutation_split(rank: int) -> str:
    """Which split a permutation belongs to, for ever."""
    fifth = int(np.random.SeedSequence(rank).generate_state(1)[0]) % 5
    return next(split for split, share in SPLIT_SHARES.items() if fifth in share)


def make_inner_env(gym_id: str, cell: int) -> gymnasium.Env:
    """The Gymnasium world of that id as pictures; MiniGrid's whole, without the highlighted view, `cell` pixels a tile."""
    try:
        if not gym_id.startswith("MiniGrid-"):
            return gymnasium.make(gym_id)
        from minigrid.wrappers import ImgObsWrapper, RGBImgObsWrapper  # optional; importing it registers its worlds

        return ImgObsWrapper(RGBImgObsWrapper(gymnasium.make(gym_id, highlight=False), tile_size=cell))
    except (gymnasium.error.Error, ImportError) as error:
        raise ValueError(f"world.gym_id is {gym_id!r}, which cannot be made: {error}") from error


@functools.cache
def external_sizes(gym_id: str, cell: int, shuffled: tuple[int, ...] = ()) -> Sizes:
    """Sizes of pictures and actions of a Gymnasium world; ValueError where it cannot be lived in."""
    env = HiddenRulesWrapper(make_inner_env(gym_id, cell), shuffled=shuffled)
    sizes = Sizes(env.observation_space.shape, int(env.action_space.n))
    env.close()
    return sizes


def make_external_env(settings: WorldSettings, split: Split) -> HiddenRulesWrapper:
    """One Gymnasium world with hidden rules."""
    inner = make_inner_env(settings.gym_id, settings.cell)
    return HiddenRulesWrapper(inner, settings.lifetime, split, settings.shuffled, settings.slip, settings.noise)


class ExternalEnvError(RuntimeError):
    """A world of other people's failed in mid-life."""


class ExternalWorlds:
    """B Gymnasium worlds with hidden rules behind the interface of `HiddenRulesWorld`, for one lifetime each.

    Args:
        settings: with a `gym_id`.
        batch: number of worlds, B.
        split: which permutations of the actions are drawn.
        seed: worlds made with one seed give every agent the same rules and first episodes.
        device: where the tensors are put; the worlds themselves live on the CPU. They end when nobody holds this object.

    Raises:
        ExternalEnvError: at a reset or a step, whatever the world raised.
    """

    def __init__(
        self, settings: WorldSettings, batch: int, split: Split, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        self.settings, self.batch, self.device, self.seed = settings, batch, torch.device(device), seed
        self.vector = gymnasium.vector.SyncVectorEnv([functools.partial(make_external_env, settings, split)] * batch)

    def reset(self) -> Tensor:
        """Begin a lifetime in newly drawn tasks; returns the first pictures (B, H, W, 3) uint8."""
        seeds = np.random.SeedSequence(self.seed).generate_state(self.batch)
        frames, _ = self._guarded(self.vector.reset, seed=[int(seed >> 1) for seed in seeds])
        self.task = torch.tensor(self.vector.get_attr("task"))
        self.step_segment = torch.zeros(self.batch, dtype=torch.int64, device=self.device)
        return self._tensor(frames)

    def step(self, action: Tensor) -> WorldStep:
        """Take `action` (B,) int64 in every world; see `WorldStep`."""
        frames, reward, _, _, info = self._guarded(self.vector.step, action.cpu().numpy())
        final_obs = frames[:0]
        if "_final_frame" in info:
            final_obs = np.stack(info["final_frame"][info["_final_frame"]])
        flags = (self._tensor(info[name]) for name in ("episode_terminated", "episode_truncated"))
        return WorldStep(self._tensor(frames), self._tensor(reward).float(), *flags, self._tensor(final_obs))

    def describe_rule(self, row: int) -> str:
        """What is hidden in one world in words, for captions."""
        return self.vector.call("describe_rule")[row]

    def __del__(self) -> None:
        if hasattr(self, "vector"):
            self.vector.close()

    def _guarded(self, call: Callable, *arguments: Any, **options: Any) -> Any:
        try:
            return call(*arguments, **options)
        except Exception as error:  # whatever it was: it was not ours
            raise ExternalEnvError(
                f"the world {self.settings.gym_id} failed: {type(error).__name__}: {error}"
            ) from error

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.as_tensor(array.copy()).to(self.device)


def make_worlds(
    settings: WorldSettings, batch: int, split: Split, seed: int, device: torch.device | str = "cpu"
) -> HiddenRulesWorld | ExternalWorlds:  # fmt: skip
    """Worlds of the split's tasks: of the house, or of the Gymnasium world that the settings name."""
    if settings.gym_id:
        return ExternalWorlds(settings, batch, split, seed, device)
    return HiddenRulesWorld(settings, batch, split, seed, device)


class PixelVectorEnv(gymnasium.vector.VectorEnv):
    """Many hidden-rule worlds behind Gymnasium's vector interface, numpy over the batched world.

    All lifetimes end together, so `truncated` is all False or all True. Autoreset is SAME_STEP: at the lifetime's end
    the observation is the next lifetime's first picture and `info["final_obs"]` holds the last one of the old. Infos
    are as in `PixelEnv`, as arrays with Gymnasium's `_name` masks.
    """

    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP, "render_modes": []}

    def __init__(self, num_envs: int = 1, settings: WorldSettings = WorldSettings(), split: Split = "train") -> None:
        self.num_envs, self.settings, self.split = num_envs, settings, checked(split)
        self.single_observation_space = gymnasium.spaces.Box(0, 255, (settings.pixels, settings.pixels, 3), np.uint8)
        self.single_action_space = gymnasium.spaces.Discrete(settings.actions)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.world: HiddenRulesWorld | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Begin a lifetime in every world; a seed fixes this and all later lifetimes."""
        super().reset(seed=seed)
        if self.world is None or seed is not None:
            self.world = HiddenRulesWorld(self.settings, self.num_envs, self.split, seed_from(self.np_random))
        self.steps = 0
        return self.world.reset().numpy(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        """Take `actions` (num_envs,); pictures (num_envs, H, W, 3), rewards and flags (num_envs,), info."""
        if self.world is None:
            raise gymnasium.error.ResetNeeded("step() was called before reset(): call reset() first.")
        if not self.action_space.contains(np.asarray(actions)):
            raise ValueError(
                f"actions must be {self.num_envs} integers from 0 to {self.settings.actions - 1}, not {actions!r}."
            )
        step = self.world.step(torch.as_tensor(np.asarray(actions)))
        frame, reward, terminated, truncated, final_obs = step
        self.steps += 1
        everywhere, ended = np.ones(self.num_envs, bool), step.ended.numpy()
        info = {"episode_terminated": terminated.numpy(), "_episode_terminated": everywhere}
        info |= {"episode_truncated": truncated.numpy(), "_episode_truncated": everywhere}
        if ended.any():
            info |= {"final_frame": np.zeros(frame.shape, np.uint8), "_final_frame": ended}
            info["final_frame"][ended] = final_obs.numpy()
        over = np.full(self.num_envs, self.steps >= self.settings.lifetime)
        if over[0]:
            info |= {"final_info": dict(info), "_final_info": everywhere}
            info |= {"final_obs": frame.numpy(), "_final_obs": everywhere}
            frame, self.steps = self.world.reset(), 0
        return frame.numpy(), reward.numpy(), np.zeros_like(over), over, info


for preset, changes in WORLDS.items():
    chosen = WorldSettings(**changes)
    gymnasium.register(
        "HiddenRules-v0" if preset == "default" else f"HiddenRules-{preset}-v0",
        entry_point="environment:PixelEnv",
        vector_entry_point="environment:PixelVectorEnv",
        kwargs={"settings": replace(chosen, cell=math.ceil(48 / chosen.grid))},  # so that everybody's convolutions fit
    )
