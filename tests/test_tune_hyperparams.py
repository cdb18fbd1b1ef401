"""The hyperparameter search: its space, what a trial trains and scores, continuing a study, workers, results.

SLOW_TESTS=1 adds whole studies by command, killed processes, --jobs, PostgreSQL and Optuna's proxy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import importlib.util
import io
import json
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import subprocess
import threading
import time
import unittest
from pathlib import Path
from unittest import mock

import filelock
import optuna
import torch
from optuna.trial import TrialState

import main
import tune_hyperparams
from main import PRESETS, Learner, Settings, with_preset
from memory import RunFolder, UserError, merge
from tests.shared import TINY, children_of, command, free_port, start, temporary_folder, wait_for
from tune_hyperparams import SPACE, TuneArguments, open_study, read_space, tune, value_of

SHORT = ["--config", "tiny.json", "--seeds", "1", "--updates", "4", "--lifetimes", "8"]
SMALL_SPACE = {"context.learning_rate": None, "planner.tau": None}
START = {name: value_of(merge(Settings(), TINY), name) for name in SMALL_SPACE}
POSTGRES = sorted(glob.glob("/usr/lib/postgresql/*/bin"))[-1:]
SCRIPT = "tune_hyperparams.py"
STUDY = Path("runs/tune-default")
slow = unittest.skipUnless(os.environ.get("SLOW_TESTS"), "slow: set SLOW_TESTS=1")


def study_folder(space: dict | None = None) -> Path:
    """A working directory with tiny settings in tiny.json and a search space in space.json."""
    folder = temporary_folder()
    (folder / "tiny.json").write_text(json.dumps(TINY))
    (folder / "space.json").write_text(json.dumps(space or SMALL_SPACE))
    return folder


def read(content: str, base: Settings | None = None) -> dict:
    """The search space that a file with this content asks for."""
    path = temporary_folder() / "space.json"
    path.write_text(content)
    return read_space(path, base or Settings())


def arguments_of(**options) -> TuneArguments:
    """Arguments for a search from tiny settings over a small space."""
    small = {"config": Path("tiny.json"), "space": Path("space.json"), "updates": 4, "lifetimes": 8, "seeds": 1}
    return TuneArguments(**small | options)


def in_process(folder: Path, **options) -> str:
    """`tune` in `folder` without the seconds that a new process takes to import; what it printed."""
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as printed:
        tune(arguments_of(**options))
    return printed.getvalue()


def untrained(trial, space, base, arguments, folder) -> float:
    """An objective that scores settings without a training: the nearer planner.tau is to 0.3, the better."""
    settings = tune_hyperparams.suggest(trial, space, base)
    score = -abs(settings.planner.tau - 0.3)
    trial.report(score, 0)
    return score


def search(folder: Path, objective=untrained, **options) -> str:
    """`in_process` with such an objective in the place of the trainings, and without figures."""
    with mock.patch.multiple(tune_hyperparams, objective=objective, save_figures=mock.Mock(return_value=[])):
        return in_process(folder, **options)


def results_of(folder: Path) -> list[dict]:
    """The trials in trials.json."""
    return json.loads((folder / STUDY / "trials.json").read_text())["trials"]


def states_of(folder: Path) -> list[str]:
    """The states of the trials in the journal."""
    study = open_study(TuneArguments(), folder / STUDY)
    return [trial.state.name for trial in study.trials]


def start_search(folder: Path, *arguments: str) -> subprocess.Popen:
    return start(*SHORT, "--space", "space.json", *arguments, folder=folder, script=SCRIPT)


def lives(pid: int) -> bool:
    """Whether a process runs, on POSIX systems; one that only waits to be reaped does not."""
    line = ["ps", "-o", "stat=", "-p", str(pid)]
    state = subprocess.run(line, check=False, capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def started_trials(folder: Path) -> int:
    """How many trials have logged their first metrics."""
    return len(list(folder.glob("runs/tune-default/trial-*/seed-0/metrics.jsonl")))


class TestSpace(unittest.TestCase):
    def test_default_space_names_real_settings_and_includes_every_presets_values(self):
        for preset in PRESETS:
            base = with_preset(Settings(), preset)
            space = read_space(None, base)
            self.assertEqual(set(space), set(SPACE), preset)
            for name, range_ in space.items():
                self.assertTrue(range_["low"] <= value_of(base, name) <= range_["high"], f"{preset}: {name}")

    def test_default_ranges_are_widened_and_lose_their_logarithm_at_zero(self):
        base = merge(Settings(), {"context": {"decoding_weight": 0}, "planner": {"tau": 0.9}})
        space = read_space(None, base)
        self.assertEqual(space["context.decoding_weight"], {"low": 0, "high": 4.0, "log": False})
        self.assertEqual(space["planner.tau"], {"low": 0.05, "high": 0.9, "log": True})

    def test_files_choose_default_ranges_and_add_settings(self):
        budget = {"low": 64, "high": 512, "log": True}
        asked = {"planner.lambda_": None, "transition.padding": ["", "zeros"], "memory.budget_mb": budget}
        asked["planner.tau"] = {"low": 0.1, "high": 0.4}
        space = read(json.dumps(asked))
        self.assertEqual(space, asked | {"planner.lambda_": SPACE["planner.lambda_"]})

    def test_mistakes_are_refused_with_the_name_of_the_setting(self):
        for content, words in (
            ('{"planner.slwo": {"low": 0.1, "high": 0.5}}', "no setting 'planner.slwo'"),
            ('{"planner.slwo": null}', "planner.slwo"),
            ('{"seed": [0, 1]}', "no setting 'seed'"),
            ('{"world": {"low": 0, "high": 1}}', "no setting 'world'"),
            ('{"planner.tau": {"low": 0.3, "high": 0.5}}', "planner.tau .* must include 0.2"),
            ('{"planner.tau": {"low": 0.1}}', "planner.tau .*high"),
            ('{"planner.tau": {"low": 0.5, "high": 0.1}}', "planner.tau .*low"),
            ('{"planner.tau": {"low": 0.1, "high": 3}}', "planner.tau is 3"),
            ('{"planner.tau": {"low": 0.1, "high": 0.5, "when": "planner.min_branch_prob"}}', "planner.tau .*when"),
            ('{"planner.tau": {"low": "a", "high": "b"}}', "planner.tau"),
            ('{"planner.tau": 0.2}', "planner.tau"),
            ('{"planner.expand_margin": {"low": 0, "high": 1, "log": true}}', "planner.expand_margin .*log"),
            ('{"transition.padding": ["zeros"]}', "transition.padding .*must include"),
            ('{"transition.padding": {"low": 0, "high": 1}}', "transition.padding is not a number"),
            ('{"context.hidden": [64, 64.7]}', "context.hidden"),
            ('{"context.hidden": {"low": 32.5, "high": 128}}', "context.hidden"),
            ('{"world.slip": {"low": 0, "high": 1}}', "world.slip cannot be searched"),
            ('{"training.plan_from": {"low": 10, "high": 300}}', "training.plan_from cannot be searched"),
            ('{"training.updates": {"low": 10, "high": 2000}}', "training.updates cannot be searched"),
            ("[", "not a search space"),
            ("[1]", "not a search space"),
        ):
            with self.subTest(content), self.assertRaisesRegex(UserError, words):
                read(content)
        with self.assertRaisesRegex(UserError, "nowhere.json is not a search space"):
            read_space(Path("nowhere.json"), Settings())

    def test_trials_take_values_of_the_settings_types(self):
        space = read(
            '{"context.hidden": {"low": 32, "high": 128, "log": true}, "planner.tau": null, "planner.min_branch_prob": null,'
            ' "transition.padding": ["", "zeros"]}'
        )
        values = {"context.hidden": 40, "planner.tau": 0.1, "planner.min_branch_prob": 0.3, "transition.padding": "zeros"}
        settings = tune_hyperparams.suggest(optuna.trial.FixedTrial(values), space, Settings())
        self.assertEqual(settings, merge(Settings(), tune_hyperparams.nested(values)))
        self.assertIs(type(settings.context.hidden), int)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        for _ in range(20):
            hidden = tune_hyperparams.suggest(study.ask(), space, Settings()).context.hidden
            self.assertTrue(32 <= hidden <= 128)

    def test_every_setting_is_searched_in_every_trial(self):
        trial = optuna.trial.FixedTrial({"planner.expand_margin": 0.0, "planner.min_branch_prob": 0.3})
        space = {name: SPACE[name] for name in ("planner.expand_margin", "planner.min_branch_prob")}
        planner = tune_hyperparams.suggest(trial, space, Settings()).planner
        self.assertEqual((planner.expand_margin, planner.min_branch_prob), (0.0, 0.3))


class TestObjective(unittest.TestCase):
    """One trial, whose trainings advance without learning and whose evaluations return given scores."""

    def setUp(self):
        self.folder = temporary_folder()
        self.base = tune_hyperparams.shorten_training(merge(Settings(), TINY), 7)
        self.evaluated = []  # settings, update and arguments of each evaluation

    def run_trial(self, scores, seeds=2, should_prune=lambda: False, advance=None):
        """The objective's value and the trial, at planner.tau 0.1."""
        learners, scores = [], iter(scores)

        def count(learner):
            if not learners or learners[-1] is not learner:
                learners.append(learner)
            learner.update += 1
            learner.metrics["value/value"] = torch.tensor(math.nan if advance and advance(learner) else 1.0)

        def evaluate(system, *arguments):
            self.evaluated.append((system.settings, learners[-1].update, arguments))
            score = next(scores)
            return score if isinstance(score, dict) else {"normalised": score, "return_mean": 100.0}

        def state_dict(learner):
            modules = {name: module.state_dict() for name, module in learner.system.modules().items()}
            return {"modules": modules, "counters": [learner.update, 0, 0], "others": "as much again"}

        study = optuna.create_study(direction="maximize")
        study.enqueue_trial({"planner.tau": 0.1})
        trial = study.ask()
        trial.should_prune = should_prune
        arguments = TuneArguments(seeds=seeds, lifetimes=8)
        space = {"planner.tau": SPACE["planner.tau"]}
        with (
            mock.patch.multiple(Learner, advance=count, state_dict=state_dict),
            mock.patch.object(main, "evaluate", evaluate),
        ):
            try:
                return tune_hyperparams.objective(trial, space, self.base, arguments, self.folder), study.trials[0]
            except optuna.TrialPruned:
                return None, study.trials[0]

    def test_score_is_the_mean_over_seeds_of_the_last_validation_score(self):
        value, trial = self.run_trial([0.1, 0.3, 0.2, 0.5])
        self.assertAlmostEqual(value, 0.4)
        self.assertEqual(trial.intermediate_values, {0: 0.1, 1: 0.3, 2: 0.2, 3: 0.5})
        start = TINY["training"]["perception_updates"] + TINY["training"]["effect_updates"]
        for (settings, update, arguments), (seed, done) in zip(self.evaluated, ((0, 4), (0, 7), (1, 4), (1, 7))):
            self.assertEqual((settings.seed, settings.planner.tau, arguments), (seed, 0.1, ("validation", 8)))
            self.assertEqual(update, start + done)

    def test_return_is_the_score_where_nothing_normalises_it(self):
        value, _ = self.run_trial([{"return_mean": 1.0}, {"return_mean": 3.0}], seeds=1)
        self.assertEqual(value, 3.0)

    def test_each_seed_leaves_configuration_metrics_and_a_checkpoint(self):
        self.run_trial([0.1, 0.2, 0.3, 0.4])
        for seed in (0, 1):
            run = RunFolder(self.folder / f"trial-0000/seed-{seed}")
            settings = run.settings(Settings())
            self.assertEqual((settings.seed, settings.planner.tau, settings.training.updates), (seed, 0.1, 7))
            logged = [json.loads(line)["update"] for line in run.metrics.read_text().splitlines()]
            self.assertEqual(logged, [3, 6, 9, 12, 15, 18, 21])
            state, _ = run.load()
            self.assertEqual(set(state), {"modules", "counters"})
            main.System(settings, torch.device("cpu")).load(state["modules"])

    def test_it_may_be_pruned_at_every_point_but_the_last(self):
        value, trial = self.run_trial([0.1, 0.2, 0.3], should_prune=lambda: len(self.evaluated) == 3)
        self.assertIsNone(value)
        self.assertEqual(len(trial.intermediate_values), 3)
        self.assertFalse((self.folder / "trial-0000/seed-1/checkpoint.pt").exists())
        self.folder = temporary_folder()
        self.evaluated.clear()
        value, _ = self.run_trial([0.1, 0.2, 0.3, 0.4], should_prune=lambda: len(self.evaluated) == 4)
        self.assertAlmostEqual(value, 0.3)

    def test_divergence_is_an_error_that_names_seed_metric_and_update(self):
        with self.assertRaisesRegex(FloatingPointError, "seed-0: value/value is not finite at update 6"):
            self.run_trial([], advance=lambda learner: learner.update >= 5)

    def test_shorter_training_scales_its_schedule(self):
        for preset, given, updates in (
            ("default", None, 300),
            ("quick", None, 140),
            ("default", 500, 500),
            ("default", 2000, 2000),
        ):
            base = with_preset(Settings(), preset)
            short, full = tune_hyperparams.shorten_training(base, given).training, base.training
            self.assertEqual(short.updates, updates)
            share = min(1, updates / full.updates)
            scaled = (round(full.value_from * share), round(full.plan_from * share))
            self.assertEqual((short.value_from, short.plan_from), scaled)
            self.assertEqual(short.effect_updates, full.effect_updates)


