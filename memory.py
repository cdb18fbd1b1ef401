"""Memory: the experience of the present lifetime, the store of past lifetimes, and the run that keeps them on disk.

A *task* is one hidden rule. A *lifetime* is a fixed number of steps in one task; *episodes* follow each other in it.

Time alignment, for every module of this project: `obs[t]` is what the agent sees when it chooses `action[t]`;
`reward[t]` follows that action, and `next_obs[t]` is what the action led to. When an episode ends at step t
(`terminated[t]` by the rules, `truncated[t]` by its time limit), `next_obs[t]` is the final observation of the old
episode and `obs[t + 1]` the first one of the next; otherwise both are the same. Codes are aligned likewise: `codes[t]`
before the action, `next_codes[t]` after it. Both are encoded under the context held *before* the action, so a pair
differs by what happened and not by what was inferred meanwhile.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pickle
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import filelock
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

Device = torch.device | str


class UserError(Exception):
    """An error that the user can fix; shown as one sentence, exit code 2."""


def require(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError, naming the setting and the fix, unless `low <= value <= high` (NaN is refused)."""
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, but must lie between {low} and {high}: choose a value in that range.")


def require_all(section: str, settings: Any, **limits: tuple[float, float]) -> None:
    """`require` for the named fields of a section of settings, each between its lowest and highest value."""
    for name, (low, high) in limits.items():
        require(f"{section}.{name}", getattr(settings, name), low, high)


def merge(settings: Any, changes: Any, where: str = "") -> Any:
    """A copy of a settings dataclass with the nested mapping `changes` applied; every name and type is checked.

    Raises:
        ValueError: an unknown name, a value of the wrong type or out of range; the message names them.
    """
    if not isinstance(changes, dict):
        raise ValueError(f"{where or 'the configuration'} is {changes!r}, but must be a JSON object of settings.")
    known, new = [f.name for f in dataclasses.fields(settings)], {}
    for name, value in changes.items():
        if name not in known:
            raise ValueError(f"unknown setting {where}{name}: the names here are {', '.join(known)}.")
        old = getattr(settings, name)
        if dataclasses.is_dataclass(old):
            new[name] = merge(old, value, f"{where}{name}.")
            continue
        listed = isinstance(old, tuple)
        kind = get_args(get_type_hints(type(settings))[name])[0] if listed else type(old)  # int of tuple[int, ...]
        if listed and isinstance(value, (list, tuple)):
            same = (type(x) is kind or (type(x) in (int, float) and kind(x) == x) for x in value)
            value = tuple(map(kind, value)) if all(same) else value
        if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not type(old):
            expected = "a list of values of type {}" if listed else f"of type {{}}, such as {old!r}"
            raise ValueError(f"{where}{name} is {value!r}, but must be {expected.format(kind.__name__)}.")
        new[name] = value
    return dataclasses.replace(settings, **new)


def make_generator(seed: int, stream: int, device: Device = "cpu") -> torch.Generator:
    """A random generator for each pair of a seed and a stream, integers from 0 on.

    Pairs are hashed, because generators seeded with equal or neighbouring numbers can produce the same sequence: an
    agent that shares its environment's seed would choose its first action by the hidden task.
    """
    hashed = np.random.SeedSequence(seed, spawn_key=(stream,)).generate_state(1)
    return torch.Generator(device).manual_seed(int(hashed[0]))


def as_tensor(array: np.ndarray) -> Tensor:
    """An array as a tensor of its own: an environment may draw into the same array again."""
    return torch.from_numpy(np.array(array))


def signed_log(x: Tensor) -> Tensor:
    """sign(x) log(1 + |x|): counts and rewards of any size as numbers of the size of features."""
    return x.abs().log1p().copysign(x)


def require_new(output: Path | None) -> None:
    """Raise UserError if the file or folder that a user named for a result exists: nothing is overwritten."""
    if output is not None and output.exists():
        raise UserError(f"{output} exists: name another --output.")


