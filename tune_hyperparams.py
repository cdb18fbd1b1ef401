"""Tune the settings by what they are for: normalised return on held-out validation tasks after a short meta-training.

    python3 tune_hyperparams.py [--preset quick] [--config FILE] [--trials 20] [--seeds 2] [--updates N] [--jobs N]
                                [--study NAME] [--storage URL] [--space FILE]

The study lives in runs/tune-NAME/, by default in an Optuna journal there: the same command goes on where it was stopped, and
several may work on it together. The first trial is the set that one starts from, so the best is never worse. The test split
is never read. In the end the folder holds best.json, for `python3 main.py --config`, and figures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import socket
import sys
import time
import uuid
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from collections.abc import Callable, Iterator

import filelock
import numpy as np
import optuna
import torch
import tyro
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.storages import GrpcStorageProxy, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState

from main import (
    PRESETS, Learner, Settings, as_program, device_of, evaluate, from_file, not_finite, require_room, with_rewards, write_metrics,
)  # fmt: skip
from memory import RunFolder, UserError, merge, save_atomically, write_json


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, integers where the setting is one."""

    low: float
    high: float
    log: bool = False
    when: str = ""
    """Another setting: this one is only searched where that is above 0."""


SPACE: dict[str, Range] = {
    "context.learning_rate": Range(1e-3, 1e-2, log=True),
    "context.hidden": Range(32, 128, log=True),
    "context.hindsight_weight": Range(0.5, 4.0, log=True),
    "context.token_scale": Range(1.0, 30.0, log=True),
    "context.context_scale": Range(1.0, 10.0, log=True),
    "transition.learning_rate": Range(2e-3, 1.5e-2, log=True),
    "transition.film_scale": Range(0.5, 10.0, log=True),
    "planner.learning_rate": Range(1e-3, 1.2e-2, log=True),
    "planner.slow": Range(0.05, 0.5, log=True),
    "planner.trace": Range(0.5, 0.95),
    "planner.discount": Range(0.9, 0.97),
    "planner.promising": Range(0.0, 0.5),
    "planner.likely": Range(0.05, 0.6, when="planner.promising"),
    "training.exploration": Range(0.05, 0.5),
    "training.final_rate": Range(0.02, 0.5, log=True),
}
"""What is searched if nothing else is asked for."""
LOOKS = 2  # evaluations of each seed on its way, after each of which a trial may be pruned
SCHEDULE = ("value_from", "plan_from")  # settings of training that shrink with its length
KEPT = 3  # trials whose checkpoints are kept
HEARTBEAT, SILENCE = 20, 60  # seconds between a database's signs of life, and without any until a trial is given up
PROGRAM = "tune_hyperparams.py"
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class TuneArguments:
    """Search for better settings with Optuna; prints and saves the best set found."""

    preset: Literal[tuple(PRESETS)] | None = None
    """The settings to begin from, also the first trial; those of --config, or default, if not given."""
    config: Path | None = None
    """A JSON file of settings on top of the preset, which the search begins from."""
    trials: int = 20
    """Trials in the study in total, earlier ones and those of other workers counted in; at least 1."""
    seeds: int | None = None
    """Seeds that each trial trains, at least 1; the score is their mean. 2 if not given, 1 of the preset quick."""
    updates: int | None = None
    """Updates of each training, whose schedule shrinks with them; three tenths of the preset's if not given, about 90 seconds a
    seed on 2 cores, and half of quick's."""
    lifetimes: int = 512
    """Validation lifetimes of each score, at least 2."""
    jobs: int = 1
    """Processes on this machine that share its cores, at least 1."""
    study: str = "default"
    """Name of the study: letters, digits, - and _."""
    storage: str = ""
    """Where the study lives instead of the journal: a database, such as postgresql+psycopg2://user@host/name, or
    grpc://host:port, a proxy that `optuna` runs before a database. Many machines may give the same one."""
    space: Path | None = None
    """A JSON file of what to search instead of everything: {"planner.slow": {"low": 0.1, "high": 0.5, "log": true},
    "transition.padding": ["", "zeros"], "planner.trace": null}; null stands for the usual range."""
    device: str = "cpu"
    """Where to compute."""