class TestStudy(unittest.TestCase):
    def test_same_command_continues_and_the_first_trial_is_the_start(self):
        folder = study_folder()
        for trials, left in ((1, 1), (4, 3), (4, 0)):
            self.assertIn(f"{left} of {trials} trials left", search(folder, trials=trials))
        results = results_of(folder)
        self.assertEqual(len(results), 4)
        self.assertEqual(results[0]["params"], START)
        self.assertEqual(json.loads((folder / STUDY / "trials.json").read_text())["baseline"], 0)

    def test_searches_repeat_themselves(self):
        first, second = study_folder(), study_folder()
        for folder in (first, second):
            search(folder, trials=3)
        params = [[result["params"] for result in results_of(folder)] for folder in (first, second)]
        self.assertEqual(*params)
        self.assertEqual(len({str(values) for values in params[0]}), 3)

    def test_progress_tells_result_best_and_what_is_left(self):
        scores = iter([0.5, 0.25, math.nan])

        def objective(trial, *_):
            score = next(scores)
            if math.isnan(score):
                raise optuna.TrialPruned
            return score

        printed = search(study_folder(), objective, trials=3)
        self.assertIn("trial 0: 0.500, best 0.500 (trial 0); 2 left, about 0 min", printed)
        self.assertIn("trial 1: 0.250, best 0.500 (trial 0); 1 left", printed)
        self.assertIn("trial 2: pruned, best 0.500 (trial 0); 0 left", printed)

    def test_other_settings_space_and_seeds_are_refused(self):
        folder = study_folder()
        search(folder, trials=1)
        before = (folder / STUDY / "journal.log").read_bytes()
        (folder / "other.json").write_text('{"planner.tau": null}')
        for options, words in (
            ({"preset": "quick"}, "other settings"),
            ({"space": Path("other.json")}, "other space"),
            ({"seeds": 2}, "other seeds"),
            ({"lifetimes": 9}, "other lifetimes"),
            ({"storage": f"sqlite:///{folder}/x.db"}, "another storage"),
        ):
            with self.subTest(**options), self.assertRaisesRegex(UserError, words):
                search(folder, trials=2, **options)
        journal = (folder / STUDY / "journal.log").read_bytes()
        self.assertEqual([json.loads(line)["op_code"] for line in journal[len(before) :].splitlines()].count(4), 0)
        self.assertIn("1 of 2 trials left", search(folder, trials=2, device="cpu:0"))  # which may differ

    def test_url_of_the_storage_is_not_written_to_the_folder(self):
        folder = study_folder()
        store = optuna.storages.InMemoryStorage()
        with mock.patch.object(tune_hyperparams, "RDBStorage", return_value=store):
            search(folder, trials=1, storage="postgresql://me:secret@host/db")
        for path in folder.rglob("*"):
            self.assertFalse(path.is_file() and b"secret" in path.read_bytes(), path)

    def test_failures_are_recorded_with_their_reason_and_count(self):
        folder = study_folder()
        num_effects = iter([RuntimeError("out of memory"), 0.5, 0.4])

        def objective(trial, space, base, *_):
            tune_hyperparams.suggest(trial, space, base)
            outcome = next(num_effects)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        printed = search(folder, objective, trials=3)
        self.assertIn("trial 0: RuntimeError: out of memory; 2 left", printed)
        self.assertNotIn("where the search started", printed)
        results = results_of(folder)
        self.assertEqual([result["state"] for result in results], ["FAIL", "COMPLETE", "COMPLETE"])
        self.assertEqual(results[0]["reason"], "RuntimeError: out of memory")
        self.assertIn("0 of 3 trials left", search(folder, trials=3))

    def test_interrupted_trials_fail_and_are_queued_again(self):
        for error in (KeyboardInterrupt(), OSError("No space left on device")):
            folder = study_folder()

            def objective(trial, space, base, arguments, folder, error=error):
                if trial.number == 1:
                    tune_hyperparams.suggest(trial, space, base)
                    raise error
                return untrained(trial, space, base, arguments, folder)

            with self.subTest(error=error):
                with self.assertRaises(type(error)):
                    search(folder, objective, trials=2)
                self.assertEqual(states_of(folder), ["COMPLETE", "FAIL", "WAITING"])
                self.assertIn("1 of 2 trials left", search(folder, trials=2))
                results = results_of(folder)
                self.assertEqual([result["state"] for result in results], ["COMPLETE", "FAIL", "COMPLETE"])
                self.assertEqual(results[1]["params"], results[2]["params"])

    def test_interrupted_first_trial_keeps_the_values_that_it_was_not_asked_for(self):
        folder = study_folder()
        with self.assertRaises(KeyboardInterrupt):
            search(folder, mock.Mock(side_effect=KeyboardInterrupt), trials=1)
        search(folder, trials=1)
        self.assertEqual(results_of(folder)[1]["params"], START)

    def test_trials_of_a_killed_process_are_failed_and_queued_again_once(self):
        folder = study_folder()
        search(folder, trials=1)
        killed = open_study(TuneArguments(), folder / STUDY).ask()  # and never available_metrics a result
        killed.suggest_float("planner.tau", 0.05, 0.5, log=True)
        self.assertIn("1 of 2 trials left", search(folder, trials=2))
        results = results_of(folder)
        self.assertEqual([result["state"] for result in results], ["COMPLETE", "FAIL", "COMPLETE"])
        self.assertEqual(results[2]["params"]["planner.tau"], killed.params["planner.tau"])
        self.assertIn("0 of 2 trials left", search(folder, trials=2))

    def test_running_trials_of_a_database_are_left_to_its_heartbeat(self):
        study = optuna.create_study(study_name="default", direction="maximize")
        study.ask()
        with mock.patch.object(tune_hyperparams, "open_study", return_value=study):
            printed = search(study_folder(), trials=2, storage="sqlite://")
        self.assertIn("1 of 2 trials left", printed)
        self.assertEqual([trial.state for trial in study.trials], [TrialState.RUNNING, TrialState.COMPLETE])

    def test_a_study_that_another_process_runs_is_refused_with_code_2(self):
        folder = study_folder()
        search(folder, trials=1)
        before = states_of(folder)
        with (
            filelock.FileLock(folder / STUDY / ".lock"),
            contextlib.chdir(folder),
            contextlib.redirect_stderr(io.StringIO()) as errors,
            self.assertRaises(SystemExit) as stopped,
        ):
            main.as_program(SCRIPT, tune, arguments_of(trials=2))
        self.assertEqual(stopped.exception.code, 2)
        self.assertRegex(errors.getvalue(), "being run by another process: use --jobs .* --storage with a database")
        self.assertEqual(len(errors.getvalue().splitlines()), 1)
        self.assertEqual(states_of(folder), before)
        self.assertIn("1 of 2 trials left", search(folder, trials=2))

    def test_the_lock_is_held_while_trials_run(self):
        folder, refused = study_folder(), []

        def objective(trial, *rest):
            try:
                search(folder, trials=5)
            except UserError as error:
                refused.append(str(error))
            return untrained(trial, *rest)

        search(folder, objective, trials=2)
        self.assertEqual(len(refused), 2)
        self.assertIn("being run by another process", refused[0])

    def test_an_incomplete_last_line_of_the_journal_is_cut_off(self):
        folder = study_folder()
        search(folder, trials=1)
        with open(folder / STUDY / "journal.log", "a") as journal:
            journal.write('{"op_code": 4, "wor')  # as a kill or a full disk leaves it
        self.assertIn("1 of 2 trials left", search(folder, trials=2))
        self.assertIn("0 of 2 trials left", search(folder, trials=2))

    def test_only_the_best_and_running_trials_keep_their_checkpoints(self):
        folder = temporary_folder()
        study = open_study(TuneArguments(), folder)
        for score in (0.1, 0.5, 0.4, 0.2, 0.3):
            study.tell(study.ask(), score)
            study.tell(study.ask(), state=TrialState.FAIL)
        study.ask()  # still running
        for number in range(11):
            (folder / f"trial-{number:04d}/seed-0").mkdir(parents=True)
            for name in ("checkpoint.pt", "metrics.jsonl"):
                (folder / f"trial-{number:04d}/seed-0/{name}").touch()
        tune_hyperparams.delete_checkpoints(study, folder)
        kept = sorted(path.parent.parent.name for path in folder.glob("*/*/checkpoint.pt"))
        self.assertEqual(kept, ["trial-0002", "trial-0004", "trial-0008", "trial-0010"])
        self.assertEqual(len(list(folder.glob("*/*/metrics.jsonl"))), 11)