class WorldStep(NamedTuple):
    """What one step of B environments returns; observations are (B, H, W, 3) uint8."""

    obs: Tensor  # what the next action is chosen on: what this one led to, or the first observation of a new episode
    reward: Tensor  # (B,) float32
    terminated: Tensor  # (B,) bool: the episode ended by the rules
    truncated: Tensor  # (B,) bool: the episode ended by its time limit
    final_obs: Tensor  # (n, H, W, 3) uint8: the final observations of the n episodes that ended, in the order of rows

    @property
    def ended(self) -> Tensor:
        """(B,) bool: the episode ended, either way."""
        return self.terminated | self.truncated

    @property
    def next_obs(self) -> Tensor:
        """What the action led to, (B, H, W, 3) uint8; a copy where an episode ended, so ask once."""
        return self.obs.index_put((self.ended,), self.final_obs) if len(self.final_obs) else self.obs

    @classmethod
    def of(cls, obs: np.ndarray, reward: float, info: dict[str, Any]) -> WorldStep:
        """One step of a single Gymnasium environment with the infos of `PixelEnv`, as a batch of one."""
        obs = as_tensor(obs)[None]
        final_obs = as_tensor(info["final_frame"])[None] if "final_frame" in info else obs[:0]
        ended = (torch.tensor([bool(info[name])]) for name in ("episode_terminated", "episode_truncated"))
        return cls(obs, torch.tensor([reward], dtype=torch.float32), *ended, final_obs)


class Experience(NamedTuple):
    """T steps of B lifetimes: what the context engine reads and the losses are computed on."""

    codes: Tensor  # (B, T, S) uint8: the grid of codes before the action
    next_codes: Tensor  # (B, T, S) uint8: the grid of codes that the action led to, before any reset
    posterior: Tensor  # (B, T, K) float: q(k|z, z'), which effect happened
    action: Tensor  # (B, T) int64
    reward: Tensor  # (B, T) float32
    terminated: Tensor  # (B, T) bool
    truncated: Tensor  # (B, T) bool
    segment: Tensor  # (B, T) uint8: index of the stretch under one rule; known in training only, 0 in acting

    @property
    def ended(self) -> Tensor:
        """(B, T) bool: the episode ended with the step, either way."""
        return self.terminated | self.truncated

    @property
    def begins(self) -> Tensor:
        """(B, T) bool: the step is the first one of an episode."""
        return F.pad(self.ended[:, :-1], (1, 0), value=True)

    @property
    def usual_reward(self) -> Tensor:
        """() float32: the reward of most steps, such as 0 or the price of a step."""
        return self.reward.flatten().mode().values

    @property
    def events(self) -> Tensor:
        """(B, T) bool: the step brought a termination or an unusual reward."""
        return self.terminated | (self.reward != self.usual_reward)

    def rows(self, index: Tensor | slice) -> Experience:
        """The same for some of the lifetimes."""
        return Experience(*(part[index] for part in self))


def empty_experience(batch: int, steps: int, patches: int, num_effects: int, device: Device) -> Experience:
    """Zeros in the shapes of `Experience`; posteriors as float16, to save memory."""
    grid, effects = (patches, torch.uint8), (num_effects, torch.float16)
    number, real, flag, index = ((None, dtype) for dtype in (torch.int64, torch.float32, torch.bool, torch.uint8))
    kinds = (grid, grid, effects, number, real, flag, flag, index)
    shape = (batch, steps)
    parts = (torch.zeros((*shape, n) if n else shape, dtype=dtype, device=device) for n, dtype in kinds)
    return Experience(*parts)