# --------------------------------------------------------------------------------------------------------- search space


def value_of(settings: Settings, name: str) -> Any:
    """The value of a dotted setting; UserError if there is none."""
    section, _, field = name.partition(".")
    fields = getattr(settings, section, None)
    if not dataclasses.is_dataclass(fields) or not hasattr(fields, field):
        near = ", ".join(sorted(SPACE))
        raise UserError(f"there is no setting {name!r}; such as {near}.")
    return getattr(fields, field)


def nested(flat: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Dotted settings as the nested mapping that `memory.merge` and --config take."""
    tree: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        section, field = name.split(".")
        tree.setdefault(section, {})[field] = value
    return tree


def read_space(path: Path | None, base: Settings) -> dict[str, Range | list]:
    """SPACE, widened to hold `base`, or what a file asks for, which must hold it; every name, type and value is checked.

    Raises:
        UserError: something in it is not as it should be.
    """
    usual = {}
    for name, what in SPACE.items():
        own = value_of(base, name)
        low, high = min(what.low, own), max(what.high, own)
        usual[name] = dataclasses.replace(what, low=low, high=high, log=what.log and low > 0)
    space: dict[str, Range | list] = usual
    if path is not None:
        try:
            asked = json.loads(path.read_text())
            space = {
                n: usual[n] if what is None else what if isinstance(what, list) else Range(**what)
                for n, what in asked.items()
            }
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path} is no search space ({type(error).__name__}: {error}): see --help for an example."
            ) from error
    for name, what in space.items():
        check_range(name, what, base)
    hanging = {name: what.when for name, what in space.items() if isinstance(what, Range) and what.when}
    for name, when in hanging.items():
        if not isinstance(value_of(base, when), (int, float)) or hanging.get(when) in space:
            raise UserError(
                f"{name} is searched when {when} is above 0, which must be a number that is always searched."
            )
        if when not in space:
            space = space | {name: dataclasses.replace(space[name], when="")}
    return dict(
        sorted(space.items(), key=lambda item: bool(getattr(item[1], "when", "")))
    )  # what hangs on others comes last


def check_range(name: str, what: Range | list, base: Settings) -> None:
    """UserError unless every value of the range fits the setting, which scores may be compared by, and `base` lies inside."""
    own = value_of(base, name)
    if name.startswith("world.") or name in (
        f"training.{field}" for field in ("updates", "evaluation_lifetimes", *SCHEDULE)
    ):
        raise UserError(
            f"{name} is not to be searched: scores in different worlds, or after more training, do not compare."
        )
    if isinstance(what, Range) and (isinstance(own, bool) or not isinstance(own, (int, float))):
        raise UserError(f"{name} is no number: give a list of choices for it.")
    try:
        edges = what if isinstance(what, list) else (what.low, what.high)
        for edge in edges:
            merge(base, nested({name: int(edge) if type(own) is int and float(edge).is_integer() else edge}))
        inside = own in edges if isinstance(what, list) else what.low < what.high and what.low <= own <= what.high
        inside = inside and (isinstance(what, list) or not what.log or what.low > 0)
    except (TypeError, ValueError) as error:
        raise UserError(f"the range of {name} does not fit: {error}") from error
    if not inside:
        raise UserError(f"{name} is searched in {what}, but must include {own}, where the search begins: widen it.")


def suggest(trial: optuna.Trial, space: dict[str, Range | list], base: Settings) -> dict[str, Any]:
    """A value for every setting of the space that counts, of the type that it has in `base`."""
    chosen: dict[str, Any] = {}
    for name, what in space.items():
        if isinstance(what, list):
            chosen[name] = trial.suggest_categorical(name, what)
        elif not what.when or chosen[what.when] > 0:
            of_type = trial.suggest_int if isinstance(value_of(base, name), int) else trial.suggest_float
            cast = type(value_of(base, name))
            chosen[name] = of_type(name, cast(what.low), cast(what.high), log=what.log)
    return chosen


# ------------------------------------------------------------------------------------------------------------- workers


def objective(trial: optuna.Trial, space: dict, base: Settings, arguments: TuneArguments, folder: Path) -> float:
    """Mean score on the validation split over the seeds 0, 1, ...: normalised return, or return where nothing normalises it.

    Raises:
        FloatingPointError: a training diverged; TrialPruned: others were better at this point.
    """
    settings, scores = merge(base, nested(suggest(trial, space, base))), []
    for seed in range(arguments.seeds):
        learner = Learner(merge(settings, {"seed": seed}), device_of(arguments.device))
        run = RunFolder(folder / f"trial-{trial.number:04d}" / f"seed-{seed}")
        run.folder.mkdir(parents=True)
        write_json(dataclasses.asdict(learner.settings), run.folder / "config.json")
        for look in range(1, LOOKS + 1):
            main_phase = learner.total - settings.training.updates
            while learner.update < main_phase + look * settings.training.updates // LOOKS:
                learner.advance()
                if learner.update % settings.training.log_every == 0 or learner.update == learner.total:
                    write_metrics(run, learner)
                    if not_finite(learner):
                        raise FloatingPointError(
                            f"seed {seed} diverged: {not_finite(learner)[0]} is not finite at update {learner.update}"
                        )
            result = evaluate(learner.system, "validation", arguments.lifetimes)
            score = result.get("normalised", result["return_mean"])
            trial.report(score, seed * LOOKS + look - 1)
            if (seed, look) != (arguments.seeds - 1, LOOKS) and trial.should_prune():
                raise optuna.TrialPruned
        scores.append(score)
        state = learner.state_dict()
        kept = {part: state[part] for part in ("modules", "counters")}  # enough to evaluate and watch, not to resume
        save_atomically({"format": RunFolder.FORMAT, "logged": 0, "learner": kept}, run.checkpoint)
    return float(np.mean(scores))


def open_study(arguments: TuneArguments, folder: Path, worker: int = 0, tries: int = 3) -> optuna.Study:
    """The study, where it is kept; UserError if that cannot be reached."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # we tell the progress ourselves
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    try:
        if arguments.storage.startswith("grpc://"):
            host, _, port = arguments.storage.removeprefix("grpc://").partition(":")
            storage = GrpcStorageProxy(host=host, port=int(port or 13000))
            storage.wait_server_ready(timeout=10)
        elif arguments.storage:
            again = RetryHeartbeatStaleTrialCallback(max_retry=3)
            storage = RDBStorage(
                arguments.storage,
                heartbeat_interval=HEARTBEAT,
                grace_period=SILENCE,
                heartbeat_stale_trial_callback=again,
            )
        else:
            path = str(folder / "journal.log")
            lock = JournalFileOpenLock(path) if os.name == "nt" else JournalFileSymlinkLock(path)
            mend_journal(Path(path), lock)
            storage = JournalStorage(JournalFileBackend(path, lock_obj=lock))
        study = optuna.create_study(
            study_name=arguments.study, storage=storage, direction="maximize", load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
        )  # fmt: skip
    except Exception as error:  # every database has errors of its own
        if arguments.storage and tries > 1:  # such as when two make its tables at the same time
            time.sleep(1)
            return open_study(arguments, folder, worker, tries - 1)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"the study's storage {arguments.storage or folder / 'journal.log'} cannot be used: {reason}"
        ) from error
    # A study that goes on does not repeat itself, and neither do two workers; who works alone can be repeated.
    alone = not arguments.storage and not study.get_trials(states=(TrialState.RUNNING,))
    study.sampler = optuna.samplers.TPESampler(
        seed=1000 * len(study.trials) + worker if alone else None, constant_liar=True
    )
    return study