class TestStorage(unittest.TestCase):
    def test_a_proxy_is_reached_at_its_host_and_port(self):
        for url, port in (("grpc://server:4711", 4711), ("grpc://server", 13000)):
            proxy = mock.Mock(return_value=optuna.storages.InMemoryStorage())
            proxy.return_value.wait_server_ready = mock.Mock()
            with mock.patch.object(tune_hyperparams, "GrpcStorageProxy", proxy):
                open_study(TuneArguments(storage=url), Path("unused"))
            proxy.assert_called_once_with(host="server", port=port)
            proxy.return_value.wait_server_ready.assert_called_once()

    def test_a_database_records_heartbeats_and_is_tried_again(self):
        store = optuna.storages.InMemoryStorage()
        broken, arguments = RuntimeError("table exists\nand more"), TuneArguments(storage="sqlite://")
        database = mock.Mock(side_effect=[broken, store, broken, broken, broken])
        with mock.patch.object(tune_hyperparams, "RDBStorage", database), mock.patch.object(time, "sleep"):
            self.assertEqual(open_study(arguments, Path("unused")).trials, [])
            self.assertEqual(database.call_count, 2)
            with self.assertRaisesRegex(UserError, "storage sqlite:// cannot be used: table exists$"):
                open_study(arguments, Path("unused"))
        self.assertEqual(database.call_count, 5)
        options = database.call_args.kwargs
        self.assertEqual((options["heartbeat_interval"], options["grace_period"]), (20, 60))
        retry = options["heartbeat_stale_trial_callback"]
        self.assertIsInstance(retry, optuna.storages.RetryHeartbeatStaleTrialCallback)

    def test_a_study_in_a_database_continues(self):
        folder = study_folder()
        url = f"sqlite:///{folder}/study.db"
        self.assertIn("2 of 2 trials left", search(folder, trials=2, storage=url))
        self.assertIn("1 of 3 trials left", search(folder, trials=3, storage=url))
        self.assertFalse((folder / STUDY / "journal.log").exists())
        with self.assertRaisesRegex(UserError, "another storage"):
            search(folder, trials=3)

    @slow
    def test_a_silent_trial_is_given_up_by_the_database_and_tried_again(self):
        url = f"sqlite:///{temporary_folder()}/study.db"
        heartbeat = {"heartbeat_interval": 1, "grace_period": 2}
        with mock.patch.object(tune_hyperparams, "HEARTBEAT", heartbeat):
            study = open_study(TuneArguments(storage=url), Path("unused"))
            silent = study.ask({"planner.tau": optuna.distributions.FloatDistribution(0.1, 0.5)})
            study._storage.record_heartbeat(silent._trial_id)
            time.sleep(4)
            study.optimize(lambda trial: trial.suggest_float("planner.tau", 0.1, 0.5), n_trials=1)
        self.assertEqual([trial.state for trial in study.trials], [TrialState.FAIL, TrialState.COMPLETE])
        self.assertEqual(study.trials[0].params, study.trials[1].params)


