"""The pixel environment: rules as data, the batched simulator, rendering, Gymnasium interfaces, external environments.

Time alignment is defined in memory.py.
"""

from __future__ import annotations

import functools
import itertools
import math
import numbers
import pickle
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import gymnasium
import numpy as np
import torch
from gymnasium.vector.utils import batch_space
from torch import Tensor

from memory import WorldStep, make_generator, require, require_all

MOVES = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1], [0, 0]])  # (move, (row, column)); the last one does nothing
MOVE_NAMES = ("up", "down", "left", "right", "nothing")
DIRECTIONS, NOTHING = 4, 4  # number of moves that move the body; index of the one that does nothing
PALETTE = torch.tensor([[220, 60, 60], [60, 200, 80], [70, 110, 230], [230, 210, 70], [200, 80, 220]]).byte()
PALETTE_NAMES = ("red", "green", "blue", "yellow", "magenta")
WALL, BACKGROUND = 128, 20  # grey values
WIND_STRENGTHS = {"train": (1, 3, 5), "validation": (2,), "test": (4,)}  # in fifths of world.wind: FIFTHS in all
FIFTHS = 5
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
WORLDS: dict[str, dict[str, Any]] = {  # what each preset changes in WorldSettings
    "default": {},
    "switching": {"lifetime": 128, "switch": 0.01},
    "tinted": {"tint": 0.8},
    "large": {"grid": 8, "episode_limit": 24},
    "everything": {"lifetime": 96, "walls": 4, "edges": "hidden", "wind": 0.4, "actions": 5}
    | {"reward_values": (1.0, 0.5, -1.0)},
    "quick": {"grid": 4, "lifetime": 48, "episode_limit": 10, "noise": 0.05, "slip": 0.1},
}