class PlaceMemory(NamedTuple):
    """What came with every code at every place in B lifetimes, for rewards and ends that depend on where something is;
    and the grid that episodes begin with.

    A visited place without reward is evidence too. Heads that read this treat all places alike: only what happened at a
    place tells it from others. Source: the idea of a memory that is addressed by place, Parisotto & Salakhutdinov,
    "Neural Map", ICLR 2018; here it is sums, so nothing has to be learnt to write it.
    """

    # (B, S, columns, 5) float32, over the steps that led to a code at a place: their number, rewards, terminations;
    # tanh of what the episode had earned before, and its product with the reward
    sums: Tensor
    column: Tensor  # (C,) int64: which column a code has
    earned: Tensor  # (B,) float32: what the present episode has earned so far
    start: Tensor  # (B, S) uint8: the grid of codes that the first episode began with
    # (B,) int64: how many episodes began with it, of the first one and those after a termination; -1 if one did not
    begun: Tensor
    begins: Tensor  # (B,) bool: the next step is the first one of such an episode
    SUMS = 5

    @classmethod
    def empty(cls, batch: int, patches: int, codes: int, device: Device = "cpu") -> PlaceMemory:
        """At the start of lifetimes."""
        return cls(
            sums=torch.zeros(batch, patches, codes, cls.SUMS, device=device),
            column=torch.arange(codes, device=device),
            earned=torch.zeros(batch, device=device),
            start=torch.zeros(batch, patches, dtype=torch.uint8, device=device),
            begun=torch.zeros(batch, dtype=torch.int64, device=device),
            begins=torch.ones(batch, dtype=torch.bool, device=device),
        )

    @classmethod
    def before_steps(cls, experience: Experience, codes: int) -> PlaceMemory:
        """Before every step of experience (B, T, ...): the memories of B * T lifetimes."""
        reward = experience.reward
        before = reward.cumsum(1) - reward  # earned in the lifetime before each step
        begin = torch.where(experience.begins, torch.arange(reward.shape[1], device=reward.device), 0).cummax(1).values
        earned = before - before.gather(1, begin)
        # Only codes that occur have a column of their own; all others share one that stays empty.
        occurs = torch.bincount(experience.next_codes.flatten().int(), minlength=codes) > 0
        column = torch.where(occurs, occurs.cumsum(0) - 1, occurs.sum())
        index = column[experience.next_codes[:, :-1].int()][..., None, None].expand(-1, -1, -1, 1, cls.SUMS)
        now = cls._summands(reward, experience.terminated, earned)[:, :-1, None, None]
        sums = torch.zeros(*experience.codes.shape, int(occurs.sum()) + 1, cls.SUMS, device=reward.device)
        sums[:, 1:].scatter_(3, index, now.expand_as(index))  # what a step adds is known from the next one on
        sums.cumsum_(1)
        blank = cls.empty(earned.numel(), experience.codes.shape[2], 0, reward.device)  # of starts nothing is known
        return blank._replace(sums=sums.flatten(0, 1), column=column, earned=earned.flatten())

    def add(self, codes: Tensor, next_codes: Tensor, step: WorldStep) -> None:
        """Remember, in place, that a step led from codes (B, S) to next_codes (B, S)."""
        self.start.copy_(torch.where((self.begun == 0)[:, None], codes, self.start))
        same = (self.begun >= 0) & (codes == self.start).all(1)
        self.begun.copy_(torch.where(self.begins, torch.where(same, self.begun + 1, -1), self.begun))
        self.begins.copy_(step.terminated)
        now = self._summands(step.reward, step.terminated, self.earned)
        index = self.column[next_codes.int()][..., None, None].expand(-1, -1, 1, self.SUMS)
        self.sums.scatter_add_(2, index, now[:, None, None].expand_as(index))
        self.earned.add_(step.reward).masked_fill_(step.ended, 0)

    def recall(self, row: Tensor, place: Tensor, code: Tensor, earned: Tensor) -> Tensor:
        """What came with codes (q,) at places (q,) in lifetimes `row` (q,), and what their episode has `earned` (q,):
        (q, SUMS + 1), as logarithms with a sign."""
        _, S, columns, _ = self.sums.shape
        found = self.sums.view(-1, self.SUMS).index_select(0, (row * S + place) * columns + self.column[code])
        return signed_log(torch.cat([found, earned[:, None]], 1))

    @staticmethod
    def _summands(reward: Tensor, terminated: Tensor, earned: Tensor) -> Tensor:
        """What a step adds to the sums: (..., SUMS)."""
        before = earned.tanh()
        return torch.stack([torch.ones_like(reward), reward, terminated.float(), before, reward * before], -1)


