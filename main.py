"""Meta-train an agent that infers hidden rules from pixels; evaluate, resume and watch it.

    python3 main.py [train] [--preset NAME] [--config FILE.json] [--seed N] [--SECTION.NAME VALUE ...]
    python3 main.py evaluate RUN [--lifetimes N] [--split validation|test]
    python3 main.py resume RUN [--updates N]
    python3 main.py watch RUN [--seed N]
    torchrun --standalone --nproc-per-node 2 main.py [train or resume as above]

The data flow: the world's pictures -> VAE codes -> which outcome happened -> episodic memory -> GRU belief and context
-> FiLM in VAE, outcome prior, reward_and_termination and value -> search under the present belief -> action.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import importlib.util
import json
import math
import os
import pickle
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.stats
import torch
import tyro
from torch import distributed
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tyro.conf import Positional

from agent import (
    AgentController, Learner, Trajectories, Planner, PlannerSettings, RandomAgent, System, TrainingSettings, rollout, infer_reward_bins,
)  # fmt: skip
from context_engine import (
    ActionValues, AppearanceEngine, ContextInferenceEngine, ContextSettings, ExactFilter, KnownRuleAgent, ThompsonAgent,
)  # fmt: skip
from environment import WORLDS, ExternalEnvError, WorldSettings, make_worlds, rule_space_of
from memory import MemorySettings, Processes, RunFolder, UserError, merge, require, write_json
from transition_model import TransitionModel, TransitionSettings, Value
from world_model import VAE, VAESettings


EVALUATION_SEED = 10**18  # above every training seed: evaluation has worlds of its own
EVALUATION_SEEDS = {"validation": EVALUATION_SEED, "test": EVALUATION_SEED + 1}
PRESETS: dict[str, dict] = {
    "default": {},
    "switching": {"training": {"batch": 24, "value_batch": 8, "evaluation_lifetimes": 1024}},
    "tinted": {
        "vae": {"encoder_lr": 5e-4, "final_lr_scale": 0.05},
        "context": {"appearance": 16},
        "training": {"perception_updates": 1500, "evaluation_lifetimes": 1024},
    },
    "large": {},
    "everything": {
        "vae": {"num_codes": 7, "cluster_radius": 0.25},
        "transition": {"num_effects": 48, "reward_bins": (-1.0, 0.0, 0.5, 1.0), "warmup_updates": 600, "annealed_updates": 300},
        "training": {
            "updates": 2500, "batch": 32, "value_batch": 8, "effect_batch": 4, "effect_updates": 1200, "evaluation_lifetimes": 256,
        },
    },
    "gym": {  # for a world of other people's
        "world": {"lifetime": 256, "cell": 8, "slip": 0.0, "noise": 0.0},
        "memory": {"budget_mb": 512.0},
        "vae": {"num_codes": 12, "cluster_radius": 0.05, "encoder_lr": 2e-5},
        "training": {
            "updates": 600, "envs": 16, "random_lifetimes": 128, "batch": 12, "value_batch": 4, "effect_batch": 2,
            "evaluation_lifetimes": 64,
        },
    },
    "quick": {
        "transition": {"warmup_updates": 150, "annealed_updates": 100},
        "planner": {"discount": 0.9},
        "training": {
            "updates": 280, "envs": 32, "random_lifetimes": 256, "perception_updates": 100, "effect_updates": 270,
            "batch": 40, "value_batch": 8, "value_from": 100, "plan_from": 112, "final_lr_scale": 0.3, "evaluation_lifetimes": 512,
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
    """Folder of a run to begin with the weights of, perception and num_effects learnt; all sizes must be the same."""
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
        picture_bytes = 2 * math.prod(self.world.sizes.obs_shape) * self.world.lifetime * self.training.envs  # and next_obs
        if picture_bytes > self.memory.budget_mb * 2**20:
            raise ValueError(
                f"memory.budget_mb is {self.memory.budget_mb:g}, but {self.training.envs} lifetimes may take "
                f"{picture_bytes / 2**20:.0f} MB: raise memory.budget_mb or lower training.envs."
            )


def require_room(world: WorldSettings, lifetimes: int, numbers: int = 1 << 28) -> None:
    """Raise ValueError where the exact filter over all rules of so many lifetimes would need several gigabytes."""
    rules = 0 if world.gym_id else len(rule_space_of(world))
    if rules * lifetimes > numbers:
        raise ValueError(
            f"this world has {rules:,} rules, over which the exact filter cannot follow {lifetimes:,} lifetimes at once: evaluate on "
            f"at most {numbers // rules:,} (training.evaluation_lifetimes, or --lifetimes)."
        )


def with_preset(settings: Settings, preset: str) -> Settings:
    """Settings with what a preset, one of PRESETS, changes in them."""
    return merge(settings, {"preset": preset, "world": WORLDS.get(preset, {})} | PRESETS[preset])


def get_device(name: str) -> torch.device:
    """The torch device called `name`, of several GPUs the one for this process; UserError if this machine lacks it."""
    try:
        return torch.empty(0, device=f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device is {name!r}, which this machine does not offer: try --device cpu.") from error


def build_system(settings: Settings, engine: type = ContextInferenceEngine, planner: type = Planner) -> System:
    """Every part of the agent, wired; the data flow is at the top of this file.

    Args:
        settings: of the run; the seed decides the initial weights.
        engine, planner: classes of one's own in the place of ours, built from the same arguments.
    """
    s, sizes = settings, settings.world.sizes
    unknown = set(s.world.reward_values) - set(s.transition.reward_bins)
    if unknown and not s.world.gym_id:
        bins = s.transition.reward_bins
        worth = f"{min(unknown):g}: add it, or leave the bins out"
        raise ValueError(f"transition.reward_bins is {bins}, but world.reward_values has {worth}.")
    torch.manual_seed(s.seed)
    device = get_device(s.device)
    perception = dataclasses.replace(s.vae, patch=s.vae.patch or s.world.cell)
    padding = s.transition.padding or ("zeros" if s.world.edges == "block" else "circular")
    dynamics = dataclasses.replace(s.transition, padding=padding)
    codes, num_effects, context = s.vae.num_codes, s.transition.num_effects, s.context.context

    vae = VAE(perception, obs_shape=sizes.obs_shape, context_dim=context).to(device)
    transition = TransitionModel(dynamics, codes=codes, grid=vae.grid, context_dim=context).to(device)
    context_engine = engine(s.context, actions=sizes.actions, num_effects=num_effects, codes=codes).to(device)
    appearance = None
    if s.context.appearance:
        appearance = AppearanceEngine(s.context, pixels=3 * perception.patch**2).to(device)
    value = Value(codes=codes, grid=vae.grid, context_dim=context, keypoints=s.planner.keypoints, width=s.planner.width).to(device)
    target_value = copy.deepcopy(value).requires_grad_(False)  # acts, and makes the value's targets
    return System(
        settings=s, device=device, vae=vae, transition=transition, engine=context_engine, appearance=appearance, value=value,
        target_value=target_value, planner=planner(s.planner, transition=transition, value=target_value),
    )  # fmt: skip


def lifetime(system: System, seed: int) -> tuple[Iterator[LifetimeFrame], str]:
    """The moments of one lifetime of the agent in a validation task, chosen by `seed`, as it lives them; what is hidden there."""
    settings = system.settings
    world = make_worlds(settings.world, 1, "validation", EVALUATION_SEED + 100 + seed, system.device)
    agent, first = system.controller(), world.reset()
    agent.reset(first)

    def live() -> Iterator[LifetimeFrame]:
        earned = 0.0
        for step in range(settings.world.lifetime):
            action = agent.act()
            with torch.no_grad():
                rebuilt = system.vae.decode(agent.codes, agent.visual_context)[0].clamp(0, 1)
                belief = system.transition.log_prior(system.engine.context(agent.belief)[:, :-1])[0].exp()
            seen = (x.cpu().numpy() for x in (agent.obs[0], rebuilt, belief))
            yield *seen, f"step {step}   action {int(action)}   return {earned:+g}"
            happened = world.step(action)
            agent.observe(action, happened)
            earned += float(happened.reward)

    return live(), "hidden rule: " + world.describe_rule(0).replace("\n", "; ")


def animate_lifetime(system: System, path: Path, seed: int, fps: int = 4) -> None:
    """Draw a `lifetime` to `path` (GIF or MP4)."""
    moments, hidden = lifetime(system, seed)
    save_animation(moments, hidden, path, fps)


def train(learner: Learner, run: RunFolder | None = None, until: int | None = None, checkpoints: bool = True) -> bool:
    """Meta-train update by update, up to the planned end or `until`; False if Ctrl-C stopped it before.

    With a run, metrics and, unless `checkpoints` is off, checkpoints are written. The first Ctrl-C ends the present update and
    saves; a second one stops at once. Of several processes all call this, and the first one writes.

    Raises:
        UserError: a loss is not finite.
    """
    t, store, processes = learner.training, learner.store, learner.processes
    end, stopped, started = until or learner.total, False, time.perf_counter() - learner.seconds.get("total", 0.0)
    writes = run is not None and processes.is_main
    board = SummaryWriter(run.folder / "tensorboard", purge_step=learner.update + 1) if writes else None
    quiet = not (writes and sys.stderr.isatty())
    bar = tqdm(total=learner.total, initial=learner.update, unit="update", disable=quiet, dynamic_ncols=True)
    with ctrl_c() as asked, bar, board or nullcontext():
        while learner.update < end and not stopped:
            phase, update = learner.phase()
            learner.set_learning_rates(phase, update)

            if phase == "perception":
                if update == 0:
                    learner.collect_random_lifetimes()
                learner.learn_perception(store.sample(t.batch, learner.sampler))

            elif phase == "effects":
                if update == 0:  # perception is new: so is all that was made by it
                    learner.merge_codes()
                    learner.reencode_all()
                learner.learn_effects(update)

            else:
                if update == 0:  # and the num_effects are
                    learner.reencode_all()
                if update % (t.collect_every if update >= t.plan_from else 4 * t.collect_every) == 0:
                    learner.collect(learner.exploration(update))
                    learner.reencode(store.oldest())
                if update % t.effect_every == 0:
                    learner.learn_effects(t.effect_updates + update)
                rows = store.sample(t.batch, learner.sampler)
                experience = store.experience.rows(rows.to(learner.device))
                beliefs = learner.learn_context(experience)
                if update % t.perception_every == 0:
                    learner.learn_perception(rows, beliefs)
                if update >= t.value_from:
                    few = slice(t.value_batch)
                    learner.learn_value(experience.rows(few), beliefs[few])

            learner.update += 1
            bar.update()
            stopped = processes.any_rank(bool(asked))  # once an update, so that all stop after the same one, and save
            over = learner.update == learner.total
            logs, saves = over or learner.update % t.log_every == 0, over or stopped or learner.update % t.checkpoint_every == 0
            if logs or saves:  # seldom, because to look at a number waits for the device
                learner.average_metrics()
                if wrong := not_finite(learner):
                    where = f"; {run.folder} is as it was at its last checkpoint" if run else ""
                    raise UserError(
                        f"{wrong[0]} is not finite at update {learner.update}, so the training stopped{where}. Try lower learning rates."
                    )
            if logs and writes:
                log(run, board, bar, learner)
            if saves and run is not None and checkpoints:
                learner.seconds["total"] = time.perf_counter() - started
                run.save(learner)
    return not stopped


@contextmanager
def ctrl_c() -> Iterator[list]:
    """A list that is empty until Ctrl-C is pressed; a second one stops at once."""
    asked: list[bool] = []

    def stop(*_: Any) -> None:
        asked.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, previous)


def not_finite(learner: Learner) -> list[str]:
    """Names of the metrics that are not finite."""
    return [name for name, value in learner.metrics.items() if not math.isfinite(value)]


def log(run: RunFolder, board: SummaryWriter, bar: tqdm, learner: Learner) -> None:
    """One line to metrics.jsonl, the same to TensorBoard, the gist to the progress bar."""
    values = write_metrics(run, learner)
    for name, value in values.items():
        board.add_scalar(f"losses/{name}" if "/" in name else f"charts/{name}", value, learner.update)
    format_ci = ("return", "vae/reconstruction", "effects/marginal", "context/filter", "value/value")
    bar.set_postfix({name: f"{values[name]:.2f}" for name in format_ci if name in values})


def write_metrics(run: RunFolder, learner: Learner) -> dict[str, float]:
    """Append one line to metrics.jsonl; the values in it."""
    values = {name: float(value) for name, value in learner.metrics.items()}
    with open(run.metrics, "a") as file:
        file.write(json.dumps({"update": learner.update, "env_steps": learner.env_steps} | values) + "\n")
    return values


def train_and_evaluate(run: RunFolder, learner: Learner) -> None:
    """Train to the end, then, in the first process, write the final evaluation and the pictures."""
    first = learner.processes.is_main
    if first:
        print(f"training {run.folder}", flush=True)
    if not train(learner, run):
        if first:
            print(f"stopped at update {learner.update} and saved: python3 main.py resume {run.folder} goes on.", flush=True)
        sys.exit(130)
    if not first:
        return
    write_json(learner.seconds, run.folder / "timing.json")
    result = evaluate(learner.system, "test", learner.settings.training.evaluation_lifetimes, env_steps=learner.env_steps)
    write_json(result, run.folder / "evaluation.json")
    plot_adaptation([result], run.folder / "adaptation.png")
    animate_lifetime(learner.system, run.folder / "lifetime.gif", seed=0)
    print(report(result) + f"\ntrained for {learner.seconds['total']:.0f} s; results and pictures are in {run.folder}")


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
    settings = settings if chosen.bins else with_reward_bins(settings, said)
    if distributed.is_torchelastic_launched() and not parsed.run:
        raise UserError("name the run, so that all processes share it and a restart goes on with it: torchrun ... -- main.py --run NAME.")
    named = run_named(parsed.run, settings) if parsed.run else None
    with Processes.from_torchrun() as processes:
        learner = Learner(build_system(settings), processes)  # refuses what does not fit, before anything is written
        if settings.init_from:
            learner.warm_start(RunFolder(Path(settings.init_from)))
        run = named or RunFolder.new(settings)
        with run.begun(settings) if processes.is_main else nullcontext():
            if run.checkpoint.exists():
                restore_checkpoint(run, learner)
            elif processes.is_main:
                run.remove_stale()
            processes.barrier()
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


def with_reward_bins(settings: Settings, said: dict) -> Settings:
    """`settings` with the reward bins of their world, unless what a file said has bins for that very world."""
    if "reward_bins" in said.get("transition", {}) and said.get("world", {}).get("gym_id", "") == settings.world.gym_id:
        return settings
    return merge(settings, {"transition": {"reward_bins": infer_reward_bins(settings.world)}})


def resume_command(run: Positional[Path], updates: int | None = None) -> None:
    """Go on with a run as if it had never stopped.

    Args:
        run: Folder of the run.
        updates: Planned end in updates of context engine and value; the run's own if not given. Learning rates and
            exploration then fall evenly up to the new end.
    """
    folder, changes = RunFolder(run), {} if updates is None else {"training": {"updates": updates}}
    settings = folder.settings(Settings(), **changes)
    with Processes.from_torchrun() as processes, folder.locked() if processes.is_main else nullcontext():
        learner = Learner(build_system(settings), processes)
        restore_checkpoint(folder, learner)
        train_and_evaluate(folder, learner)


def restore_checkpoint(run: RunFolder, learner: Learner) -> None:
    """Restore a learner from a run's checkpoint, with the learner's own settings; UserError if they do not fit together."""
    state, logged = run.load()
    restore(lambda: learner.load_state_dict(state, run.blocks), run.folder)
    if learner.update > learner.total:
        raise UserError(f"{run.folder} is already past {learner.training.updates} updates: give a higher --updates.")
    if learner.processes.is_main:
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
    system = build_system(settings)
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
    animate_lifetime(system, path, seed, fps)
    print(f"written to {path}")


def bootstrap_ci(statistic: Callable[..., np.ndarray], *strata: np.ndarray) -> list[float | None]:
    """95% percentile bootstrap bootstrap_ci of `statistic`, stratified by run (Agarwal et al., "Statistical Precipice", 2021).

    Runs are evaluated in the same worlds. So lifetimes are drawn once for all strata and all quantities together:
    whatever luck the runs share must not count as evidence as many times as there are runs.

    Args:
        statistic: of k arrays (..., runs * n), reduces their last axis.
        strata: (k, n) each, k quantities of n lifetimes; one stratum for each run.

    Returns:
        low and high; None where the statistic has no number, such as a ratio_of_means to nothing.
    """
    together = np.stack(strata, 1)  # (k, runs, n)

    def of_rows(rows: np.ndarray, axis: int) -> np.ndarray:
        drawn = np.moveaxis(together[:, :, rows], 1, -2)  # (k, ..., runs, n)
        return statistic(*drawn.reshape(*drawn.shape[:-2], -1))

    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings(action="ignore"):
        found = scipy.stats.bootstrap(
            [np.arange(together.shape[-1])], of_rows, n_resamples=2000, batch=100, method="percentile", vectorized=True,
            rng=np.random.default_rng(0),
        )  # fmt: skip
    ends = found.confidence_interval.low, found.confidence_interval.high
    return [float(end) if np.isfinite(end) else None for end in ends]


def mean(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    return x.mean(-1)


def interquartile_mean(x: np.ndarray) -> np.ndarray:
    """IQM over the last axis: the mean of the middle half."""
    return scipy.stats.trim_mean(x, 0.25, axis=-1)


def ratio_of_means(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of two means over the last axis."""
    return x.mean(-1) / y.mean(-1)


