"""Memory: the experience of the present lifetime, the store of past lifetimes, and the folder that keeps a run.

Words used everywhere. A *task* is one hidden rule. A *lifetime* is a fixed number of steps in one task; *episodes*
follow each other inside it. Time is aligned so: `frame[t]` is what the agent sees when it chooses `action[t]`;
`next_obs[t]` is the picture that the action led to, and `reward[t]` came with it. When an episode ends at step t
(`terminated[t]` by a goal or hazard, `truncated[t]` by its time limit), `frame[t + 1]` is the first picture of the next
episode, and `next_obs[t]` the final one of the old; otherwise both are the same.

Step t holds the codes seen before action t, the action, the reward that followed, and the codes of the next_obs. Both codes of a step
are made under the belief held *before* the action, so a pair differs by what happened and not by what was inferred meanwhile.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
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
from torch import Tensor, distributed, nn


class UserError(Exception):
    """Something the user can mend; format_ci as one sentence, exit code 2."""


def require(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError, naming the setting and the mend, unless `low <= value <= high` (NaN is refused)."""
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, but must lie between {low} and {high}: choose a value in that range.")


def require_all(section: str, settings: Any, **limits: tuple[float, float]) -> None:
    """`require` of the named values of a section of settings, each between its lowest and its highest."""
    for name, (low, high) in limits.items():
        require(f"{section}.{name}", getattr(settings, name), low, high)


