"""The pixel world whose rules are hidden: rules as data, the batched world, value iteration, Gymnasium faces; and worlds of
other people's with shuffled actions.

Words used everywhere. A *task* is one hidden rule. A *lifetime* is a fixed number of steps in one task; *episodes*
follow each other inside it. Time is aligned so: `frame[t]` is what the agent sees when it chooses `action[t]`;
`arrival[t]` is the picture that the action led to, and `reward[t]` came with it. When an episode ends at step t
(`terminated[t]` by a goal or hazard, `truncated[t]` by its time limit), `frame[t + 1]` is the first picture of the next
episode; otherwise it is `arrival[t]`.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple
from collections.abc import Callable

import gymnasium
import numpy as np
import torch
from gymnasium.vector.utils import batch_space
from PIL import Image, ImageDraw
from torch import Tensor

MOVES = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]])  # (move, (row, column)): up, down, left, right
MOVE_NAMES = ("up", "down", "left", "right")
ROLES = ("body", "goal", "hazard")
PALETTE = torch.tensor([[220, 60, 60], [60, 200, 80], [70, 110, 230]], dtype=torch.uint8)
PALETTE_NAMES = ("red", "green", "blue")
BACKGROUND = 20
ACTION_MAPS = torch.tensor(list(itertools.permutations(range(len(MOVES)))))  # (24, action) -> move
ROLE_COLOURS = torch.tensor(list(itertools.permutations(range(len(ROLES)))))  # (6, role) -> colour
N_ACTIONS, N_TASKS = len(MOVES), len(ACTION_MAPS) * len(ROLE_COLOURS)

Split = Literal["train", "validation", "test"]

WORLDS: dict[str, dict[str, Any]] = {  # what presets change in the world
    "default": {},
    "switching": {"lifetime": 128, "switch": 0.01},
    "tinted": {"tint": 0.8},
    "large": {"grid": 8, "episode_limit": 24},
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
    """Standard deviation of the Gaussian pixel noise, as a share of the range 0..255, at least 0."""
    switch: float = 0.0
    """Probability in [0, .5] that the rule is drawn anew after a step, unannounced: the picture stays as it is."""
    switch_step: int = 0
    """To measure how fast an agent recovers: rules are drawn anew after this step and no other, while the references go
    on expecting `switch`, which must be above 0; 0 for at random."""
    tint: float = 0.0
    """How differently lifetimes look, in [0, 1): a hidden gain of each colour channel, from 1 - tint to 1, and a hidden
    brightness, up to tint * 100 of 255, drawn for every lifetime."""
    gym_id: str = ""
    """A Gymnasium world to live in instead: Discrete actions, pictures; its actions are shuffled anew for every lifetime.
    MiniGrid-...: seen whole, `cell` pixels a tile. Of the other settings lifetime, slip (always to a random action) and
    noise count. `package:Id-v0` imports the package that registers the world first."""
    holdout: Literal["combinations", "permutations"] = "combinations"
    """What is never trained on: 28 of the 144 pairs of action map and roles, or 6 of the 24 action maps."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("grid", 3, 16), ("cell", 1, 64), ("lifetime", 2, 10_000), ("episode_limit", 1, 10_000),
            ("slip", 0, 1), ("slip_random", 0, 1), ("noise", 0, 10), ("switch", 0, 0.5), ("switch_step", 0, 10_000),
            ("tint", 0, 0.99),
        ):  # fmt: skip
            require(f"world.{name}", getattr(self, name), low, high)
        if self.switch_step and not self.switch:
            raise ValueError(f"world.switch_step is {self.switch_step} and world.switch 0: give world.switch, such as 0.01.")
        if self.gym_id and (self.switch or self.tint):
            raise ValueError(f"world.switch and world.tint are not for a world of other people's: leave them at 0 with {self.gym_id}.")

    @property
    def sizes(self) -> Sizes:
        """Of pictures and actions; ValueError where there is no such world, or none to live in."""
        return sizes_of_gym(self.gym_id, self.cell) if self.gym_id else Sizes((self.pixels, self.pixels, 3), N_ACTIONS)

    @property
    def pixels(self) -> int:
        """Height and width of the picture in pixels."""
        return self.grid * self.cell


class Sizes(NamedTuple):
    """What a world shows and what can be done in it."""

    picture: tuple[int, int, int]
    """(height, width, 3)."""
    actions: int