def mend_journal(path: Path, lock: JournalFileOpenLock | JournalFileSymlinkLock) -> None:
    """Cut a last line off that a kill or a full disk has left without its end, or nothing could be read or added any more."""
    lock.acquire()
    try:
        if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
    finally:
        lock.release()


def left(study: optuna.Study, trials: int) -> int:
    """How many of so many trials have neither ended, for good or with a reason, nor begun."""
    counted = [
        t
        for t in study.get_trials(deepcopy=False)
        if t.state in (*ENDED, TrialState.RUNNING) or "reason" in t.user_attrs
    ]
    return max(0, trials - len(counted))


def reclaim(study: optuna.Study, folder: Path) -> None:
    """Fail what runs in processes that worked in this folder on this machine and are dead, and queue it again. (Those of other
    folders and machines a database gives up by their missing heartbeat.)"""
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        host, name = trial.user_attrs.get("worker", ("", ""))
        path = folder / f".worker-{name}.lock"
        if host != socket.gethostname() or not path.exists():
            continue
        lock = filelock.FileLock(path)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:  # alive
            continue
        with unless_ended():  # by somebody else in the meantime
            study.tell(trial.number, state=TrialState.FAIL)
            again(study, trial)
        lock.release()


@contextlib.contextmanager
def unless_ended() -> Iterator[None]:
    """Let pass what Optuna says where somebody else has already ended the trial."""
    try:
        yield
    except optuna.exceptions.UpdateFinishedTrialError:
        pass
    except ValueError as error:
        if "Cannot tell" not in str(error):
            raise