class OneTrialProcess:
    """In the place of a worker's process: runs one trial when it is started."""

    def __init__(self, target, args) -> None:
        self.target, (_, self.work, *self.task, _, self.number), self.joined = target, args, 0
        pickle.dumps((target, *args[1:6]))  # as a new process needs them

    def start(self) -> None:
        self.work(*self.task, mock.Mock(acquire=mock.Mock(side_effect=[True, False])), self.number)

    def join(self) -> None:
        self.joined += 1


class TestWorkers(unittest.TestCase):
    def test_tickets_limit_the_trials_of_all_workers_together(self):
        folder = temporary_folder()
        study = open_study(TuneArguments(), folder)
        task = (TuneArguments(trials=9), merge(Settings(), TINY), {"planner.tau": SPACE["planner.tau"]}, folder)
        tickets = multiprocessing.get_context("spawn").Semaphore(3)
        with mock.patch.object(tune_hyperparams, "objective", untrained), contextlib.redirect_stdout(io.StringIO()):
            tune_hyperparams.work(*task, tickets, 1)
            tune_hyperparams.work(*task, tickets, 2)
        self.assertEqual([trial.state for trial in study.trials], [TrialState.COMPLETE] * 3)

    def test_a_journal_gives_tickets_for_what_is_left_and_a_database_for_all(self):
        for storage, expected in (("", 2), (f"sqlite:///{temporary_folder()}/study.db", 3)):
            folder = study_folder()
            search(folder, trials=1, storage=storage)
            with mock.patch.object(tune_hyperparams, "work") as work:
                search(folder, trials=3, storage=storage)
            tickets = work.call_args.args[4]
            self.assertEqual([tickets.acquire(block=False) for _ in range(4)].count(True), expected)

    def test_jobs_start_as_many_processes_and_run_as_many_trials_as_asked_for(self):
        for jobs, trials, started in ((3, 5, 2), (3, 2, 1), (1, 2, 0)):
            folder, processes = study_folder(), []

            def process(target, args, processes=processes):
                processes.append(OneTrialProcess(target, args))
                return processes[-1]

            with mock.patch.object(multiprocessing.get_context("spawn"), "Process", process):
                search(folder, trials=trials, jobs=jobs)
            self.assertEqual([process.number for process in processes], list(range(1, started + 1)))
            self.assertTrue(all(p.joined and p.target is main.as_program for p in processes))
            self.assertEqual([result["state"] for result in results_of(folder)], ["COMPLETE"] * trials)

    def test_a_worker_shares_the_threads_and_ends_with_its_parent(self):
        ended = threading.Event()
        arguments = TuneArguments(jobs=2)
        task = (merge(Settings(), TINY), {}, temporary_folder(), mock.Mock(acquire=mock.Mock(return_value=False)))
        with (
            mock.patch.object(multiprocessing, "parent_process") as parent,  # whose join returns at once
            mock.patch.object(os, "_exit", side_effect=lambda code: ended.set()) as leave,
            mock.patch.object(torch, "get_num_threads", return_value=5),
            mock.patch.object(torch, "set_num_threads") as threads,
        ):
            tune_hyperparams.work(arguments, *task, 1)
            self.assertTrue(ended.wait(30))
        parent.return_value.join.assert_called_once_with()
        leave.assert_called_once_with(1)
        threads.assert_called_once_with(2)

    @slow
    def test_jobs_share_the_trials_of_one_command(self):
        folder = study_folder()
        options = ["--trials", 5, "--jobs", 2, "--space", "space.json"]
        done = command(*SHORT, *options, folder=folder, script=SCRIPT)
        self.assertEqual(done.returncode, 0, done.stderr)
        trials = open_study(TuneArguments(), folder / STUDY).trials
        self.assertEqual(len(trials), 5)
        overlaps = [
            (a.number, b.number)
            for a in trials
            for b in trials
            if a.number < b.number and b.datetime_start < a.datetime_complete
        ]
        self.assertTrue(overlaps, "one trial after another")

    @slow
    def test_a_command_is_refused_while_another_one_runs_the_study(self):
        folder = study_folder()
        process = start_search(folder, "--trials", "4", "--updates", "4000")
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        wait_for(lambda: started_trials(folder) or process.poll() is not None)
        done = command(*SHORT, "--space", "space.json", "--updates", "4000", folder=folder, script=SCRIPT)
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertIn("being run by another process", done.stderr)
        self.assertIsNone(process.poll())
        self.assertEqual(states_of(folder)[0], "RUNNING")


