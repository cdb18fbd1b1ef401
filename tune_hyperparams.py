"""Search for better settings with Optuna, scored by normalised return on validation tasks after a short meta-training.

The study is kept in runs/tune-NAME/, by default as an Optuna journal; the same command continues it after an
interruption. The first trial is the settings that the search starts from, so the best set never scores worse. The test
split is never used. At the end the folder holds best.json, for `python3 main.py --config`, trials.json and figures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shlex
import threading
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import filelock
import optuna
import torch
import tyro
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.storages import GrpcStorageProxy, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback, journal
from optuna.trial import FrozenTrial, TrialState
from torch import distributed

import main
from agent import Learner
from context_engine import require_room
from main import Settings
from memory import RunFolder, UserError, flatten, merge, save_atomically, write_json

PROGRAM = "tune_hyperparams.py"
PRUNING_POINTS = 2  # evaluations of each seed in the course of its training; a trial may be pruned after each
KEPT_CHECKPOINTS = 3  # of the best trials
SCHEDULE = ("value_from", "plan_from")  # training settings that are scaled with the length of the training
HEARTBEAT = {"heartbeat_interval": 20, "grace_period": 60}  # seconds, of trials in a database


# ---------------------------------------------------------------------------------------------------------------- space
Space = dict[str, dict | list]  # for each searched setting a range, as of trial.suggest_float, or a list of choices
SPACE = {  # what is searched by default
    "context.learning_rate": {"low": 1e-3, "high": 1e-2, "log": True},
    "context.hidden": {"low": 32, "high": 128, "log": True},
    "context.decoding_weight": {"low": 0.5, "high": 4.0, "log": True},
    "context.token_scale": {"low": 1.0, "high": 30.0, "log": True},
    "context.context_scale": {"low": 1.0, "high": 10.0, "log": True},
    "transition.learning_rate": {"low": 2e-3, "high": 1.5e-2, "log": True},
    "transition.film_scale": {"low": 0.5, "high": 10.0, "log": True},
    "planner.learning_rate": {"low": 1e-3, "high": 1.2e-2, "log": True},
    "planner.tau": {"low": 0.05, "high": 0.5, "log": True},
    "planner.lambda_": {"low": 0.5, "high": 0.95, "log": False},
    "planner.discount": {"low": 0.9, "high": 0.97, "log": False},
    "planner.expand_margin": {"low": 0.0, "high": 0.2, "log": False},
    "planner.min_branch_prob": {"low": 0.05, "high": 0.9, "log": False},
    "planner.nodes": {"low": 1, "high": 64, "log": True},
    "training.exploration": {"low": 0.05, "high": 0.5, "log": False},
    "training.final_lr_scale": {"low": 0.02, "high": 0.5, "log": True},
}


def value_of(settings: Settings, name: str) -> Any:
    """Return the value of a setting by its dotted name; raise UserError if there is no such setting."""
    section, _, field = name.partition(".")
    fields = getattr(settings, section, None)
    if not dataclasses.is_dataclass(fields) or not hasattr(fields, field):
        raise UserError(f"there is no setting {name!r}; examples: {', '.join(SPACE)}.")
    return getattr(fields, field)


def nested(flat: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return settings by dotted name as the nested mapping that `memory.merge` and --config accept."""
    tree: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        section, field = name.split(".")
        tree.setdefault(section, {})[field] = value
    return tree


def read_space(path: Path | None, base: Settings) -> Space:
    """Return what to search: the content of a JSON file, or if `path` is None, SPACE, widened to include all values of
    `base`. Raise UserError if the file cannot be read or a range does not fit its setting, which the message names."""
    space: Space = {}
    for name, usual in SPACE.items():
        low, high = min(usual["low"], value_of(base, name)), max(usual["high"], value_of(base, name))
        space[name] = {"low": low, "high": high, "log": usual["log"] and low > 0}
    if path is not None:
        try:
            space = {k: space[k] if v is None else v for k, v in json.loads(path.read_text()).items()}
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is not a search space ({type(error).__name__}: {error}): see --help.") from error
    for name, range_ in space.items():
        check_range(name, range_, base)
    return space