@dataclass(frozen=True)
class WorldSettings:
    """The environment and how hard it is."""

    grid: int = 6  # cells along each side of the square grid, 3 to 16
    cell: int = 4  # pixels along each side of a cell, 1 to 64
    lifetime: int = 64  # steps of one task, 2 to 10,000
    episode_limit: int = 18  # steps after which an episode that reached no object is truncated, 1 to 10,000
    slip: float = 0.15  # probability that an action slips, 0 to 1
    slip_random: float = 0.5  # share of the slips that take a random action, 0 to 1; the others do nothing
    noise: float = 0.1  # standard deviation of the Gaussian pixel noise as a fraction of 255, 0 to 10
    switch: float = 0.0  # probability that the rule is resampled after a step, 0 to 0.5; frames do not show it
    # Step of the lifetime after which all rules are resampled, 1 to 10,000, to measure how fast an agent recovers, or 0
    # for random times. The reference agents still assume the probability `switch`, which must be above 0.
    switch_step: int = 0
    # Hidden channel gains, 1 - tint to 1, and hidden brightness, up to tint * 100 of 255, of each lifetime; 0 to 0.99.
    tint: float = 0.0
    # Rewards of the objects, which end the episode: 1 to 4 different numbers, not 0, one above 0; colours are hidden.
    reward_values: tuple[float, ...] = (1.0, -1.0)
    actions: int = 4  # number of actions, 4 to 8; all but the four moves do nothing, and which is which is hidden
    walls: int = 0  # number of wall cells, 0 to a third of all; visible, with another layout in every lifetime
    # At the edges the body stops (block) or enters on the other side (wrap); hidden: each applies in half of the rules.
    edges: Literal["block", "wrap", "hidden"] = "block"
    # Greatest probability of a gust, 0 to 0.9, which moves the body a cell in a hidden direction whatever the action.
    # The probability in a rule is hidden too: 1 to 5 fifths of this.
    wind: float = 0.0
    # Gymnasium id of an external environment to use instead: Discrete actions, shuffled or not (`shuffle`), RGB frames.
    # MiniGrid-... is fully visible, with `cell` pixels a tile. `package:Id-v0` first imports the package that registers
    # the id. Of the other settings only lifetime, cell, slip (always to a random action), noise and shuffle apply.
    gym_id: str = ""
    # Which actions of the external environment are shuffled for every lifetime: all, none, or the numbers of 4 to 20;
    # empty for all, or for none where the environment has tasks of its own.
    shuffle: tuple[str, ...] = ()
    # What is held out for test: 28 of 144 pairs of action map and roles (combinations), or a quarter of the action maps
    # (permutations); with either, a fifth of the wall layouts and one wind strength.
    holdout: Literal["combinations", "permutations"] = "combinations"

    def __post_init__(self) -> None:
        require_all("world", self, grid=(3, 16), cell=(1, 64), lifetime=(2, 10_000), episode_limit=(1, 10_000))
        require_all("world", self, slip=(0, 1), slip_random=(0, 1), noise=(0, 10), switch=(0, 0.5), tint=(0, 0.99))
        require_all("world", self, switch_step=(0, 10_000), actions=(4, 8), wind=(0, 0.9), walls=(0, self.grid**2 // 3))
        if self.edges not in ("block", "wrap", "hidden"):
            raise ValueError(f"world.edges is {self.edges!r}: choose block, wrap or hidden.")
        if self.holdout not in ("combinations", "permutations"):
            raise ValueError(f"world.holdout is {self.holdout!r}: choose combinations or permutations.")
        values = self.reward_values
        for value in values:
            require("world.reward_values", value, -1000, 1000)
        different = len(set(values)) == len(values)  # two tasks that differ only in equal values would be one rule
        if not 1 <= len(values) < len(PALETTE) or 0 in values or max(values) <= 0 or not different:
            raise ValueError(
                f"world.reward_values is {values}: give 1 to 4 different numbers, not 0, one above 0: 1 -1."
            )
        if self.switch_step and not self.switch:
            raise ValueError(f"world.switch_step is {self.switch_step} and world.switch is 0: set it, such as to 0.01.")
        built_in = ("switch", "tint", "reward_values", "actions", "walls", "edges", "wind", "holdout", "slip_random")
        changed = [name for name in built_in if getattr(self, name) != getattr(WorldSettings, name)]
        if self.gym_id and changed:
            raise ValueError(f"world.{changed[0]} is not for an external environment: leave it out with {self.gym_id}.")
        if self.shuffle and not self.gym_id:
            raise ValueError("world.shuffle is only for an external environment: leave it out or give world.gym_id.")

    @property
    def sizes(self) -> Sizes:
        """Sizes of observations and actions; ValueError if the external environment is missing or not supported."""
        built_in = Sizes((self.pixels, self.pixels, 3), self.actions)
        return external_sizes(self.gym_id, self.cell, self.shuffle) if self.gym_id else built_in

    @property
    def pixels(self) -> int:
        """Height and width of a frame in pixels."""
        return self.grid * self.cell


class Sizes(NamedTuple):
    """What an environment shows, how many actions it has, and what an external one offers besides."""

    obs_shape: tuple[int, int, int]  # (height, width, 3)
    actions: int  # number of actions
    fixed: tuple[int, ...] = ()  # actions that are not shuffled
    advisors: tuple[str, ...] = ()  # those of ADVICE for which it has a method


def checked(split: str) -> str:
    """The name of a split; ValueError for any other name."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, but must be one of {', '.join(SPLITS)}.")
    return split


class Rule(NamedTuple):
    """The hidden rules of B environments as data."""

    action_map: Tensor  # (B, action) int64: the move (row of MOVES) that an action makes
    colours: Tensor  # (B, role) int64: the colour (row of PALETTE) of each role: the body, then the objects
    wraps: Tensor  # (B,) bool: whether a body that leaves over an edge enters on the other side
    wind: Tensor  # (B,) int64: the move that a gust makes
    strength: Tensor  # (B,) float32: probability of a gust


@dataclass(frozen=True, eq=False)
class RuleSpace:
    """Every rule that an environment may have. A task number is mixed-radix, with the digits wind (direction and
    strength), wrapping, action map, colours; the last one changes fastest."""

    action_maps: Tensor  # (M, action) int64: every way in which four of the actions move and the others do nothing
    colours: Tensor  # (R, role) int64: every assignment of colours to roles
    wraps: Tensor  # (E,) bool
    wind: Tensor  # (W,) int64
    strength: Tensor  # (W,) float32

    def __len__(self) -> int:
        return self.pairs * len(self.wraps) * len(self.wind)

    @property
    def pairs(self) -> int:
        """Number of pairs of an action map and roles."""
        return len(self.action_maps) * len(self.colours)

    def rule(self, task: Tensor) -> Rule:
        """The rules of task numbers (B,) int64."""
        weather, pair = task // self.pairs, task % self.pairs
        action_map, colours = pair // len(self.colours), pair % len(self.colours)
        wind, wraps = weather // len(self.wraps), weather % len(self.wraps)
        parts = (self.action_maps, self.colours, self.wraps, self.wind, self.strength)
        indices = (action_map, colours, wraps, wind, wind)
        return Rule(*(part.to(task.device)[index] for part, index in zip(parts, indices, strict=True)))


@functools.cache
def rule_space_of(settings: WorldSettings) -> RuleSpace:
    """Every rule that an environment with these settings may have."""
    moves = sorted(set(itertools.permutations([*range(DIRECTIONS), *[NOTHING] * (settings.actions - DIRECTIONS)])))
    colours = list(itertools.permutations(range(1 + len(settings.reward_values))))
    wraps = {"block": [False], "wrap": [True], "hidden": [False, True]}[settings.edges]
    strengths = [k / FIFTHS * settings.wind for k in range(1, FIFTHS + 1)] if settings.wind else [0.0]
    winds = list(itertools.product(range(DIRECTIONS if settings.wind else 1), strengths))
    wind, strength = (torch.tensor(column) for column in zip(*winds, strict=True))
    return RuleSpace(torch.tensor(moves), torch.tensor(colours), torch.tensor(wraps), wind, strength)


def order_by_role(by_colour: Tensor, rule: Rule) -> Tensor:
    """Positions ordered by colour (B, colour, 2) in the order of the roles that the colours have under `rule`."""
    return by_colour.gather(1, rule.colours[:, :, None].expand(-1, -1, 2))


def task_split(settings: WorldSettings, split: str) -> Tensor:
    """Task numbers (n,) int64 of one split; the splits are disjoint. Of the pairs of action map and roles, combinations
    holds out 28 of 144 for test and 16 for validation, and in the default world every map and every assignment of roles
    occurs in training; permutations holds out all pairs of a quarter of the maps. With wind, splits have different
    strengths."""
    space, fixed = rule_space_of(settings), torch.Generator().manual_seed(7)  # fixed: the split defines the benchmark
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
    winds = torch.arange(len(space.wind))
    if settings.wind:
        winds = winds[torch.isin(winds % FIFTHS + 1, torch.tensor(WIND_STRENGTHS[split]))]
    weather = (winds[:, None] * len(space.wraps) + torch.arange(len(space.wraps))).view(-1, 1)
    return (weather * pairs + pair).flatten()


@functools.cache
def layouts(grid: int, walls: int) -> dict[str, Tensor]:
    """Wall layouts of each split, (n, grid, grid) bool: up to 500, all different, split 3 : 1 : 1. The free cells of a
    layout are connected."""
    from scipy import ndimage  # a tenth of a second, for worlds with walls only

    fixed, found = np.random.default_rng(7), {}
    for _ in range(1000):
        layout = np.zeros((grid, grid), bool)
        for cell in fixed.permutation(grid**2):
            if layout.sum() < walls:
                layout.flat[cell] = True
                layout.flat[cell] = ndimage.label(~layout)[1] == 1
        if layout.sum() == walls:
            found[layout.tobytes()] = layout
        if len(found) == 500:
            break
    stacked, fifth = torch.from_numpy(np.stack(list(found.values()))), len(found) // 5
    return dict(zip(SPLITS, stacked.split((len(found) - 2 * fifth, fifth, fifth)), strict=True))


def destination(position: Tensor, move: Tensor, wraps: Tensor, grid: int, walls: Tensor | None) -> Tensor:
    """Where `move` takes bodies from `position`, all (B, ..., 2) int64, on a grid of `grid` cells a side. Edges wrap
    where `wraps` (B, ...) bool is True; `walls` is (B, grid, grid) bool, or None without walls."""
    to = position + move
    to = torch.where(wraps[..., None], to % grid, to.clamp(0, grid - 1))
    if walls is None:
        return to
    row = torch.arange(len(walls), device=walls.device).view(-1, *[1] * (to.ndim - 2))
    return torch.where(walls[row, to[..., 0], to[..., 1]][..., None], position, to)


def with_slips(settings: WorldSettings, by_move: Tensor) -> Tensor:
    """Expected values (..., MOVES) float of actions, which may slip, by the move that each makes, from the values
    `by_move` (..., MOVES) of the moves themselves."""
    still, moves = by_move[..., NOTHING:], by_move[..., :DIRECTIONS].sum(-1, keepdim=True)
    random = (moves + (settings.actions - DIRECTIONS) * still) / settings.actions
    slipped = settings.slip_random * random + (1 - settings.slip_random) * still
    return (1 - settings.slip) * by_move + settings.slip * slipped


class Renderer:
    """Renders frames of many environments at once, without a loop over them.

    A frame shows the background, walls, objects and body in their colours; the body covers what it stands on. Gaussian
    noise is added to every number and rounded, and the sum is clipped to 0..255.

    New noise for every frame would cost 20 times as much, so a bank of noise is sampled once, when the renderer is
    made. The noise of a frame is a window of the bank whose start is sampled uniformly. In cells that show a wall, an
    object or the body it is instead one of up to PATCHES other pieces, chosen by the start and the cell. The bank and
    the starts are all that a renderer samples; without noise it samples nothing.

    Args:
        grid, cell, noise: as in `WorldSettings`.
        generator: what the bank and the starts are sampled with; frames are on its device.
    """

    BANK = 1 << 20  # noise samples in addition to those of one frame
    PATCHES = 4096

    def __init__(self, grid: int, cell: int, noise: float, generator: torch.Generator) -> None:
        self.grid, self.cell, self.noise, self.generator = grid, cell, noise, generator
        device, frame_size, cell_size = generator.device, 3 * (grid * cell) ** 2, 3 * cell**2
        self._bank = torch.zeros(frame_size, dtype=torch.int16, device=device)
        if noise:
            samples = torch.randn(self.BANK + frame_size, generator=generator, device=device)
            self._bank = samples.mul_(255 * noise).round_().to(torch.int16)
        pieces = self._bank[: len(self._bank) // cell_size * cell_size].view(-1, cell_size)
        self._patches = pieces[: self.PATCHES if noise else 1]  # (patches, numbers in a cell)
        grey = torch.tensor([[WALL], [BACKGROUND]]).expand(-1, 3)
        self._palette = torch.cat([PALETTE, grey]).to(device, torch.int16)  # (colours, wall, background; channel)
        # Without a tint all frames use the same shades: the sums with the noise can be prepared.
        self._noisy_background = (self._bank + BACKGROUND).clamp_(0, 255).to(torch.uint8)
        plain = self._palette.repeat(1, cell**2)[:, None] + self._patches
        self._noisy_cells = plain.clamp_(0, 255).to(torch.uint8).flatten(0, 1)  # (colours * patches, numbers in a cell)
        # Rows of a cell are written in the longest words that divide them, four times as fast as single numbers.
        word = math.gcd(3 * cell, 8)
        self._word = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[word]
        index = torch.arange(frame_size // word, device=device).view(grid, cell, grid, -1)
        self._words_of_cell = index.transpose(1, 2).reshape(grid**2, -1)  # (cell, word): where a cell's words are

    def tint(self, gains: Tensor, brightness: Tensor) -> Tensor:
        """The `shades` of `render`, (B, colours, numbers in a cell) int16: each colour times `gains` (B, channel) plus
        `brightness` (B, 1), both float."""
        shades = (self._palette * gains[:, None] + brightness[:, None]).round().to(torch.int16)
        return shades.repeat(1, 1, self.cell**2)

    def render(
        self, position: Tensor, colours: Tensor, walls: Tensor | None, shades: Tensor | None, rows: Tensor
    ) -> Tensor:
        """Frames (n, H, W, 3) uint8 of some of B environments.

        Args:
            position, colours: (B, role, 2) and (B, role) int64: (row, column) and row of PALETTE, the body first.
            walls: (B, grid, grid) bool, equally many in every environment, or None.
            shades: what `tint` returns, or None for no tint.
            rows: (n,) int64, the environments to render.
        """
        size, start = 3 * (self.grid * self.cell) ** 2, torch.zeros_like(rows)
        if self.noise:
            start = torch.randint(len(self._bank) - size + 1, rows.shape, generator=self.generator, device=rows.device)
        position, colours = position.index_select(0, rows), colours.index_select(0, rows)
        # Two roles in one cell write the same numbers, because which write comes last is undefined.
        colours = torch.where((position == position[:, :1]).all(-1), colours[:, :1], colours)
        if walls is not None:
            walls = walls[rows].nonzero()[:, 1:].view(len(rows), -1, 2)
            position = torch.cat([position, walls], 1)
            colours = torch.cat([colours, torch.full_like(walls[..., 0], len(PALETTE))], 1)
        cell = position[..., 0] * self.grid + position[..., 1]  # (n, m): roles, then walls
        patch = (start[:, None] + 61 * cell) % len(self._patches)  # another one for every cell
        if shades is None:
            frames = self._noisy_background.unfold(0, size, 1).index_select(0, start)
            cells = self._noisy_cells.index_select(0, (colours * len(self._patches) + patch).flatten())
        else:
            frames = shades[rows, -1].repeat(1, self.grid**2)
            frames += self._bank.unfold(0, size, 1).index_select(0, start)
            cells = shades.flatten(0, 1).index_select(0, (rows[:, None] * len(self._palette) + colours).flatten())
            cells += self._patches.index_select(0, patch.flatten())
            frames, cells = (x.clamp_(0, 255).to(torch.uint8) for x in (frames, cells))
        index = self._words_of_cell.index_select(0, cell.flatten()).view(len(rows), -1)
        frames.view(self._word).scatter_(1, index, cells.view(self._word).view(len(rows), -1))
        return frames.view(len(rows), self.grid * self.cell, self.grid * self.cell, 3)


class HiddenRulesWorld:
    """B environments that are stepped and rendered together on one device, without a loop over them.

    Tasks, starts, slips, gusts and switches take the same amount of randomness whatever the agents do, so environments
    made with one seed give every agent the same ones (common random numbers): comparisons between agents are paired.
    Pixel noise has a stream of its own, which also depends on how many episodes end.

    The hidden state is `task` (B,), `position` (B, role, 2), `episode_step` (B,) and `segment` (B,), the number of
    switches, all int64, `rule`, and `walls` (B, grid, grid) bool or None. `next_position`, `step_segment`, `step_rule`
    are as in the last step before a restart or switch, for the exact filter and training. Agents see none of these.

    Args:
        settings: of the environments.
        batch: their number B; ValueError below 1, and without tasks.
        tasks: the split whose tasks and walls are sampled, each with equal probability; or task numbers (n,) int64,
            with the walls of all splits.
        seed: of all random streams.
        device: where all tensors are.
    """

    def __init__(
        self, settings: WorldSettings, batch: int, tasks: Tensor | Split, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        if settings.gym_id:
            raise ValueError(
                f"world.gym_id is {settings.gym_id!r}, but this world is built in: use HiddenRulesWrapper."
            )
        splits, tasks = ([tasks], task_split(settings, tasks)) if isinstance(tasks, str) else (SPLITS, tasks)
        if batch < 1 or len(tasks) < 1:
            raise ValueError(f"at least one environment and one task are needed, not {batch} and {len(tasks)}.")
        self.settings, self.batch, self.device = settings, batch, torch.device(device)
        self.task_pool = tasks.to(self.device)
        generators = [make_generator(seed, stream, self.device) for stream in (0, 1, 6, 7, 9, 10)]
        self.generator, noise_generator, self.switch_generator, *rest = generators
        self.tint_generator, self.wind_generator, self.wall_generator = rest
        self.renderer = Renderer(settings.grid, settings.cell, settings.noise, noise_generator)
        self.space, self.rows = rule_space_of(settings), torch.arange(batch, device=self.device)
        self.reward_values = torch.tensor(settings.reward_values, dtype=torch.float32, device=self.device)
        self.walls = self._shades = None  # sampled for every lifetime
        if settings.walls:
            by_split = layouts(settings.grid, settings.walls)
            self._layouts = torch.cat([by_split[split] for split in splits]).to(self.device)  # (n, grid, grid)
        self._moves = MOVES.to(self.device)

    def reset(self) -> Tensor:
        """Begin a lifetime in newly sampled tasks; returns the first frames (B, H, W, 3) uint8."""
        s = self.settings
        index = torch.randint(len(self.task_pool), (self.batch,), generator=self.generator, device=self.device)
        if s.tint:
            strength = torch.rand((self.batch, 4), generator=self.tint_generator, device=self.device).mul_(s.tint)
            self.gains, self.brightness = 1 - strength[:, :3], 100 * strength[:, 3:]  # (B, channel), (B, 1)
            self._shades = self.renderer.tint(self.gains, self.brightness)
        if s.walls:
            layout = torch.randint(len(self._layouts), (self.batch,), generator=self.wall_generator, device=self.device)
            self.walls = self._layouts[layout]
        self.set_state(self.task_pool[index], self._sample_starts(), torch.zeros_like(index), self.walls)
        return self.render()

    def set_state(self, task: Tensor, position: Tensor, episode_step: Tensor, walls: Tensor | None = None) -> None:
        """Begin in a given state instead of by `reset`; the class docstring has the shapes and types."""
        self.task, self.rule, self.walls = task, self.space.rule(task), walls
        self.position, self.episode_step = position.clone(), episode_step.clone()
        self.segment, self.steps = torch.zeros_like(episode_step), 0

    def step(self, action: Tensor) -> WorldStep:
        """Take `action` (B,) int64 in every environment; see `WorldStep`. ValueError for another shape."""
        if action.shape != (self.batch,):
            raise ValueError(f"action has shape {tuple(action.shape)}, but must have shape ({self.batch},).")
        reward, terminated, truncated, starts = self._move(action)
        frames, ended = self.render(), terminated | truncated
        rows = ended.nonzero()[:, 0]
        final_obs = frames.index_select(0, rows)
        self._restart(ended, starts)
        if len(rows):
            frames.index_copy_(0, rows, self.render(rows))
        return WorldStep(frames, reward, terminated, truncated, final_obs)

    def step_unseen(self, action: Tensor) -> WorldStep:
        """`step` without frames (None, so no `next_obs`), for planners that simulate with the environment itself."""
        reward, terminated, truncated, starts = self._move(action)
        self._restart(terminated | truncated, starts)
        return WorldStep(None, reward, terminated, truncated, None)

    def _move(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Move the bodies; returns reward, terminated, truncated, and where ended episodes restart."""
        s, batch = self.settings, self.batch
        chance = torch.rand(batch, generator=self.generator, device=self.device)
        random_action = torch.randint(s.actions, (batch,), generator=self.generator, device=self.device)
        starts = self._sample_starts()  # whether used or not: see the class docstring
        slips_randomly, slips = chance < s.slip * s.slip_random, chance < s.slip
        taken = torch.where(slips_randomly, random_action, action)
        move = self._moves.index_select(0, self.rule.action_map.gather(1, taken[:, None])[:, 0])
        move = move.masked_fill((slips & ~slips_randomly)[:, None], 0)
        if s.wind:
            gust = torch.rand(batch, generator=self.wind_generator, device=self.device) < self.rule.strength
            move = torch.where(gust[:, None], self._moves[self.rule.wind], move)
        self.position[:, 0] = destination(self.position[:, 0], move, self.rule.wraps, s.grid, self.walls)
        self.next_position, self.step_segment, self.step_rule = self.position.clone(), self.segment, self.rule
        self.episode_step += 1
        reached = (self.position[:, :1] == self.position[:, 1:]).all(-1)  # (B, object)
        terminated = reached.any(1)
        truncated = (self.episode_step >= s.episode_limit) & ~terminated
        return reached.float() @ self.reward_values, terminated, truncated, starts

    def _restart(self, ended: Tensor, starts: Tensor) -> None:
        """Restart ended episodes, then switch some rules. Colours stay where they are: frames do not show a switch."""
        s, generator = self.settings, self.switch_generator
        self.position = torch.where(ended[:, None, None], starts, self.position)
        self.episode_step.masked_fill_(ended, 0)
        self.steps += 1
        if s.switch:
            switched = torch.rand(self.batch, generator=generator, device=self.device) < s.switch
            index = torch.randint(len(self.task_pool), (self.batch,), generator=generator, device=self.device)
            if s.switch_step:
                switched = torch.full_like(switched, self.steps == s.switch_step)
            by_colour = self.order_by_colour(self.position)
            self.task = torch.where(switched, self.task_pool[index], self.task)
            self.rule = self.space.rule(self.task)
            self.position = order_by_role(by_colour, self.rule)
            self.segment = self.segment + switched

    def render(self, rows: Tensor | None = None) -> Tensor:
        """The present frames of all environments, or of those in `rows` (n,) int64: (n, H, W, 3) uint8."""
        rows = self.rows if rows is None else rows
        return self.renderer.render(self.position, self.rule.colours, self.walls, self._shades, rows)

    def describe_rule(self, row: int) -> str:
        """What is hidden in one environment in words, for captions."""
        rule, s, names = self.rule, self.settings, {1.0: "goal", -1.0: "hazard"}
        roles = ["body", *(names.get(value, f"{value:+g}") for value in s.reward_values)]
        colours = [PALETTE_NAMES[colour] for colour in rule.colours[row].tolist()]
        lines = [", ".join(f"{a}: {MOVE_NAMES[m]}" for a, m in enumerate(rule.action_map[row].tolist()))]
        lines.append(", ".join(f"{role} {colour}" for role, colour in zip(roles, colours, strict=True)))
        if s.edges != "block" or s.wind:
            wind = f", wind {MOVE_NAMES[rule.wind[row]]} {rule.strength[row]:.2f}" if s.wind else ""
            lines.append(f"edges {'wrap' if rule.wraps[row] else 'block'}{wind}")
        if s.tint:
            gains = " ".join(f"{gain:.2f}" for gain in self.gains[row].tolist())
            lines.append(f"gains {gains}, brightness {self.brightness[row].item():.0f}")
        return "\n".join(lines)

    def order_by_colour(self, position: Tensor, rule: Rule | None = None) -> Tensor:
        """Positions (B, role, 2) as frames show them, by colour (B, colour, 2), under `rule` or the present rule."""
        colours = (rule or self.rule).colours
        return torch.zeros_like(position).scatter_(1, colours[:, :, None].expand(-1, -1, 2), position)

    def _sample_starts(self) -> Tensor:
        """Distinct random free cells for the body and the objects: (B, role, 2) int64."""
        taken = torch.empty((self.batch, 0), dtype=torch.int64, device=self.device)
        free = self.settings.grid**2 - self.settings.walls
        for role in range(1 + len(self.reward_values)):
            cell = torch.randint(free - role, (self.batch,), generator=self.generator, device=self.device)
            for other in taken.sort(1).values.unbind(1):
                cell = cell + (cell >= other)  # skip taken cells, so that all combinations are equally likely
            taken = torch.cat([taken, cell[:, None]], 1)
        if self.walls is not None:
            taken = (~self.walls).flatten(1).nonzero()[:, 1].view(self.batch, free).gather(1, taken)
        return torch.stack([taken // self.settings.grid, taken % self.settings.grid], -1)


def seed_from(generator: np.random.Generator) -> int:
    """A seed for a torch generator, sampled from a Gymnasium environment's own generator."""
    return int(generator.integers(2**31))


class PixelEnv(gymnasium.Env):
    """One environment behind Gymnasium's interface, in which one episode is one lifetime.

    `terminated` is always False; `truncated` comes at the lifetime's end. The episodes inside are reported in `info`:
    `episode_terminated`, `episode_truncated` (bool) and, where one ended, `final_frame`, the last frame before the
    restart. Observations are (H, W, 3) uint8 frames, actions are Discrete. Every reset samples a new task.

    Args:
        settings: of the environment.
        split: which tasks are sampled.
        render_mode: None or "rgb_array" (an enlarged frame).
        reveal_rule: put the hidden rule into every info as `rule`, a dict of the fields of `Rule`. For debugging.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 8}

    def __init__(
        self,
        settings: WorldSettings = WorldSettings(),
        split: Split = "train",
        render_mode: str | None = None,
        reveal_rule: bool = False,
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode is {render_mode!r}, but must be None or 'rgb_array'.")
        self.settings, self.split = settings, checked(split)
        self.render_mode, self.reveal_rule = render_mode, reveal_rule
        self.observation_space = gymnasium.spaces.Box(0, 255, (settings.pixels, settings.pixels, 3), np.uint8)
        self.action_space = gymnasium.spaces.Discrete(settings.actions)
        self.world: HiddenRulesWorld | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Begin a lifetime in a newly sampled task; a seed fixes this and all later lifetimes."""
        super().reset(seed=seed)
        if self.world is None or seed is not None:
            self.world = HiddenRulesWorld(self.settings, 1, self.split, seed_from(self.np_random))
        self.steps = 0
        self._frame = self.world.reset()[0].numpy()
        return self._frame, self._info(False, False)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Take an action; returns Gymnasium's five-tuple. ValueError for an action outside the space."""
        if self.world is None:
            raise gymnasium.error.ResetNeeded("step() was called before reset(): call reset() first.")
        if not self.action_space.contains(action):
            raise ValueError(f"action is {action!r}, but must be an integer from 0 to {self.settings.actions - 1}.")
        step = self.world.step(torch.tensor([int(action)]))
        self.steps += 1
        info = self._info(bool(step.terminated), bool(step.truncated))
        if step.ended:
            info["final_frame"] = step.final_obs[0].numpy()
        self._frame = step.obs[0].numpy()
        return self._frame, float(step.reward), False, self.steps >= self.settings.lifetime, info

    def _info(self, terminated: bool, truncated: bool) -> dict[str, Any]:
        info: dict[str, Any] = {"episode_terminated": terminated, "episode_truncated": truncated}
        if self.reveal_rule:
            info["rule"] = {name: part[0].tolist() for name, part in self.world.rule._asdict().items()}
        return info

    def render(self) -> np.ndarray | None:
        """The present frame, enlarged to at least 384 pixels: (H', W', 3) uint8."""
        if self.render_mode is None:
            return None
        if self.world is None:
            raise gymnasium.error.ResetNeeded("render() was called before reset(): call reset() first.")
        scale = math.ceil(384 / self.settings.pixels)
        return self._frame.repeat(scale, 0).repeat(scale, 1)


class PixelVectorEnv(gymnasium.vector.VectorEnv):
    """`num_envs` environments behind Gymnasium's vector interface: numpy over the batched simulator. All lifetimes end
    together, so `truncated` is all False or all True. Autoreset is SAME_STEP: at the lifetime's end the observation is
    the next lifetime's first frame and `info["final_obs"]` the last one of the old. Infos are as in `PixelEnv`, as
    arrays with Gymnasium's `_name` masks."""

    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP, "render_modes": []}

    def __init__(self, num_envs: int = 1, settings: WorldSettings = WorldSettings(), split: Split = "train") -> None:
        self.num_envs, self.settings, self.split = num_envs, settings, checked(split)
        self.single_observation_space = gymnasium.spaces.Box(0, 255, (settings.pixels, settings.pixels, 3), np.uint8)
        self.single_action_space = gymnasium.spaces.Discrete(settings.actions)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.world: HiddenRulesWorld | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Begin a lifetime in every environment; a seed fixes this and all later lifetimes."""
        super().reset(seed=seed)
        if self.world is None or seed is not None:
            self.world = HiddenRulesWorld(self.settings, self.num_envs, self.split, seed_from(self.np_random))
        self.steps = 0
        return self.world.reset().numpy(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        """Take `actions` (num_envs,); returns frames (num_envs, H, W, 3), rewards and flags (num_envs,), and infos."""
        if self.world is None:
            raise gymnasium.error.ResetNeeded("step() was called before reset(): call reset() first.")
        actions, last = np.asarray(actions), self.settings.actions - 1
        if not self.action_space.contains(actions):
            raise ValueError(f"actions must be {self.num_envs} integers from 0 to {last}, not {actions!r}.")
        step = self.world.step(torch.as_tensor(actions))
        self.steps += 1
        frames, ended, everywhere = step.obs.numpy(), step.ended.numpy(), np.ones(self.num_envs, bool)
        info = {"episode_terminated": step.terminated.numpy(), "_episode_terminated": everywhere}
        info |= {"episode_truncated": step.truncated.numpy(), "_episode_truncated": everywhere}
        if ended.any():
            info |= {"final_frame": np.zeros_like(frames), "_final_frame": ended}
            info["final_frame"][ended] = step.final_obs.numpy()
        truncated = np.full(self.num_envs, self.steps >= self.settings.lifetime)
        if truncated[0]:
            info |= {"final_info": dict(info), "_final_info": everywhere, "final_obs": frames, "_final_obs": everywhere}
            frames, self.steps = self.world.reset().numpy(), 0
        return frames, step.reward.numpy(), np.zeros_like(truncated), truncated, info


for preset, changes in WORLDS.items():
    chosen = WorldSettings(**changes)
    gymnasium.register(
        "HiddenRules-v0" if preset == "default" else f"HiddenRules-{preset}-v0",
        entry_point="environment:PixelEnv",
        vector_entry_point="environment:PixelVectorEnv",
        kwargs={"settings": replace(chosen, cell=math.ceil(48 / chosen.grid))},  # large enough for common CNNs
    )


ADVICE = {"thompson": "thompson_action", "known_rule": "expert_action"}
"""Reference agents, and the methods by which an external environment may say what they would do."""


class HiddenRulesWrapper(gymnasium.Wrapper, gymnasium.utils.RecordConstructorArgs):
    """Adds hidden rules to any Gymnasium environment with Discrete actions and RGB frames.

    Every reset begins a lifetime of several episodes under a new rule: which action does what, a task of the
    environment's own, or both (`WorldSettings.shuffle`). Seen from outside, one episode is one lifetime; infos are as
    in `PixelEnv`. ValueError for other environments and non-finite rewards. An environment may offer

    - `tasks` and `set_task(task)`, called before a lifetime begins, as in Meta-World (Yu et al., 2019): a sequence, of
      which about three fifths are for training, one for validation and one for test, at least one each, or a mapping of
      these three names to sequences;
    - `expert_action()`, the action of one who knows the task, and `thompson_action()`, that of posterior sampling;
    - `metadata["lifetime"]` and `metadata["patch"]`, defaults of world.lifetime and vae.patch.

    Args:
        env: the environment; observations (H, W, 3) uint8.
        lifetime: steps of one rule, 2 to 10,000.
        split: which tasks and permutations are sampled; of these, too, about three fifths are for training.
        shuffle: actions that are permuted among themselves, see `WorldSettings`.
        slip, noise: probability of a random action; standard deviation of the pixel noise as a fraction of 255.
    """

    def __init__(
        self,
        env: gymnasium.Env,
        lifetime: int = 256,
        split: Split = "train",
        shuffle: tuple[str, ...] = (),
        slip: float = 0.0,
        noise: float = 0.0,
    ) -> None:
        arguments = {"lifetime": lifetime, "split": split, "shuffle": shuffle, "slip": slip, "noise": noise}
        gymnasium.utils.RecordConstructorArgs.__init__(self, **arguments)
        gymnasium.Wrapper.__init__(self, env)
        actions, obs = env.action_space, env.observation_space
        if not isinstance(actions, gymnasium.spaces.Discrete) or actions.start != 0:
            raise ValueError(f"actions are {actions}, but must be Discrete, from 0 on: discretize them first.")
        if not isinstance(obs, gymnasium.spaces.Box) or obs.dtype != np.uint8 or obs.shape[2:] != (3,):
            raise ValueError(f"observations are {obs}, but must be uint8 (H, W, 3): try wrappers.AddRenderObservation.")
        self.tasks = split_tasks(env.get_wrapper_attr("tasks")) if env.has_wrapper_attr("tasks") else None
        self.shuffled = np.array(shuffled_actions(shuffle, int(actions.n), self.tasks is not None), int)
        self.lifetime, self.split, self.slip, self.noise = lifetime, checked(split), slip, noise
        require_all("HiddenRulesWrapper", self, lifetime=(2, 10_000), slip=(0, 1), noise=(0, 10))
        self._random: np.random.Generator | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Begin a lifetime under a newly sampled rule; a seed fixes this and all later lifetimes."""
        self._options = options
        if self._random is None or seed is not None:
            # A random stream apart from the wrapped environment's: else its first state could reveal the rule.
            self._random = np.random.default_rng(None if seed is None else np.random.SeedSequence(seed, spawn_key=(8,)))
        number, numbers = 0, 1  # of the environment's own task
        if self.tasks:
            index = int(self._random.integers(len(self.tasks[self.split])))
            number = index + sum(len(self.tasks[split]) for split in SPLITS[: SPLITS.index(self.split)])
            numbers = sum(map(len, self.tasks.values()))
            self.env.get_wrapper_attr("set_task")(self.tasks[self.split][index])
        frame = self._restart(seed)
        order = np.arange(len(self.shuffled))
        while len(order):
            order = self._random.permutation(len(self.shuffled))
            rank = permutation_rank(order)
            if permutation_split(rank) == self.split:
                number += rank * numbers
                break
        self.task = number % 2**62  # fits a tensor
        self.action_map = np.arange(self.env.action_space.n)  # action -> action of the wrapped environment
        self.action_map[self.shuffled] = self.shuffled[order]
        self.steps = 0
        return self._add_noise(frame), {"episode_terminated": False, "episode_truncated": False}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Take an action under the hidden rule; returns Gymnasium's five-tuple."""
        if self._random is None:
            raise gymnasium.error.ResetNeeded("step() was called before reset(): call reset() first.")
        if not self.action_space.contains(action):
            raise ValueError(f"action is {action!r}, but must be an integer from 0 to {self.action_space.n - 1}.")
        chance, random_action = self._random.random(), self._random.integers(len(self.action_map))
        taken = self.action_map[random_action if chance < self.slip else action]
        answer = self.env.step(taken)
        if not isinstance(answer, tuple) or len(answer) != 5:
            given = f"{len(answer)} values" if isinstance(answer, tuple) else type(answer).__name__
            raise ValueError(f"{self.unwrapped}.step returned {given}, but must return Gymnasium's five-tuple.")
        frame, reward, terminated, truncated, _ = answer
        if not isinstance(reward, (numbers.Real, np.bool_)) or not abs(reward) <= float(np.finfo(np.float32).max):
            given = f"{self.unwrapped}.step returned the reward {reward!r}"
            raise ValueError(f"{given}, but rewards must be finite float32.")
        info = {"episode_terminated": bool(terminated), "episode_truncated": bool(truncated and not terminated)}
        frame = self._add_noise(self._checked(frame, "step"))  # a copy: the environment may draw into it again
        if terminated or truncated:
            info["final_frame"], frame = frame, self._add_noise(self._restart())
        self.steps += 1
        return frame, float(reward), False, self.steps >= self.lifetime, info

    def advice(self, name: str) -> int:
        """What the reference agent of that name, see `ADVICE`, does now; ValueError if that is no action."""
        action = self.env.get_wrapper_attr(ADVICE[name])()
        if not self.env.action_space.contains(action):
            raise ValueError(f"{ADVICE[name]}() returned {action!r}, but must return one of {self.env.action_space}.")
        return int((self.action_map == action).argmax())

    def describe_rule(self) -> str:
        """The rule in words, for captions."""
        task = f"task {self.task}; " if self.tasks else ""
        return task + "actions of the environment, by action: " + " ".join(map(str, self.action_map.tolist()))

    def _restart(self, seed: int | None = None) -> np.ndarray:
        """The first frame of an episode; inner episodes get the lifetime's options too."""
        answer = self.env.reset(seed=seed, options=self._options)
        if not isinstance(answer, tuple) or len(answer) != 2:
            given = f"{self.unwrapped}.reset returned {type(answer).__name__}"
            raise ValueError(f"{given}, but must return (observation, info).")
        return self._checked(answer[0], "reset")

    def _checked(self, frame: Any, call: str) -> np.ndarray:
        """The frame; ValueError if it is not what the observation space promises."""
        shape, space = getattr(frame, "shape", None), self.observation_space
        if not isinstance(frame, np.ndarray) or shape != space.shape or frame.dtype != np.uint8:
            given = f"{shape} {frame.dtype}" if isinstance(frame, np.ndarray) else type(frame).__name__
            given = f"{self.unwrapped}.{call} returned an observation {given}"
            raise ValueError(f"{given}, but promises {space.shape} uint8.")
        return frame

    def _add_noise(self, frame: np.ndarray) -> np.ndarray:
        noise = self._random.normal(0, 255 * self.noise, frame.shape) if self.noise else 0
        return (frame + noise).round().clip(0, 255).astype(np.uint8)


def permutation_rank(order: np.ndarray) -> int:
    """The index, from 0 on, of a permutation of 0, 1, ..., n - 1 in lexicographic order."""
    rank = 0
    for place, value in enumerate(order):
        rank = rank * (len(order) - place) + int((order[place + 1 :] < value).sum())
    return rank


def shuffled_actions(shuffle: tuple[str, ...], actions: int, has_tasks: bool) -> list[int]:
    """The actions that `shuffle`, see `WorldSettings`, stands for; ValueError if it stands for none that there are."""
    if shuffle == ("none",) or (not shuffle and has_tasks):
        return []
    every = [str(action) for action in range(actions)]
    chosen = every if shuffle in ((), ("all",)) else list(shuffle)
    if chosen == every and actions < 4:
        few = f"the environment has {actions} actions, too few permutations to hold some out"
        raise ValueError(f"{few}: give it tasks of its own and --world.shuffle none.")
    # Fewer than 4 have too few permutations to hold some out; the rank of one of 21 does not fit into 64 bits.
    if len(set(chosen)) < len(chosen) or not set(chosen) <= set(every) or not 4 <= len(chosen) <= 20:
        raise ValueError(
            f"world.shuffle is {' '.join(chosen)}, but must be none, 4 to 20 different actions from 0 to "
            f"{actions - 1}, or all, where these are 4 to 20."
        )
    return sorted(map(int, chosen))


def split_tasks(tasks: Any) -> dict[Split, Sequence]:
    """An environment's tasks by split: as they are if they are a mapping, else sampled by a fixed seed, about three
    fifths for training. ValueError for too few, or for two that are equal."""
    if not isinstance(tasks, Mapping):
        if len(tasks) < 3:
            raise ValueError(f"the environment has {len(tasks)} tasks: at least 3 are needed, one for each split.")
        order, fifth = np.random.default_rng(7).permutation(len(tasks)).tolist(), max(1, len(tasks) // 5)
        parts = {"train": order[2 * fifth :], "validation": order[fifth : 2 * fifth], "test": order[:fifth]}
        tasks = {split: [tasks[i] for i in part] for split, part in parts.items()}
    missing = [split for split in SPLITS if split not in tasks or not len(tasks[split])]
    if missing:
        raise ValueError(f"the environment's tasks have none for {missing[0]}: give some for each of {SPLITS}.")
    first: dict[bytes, str] = {}
    for split in SPLITS:
        for task in tasks[split]:
            key = pickle.dumps(task)
            if key in first:
                where = f"in {first[key]} and in {split}"
                raise ValueError(f"the environment's task {task!r} occurs twice, {where}: leave one out.")
            first[key] = split
    return tasks


def permutation_split(rank: int) -> Split:
    """The split of a permutation, sampled by its rank: train with probability .6, validation and test with .2 each."""
    fifth = int(np.random.SeedSequence(rank).generate_state(1)[0]) % 5
    return ("train", "train", "train", "validation", "test")[fifth]


def make_inner_env(gym_id: str, cell: int) -> gymnasium.Env:
    """The Gymnasium environment of that id; ValueError if it cannot be made. MiniGrid's show the whole grid, `cell`
    pixels a tile, without the highlighted field of view."""
    name = gym_id.removeprefix("minigrid:")
    try:
        if not name.startswith("MiniGrid-"):
            return gymnasium.make(gym_id, disable_env_checker=True)  # the wrapper checks
        from minigrid.wrappers import ImgObsWrapper, RGBImgObsWrapper  # optional; the import registers its environments

        return ImgObsWrapper(RGBImgObsWrapper(gymnasium.make(name, highlight=False), tile_size=cell))
    except Exception as error:  # external code may raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"world.gym_id is {gym_id!r}, which cannot be made: {reason}") from error


@functools.cache
def external_sizes(gym_id: str, cell: int, shuffle: tuple[str, ...] = ()) -> Sizes:
    """Sizes of an external environment; ValueError if it cannot be made or is not supported."""
    env = HiddenRulesWrapper(make_inner_env(gym_id, cell), shuffle=shuffle)
    fixed = tuple(action for action in range(env.action_space.n) if action not in env.shuffled)
    advisors = tuple(name for name, method in ADVICE.items() if env.has_wrapper_attr(method))
    try:  # what it advises is asked for at the end of a training: try it before
        env.reset(seed=0)
        for name in advisors:
            env.advice(name)
    except Exception as error:  # external code may raise anything
        raise ValueError(f"{gym_id} failed: {type(error).__name__}: {error}") from error
    finally:
        env.close()
    return Sizes(env.observation_space.shape, int(env.action_space.n), fixed, advisors)


def external_defaults(gym_id: str) -> dict[str, dict[str, int]]:
    """What an external environment's metadata change in the settings, see `HiddenRulesWrapper`; ValueError as above."""
    env = make_inner_env(gym_id, WorldSettings.cell)
    places = {"lifetime": "world", "patch": "vae"}
    changes = {section: {name: env.metadata[name]} for name, section in places.items() if name in env.metadata}
    env.close()
    return changes


def make_external_env(settings: WorldSettings, split: Split) -> HiddenRulesWrapper:
    """One external environment with hidden rules."""
    inner = make_inner_env(settings.gym_id, settings.cell)
    return HiddenRulesWrapper(inner, settings.lifetime, split, settings.shuffle, settings.slip, settings.noise)


class ExternalEnvError(RuntimeError):
    """An external environment failed during a lifetime."""


class ExternalWorlds:
    """B external environments with hidden rules behind the interface of `HiddenRulesWorld`, for one lifetime. Arguments
    are as there, with a `gym_id`; tensors are put on `device`, the environments run on the CPU and are closed with this
    object. A reset or step raises ExternalEnvError, whatever the environment raised."""

    def __init__(
        self, settings: WorldSettings, batch: int, split: Split, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        self.settings, self.batch, self.device, self.seed = settings, batch, torch.device(device), seed
        self.vector = gymnasium.vector.SyncVectorEnv([functools.partial(make_external_env, settings, split)] * batch)
        weakref.finalize(self, self.vector.close)

    def reset(self) -> Tensor:
        """Begin the lifetime, in the same sampled tasks at every call; returns the first frames (B, H, W, 3) uint8."""
        seeds = np.random.SeedSequence(self.seed).generate_state(self.batch)
        frames, _ = self._guarded(self.vector.reset, seed=[int(seed >> 1) for seed in seeds])
        self.task = torch.tensor(self.vector.get_attr("task"))
        self.step_segment = torch.zeros(self.batch, dtype=torch.int64, device=self.device)
        return torch.tensor(frames, device=self.device)

    def step(self, action: Tensor) -> WorldStep:
        """Take `action` (B,) int64 in every environment; see `WorldStep`."""
        frames, reward, _, _, info = self._guarded(self.vector.step, action.cpu().numpy())
        final_obs = np.stack(info["final_frame"][info["_final_frame"]]) if "_final_frame" in info else frames[:0]
        parts = (frames, reward.astype(np.float32), info["episode_terminated"], info["episode_truncated"], final_obs)
        return WorldStep(*(torch.tensor(part, device=self.device) for part in parts))

    def advice(self, name: str) -> Tensor:
        """What the reference agent of that name does now: actions (B,) int64."""
        return torch.tensor(self._guarded(self.vector.call, "advice", name), device=self.device)

    def describe_rule(self, row: int) -> str:
        """The hidden rule of one environment in words, for captions."""
        return self.vector.call("describe_rule")[row]

    def _guarded(self, call: Callable, *arguments: Any, **options: Any) -> Any:
        try:
            return call(*arguments, **options)
        except Exception as error:  # external code may raise anything
            raise ExternalEnvError(f"{self.settings.gym_id} failed: {type(error).__name__}: {error}") from error


def make_worlds(
    settings: WorldSettings, batch: int, split: Split, seed: int, device: torch.device | str = "cpu"
) -> HiddenRulesWorld | ExternalWorlds:
    """A batch of built-in environments, or of external ones if the settings name one."""
    return (ExternalWorlds if settings.gym_id else HiddenRulesWorld)(settings, batch, split, seed, device)