class EpisodicMemory:
    """The experience of the present lifetime in B environments; `clear` it, or make another, when the task ends.

    The context engine consumes it: `engine(memory)` is the belief after everything in it. `places` is a `PlaceMemory`.

    Args:
        batch, patches, codes, num_effects: B, S, C and K; capacity: steps of a lifetime.
        keep_frames: keep the observations too, for the store of past lifetimes.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        patches: int,
        codes: int,
        num_effects: int,
        device: Device = "cpu",
        keep_frames: bool = False,
    ) -> None:
        self.capacity, self.keep_frames = capacity, keep_frames
        self._all = empty_experience(batch, capacity, patches, num_effects, device)
        self._sizes = (batch, patches, codes, device)
        self.clear()

    def __len__(self) -> int:
        return self.steps

    def clear(self) -> None:
        """Forget everything: a new task begins, and nothing that happened under the old one says anything about it."""
        self.steps = 0
        self.places = PlaceMemory.empty(*self._sizes)
        self.frames: list[Tensor] = []
        self.final_obs: list[Tensor] = []

    def append(
        self, codes: Tensor, next_codes: Tensor, posterior: Tensor, action: Tensor, obs: Tensor, step: WorldStep
    ) -> None:
        """Remember one step.

        Args:
            codes, next_codes: (B, S) uint8, before and after; posterior: (B, K) float.
            action: (B,) int64; obs: (B, H, W, 3) uint8, what it was chosen on; step: what the environment returned.

        Raises:
            IndexError: the lifetime is already full.
        """
        if self.steps >= self.capacity:
            raise IndexError(f"the memory holds a lifetime of {self.capacity} steps and is full: call clear() first.")
        now = (codes, next_codes, posterior, action, step.reward, step.terminated, step.truncated)
        for kept, value in zip(self._all, now, strict=False):  # the segment stays 0: the agent does not know it
            kept[:, self.steps] = value
        self.places.add(codes, next_codes, step)
        self.steps += 1
        if self.keep_frames:
            self.frames.append(obs)
            # The end of the lifetime ends every episode, so all observations of its last step are final.
            self.final_obs.append(step.final_obs if self.steps < self.capacity else step.next_obs)

    def latest(self) -> Experience:
        """The last step, (B, 1, ...); views."""
        return Experience(*(part[:, self.steps - 1 : self.steps] for part in self._all))

    def experience(self) -> Experience:
        """Everything remembered, (B, steps, ...); views, not copies."""
        return Experience(*(part[:, : self.steps] for part in self._all))


@dataclass(frozen=True)
class MemorySettings:
    """The store of past lifetimes."""

    budget_mb: float = 256.0  # megabytes (2**20 bytes) for frames, codes and posteriors of past lifetimes, at least 1

    def __post_init__(self) -> None:
        require("memory.budget_mb", self.budget_mb, 1, 10**7)


@dataclass
class FrameBlock:
    """The observations of n finished lifetimes, each stored once; a block never changes. What step t led to is
    `frames[:, t + 1]`, except where an episode or the lifetime ended: there it is row `final_index` of `final_obs`."""

    number: int
    frames: Tensor  # (n, T, H, W, 3) uint8
    final_obs: Tensor  # (m, H, W, 3) uint8
    final_index: Tensor  # (n, T) int32: row of final_obs, or -1
    task: Tensor  # (n,) int64: the hidden tasks, to audit what was trained on; no model ever reads them

    @classmethod
    def of(cls, number: int, memory: EpisodicMemory, task: Tensor) -> FrameBlock:
        """The block of the lifetimes in `memory`, on the CPU; ValueError if they are not finished."""
        if len(memory) < memory.capacity:
            raise ValueError(f"the lifetime has {len(memory)} of {memory.capacity} steps: only whole ones are stored.")
        ended = memory.experience().ended.cpu()
        ended[:, -1] = True
        final_index = torch.full(ended.shape, -1, dtype=torch.int32)
        final_index.T[ended.T] = torch.arange(int(ended.sum()), dtype=torch.int32)  # step by step, as they were added
        frames, final_obs = torch.stack(memory.frames, 1).cpu(), torch.cat(memory.final_obs).cpu()
        return cls(number, frames, final_obs, final_index, task.cpu().clone())

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return self.frames.nbytes + self.final_obs.nbytes + self.final_index.nbytes + self.task.nbytes

    def next_obs(self, rows: slice = slice(None)) -> Tensor:
        """What every step of some lifetimes led to, (n, T, H, W, 3) uint8."""
        lifetimes, steps = map(torch.arange, self.final_index.shape)
        return self.next_obs_at(lifetimes[rows, None], steps)

    def next_obs_at(self, lifetime: Tensor, step: Tensor) -> Tensor:
        """What `step` (...) of lifetimes `lifetime` (...) led to, (..., H, W, 3) uint8."""
        final = self.final_index[lifetime, step].long()
        found = self.frames[lifetime, step + (final < 0)]
        found[final >= 0] = self.final_obs[final[final >= 0]]
        return found


def block_name(number: int) -> str:
    """File name of a block."""
    return f"block-{number:06d}.pt"


class LifetimeStore:
    """Past lifetimes in blocks, oldest first, within a budget of bytes.

    Frames are immutable blocks. What the models made of them (codes, effect posteriors), actions and rewards are one
    `Experience` over all lifetimes, so that sampling is a single index. Both are dropped together. `version` says for
    each block at which update its codes were made; see `oldest`.

    Args:
        settings: see `MemorySettings`.
        device: where `experience` lives; frames stay in main memory.
        shard, shards: rank and number of stores, one for each process; each has its share of the budget,
            and of the block numbers every `shards`-th.
    """

    def __init__(self, settings: MemorySettings, device: Device = "cpu", shard: int = 0, shards: int = 1) -> None:
        self.budget, self.device = int(settings.budget_mb * 2**20) // shards, torch.device(device)
        self.shard, self.shards = shard, shards
        self.blocks: list[FrameBlock] = []
        self.version: list[int] = []
        self.experience: Experience | None = None
        self.next = shard  # number of the next block

    def __len__(self) -> int:
        return sum(map(len, self.blocks))

    @property
    def bytes(self) -> int:
        """Bytes held: frames and everything cached beside them."""
        return self._bytes_from(0)

    def add(self, memory: EpisodicMemory, task: Tensor, segment: Tensor, version: int) -> None:
        """Store the finished lifetimes of `memory`; the oldest blocks leave until the budget holds.

        Args:
            memory: with its frames.
            task: (B,) int64, the tasks at the end.
            segment: (B, T) int64, index of the rule of each step; from the 256th on they count as one.
            version: update at which the models made the codes.

        Raises:
            ValueError: this block alone is larger than the budget, or the lifetimes are not finished.
        """
        block = FrameBlock.of(self.next, memory, task)
        new = memory.experience()._replace(segment=segment.clamp(max=255).to(torch.uint8))
        size = block.bytes + sum(part.nbytes for part in new)
        if size > self.budget:
            raise ValueError(
                f"this process has {self.budget / 2**20:g} MB of memory.budget_mb, but {len(block)} lifetimes take "
                f"{size / 2**20:.1f} MB: raise memory.budget_mb or lower training.envs."
            )
        drop = 0
        while self._bytes_from(drop) + size > self.budget:
            drop += 1
        gone = sum(map(len, self.blocks[:drop]))
        parts = [new] if self.experience is None else [self.experience.rows(slice(gone, None)), new]
        joined = (torch.cat([p.to(self.device) for p in pair]) for pair in zip(*parts, strict=True))
        self.experience = Experience(*joined)
        self.blocks, self.version = [*self.blocks[drop:], block], [*self.version[drop:], version]
        self.next += self.shards

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Row numbers (n,) int64, on the CPU, of lifetimes sampled with equal probability."""
        return torch.randint(len(self), (n,), generator=generator)

    def frames_at(self, row: Tensor, step: Tensor, after: Tensor) -> Tensor:
        """Frames (n, H, W, 3) uint8 before the actions of `step` (n,) in lifetimes `row` (n,), or `after` (n,) them."""
        sizes = torch.tensor([len(block) for block in self.blocks])
        start = sizes.cumsum(0) - sizes
        owner = torch.searchsorted(start, row, right=True) - 1
        found = torch.empty((len(row), *self.blocks[0].frames.shape[2:]), dtype=torch.uint8)
        for number in owner.unique().tolist():
            before, behind = (owner == number) & ~after, (owner == number) & after
            block, lifetime = self.blocks[number], row - start[number]
            found[before] = block.frames[lifetime[before], step[before]]
            found[behind] = block.next_obs_at(lifetime[behind], step[behind])
        return found

    def rows_of(self, index: int) -> slice:
        """The rows of `experience` that belong to `blocks[index]`."""
        start = sum(map(len, self.blocks[:index]))
        return slice(start, start + len(self.blocks[index]))

    def oldest(self) -> int:
        """Index of the block whose codes and posteriors were made by the oldest version of the models."""
        return min(range(len(self.blocks)), key=self.version.__getitem__)

    def reencode(self, index: int, codes: Tensor, next_codes: Tensor, posterior: Tensor, version: int) -> None:
        """Replace what the models made of a block: codes (n, T, S) uint8 and posteriors (n, T, K), by `version`."""
        rows = self.rows_of(index)
        for kept, value in zip(self.experience, (codes, next_codes, posterior), strict=False):
            kept[rows] = value
        self.version[index] = version

    def save_blocks(self, folder: Path) -> None:
        """Write the blocks that `folder` lacks, each under its number; a block never changes, so never twice."""
        folder.mkdir(parents=True, exist_ok=True)
        for block in self.blocks:
            path = folder / block_name(block.number)
            if not path.exists():
                save_atomically(vars(block), path)

    def state_dict(self) -> dict:
        """Everything but the frames, which `save_blocks` writes."""
        numbers = [block.number for block in self.blocks]
        return {"numbers": numbers, "version": self.version, "next": self.next, "experience": tuple(self.experience)}

    def load_state_dict(self, state: dict, folder: Path) -> None:
        """Restore from a `state_dict` and `folder`; OSError, RuntimeError if a block is missing or cannot be read."""
        paths = (folder / block_name(number) for number in state["numbers"])
        self.blocks = [FrameBlock(**torch.load(path, weights_only=True)) for path in paths]
        self.version, self.next = list(state["version"]), state["next"]
        self.experience = Experience(*(part.to(self.device) for part in state["experience"]))

    def _bytes_from(self, first: int) -> int:
        """Bytes that blocks from `first` on hold, with what is cached beside them."""
        gone = sum(map(len, self.blocks[:first]))
        cached = sum(part[gone:].nbytes for part in self.experience) if self.experience else 0
        return cached + sum(block.bytes for block in self.blocks[first:])