def check_range(name: str, range_: Any, base: Settings) -> None:
    """Raise UserError unless the setting may be searched and takes all of `range_`, its value in `base` among them."""
    start, is_list = value_of(base, name), isinstance(range_, list)
    if name.startswith("world.") or name.removeprefix("training.") in ("updates", "evaluation_lifetimes", *SCHEDULE):
        raise UserError(f"{name} cannot be searched: scores of other environments or longer trainings do not compare.")
    if not is_list and type(start) not in (int, float):
        raise UserError(f"{name} is not a number: give a list of choices.")
    try:
        if not is_list:
            IntDistribution(**range_) if type(start) is int else FloatDistribution(**range_)
        for value in range_ if is_list else (range_["low"], range_["high"]):
            merge(base, nested({name: value}))
    except (TypeError, ValueError) as error:
        raise UserError(f"the range of {name} does not fit: {error}") from error
    choices = map(tuple, range_) if isinstance(start, tuple) else range_
    if not (start in choices if is_list else range_["low"] <= start <= range_["high"]):
        raise UserError(f"{name} is searched in {range_}, which must include {start}, where the search starts.")


def suggest(trial: optuna.Trial, space: Space, base: Settings) -> Settings:
    """Return `base` with the values that Optuna chooses for this trial."""
    chosen: dict[str, Any] = {}
    for name, range_ in space.items():
        if isinstance(range_, list):
            chosen[name] = trial.suggest_categorical(name, range_)
        else:
            suggest_number = trial.suggest_int if isinstance(value_of(base, name), int) else trial.suggest_float
            chosen[name] = suggest_number(name, **range_)
    return merge(base, nested(chosen))