class TestResults(unittest.TestCase):
    def test_one_real_trial_by_default_space_with_figures(self):
        folder = study_folder()
        printed = in_process(folder, trials=1, space=None)
        (result,) = results_of(folder)
        self.assertEqual(result["state"], "COMPLETE")
        self.assertEqual(result["params"], {name: value_of(merge(Settings(), TINY), name) for name in SPACE})
        self.assertTrue(math.isfinite(result["score"]))
        run = RunFolder(folder / STUDY / "trial-0000/seed-0")
        self.assertEqual(set(run.load()[0]), {"modules", "counters"})
        for name in ("history.png", "slices.png", "curves.png"):
            self.assertGreater((folder / STUDY / name).stat().st_size, 5_000)
            self.assertIn(name, printed)

    def test_importances_are_plotted_from_four_trials_on(self):
        folder = temporary_folder()
        study = open_study(TuneArguments(), folder)
        for number in range(4):
            self.assertNotIn("importances.png", tune_hyperparams.save_figures(study, folder) if number == 3 else [])
            trial = study.ask()
            study.tell(
                trial, trial.suggest_float("planner.tau", 0.05, 0.5) + trial.suggest_float("planner.lambda_", 0, 1)
            )
        self.assertIn("importances.png", tune_hyperparams.save_figures(study, folder))
        self.assertTrue((folder / "importances.png").read_bytes().startswith(b"\x89PNG"))

    def test_best_set_is_printed_and_can_be_applied_with_its_config(self):
        folder = study_folder()
        printed = search(folder, trials=6)
        results = results_of(folder)
        best = max(results, key=lambda result: result["score"])
        content = json.loads((folder / STUDY / "best.json").read_text())
        self.assertEqual(content.pop("preset"), "default")
        tuned = merge(Settings(), content)
        expected = merge(merge(Settings(), TINY), tune_hyperparams.nested(best["params"]))
        self.assertEqual(tuned, expected)
        self.assertEqual(tuned.world.grid, TINY["world"]["grid"])
        self.assertGreaterEqual(best["score"], results[0]["score"])
        start = f"where the search started {results[0]['score']:.3f} (trial 0)"
        self.assertIn(f"best score on validation tasks: {best['score']:.3f} (trial {best['number']}), {start}", printed)
        self.assertIn(f"--planner.tau {best['params']['planner.tau']:.6g}   (was 0.2)", printed)

    def test_without_a_completed_trial_there_is_no_best_set(self):
        folder = study_folder()
        with self.assertRaisesRegex(UserError, "no trial was completed"):
            search(folder, mock.Mock(side_effect=RuntimeError("out of memory")), trials=2)
        self.assertFalse((folder / STUDY / "best.json").exists())
        self.assertEqual(states_of(folder), ["FAIL", "FAIL"])