def remove_stale_blocks(folder: Path, states: list[dict]) -> None:
    """Delete the blocks in `folder` that no store with one of these `state_dict`s holds: they have left it, or a crash
    left them, and the next block of that number would be taken for written."""
    kept = {block_name(number) for state in states for number in state["numbers"]}
    for path in folder.glob("block-*"):
        if path.name not in kept:
            path.unlink()


def save_atomically(content: dict, path: Path) -> None:
    """`torch.save` that leaves either the old file or the whole new one, also after a crash; OSError on a full disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError when the disk is full
        free = shutil.disk_usage(path.parent).free / 2**20
        raise OSError(
            f"could not write {path} with {free:.1f} MB free; the last checkpoint is whole ({error})"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(content: Any, path: Path) -> None:
    """Write JSON atomically, lists of numbers on one line; the same content gives the same bytes."""
    temporary = path.with_name(path.name + ".tmp")
    text = json.dumps(content, indent=1, allow_nan=False)
    text = re.sub(r"\[[-\d.e+,\s]+\]", lambda numbers: " ".join(numbers[0].split()), text)
    temporary.write_text(text + "\n")
    os.replace(temporary, path)


class RunFolder:
    """The folder of a run: settings, metrics, checkpoint, and the lock that keeps two trainings apart.

    It holds `config.json`, `metrics.jsonl`, `tensorboard/`, `checkpoint.pt` and `store/` (the frames, each block
    written once), and in the end `evaluation.json`, `timing.json`, `learning.png`, `adaptation.png` and
    `lifetime.gif`.
    """

    FORMAT = 10  # of checkpoints; raised when they change

    def __init__(self, folder: Path) -> None:
        self.folder, self.config, self.metrics = folder, folder / "config.json", folder / "metrics.jsonl"
        self.checkpoint, self.blocks = folder / "checkpoint.pt", folder / "store"

    @classmethod
    def new(cls, settings: Any) -> RunFolder:
        """A folder under runs/ that did not exist before, named by preset, seed and time."""
        name = f"{settings.preset}-{settings.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        for attempt in itertools.count():
            folder = Path("runs") / (f"{name}-{attempt}" if attempt else name)
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                continue
            return cls(folder)

    @classmethod
    def named(cls, name: str, settings: Any) -> RunFolder:
        """The folder runs/`name`: of a new run, or of one that continues with the same settings.

        Raises:
            UserError: the name is not that of a folder, or the run was started with other settings.
        """
        if Path(name).name != name or name in (".", ".."):
            raise UserError(f"run is {name!r}, but must be the name of a folder in runs/, without a slash.")
        run = cls(Path("runs") / name)
        if run.config.exists():
            started, given = flatten(run.settings(settings)), flatten(settings)
            started.pop("device")  # a run may go on elsewhere
            other = [f"{key} is {old} there and {given[key]} here" for key, old in started.items() if old != given[key]]
            if other:
                raise UserError(
                    f"{run.folder} was started with other settings ({'; '.join(other)}): "
                    "give the same ones, or another --run."
                )
        return run

    def settings(self, default: Any, **changes: Any) -> Any:
        """The run's settings, in a copy of the settings dataclass `default`, with `changes` on top; UserError if it is
        not the folder of a run, or its settings cannot be read."""
        try:
            return merge(merge(default, json.loads(self.config.read_text("utf-8-sig"))), changes)
        except (OSError, ValueError, OverflowError) as error:
            raise UserError(f"{self.folder} is not a run that can be read: {error}") from error

    @contextmanager
    def locked(self, settings: Any = None) -> Iterator[None]:
        """Hold the run alone; the lock ends with its process. A new run is made, and its settings are written.

        Raises:
            UserError: another process trains it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with filelock.FileLock(self.folder / ".lock", timeout=0):
                if not self.config.exists():
                    write_json(dataclasses.asdict(settings), self.config)
                yield
        except filelock.Timeout:
            raise UserError(f"{self.folder} is being trained by another process: wait for it or stop it.") from None

    def save(self, learner: Any) -> None:
        """Write the checkpoint of a learner (with a `store`, `processes` and a `state_dict`).

        Blocks first, then the file that names them, so that a crash at any moment leaves a whole checkpoint. All
        processes call this: each writes its blocks, the main one the rest.
        """
        learner.store.save_blocks(self.blocks)
        state = learner.state_dict()  # waits for the blocks of all processes
        if learner.processes.is_main:
            logged = self.metrics.stat().st_size if self.metrics.exists() else 0
            made_with = flatten(learner.settings)
            content = {"format": self.FORMAT, "settings": made_with, "logged": logged, "learner": state}
            save_atomically(content, self.checkpoint)
            remove_stale_blocks(self.blocks, [shard["store"] for shard in state["shards"]])
        learner.processes.any_rank(False)  # wait, or another process would already write blocks that are not named yet

    def remove_stale(self) -> None:
        """Delete what a training left that died before its first checkpoint."""
        self.metrics.unlink(missing_ok=True)
        remove_stale_blocks(self.blocks, [])

    def load(self, settings: Any = None, may_change: tuple[str, ...] = ()) -> tuple[dict, int]:
        """The learner's state, and how many bytes of metrics were logged by then.

        Raises:
            UserError: there is no checkpoint, it cannot be read, or it was made with other `settings` than these, if
                any are given, except for those that `may_change`.
        """
        try:
            with open(self.checkpoint, "rb") as file:
                if file.read(24).startswith(b"version https://git-lfs"):
                    raise ValueError("it is a Git LFS pointer, not the file itself: fetch it with git lfs pull")
            content = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            if content["format"] != self.FORMAT:
                raise ValueError(f"it has format {content['format']}, this program reads {self.FORMAT}")
            made_with, given = content["settings"], {} if settings is None else flatten(settings)
            state, logged = content["learner"], content["logged"]
        except FileNotFoundError:
            raise UserError(f"{self.folder} has no checkpoint yet: train it again with python3 main.py.") from None
        except Exception as error:  # torch.load raises many kinds for a damaged or foreign file
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if isinstance(error, pickle.UnpicklingError):  # torch's own words advise to load unsafely
                reason = "weights only are loaded, and it holds something else"
            raise UserError(f"{self.checkpoint} cannot be read ({reason}): it is damaged or foreign.") from error
        names = [name for name in given if name not in may_change and made_with.get(name) != given[name]]
        if names:
            other = "; ".join(f"{name} was {made_with.get(name)} and is {given[name]}" for name in names)
            text = f"{self.config} does not fit the checkpoint, which was made with other settings ({other})"
            raise UserError(f"{text}: set them back. What may differ: {', '.join(may_change)}.")
        return state, logged


