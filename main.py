"""Meta-training: settings, wiring, the training loop, evaluation and commands.

The data flow: environment -> observations -> VAE codes -> which effect happened -> episodic memory -> GRU belief ->
context -> FiLM in the VAE, the transition model and the value -> planner -> action.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import json
import math
import os
import pickle
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import tyro
from torch import distributed
from tqdm import tqdm
from tyro.conf import Positional

from agent import AgentController, Learner, Planner, PlannerSettings, System, TrainingSettings
from context_engine import AppearanceEngine, ContextInferenceEngine, ContextSettings, ExactFilter
from context_engine import infer_reward_bins, references, require_room, rollout
from environment import WORLDS, ExternalEnvError, ExternalWorlds, HiddenRulesWorld, WorldSettings
from environment import external_defaults, make_worlds
from memory import MemorySettings, Processes, RunFolder, UserError, merge, require, require_new, write_json
from transition_model import TransitionModel, TransitionSettings
from world_model import STATISTICS, VAE, VAESettings, Value, adaptation, belief_nll, compare, plot_adaptation
from world_model import plot_learning, plot_lifetime, record_lifetime, report, save_animation

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# ------------------------------------------------------------------------------------------------------------- settings
PRESETS: dict[str, dict] = {
    "default": {},
    "quick": {
        "planner": {"discount": 0.9},
        "training": dict(updates=200, envs=32, random_lifetimes=256, perception_updates=100, effect_updates=150)
        | dict(value_batch=8, plan_from=50, final_lr_scale=0.3, evaluation_lifetimes=512, validate_every=100),
    },
    "large": {"training": {"updates": 800}},
    "switching": {"training": {"updates": 700, "batch": 24, "value_batch": 8, "evaluation_lifetimes": 1024}},
    "tinted": {
        "vae": {"width": 96, "final_lr_scale": 0.05},
        "context": {"appearance": 16, "learning_rate": 4e-3},
        "training": {"updates": 900, "perception_updates": 3000, "evaluation_lifetimes": 1024},
    },
    "everything": {
        "vae": {"num_codes": 7},
        "transition": {"width": 48, "prior_width": 128, "reward_bins": (-1.0, 0.0, 0.5, 1.0)},
        "context": {"hidden": 96, "context": 64, "learning_rate": 4e-3},
        "planner": {"nodes": 64, "layers": 8, "expand_margin": 0.3, "min_branch_prob": 0.05},
        "training": dict(updates=1600, value_batch=8, effect_updates=600, evaluation_lifetimes=256, collect_every=24)
        | dict(value_from=100, plan_from=200, validate_every=0),  # the exact filter over 115,200 rules takes minutes
    },
    "gym": {  # for an external environment
        "world": {"lifetime": 256, "cell": 8, "slip": 0.0, "noise": 0.0},
        "memory": {"budget_mb": 512.0},
        "vae": {"num_codes": 24},
        "planner": {"nodes": 256, "collect_nodes": 256, "layers": 16, "expand_margin": 0.3, "min_branch_prob": 0.03},
        "training": dict(updates=400, envs=16, collect_every=32, random_lifetimes=128, effect_updates=400)
        | dict(batch=12, value_batch=4, effect_batch=2, evaluation_lifetimes=64)
        | dict(validate_every=0),  # external environments are stepped one by one
    },
}
"""What each preset changes in the settings; what it changes in the world is environment.WORLDS."""


@dataclass(frozen=True)
class Settings:
    """All settings of a run. Precedence: default < preset < --config FILE < flags."""

    # a named set of settings to begin from. default: 6x6; quick: 4x4; large: 8x8; switching: the rule changes; tinted:
    # hidden colour gains; everything: walls, wind, edges and more; gym: an external environment (--world.gym-id)
    preset: Literal["default", "quick", "large", "switching", "tinted", "everything", "gym"] = "default"
    seed: int = 0  # decides everything random in the run, 0 to 1,000,000
    device: str = "cpu"  # where everything is computed: cpu, cuda, cuda:1, ...
    init_from: str = ""  # folder of a run whose weights to begin with, at adaptation; all sizes must be the same
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
        if self.training.validate_every:
            require_room(self.world, self.training.validation_lifetimes)
        if self.preset not in PRESETS:
            raise ValueError(f"preset is {self.preset!r}, but must be one of {', '.join(PRESETS)}.")
        envs, budget = self.training.envs, self.memory.budget_mb
        # Frames, and as many final observations at the most.
        needed = 2 * math.prod(self.world.sizes.obs_shape) * self.world.lifetime * envs / 2**20
        if needed > budget:
            raise ValueError(
                f"memory.budget_mb is {budget:g}, but {envs} lifetimes may take {needed:.0f} MB: "
                "raise memory.budget_mb or lower training.envs."
            )


def with_preset(settings: Settings, preset: str) -> Settings:
    """Settings with what a preset, one of PRESETS, changes in them."""
    return merge(settings, {"preset": preset, "world": WORLDS.get(preset, {})} | PRESETS[preset])


def with_file(settings: Settings, path: Path | None, preset: str | None, gym_id: str = "") -> tuple[Settings, dict]:
    """`settings` with a preset (the named one, else the file's, else gym for an external environment) and a file's
    overrides on top; and these overrides. UserError if the file cannot be read or does not fit."""
    of_world = external_defaults(gym_id) if gym_id else {}
    try:
        overrides = {} if path is None else json.loads(path.read_text("utf-8-sig"))
        given = overrides if isinstance(overrides, dict) else {}
        world = given.get("world") if isinstance(given.get("world"), dict) else {}
        in_file = world.get("gym_id") if isinstance(world.get("gym_id"), str) else ""
        preset = preset or given.get("preset") or ("gym" if gym_id or in_file else "default")
        if isinstance(preset, str) and preset in PRESETS:  # `merge` refuses any other, with the names that exist
            settings = with_preset(settings, preset)
        if in_file and not gym_id:
            of_world = external_defaults(in_file)
        settings = merge(settings, of_world)
        return merge(settings, {**overrides, "preset": preset} if given is overrides else overrides), given
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: {error}" if path else str(error)) from error


def with_reward_bins(settings: Settings, overrides: dict) -> Settings:
    """`settings` with the reward bins of their world, unless the file gives reward bins for this same world."""
    same_world = overrides.get("world", {}).get("gym_id", settings.world.gym_id) == settings.world.gym_id
    if "reward_bins" in overrides.get("transition", {}) and same_world:
        return settings
    return merge(settings, {"transition": {"reward_bins": infer_reward_bins(settings.world)}})


def get_device(name: str) -> torch.device:
    """The torch device called `name`; of several GPUs the one for this process. UserError if this machine lacks it."""
    try:
        return torch.empty(0, device=f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device is {name!r}, which this machine does not offer: try --device cpu.") from error


# --------------------------------------------------------------------------------------------------------------- wiring
def build_system(settings: Settings, engine: type = ContextInferenceEngine, planner: type = Planner) -> System:
    """Every part of the agent, wired; the data flow is at the top of this file.

    Args:
        settings: of the run; the seed decides the initial weights.
        engine, planner: your own classes in the place of these, built from the same arguments.

    Raises:
        ValueError: settings that do not fit together, such as a reward without a bin, or a patch and the frame.
        UserError: this machine lacks the device.
    """
    s, sizes, device = settings, settings.world.sizes, get_device(settings.device)
    missing = set(s.world.reward_values) - set(s.transition.reward_bins)
    if missing and not s.world.gym_id:
        raise ValueError(
            f"transition.reward_bins is {s.transition.reward_bins}, but world.reward_values has {min(missing):g}: "
            "add it, or leave the bins out."
        )
    perception = dataclasses.replace(s.vae, patch=s.vae.patch or s.world.cell)
    padding = s.transition.padding or ("zeros" if s.world.edges == "block" else "circular")
    dynamics = dataclasses.replace(s.transition, padding=padding)
    codes, context_dim = s.vae.num_codes, s.context.context

    torch.manual_seed(s.seed)
    vae = VAE(perception, obs_shape=sizes.obs_shape, context_dim=context_dim).to(device)
    transition = TransitionModel(dynamics, codes=codes, grid=vae.grid, context_dim=context_dim).to(device)
    inference = engine(s.context, actions=sizes.actions, codes=codes, fixed=sizes.fixed).to(device)
    pixels = 3 * perception.patch**2
    appearance = AppearanceEngine(s.context, pixels=pixels).to(device) if s.context.appearance else None
    value = Value(codes, vae.grid, context_dim, keypoints=s.planner.keypoints, width=s.planner.width).to(device)
    target_value = copy.deepcopy(value).requires_grad_(False)
    return System(
        settings=s,
        device=device,
        vae=vae,
        transition=transition,
        engine=inference,
        appearance=appearance,
        value=value,
        target_value=target_value,
        planner=planner(s.planner, transition=transition, value=target_value),
    )


# ------------------------------------------------------------------------------------------------------------- training
def train(learner: Learner, run: RunFolder | None = None, until: int | None = None, checkpoints: bool = True) -> int:
    """Meta-train update by update, to the planned end or to update `until`.

    With a run, metrics and, unless `checkpoints` is off, checkpoints are written. After the first Ctrl-C or
    SIGTERM the present update is finished and saved, a second one stops at once. Of several processes all call this.
    Returns the number of the signal that stopped it, else 0.

    Raises:
        UserError: a loss is not finite.
    """
    t, store, processes = learner.training, learner.store, learner.processes
    end, stopped = learner.total if until is None else until, False
    writes = run is not None and processes.is_main and learner.update < end
    started = time.perf_counter() - learner.seconds
    board = open_board(run.folder / "tensorboard", learner.update) if writes else nullcontext()
    bar = tqdm(total=learner.total, initial=learner.update, disable=not (writes and sys.stderr.isatty()))
    spoken = (time.monotonic(), learner.update)  # of the last line where there is no bar
    with stop_requests() as asked, board, bar:
        while learner.update < end and not stopped:
            phase, update = learner.phase()
            learner.set_learning_rates(phase, update)

            if phase == "perception":
                if update == 0:
                    learner.collect_random_lifetimes()
                elif update % -(-t.perception_updates // 4) == 0:  # after each quarter
                    learner.drop_codes()
                learner.learn_perception(store.sample(t.batch, learner.sampler))

            elif phase == "effects":
                if update == 0:  # perception is new, so stored codes are stale
                    learner.count_kinds()
                    learner.reencode_all(perception=True)
                    learner.find_effects()
                    if writes:
                        found = "{vae/kinds:.0f} kinds of patch, of which {vae/shared_codes:.0f} share a code; "
                        bar.write((found + "{effects/found:.0f} effects").format(**learner.metrics))
                learner.learn_effects(labelled=True)

            else:  # adaptation
                if update == 0:  # effects are new, so stored effect posteriors are stale
                    learner.reencode_all()
                if update % (t.collect_every if update >= t.plan_from else 4 * t.collect_every) == 0:
                    learner.collect(learner.exploration(update))  # environment -> episodic memory -> store
                    learner.reencode(store.oldest())
                if update % t.effect_every == 0:
                    learner.learn_effects()
                rows = store.sample(t.batch, learner.sampler)
                experience = store.experience.rows(rows.to(learner.device))
                beliefs = learner.learn_context(experience)
                if update % t.perception_every == 0:
                    learner.learn_perception(rows, beliefs)
                if update >= t.value_from:
                    few = slice(t.value_batch)
                    learner.learn_value(experience.rows(few), beliefs[few])

            learner.update += 1
            over = learner.update == learner.total
            if phase == "adaptation" and t.validate_every and (over or (update + 1) % t.validate_every == 0):
                learner.seconds = time.perf_counter() - started
                shown = validate(learner, board if writes else None) if processes.is_main else None
                learner.metrics |= processes.all_gather_object(shown)[0]
            stopped = processes.any_rank(bool(asked))  # at every update, so that all processes stop after the same one
            logs, saves = over or learner.update % t.log_every == 0, over or learner.update % t.checkpoint_every == 0
            if logs or saves or stopped:
                learner.average_metrics()
                if wrong := [name for name, value in learner.metrics.items() if not math.isfinite(value)]:
                    text = "the training stopped, and an earlier checkpoint stays. Try lower learning rates."
                    raise UserError(f"{wrong[0]} is not finite at update {learner.update}: {text}")
            if logs and writes:
                log(learner, run, board, bar)
                if bar.disable and spoken[0] + 60 <= time.monotonic() and spoken[1] + end / 10 <= learner.update:
                    print(f"update {learner.update} of {learner.total}: {bar.postfix}", flush=True)
                    spoken = (time.monotonic(), learner.update)
            if logs:  # once, in the first line after the validation
                learner.metrics = {name: x for name, x in learner.metrics.items() if not name.startswith("validation")}
            bar.update()
            if run is not None and checkpoints and (saves or stopped):
                learner.seconds = time.perf_counter() - started
                run.save(learner)
    return (asked or [signal.SIGINT])[0] if stopped else 0


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Signals so far that ask to stop, Ctrl-C (SIGINT) or SIGTERM; a second one stops at once. Other threads than the
    main one cannot be asked, and SIGTERM is torchrun's own where it started the process."""
    asked: list[int] = []
    signals = (signal.SIGINT,) if distributed.is_torchelastic_launched() else (signal.SIGINT, signal.SIGTERM)
    signals = signals if threading.current_thread() is threading.main_thread() else ()
    previous = {number: signal.getsignal(number) for number in signals}

    def stop(number: int, _: Any) -> None:
        asked.append(number)
        for each, handler in previous.items():
            signal.signal(each, handler)

    for number in signals:
        signal.signal(number, stop)
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def open_board(folder: Path, update: int) -> SummaryWriter:
    """TensorBoard's events in `folder`, without those of an earlier training after this update."""
    from torch.utils.tensorboard import SummaryWriter  # a tenth of a second, for trainings only

    return SummaryWriter(folder, purge_step=update + 1)


def log(learner: Learner, run: RunFolder, board: SummaryWriter, bar: tqdm) -> None:
    """One line to metrics.jsonl, the same to TensorBoard, the gist to the progress bar."""
    values = {name: float(value) for name, value in learner.metrics.items()}
    with open(run.metrics, "a") as file:
        file.write(json.dumps({"update": learner.update, "env_steps": learner.env_steps} | values) + "\n")
    for name, value in values.items():
        board.add_scalar(f"losses/{name}" if "/" in name else f"charts/{name}", value, learner.update)
    if learner.validations:
        values["validation/return"] = learner.validations[-1][3]
    shown = ("return", "validation/return", "effects/marginal", "context/filter", "value/value")
    bar.set_postfix({name: f"{values[name]:.2f}" for name in shown if name in values})


# ----------------------------------------------------------------------------------------------------------- evaluation
EVALUATION_SEED = 10**18  # above every training seed: evaluation has environments of its own
HeldOut = Literal["validation", "test"]
EVALUATION_SEEDS = {"validation": EVALUATION_SEED, "test": EVALUATION_SEED + 1}


def evaluate(system: System, split: str, lifetimes: int, agent: Any = None, env_steps: int = 0) -> dict[str, Any]:
    """Compare the system's agent, or another one for `rollout` with an `nll` as in AgentController, with the references
    on held-out tasks; see `compare`, `belief_nll`. `env_steps` of the training so far are for the record. ValueError if
    the exact filter has no room for so many.
    """
    settings, seed = system.settings, EVALUATION_SEEDS[split]
    require_room(settings.world, lifetimes)
    world = make_worlds(settings.world, lifetimes, split, seed, system.device)
    agent = agent or AgentController(system)
    exact = [] if settings.world.gym_id else [ExactFilter(world)]
    rollouts = {"agent": rollout(world, agent, exact)}
    rollouts |= references(settings.world, lifetimes, split, seed, system.device)
    belief = belief_nll(agent.nll, exact[0].nll if exact else None)
    about = dict(preset=settings.preset, seed=settings.seed, split=split, lifetimes=lifetimes, env_steps=env_steps)
    return about | compare(rollouts) | {"belief_nll": belief}


def validate(learner: Learner, board: SummaryWriter | None = None, nodes: int = 0) -> dict[str, torch.Tensor]:
    """Metrics of the present agent, greedy, on the same validation lifetimes each time, and pictures of them for
    TensorBoard; nothing random is shared with the training. It expands so many `nodes`, or as many as it collects with.
    """
    settings, seed = learner.settings, EVALUATION_SEEDS["validation"] + 10
    worlds = (settings.world, learner.training.validation_lifetimes, "validation", seed, learner.device)
    agent = AgentController(learner.system, nodes=nodes or settings.planner.collect_nodes)
    rollouts = {"agent": rollout(make_worlds(*worlds), agent)} | references(*worlds)
    returns = {name: one.reward.double().sum(1).numpy() for name, one in rollouts.items()}
    metrics = {"validation/return": returns["agent"].mean()}
    for name in ("normalised", "of_thompson"):
        statistic, _, whose = STATISTICS[name]
        if set(whose) <= set(returns):
            with np.errstate(divide="ignore", invalid="ignore"):
                metrics[f"validation/{name}"] = statistic(*(returns[agent] for agent in whose))
    means = [float(returns[name].mean()) for name in ("agent", "thompson") if name in returns]
    learner.validations.append([learner.update, learner.env_steps, learner.seconds, *means])
    if board is not None:
        curves = plot_adaptation([{name: adaptation(one) for name, one in rollouts.items()}])
        board.add_figure("adaptation", curves, learner.update)
        board.add_figure(
            "lifetime", plot_lifetime(*record_lifetime(agent, one_world(learner.system, 0))), learner.update
        )
    # Of nothing there is no share: a reference may earn as little as a random agent.
    return {name: torch.tensor(float(value)) for name, value in metrics.items() if math.isfinite(value)}


def one_world(system: System, seed: int) -> HiddenRulesWorld | ExternalWorlds:
    """A single environment with a validation task, chosen by `seed`."""
    return make_worlds(system.settings.world, 1, "validation", EVALUATION_SEED + 100 + seed, system.device)


def watch(system: System, seed: int, path: Path, fps: int = 4) -> None:
    """Animate a lifetime in a validation task, chosen by `seed`, to `path`, .gif or .mp4."""
    world = one_world(system, seed)
    frames, effects = record_lifetime(AgentController(system), world)
    save_animation(frames, effects, "hidden rule: " + world.describe_rule(0).replace("\n", "; "), path, fps)


# ------------------------------------------------------------------------------------------------------------- commands
MAY_CHANGE = (
    *("device", "training.updates", "training.log_every", "training.checkpoint_every", "training.evaluation_lifetimes"),
    *("training.validate_every", "training.validation_lifetimes", "memory.budget_mb"),
)
"""Settings in which a run may go on differently from its checkpoint."""


@dataclass(frozen=True)
class TrainArguments(Settings):
    """Meta-train, then evaluate on held-out tasks. Precedence: default < preset < --config < flags."""

    # a JSON file of settings, such as a run's config.json or a tuned best.json; it may be partial
    config: Path | None = None
    run: str = ""  # name of the run's folder in runs/; the same command again continues it


def train_command(arguments: list[str]) -> None:
    """Meta-train, then evaluate on held-out tasks (the default command)."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", default=None)
    early.add_argument("--config", type=Path, default=None)
    early.add_argument("--world.gym-id", "--world.gym_id", dest="gym_id", default="")
    early.add_argument("--transition.reward-bins", "--transition.reward_bins", dest="bins", nargs="+", default=())
    chosen, _ = early.parse_known_args(arguments)
    base, overrides = with_file(Settings(), chosen.config, chosen.preset, chosen.gym_id)
    parsed = tyro.cli(TrainArguments, args=arguments, default=TrainArguments(**vars(base)), prog="main.py train")
    settings = Settings(**{f.name: getattr(parsed, f.name) for f in dataclasses.fields(Settings)})
    if settings.preset == "gym" and not settings.world.gym_id:
        raise UserError("preset gym is for an external environment: name it with --world.gym-id.")
    settings = settings if chosen.bins else with_reward_bins(settings, overrides)
    if distributed.is_torchelastic_launched() and not parsed.run:
        raise UserError("name the run, so that all processes share it: torchrun ... -- main.py --run NAME.")
    named = RunFolder.named(parsed.run, settings) if parsed.run else None
    learner = make_learner(settings, named)  # refuses what does not fit, before it writes
    run_training(named or RunFolder.new(settings), learner)


def make_learner(settings: Settings, run: RunFolder | None) -> Learner:
    """The learner that begins a run, on the weights of another one if the settings say so, or continues it."""
    learner = Learner(build_system(settings), Processes.from_torchrun())
    if settings.init_from and not (run and run.checkpoint.exists()):
        learner.warm_start(RunFolder(Path(settings.init_from)))
    return learner


def run_training(run: RunFolder, learner: Learner) -> None:
    """Train from the run's checkpoint, if it has one, to the end; then evaluate and write the figures."""
    main_process, folder, t = learner.processes.is_main, run.folder, learner.settings.training
    with run.locked(learner.settings) if main_process else nullcontext():
        if run.checkpoint.exists():
            restore_checkpoint(run, learner)
        elif main_process:
            run.remove_stale()
        learner.processes.any_rank(False)  # wait until the folder is as it should be
        if main_process:
            print(f"training {folder}", flush=True)
        again = f"python3 main.py resume {shlex.quote(str(folder))}"
        if number := train(learner, run):
            if main_process:
                print(f"stopped at update {learner.update} and saved: {again} goes on.", flush=True)
            sys.exit(128 + number)
        if not main_process:
            return
        write_json({"total": learner.seconds, "validations": learner.validations}, folder / "timing.json")
        try:
            result = evaluate(learner.system, "test", t.evaluation_lifetimes, env_steps=learner.env_steps)
            write_json(result, folder / "evaluation.json")
            plot_adaptation([result]).savefig(folder / "adaptation.png")
            if learner.validations:
                plot_learning(learner.validations).savefig(folder / "learning.png")
            watch(learner.system, 0, folder / "lifetime.gif")
        except KeyboardInterrupt:
            print(f"the training is complete and saved: {again} evaluates it.", flush=True)
            raise
    print(report(result) + f"\ntrained for {learner.seconds:.0f} s; results and figures are in {folder}")


def restore_checkpoint(run: RunFolder, learner: Learner) -> None:
    """Continue from a run's checkpoint, with the learner's own settings; UserError if they do not fit together."""
    state, logged = run.load(learner.settings, MAY_CHANGE)
    with fits_together(run.folder):
        learner.load_state_dict(state, run.blocks)
    if learner.update > learner.total:
        raise UserError(f"{run.folder} is already past {learner.training.updates} updates: give a higher --updates.")
    if learner.processes.is_main:
        if run.metrics.exists():  # lines after the checkpoint will be written again
            os.truncate(run.metrics, min(logged, run.metrics.stat().st_size))
        write_json(dataclasses.asdict(learner.settings), run.config)


@contextmanager
def fits_together(folder: Path) -> Iterator[None]:
    """UserError if what the run's folder holds does not fit its settings or is damaged."""
    try:
        yield
    except (RuntimeError, KeyError, TypeError, EOFError, FileNotFoundError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{folder} does not fit together ({reason}): a file of it is damaged or was edited.") from error


def load_system(folder: Path | str, device: str | None = None, **classes: type) -> tuple[System, dict]:
    """A trained system from a run's checkpoint, on the run's own device if none is named; and the learner's state. If
    it was trained with `classes` of your own, give them as to `build_system`."""
    run = RunFolder(Path(folder))
    settings = run.settings(Settings(), **({} if device is None else {"device": device}))
    state, _ = run.load(settings, MAY_CHANGE)
    system = build_system(settings, **classes)
    with fits_together(run.folder):
        system.load(state["modules"])
    return system, state


def resume_command(run: Positional[Path], updates: int | None = None, device: str | None = None) -> None:
    """Go on with a run as if it had never stopped.

    Args:
        run: Folder of the run.
        updates: Planned end in updates of adaptation; the run's own if not given. Learning rates and exploration then
            fall until the new end.
        device: Where to compute; where the run was trained if not given.
    """
    folder = RunFolder(run)
    changes = {} if updates is None else {"training": {"updates": updates}}
    settings = folder.settings(Settings(), **changes, **({} if device is None else {"device": device}))
    run_training(folder, make_learner(settings, folder))


def evaluate_command(
    run: Positional[Path],
    lifetimes: int | None = None,
    split: HeldOut = "test",
    device: str | None = None,
    output: Path | None = None,
) -> None:
    """Evaluate a trained run on held-out tasks again; the result goes to the screen and to its folder.

    Args:
        run: Folder of the run.
        lifetimes: Held-out lifetimes, at least 2; those of the run's final evaluation if not given.
        split: Which tasks.
        device: Where to compute; where the run was trained if not given.
        output: JSON file to write; evaluation-<split>-<lifetimes>.json in the run's folder if not given.
    """
    require_new(output)
    system, state = load_system(run, device)
    lifetimes = system.settings.training.evaluation_lifetimes if lifetimes is None else lifetimes
    require("lifetimes", lifetimes, 2, 10**6)
    result = evaluate(system, split, lifetimes, env_steps=state["counters"][2])
    print(report(result), flush=True)
    path = output or run / f"evaluation-{split}-{lifetimes}.json"
    try:
        write_json(result, path)
    except OSError as error:
        raise UserError(f"the result was not kept in {path} ({error.strerror}): name another --output.") from error
    print(f"written to {path}")


def watch_command(
    run: Positional[Path], seed: int = 0, fps: int = 4, output: Path | None = None, device: str | None = None
) -> None:
    """Write an animation of a held-out lifetime.

    Args:
        run: Folder of the run.
        seed: Which lifetime, at least 0.
        fps: Steps a second, 1 to 100.
        output: File to write, .gif or .mp4; lifetime-<seed>.gif in the run's folder if not given.
        device: Where to compute; where the run was trained if not given.
    """
    require("seed", seed, 0, 10**9)
    require("fps", fps, 1, 100)
    path = output or run / f"lifetime-{seed}.gif"
    require_new(output)
    system, _ = load_system(run, device)
    if not os.access(path.absolute().parent, os.W_OK):
        raise UserError(f"{path} cannot be written: name another --output.")
    watch(system, seed, path, fps)
    print(f"written to {path}")


COMMANDS = {"train": train_command, "evaluate": evaluate_command, "resume": resume_command, "watch": watch_command}


def overview() -> str:
    """The commands with one line each."""
    lines = [f"  {name:10s} {command.__doc__.splitlines()[0]}" for name, command in COMMANDS.items()]
    usage = "usage: python3 main.py [COMMAND] [OPTIONS]; python3 main.py COMMAND --help shows a command's options\n"
    return "\n".join([usage, *lines])


def run_program(program: str, call: Callable, *arguments: Any, **options: Any) -> None:
    """Call it as a program: exit code 2 and one sentence for what the user can fix, 130 for Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with Ctrl-C ignored
    if "" not in sys.path:
        sys.path.append("")  # the working directory: environments of one's own may lie there
    try:
        call(*arguments, **options)
    except (UserError, ValueError, OSError, ExternalEnvError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def command_line(arguments: list[str]) -> None:
    """Run the command that the arguments name; train if they name none."""
    name = arguments[0] if arguments and not arguments[0].startswith("-") else "train"
    rest = arguments[1:] if arguments and arguments[0] == name else arguments
    if arguments[:1] in (["--help"], ["-h"]):
        print(overview())
    elif name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}."
        raise UserError(f"there is no command {name!r}: {hint}")
    elif name == "train":
        train_command(rest)
    elif name != "resume" and distributed.is_torchelastic_launched():
        raise UserError(f"{name} runs in one process: start it with python3; torchrun is for train and resume.")
    else:
        tyro.cli(COMMANDS[name], args=rest, prog=f"main.py {name}")


if __name__ == "__main__":
    run_program("main.py", command_line, sys.argv[1:])
    if distributed.is_torchelastic_launched():  # all is written, but gloo's threads may abort an interpreter that ends
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