class TestCommandLine(unittest.TestCase):
    def study_run_in(self, folder: Path, **options) -> tuple:
        """What `tune` hands to `run_study`: arguments, base settings, space and folder."""
        with (
            mock.patch.object(tune_hyperparams, "run_study", side_effect=UserError("so far")) as run_study,
            self.assertRaisesRegex(UserError, "so far"),
        ):
            in_process(folder, **options)
        return run_study.call_args.args

    def test_bad_arguments_are_refused_before_anything_is_written(self):
        folder = study_folder()
        (folder / "bad.json").write_text('{"planner.tau": 3}')
        for options, words in (
            ({"trials": 0}, "trials is 0"),
            ({"seeds": 0}, "seeds is 0"),
            ({"lifetimes": 1}, "lifetimes is 1"),
            ({"lifetimes": 10**9}, "evaluate on at most"),
            ({"jobs": 0}, "jobs is 0"),
            ({"study": "../elsewhere"}, "'../elsewhere'"),
            ({"config": Path("nowhere.json")}, "nowhere.json"),
            ({"space": Path("bad.json")}, "planner.tau"),
            ({"storage": "teapot://x"}, "storage teapot://x cannot"),
            ({"storage": "sqlite:////nowhere/x.db"}, "storage sqlite:////nowhere/x.db cannot"),
            ({"device": "abacus"}, "abacus"),
            ({"preset": "gym"}, "gym_id"),
        ):
            with self.subTest(**options), mock.patch.object(time, "sleep"):
                with self.assertRaisesRegex((UserError, ValueError), words):
                    in_process(folder, **options)
                self.assertFalse((folder / "runs").exists())

    def test_a_config_file_means_here_what_it_means_in_main(self):
        folder = study_folder()
        world = TINY["world"] | {"reward_values": [1, 0.5]}
        for content, preset, bins in (
            (TINY | {"preset": "quick"}, "quick", (-1.0, 0.0, 1.0)),
            (TINY | {"world": world}, "default", (0.0, 0.5, 1.0)),
        ):
            (folder / "tiny.json").write_text(json.dumps(content))
            _, base, *_ = self.study_run_in(folder)
            self.assertEqual((base.preset, base.transition.reward_bins), (preset, bins))

    def test_number_of_seeds_depends_on_the_preset(self):
        for preset, seeds in (("quick", 1), ("default", 2)):
            arguments, *_ = self.study_run_in(study_folder(), preset=preset, seeds=None)
            self.assertEqual(arguments.seeds, seeds)

    @slow
    def test_an_unreachable_storage_ends_the_command_with_one_sentence(self):
        folder = study_folder()
        done = command("--storage", "sqlite:////nowhere/x.db", folder=folder, script=SCRIPT)
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertNotIn("Traceback", done.stderr)
        self.assertFalse((folder / "runs").exists())