def make_generator(seed: int, stream: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for each pair of a seed (any integer from 0 on) and a stream.

    Seeds are hashed, because generators that merely begin at equal or neighbouring numbers can draw the same luck: an
    agent make_generator like its world would choose its first action by the hidden task.
    """
    hashed = np.random.SeedSequence(seed, spawn_key=(stream,)).generate_state(1)
    return torch.Generator(device).manual_seed(int(hashed[0]))


def merge(settings: Any, changes: Any, where: str = "") -> Any:
    """A copy of a settings dataclass with the nested mapping `changes` applied; every name and type is checked.

    Raises:
        ValueError: an unknown name, a value of the wrong type or out of range; the message names them.
    """
    if not isinstance(changes, dict):
        raise ValueError(f"{where or 'the configuration'} is {changes!r}, but must be a JSON object of settings.")
    new = {}
    for name, value in changes.items():
        if name not in (known := [f.name for f in dataclasses.fields(settings)]):
            raise ValueError(f"unknown setting {where}{name}: the names here are {', '.join(known)}.")
        old = getattr(settings, name)
        if dataclasses.is_dataclass(old):
            new[name] = merge(old, value, f"{where}{name}.")
            continue
        if isinstance(old, tuple) and isinstance(value, (list, tuple)):
            kind = get_args(get_type_hints(type(settings))[name])[0]  # int of tuple[int, ...]
            if all(type(x) in (int, float) and kind(x) == x for x in value):
                value = tuple(map(kind, value))
        if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not type(old):
            raise ValueError(f"{where}{name} is {value!r}, but must be of type {type(old).__name__}, such as {old!r}.")
        new[name] = value
    return dataclasses.replace(settings, **new)


@dataclass(frozen=True)
class MemorySettings:
    """The store of past lifetimes."""

    budget_mb: float = 256.0
    """Megabytes (2**20 bytes) that pictures, codes and posteriors of past lifetimes may take, at least 1."""

    def __post_init__(self) -> None:
        require("memory.budget_mb", self.budget_mb, 1, 10**7)


def as_tensor(array: np.ndarray) -> Tensor:
    """An array as a tensor, without a copy where that can be: some worlds hand out pictures upside down, as views that torch refuses."""
    return torch.from_numpy(np.ascontiguousarray(array))


class WorldStep(NamedTuple):
    """What one step gives; B worlds, pictures (B, H, W, 3) uint8."""

    obs: Tensor
    """The picture that the next action is chosen on: what the action led to, or a new episode's first picture."""
    reward: Tensor
    """(B,) float32: what the thing that was reached is worth, else 0."""
    terminated: Tensor
    """(B,) bool: the episode ended on a thing."""
    truncated: Tensor
    """(B,) bool: the episode ended by its time limit."""
    final_obs: Tensor
    """(n, H, W, 3) uint8: the final pictures of the n episodes that ended, in the order of their rows."""

    @property
    def ended(self) -> Tensor:
        """(B,) bool: the episode ended, in whichever way."""
        return self.terminated | self.truncated

    @property
    def next_obs(self) -> Tensor:
        """The picture that the action led to; a copy where an episode ended, so ask once."""
        return self.obs.index_put((self.ended,), self.final_obs) if len(self.final_obs) else self.obs

    @classmethod
    def of(cls, picture: np.ndarray, reward: float, info: dict[str, Any]) -> WorldStep:
        """One step of one Gymnasium environment with the infos of `PixelEnv`, as a batch of one."""
        frame = as_tensor(picture)[None]
        final_obs = as_tensor(info["final_frame"])[None] if "final_frame" in info else frame[:0]
        ended = (torch.tensor([bool(info[name])]) for name in ("episode_terminated", "episode_truncated"))
        return cls(frame, torch.tensor([reward], dtype=torch.float32), *ended, final_obs)


class Experience(NamedTuple):
    """Steps of B lifetimes, T each; what the context engine reads and the losses are made of."""

    codes: Tensor
    """(B, T, S) uint8: the grid of codes before the action."""
    next_codes: Tensor
    """(B, T, S) uint8: the grid of codes that the action led to, before any restart."""
    posterior: Tensor
    """(B, T, K) float: q(k|z, z'), which outcome happened."""
    action: Tensor
    """(B, T) int64."""
    reward: Tensor
    """(B, T) float32."""
    terminated: Tensor
    """(B, T) bool: the episode ended by the rules."""
    truncated: Tensor
    """(B, T) bool: the episode ended by its time limit."""
    segment: Tensor
    """(B, T) uint8: number of the stretch under one rule. Known in training alone; 0 for whoever lives it."""

    @property
    def ended(self) -> Tensor:
        """(B, T) bool: the episode ended with the step, in whichever way."""
        return self.terminated | self.truncated

    def rows(self, index: Tensor | slice) -> Experience:
        """The same for some of the lifetimes."""
        return Experience(*(part[index] for part in self))


def empty_experience(batch: int, steps: int, patches: int, num_effects: int, device: torch.device | str) -> Experience:
    """Zeros in the shapes of `Experience`; posteriors as float16, to save memory."""
    kinds = ((patches, torch.uint8), (patches, torch.uint8), (num_effects, torch.float16), (0, torch.int64)) + (
        (0, torch.float32), (0, torch.bool), (0, torch.bool), (0, torch.uint8),
    )  # fmt: skip
    return Experience(
        *(torch.zeros((batch, steps, n) if n else (batch, steps), dtype=kind, device=device) for n, kind in kinds)
    )


class EpisodicMemory:
    """The experience of the present lifetime of B worlds; cleared when the task ends.

    The context engine consumes it: `engine(memory)` is the belief after everything in it.

    Args:
        batch: B.
        capacity: steps of a lifetime.
        patches, num_effects: S and K.
        device: where the tensors live.
        keep_frames: keep the pictures too, for the store of past lifetimes.
    """

    def __init__(
        self, batch: int, capacity: int, patches: int, num_effects: int, device: torch.device | str = "cpu", keep_frames: bool = False
    ) -> None:  # fmt: skip
        self.capacity, self.keep_frames = capacity, keep_frames
        self._all = empty_experience(batch, capacity, patches, num_effects, device)
        self.clear()

    def __len__(self) -> int:
        return self.steps

    def clear(self) -> None:
        """Forget everything: a new task begins, and nothing of the old one says anything about it."""
        self.steps = 0
        self.frames: list[Tensor] = []
        self.final_obs: list[Tensor] = []

    def append(
        self, codes: Tensor, next_codes: Tensor, posterior: Tensor, action: Tensor, frame: Tensor, step: WorldStep
    ) -> None:  # fmt: skip
        """Remember one step.

        Args:
            codes, next_codes: (B, S) uint8 before and after; posterior: (B, K).
            action: (B,) int64; frame: (B, H, W, 3) uint8, what it was chosen on; step: what the world answered.

        Raises:
            IndexError: the lifetime is already full.
        """
        if self.steps >= self.capacity:
            raise IndexError(f"the memory holds a lifetime of {self.capacity} steps and is full: clear() begins the next.")
        now = (codes, next_codes, posterior, action, step.reward, step.terminated, step.truncated)
        for kept, value in zip(self._all, now):  # the segment stays 0: the agent does not know it
            kept[:, self.steps] = value
        self.steps += 1
        if self.keep_frames:
            self.frames.append(frame)
            self.final_obs.append(step.final_obs if self.steps < self.capacity else step.next_obs)  # the lifetime's end ends all

    def latest(self) -> Experience:
        """The last step, (B, 1, ...); views."""
        return Experience(*(part[:, self.steps - 1 : self.steps] for part in self._all))

    def experience(self) -> Experience:
        """Everything remembered, (B, steps, ...); views, not copies."""
        return Experience(*(part[:, : self.steps] for part in self._all))


@dataclass
class FrameBlock:
    """The pictures of n finished lifetimes, each stored once; never changed after it was made.

    `frames` (n, T, H, W, 3) uint8 are what actions were chosen on. The next_obs of step t is `frames[:, t + 1]`, except
    where an episode or the lifetime ended: those are in `final_obs` (m, H, W, 3), at `final_index` (n, T) int32 (else -1).
    """

    number: int
    frames: Tensor
    final_obs: Tensor
    final_index: Tensor
    task: Tensor
    """(n,) int64, the hidden tasks: for audits of what was trained on; no model ever reads it."""

    @classmethod
    def of(cls, number: int, memory: EpisodicMemory, task: Tensor) -> FrameBlock:
        """Those of a finished lifetime in `memory`, on the CPU; ValueError if it is not finished."""
        if len(memory) < memory.capacity:
            raise ValueError(f"the lifetime has seen {len(memory)} of {memory.capacity} steps: only whole ones are stored.")
        ended = memory.experience().ended.cpu()
        ended[:, -1] = True
        final_index = torch.full(ended.shape, -1, dtype=torch.int32)
        final_index.T[ended.T] = torch.arange(int(ended.sum()), dtype=torch.int32)  # step by step, as they came
        return cls(number, torch.stack(memory.frames, 1).cpu(), torch.cat(memory.final_obs).cpu(), final_index, task.cpu().clone())

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def bytes(self) -> int:
        """Bytes of the pictures."""
        return sum(part.nbytes for part in (self.frames, self.final_obs, self.final_index, self.task))

    def next_obs(self) -> Tensor:
        """The pictures that every step led to, (n, T, H, W, 3) uint8."""
        following = torch.cat([self.frames[:, 1:], self.frames[:, -1:]], 1)
        ended = self.final_index >= 0
        following[ended] = self.final_obs[self.final_index[ended].long()]
        return following


def block_name(number: int) -> str:
    """File name of a block of pictures."""
    return f"block-{number:06d}.pt"


class LifetimeStore:
    """Past lifetimes in blocks, oldest first, within a budget of bytes.

    FrameBlock are immutable blocks; what the models made of them (codes, effect posteriors) and the actions and rewards
    lie beside them in one `Experience` over all lifetimes, so that sampling is one index. Both live and die together.
    `version` says for each block which version of the models made its codes; see `oldest`.

    Args:
        settings: see `MemorySettings`.
        device: where `experience` lives; pictures stay in main memory.
        shard, shards: which of how many stores this is, each of a process of its own, that share budget and numbers.
    """

    def __init__(
        self, settings: MemorySettings, device: torch.device | str = "cpu", shard: int = 0, shards: int = 1
    ) -> None:  # fmt: skip
        self.budget, self.device = int(settings.budget_mb * 2**20) // shards, torch.device(device)
        self.shard, self.shards = shard, shards
        self.blocks: list[FrameBlock] = []
        self.version: list[int] = []
        self.experience: Experience | None = None
        self.next = shard  # the next block's number

    def __len__(self) -> int:
        return sum(map(len, self.blocks))

    @property
    def bytes(self) -> int:
        """Bytes held: pictures and everything cached beside them."""
        cached = sum(part.nbytes for part in self.experience) if self.experience else 0
        return cached + sum(block.bytes for block in self.blocks)

    def add(self, memory: EpisodicMemory, task: Tensor, segment: Tensor, version: int) -> None:
        """Store the finished lifetimes of `memory`; the oldest blocks leave until the budget holds.

        Args:
            memory: with its pictures.
            task: (B,) int64, tasks at the end.
            segment: (B, T) int64, under which rule each step was lived; from the 256th on they count as one.
            version: of the models that made the codes.

        Raises:
            ValueError: this block alone is larger than the budget.
        """
        block = FrameBlock.of(self.next, memory, task)
        new = memory.experience()._replace(segment=segment.clamp(max=255).to(torch.uint8))
        size = block.bytes + sum(part.nbytes for part in new)
        if size > self.budget:
            raise ValueError(
                f"memory.budget_mb is {self.budget / 2**20:g}, but {len(block)} lifetimes take {size / 2**20:.1f} MB: "
                "raise memory.budget_mb or lower training.envs."
            )
        drop = 0
        while self.bytes - sum(b.bytes for b in self.blocks[:drop]) - self._cached_bytes(drop) + size > self.budget:
            drop += 1
        gone = sum(map(len, self.blocks[:drop]))
        parts = [new] if self.experience is None else [self.experience.rows(slice(gone, None)), new]
        self.experience = Experience(*(torch.cat([p.to(self.device) for p in pair]) for pair in zip(*parts)))
        self.blocks, self.version = self.blocks[drop:] + [block], self.version[drop:] + [version]
        self.next += self.shards

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Row numbers (n,) int64 of lifetimes drawn with equal probability, on the CPU."""
        return torch.randint(len(self), (n,), generator=generator)

    def frames_at(self, row: Tensor, step: Tensor) -> Tensor:
        """FrameBlock (n, H, W, 3) uint8 that the actions of `step` (n,) in lifetimes `row` (n,) were chosen on."""
        sizes = torch.tensor([len(block) for block in self.blocks])
        start = sizes.cumsum(0) - sizes
        owner = torch.searchsorted(start, row, right=True) - 1
        found = torch.empty((len(row), *self.blocks[0].frames.shape[2:]), dtype=torch.uint8)
        for number in owner.unique().tolist():
            mine = owner == number
            found[mine] = self.blocks[number].frames[row[mine] - start[number], step[mine]]
        return found

    def rows_of(self, index: int) -> slice:
        """Where block number `index` of `blocks` lies in `experience`."""
        start = sum(map(len, self.blocks[:index]))
        return slice(start, start + len(self.blocks[index]))

    def oldest(self) -> int:
        """Index of the block whose codes and posteriors were made by the oldest version of the models."""
        return min(range(len(self.blocks)), key=self.version.__getitem__)

    def reencode(self, index: int, codes: Tensor, next_codes: Tensor, posterior: Tensor, version: int) -> None:
        """Replace what the models made of a block: codes (n, T, S) uint8 and posteriors (n, T, K) of `version`."""
        rows = self.rows_of(index)
        for kept, value in zip(self.experience, (codes, next_codes, posterior)):
            kept[rows] = value
        self.version[index] = version

    # ------------------------------------------------------------------------------------------ checkpoint

    def save_blocks(self, folder: Path) -> None:
        """Write the blocks that `folder` lacks, each under its number; a block never changes, so never twice."""
        folder.mkdir(parents=True, exist_ok=True)
        for block in self.blocks:
            path = folder / block_name(block.number)
            if not path.exists():
                save_atomically(vars(block), path)

    def state_dict(self) -> dict:
        """Everything but the pictures, which `save_blocks` writes."""
        numbers = [block.number for block in self.blocks]
        return {"numbers": numbers, "version": self.version, "next": self.next, "experience": tuple(self.experience)}

    def load_state_dict(self, state: dict, folder: Path) -> None:
        """Restore from a `state_dict` and the blocks in `folder`.

        Raises:
            OSError, RuntimeError: a block is missing or cannot be read.
        """
        self.blocks = [FrameBlock(**torch.load(folder / block_name(number), weights_only=True)) for number in state["numbers"]]
        self.version, self.next = list(state["version"]), state["next"]
        self.experience = Experience(*(part.to(self.device) for part in state["experience"]))

    def _cached_bytes(self, blocks: int) -> int:
        if not self.experience:
            return 0
        gone = sum(map(len, self.blocks[:blocks]))
        return sum(part[:gone].nbytes for part in self.experience)


def remove_stale_blocks(folder: Path, states: list[dict]) -> None:
    """Delete from `folder` what no store with one of these `state_dict`s holds: blocks that have left, once the checkpoint is on
    disk, and those that a crash left unnamed, or the next one of that number would be taken for written."""
    kept = {block_name(number) for state in states for number in state["numbers"]}
    for path in folder.glob("block-*"):
        if path.name not in kept:
            path.unlink()


def save_atomically(content: dict, path: Path) -> None:
    """`torch.save` that leaves either the old file or the whole new one, also after a crash or on a full disk.

    Raises:
        OSError: the file could not be written; the old one is untouched.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # the latter is torch.save's word for a full disk
        free = shutil.disk_usage(path.parent).free / 2**20
        raise OSError(f"could not write {path} with {free:.1f} MB of disk left; the last checkpoint is whole ({error})") from error
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
    """A run's folder: configuration, metrics, checkpoint, and the lock that keeps two processes apart.

    `config.json`, `metrics.jsonl`, `tensorboard/`, `checkpoint.pt` and `store/` (the pictures, each block written once),
    `evaluation.json`, `timing.json`, `adaptation.png`, `lifetime.gif`.
    """

    FORMAT = 3  # of checkpoints; raised when they change

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, folder / "config.json"
        self.checkpoint, self.blocks, self.metrics = folder / "checkpoint.pt", folder / "store", folder / "metrics.jsonl"

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

    def settings(self, default: Any, **changes: Any) -> Any:
        """The run's configuration in a copy of the settings dataclass `default`, with `changes` on top.

        Raises:
            UserError: not a run folder, or its configuration cannot be read.
        """
        try:
            return merge(merge(default, json.loads(self.config.read_text())), changes)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder} is not a run that can be read: {error}") from error

    @contextmanager
    def begun(self, settings: Any) -> Iterator[None]:
        """Hold the folder alone, made and with the configuration of a settings dataclass if it is new; UserError as `locked`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.locked():
            if not self.config.exists():
                write_json(dataclasses.asdict(settings), self.config)
            yield

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run alone; UserError if another process trains it. The lock ends with the process, however it ends."""
        try:
            with filelock.FileLock(self.folder / ".lock", timeout=0):
                yield
        except filelock.Timeout:
            raise UserError(f"{self.folder} is being trained by another process: wait for it or stop it.") from None

    def save(self, learner: Any) -> None:
        """Write the checkpoint of a learner (with a `store` and a `state_dict`): the blocks first, then the file that
        names them, so that a crash at any moment leaves a whole one. Of several processes that learn together all call
        this; each writes its blocks, the first one the rest."""
        learner.store.save_blocks(self.blocks)
        state = learner.state_dict()  # waits for the blocks of all processes
        if learner.processes.is_main:
            logged = self.metrics.stat().st_size if self.metrics.exists() else 0
            save_atomically({"format": self.FORMAT, "logged": logged, "learner": state}, self.checkpoint)
            remove_stale_blocks(self.blocks, [shard["store"] for shard in state["shards"]])
        learner.processes.barrier()  # or another one would already write blocks that are not named yet

    def remove_stale(self) -> None:
        """Delete what a training has left that died before its first checkpoint."""
        self.metrics.unlink(missing_ok=True)
        remove_stale_blocks(self.blocks, [])

    def load(self) -> tuple[dict, int]:
        """The learner's state and how many bytes of metrics were logged by then.

        Raises:
            UserError: there is no checkpoint, or it cannot be read.
        """
        try:
            content = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            if content["format"] != self.FORMAT:
                raise ValueError(f"it has format {content['format']}, this program reads {self.FORMAT}")
            return content["learner"], content["logged"]
        except FileNotFoundError:
            raise UserError(f"{self.folder} has no checkpoint yet: train it again with python3 main.py.") from None
        except Exception as error:  # torch.load raises many kinds for a damaged or foreign file
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{self.checkpoint} cannot be read ({reason}): it is damaged or foreign.") from error


