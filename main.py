"""Meta-train an agent that infers hidden rules from pixels; evaluate, resume and watch it.

    python3 main.py [train] [--preset NAME] [--config FILE.json] [--seed N] [--SECTION.NAME VALUE ...]
    python3 main.py evaluate RUN [--lifetimes N] [--split validation|test]
    python3 main.py resume RUN [--updates N]
    python3 main.py watch RUN [--seed N]
    python3 main.py references RUN [--lifetimes N] [--rollouts N] [--split ...]
    python3 main.py report RUN [RUN ...] [--output FOLDER]
    torchrun --standalone --nproc-per-node 2 main.py [train or resume as above]

The data flow: the world's pictures -> VAE codes -> which outcome happened -> episodic memory -> GRU belief and context
-> FiLM in VAE, outcome prior, consequences and value -> search under the present belief -> action.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import os
import pickle
import signal
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from collections.abc import Callable, Iterator

import numpy as np
import torch
import tyro
from torch import Tensor, distributed, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tyro.conf import Positional

from agent import (
    AgentController, Lifetimes, Moment, RandomAgent, compare, draw_adaptation, draw_episodes, draw_lifetime, episode_table, play,
    references, report, result_table, show_lifetime, shown, statistics, summary, told,
)  # fmt: skip
from context_engine import AppearanceEngine, ContextInferenceEngine, ContextSettings, ExactFilter
from environment import WORLDS, WorldError, WorldSettings, make_worlds, require, require_all, seeded, space_of
from memory import Experience, LifetimeStore, MemorySettings, RunFolder, UserError, forget_blocks, merge, save_atomically, write_json
from transition_model import TransitionModel, TransitionSettings, entropy
from world_model import VAE, Planner, PlannerSettings, VAESettings, Value

EVALUATION_SEED = 10**18  # above every training seed: evaluation has worlds of its own
EVALUATION_SEEDS = {"validation": EVALUATION_SEED, "test": EVALUATION_SEED + 1}


# ------------------------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class TrainingSettings:
    """The order and amount of meta-training. Perception and outcomes come first, then `updates` of the rest."""

    updates: int = 1000
    """Updates of context engine and value, at least 1: the length of the run."""
    worlds: int = 64
    """Lifetimes collected at once, at least 1."""
    random_lifetimes: int = 512
    """Lifetimes lived at random before anything is learnt; a multiple of `worlds`."""
    perception_updates: int = 150
    """Updates of the VAE alone, first."""
    outcome_updates: int = 600
    """Updates of the outcomes alone, second."""
    batch: int = 48
    """Stored lifetimes in an update of the context engine, at least 1."""
    value_batch: int = 16
    """Of these, lifetimes in an update of the value, at least 1 and at most `batch`."""
    outcome_batch: int = 8
    """Stored lifetimes in an update of the outcomes, at least 1."""
    picture_batch: int = 256
    """Stored pictures in an update of the VAE, at least 1."""
    value_from: int = 100
    """First update at which the value learns."""
    plan_from: int = 200
    """First update at which lifetimes are collected with the planner; before it random ones, a quarter as often."""
    collect_every: int = 16
    """Updates between collections of new lifetimes, at least 1."""
    outcome_every: int = 4
    """Updates between updates of the outcomes, at least 1."""
    perception_every: int = 8
    """Updates between updates of the VAE, at least 1."""
    exploration: float = 0.3
    """Share of random actions when planning begins, in [0, 1]; it falls evenly to `exploration_end`."""
    exploration_end: float = 0.03
    """Share of random actions at the end of the run, in [0, 1]."""
    final_rate: float = 0.1
    """Learning rates fall evenly to this share of their beginning, in [0, 1]."""
    evaluation_lifetimes: int = 4096
    """Held-out lifetimes that every agent lives in the final evaluation, at least 2."""
    log_every: int = 20
    """Updates between lines of metrics.jsonl, at least 1."""
    checkpoint_every: int = 200
    """Updates between checkpoints, at least 1."""

    def share(self, processes: int) -> TrainingSettings:
        """What each of several processes does of it; UserError unless they can do equally much."""
        whole = {name: getattr(self, name) for name in ("worlds", "batch", "value_batch", "outcome_batch", "picture_batch")}
        for name, number in whole.items():
            if number % processes:
                near = math.ceil(number / processes) * processes
                raise UserError(f"training.{name} is {number}, which {processes} processes cannot share equally: choose {near}.")
        parts = {name: number // processes for name, number in whole.items()}
        return dataclasses.replace(self, random_lifetimes=self.random_lifetimes // processes, **parts)

    def __post_init__(self) -> None:
        least_one = (
            "updates", "worlds", "random_lifetimes", "perception_updates", "outcome_updates", "batch", "value_batch",
            "outcome_batch", "picture_batch", "collect_every", "outcome_every", "perception_every", "log_every", "checkpoint_every",
        )  # fmt: skip
        require_all(
            "training", self, **dict.fromkeys(least_one, (1, 10**9)), value_from=(0, 10**9), plan_from=(0, 10**9),
            exploration=(0, 1), exploration_end=(0, 1), final_rate=(0, 1), evaluation_lifetimes=(2, 10**7),
        )  # fmt: skip
        require("training.value_batch", self.value_batch, 1, self.batch)
        if self.random_lifetimes % self.worlds:
            raise ValueError(
                f"training.random_lifetimes is {self.random_lifetimes}, but must be a multiple of training.worlds: "
                f"choose {math.ceil(self.random_lifetimes / self.worlds) * self.worlds}."
            )


PRESETS: dict[str, dict] = {
    "default": {},
    "switching": {"training": {"batch": 24, "value_batch": 8, "evaluation_lifetimes": 1024}},
    "tinted": {
        "vae": {"encoder_rate": 5e-4, "final_rate": 0.05},
        "context": {"appearance": 16},
        "training": {"perception_updates": 1500, "evaluation_lifetimes": 1024},
    },
    "large": {},
    "everything": {
        "vae": {"codes": 7, "alike": 0.25},
        "transition": {"outcomes": 48, "reward_bins": (-1.0, 0.0, 0.5, 1.0), "free_updates": 600, "tempered_updates": 300},
        "training": {
            "updates": 2500, "batch": 32, "value_batch": 8, "outcome_batch": 4, "outcome_updates": 1200, "evaluation_lifetimes": 256,
        },
    },
    "gym": {  # for a world of other people's
        "world": {"lifetime": 256, "cell": 8, "slip": 0.0, "noise": 0.0},
        "memory": {"budget_mb": 512.0},
        "vae": {"codes": 12, "alike": 0.05, "encoder_rate": 2e-5},
        "training": {
            "updates": 600, "worlds": 16, "random_lifetimes": 128, "batch": 12, "value_batch": 4, "outcome_batch": 2,
            "evaluation_lifetimes": 64,
        },
    },
    "quick": {
        "transition": {"free_updates": 150, "tempered_updates": 100},
        "planner": {"discount": 0.9},
        "training": {
            "updates": 280, "worlds": 32, "random_lifetimes": 256, "perception_updates": 100, "outcome_updates": 270,
            "batch": 40, "value_batch": 8, "value_from": 100, "plan_from": 112, "final_rate": 0.3, "evaluation_lifetimes": 512,
        },
    },
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """All settings of a run. Precedence: default < preset < --config FILE < flags."""

    preset: Literal["default", "quick", "large", "switching", "tinted", "everything", "gym"] = "default"
    """A named set of settings to begin from: 6x6 in minutes, a small world in seconds, 8x8, rules that change, worlds that
    look different, walls and wind and edges and more, a Gymnasium world (chosen of itself with --world.gym-id)."""
    seed: int = 0
    """Decides everything random in the run, 0 to 1,000,000."""
    device: str = "cpu"
    """Where everything is computed: cpu, cuda, cuda:1, ..."""
    init_from: str = ""
    """Folder of a run to begin with the weights of, perception and outcomes learnt; all sizes must be the same."""
    world: WorldSettings = field(default_factory=WorldSettings)
    memory: MemorySettings = field(default_factory=MemorySettings)
    vae: VAESettings = field(default_factory=VAESettings)
    transition: TransitionSettings = field(default_factory=TransitionSettings)
    context: ContextSettings = field(default_factory=ContextSettings)
    planner: PlannerSettings = field(default_factory=PlannerSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)

    def __post_init__(self) -> None:
        require("seed", self.seed, 0, 1_000_000)
        require_room(self.world, self.training.evaluation_lifetimes)
        if self.preset not in PRESETS:
            raise ValueError(f"preset is {self.preset!r}, but must be one of {', '.join(PRESETS)}.")
        picture_bytes = 2 * math.prod(self.world.sizes.picture) * self.world.lifetime * self.training.worlds  # and arrivals
        if picture_bytes > self.memory.budget_mb * 2**20:
            raise ValueError(
                f"memory.budget_mb is {self.memory.budget_mb:g}, but {self.training.worlds} lifetimes may take "
                f"{picture_bytes / 2**20:.0f} MB: raise memory.budget_mb or lower training.worlds."
            )


def require_room(world: WorldSettings, lifetimes: int, numbers: int = 1 << 28) -> None:
    """Raise ValueError where the exact filter over all rules of so many lifetimes would need several gigabytes."""
    rules = 0 if world.gym_id else len(space_of(world))
    if rules * lifetimes > numbers:
        raise ValueError(
            f"this world has {rules:,} rules, over which the exact filter cannot follow {lifetimes:,} lifetimes at once: evaluate on "
            f"at most {numbers // rules:,} (training.evaluation_lifetimes, or --lifetimes)."
        )


def with_preset(settings: Settings, preset: str) -> Settings:
    """Settings with what a preset, one of PRESETS, changes in them."""
    return merge(settings, {"preset": preset, "world": WORLDS.get(preset, {})} | PRESETS[preset])


def device_of(name: str) -> torch.device:
    """The torch device called `name`, of several GPUs the one for this process; UserError if this machine lacks it."""
    try:
        return torch.empty(0, device=f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device is {name!r}, which this machine does not offer: try --device cpu.") from error


# ------------------------------------------------------------------------------------------------------------ processes


class Processes:
    """The processes that train one agent together, as torchrun starts them; without it there is one, and all this does nothing.

    Each lives its share of the lifetimes, keeps them in a store of its own, and has its share of every batch. The gradients'
    mean is taken over all, so that the weights stay the same everywhere (data parallelism; Li et al., "PyTorch Distributed",
    2020). All of them make the same calls in the same order, or they would wait for each other for ever.

    Args:
        rank, count: which of how many; the first one writes.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count, self.first = rank, count, rank == 0

    @classmethod
    @contextmanager
    def of_torchrun(cls) -> Iterator[Processes]:
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

    def joined(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, one after the other along the first dimension."""
        if self.count == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def follow(self, module: nn.Module) -> None:
        """Take over the first process's weights of a module."""
        if self.count > 1:
            for tensor in module.state_dict().values():
                distributed.broadcast(tensor, src=0)

    def every(self, content: Any) -> list:
        """What each process has, in the order of their ranks."""
        found = [content]
        if self.count > 1:
            found *= self.count
            distributed.all_gather_object(found, content)
        return found

    def anywhere(self, happened: bool) -> bool:
        """Whether it has happened in any process."""
        flag = torch.tensor(int(happened))
        if self.count > 1:
            distributed.all_reduce(flag, distributed.ReduceOp.MAX)
        return bool(flag)

    def wait(self) -> None:
        """Until all processes are here."""
        self.anywhere(False)


# --------------------------------------------------------------------------------------------------------------- wiring


class System:
    """Every part of the agent, built and wired; the data flow is at the top of this file.

    Args:
        settings: of the run; the seed decides the initial weights.
        device: where all parts live.
        engine, planner: classes of one's own in the place of ours, built from the same arguments.
    """

    def __init__(
        self, settings: Settings, device: torch.device, engine: type = ContextInferenceEngine, planner: type = Planner
    ) -> None:  # fmt: skip
        unknown = set(settings.world.worths) - set(settings.transition.reward_bins)
        if unknown and not settings.world.gym_id:
            bins = settings.transition.reward_bins
            worth = f"{min(unknown):g}: add it, or leave the bins out"
            raise ValueError(f"transition.reward_bins is {bins}, but world.worths has {worth}.")
        torch.manual_seed(settings.seed)
        s, sizes = settings, settings.world.sizes
        perception = dataclasses.replace(s.vae, patch=s.vae.patch or s.world.cell)
        padding = s.transition.padding or ("zeros" if s.world.edges == "block" else "circular")
        codes, outcomes, context = s.vae.codes, s.transition.outcomes, s.context.context
        self.settings, self.device = settings, device
        self.vae = VAE(perception, picture=sizes.picture, context_dim=context).to(device)
        dynamics = dataclasses.replace(s.transition, padding=padding)
        self.transition = TransitionModel(dynamics, codes, self.vae.grid, context_dim=context).to(device)
        self.engine = engine(s.context, sizes.actions, outcomes, codes).to(device)
        self.appearance = None
        if s.context.appearance:
            self.appearance = AppearanceEngine(s.context, pixels=3 * perception.patch**2).to(device)
        self.value = Value(codes, self.vae.grid, context, s.planner.keypoints, s.planner.width).to(device)
        self.slow_value = copy.deepcopy(self.value).requires_grad_(False)  # acts, and makes the value's targets
        self.planner = planner(s.planner, self.transition, self.slow_value)

    def controller(self, kind: type = AgentController, **options: bool) -> AgentController:
        """An agent of these parts, of `AgentController` or a class of one's own; options are its constructor's."""
        parts = (self.vae, self.transition, self.engine, self.planner)
        return kind(*parts, lifetime=self.settings.world.lifetime, appearance=self.appearance, **options)

    def modules(self) -> dict[str, nn.Module]:
        """The parts with weights, by name."""
        names = ("vae", "transition", "engine", "appearance", "value", "slow_value")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def load(self, states: dict[str, dict]) -> None:
        """Take over the weights of all parts, from their `state_dict`s by name."""
        for name, module in self.modules().items():
            module.load_state_dict(states[name])


class Learner:
    """Meta-training, one `advance` at a time; everything that decides the future is in `state_dict`.

    Gradients do not cross: the VAE learns from pictures, the outcomes from codes, the context engine with prior and
    consequences from cached effect posteriors, the value from the planner's look-ahead. `parts` are those of `System`.
    Several processes may each have one and learn together.
    """

    def __init__(self, settings: Settings, device: torch.device, processes: Processes | None = None, **parts: type) -> None:
        self.processes = processes or Processes()
        self.training = settings.training.share(self.processes.count)
        self.settings, self.device, self.system = settings, device, System(settings, device, **parts)
        self.store = LifetimeStore(settings.memory, device, self.processes.rank, self.processes.count)
        self.generator = seeded(settings.seed, 4 + 100 * self.processes.rank, device)
        self.sampler = seeded(settings.seed, 5 + 100 * self.processes.rank)  # of stored lifetimes, on the CPU
        encoder = [p for name, p in self.system.vae.named_parameters() if name.startswith("encoder")]
        decoder = [p for name, p in self.system.vae.named_parameters() if not name.startswith("encoder")]
        transition, engine = self.system.transition, self.system.engine
        look = [{"params": self.system.appearance.parameters()}] if self.system.appearance else []
        groups = {
            "vae": [{"params": encoder}, {"params": decoder}, *look],
            "outcomes": transition.outcome_network.parameters(),
            "context": [*engine.parameters(), *transition.contextual_parameters()],
            "value": self.system.value.parameters(),
        }
        self.optimisers = {name: torch.optim.Adam(parameters, fused=True) for name, parameters in groups.items()}
        self.update = self.collections = self.env_steps = 0
        self.metrics: dict[str, Tensor] = {}
        self.seconds: dict[str, float] = {}

    @property
    def total(self) -> int:
        """Updates of all phases."""
        t = self.training
        return t.perception_updates + t.outcome_updates + t.updates

    def advance(self) -> None:
        """One update of whichever phase it is: collect and perceive, name outcomes, or adapt and plan."""
        t = self.training
        outcome_update = self.update - t.perception_updates
        main_update = outcome_update - t.outcome_updates
        self._set_rates(main_update)
        if self.update == 0:
            self.collect_first()
        if outcome_update == 0:
            self.merge_codes()
        if main_update in (0, -t.outcome_updates):  # perception or outcomes are new: so is all that was made by them
            for index in range(len(self.store.blocks)):
                self.renew(index)
        if outcome_update < 0:
            self.learn_perception(self.store.sample(t.batch, self.sampler))
        elif main_update < 0:
            self.learn_outcomes(outcome_update)
        else:
            self._adapt(main_update)
        self.update += 1

    def inherit(self, run: RunFolder) -> None:
        """Begin where perception and outcomes are learnt, with the weights of `run`; UserError if sizes differ."""
        try:
            self.system.load(run.load()[0]["modules"])
        except (RuntimeError, KeyError) as error:
            raise UserError(f"{run.folder} has parts of other sizes: give the settings that it was trained with.") from error
        self.collect_first()
        self.update = self.training.perception_updates + self.training.outcome_updates

    def collect_first(self) -> None:
        """Live the random lifetimes that everything begins with."""
        while self.collections < self.training.random_lifetimes // self.training.worlds:
            self.collect(exploration=1.0)

    def _adapt(self, update: int) -> None:
        t = self.training
        if update >= t.plan_from and update % t.collect_every == 0:
            done = (update - t.plan_from) / max(1, t.updates - t.plan_from)
            self.collect(t.exploration + (t.exploration_end - t.exploration) * min(1.0, done))
            self.renew(self.store.stalest())
        elif update % (4 * t.collect_every) == 0:
            self.collect(exploration=1.0)
            self.renew(self.store.stalest())
        if update % t.outcome_every == 0:
            self.learn_outcomes(t.outcome_updates + update)
        rows = self.store.sample(t.batch, self.sampler)
        experience = self.store.experience.rows(rows.to(self.device))
        beliefs = self.learn_context(experience)
        if update % t.perception_every == 0:
            self.learn_perception(rows, beliefs)
        if update >= t.value_from:
            few = slice(t.value_batch)
            self.learn_value(experience.rows(few), beliefs[few])

    def collect(self, exploration: float) -> None:
        """Live new lifetimes in training tasks, with `exploration` of the actions at random, and store them."""
        s = self.settings
        # Another world for every collection of every process of every run.
        seed = (s.seed + 1) * 2**32 + self.processes.rank * 2**22 + self.collections
        with self.timed("collect"):
            world = make_worlds(s.world, self.training.worlds, "train", seed, self.device)
            agent = self.system.controller(keep_pictures=True, look_again=False)  # cheaper, and teaches as well
            agent.explore(exploration, self.generator)
            lifetimes = play(world, agent)
            self.store.add(agent.memory, world.task, lifetimes.segment, self.update)
        self.collections += 1
        self.env_steps += lifetimes.reward.numel() * self.processes.count
        self.metrics["return"] = lifetimes.reward.sum(1).mean()
        bins = s.transition.reward_bins
        if lifetimes.reward.min() < bins[0] or lifetimes.reward.max() > bins[-1]:
            ends = f"{bins[0]:g} to {bins[-1]:g}"
            warnings.warn(f"some rewards lie beyond transition.reward_bins, {ends}, and count as those: widen them.")

    @torch.no_grad()
    def renew(self, index: int, rows_at_once: int = 8) -> None:
        """Let the present models see a block of the store again: its codes and effect posteriors."""
        system, block = self.system, self.store.blocks[index]
        with self.timed("renew"):
            experience = self.store.experience.rows(self.store.rows_of(index))
            if system.appearance:
                vision = torch.cat([self.appearances(frames.to(self.device)) for frames in block.frames.split(rows_at_once)])
            else:
                vision = system.engine.context(system.engine.sequence(experience)[:, :-1])[:, :, -1]  # (n, T, D)
            made = []
            for frames, arrivals, seen in zip(*(x.split(rows_at_once) for x in (block.frames, block.arrivals(), vision))):
                before, after = (
                    system.vae.encode(pictures.flatten(0, 1).to(self.device), seen.flatten(0, 1)) for pictures in (frames, arrivals)
                )
                likelihood = system.transition.outcome_network.log_likelihood(before, after)
                made.append((before, after, system.transition.effect_posterior(likelihood)))
            shape = experience.action.shape
            self.store.renew(index, *(torch.cat(parts).view(*shape, -1) for parts in zip(*made)), self.update)

    def appearances(self, frames: Tensor) -> Tensor:
        """Contexts (n, T, D) to see whole lifetimes of pictures (n, T, H, W, 3) with."""
        patches = self.system.vae.patches(frames.flatten(0, 1))
        return self.system.appearance.sequence(patches.view(*frames.shape[:2], *patches.shape[1:]))[0]

    def learn_perception(self, rows: Tensor, beliefs: Tensor | None = None) -> None:
        """One update of the VAE on pictures of lifetimes `rows`; without beliefs (B, T + 1, A + 1, H) under no context.

        Where the appearance is inferred, that learns along, from whole lifetimes of which sixteen pictures each are used.
        """
        size, system, lifetime = self.training.picture_batch, self.system, self.settings.world.lifetime
        with self.timed("vae"):
            which = torch.randint(len(rows), (size,), generator=self.sampler)
            step = torch.randint(lifetime, (size,), generator=self.sampler)
            if system.appearance:
                few, which = which[: -(-size // 16)], torch.arange(size) // 16
                every = torch.arange(lifetime).repeat(len(few))
                frames = self.store.frames_at(rows[few].repeat_interleave(lifetime), every).to(self.device)
                frames = frames.unflatten(0, (len(few), lifetime))
                frames, vision = frames[which, step], self.appearances(frames)[which, step]
            else:
                frames = self.store.frames_at(rows[which], step).to(self.device)
                vision = torch.zeros(size, self.settings.context.context, device=self.device)
                if beliefs is not None:
                    vision = system.engine.context(beliefs[which, step])[:, -1].detach()
            if self.update == 0:
                system.vae.seed_codes(self.processes.joined(frames), self.processes.joined(vision))
                self.processes.follow(system.vae)
            self._descend("vae", system.vae.loss(frames, vision), clip=1e4)

    def merge_codes(self, every: int = 16) -> None:
        """Perception is new: let its codes that stand for the same count as one, by every so many pictures of a block."""
        frames = self.store.blocks[0].frames.to(self.device)
        vision = torch.zeros(*frames.shape[:2], self.settings.context.context, device=self.device)
        if self.system.appearance:
            with torch.no_grad():
                vision = self.appearances(frames)
        seen = (self.processes.joined(x[:, ::every].flatten(0, 1)) for x in (frames, vision))
        self.system.vae.merge_codes(*seen)
        self.processes.follow(self.system.vae)

    def learn_outcomes(self, number: int) -> None:
        """Outcome update `number`: its phase follows from it."""
        t, transition = self.training, self.system.transition
        with self.timed("outcomes"):
            if transition.settings.splits_at(number):
                sample = self.store.experience.rows(self.store.sample(4 * t.outcome_batch, self.sampler))
                codes, next_codes = (self.processes.joined(x.flatten(0, 1)) for x in (sample.codes, sample.next_codes))
                transition.outcome_network.split(codes, next_codes, self.generator)
                self.processes.follow(transition.outcome_network)
            experience = self.store.experience.rows(self.store.sample(t.outcome_batch, self.sampler).to(self.device))
            temper = transition.settings.temper(number)
            self._descend("outcomes", transition.outcome_loss(experience, self.system.engine.actions, temper), clip=20)

    def learn_context(self, experience: Experience) -> Tensor:
        """One update of context engine, prior and consequences; the beliefs (B, T + 1, A + 1, H) on the way."""
        with self.timed("context"):
            losses, beliefs = self.system.engine.loss(experience, self.system.transition, self.generator)
            self._descend("context", losses, clip=20)
            self.metrics["effect_entropy"] = entropy(experience.posterior.float()).mean()
        return beliefs

    def learn_value(self, experience: Experience, beliefs: Tensor) -> None:
        """One update of the value, and a step of the slow value towards it."""
        system = self.system
        with self.timed("value"):
            context = system.engine.context(beliefs).detach()
            self._descend("value", system.planner.loss(system.value, experience, context), clip=10)
            with torch.no_grad():
                for slow, fast in zip(system.slow_value.parameters(), system.value.parameters()):
                    slow.lerp_(fast, self.settings.planner.slow)

    def _descend(self, name: str, losses: dict[str, Tensor], clip: float) -> None:
        optimiser = self.optimisers[name]
        optimiser.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        learnt = [p for group in optimiser.param_groups for p in group["params"]]
        self.processes.average([p.grad for p in learnt if p.grad is not None])
        nn.utils.clip_grad_norm_(learnt, clip)
        optimiser.step()
        self.metrics |= {f"{name}/{key}": loss.detach() for key, loss in losses.items()}

    def _set_rates(self, main_update: int) -> None:
        s, late = self.settings, main_update >= 0
        done = max(0, main_update) / s.training.updates
        share = 1 - (1 - s.training.final_rate) * min(1.0, done)
        first = (s.vae.encoder_rate, s.vae.decoder_rate, s.context.learning_rate)
        early = 1 - (1 - s.vae.final_rate) * min(1.0, self.update / s.training.perception_updates)
        rates = {
            "vae": [s.vae.late_rate] * 3 if late else [early * rate for rate in first],
            "outcomes": [s.transition.learning_rate * share],
            "context": [s.context.learning_rate * share],
            "value": [s.planner.learning_rate * share],
        }
        for name, optimiser in self.optimisers.items():
            for group, rate in zip(optimiser.param_groups, rates[name]):
                group["lr"] = rate

    def settle(self) -> None:
        """Let the metrics be their mean over all processes."""
        if self.processes.count > 1:
            means = torch.stack([value.detach().float().cpu() for _, value in sorted(self.metrics.items())])
            self.processes.average([means])
            self.metrics = dict(zip(sorted(self.metrics), means))

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time inside to `seconds[part]`."""
        start = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

    def state_dict(self) -> dict:
        """Everything that decides the future of the run, but the pictures of the stores; to be called by all processes.

        Raises:
            RuntimeError: the processes' weights differ.
        """
        modules = {name: module.state_dict() for name, module in self.system.modules().items()}
        if self.processes.count > 1:
            flat = torch.cat([x.detach().flatten().cpu().double() for state in modules.values() for x in state.values()])
            if len(set(self.processes.every(hashlib.sha256(flat.numpy().tobytes()).hexdigest()))) > 1:
                raise RuntimeError(f"the processes' weights differ at update {self.update}: this is a defect, please report it.")
        own = {"generators": [self.generator.get_state(), self.sampler.get_state()], "store": self.store.state_dict()}
        return {
            "modules": modules,
            "optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()},
            "counters": [self.update, self.collections, self.env_steps],
            "metrics": {name: float(value) for name, value in self.metrics.items()},
            "seconds": dict(self.seconds),
            "shards": self.processes.every(own),
        }

    def load_state_dict(self, state: dict, blocks: Path) -> None:
        """Restore from `state_dict` and the folder of the stores' blocks; UserError if another number of processes made it."""
        shards, rank = state["shards"], self.processes.rank
        if len(shards) != self.processes.count:
            raise UserError(f"the run was trained by {len(shards)} processes, not {self.processes.count}: resume it with as many.")
        self.system.load(state["modules"])
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
        for generator, saved in zip((self.generator, self.sampler), shards[rank]["generators"]):
            generator.set_state(saved.cpu())
        self.update, self.collections, self.env_steps = state["counters"]
        self.metrics = {name: torch.tensor(value) for name, value in state["metrics"].items()}
        self.seconds = dict(state["seconds"])
        if self.processes.first:
            forget_blocks(blocks, [shard["store"] for shard in shards])
        self.store.load_state_dict(shards[rank]["store"], blocks)


# ----------------------------------------------------------------------------------------------------------- evaluation


def evaluate(
    system: System, split: str, lifetimes: int, agent: AgentController | None = None, env_steps: int = 0
) -> dict[str, Any]:  # fmt: skip
    """Compare the agent with the references on held-out tasks, in worlds of their own.

    Besides what it was asked for, the answer holds what `agent.compare` says of every agent; and `belief_nats`: how unexpected each step was to the agent and to the exact
    filter, mean over lifetimes, and the agent's `late_excess` from step `late` on. Where there is no exact filter, these are None.

    Args:
        system: the agent's parts; split: validation or test; lifetimes: at least 2.
        agent: to evaluate in the place of the system's own.
        env_steps: of the training so far, for the record.

    Raises:
        ValueError: the exact filter has no room for so many lifetimes.
    """
    settings = system.settings
    require_room(settings.world, lifetimes)
    seed = EVALUATION_SEEDS[split]
    world = make_worlds(settings.world, lifetimes, split, seed, system.device)
    agent = agent or system.controller()
    exact = [] if settings.world.gym_id else [ExactFilter(world)]
    lived = {"agent": play(world, agent, exact)} | references_in(settings.world, lifetimes, split, system.device)
    nats = {"agent": torch.stack(agent.nats)} | {"exact": torch.stack(filter_.nats) for filter_ in exact}
    nats = {name: seen.double().mean(1).tolist() for name, seen in nats.items()}
    late = min(16, settings.world.lifetime // 2)
    excess = float(np.mean(nats["agent"][late:]) - np.mean(nats["exact"][late:])) if exact else None
    return {
        "preset": settings.preset, "seed": settings.seed, "split": split, "lifetimes": lifetimes,
        "env_steps": env_steps, **compare(lived),
        "belief_nats": {**nats, "late": late, "late_excess": excess},
    }  # fmt: skip


@functools.lru_cache(maxsize=1)
def references_in(
    world: WorldSettings, lifetimes: int, split: str, device: torch.device, rollouts: int = 0
) -> dict[str, Lifetimes]:  # fmt: skip
    """The reference agents' lifetimes of an evaluation; kept, because several agents may be evaluated in one world. Other
    people's worlds have no exact solution, so there is only the random agent."""
    require_room(world, lifetimes)
    if world.gym_id:
        worlds = make_worlds(world, lifetimes, split, EVALUATION_SEEDS[split], device)
        return {"random": play(worlds, RandomAgent(EVALUATION_SEEDS[split], world.sizes.actions))}
    return references(world, lifetimes, split, EVALUATION_SEEDS[split], device, rollouts)


def lifetime(system: System, seed: int) -> tuple[Iterator[Moment], str]:
    """The moments of one lifetime of the agent in a validation task, chosen by `seed`, as it lives them; what is hidden there."""
    settings = system.settings
    world = make_worlds(settings.world, 1, "validation", EVALUATION_SEED + 100 + seed, system.device)
    agent, first = system.controller(), world.reset()
    agent.begin(first)

    def live() -> Iterator[Moment]:
        earned = 0.0
        for step in range(settings.world.lifetime):
            action = agent.act()
            with torch.no_grad():
                rebuilt = system.vae.decode(agent.codes, agent.vision)[0].clamp(0, 1)
                belief = system.transition.log_prior(system.engine.context(agent.belief)[:, :-1])[0].exp()
            seen = (x.cpu().numpy() for x in (agent.frame[0], rebuilt, belief))
            yield *seen, f"step {step}   action {int(action)}   return {earned:+g}"
            happened = world.step(action)
            agent.observe(action, happened)
            earned += float(happened.reward)

    return live(), "hidden rule: " + world.words(0).replace("\n", "; ")


def film(system: System, path: Path, seed: int, fps: int = 4) -> None:
    """Draw a `lifetime` to `path` (GIF or MP4)."""
    moments, hidden = lifetime(system, seed)
    draw_lifetime(moments, hidden, path, fps)


# ------------------------------------------------------------------------------------------------------------- training


def train(run: RunFolder, learner: Learner) -> bool:
    """Advance to the planned end, logging and saving; False if Ctrl-C stopped it (and saved) before.

    The first Ctrl-C ends the present update and saves; a second one stops at once. Of several processes all call this, and
    the first one writes.
    """
    t, processes, asked, stopped = learner.training, learner.processes, [], False

    def stop(*_: Any) -> None:
        asked.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, stop)
    board = SummaryWriter(run.folder / "tensorboard", purge_step=learner.update + 1) if processes.first else None
    started = time.perf_counter() - learner.seconds.get("total", 0.0)

    def save() -> None:
        learner.seconds["total"] = time.perf_counter() - started
        run.save(learner)

    quiet = not (processes.first and sys.stderr.isatty())
    bar = tqdm(total=learner.total, initial=learner.update, unit="update", disable=quiet, dynamic_ncols=True)
    try:
        while learner.update < learner.total and not stopped:
            learner.advance()
            bar.update()
            stopped = processes.anywhere(bool(asked))  # once an update, so that all stop after the same one, and save
            over = learner.update == learner.total
            logs, saves = over or learner.update % t.log_every == 0, over or stopped or learner.update % t.checkpoint_every == 0
            if logs or saves:  # seldom, because to look at a number waits for the device
                learner.settle()
                if wrong := not_finite(learner):
                    raise UserError(
                        f"{wrong[0]} is not finite at update {learner.update}, so the training stopped; {run.folder} is as it was at its "
                        "last checkpoint. Try lower learning rates."
                    )
            if logs and board:
                log(run, board, bar, learner)
            if saves:
                save()
    finally:
        bar.close()
        if board:
            board.close()
        signal.signal(signal.SIGINT, previous)
    return not stopped


def not_finite(learner: Learner) -> list[str]:
    """Names of the metrics that are not finite."""
    return [name for name, value in learner.metrics.items() if not math.isfinite(value)]


def log(run: RunFolder, board: SummaryWriter, bar: tqdm, learner: Learner) -> None:
    """One line to metrics.jsonl, the same to TensorBoard, the gist to the progress bar."""
    values = write_metrics(run, learner)
    for name, value in values.items():
        board.add_scalar(f"losses/{name}" if "/" in name else f"charts/{name}", value, learner.update)
    shown = ("return", "vae/reconstruction", "outcomes/free", "context/filter", "value/value")
    bar.set_postfix({name: f"{values[name]:.2f}" for name in shown if name in values})


def write_metrics(run: RunFolder, learner: Learner) -> dict[str, float]:
    """Append one line to metrics.jsonl; the values in it."""
    values = {name: float(value) for name, value in learner.metrics.items()}
    with open(run.metrics, "a") as file:
        file.write(json.dumps({"update": learner.update, "env_steps": learner.env_steps} | values) + "\n")
    return values


def train_and_evaluate(run: RunFolder, learner: Learner) -> None:
    """Train to the end, then, in the first process, write the final evaluation and the pictures."""
    first = learner.processes.first
    if first:
        print(f"training {run.folder}", flush=True)
    if not train(run, learner):
        if first:
            print(f"stopped at update {learner.update} and saved: python3 main.py resume {run.folder} goes on.", flush=True)
        sys.exit(130)
    if not first:
        return
    write_json(learner.seconds, run.folder / "timing.json")
    result = evaluate(learner.system, "test", learner.settings.training.evaluation_lifetimes, env_steps=learner.env_steps)
    write_json(result, run.folder / "evaluation.json")
    draw_adaptation([result], run.folder / "adaptation.png")
    film(learner.system, run.folder / "lifetime.gif", seed=0)
    print(report(result) + f"\ntrained for {learner.seconds['total']:.0f} s; results and pictures are in {run.folder}")


# ------------------------------------------------------------------------------------------------------------- commands


@dataclass(frozen=True)
class TrainArguments(Settings):
    """Meta-train, then evaluate on held-out tasks. Precedence: default < preset < --config < flags."""

    config: Path | None = None
    """A JSON file of settings, such as a run's config.json or a tuned best.json; it may be partial."""
    run: str = ""
    """Name of the run's folder in runs/; the same command again goes on with it. <preset>-<seed>-<time> if not given."""


def train_command(arguments: list[str]) -> None:
    """Settings from preset, file and flags; a new run; training and evaluation."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", default=None)
    early.add_argument("--config", type=Path, default=None)
    early.add_argument("--world.gym-id", "--world.gym_id", dest="gym_id", default="")
    early.add_argument("--transition.reward-bins", "--transition.reward_bins", dest="bins", nargs="+", default=())
    chosen, _ = early.parse_known_args(arguments)
    base, said = from_file(TrainArguments(), chosen.config, chosen.preset, chosen.gym_id)
    parsed = tyro.cli(TrainArguments, args=arguments, default=base, prog="main.py")
    settings = Settings(**{f.name: getattr(parsed, f.name) for f in dataclasses.fields(Settings)})
    if settings.preset == "gym" and not settings.world.gym_id:
        raise UserError("preset gym is for a world of other people's: name it with --world.gym-id.")
    settings = settings if chosen.bins else with_rewards(settings, said)
    if distributed.is_torchelastic_launched() and not parsed.run:
        raise UserError("name the run, so that all processes share it and a restart goes on with it: torchrun ... -- main.py --run NAME.")
    named = run_named(parsed.run, settings) if parsed.run else None
    with Processes.of_torchrun() as processes:
        learner = Learner(settings, device_of(settings.device), processes)  # refuses what does not fit, before anything is written
        if settings.init_from:
            learner.inherit(RunFolder(Path(settings.init_from)))
        run = named or RunFolder.new(settings)
        with run.begun(settings) if processes.first else nullcontext():
            if run.checkpoint.exists():
                go_on(run, learner)
            elif processes.first:
                run.forget()
            processes.wait()
            train_and_evaluate(run, learner)


def run_named(name: str, settings: Settings) -> RunFolder:
    """The run's folder runs/`name`: a new one, or that of a run that goes on.

    Raises:
        UserError: the name is no name of a folder, or the run was begun with other settings.
    """
    if Path(name).name != name or name in (".", ".."):
        raise UserError(f"run is {name!r}, but must be the name of a folder in runs/, without a slash.")
    run = RunFolder(Path("runs") / name)
    if run.config.exists():
        begun, own = (dataclasses.asdict(one) for one in (run.settings(Settings()), settings))
        flat = lambda tree: {f"{s}.{n}": v for s, part in tree.items() if isinstance(part, dict) for n, v in part.items()} | tree  # noqa: E731
        other = [f"{k} is {v} there and {flat(own)[k]} here" for k, v in flat(begun).items() if not isinstance(v, dict) and v != flat(own)[k]]
        if other:
            raise UserError(f"{run.folder} was begun with other settings ({'; '.join(other)}): give the same ones, or another --run.")
    return run


def from_file(settings: Settings, path: Path | None, preset: str | None, gym_id: str = "") -> tuple[Settings, dict]:
    """`settings` with a preset (the one named, or else the file's, or gym's for a Gymnasium world) and a file's changes on top;
    and these changes. UserError if the file cannot be read or does not fit."""
    try:
        changes = {} if path is None else json.loads(path.read_text())
        said = changes if isinstance(changes, dict) else {}
        world = said.get("world", {}) if isinstance(said.get("world", {}), dict) else {}
        preset = preset or said.get("preset") or ("gym" if gym_id or world.get("gym_id") else "default")
        if isinstance(preset, str) and preset in PRESETS:  # an unknown one is refused by what comes next, with the names that exist
            settings = with_preset(settings, preset)
        return merge(settings, changes), said
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error


def with_rewards(settings: Settings, said: dict) -> Settings:
    """`settings` with the reward bins of their world, unless what a file said has bins for that very world."""
    if "reward_bins" in said.get("transition", {}) and said.get("world", {}).get("gym_id", "") == settings.world.gym_id:
        return settings
    return merge(settings, {"transition": {"reward_bins": rewards_of(settings.world)}})


def rewards_of(world: WorldSettings, lifetimes: int = 16, most: int = 4) -> tuple[float, ...]:
    """Reward bins: 0 and what the things are worth.

    For a Gymnasium world, of which nothing is known, from random lifetimes: 0, and on either side the rewards seen if these are
    at most so many, else as many evenly spaced ones up to the largest seen. They reach at least to 1, because whoever learns
    earns more than whoever does not; what lies beyond them counts as the outermost. -1, 0, 1 if nothing was earned at all.
    """
    if not world.gym_id:
        return tuple(sorted({0.0, *map(float, world.worths)}))
    worlds = make_worlds(world, lifetimes, "train", seed=0)
    seen = play(worlds, RandomAgent(0, world.sizes.actions)).reward
    if not seen.any():
        return TransitionSettings().reward_bins
    bins = {0.0, max(1.0, float(seen.max()))}
    for kinds in (seen[seen > 0].unique().tolist(), seen[seen < 0].unique().tolist()):
        if len(kinds) > most:
            largest = math.copysign(max(1.0, *map(abs, kinds)), kinds[0])
            kinds = [largest * k / most for k in range(1, most + 1)]
        bins |= set(kinds)
    return tuple(sorted({float(str(np.float32(x))) for x in bins}))  # the shortest decimals that are these numbers


def resume_command(run: Positional[Path], updates: int | None = None) -> None:
    """Go on with a run as if it had never stopped.

    Args:
        run: Folder of the run.
        updates: Planned end in updates of context engine and value; the run's own if not given. Learning rates and
            exploration then fall evenly up to the new end.
    """
    folder, changes = RunFolder(run), {} if updates is None else {"training": {"updates": updates}}
    settings = folder.settings(Settings(), **changes)
    with Processes.of_torchrun() as processes, folder.locked() if processes.first else nullcontext():
        learner = Learner(settings, device_of(settings.device), processes)
        go_on(folder, learner)
        train_and_evaluate(folder, learner)


def go_on(run: RunFolder, learner: Learner) -> None:
    """Restore a learner from a run's checkpoint, with the learner's own settings; UserError if they do not fit together."""
    state, logged = run.load()
    restore(lambda: learner.load_state_dict(state, run.blocks), run.folder)
    if learner.update > learner.total:
        raise UserError(f"{run.folder} is already past {learner.training.updates} updates: give a higher --updates.")
    if learner.processes.first:
        if run.metrics.exists():
            # The lines after the checkpoint will be written again.
            os.truncate(run.metrics, min(logged, run.metrics.stat().st_size))
        write_json(dataclasses.asdict(learner.settings), run.folder / "config.json")


def restore(load: Callable[[], object], folder: Path) -> None:
    """Call `load`; UserError if what the run's folder holds does not fit its configuration or is damaged."""
    try:
        load()
    except (RuntimeError, KeyError, EOFError, FileNotFoundError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{folder} does not fit together ({reason}): a file of it is damaged or was edited.") from error


def load_system(folder: Path, device: str | None = None) -> tuple[System, dict]:
    """The trained agent's parts from a run's checkpoint, on the run's own device if none is named; the learner's state."""
    run = RunFolder(folder)
    settings = run.settings(Settings(), **({} if device is None else {"device": device}))
    state, _ = run.load()
    system = System(settings, device_of(settings.device))
    restore(lambda: system.load(state["modules"]), folder)
    return system, state


def evaluate_command(
    run: Positional[Path], lifetimes: int | None = None, split: Literal["validation", "test"] = "test",
    device: str | None = None,
) -> None:  # fmt: skip
    """Evaluate a trained run on held-out tasks again; the result goes to its folder and to the screen.

    Args:
        run: Folder of the run.
        lifetimes: Held-out lifetimes, at least 2; those of the run's final evaluation if not given.
        split: Which tasks.
        device: Where to compute; where the run was trained if not given.
    """
    system, state = load_system(run, device)
    lifetimes = system.settings.training.evaluation_lifetimes if lifetimes is None else lifetimes
    require("lifetimes", lifetimes, 2, 10**6)
    result = evaluate(system, split, lifetimes, env_steps=state["counters"][2])
    path = run / f"evaluation-{split}-{lifetimes}.json"
    write_json(result, path)
    print(report(result) + f"\nwritten to {path}")


def watch_command(run: Positional[Path], seed: int = 0, fps: int = 4, output: Path | None = None) -> None:
    """Watch the agent live a held-out lifetime in a validation task: in a window where there is a display and pygame, else as
    an animation that is written to a file.

    Args:
        run: Folder of the run.
        seed: Which lifetime, at least 0.
        fps: Steps a second, 1 to 100.
        output: File, .gif or .mp4, to write instead of opening a window; lifetime-<seed>.gif in the run's folder where there
            is no display.
    """
    require("seed", seed, 0, 10**9)
    require("fps", fps, 1, 100)
    if output is not None and output.exists():
        raise UserError(f"{output} exists: name another --output.")
    system, _ = load_system(run)
    display = sys.platform in ("win32", "darwin") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if output is None and display and importlib.util.find_spec("pygame") and show_lifetime(*lifetime(system, seed), fps):
        return
    path = output or run / f"lifetime-{seed}.gif"
    film(system, path, seed, fps)
    print(f"written to {path}")


def references_command(
    run: Positional[Path], lifetimes: int = 1024, rollouts: int = 64, split: Literal["validation", "test"] = "test"
) -> None:  # fmt: skip
    """Let every reference agent live in a run's world, the costly Bayes-adaptive rollouts too; computed once for a world.

    The result is kept in references/ beside the run, where `report` finds it.

    Args:
        run: Folder of the run; only its world counts.
        lifetimes: Held-out lifetimes, at least 2.
        rollouts: Imagined lifetimes for each action of the Bayes-adaptive agent; 0 to leave it out.
        split: Which tasks.
    """
    require("lifetimes", lifetimes, 2, 10**6)
    require("rollouts", rollouts, 0, 10**6)
    world = RunFolder(run).settings(Settings()).world
    if world.gym_id:
        raise UserError(f"{world.gym_id} has no exact solution, so no references but the random agent, which evaluate shows.")
    if rollouts and len(space_of(world)) > 1000:
        raise UserError(f"rollouts over {len(space_of(world)):,} rules would take days: leave them out by --rollouts 0.")
    asked = {"world": dataclasses.asdict(world), "split": split, "lifetimes": lifetimes, "rollouts": rollouts}
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
    path = run.parent / "references" / f"{split}-{digest}.json"
    if not path.exists():
        lived = references_in(world, lifetimes, split, torch.device("cpu"), rollouts)
        path.parent.mkdir(exist_ok=True)
        write_json(asked | {"agents": {name: summary(one) for name, one in lived.items()}}, path)
    for name, one in json.loads(path.read_text())["agents"].items():
        print(f"{name:18s} {shown(one['return_mean'], one['return_mean_ci95'], 2)}")
    print(f"in {path}")


def report_command(runs: Positional[tuple[Path, ...]], output: Path | None = None) -> None:
    """Join the final evaluations of runs into tables (Markdown, JSON) and figures; runs that differ in more than the
    seed stand apart.

    Args:
        runs: Folders of finished runs.
        output: A new folder; runs/report-<time> if not given.
    """
    output = output or Path("runs") / f"report-{time.strftime('%Y%m%d-%H%M%S')}"
    if not runs or output.exists():
        raise UserError(f"{output} exists: name another --output." if runs else "name at least one finished run.")
    groups: dict[str, list[dict]] = {}
    for run in runs:
        settings = RunFolder(run).settings(Settings())
        try:
            result, timing = (json.loads((run / name).read_text()) for name in ("evaluation.json", "timing.json"))
            result |= {"seconds": timing["total"], "references": known_references(run, settings.world)}
            result["said"] = {key: result[key] for name in told(result) for key in (name, f"{name}_ci95")}
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{run} has no final evaluation of this version: make it with python3 main.py resume {run}.") from error
        groups.setdefault(described(settings), []).append(result)
    output.mkdir(parents=True)
    joined, text = {}, []
    for number, (name, results) in enumerate(groups.items()):
        results.sort(key=lambda result: result["seed"])
        joined[name] = statistics(*results) | {"seeds": [result["seed"] for result in results]}
        joined[name]["runs"] = [result["said"] for result in results]
        text.append(f"## {name}\n\n{result_table(results, joined[name])}\n\n{episode_table(results)}\n")
        draw_adaptation(results, output / f"adaptation-{number}.png")
        draw_episodes(results, output / f"episodes-{number}.png")
        text.append(f"![reward by step](adaptation-{number}.png)\n![by episode](episodes-{number}.png)\n")
    (output / "report.md").write_text("\n".join(text))
    write_json(joined, output / "report.json")
    print("\n".join(text) + f"\nwritten to {output}")


def described(settings: Settings) -> str:
    """A preset and what a run changed in it, but the seed and the device: runs that share it belong together."""
    base = with_preset(Settings(), settings.preset)
    changed = [
        f"{section}.{name} {value}"
        for section, values in dataclasses.asdict(settings).items() if isinstance(values, dict)
        for name, value in values.items() if value != getattr(getattr(base, section), name)
    ]  # fmt: skip
    return ", ".join([settings.preset, *changed, *([f"begun from {settings.init_from}"] if settings.init_from else [])])


def known_references(run: Path, world: WorldSettings) -> dict | None:
    """The largest test of the references in this run's world that `references` has left beside it."""
    found = [json.loads(path.read_text()) for path in sorted((run.parent / "references").glob("test-*.json"))]
    same = [one for one in found if one["world"] == json.loads(json.dumps(dataclasses.asdict(world)))]
    return max(same, key=lambda one: (one["lifetimes"], one["rollouts"]), default=None)


COMMANDS = {
    "evaluate": evaluate_command, "resume": resume_command, "watch": watch_command, "references": references_command,
    "report": report_command,
}  # fmt: skip


def as_program(program: str, call: Callable, *arguments: Any, **options: Any) -> None:
    """Call it as a program: exit code 2 and one sentence for what the user can mend, 130 for Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born deaf to it
    try:
        call(*arguments, **options)
    except (UserError, ValueError, OSError, WorldError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def require_one_process(command: str) -> None:
    """Refuse a command that several processes would only do several times."""
    raise UserError(f"{command} runs in one process: start it with python3 instead of torchrun, which is for train and resume.")


def main() -> None:
    """The command line."""
    name, *arguments = sys.argv[1:] or ["train"]
    if name in COMMANDS and name != "resume" and distributed.is_torchelastic_launched():
        as_program("main.py", require_one_process, name)
    if name in COMMANDS:
        as_program("main.py", tyro.cli, COMMANDS[name], args=arguments, prog=f"main.py {name}")
    else:
        as_program("main.py", train_command, arguments if name == "train" else [name, *arguments])
    if distributed.is_torchelastic_launched():  # all is done and written, but gloo's threads may abort an interpreter that ends
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