@slow
class TestFaults(unittest.TestCase):
    def test_the_quick_study_is_killed_in_the_middle_and_continues(self):
        folder = temporary_folder()
        line = ["--preset", "quick", "--trials", "3", "--updates", "12", "--lifetimes", "64"]  # of one seed each
        process = start(*line, folder=folder, script=SCRIPT)
        wait_for(lambda: started_trials(folder) == 2 or process.poll() is not None, 300)
        process.kill()
        process.communicate()
        done = command(*line, folder=folder, script=SCRIPT)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("2 of 3 trials left", done.stdout)
        results = results_of(folder)
        self.assertEqual([result["state"] for result in results[:2]], ["COMPLETE", "FAIL"])
        self.assertEqual((len(results), results[2]["params"]), (4, results[1]["params"]))  # tried again

    @unittest.skipIf(os.name == "nt", "sends POSIX signals")
    def test_ctrl_c_ends_cleanly_and_queues_the_trial_again(self):
        self.check_ctrl_c(jobs=1)

    @unittest.skipIf(os.name == "nt", "sends POSIX signals")
    def test_ctrl_c_ends_all_workers_cleanly_and_queues_their_trials_again(self):
        self.check_ctrl_c(jobs=2)

    def check_ctrl_c(self, jobs: int) -> None:
        folder = study_folder()
        process = start_search(folder, "--trials", "4", "--jobs", str(jobs), "--updates", "4000")
        self.addCleanup(process.kill)  # it would slow all that follows
        wait_for(lambda: started_trials(folder) == jobs or process.poll() is not None)
        for pid in (process.pid, *(children_of(process) if jobs > 1 else ())):  # as a terminal does
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 130, errors)
        self.assertEqual(printed.count("run the same command again to continue"), jobs)
        self.assertNotIn("Traceback", errors)
        self.assertEqual(sorted(states_of(folder)), ["FAIL"] * jobs + ["WAITING"] * jobs)

    @unittest.skipIf(os.name == "nt", "looks for processes by POSIX means")
    def test_workers_end_with_a_killed_parent_and_the_same_command_continues(self):
        folder = study_folder()
        process = start_search(folder, "--trials", "2", "--jobs", "2", "--updates", "400")
        self.addCleanup(process.kill)
        wait_for(lambda: started_trials(folder) == 2 or process.poll() is not None)
        children = children_of(process)
        process.kill()
        process.communicate()
        for child in children:
            wait_for(lambda child=child: not lives(child), 60)
        self.assertEqual(states_of(folder), ["RUNNING", "RUNNING"])
        line = [*SHORT, "--space", "space.json", "--trials", "2", "--updates", "400"]
        done = command(*line, folder=folder, script=SCRIPT)
        self.assertEqual(done.returncode, 0, done.stderr)
        states = [result["state"] for result in results_of(folder)]
        self.assertEqual(states, ["FAIL", "FAIL", "COMPLETE", "COMPLETE"])