def require(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError, naming the setting and the mend, unless `low <= value <= high` (NaN is refused)."""
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, but must lie between {low} and {high}: choose a value in that range.")


def seeded(seed: int, stream: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for each pair of a seed (any integer from 0 on) and a stream.

    Seeds are hashed, because generators that merely begin at equal or neighbouring numbers can draw the same luck: an
    agent seeded like its world would choose its first action by the hidden task.
    """
    hashed = np.random.SeedSequence(seed, spawn_key=(stream,)).generate_state(1)
    return torch.Generator(device).manual_seed(int(hashed[0]))


# ---------------------------------------------------------------------------------------------------------------- rules


class Rule(NamedTuple):
    """Hidden rules as data, one row for each world."""

    action_map: Tensor
    """(B, action) int64: the move (row of MOVES) that an action makes."""
    colours: Tensor
    """(B, role) int64: the colour (row of PALETTE) that plays a role (body, goal, hazard)."""

    def words(self, row: int) -> str:
        """The rule of one world in words, for captions."""
        moves = ", ".join(f"{a}: {MOVE_NAMES[m]}" for a, m in enumerate(self.action_map[row].tolist()))
        return f"{moves}\n" + ", ".join(
            f"{role} {PALETTE_NAMES[c]}" for role, c in zip(ROLES, self.colours[row].tolist())
        )


def rule_of(task: Tensor) -> Rule:
    """The rules behind task numbers (B,) int64 in [0, N_TASKS): task = 6 * action map + role assignment."""
    maps, colours = ACTION_MAPS.to(task.device), ROLE_COLOURS.to(task.device)
    return Rule(maps[task // len(ROLE_COLOURS)], colours[task % len(ROLE_COLOURS)])


def by_role(seen: Tensor, rule: Rule) -> Tensor:
    """What is seen of positions by colour (B, colour, 2), ordered by role (B, role, 2) under `rule`."""
    return seen.gather(1, rule.colours[:, :, None].expand(-1, -1, 2))


def task_split(holdout: str, split: str) -> Tensor:
    """Task numbers (n,) int64 of one split; the three splits of a holdout are disjoint and cover all N_TASKS.

    `combinations`: 100 / 16 / 28 pairs of action map and roles; every map and every role assignment occurs in training.
    `permutations`: the test split holds every task of 6 action maps that are never trained on: 92 / 16 / 36.
    """
    fixed = torch.Generator().manual_seed(7)  # for ever: which tasks are held out is part of the benchmark
    if holdout == "combinations":
        order = torch.randperm(N_TASKS, generator=fixed)
        test, rest = order[:28], order[28:]
    elif holdout == "permutations":
        held = torch.randperm(len(ACTION_MAPS), generator=fixed)[:6]
        is_test = torch.isin(torch.arange(N_TASKS) // len(ROLE_COLOURS), held)
        test, rest = is_test.nonzero()[:, 0], (~is_test).nonzero()[:, 0]
        rest = rest[torch.randperm(len(rest), generator=fixed)]
    else:
        raise ValueError(f"holdout is {holdout!r}, but must be 'combinations' or 'permutations'.")
    parts = {"train": rest[16:], "validation": rest[:16], "test": test}
    if split not in parts:
        raise ValueError(f"split is {split!r}, but must be one of {', '.join(parts)}.")
    return parts[split].sort().values


# -------------------------------------------------------------------------------------------------------- batched world


class WorldStep(NamedTuple):
    """What one step gives; B worlds, pictures (B, H, W, 3) uint8."""

    arrival: Tensor
    """The picture that the action led to."""
    reward: Tensor
    """(B,) float32: +1 on the goal, -1 on the hazard, else 0."""
    terminated: Tensor
    """(B,) bool: the episode ended on the goal or the hazard."""
    truncated: Tensor
    """(B,) bool: the episode ended by its time limit."""
    frame: Tensor
    """The picture that the next action is chosen on: `arrival`, or a new episode's first picture."""

    @classmethod
    def of(cls, picture: np.ndarray, reward: float, info: dict[str, Any]) -> WorldStep:
        """One step of one Gymnasium environment with the infos of `PixelEnv`, as a batch of one."""
        frame = torch.as_tensor(picture)[None]
        arrival = torch.as_tensor(info["final_frame"])[None] if "final_frame" in info else frame
        ended = (torch.tensor([bool(info[name])]) for name in ("episode_terminated", "episode_truncated"))
        return cls(arrival, torch.tensor([reward], dtype=torch.float32), *ended, frame)


class HiddenRulesWorld:
    """B worlds that step and draw together on one device, without a loop over worlds.

    Every call draws the same amount of randomness whatever the agents do, so worlds made with one seed give every agent
    the same tasks, starts and slips: comparisons between agents are paired. Pixel noise has a generator of its own.

    Args:
        settings: the world's settings.
        batch: number of worlds, B.
        tasks: (n,) int64 task numbers to draw from, with equal probability.
        seed: of the world's two generators.
        device: where all tensors live.
        bank: noise samples kept (int16); frames read random windows of it, which is 20 times cheaper than new noise.
    """

    def __init__(
        self, settings: WorldSettings, batch: int, tasks: Tensor, seed: int, device: torch.device | str = "cpu", bank: int = 1 << 20
    ) -> None:  # fmt: skip
        if batch < 1 or len(tasks) < 1:
            raise ValueError(f"a world needs at least one row and one task, not batch={batch} and {len(tasks)} tasks.")
        self.settings, self.batch, self.device = settings, batch, torch.device(device)
        self.tasks_to_draw = tasks.to(self.device)
        self.generator = seeded(seed, stream=0, device=self.device)
        self.noise_generator = seeded(seed, stream=1, device=self.device)
        self.switch_generator = seeded(seed, stream=6, device=self.device)
        self.tint_generator = seeded(seed, stream=7, device=self.device)
        self.rows = torch.arange(batch, device=self.device)
        self._moves = MOVES.to(self.device)
        shades = torch.cat([PALETTE, torch.full_like(PALETTE[:1], BACKGROUND)]).to(self.device, torch.int16)
        self._shades = shades.expand(batch, -1, -1)  # (B, (red, green, blue, background), channel)
        self._noise: Tensor | None = None
        if settings.noise:
            samples = torch.randn(bank + 3 * settings.pixels**2, generator=self.noise_generator, device=self.device)
            self._noise = samples.mul_(255 * settings.noise).round_().to(torch.int16).unfold(0, 3 * settings.pixels**2, 1)

    def reset(self) -> Tensor:
        """Begin a lifetime in newly drawn tasks; returns the first pictures (B, H, W, 3) uint8."""
        drawn = torch.randint(len(self.tasks_to_draw), (self.batch,), generator=self.generator, device=self.device)
        self.task = self.tasks_to_draw[drawn]
        self.rule = rule_of(self.task)
        self.segment = torch.zeros(self.batch, dtype=torch.int64, device=self.device)  # number of the present rule
        self.steps = 0  # of the lifetime
        if self.settings.tint:
            self._tint()
        self.position = self._starts()  # (B, role, (row, column))
        self.age = torch.zeros(self.batch, dtype=torch.int64, device=self.device)  # steps of the present episode
        return self.draw()

    def _tint(self) -> None:
        """Draw how every lifetime looks: `gains` (B, channel) and `brightness` (B, 1), float."""
        strength = self.settings.tint * torch.rand((self.batch, 4), generator=self.tint_generator, device=self.device)
        self.gains, self.brightness = 1 - strength[:, :3], 100 * strength[:, 3:]
        plain = torch.cat([PALETTE, torch.full_like(PALETTE[:1], BACKGROUND)]).to(self.device)
        self._shades = (plain * self.gains[:, None] + self.brightness[:, None]).round().to(torch.int16)

    def place(self, task: Tensor, position: Tensor, age: Tensor) -> None:
        """Instead of `reset`: go on from tasks (B,), positions (B, role, 2) and steps of the episode (B,), all int64."""
        self.task, self.position, self.age, self.steps = task, position.clone(), age.clone(), 0
        self.segment = torch.zeros_like(age)
        self.rule = rule_of(task)

    def step(self, action: Tensor) -> WorldStep:
        """Take `action` (B,) int64 in every world; see `WorldStep`."""
        if action.shape != (self.batch,):
            raise ValueError(f"action has shape {tuple(action.shape)}, but {self.batch} worlds need ({self.batch},).")
        reward, terminated, truncated, starts = self._move(action)
        arrival = self.draw()
        self._restart(terminated | truncated, starts)
        frame, restarted = arrival, (terminated | truncated).nonzero()[:, 0]
        if len(restarted):
            frame = arrival.clone()
            frame[restarted] = self.draw(restarted)
        return WorldStep(arrival, reward, terminated, truncated, frame)

    def step_unseen(self, action: Tensor) -> WorldStep:
        """As `step`, but without pictures (None), for planners that imagine with the world itself."""
        reward, terminated, truncated, starts = self._move(action)
        self._restart(terminated | truncated, starts)
        return WorldStep(None, reward, terminated, truncated, None)

    def _move(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the action does, before any restart: reward, terminated, truncated, and where episodes would restart."""
        s, batch = self.settings, self.batch
        chance = torch.rand(batch, generator=self.generator, device=self.device)
        random_action = torch.randint(N_ACTIONS, (batch,), generator=self.generator, device=self.device)
        starts = self._starts()  # drawn whether used or not: see the class docstring
        taken = torch.where(chance < s.slip * s.slip_random, random_action, action)
        move = self._moves[self.rule.action_map[self.rows, taken]]
        stands_still = (chance >= s.slip * s.slip_random) & (chance < s.slip)
        move = move.masked_fill(stands_still[:, None], 0)
        self.position[:, 0] = (self.position[:, 0] + move).clamp_(0, s.grid - 1)
        on_goal = (self.position[:, 0] == self.position[:, 1]).all(-1)
        on_hazard = (self.position[:, 0] == self.position[:, 2]).all(-1)
        self.age += 1
        terminated = on_goal | on_hazard
        # Of the step, before any restart or switch, for the exact filter and for training; agents never see them.
        self.arrived_at, self.lived_segment = self.position.clone(), self.segment
        self.arrived_by_colour = self.by_colour(self.position)
        return on_goal.float() - on_hazard.float(), terminated, (self.age >= s.episode_limit) & ~terminated, starts

    def _restart(self, ended: Tensor, starts: Tensor) -> None:
        self.position = torch.where(ended[:, None, None], starts, self.position)
        self.age.masked_fill_(ended, 0)
        self.steps += 1
        if self.settings.switch:
            self._switch()

    def _switch(self) -> None:
        """Draw some rules anew; every colour stays where it is, so the next picture shows nothing of it."""
        chance = torch.rand(self.batch, generator=self.switch_generator, device=self.device)
        drawn = torch.randint(len(self.tasks_to_draw), (self.batch,), generator=self.switch_generator, device=self.device)
        switched = chance < self.settings.switch
        if self.settings.switch_step:
            switched = torch.full_like(switched, self.steps == self.settings.switch_step)
        seen = self.by_colour(self.position)
        self.task = torch.where(switched, self.tasks_to_draw[drawn], self.task)
        self.rule = rule_of(self.task)
        self.position = by_role(seen, self.rule)
        self.segment = self.segment + switched

    def draw(self, rows: Tensor | None = None) -> Tensor:
        """The present pictures of all worlds, or of those in `rows` (n,) int64: (n, H, W, 3) uint8."""
        s = self.settings
        position, colours, shades = self.position, self.rule.colours, self._shades
        if rows is not None:
            position, colours, shades = position[rows], colours[rows], shades[rows]
        n = len(position)
        picture = torch.full((n, s.grid, s.cell, s.grid, s.cell, 3), BACKGROUND, dtype=torch.int16, device=self.device)
        if s.tint:
            picture[:] = shades[:, -1, None, None, None, None]
        index = self.rows[:n]
        for role in (2, 1, 0):  # the body is drawn last: it covers what it stands on
            colour = shades[index, colours[:, role]][:, None, None, :]  # (n, 1, 1, 3)
            picture[index, position[:, role, 0], :, position[:, role, 1]] = colour
        picture = picture.view(n, -1)
        if self._noise is not None:
            start = torch.randint(len(self._noise), (n,), generator=self.noise_generator, device=self.device)
            picture += self._noise[start]
        return picture.clamp_(0, 255).to(torch.uint8).view(n, s.pixels, s.pixels, 3)

    def words(self, row: int) -> str:
        """What is hidden in one world in words, for captions."""
        if not self.settings.tint:
            return self.rule.words(row)
        gains = " ".join(f"{gain:.2f}" for gain in self.gains[row].tolist())
        return f"{self.rule.words(row)}\ngains {gains}, brightness {self.brightness[row].item():.0f}"

    def by_colour(self, position: Tensor) -> Tensor:
        """What a perfect eye sees of positions (B, role, 2): the same, ordered by colour (B, colour, 2)."""
        return torch.zeros_like(position).scatter_(1, self.rule.colours[:, :, None].expand(-1, -1, 2), position)

    def _starts(self) -> Tensor:
        """Distinct random cells for body, goal and hazard: (B, 3, 2) int64."""
        cells = self.settings.grid**2
        first, second, third = (
            torch.randint(cells - i, (self.batch,), generator=self.generator, device=self.device) for i in range(3)
        )
        second = second + (second >= first)  # skip the cell taken, so that all pairs are equally likely
        low, high = torch.minimum(first, second), torch.maximum(first, second)
        third = third + (third >= low)
        third = third + (third >= high)
        cell = torch.stack([first, second, third], 1)
        return torch.stack([cell // self.settings.grid, cell % self.settings.grid], -1)


# ------------------------------------------------------------------------------------------------------ value iteration


def value_iteration(settings: WorldSettings, discount: float = 0.95, tolerance: float = 1e-4) -> Tensor:
    """Action values of a world whose rule is known: (S, S, S, move) float32 for cells of body, goal and hazard.

    Solves Q(s, m) = E[r + discount * V(s')], where the end of an episode leads to W, the mean value of a fresh start,
    because the lifetime goes on. The episode's time limit is left out: the picture does not show it.
    """
    cells, grid, slip = settings.grid**2, settings.grid, settings.slip
    index = torch.arange(cells)
    place = torch.stack([index // grid, index % grid], -1)
    reached = [((place + move).clamp(0, grid - 1) * torch.tensor([grid, 1])).sum(-1) for move in MOVES] + [index]
    body, goal, hazard = index.view(-1, 1, 1), index.view(1, -1, 1), index.view(1, 1, -1)
    distinct = (body != goal) & (body != hazard) & (goal != hazard)
    value = torch.zeros(cells, cells, cells)
    for _ in range(math.ceil(math.log(tolerance) / math.log(discount))):
        fresh = discount * value[distinct].mean()
        landed = torch.where(body == goal, 1 + fresh, torch.where(body == hazard, fresh - 1, discount * value))
        move_values = torch.stack([landed[to] for to in reached], -1)  # (S, S, S, four moves and standing still)
        moves, still = move_values[..., :-1], move_values[..., -1:]
        q = (1 - slip) * moves + slip * (
            settings.slip_random * moves.mean(-1, keepdim=True) + (1 - settings.slip_random) * still
        )
        change, value = (q.amax(-1) - value).abs().max(), q.amax(-1)
        if change < tolerance:
            break
    return q


# ------------------------------------------------------------------------------------------------------ Gymnasium faces


def seed_from(generator: np.random.Generator) -> int:
    """A seed for a torch generator, drawn from a Gymnasium environment's own generator."""
    return int(generator.integers(2**31))


class PixelEnv(gymnasium.Env):
    """One hidden-rule world behind Gymnasium's interface; an episode, to the outside, is one lifetime.

    `terminated` is always False and `truncated` comes at the lifetime's end. The episodes inside show in `info`:
    `episode_terminated` and `episode_truncated` (bool), and where one ended `final_frame`, the last picture before the
    restart. Observations are (H, W, 3) uint8 pictures, actions are Discrete(4). Every reset draws a new task.

    Args:
        settings: the world's settings.
        split: which tasks are drawn: train, validation or test.
        render_mode: None or "rgb_array" (a large picture).
        caption: write the hidden rule under the rendered picture.
        reveal_rule: tell the hidden rule in every info as `rule`: `action_map` (which of up, down, left, right each action
            is) and `colours` (which of red, green, blue is the body, the goal, the hazard). For cheats and debugging.
        symbolic: observe (grid, grid) uint8 instead of pictures: 0 for nothing, 1 red, 2 green, 3 blue.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 8}

    def __init__(
        self, settings: WorldSettings = WorldSettings(), split: Split = "train", render_mode: str | None = None, caption: bool = False,
        reveal_rule: bool = False, symbolic: bool = False,
    ) -> None:  # fmt: skip
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode is {render_mode!r}, but must be None or 'rgb_array'.")
        self.settings, self.render_mode, self.caption = settings, render_mode, caption
        self.reveal_rule, self.symbolic = reveal_rule, symbolic
        self.tasks = task_split(settings.holdout, split)
        self.observation_space = gymnasium.spaces.Box(0, 255, (settings.pixels, settings.pixels, 3), np.uint8)
        if symbolic:
            self.observation_space = gymnasium.spaces.Box(0, len(PALETTE), (settings.grid, settings.grid), np.uint8)
        self.action_space = gymnasium.spaces.Discrete(N_ACTIONS)
        self.world: HiddenRulesWorld | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Begin a lifetime in a newly drawn task; a seed fixes this and all later lifetimes."""
        super().reset(seed=seed)
        if self.world is None or seed is not None:
            self.world = HiddenRulesWorld(self.settings, 1, self.tasks, seed_from(self.np_random))
        self.steps = 0
        self._picture = self.world.reset()[0].numpy()
        return self._observation(), self._info(False, False)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Take an action; Gymnasium's five-tuple. Raises ValueError for an action outside the space."""
        if self.world is None:
            raise gymnasium.error.ResetNeeded("step() was called before reset(): call reset() first.")
        if not self.action_space.contains(action):
            raise ValueError(f"action is {action!r}, but must be an integer from 0 to {N_ACTIONS - 1}.")
        rule = self.world.rule
        arrival, reward, terminated, truncated, frame = self.world.step(torch.tensor([int(action)]))
        self.steps += 1
        info = self._info(bool(terminated), bool(truncated))
        if terminated or truncated:
            info["final_frame"] = self._symbols(self.world.arrived_at, rule) if self.symbolic else arrival[0].numpy()
        self._picture = frame[0].numpy()
        return self._observation(), float(reward), False, self.steps >= self.settings.lifetime, info

    def _observation(self) -> np.ndarray:
        return self._symbols(self.world.position, self.world.rule) if self.symbolic else self._picture

    def _symbols(self, position: Tensor, rule: Rule) -> np.ndarray:
        symbols = np.zeros((self.settings.grid, self.settings.grid), np.uint8)
        for role in (2, 1, 0):  # the body covers what it stands on
            symbols[tuple(position[0, role].tolist())] = 1 + int(rule.colours[0, role])
        return symbols

    def _info(self, terminated: bool, truncated: bool) -> dict[str, Any]:
        info: dict[str, Any] = {"episode_terminated": terminated, "episode_truncated": truncated}
        if self.reveal_rule:
            info["rule"] = {name: part[0].tolist() for name, part in self.world.rule._asdict().items()}
        return info

    def render(self) -> np.ndarray | None:
        """The present picture, enlarged to at least 384 pixels, (H', W', 3) uint8; with the rule if asked for."""
        if self.render_mode is None:
            return None
        if self.world is None:
            raise gymnasium.error.ResetNeeded("render() was called before reset(): call reset() first.")
        scale = math.ceil(384 / self.settings.pixels)
        picture = self._picture.repeat(scale, 0).repeat(scale, 1)
        if not self.caption:
            return picture
        words = self.world.words(0)
        canvas = Image.new("RGB", (picture.shape[1], picture.shape[0] + 22 * (words.count("\n") + 1)), "white")
        canvas.paste(Image.fromarray(picture))
        ImageDraw.Draw(canvas).text((6, picture.shape[0] + 4), words, fill="black", font_size=15)
        return np.asarray(canvas)


class HiddenRulesWrapper(gymnasium.Wrapper, gymnasium.utils.RecordConstructorArgs):
    """Makes a world with hidden rules of any Gymnasium world with Discrete actions and pictures.

    Every reset begins a lifetime of several inner episodes under a new rule: which action does what. To the outside an
    episode is one lifetime; infos are as in `PixelEnv`.

    Args:
        env: the world; observations (H, W, 3) uint8.
        lifetime: steps that one rule lasts, at least 2.
        split: which permutations are drawn; a fifth of them are for validation, a fifth for the test.
        shuffled: actions that are permuted among themselves, 4 to 20; all of them if not given.
        slip: probability in [0, 1] that an action turns into a random one.
        noise: standard deviation of the Gaussian pixel noise, as a share of the range 0..255, at least 0.

    Raises:
        ValueError: a world that is none of this kind; at a step, a reward that is no number.
    """

    def __init__(
        self, env: gymnasium.Env, lifetime: int = 256, split: Split = "train", shuffled: tuple[int, ...] | None = None,
        slip: float = 0.0, noise: float = 0.0,
    ) -> None:  # fmt: skip
        gymnasium.utils.RecordConstructorArgs.__init__(
            self, lifetime=lifetime, split=split, shuffled=shuffled, slip=slip, noise=noise
        )
        gymnasium.Wrapper.__init__(self, env)
        if not isinstance(env.action_space, gymnasium.spaces.Discrete) or env.action_space.start != 0:
            raise ValueError(f"actions are {env.action_space}, but must be Discrete, from 0 on: discretise them first.")
        seen = env.observation_space
        if not isinstance(seen, gymnasium.spaces.Box) or seen.dtype != np.uint8 or len(seen.shape) != 3 or seen.shape[2] != 3:
            raise ValueError(
                f"observations are {seen}, but must be pictures, Box (height, width, 3) uint8: wrap the world in one of "
                "gymnasium.wrappers, such as AddRenderObservation, first."
            )
        self.shuffled = np.arange(env.action_space.n) if shuffled is None else np.array(shuffled)
        known = len(set(self.shuffled)) == len(self.shuffled) and np.isin(self.shuffled, range(env.action_space.n)).all()
        if not known or not 4 <= len(self.shuffled) <= 20:  # the number of a permutation of 20 is the last to fit 64 bits
            raise ValueError(f"shuffled is {shuffled or 'all'}, but must be 4 to 20 different actions of {env.action_space}.")
        require("lifetime", lifetime, 2, 10_000), require("slip", slip, 0, 1), require("noise", noise, 0, 10)
        if split not in SPLIT_SHARES:
            raise ValueError(f"split is {split!r}, but must be one of {', '.join(SPLIT_SHARES)}.")
        self.lifetime, self.split, self.slip, self.noise = lifetime, split, slip, noise
        self._random: np.random.Generator | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Begin a lifetime under a newly drawn rule; a seed fixes this and all later lifetimes."""
        if self._random is None or seed is not None:
            # A stream of its own: seeded like the world inside, the rule could be read off where things begin.
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
        info: dict[str, Any] = {"episode_terminated": bool(terminated), "episode_truncated": bool(truncated and not terminated)}
        if terminated or truncated:
            info["final_frame"] = self._noisy(picture)
            picture, _ = self.env.reset()
        self.steps += 1
        return self._noisy(picture), float(reward), False, self.steps >= self.lifetime, info

    def words(self) -> str:
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


def make_gym(gym_id: str, cell: int) -> gymnasium.Env:
    """The Gymnasium world of that id as pictures; MiniGrid's whole, without the highlighted view, `cell` pixels a tile."""
    try:
        if not gym_id.startswith("MiniGrid-"):
            return gymnasium.make(gym_id)
        from minigrid.wrappers import ImgObsWrapper, RGBImgObsWrapper  # optional; importing it registers its worlds

        return ImgObsWrapper(RGBImgObsWrapper(gymnasium.make(gym_id, highlight=False), tile_size=cell))
    except (gymnasium.error.Error, ImportError) as error:
        raise ValueError(f"world.gym_id is {gym_id!r}, which cannot be made: {error}") from error


@functools.cache
def sizes_of_gym(gym_id: str, cell: int) -> Sizes:
    """Sizes of pictures and actions of a Gymnasium world; ValueError where it cannot be lived in."""
    env = HiddenRulesWrapper(make_gym(gym_id, cell))
    sizes = Sizes(env.observation_space.shape, int(env.action_space.n))
    env.close()
    return sizes


class WorldError(RuntimeError):
    """A world of other people's failed in mid-life."""


class GymWorlds:
    """B Gymnasium worlds with hidden rules behind the interface of `HiddenRulesWorld`, for one lifetime each.

    Args:
        settings: with a `gym_id`.
        batch: number of worlds, B.
        split: which permutations of the actions are drawn.
        seed: worlds made with one seed give every agent the same rules and first episodes.
        device: where the tensors are put; the worlds themselves live on the CPU, and end when nobody holds this object.

    Raises:
        WorldError: at a reset or a step, whatever the world raised.
    """

    def __init__(self, settings: WorldSettings, batch: int, split: Split, seed: int, device: torch.device | str = "cpu") -> None:
        self.settings, self.batch, self.device, self.seed = settings, batch, torch.device(device), seed

        def make() -> HiddenRulesWrapper:
            inner = make_gym(settings.gym_id, settings.cell)
            return HiddenRulesWrapper(inner, settings.lifetime, split, slip=settings.slip, noise=settings.noise)

        self.vector = gymnasium.vector.SyncVectorEnv([make] * batch)

    def reset(self) -> Tensor:
        """Begin a lifetime in newly drawn tasks; returns the first pictures (B, H, W, 3) uint8."""
        seeds = np.random.SeedSequence(self.seed).generate_state(self.batch)
        frames, _ = self._guarded(self.vector.reset, seed=[int(seed >> 1) for seed in seeds])
        self.task = torch.tensor(self.vector.get_attr("task"))
        self.lived_segment = torch.zeros(self.batch, dtype=torch.int64, device=self.device)
        return self._tensor(frames)

    def step(self, action: Tensor) -> WorldStep:
        """Take `action` (B,) int64 in every world; see `WorldStep`."""
        frames, reward, _, _, info = self._guarded(self.vector.step, action.cpu().numpy())
        frame = self._tensor(frames)
        arrival, ended = frame, info.get("_final_frame")
        if ended is not None:
            arrival = frame.clone()
            arrival[torch.as_tensor(ended)] = self._tensor(np.stack(info["final_frame"][ended]))
        flags = (self._tensor(info[name]) for name in ("episode_terminated", "episode_truncated"))
        return WorldStep(arrival, self._tensor(reward).float(), *flags, frame)

    def words(self, row: int) -> str:
        """What is hidden in one world in words, for captions."""
        return self.vector.envs[row].words()

    def __del__(self) -> None:
        if hasattr(self, "vector"):
            self.vector.close()

    def _guarded(self, call: Callable, *arguments: Any, **options: Any) -> Any:
        try:
            return call(*arguments, **options)
        except Exception as error:  # whatever it was: it was not ours
            raise WorldError(f"the world {self.settings.gym_id} failed: {type(error).__name__}: {error}") from error

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.as_tensor(array.copy()).to(self.device)


def make_worlds(
    settings: WorldSettings, batch: int, split: Split, seed: int, device: torch.device | str = "cpu"
) -> HiddenRulesWorld | GymWorlds:  # fmt: skip
    """Worlds of the split's tasks: of the house, or of the Gymnasium world that the settings name."""
    if settings.gym_id:
        return GymWorlds(settings, batch, split, seed, device)
    return HiddenRulesWorld(settings, batch, task_split(settings.holdout, split), seed, device)


class PreviousStep(gymnasium.Wrapper, gymnasium.utils.RecordConstructorArgs):
    """Shows what led to each picture, for recurrent agents that must find the rules out (RL2, Duan et al., 2016).

    Observations become {"picture": as before, "previous": (A + 2,) float32}: the previous action as one-hot, its reward,
    and 1 where an episode inside the lifetime has just ended; zeros after a reset.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        gymnasium.utils.RecordConstructorArgs.__init__(self)
        gymnasium.Wrapper.__init__(self, env)
        self._first = np.zeros(env.action_space.n + 2, np.float32)
        previous = gymnasium.spaces.Box(-np.inf, np.inf, self._first.shape, np.float32)
        self.observation_space = gymnasium.spaces.Dict({"picture": env.observation_space, "previous": previous})

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, np.ndarray], dict]:
        """As the wrapped environment's."""
        picture, info = self.env.reset(seed=seed, options=options)
        return {"picture": picture, "previous": self._first.copy()}, info

    def step(self, action: int) -> tuple[dict[str, np.ndarray], float, bool, bool, dict]:
        """As the wrapped environment's."""
        picture, reward, terminated, truncated, info = self.env.step(action)
        previous = self._first.copy()
        previous[action], previous[-2] = 1, reward
        previous[-1] = info.get("episode_terminated", False) or info.get("episode_truncated", False)
        return {"picture": picture, "previous": previous}, reward, terminated, truncated, info


class PixelVectorEnv(gymnasium.vector.VectorEnv):
    """Many hidden-rule worlds behind Gymnasium's vector interface, numpy over the batched world.

    All lifetimes end together, so `truncated` is all False or all True. Autoreset is SAME_STEP: at the lifetime's end
    the observation is the next lifetime's first picture and `info["final_obs"]` holds the last one of the old. Infos
    are as in `PixelEnv`, as arrays with Gymnasium's `_name` masks.
    """

    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP, "render_modes": []}

    def __init__(self, num_envs: int = 1, settings: WorldSettings = WorldSettings(), split: Split = "train") -> None:
        self.num_envs, self.settings, self.tasks = num_envs, settings, task_split(settings.holdout, split)
        self.single_observation_space = gymnasium.spaces.Box(0, 255, (settings.pixels, settings.pixels, 3), np.uint8)
        self.single_action_space = gymnasium.spaces.Discrete(N_ACTIONS)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.world: HiddenRulesWorld | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Begin a lifetime in every world; a seed fixes this and all later lifetimes."""
        super().reset(seed=seed)
        if self.world is None or seed is not None:
            self.world = HiddenRulesWorld(self.settings, self.num_envs, self.tasks, seed_from(self.np_random))
        self.steps = 0
        return self.world.reset().numpy(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        """Take `actions` (num_envs,); pictures (num_envs, H, W, 3), rewards and flags (num_envs,), info."""
        if self.world is None:
            raise gymnasium.error.ResetNeeded("step() was called before reset(): call reset() first.")
        if not self.action_space.contains(np.asarray(actions)):
            raise ValueError(f"actions must be {self.num_envs} integers from 0 to {N_ACTIONS - 1}, not {actions!r}.")
        arrival, reward, terminated, truncated, frame = self.world.step(torch.as_tensor(np.asarray(actions)))
        self.steps += 1
        everywhere, ended = np.ones(self.num_envs, bool), (terminated | truncated).numpy()
        info = {"episode_terminated": terminated.numpy(), "_episode_terminated": everywhere}
        info |= {"episode_truncated": truncated.numpy(), "_episode_truncated": everywhere}
        if ended.any():
            info |= {"final_frame": arrival.numpy(), "_final_frame": ended}
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