# ------------------------------------------------------------------------------------------------------------ objective
def shorten_training(base: Settings, updates: int | None) -> Settings:
    """Return `base` with a training of `updates`, or the usual share of its own if None, and its schedule to scale."""
    full = base.training.updates
    updates = max(1, full * 3 // 4) if updates is None else updates
    scaled = {name: round(getattr(base.training, name) * min(1.0, updates / full)) for name in SCHEDULE}
    return merge(base, {"training": {"updates": updates, "validate_every": 0, **scaled}})


def objective(trial: optuna.Trial, space: Space, base: Settings, arguments: TuneArguments, folder: Path) -> float:
    """Train the trial's settings, from each seed in a run folder of its own, and return the mean score: the normalised
    return on the validation split, or the return where nothing normalises it. Raise UserError if a training
    diverges, optuna.TrialPruned if the scores of other trials were better at the same point."""
    settings, scores = suggest(trial, space, base), []
    for seed in range(arguments.seeds):
        learner = Learner(main.build_system(merge(settings, {"seed": seed})))
        run = RunFolder(folder / f"trial-{trial.number:04d}" / f"seed-{seed}")
        run.folder.mkdir(parents=True)
        write_json(dataclasses.asdict(learner.settings), run.folder / "config.json")
        for point in range(1, PRUNING_POINTS + 1):
            left = base.training.updates * (PRUNING_POINTS - point) // PRUNING_POINTS
            if main.train(learner, run, until=learner.total - left, checkpoints=False):
                raise KeyboardInterrupt
            result = main.evaluate(learner.system, "validation", arguments.lifetimes)
            score = result["return_mean"] if result.get("normalised") is None else result["normalised"]
            trial.report(score, seed * PRUNING_POINTS + point - 1)
            if (seed, point) != (arguments.seeds - 1, PRUNING_POINTS) and trial.should_prune():
                raise optuna.TrialPruned
        scores.append(score)
        state = learner.state_dict()
        kept = {part: state[part] for part in ("modules", "counters")}  # enough to evaluate and watch, not to resume
        content = {"format": RunFolder.FORMAT, "settings": flatten(learner.settings), "logged": 0, "learner": kept}
        save_atomically(content, run.checkpoint)
    return sum(scores) / len(scores)


# ---------------------------------------------------------------------------------------------------------------- study
def open_study(arguments: TuneArguments, folder: Path, worker: int = 0, attempts: int = 3) -> optuna.Study:
    """Create or load the study for one of several workers; raise UserError if its storage cannot be used."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # this program reports progress itself
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    name, url, path = arguments.study, arguments.storage, str(folder / "journal.log")
    try:
        if url.startswith("grpc://"):
            host, _, port = url.removeprefix("grpc://").partition(":")
            store = GrpcStorageProxy(host=host, port=int(port or 13000))
            store.wait_server_ready(timeout=10)
        elif url:
            retry = RetryHeartbeatStaleTrialCallback(max_retry=3)
            store = RDBStorage(url, **HEARTBEAT, heartbeat_stale_trial_callback=retry)
        else:
            store = JournalStorage(journal.JournalFileBackend(path, journal.JournalFileOpenLock(path)))
        study = optuna.create_study(storage=store, study_name=name, direction="maximize", load_if_exists=True)
        study.pruner = optuna.pruners.MedianPruner(n_startup_trials=4)
        # Reproducible on one machine, but different for every worker and after every interruption.
        seed = None if url else 1000 * len(study.trials) + worker
        study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        return study
    except Exception as error:  # every database has errors of its own
        if url and attempts > 1:  # such as when two processes create its tables at the same time
            time.sleep(1)
            return open_study(arguments, folder, worker, attempts - 1)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the study's storage {url or path} cannot be used: {reason}") from error


def prepare(study: optuna.Study, arguments: TuneArguments, base: Settings, space: Space, folder: Path) -> None:
    """Queue the first trial of a new study, and those of a journal that were running when their process died. Raise
    UserError if the study was begun with other settings, or the folder belongs to a study in another storage."""
    owner, digest = folder / ".storage", hashlib.sha256(arguments.storage.encode()).hexdigest()  # hides a password
    if owner.exists() and owner.read_text() != digest:
        raise UserError(f"{folder} belongs to a study in another storage: give the same --storage, or another --study.")
    owner.write_text(digest)
    begun = {"seeds": arguments.seeds, "lifetimes": arguments.lifetimes, "space": space}
    begun = json.loads(json.dumps(begun | {"settings": dataclasses.asdict(base) | {"device": ""}}))  # any device
    known = study.user_attrs.get("begun", begun)
    if other := [name for name in begun if known.get(name) != begun[name]]:
        raise UserError(f"{folder} was begun with other {', '.join(other)}: give the same ones, or another --study.")
    study.set_user_attr("begun", begun)
    if not study.get_trials(deepcopy=False):
        if any(folder.glob("trial-*")):
            raise UserError(
                f"{folder} holds trials of a study whose storage is gone: name another --study, or move it."
            )
        study.enqueue_trial({name: value_of(base, name) for name in space})
    if not arguments.storage:  # the lock says that nobody runs them; in a database their heartbeat does
        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
            requeue(study, trial)


def requeue(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queue what an interrupted trial has tried, and what it was still to try."""
    study.enqueue_trial(trial.system_attrs.get("fixed_params", {}) | trial.params)


def remaining(study: optuna.Study, trials: int) -> int:
    """Return how many of `trials` are still to be started; those that were interrupted do not count as started."""
    started = [t for t in study.trials if t.state.name not in ("WAITING", "FAIL") or "reason" in t.user_attrs]
    return max(0, trials - len(started))


def work(arguments: TuneArguments, base: Settings, space: Space, folder: Path, tickets: Any, worker: int = 0) -> None:
    """Run trials in this process until none remains or `tickets`, a semaphore that all workers share, has run out.
    Raise KeyboardInterrupt or OSError if a trial is stopped or the disk is full, and queue the trial again."""
    if parent := multiprocessing.parent_process():  # one of --jobs: it ends with its parent, which holds the lock
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(max(1, torch.get_num_threads() // arguments.jobs))
    study = open_study(arguments, folder, worker)

    def run(trial: optuna.Trial) -> float:
        try:
            return objective(trial, space, base, arguments, folder)
        except optuna.TrialPruned:
            raise
        except (KeyboardInterrupt, OSError):  # not caused by the trial's settings
            requeue(study, study.get_trials(deepcopy=False)[trial.number])
            print("stopped: run the same command again to continue", flush=True)
            raise
        except Exception as error:
            trial.set_user_attr("reason", f"{type(error).__name__}: {error}")
            return float("nan")  # which Optuna records as a failure

    while remaining(study, arguments.trials) and tickets.acquire(block=False):
        study.optimize(run, n_trials=1, callbacks=[lambda study, trial: print_progress(study, trial, arguments)])
        delete_checkpoints(study, folder)


def run_study(arguments: TuneArguments, base: Settings, space: Space, folder: Path) -> optuna.Study:
    """Run the remaining trials of the study in --jobs processes, of which this is one, and return the study."""
    path = folder / "journal.log"
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)  # a line that a kill or a full disk has cut off breaks the journal
    study = open_study(arguments, folder)
    prepare(study, arguments, base, space, folder)
    left = remaining(study, arguments.trials)
    print(f"study {folder}: {left} of {arguments.trials} trials left", flush=True)
    context, jobs = multiprocessing.get_context("spawn"), min(arguments.jobs, left)
    # In a database the trials of a machine that fails come back, so that more may be needed than remain now.
    task = (arguments, base, space, folder, context.Semaphore(arguments.trials if arguments.storage else left))
    workers = [context.Process(target=main.run_program, args=(PROGRAM, work, *task, i)) for i in range(1, jobs)]
    for worker in workers:
        worker.start()
    try:
        work(*task)
    finally:  # Ctrl-C reaches every process, and each queues its own trial again
        for worker in workers:
            worker.join()
    return study


def delete_checkpoints(study: optuna.Study, folder: Path) -> None:
    """Delete the checkpoints of all trials but the best and those still running."""
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))  # first: these may end meanwhile
    kept = {f"trial-{trial.number:04d}" for trial in running + best_first(study)[:KEPT_CHECKPOINTS]}
    for path in folder.glob("trial-*/seed-*/checkpoint.pt"):
        if path.parent.parent.name not in kept:
            path.unlink(missing_ok=True)