def again(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queue what a trial tried, or was to try."""
    study.enqueue_trial(trial.system_attrs.get("fixed_params", {}) | trial.params)


@contextlib.contextmanager
def at_work(folder: Path) -> Iterator[tuple[str, str]]:
    """Host and name of this worker, whose lock ends with its process however that ends."""
    name = uuid.uuid4().hex[:12]
    lock = filelock.FileLock(folder / f".worker-{name}.lock")
    with lock:
        yield socket.gethostname(), name
    Path(lock.lock_file).unlink(missing_ok=True)


def work(arguments: TuneArguments, base: Settings, space: dict, folder: Path, worker: int = 0) -> None:
    """Run trials until none is left; one process."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // arguments.jobs))
    study, turn = open_study(arguments, folder, worker), filelock.FileLock(folder / ".ask.lock")

    stopped: list[BaseException] = []

    def run(trial: optuna.Trial) -> float:
        trial.set_user_attr("worker", me)
        turn.release()  # from now on it is counted
        try:
            return objective(trial, space, base, arguments, folder)
        except optuna.TrialPruned:
            raise
        except (KeyboardInterrupt, OSError) as error:  # told to stop, or a full disk: not the settings' fault
            stopped.append(error)
            mine = study.get_trials(deepcopy=False)[trial.number]
            if mine.state == TrialState.RUNNING:
                again(study, mine)
            raise
        except Exception as error:
            with unless_ended():
                trial.set_user_attr("reason", f"{type(error).__name__}: {error}")
            raise

    with at_work(folder) as me:
        while True:
            with turn:  # one asks at a time, so that together they run as many as were asked for; see `run`
                reclaim(study, folder)
                if not left(study, arguments.trials):
                    break
                with unless_ended():  # after a silence it was tried by somebody else
                    study.optimize(run, n_trials=1, catch=(Exception,))
            if stopped:
                raise stopped[0]
            tidy(study, folder)
            print(progress(study, arguments), flush=True)


def tidy(study: optuna.Study, folder: Path) -> None:
    """Delete all checkpoints but those of the best trials; configurations and metrics stay."""
    kept = {f"trial-{trial.number:04d}" for trial in ranked(study)[:KEPT]}
    kept |= {f"trial-{trial.number:04d}" for trial in study.get_trials(states=(TrialState.RUNNING,))}
    for path in folder.glob("trial-*/seed-*/checkpoint.pt"):
        if path.parent.parent.name not in kept:
            path.unlink(missing_ok=True)


def ranked(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that went to their end, best first."""
    return sorted(study.get_trials(states=(TrialState.COMPLETE,)), key=lambda trial: -trial.value)


def progress(study: optuna.Study, arguments: TuneArguments) -> str:
    """The last trial that ended, the best so far, and how long the rest will take."""
    every = study.get_trials(deepcopy=False)
    done = [trial for trial in every if trial.datetime_complete]
    last = max(done, key=lambda trial: trial.datetime_complete)
    how = f"{last.value:.3f}" if last.state == TrialState.COMPLETE else last.state.name.lower()
    if "reason" in last.user_attrs:
        how += f" ({last.user_attrs['reason']})"
    best = "".join(f", best {trial.value:.3f} (trial {trial.number})" for trial in ranked(study)[:1])
    running = sum(trial.state == TrialState.RUNNING for trial in every)
    remaining = left(study, arguments.trials) + running
    seconds = np.mean([trial.duration.total_seconds() for trial in done]) * remaining / max(1, arguments.jobs, running)
    return f"trial {last.number}: {how}{best}; {remaining} left, about {seconds / 60:.0f} min"


# ------------------------------------------------------------------------------------------------------------- results


def save_figures(study: optuna.Study, folder: Path) -> list[str]:
    """History, slices, learning curves, and from four trials on importances, as PNG; returns their names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as draw

    kinds = {
        "history": draw.plot_optimization_history,
        "slices": draw.plot_slice,
        "curves": draw.plot_intermediate_values,
    }
    if len(ranked(study)) >= 4:
        kinds["importances"] = lambda study: draw.plot_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    with warnings.catch_warnings(action="ignore"):
        for name, plot in kinds.items():
            axes = np.ravel(plot(study))[0]
            if name == "slices":  # one beside the other, with room for their labels
                axes.figure.set_size_inches(3.2 * max(2, len(axes.figure.axes)), 3.6)
            axes.figure.savefig(folder / f"{name}.png", dpi=100, bbox_inches="tight")
            pyplot.close(axes.figure)
    return [f"{name}.png" for name in kinds]


def conclude(study: optuna.Study, base: Settings, changed: dict[str, Any], folder: Path) -> Path:
    """Print the best trials, what mattered and the best set; write best.json (with what --config `changed`), trials.json and
    figures; best.json's path."""
    best = ranked(study)
    failed = [trial for trial in study.get_trials(deepcopy=False) if "reason" in trial.user_attrs]
    for trial in failed:
        print(f"trial {trial.number} failed: {trial.user_attrs['reason']}")
    if not best:
        raise UserError("no trial has ended well yet, so there is no best set: give more --trials.")
    tuned = merge(base, nested(best[0].params))
    content: dict[str, Any] = {**changed, "preset": base.preset}
    for section, fields in nested(best[0].params).items():
        content[section] = {
            **changed.get(section, {}),
            **{name: value_of(tuned, f"{section}.{name}") for name in fields},
        }
    path = folder / "best.json"
    write_json(content, path)
    rows = [
        {"number": t.number, "state": t.state.name, "score": t.value, "params": t.params, **t.user_attrs}
        for t in study.get_trials()
    ]
    first = next((t for t in best if all(value == value_of(base, name) for name, value in t.params.items())), None)
    write_json({"baseline": first and first.number, "trials": rows}, folder / "trials.json")
    print("best trials: " + ", ".join(f"{trial.value:.3f} (trial {trial.number})" for trial in best[:KEPT]))
    if len(best) >= 4:
        with warnings.catch_warnings(action="ignore"):
            shares = optuna.importance.get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
        print("what mattered most: " + ", ".join(f"{name} {share:.0%}" for name, share in list(shares.items())[:5]))
    began = f", where the search began {first.value:.3f} (trial {first.number})" if first else ""
    print(f"best score on validation tasks: {best[0].value:.3f} (trial {best[0].number}){began}")
    for name, value in best[0].params.items():
        value, own = (f"{x:.6g}" if isinstance(x, float) else x for x in (value, value_of(base, name)))
        print(f"  --{name} {value}   (was {own})")
    print(f"figures in {folder}: {', '.join(save_figures(study, folder))}")
    print(f"apply it: python3 main.py --config {path}")
    return path


def shortened(base: Settings, updates: int | None) -> Settings:
    """`base` with a training of so many updates, or of the usual share, whose value and plans begin as much sooner."""
    full = base.training
    updates = max(1, full.updates * (5 if base.preset == "quick" else 3) // 10) if updates is None else updates
    sooner = {name: round(getattr(full, name) * min(1.0, updates / full.updates)) for name in SCHEDULE}
    return merge(base, {"training": {"updates": updates, **sooner}})


def tune(arguments: TuneArguments) -> Path:
    """Run the study up to `arguments.trials` and conclude; returns the path of best.json.

    Raises:
        UserError: a bad argument, an unreachable storage, or a study that was begun from other settings.
    """
    for name in ("trials", "seeds", "lifetimes", "jobs"):
        given = getattr(arguments, name)
        if given is not None and given < (2 if name == "lifetimes" else 1):
            raise UserError(f"{name} is {given}, which is too few: choose more.")
    if not arguments.study.replace("-", "").replace("_", "").isalnum():
        raise UserError(f"study is {arguments.study!r}, but may hold only letters, digits, - and _.")
    device_of(arguments.device)
    base, said = from_file(Settings(), arguments.config, arguments.preset)
    if base.preset == "gym" and not base.world.gym_id:
        raise UserError("preset gym is for a world of other people's: name it as world.gym_id in a --config.")
    base = with_rewards(merge(base, {"device": arguments.device}), said)
    require_room(base.world, arguments.lifetimes)
    base = shortened(base, arguments.updates)
    if arguments.seeds is None:
        arguments = dataclasses.replace(arguments, seeds=1 if base.preset == "quick" else 2)
    space = read_space(arguments.space, base)
    folder = Path("runs") / f"tune-{arguments.study}"
    fresh = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        study = open_study(arguments, folder)
    except UserError:
        if fresh:
            shutil.rmtree(folder)
        raise
    begin(study, arguments, base, space, folder)
    if arguments.jobs == 1:
        work(arguments, base, space, folder)
    else:
        context = multiprocessing.get_context("spawn")
        task = (PROGRAM, stoppable, work, arguments, base, space, folder)
        workers = [context.Process(target=as_program, args=(*task, number)) for number in range(arguments.jobs)]
        for worker in workers:
            worker.start()
        try:
            for worker in workers:
                worker.join()
        finally:  # Ctrl-C reaches all of them, and each sees to its own trial
            for worker in workers:
                worker.join()
        ended = [worker.exitcode for worker in workers if worker.exitcode]
        if ended:
            print(
                f"{len(ended)} of {len(workers)} workers ended early, with exit code {ended[0]}: the same command goes on."
            )
    return conclude(study, base, said, folder)


def begin(study: optuna.Study, arguments: TuneArguments, base: Settings, space: dict, folder: Path) -> None:
    """Queue the first trial in a new study; refuse one that searches something else."""
    ranges = {name: what if isinstance(what, list) else dataclasses.asdict(what) for name, what in space.items()}
    settings = {**dataclasses.asdict(base), "device": ""}
    begun = json.loads(
        json.dumps({"seeds": arguments.seeds, "lifetimes": arguments.lifetimes, "space": ranges, "settings": settings})
    )
    with filelock.FileLock(folder / ".ask.lock"):
        home, kept = (
            folder / ".storage",
            hashlib.sha256(arguments.storage.encode()).hexdigest(),
        )  # it may hold a password
        if home.exists() and home.read_text() != kept:
            raise UserError(
                f"{folder} belongs to a study in another storage: give the same --storage, or another --study."
            )
        home.write_text(kept)
        known = study.user_attrs.get("begun", begun)
        if known != begun:
            other = [name for name in begun if known.get(name) != begun[name]]
            raise UserError(
                f"{folder} was begun with other {', '.join(other)}: give the same ones, or another --study."
            )
        study.set_user_attr("begun", begun)
        first = {name: value_of(base, name) for name in space}
        if not study.get_trials(deepcopy=False):
            study.enqueue_trial(first)
        reclaim(study, folder)
    print(f"study {folder}: {left(study, arguments.trials)} of {arguments.trials} trials left", flush=True)


def stoppable(call: Callable, *arguments: Any) -> None:
    """Call it; say on Ctrl-C how to go on."""
    try:
        call(*arguments)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        raise


if __name__ == "__main__":
    as_program(PROGRAM, stoppable, lambda: tune(tyro.cli(TuneArguments, prog=PROGRAM)))