def serve(url: str, port: int) -> None:
    """Run Optuna's proxy before the database at `url`."""
    optuna.storages.run_grpc_proxy_server(optuna.storages.RDBStorage(url), host="localhost", port=port)


def answers(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


@slow
@unittest.skipUnless(
    POSTGRES and importlib.util.find_spec("psycopg2"),
    "needs PostgreSQL (apt-get install postgresql) and psycopg2-binary",
)
class TestPostgres(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.data, (cls.programs,) = temporary_folder(), POSTGRES
        cls.port = free_port()
        cls.user = {"user": "postgres"} if os.getuid() == 0 else {}  # it refuses to run as root
        if cls.user:
            shutil.chown(cls.data, "postgres")
        cls.run_program("initdb", "-D", str(cls.data / "db"), "-A", "trust", "-U", "tuner")
        options = f"-p {cls.port} -k {cls.data} -c listen_addresses=127.0.0.1"
        cls.run_program("pg_ctl", "-D", str(cls.data / "db"), "-o", options, "-l", str(cls.data / "log"), "-w", "start")
        cls.addClassCleanup(cls.run_program, "pg_ctl", "-D", str(cls.data / "db"), "-m", "immediate", "stop")
        cls.url = f"postgresql+psycopg2://tuner@127.0.0.1:{cls.port}/postgres"

    @classmethod
    def run_program(cls, name: str, *arguments: str) -> None:
        line = [f"{cls.programs}/{name}", *arguments]
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL, cwd="/", **cls.user)

    def test_two_commands_share_a_study_of_which_one_is_killed(self):
        folder = study_folder()
        workers = [start_search(folder, "--storage", self.url, "--trials", "5") for _ in range(2)]
        for worker in workers:
            self.addCleanup(worker.kill)
        wait_for(lambda: (folder / STUDY / "trial-0001/seed-0/metrics.jsonl").exists())
        workers[0].kill()
        workers[0].communicate()
        _, errors = workers[1].communicate(timeout=240)
        self.assertEqual(workers[1].returncode, 0, errors)
        states = [result["state"] for result in results_of(folder)]
        self.assertLessEqual(states.count("FAIL"), 1)
        self.assertLessEqual(states.count("RUNNING"), 1)  # of the killed one, unless its silence was noticed
        self.assertEqual(sum(state in ("COMPLETE", "PRUNED", "RUNNING") for state in states), 5)

    @unittest.skipUnless(importlib.util.find_spec("grpc"), "needs grpcio")
    def test_a_study_can_be_reached_through_a_proxy(self):
        port = free_port()
        server = multiprocessing.get_context("spawn").Process(target=serve, args=(self.url, port), daemon=True)
        server.start()
        self.addCleanup(server.terminate)
        wait_for(lambda: answers(port))
        search(study_folder(), trials=2, study="proxied", storage=f"grpc://localhost:{port}")
        arguments = dataclasses.replace(TuneArguments(), storage=self.url, study="proxied")
        self.assertEqual(len(open_study(arguments, Path("unused")).trials), 2)


if __name__ == "__main__":
    unittest.main()
