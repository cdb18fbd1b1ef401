"""Tune the settings by what they are for: normalised return on held-out validation tasks after a short meta-training.

    python3 tune_hyperparams.py [--preset quick] [--trials 20] [--seeds 2] [--updates N] [--study NAME]

The study lives in runs/tune-NAME/ as an Optuna journal: the same command goes on where it was stopped. Its best set is
written to best.json there, for `python3 main.py --config`. The first trial is the preset as it stands, so the best is
never worse than where one started. The test split is never read.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import filelock
import numpy as np
import optuna
import tyro
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from main import Learner, Settings, device_of, evaluate, with_preset
from memory import UserError, merge, write_json

SPACE: dict[str, tuple[float, float, bool]] = {  # setting: lowest, highest, on a logarithmic scale; ints stay ints
    "context.learning_rate": (1e-3, 1e-2, True),
    "context.hidden": (32, 128, True),
    "context.hindsight_weight": (0.5, 4.0, True),
    "transition.learning_rate": (2e-3, 1.5e-2, True),
    "planner.learning_rate": (1e-3, 1.2e-2, True),
    "planner.slow": (0.05, 0.5, True),
    "planner.trace": (0.5, 0.95, False),
    "planner.discount": (0.9, 0.97, False),
    "training.exploration": (0.05, 0.5, False),
    "training.final_rate": (0.02, 0.5, True),
}


@dataclass(frozen=True)
class TuneArguments:
    """Search for better settings with Optuna; prints and saves the best set found."""

    preset: Literal["default", "quick", "large"] = "default"
    """The settings to begin from; also the first trial."""
    trials: int = 20
    """Trials in the study in total, earlier ones counted in; at least 1."""
    seeds: int = 2
    """Seeds that each trial trains, at least 1; the score is their mean. After each one a trial may be pruned."""
    updates: int | None = None
    """Updates of each training; half of the preset's if not given."""
    lifetimes: int = 512
    """Validation lifetimes of each score, at least 2."""
    study: str = "default"
    """Name of the study: letters, digits, - and _."""
    device: str = "cpu"
    """Where to compute."""


def value_of(settings: Settings, name: str) -> Any:
    """The value of a dotted setting."""
    section, field = name.split(".")
    return getattr(getattr(settings, section), field)


def nested(flat: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Dotted settings as the nested mapping that `memory.merge` and --config take."""
    tree: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        section, field = name.split(".")
        tree.setdefault(section, {})[field] = value
    return tree


def suggest(trial: optuna.Trial, base: Settings) -> dict[str, Any]:
    """A value for every setting of SPACE, of the type that it has in `base`."""
    chosen = {}
    for name, (low, high, log) in SPACE.items():
        if isinstance(value_of(base, name), int):
            chosen[name] = trial.suggest_int(name, int(low), int(high), log=log)
        else:
            chosen[name] = trial.suggest_float(name, low, high, log=log)
    return chosen


def objective(trial: optuna.Trial, base: Settings, arguments: TuneArguments) -> float:
    """Mean normalised return on the validation split over the seeds 0, 1, ...; NaN fails the trial with its reason."""
    settings = merge(base, nested(suggest(trial, base)))
    scores = []
    for seed in range(arguments.seeds):
        learner = Learner(merge(settings, {"seed": seed}), device_of(arguments.device))
        while learner.update < learner.total:
            learner.advance()
        scores.append(evaluate(learner.system, "validation", arguments.lifetimes)["normalised"])
        if math.isnan(scores[-1]):
            raise FloatingPointError(f"seed {seed} ended with a return that is not a number")
        trial.report(float(np.mean(scores)), seed)
        if seed + 1 < arguments.seeds and trial.should_prune():
            raise optuna.TrialPruned
    return float(np.mean(scores))


def search(arguments: TuneArguments, base: Settings, folder: Path) -> optuna.Study:
    """Open the study in `folder` and run what is left of its trials, each on changed copies of `base`."""
    study = optuna.create_study(
        study_name="tune", storage=JournalStorage(JournalFileBackend(str(folder / "journal.log"))), direction="maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4), load_if_exists=True,
    )  # fmt: skip
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))  # a study that goes on does not repeat itself
    begun = {"preset": arguments.preset, "updates": base.training.updates, "seeds": arguments.seeds, "lifetimes": arguments.lifetimes, "space": sorted(SPACE)}
    if study.user_attrs.get("begun", begun) != begun:
        raise UserError(f"{folder} was begun with {study.user_attrs['begun']}: use the same or another --study.")
    study.set_user_attr("begun", begun)
    study.enqueue_trial({name: value_of(base, name) for name in SPACE}, skip_if_exists=True)
    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):  # its process was stopped: try that set again
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(trial.params)
    ended = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    left = arguments.trials - len(study.get_trials(states=ended))
    print(f"study {folder}: {max(0, left)} of {arguments.trials} trials left", flush=True)
    study.optimize(lambda trial: objective(trial, base, arguments), n_trials=max(0, left), catch=(FloatingPointError,))
    return study


def tune(arguments: TuneArguments) -> Path:
    """Run the study up to `arguments.trials` and write best.json; returns its path.

    Raises:
        UserError: a bad argument, or a study that was begun from other settings.
    """
    for name in ("trials", "seeds", "lifetimes"):
        if getattr(arguments, name) < (2 if name == "lifetimes" else 1):
            raise UserError(f"{name} is {getattr(arguments, name)}, which is too few: choose more.")
    if not arguments.study.replace("-", "").replace("_", "").isalnum():
        raise UserError(f"study is {arguments.study!r}, but may hold only letters, digits, - and _.")
    base = with_preset(merge(Settings(), {"device": arguments.device}), arguments.preset)
    updates = arguments.updates if arguments.updates is not None else max(1, base.training.updates // 2)
    base = merge(base, {"training": {"updates": updates}})
    folder = Path("runs") / f"tune-{arguments.study}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / ".lock", timeout=0):
            study = search(arguments, base, folder)
    except filelock.Timeout:
        raise UserError(f"{folder} is being searched by another process: wait for it or use another --study.") from None
    best = folder / "best.json"
    try:
        write_json({"preset": arguments.preset, **nested(study.best_params)}, best)
    except ValueError:
        raise UserError("no trial has ended yet, so there is no best set: give more --trials.") from None
    print(f"best normalised return on validation tasks: {study.best_value:.3f} (trial {study.best_trial.number})")
    for name, value in study.best_params.items():
        print(f"  --{name} {value:.6g}   (was {value_of(base, name):g})")
    print(f"apply it: python3 main.py --config {best}")
    return best


if __name__ == "__main__":
    try:
        tune(tyro.cli(TuneArguments, prog="tune_hyperparams.py"))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
    except (UserError, ValueError, OSError, json.JSONDecodeError) as error:
        print(f"tune_hyperparams.py: {error}", file=sys.stderr)
        sys.exit(2)