def normalised(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Where the mean of x lies between those of low (0) and high (1)."""
    return (x.mean(-1) - low.mean(-1)) / (high.mean(-1) - low.mean(-1))


def probability_of_improvement(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Probability that x is above y in the same lifetime, a tie counting half."""
    return (x > y).mean(-1) + 0.5 * (x == y).mean(-1)


STATISTICS: dict[str, tuple[Callable[..., np.ndarray], str, tuple[str, ...]]] = {
    "return_mean": (mean, "returns", ("agent",)),
    "return_iqm": (interquartile_mean, "returns", ("agent",)),
    "normalised": (normalised, "returns", ("agent", "random", "known_rule")),
    "of_thompson": (ratio_of_means, "returns", ("agent", "thompson")),
    "probability_of_improvement": (probability_of_improvement, "returns", ("agent", "thompson")),
    "late_of_known_rule": (ratio_of_means, "late_returns", ("agent", "known_rule")),
}
"""What is said of an agent beside the references: the statistic, of which quantity of a lifetime, and of whom."""


def available_metrics(result: dict[str, Any]) -> list[str]:
    """Which of STATISTICS an evaluation can tell: those whose agents lived."""
    return [name for name, (_, quantity, whose) in STATISTICS.items() if set(whose) <= set(result[quantity])]


def statistics(*results: dict[str, Any]) -> dict[str, Any]:
    """Every one of STATISTICS with its bootstrap_ci, of one evaluation or of several runs' in the same worlds together."""
    said = {}
    for name in available_metrics(results[0]):
        statistic, quantity, whose = STATISTICS[name]
        strata = [np.array([result[quantity][agent] for agent in whose], float) for result in results]
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(statistic(*np.concatenate(strata, -1)))
        said[name], said[f"{name}_ci95"] = value if np.isfinite(value) else None, bootstrap_ci(statistic, *strata)
    return said


def compare(lived: dict[str, Trajectories]) -> dict[str, Any]:
    """Agents that lived the same lifetimes: a `summary` of each, `returns` and `late_returns` (of the last eighth of the
    steps) of every lifetime, and the agent's `statistics` beside random, thompson and known_rule."""
    late = -max(1, lived["agent"].reward.shape[1] // 8)
    result = {name: summary(one) for name, one in lived.items()} | {
        "returns": {name: one.reward.sum(1).tolist() for name, one in lived.items()},
        "late_returns": {name: one.reward[:, late:].sum(1).tolist() for name, one in lived.items()},
    }
    return result | statistics(result)


def summary(lifetimes: Trajectories) -> dict[str, Any]:
    """Return (mean, interquartile mean, intervals) and counts a lifetime; `by_step` is each step's mean
    reward, `by_step_error` its standard error; `by_episode` see there."""
    reward = lifetimes.reward.double()
    returns = reward.sum(1).numpy()
    return {
        "return_mean": float(returns.mean()),
        "return_iqm": float(interquartile_mean(returns)),
        "return_mean_ci95": bootstrap_ci(mean, returns[None]),
        "return_iqm_ci95": bootstrap_ci(interquartile_mean, returns[None]),
        "by_step": reward.mean(0).tolist(),
        "by_step_error": (reward.std(0) / len(returns) ** 0.5).tolist(),
        "goals": float((reward > 0).double().sum(1).mean()),
        "hazards": float((reward < 0).double().sum(1).mean()),
        "timeouts": float(lifetimes.truncated.double().sum(1).mean()),
        "by_episode": by_episode(lifetimes),
    }


def by_episode(lifetimes: Trajectories) -> dict[str, list[float]]:
    """Adaptation from episode to episode, for those numbers of which nine lifetimes in ten saw the end.

    Shares of the first, second, ... episodes that ended on the goal (`success`), the hazard (`hazard`) or by the time
    limit (`timeout`), and the mean steps of those that reached the goal (`steps_to_goal`, 0 where none did).
    """
    ended = lifetimes.terminated | lifetimes.truncated
    row, step = ended.nonzero(as_tuple=True)
    number = (ended.long().cumsum(1) - 1)[row, step]
    begun = torch.cat([torch.zeros(1, dtype=torch.int64), step[:-1] + 1]).masked_fill(number == 0, 0)[: len(step)]
    count = lambda which: number[which].bincount(minlength=ended.shape[1]).double()  # noqa: E731
    reached = lifetimes.reward[row, step] > 0
    goals, hazards = count(reached), count(lifetimes.reward[row, step] < 0)
    spent = number[reached].bincount((step - begun + 1)[reached].double(), minlength=ended.shape[1])
    all_, known = count(slice(None)), int((count(slice(None)) >= 0.9 * len(ended)).sum())
    shares = {
        "success": goals / all_, "hazard": hazards / all_, "timeout": count(lifetimes.truncated[row, step]) / all_,
        "steps_to_goal": spent / goals.clamp_min(1),
    }  # fmt: skip
    return {name: share[:known].tolist() for name, share in shares.items()}


def format_ci(value: float | None, ends: Sequence[float | None], digits: int) -> str:
    """A figure with its 95% bootstrap_ci; a dash where there is no number."""
    if None in (value, *ends):
        return "-" if value is None else f"{value:.{digits}f}"
    return f"{value:.{digits}f} [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"


AGENTS = {"agent": "agent", "thompson": "Thompson sampling", "known_rule": "known rule", "random": "random"}


def agents_present(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Those of AGENTS that lived: a world of other people's has no exact solution."""
    return {name: label for name, label in AGENTS.items() if name in results[0]}


def report(result: dict[str, Any]) -> str:
    """An evaluation in a few lines."""
    lines = [f"{result['lifetimes']} lifetimes on the {result['split']} split, return per lifetime [95% bootstrap_ci]:"]
    for name in agents_present([result]):
        lines.append(f"  {name:18s} {format_ci(result[name]['return_mean'], result[name]['return_mean_ci95'], 2)}")
    for name in available_metrics(result):
        if not name.startswith("return"):
            lines.append(f"  {name:18s} {format_ci(result[name], result[name + '_ci95'], 3)}")
    nll = result["belief_nll"]
    if nll["late_excess"] is not None:
        lines.append(f"  belief: {nll['late_excess']:+.3f} nll a step over the exact filter from step {nll['late']} on")
    return "\n".join(lines)


def plot_curve(axes: Any, by_step: Sequence[float], error: Sequence[float], label: str, bin_steps: int = 4) -> None:
    """Reward by step of the lifetime, averaged over `bin_steps`, with the 95% bootstrap_ci that standard errors `error` give."""
    steps = len(by_step) // bin_steps * bin_steps
    binned = np.reshape(by_step[:steps], (-1, bin_steps)).mean(1)
    width = 1.96 * np.sqrt(np.square(error[:steps]).reshape(-1, bin_steps).sum(1)) / bin_steps
    at = (np.arange(len(binned)) + 0.5) * bin_steps
    (line,) = axes.plot(at, binned, label=label)
    axes.fill_between(at, binned - width, binned + width, alpha=0.2, color=line.get_color())
    axes.set(xlabel="step of the lifetime", ylabel="reward a step")


def plot_adaptation(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Reward by step of the lifetime for every agent, averaged over the evaluations, to `path` (PNG); see `plot_curve`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes, runs = figure.subplots(), len(results)
    for name, label in agents_present(results).items():
        rewards = np.mean([result[name]["by_step"] for result in results], 0)
        error = np.sqrt(np.square([result[name]["by_step_error"] for result in results]).sum(0)) / runs
        returns = np.mean([result[name]["return_mean"] for result in results])
        plot_curve(axes, rewards, error, f"{label}: {returns:.2f}")
    title = f"{results[0]['lifetimes']} lifetimes, {results[0]['split']} tasks" + (f", {runs} runs" if runs > 1 else "")
    axes.set_title(title)
    axes.legend(title="return per lifetime", loc="lower right", fontsize="small")
    figure.savefig(path, dpi=120)


LifetimeFrame = tuple[np.ndarray, np.ndarray, np.ndarray, str]
"""Of one step: the picture seen and its reconstruction (H, W, 3), the belief (action, outcome) as probabilities, a heading."""


class LifetimeFigure:
    """A figure that shows one moment of a lifetime after the other, with a caption under all of them."""

    def __init__(self, first: LifetimeFrame, caption: str) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(6, 5.6), dpi=100)
        self.canvas = FigureCanvasAgg(self.figure)
        parts = self.figure.subplot_mosaic([["seen", "rebuilt"], ["belief", "belief"]], height_ratios=[3, 1.5])
        self.figure.subplots_adjust(left=0.08, right=0.97, top=0.88, bottom=0.13, hspace=0.2, wspace=0.06)
        for name, title in (("seen", "seen"), ("rebuilt", "reconstruction")):
            parts[name].set(title=title, xticks=[], yticks=[])
        title = "belief: which outcome each action has"
        parts["belief"].set(title=title, ylabel="action", xticks=[], yticks=range(len(first[2])))
        self.images = [parts[name].imshow(image) for name, image in (("seen", first[0]), ("rebuilt", first[1]))]
        self.images.append(parts["belief"].imshow(first[2], vmin=0, vmax=1, aspect="auto", cmap="magma"))
        self.heading = self.figure.suptitle(first[3])
        self.figure.text(0.5, 0.03, caption, ha="center", fontsize="small")

    def show(self, moment: LifetimeFrame) -> None:
        """Put another moment in the place of the last."""
        for image, content in zip(self.images, moment):
            image.set_data(content)
        self.heading.set_text(moment[3])

    def picture(self) -> np.ndarray:
        """What it shows now, (height, width, 3) uint8."""
        self.canvas.render()
        return np.asarray(self.canvas.buffer_rgba())[..., :3]


def save_animation(moments: Iterable[LifetimeFrame], caption: str, path: Path, fps: int) -> None:
    """A lifetime as an animation to `path`, .gif or .mp4, atomically; it is lived when the ending is known to be one of them.

    Raises:
        UserError: another ending, or an MP4 where ffmpeg is missing.
    """
    import matplotlib
    from matplotlib import animation

    if path.suffix == ".mp4":
        if importlib.util.find_spec("imageio_ffmpeg"):  # brings an ffmpeg along
            import imageio_ffmpeg

            matplotlib.rcParams["animation.ffmpeg_path"] = imageio_ffmpeg.get_ffmpeg_exe()
        if not animation.FFMpegWriter.isAvailable():
            raise UserError("an MP4 needs ffmpeg: pip install imageio-ffmpeg, or name a file that ends in .gif.")
    elif path.suffix != ".gif":
        raise UserError(f"{path} ends neither in .gif nor in .mp4: choose one of them.")
    moments = list(moments)
    figure = LifetimeFigure(moments[0], caption)
    writer = animation.FFMpegWriter(fps=fps) if path.suffix == ".mp4" else animation.PillowWriter(fps=fps)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    animate_lifetime = animation.FuncAnimation(figure.figure, figure.show, moments, init_func=lambda: None, cache_frame_data=False)
    animate_lifetime.save(temporary, writer=writer, dpi=70)
    temporary.replace(path)


def show_lifetime(moments: Iterator[LifetimeFrame], caption: str, fps: int) -> bool:
    """A lifetime in a window while it is lived, until its end or until the window is closed; False, and nothing is lived, if the
    display turns out to be none. Needs pygame, which Gymnasium's human mode uses too."""
    import pygame

    try:
        pygame.display.init()
    except pygame.error:
        return False
    if pygame.display.get_driver() in ("offscreen", "dummy") and "SDL_VIDEODRIVER" not in os.environ:
        return False
    clock, screen, figure = pygame.time.Clock(), None, None
    for moment in moments:
        figure = figure or LifetimeFigure(moment, caption)
        figure.show(moment)
        picture = figure.picture()
        screen = screen or pygame.display.set_mode(picture.shape[1::-1])
        screen.blit(pygame.surfarray.make_surface(picture.swapaxes(0, 1)), (0, 0))
        pygame.display.flip()
        clock.tick(fps)
        if any(event.type == pygame.QUIT for event in pygame.event.get()):
            break
    pygame.display.quit()
    return True


def evaluate(
    system: System, split: str, lifetimes: int, agent: AgentController | None = None, env_steps: int = 0
) -> dict[str, Any]:  # fmt: skip
    """Compare the agent with the references on held-out tasks, in worlds of their own.

    Besides what it was asked for, the answer holds what `agent.compare` says of every agent; and `belief_nll`: how unexpected each step was to the agent and to the exact
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
    lived = {"agent": rollout(world, agent, exact)} | references(settings.world, lifetimes, split, system.device)
    nll = {"agent": torch.stack(agent.nll)} | {"exact": torch.stack(filter_.nll) for filter_ in exact}
    nll = {name: seen.double().mean(1).tolist() for name, seen in nll.items()}
    late = min(16, settings.world.lifetime // 2)
    excess = float(np.mean(nll["agent"][late:]) - np.mean(nll["exact"][late:])) if exact else None
    return {
        "preset": settings.preset, "seed": settings.seed, "split": split, "lifetimes": lifetimes,
        "env_steps": env_steps, **compare(lived),
        "belief_nll": {**nll, "late": late, "late_excess": excess},
    }  # fmt: skip


@functools.lru_cache(maxsize=1)
def references(world: WorldSettings, lifetimes: int, split: str, device: torch.device) -> dict[str, Trajectories]:
    """The reference agents' lifetimes of an evaluation; kept, because several agents may be evaluated in one world.

    Random, Thompson sampling, the known rule, and where rules switch Thompson sampling that expects no switch, its likelihoods
    floored at .001. Other people's worlds have no exact solution, so there is only the random agent.
    """
    require_room(world, lifetimes)
    seed = EVALUATION_SEEDS[split]

    def live(make: Callable) -> Trajectories:
        worlds = make_worlds(world, lifetimes, split, seed, device)
        return rollout(worlds, make(worlds))

    lived = {"random": live(lambda worlds: RandomAgent(seed, world.sizes.actions))}
    if world.gym_id:
        return lived
    q = ActionValues(world, device=device)
    lived["thompson"] = live(lambda worlds: ThompsonAgent(worlds, q, seed))
    lived["known_rule"] = live(lambda worlds: KnownRuleAgent(worlds, q))
    if world.switch:
        lived["expects_no_switch"] = live(lambda worlds: ThompsonAgent(worlds, q, seed, switch=0, floor=1e-3))
    return lived


COMMANDS = {
    "evaluate": evaluate_command, "resume": resume_command, "watch": watch_command,
}  # fmt: skip


def as_program(program: str, call: Callable, *arguments: Any, **options: Any) -> None:
    """Call it as a program: exit code 2 and one sentence for what the user can mend, 130 for Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born deaf to it
    try:
        call(*arguments, **options)
    except (UserError, ValueError, OSError, ExternalEnvError) as error:
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