def best_first(study: optuna.Study) -> list[FrozenTrial]:
    """Return the completed trials, best first."""
    return sorted(study.get_trials(states=(TrialState.COMPLETE,)), key=lambda trial: trial.value, reverse=True)


def print_progress(study: optuna.Study, trial: FrozenTrial, arguments: TuneArguments) -> None:
    """Print the result of a trial that has ended, the best trial so far, and the time that the rest will take."""
    result = f"{trial.value:.3f}" if trial.state == TrialState.COMPLETE else trial.user_attrs.get("reason", "pruned")
    best = "".join(f", best {best.value:.3f} (trial {best.number})" for best in best_first(study)[:1])
    seconds = [ended.duration.total_seconds() for ended in study.trials if ended.duration]
    left = remaining(study, arguments.trials)
    minutes = sum(seconds) / len(seconds) * left / arguments.jobs / 60
    print(f"trial {trial.number}: {result}{best}; {left} left, about {minutes:.0f} min", flush=True)


# -------------------------------------------------------------------------------------------------------------- results
def conclude(study: optuna.Study, base: Settings, overrides: dict[str, Any], folder: Path) -> Path:
    """Write trials.json, figures and best.json, which holds the `overrides` of --config too; print the best trials and
    the best set. Return the path of best.json; raise UserError if no trial was completed."""
    if not (best := best_first(study)):
        raise UserError("no trial was completed yet, so there is no best set: give more --trials.")
    start = [t for t in best if all(value == value_of(base, name) for name, value in t.params.items())][:1]
    results = [{"number": t.number, "state": t.state.name, "score": t.value, "params": t.params} for t in study.trials]
    results = [result | trial.user_attrs for result, trial in zip(results, study.trials, strict=True)]
    write_json({"baseline": start[0].number if start else None, "trials": results}, folder / "trials.json")
    tuned = {section: overrides.get(section, {}) | fields for section, fields in nested(best[0].params).items()}
    path = folder / "best.json"
    write_json(overrides | {"preset": base.preset} | tuned, path)
    print("best trials: " + ", ".join(f"{trial.value:.3f} (trial {trial.number})" for trial in best[:KEPT_CHECKPOINTS]))
    began = "".join(f"; the starting settings scored {trial.value:.3f} (trial {trial.number})" for trial in start)
    print(f"best score on validation tasks: {best[0].value:.3f} (trial {best[0].number}){began}")
    for name, value in best[0].params.items():
        new, was = (f"{x:.6g}" if isinstance(x, float) else x for x in (value, value_of(base, name)))
        print(f"  --{name} {new}   (was {was})")
    print(f"figures in {folder}: {', '.join(save_figures(study, folder))}")
    print(f"apply it: python3 main.py --config {shlex.quote(str(path))}")
    return path


