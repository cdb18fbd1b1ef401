"""The hyperparameter search: its space, what a trial trains and scores, continuing a study, workers, results.

SLOW_TESTS=1 adds whole studies by command, killed processes, --jobs, PostgreSQL and Optuna's proxy.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import unittest
from pathlib import Path
from unittest import mock

import optuna
import torch
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import TrialState

import main
import tune_hyperparams
from agent import Learner
from main import PRESETS, Settings, with_preset
from memory import RunFolder, UserError, merge
from tests.shared import TINY, children_of, command, free_port, slow, start, temporary_folder, tiny, wait_for
from tune_hyperparams import SPACE, TuneArguments, open_study, read_space, shorten_training, suggest, tune, value_of

SMALL_SPACE = {"context.learning_rate": None, "planner.tau": None}
SHORT = ["--config", "tiny.json", "--space", "space.json", "--seeds", "1", "--updates", "4", "--lifetimes", "8"]
POSTGRES = importlib.util.find_spec("psycopg2") and sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1:]
START = {name: value_of(tiny(), name) for name in SMALL_SPACE}  # where a search from tiny settings starts
SCRIPT = "tune_hyperparams.py"
STUDY = Path("runs/tune-default")


def study_folder() -> Path:
    """A working directory with tiny settings in tiny.json and a search space in space.json."""
    folder = temporary_folder()
    (folder / "tiny.json").write_text(json.dumps(TINY))
    (folder / "space.json").write_text(json.dumps(SMALL_SPACE))
    return folder


def arguments_of(**options) -> TuneArguments:
    """Arguments for a search from tiny settings over a small space: those of SHORT, with `options` on top."""
    short = {"config": Path("tiny.json"), "space": Path("space.json"), "updates": 4, "lifetimes": 8, "seeds": 1}
    return TuneArguments(**short | options)


def in_process(folder: Path, **options) -> str:
    """Run `tune` in `folder` without the seconds that a new process takes to import; return what it printed."""
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as printed:
        tune(arguments_of(**options))
    return printed.getvalue()


def untrained(trial, space, base, arguments, folder) -> float:
    """An objective that scores settings without a training: the nearer planner.tau is to 0.3, the better."""
    seed = folder / f"trial-{trial.number:04d}/seed-0"
    seed.mkdir(parents=True)
    for name in ("checkpoint.pt", "metrics.jsonl"):
        (seed / name).touch()
    return -abs(suggest(trial, space, base).planner.tau - 0.3)


def search(folder: Path, objective=untrained, **options) -> str:
    """`in_process` with `objective` instead of the trainings, and without figures."""
    with mock.patch.multiple(tune_hyperparams, objective=objective, save_figures=mock.Mock(return_value=[])):
        return in_process(folder, **options)


def refusal(folder: Path, **options) -> str:
    """The only line that a command prints which is refused with exit code 2."""
    errors, raises = io.StringIO(), unittest.TestCase().assertRaises(SystemExit)
    with contextlib.chdir(folder), contextlib.redirect_stderr(errors), raises as stopped:
        main.run_program(SCRIPT, tune, arguments_of(**options))
    (line,) = errors.getvalue().splitlines()
    assert stopped.exception.code == 2, line
    return line


def trials_of(folder: Path) -> list[optuna.trial.FrozenTrial]:
    """The trials in the journal of a working directory, with those still to be run."""
    return open_study(TuneArguments(), folder / STUDY).trials


def states_of(folder: Path) -> list[str]:
    """The states of these trials."""
    return [trial.state.name for trial in trials_of(folder)]


class TestSpace(unittest.TestCase):
    def read(self, content: str) -> dict:
        """The search space that a file with this content asks for."""
        (path := temporary_folder() / "space.json").write_text(content)
        return read_space(path, Settings())

    def test_default_space_names_real_settings_and_is_widened_to_the_values_of_its_base(self):
        for preset in PRESETS:
            base = with_preset(Settings(), preset)
            space = read_space(None, base)
            self.assertEqual(set(space), set(SPACE), preset)
            for name, range_ in space.items():
                self.assertTrue(range_["low"] <= value_of(base, name) <= range_["high"], f"{preset}: {name}")
        space = read_space(None, merge(Settings(), {"context": {"decoding_weight": 0}, "planner": {"tau": 0.9}}))
        self.assertEqual(space["context.decoding_weight"], {"low": 0, "high": 4.0, "log": False})  # no logarithm of 0
        self.assertEqual(space["planner.tau"], {"low": 0.05, "high": 0.9, "log": True})

    def test_files_choose_default_ranges_and_add_settings(self):
        space = {"planner.lambda_": None, "transition.padding": ["", "zeros"], "planner.tau": {"low": 0.1, "high": 0.4}}
        space["memory.budget_mb"] = {"low": 64, "high": 512, "log": True}
        self.assertEqual(self.read(json.dumps(space)), space | {"planner.lambda_": SPACE["planner.lambda_"]})

    def test_mistakes_are_refused_with_the_name_of_the_setting(self):
        fixed = ("world.slip", "training.plan_from", "training.updates", "training.evaluation_lifetimes")
        for content, words in (
            *((f'{{"{name}": [0, 1]}}', f"no setting '{name}'") for name in ("planner.tua", "seed", "world")),
            ('{"planner.tua": null}', "planner.tua"),
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
            *((f'{{"{name}": {{"low": 0, "high": 9999}}}}', f"{name} cannot be searched") for name in fixed),
            *((content, "not a search space") for content in ("[", "[1]")),
        ):
            with self.subTest(content), self.assertRaisesRegex(UserError, words):
                self.read(content)

    def test_every_trial_takes_a_value_of_the_right_type_for_every_setting(self):
        names = ("context.hidden", "planner.tau", "planner.expand_margin", "planner.min_branch_prob")
        space = {name: SPACE[name] for name in names} | {"transition.padding": ["", "zeros"]}
        values = dict(zip(space, (40, 0.1, 0.0, 0.3, "zeros"), strict=True))
        study = optuna.create_study()
        study.enqueue_trial(values)
        settings = suggest(trial := study.ask(), space, Settings())
        self.assertEqual((settings, trial.params), (merge(Settings(), tune_hyperparams.nested(values)), values))
        self.assertEqual(trial.distributions["context.hidden"], IntDistribution(32, 128, log=True))


class TestObjective(unittest.TestCase):
    def run_trial(self, scores, seeds=2, pruned_at=None):
        """Value of the objective (None if pruned) at planner.tau 0.1 without learning, the trial, calls and folder."""
        folder, scores, calls = temporary_folder(), iter(scores), []

        def train(learner, run, until, checkpoints):
            learner.collect_random_lifetimes()
            learner.update = until
            calls.append((str(run.folder.relative_to(folder)), until, checkpoints))
            return 0

        def evaluate(system, *arguments):
            calls.append((system.settings.seed, system.settings.planner.tau, *arguments))
            score = next(scores)
            return score if isinstance(score, dict) else {"normalised": score, "return_mean": 100.0}

        study = optuna.create_study(direction="maximize")
        study.enqueue_trial({"planner.tau": 0.1})
        trial, value = study.ask(), None
        trial.should_prune = lambda: len(calls) // 2 == pruned_at
        task = ({"planner.tau": SPACE["planner.tau"]}, shorten_training(tiny(), 7), arguments_of(seeds=seeds))
        with mock.patch.multiple(main, train=train, evaluate=evaluate), contextlib.suppress(optuna.TrialPruned):
            value = tune_hyperparams.objective(trial, *task, folder)
        return value, study.trials[0], calls, folder

    def test_each_seed_is_trained_and_evaluated_twice_and_leaves_a_checkpoint_to_evaluate(self):
        value, trial, calls, folder = self.run_trial([0.1, 0.3, 0.2, 0.5])
        self.assertAlmostEqual(value, 0.4)  # the mean of the last scores
        self.assertEqual(trial.intermediate_values, {0: 0.1, 1: 0.3, 2: 0.2, 3: 0.5})
        self.assertEqual(self.run_trial([{"return_mean": 1.0}, {"return_mean": 3.0}], seeds=1)[0], 3.0)  # the return
        for seed in (0, 1):
            for until in (18, 21):  # 14 updates of the first two phases and half of 7, or 7
                self.assertEqual(calls.pop(0), (f"trial-0000/seed-{seed}", until, False))
                self.assertEqual(calls.pop(0), (seed, 0.1, "validation", 8))
            run = RunFolder(folder / f"trial-0000/seed-{seed}")
            settings = run.settings(Settings())
            self.assertEqual((settings.seed, settings.planner.tau, settings.training.updates), (seed, 0.1, 7))
            state, _ = run.load()
            self.assertEqual((set(state), state["counters"][0]), ({"modules", "counters"}, 21))
            main.build_system(settings).load(state["modules"])

    def test_trials_may_be_pruned_at_every_point_but_the_last(self):
        for pruned_at, value, kept in ((1, None, 0), (2, None, 0), (3, None, 1), (4, 0.3, 2)):
            found, trial, _, folder = self.run_trial([0.1, 0.2, 0.3, 0.4], 2, pruned_at)
            self.assertEqual(found if found is None else round(found, 6), value)
            self.assertEqual(len(trial.intermediate_values), pruned_at)
            self.assertEqual(len(list(folder.glob("*/*/checkpoint.pt"))), kept)  # one for each seed that was finished

    def test_shorter_training_scales_its_schedule(self):
        cases = (("default", None, 330), ("quick", None, 150), ("default", 200, 200), ("default", 2000, 2000))
        for preset, given, updates in cases:
            base = with_preset(Settings(), preset)
            short, full = shorten_training(base, given).training, base.training
            share = min(1, updates / full.updates)
            expected = (updates, round(full.value_from * share), round(full.plan_from * share), full.effect_updates)
            self.assertEqual((short.updates, short.value_from, short.plan_from, short.effect_updates), expected)

    def test_one_real_trial_by_default_space_with_figures(self):
        folder = study_folder()
        printed = in_process(folder, trials=1, space=None)
        (trial,) = trials_of(folder)
        self.assertEqual(trial.params, {name: value_of(tiny(), name) for name in SPACE})
        self.assertTrue(math.isfinite(trial.value))
        run = RunFolder(folder / STUDY / "trial-0000/seed-0")
        self.assertFalse(run.blocks.exists())  # the frames, which only a resumed training needs
        logged = [json.loads(line)["update"] for line in run.metrics.read_text().splitlines()]
        self.assertEqual(logged, [3, 6, 9, 12, 15, 18])
        for name in ("history.png", "slices.png", "curves.png"):
            self.assertGreater((folder / STUDY / name).stat().st_size, 5_000)
            self.assertIn(name, printed)

    def test_importances_are_plotted_from_four_trials_on(self):
        study = open_study(TuneArguments(), folder := temporary_folder())
        for number in range(1, 5):
            trial = study.ask()
            study.tell(trial, sum(trial.suggest_float(name, 0, 1) for name in ("planner.tau", "planner.lambda_")))
            if number >= 3:
                self.assertEqual("importances.png" in tune_hyperparams.save_figures(study, folder), number == 4)
        self.assertTrue((folder / "importances.png").read_bytes().startswith(b"\x89PNG"))

    def test_diverged_trainings_fail_with_their_reason_and_ctrl_c_queues_the_trial_again(self):
        for fault, error, states in (
            (lambda learner, *_: learner.metrics.update(loss=torch.tensor(math.nan)), UserError, ["FAIL", "FAIL"]),
            (lambda *_: signal.raise_signal(signal.SIGINT), KeyboardInterrupt, ["FAIL", "WAITING"]),
        ):
            folder = study_folder()
            with mock.patch.object(Learner, "learn_perception", fault), self.assertRaises(error) as stopped:
                in_process(folder, trials=2)
            self.assertEqual(states_of(folder), states)
            first, second = trials_of(folder)
            if error is UserError:
                self.assertIn("no trial was completed", str(stopped.exception))
                self.assertIn("loss is not finite at update 3", second.user_attrs["reason"])
            else:
                self.assertEqual(second.system_attrs["fixed_params"], first.params)
            self.assertFalse([path for name in ("best.json", "checkpoint.pt") for path in folder.rglob(name)])


class TestStudy(unittest.TestCase):
    def test_same_command_continues_repeatably_from_the_start_to_a_best_set_to_apply(self):
        params = []
        for folder in (study_folder(), study_folder()):
            for count, left in ((1, 1), (6, 5), (6, 0)):
                printed = search(folder, trials=count)
                self.assertIn(f"{left} of {count} trials left", printed)
            trials = trials_of(folder)
            params.append([trial.params for trial in trials])
        self.assertEqual(*params)
        self.assertEqual(len({str(values) for values in params[0]}), 6)
        self.assertEqual(trials[0].params, START)
        results = [{"number": t.number, "state": "COMPLETE", "score": t.value, "params": t.params} for t in trials]
        written = json.loads((folder / STUDY / "trials.json").read_text())
        self.assertEqual((len(trials), written), (6, {"baseline": 0, "trials": results}))
        best, *others = sorted(trials, key=lambda trial: -trial.value)
        kept = [path.parent.parent.name for path in sorted((folder / STUDY).glob("*/*/checkpoint.pt"))]
        self.assertEqual(kept, [f"trial-{number:04d}" for number in sorted(t.number for t in (best, *others[:2]))])
        self.assertEqual(len(list((folder / STUDY).glob("*/*/metrics.jsonl"))), 6)
        content = json.loads((folder / STUDY / "best.json").read_text())
        tuned = merge(tiny(), tune_hyperparams.nested(best.params))
        self.assertEqual((content.pop("preset"), merge(Settings(), content)), ("default", tuned))
        began = f"the starting settings scored {trials[0].value:.3f} (trial 0)"
        self.assertIn(f"best score on validation tasks: {best.value:.3f} (trial {best.number}); {began}", printed)
        self.assertIn(f"--planner.tau {best.params['planner.tau']:.6g}   (was 0.2)", printed)

    def test_progress_shows_result_best_and_what_is_left_and_failures_count(self):
        folder = study_folder()
        scores = mock.Mock(side_effect=[RuntimeError("out of memory"), 0.5, 0.25, optuna.TrialPruned()])

        def objective(*task):
            untrained(*task)
            return scores()

        printed = search(folder, objective, trials=4)
        for line in (
            "trial 0: RuntimeError: out of memory; 3 left, about 0 min",
            "trial 1: 0.500, best 0.500 (trial 1); 2 left",
            "trial 2: 0.250, best 0.500 (trial 1); 1 left",
            "trial 3: pruned, best 0.500 (trial 1); 0 left",
        ):
            self.assertIn(line, printed)
        self.assertNotIn("where the search started", printed)
        self.assertEqual(states_of(folder), ["FAIL", "COMPLETE", "COMPLETE", "PRUNED"])
        written = json.loads((folder / STUDY / "trials.json").read_text())
        self.assertEqual((written["baseline"], written["trials"][0]["reason"]), (None, "RuntimeError: out of memory"))
        self.assertIn("0 of 4 trials left", search(folder, trials=4))

    def test_other_settings_space_and_seeds_are_refused(self):
        folder = study_folder()
        search(folder, trials=1)
        for options, words in (
            ({"preset": "quick"}, "other settings"),
            ({"space": None}, "other space"),
            ({"seeds": 2}, "other seeds"),
            ({"lifetimes": 9}, "other lifetimes"),
            ({"storage": f"sqlite:///{folder}/x.db"}, "another storage"),
        ):
            with self.subTest(**options), self.assertRaisesRegex(UserError, words):
                search(folder, trials=2, **options)
        self.assertEqual(states_of(folder), ["COMPLETE"])
        self.assertIn("1 of 2 trials left", search(folder, trials=2, device="cpu:0"))  # which may differ

    def test_interrupted_trials_fail_and_are_queued_again(self):
        for error, number in ((KeyboardInterrupt(), 0), (KeyboardInterrupt(), 1), (OSError("No space left"), 1)):

            def objective(trial, *rest, error=error, number=number):
                score = untrained(trial, *rest) if number else None  # or before it asks for the values queued for it
                if trial.number == number:
                    raise error
                return score

            folder = study_folder()
            with self.assertRaises(type(error)):
                search(folder, objective, trials=2)
            self.assertEqual(states_of(folder), ["COMPLETE"] * number + ["FAIL", "WAITING"])
            self.assertIn(f"{2 - number} of 2 trials left", search(folder, trials=2))
            self.assertEqual(states_of(folder), ["COMPLETE"] * number + ["FAIL"] + ["COMPLETE"] * (2 - number))
            trials = trials_of(folder)
            self.assertEqual(trials[number + 1].params, trials[1].params if number else START)

    def test_trials_of_a_killed_process_are_failed_and_queued_again_once(self):
        folder = study_folder()
        search(folder, trials=1)
        killed = open_study(TuneArguments(), folder / STUDY).ask()  # and never gets a result
        killed.suggest_float("planner.tau", 0.05, 0.5, log=True)
        with open(folder / STUDY / "journal.log", "a") as journal:
            journal.write('{"op_code": 4, "wor')  # as a kill or a full disk leaves it
        self.assertIn("1 of 2 trials left", search(folder, trials=2))
        self.assertEqual(states_of(folder), ["COMPLETE", "FAIL", "COMPLETE"])
        self.assertEqual(trials_of(folder)[2].params["planner.tau"], killed.params["planner.tau"])
        self.assertIn("0 of 2 trials left", search(folder, trials=2))

    def test_the_lock_is_held_while_trials_run_and_other_commands_are_refused(self):
        folder, refused = study_folder(), []

        def objective(*task):
            refused.append(refusal(folder, trials=5))
            return untrained(*task)

        search(folder, objective, trials=2)
        self.assertEqual(states_of(folder), ["COMPLETE", "COMPLETE"])
        self.assertEqual(len(refused), 2)
        self.assertRegex(refused[0], "being run by another process: use --jobs .* --storage with a database")
        self.assertIn("1 of 3 trials left", search(folder, trials=3))

    def test_a_proxy_is_reached_at_its_host_and_port(self):
        for url, port in (("grpc://server:4711", 4711), ("grpc://server", 13000)):
            proxy = mock.Mock(return_value=optuna.storages.InMemoryStorage())
            proxy.return_value.wait_server_ready = mock.Mock()
            with mock.patch.object(tune_hyperparams, "GrpcStorageProxy", proxy):
                open_study(TuneArguments(storage=url), Path("unused"))
            proxy.assert_called_once_with(host="server", port=port)
            proxy.return_value.wait_server_ready.assert_called_once()

    def test_a_database_records_heartbeats_and_is_tried_again(self):
        broken, arguments = RuntimeError("table exists\nand more"), TuneArguments(storage="sqlite://")
        database = mock.Mock(side_effect=[broken, optuna.storages.InMemoryStorage(), broken, broken, broken])
        with mock.patch.object(tune_hyperparams, "RDBStorage", database), mock.patch.object(time, "sleep"):
            self.assertEqual((open_study(arguments, Path("unused")).trials, database.call_count), ([], 2))
            with self.assertRaisesRegex(UserError, "storage sqlite:// cannot be used: table exists$"):
                open_study(arguments, Path("unused"))
        self.assertEqual(database.call_count, 5)
        options = database.call_args.kwargs
        retry = options.pop("heartbeat_stale_trial_callback")
        self.assertIsInstance(retry, optuna.storages.RetryHeartbeatStaleTrialCallback)
        self.assertEqual(options, {"heartbeat_interval": 20, "grace_period": 60})

    def test_a_study_in_a_database_continues_and_its_folder_does_not_hold_the_url(self):
        folder = study_folder()
        url = f"sqlite:///{folder}/study.db"  # that of a server may hold a password
        printed = search(folder, trials=2, storage=url)
        study = open_study(TuneArguments(storage=url), Path("unused"))
        study.add_trial(optuna.trial.create_trial(state=TrialState.RUNNING))  # which its heartbeat decides about
        (folder / STUDY / "trial-0002/seed-0").mkdir(parents=True)
        (folder / STUDY / "trial-0002/seed-0/checkpoint.pt").touch()
        printed += search(folder, trials=4, storage=url)
        self.assertRegex(printed, "(?s)2 of 2 trials left.*1 of 4 trials left")
        states = [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.RUNNING, TrialState.COMPLETE]
        self.assertEqual([trial.state for trial in study.trials], states)
        self.assertTrue((folder / STUDY / "trial-0002/seed-0/checkpoint.pt").exists())
        self.assertFalse((folder / STUDY / "journal.log").exists())
        with self.assertRaisesRegex(UserError, "another storage"):
            search(folder, trials=4)
        written = [path.read_bytes() for path in (folder / STUDY).rglob("*") if path.is_file()]
        self.assertNotIn(b"study.db", b"".join([printed.encode(), *written]))

    @slow
    def test_a_silent_trial_is_given_up_by_the_database_and_tried_again(self):
        url = f"sqlite:///{temporary_folder()}/study.db"
        with mock.patch.dict(tune_hyperparams.HEARTBEAT, heartbeat_interval=1, grace_period=2):
            study = open_study(TuneArguments(storage=url), Path("unused"))
            silent = study.ask({"planner.tau": FloatDistribution(0.1, 0.5)})
            study._storage.record_heartbeat(silent._trial_id)
            time.sleep(4)
            study.optimize(lambda trial: trial.suggest_float("planner.tau", 0.1, 0.5), n_trials=1)
        self.assertEqual([trial.state for trial in study.trials], [TrialState.FAIL, TrialState.COMPLETE])
        self.assertEqual(study.trials[0].params, study.trials[1].params)

    def test_tickets_limit_the_trials_of_all_workers_together(self):
        for storage, tickets in (("", 2), (f"sqlite:///{temporary_folder()}/study.db", 3)):  # what is left, or all
            folder = study_folder()
            search(folder, trials=1, storage=storage)
            with mock.patch.object(tune_hyperparams, "work") as replaced:
                search(folder, trials=3, storage=storage)
            _, *task = replaced.call_args.args
            arguments, output = arguments_of(trials=9, storage=storage), io.StringIO()
            with mock.patch.object(tune_hyperparams, "objective", untrained), contextlib.redirect_stdout(output):
                for worker in (1, 2):
                    tune_hyperparams.work(arguments, *task[:2], folder / STUDY, task[3], worker)
            self.assertEqual(len(output.getvalue().splitlines()), tickets)

    def test_jobs_start_as_many_processes_and_run_as_many_trials_as_asked_for(self):
        workers = []

        def process(target, args):
            pickle.dumps((target, *args[1:6]))  # as a new process needs them
            _, run, *task, _, number = args
            one_ticket = mock.Mock(acquire=mock.Mock(side_effect=[True, False]))
            workers.append(mock.Mock(number=number, target=target, start=lambda: run(*task, one_ticket, number)))
            return workers[-1]

        for jobs, trials, started in ((3, 5, 2), (3, 2, 1), (1, 2, 0)):
            workers.clear()
            folder = study_folder()
            with mock.patch.object(multiprocessing.get_context("spawn"), "Process", process):
                search(folder, trials=trials, jobs=jobs)
            found = [(worker.number, worker.target, worker.join.call_count) for worker in workers]
            self.assertEqual(found, [(number, main.run_program, 1) for number in range(1, started + 1)])
            self.assertEqual(states_of(folder), ["COMPLETE"] * trials)

    def test_a_worker_shares_the_threads_and_ends_with_its_parent(self):
        ended = threading.Event()
        task = (tiny(), {}, temporary_folder(), mock.Mock(acquire=mock.Mock(return_value=False)))
        with (
            mock.patch.object(multiprocessing, "parent_process") as parent,  # whose join returns at once
            mock.patch.object(os, "_exit", side_effect=lambda code: ended.set()) as leave,
            mock.patch.multiple(torch, get_num_threads=lambda: 5, set_num_threads=mock.DEFAULT) as replaced,
        ):
            tune_hyperparams.work(TuneArguments(jobs=2), *task, 1)
            self.assertTrue(ended.wait(30))
        parent.return_value.join.assert_called_once_with()
        leave.assert_called_once_with(1)
        replaced["set_num_threads"].assert_called_once_with(2)


class TestCommandLine(unittest.TestCase):
    def test_bad_arguments_are_refused_with_one_sentence_before_anything_is_written(self):
        folder = study_folder()
        for options, words in (
            *(({k: n}, f"{k} is {n}") for k, n in dict(trials=0, seeds=0, lifetimes=1, jobs=0).items()),
            ({"lifetimes": 10**9}, "evaluate on at most"),
            ({"study": "../elsewhere"}, "'../elsewhere'"),
            ({"config": Path("nowhere.json")}, "nowhere.json"),
            ({"space": Path("tiny.json")}, "no setting 'world'"),
            ({"space": Path("nowhere.json")}, "nowhere.json is not a search space"),
            *(({"storage": url}, f"storage {url} cannot") for url in ("teapot://x", "sqlite:////nowhere/x.db")),
            ({"device": "abacus"}, "abacus"),
            ({"preset": "gym"}, "gym_id"),
        ):
            with self.subTest(**options), mock.patch.object(time, "sleep"):
                self.assertRegex(refusal(folder, **options), f"^{SCRIPT}: .*{words}")
                self.assertFalse((folder / "runs").exists())

    def test_a_config_file_means_here_what_it_means_in_main_and_its_preset_decides_about_seeds(self):
        folder, rewards = study_folder(), TINY["world"] | {"reward_values": [1, 0.5]}
        for content, preset, seeds, bins in (
            (TINY | {"preset": "quick"}, "quick", 1, (-1.0, 0.0, 1.0)),
            (TINY | {"world": rewards}, "default", 2, (0.0, 0.5, 1.0)),
        ):
            (folder / "tiny.json").write_text(json.dumps(content))
            with mock.patch.multiple(tune_hyperparams, run_study=mock.DEFAULT, conclude=mock.DEFAULT) as replaced:
                in_process(folder, seeds=None)
            arguments, base, *_ = replaced["run_study"].call_args.args
            self.assertEqual((base.preset, arguments.seeds, base.transition.reward_bins), (preset, seeds, bins))


@slow
@unittest.skipIf(os.name == "nt", "sends POSIX signals")
class TestFaults(unittest.TestCase):
    def start_and_wait(self, folder: Path, trials: int, *arguments: object) -> subprocess.Popen:
        """Start a search; return its process when `trials` have logged their first metrics, or when it has ended."""
        process = start(*arguments, folder=folder, script=SCRIPT)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)  # first: it would slow all that follows
        logs = STUDY / "trial-*/seed-0/metrics.jsonl"
        wait_for(lambda: len(list(folder.glob(f"{logs}"))) == trials or process.poll() is not None, 300)
        return process

    def test_studies_that_are_killed_in_the_middle_continue(self):
        quick = ["--preset", "quick", "--updates", 12, "--lifetimes", 64, "--trials", 3]  # of one seed each
        short = [*SHORT, "--updates", 400, "--trials", 3, "--jobs", 2]
        for jobs, first, line in ((1, "COMPLETE", quick), (2, "FAIL", short)):
            folder = study_folder()
            process = self.start_and_wait(folder, 2, *line)
            process.kill()
            process.communicate(timeout=60)  # ends when its workers, which write to the same pipes, have ended
            self.assertEqual(states_of(folder), [first.replace("FAIL", "RUNNING"), "RUNNING"])
            done = command(*line, folder=folder, script=SCRIPT)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertIn(f"{1 + jobs} of 3 trials left", done.stdout)
            trials = trials_of(folder)
            self.assertEqual((len(trials), states_of(folder)[:2]), (3 + jobs, [first, "FAIL"]))
            self.assertEqual(trials[1 + jobs].params, trials[1].params)  # tried again
        self.assertLess(trials[3].datetime_start, trials[2].datetime_complete, "one trial after another")

    def test_ctrl_c_ends_all_workers_cleanly_and_queues_their_trials_again(self):
        for jobs in (1, 2):
            folder, line = study_folder(), [*SHORT, "--trials", 4, "--jobs", jobs, "--updates", 4000]
            process = self.start_and_wait(folder, jobs, *line)
            if jobs == 1:
                done = command(*line, folder=folder, script=SCRIPT)
                self.assertEqual((done.returncode, len(done.stderr.splitlines())), (2, 1), done.stderr)
                self.assertIn("being run by another process", done.stderr)
                self.assertEqual((process.poll(), states_of(folder)), (None, ["RUNNING"]))
            for pid in (process.pid, *(children_of(process) if jobs > 1 else ())):  # as a terminal does
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGINT)
            printed, errors = process.communicate(timeout=60)
            self.assertEqual(process.returncode, 130, errors)
            self.assertEqual(printed.count("run the same command again to continue"), jobs)
            self.assertNotIn("Traceback", errors)
            self.assertEqual(sorted(states_of(folder)), ["FAIL"] * jobs + ["WAITING"] * jobs)


@slow
@unittest.skipUnless(POSTGRES, "needs PostgreSQL (apt-get install postgresql) and psycopg2-binary")
class TestPostgres(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        data, port, (programs,) = temporary_folder(), free_port(), POSTGRES
        user = {"user": "postgres"} if os.getuid() == 0 else {}  # it refuses to run as root
        if user:
            shutil.chown(data, "postgres")

        def run(name: str, *arguments: str) -> None:
            line = [programs / name, "-D", data / "db", *arguments]
            subprocess.run(line, check=True, stdout=subprocess.DEVNULL, cwd="/", **user)

        run("initdb", "-A", "trust", "-U", "tuner")
        run("pg_ctl", "-o", f"-p {port} -k {data} -c listen_addresses=127.0.0.1", "-l", data / "log", "-w", "start")
        cls.addClassCleanup(run, "pg_ctl", "-m", "immediate", "stop")
        cls.url = f"postgresql+psycopg2://tuner@127.0.0.1:{port}/postgres"

    def test_two_commands_share_a_study_of_which_one_is_killed(self):
        folder = study_folder()
        workers = [start(*SHORT, "--storage", self.url, "--trials", 5, folder=folder, script=SCRIPT) for _ in range(2)]
        for worker in workers:
            self.addCleanup(worker.kill)
        wait_for(lambda: (folder / STUDY / "trial-0001/seed-0/metrics.jsonl").exists())
        workers[0].kill()
        workers[0].communicate()
        _, errors = workers[1].communicate(timeout=240)
        self.assertEqual(workers[1].returncode, 0, errors)
        states = [trial["state"] for trial in json.loads((folder / STUDY / "trials.json").read_text())["trials"]]
        self.assertLessEqual(states.count("FAIL"), 1)
        self.assertLessEqual(states.count("RUNNING"), 1)  # of the killed one, unless its silence was noticed
        self.assertEqual(sum(state in ("COMPLETE", "PRUNED", "RUNNING") for state in states), 5)

    @unittest.skipUnless(importlib.util.find_spec("grpc"), "needs grpcio")
    def test_a_study_can_be_reached_through_a_proxy(self):
        port = free_port()
        storage = f"optuna.storages.RDBStorage({self.url!r})"
        program = f"import optuna; optuna.storages.run_grpc_proxy_server({storage}, host='localhost', port={port})"
        server = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
        self.addCleanup(server.wait)
        self.addCleanup(server.terminate)
        search(study_folder(), trials=2, study="proxied", storage=f"grpc://localhost:{port}")
        study = open_study(TuneArguments(storage=self.url, study="proxied"), Path("unused"))
        self.assertEqual(len(study.trials), 2)


if __name__ == "__main__":
    unittest.main()