def flatten(settings: Any) -> dict[str, Any]:
    """A settings dataclass as a mapping of dotted names to values."""
    flat = {}
    for name, value in dataclasses.asdict(settings).items():
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return flat


class Processes:
    """The processes that train one agent together, as torchrun starts them; without torchrun there is one.

    Each rolls out its share of the lifetimes, keeps them in a store of its own and has its share of every batch.
    Gradients are averaged, so weights stay the same everywhere (data parallelism; Li et al., "PyTorch Distributed",
    2020). All processes must make the same calls in the same order, or they wait for each other forever.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count, self.is_main = rank, count, rank == 0  # the main process writes the run

    @classmethod
    def from_torchrun(cls) -> Processes:
        """Join the processes that torchrun has started, if it has: by gloo on CPUs and nccl on GPUs."""
        if not distributed.is_torchelastic_launched():
            return cls()
        store, rank, count = next(distributed.rendezvous("env://"))
        # torchrun keeps one store over its restarts, which still holds the addresses of dead processes.
        store = distributed.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, store=store, rank=rank, world_size=count)
        return cls(rank, count)

    def average(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its mean over all processes, in one message."""
        if self.count > 1:
            flat = torch.cat([x.flatten() for x in tensors])
            distributed.all_reduce(flat)
            for x, mean in zip(tensors, (flat / self.count).split([x.numel() for x in tensors]), strict=True):
                x.copy_(mean.view_as(x))

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, concatenated along the first dimension."""
        parts = [torch.empty_like(tensor) for _ in range(self.count)] if self.count > 1 else [tensor]
        if self.count > 1:
            distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def all_gather_object(self, content: Any) -> list:
        """What each process has, in the order of their ranks."""
        found = [content] * self.count
        if self.count > 1:
            distributed.all_gather_object(found, content)
        return found

    def broadcast(self, module: nn.Module) -> None:
        """Take over the main process's weights of a module."""
        for tensor in module.state_dict().values() if self.count > 1 else ():
            distributed.broadcast(tensor, src=0)

    def any_rank(self, happened: bool) -> bool:
        """Whether it happened in any process; waits for all of them."""
        return bool(self.all_gather(torch.tensor([int(happened)])).any())