def save_figures(study: optuna.Study, folder: Path) -> list[str]:
    """Save PNGs of history, slices, learning curves and, for four trials or more, importances; return their names."""
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as vis

    pyplot.switch_backend("Agg")
    plots = {"history": vis.plot_optimization_history, "slices": vis.plot_slice, "curves": vis.plot_intermediate_values}
    if len(best_first(study)) >= 4:
        plots["importances"] = vis.plot_param_importances
    with warnings.catch_warnings(action="ignore"):  # such as of the empty range of a single trial's values
        for name, plot in plots.items():
            plot(study)
            pyplot.savefig(folder / f"{name}.png", dpi=100, bbox_inches="tight")
            pyplot.close()
    return [f"{name}.png" for name in plots]


# --------------------------------------------------------------------------------------------------------- command line
@dataclasses.dataclass(frozen=True)
class TuneArguments:
    """Search for better settings with Optuna; print and save the best set found."""

    preset: Literal[tuple(main.PRESETS)] | None = None  # Settings to start from; default, or --config's, if not given.
    config: Path | None = None  # A JSON file of settings on top of the preset, from which the search starts.
    trials: int = 20  # Trials of the study in total, with earlier ones and those of other workers; at least 1.
    seeds: int | None = None  # Seeds trained in each trial, at least 1; if not given, 2, or 1 with the preset quick.
    updates: int | None = None  # Updates of each training; if not given, three quarters of those to start from.
    lifetimes: int = 512  # Validation lifetimes of each evaluation, at least 2.
    jobs: int = 1  # Processes among which this machine's cores are shared, at least 1.
    study: str = "default"  # Name of the study: letters, digits, - and _.
    storage: str = ""  # Instead of the journal: postgresql+psycopg2://user@host/name, or grpc://host:port, a proxy.
    # What to search, in JSON: {"planner.tau": {"low": 0.1, "high": 0.5, "log": true}, "planner.lambda_": null,
    # "transition.padding": ["", "zeros"]}; null stands for the default range.
    space: Path | None = None
    device: str = "cpu"  # Device for all computations.


def tune(arguments: TuneArguments) -> Path:
    """Run the study until it has `arguments.trials` trials, write its results and return the path of best.json. Raise
    UserError or ValueError for a wrong argument, a storage that cannot be used, a study that was begun with other
    settings or is being run by another process, or if no trial was completed."""
    for name, least in {"trials": 1, "seeds": 1, "lifetimes": 2, "jobs": 1}.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"{name} is {value}, but must be at least {least}.")
    if not arguments.study.replace("-", "").replace("_", "").isalnum():
        raise UserError(f"study is {arguments.study!r}, but may contain only letters, digits, - and _.")
    if distributed.is_torchelastic_launched():
        raise UserError("a study runs in processes of its own: start it with python3 and --jobs, without torchrun.")
    main.get_device(arguments.device)  # fails if this machine has no such device
    base, overrides = main.with_file(Settings(), arguments.config, arguments.preset)
    if base.preset == "gym" and not base.world.gym_id:
        raise UserError("preset gym is for an external environment: give its world.gym_id in a --config file.")
    base = main.with_reward_bins(
        merge(shorten_training(base, arguments.updates), {"device": arguments.device}), overrides
    )
    require_room(base.world, arguments.lifetimes)
    seeds = arguments.seeds or (1 if base.preset == "quick" else 2)
    arguments, space = dataclasses.replace(arguments, seeds=seeds), read_space(arguments.space, base)
    folder = Path("runs") / f"tune-{arguments.study}"
    if arguments.storage:
        open_study(arguments, folder)  # fails before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    try:  # a database keeps processes apart itself, also those of several machines that share the folder
        with contextlib.nullcontext() if arguments.storage else filelock.FileLock(folder / ".lock", timeout=0):
            return conclude(run_study(arguments, base, space, folder), base, overrides, folder)
    except filelock.Timeout:
        ways = "use --jobs to share this machine's cores, or --storage with a database to share it between machines"
        raise UserError(f"the study in {folder} is being run by another process: {ways}.") from None


if __name__ == "__main__":
    main.run_program(PROGRAM, lambda: tune(tyro.cli(TuneArguments, prog=PROGRAM)))