class Processes:
    """The processes that train one agent together, as torchrun starts them; without it there is one, and all this does nothing.

    Each lives its share of the lifetimes, keeps them in a store of its own, and has its share of every batch. The gradients'
    mean is taken over all, so that the weights stay the same everywhere (data parallelism; Li et al., "PyTorch Distributed",
    2020). All of them make the same calls in the same order, or they would wait for each other for ever.

    Args:
        rank, count: which of how many; the first one writes.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count, self.is_main = rank, count, rank == 0

    @classmethod
    @contextmanager
    def from_torchrun(cls) -> Iterator[Processes]:
        """Join those that torchrun has started, if it has: by gloo, and for GPUs by nccl."""
        if not distributed.is_torchelastic_launched():
            yield cls()
            return
        store, rank, count = next(distributed.rendezvous("env://"))
        # torchrun keeps one store over its restarts, and in it the addresses of processes that are dead.
        store = distributed.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, store=store, rank=rank, world_size=count)
        yield cls(rank, count)  # the group ends with its processes: see `main`

    def average(self, tensors: list[Tensor]) -> None:
        """Let each tensor be its mean over all processes; all at once, as one long vector."""
        if self.count > 1:
            flat = torch.cat([x.flatten() for x in tensors])
            distributed.all_reduce(flat)
            for x, mean in zip(tensors, (flat / self.count).split([x.numel() for x in tensors])):
                x.copy_(mean.view_as(x))

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, one after the other along the first dimension."""
        if self.count == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def broadcast(self, module: nn.Module) -> None:
        """Take over the first process's weights of a module."""
        if self.count > 1:
            for tensor in module.state_dict().values():
                distributed.broadcast(tensor, src=0)

    def all_gather_object(self, content: Any) -> list:
        """What each process has, in the order of their ranks."""
        found = [content]
        if self.count > 1:
            found *= self.count
            distributed.all_gather_object(found, content)
        return found

    def any_rank(self, happened: bool) -> bool:
        """Whether it has happened in any process."""
        flag = torch.tensor(int(happened))
        if self.count > 1:
            distributed.all_reduce(flag, distributed.ReduceOp.MAX)
        return bool(flag)

    def barrier(self) -> None:
        """Until all processes are here."""
        self.any_rank(False)
