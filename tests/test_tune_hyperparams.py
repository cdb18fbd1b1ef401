"""The tuning: it starts from the preset, goes on where it stopped or was killed, shares its work, and its best set can be applied."""

import contextlib
import dataclasses
import glob
import importlib.util
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import time
import unittest
from pathlib import Path
from unittest import mock

import optuna

import tune_hyperparams
from agent import Learner
from main import PRESETS, Settings, with_preset
from memory import UserError, merge
from tune_hyperparams import SPACE, TuneArguments, open_study, read_space, tune, value_of
from tests.shared import TINY, children_of, command, free_port, start, temporary_folder, wait_for

SHORT = ["--config", "tiny.json", "--seeds", "1", "--updates", "4", "--lifetimes", "8"]
POSTGRES = sorted(glob.glob("/usr/lib/postgresql/*/bin"))[-1:]


def study_folder(**space) -> Path:
    folder = temporary_folder()
    (folder / "tiny.json").write_text(json.dumps(TINY))
    (folder / "space.json").write_text(json.dumps(space or {"context.learning_rate": None, "planner.slow": None}))
    return folder


def in_process(folder: Path, **options) -> str:
    """`tune` with small settings in `folder`; what it printed."""
    arguments = TuneArguments(**{"config": Path("tiny.json"), "updates": 4, "lifetimes": 8, "seeds": 1} | options)
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as printed:
        tune(arguments)
    return printed.getvalue()


def trials_of(folder: Path) -> list[dict]:
    return json.loads((folder / "runs/tune-default/trials.json").read_text())["trials"]


def start_study(folder: Path, *arguments: str) -> subprocess.Popen:
    return start(*SHORT, *arguments, folder=folder, script="tune_hyperparams.py")


def answers(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


class TestSpace(unittest.TestCase):
    def test_it_names_real_settings_and_holds_every_presets_own(self):
        for preset in PRESETS:
            base = with_preset(Settings(), preset)
            self.assertEqual(set(read_space(None, base)), set(SPACE), preset)

    def test_files_choose_from_it_and_add_to_it(self):
        folder = study_folder(**{
            "planner.trace": None, "planner.likely": None, "transition.padding": ["", "zeros"],
            "memory.budget_mb": {"low": 64, "high": 512, "log": True},
        })  # fmt: skip
        space = read_space(folder / "space.json", Settings())
        self.assertEqual(set(space), {"planner.trace", "planner.likely", "transition.padding", "memory.budget_mb"})
        self.assertEqual(space["planner.likely"].when, "")  # what it hangs on is not searched
        (folder / "space.json").write_text('{"planner.likely": null, "planner.promising": null}')
        self.assertEqual(list(read_space(folder / "space.json", Settings())), ["planner.promising", "planner.likely"])
        base = merge(Settings(), {"context": {"hindsight_weight": 0}})  # where the usual range is a logarithmic one
        self.assertEqual(read_space(None, base)["context.hindsight_weight"], tune_hyperparams.Range(0, 4))

    def test_the_order_of_a_file_does_not_matter(self):
        slow = '"planner.slow": {"low": 0.1, "high": 0.5, "when": "planner.likely"}'  # which hangs on what is not searched
        for content in (f'{{{slow}, "planner.likely": null}}', f'{{"planner.likely": null, {slow}}}'):
            folder = study_folder()
            (folder / "space.json").write_text(content)
            space = read_space(folder / "space.json", Settings())
            self.assertEqual({name: what.when for name, what in space.items()}, {"planner.likely": "", "planner.slow": "planner.likely"})

    def test_what_hangs_on_another_setting_is_only_asked_for_where_that_counts(self):
        space = {"planner.promising": SPACE["planner.promising"], "planner.likely": SPACE["planner.likely"]}
        for promising, asked in ((0.0, False), (0.2, True)):
            trial = optuna.trial.FixedTrial({"planner.promising": promising, "planner.likely": 0.3})
            self.assertEqual("planner.likely" in tune_hyperparams.suggest(trial, space, Settings()), asked)

    def test_mistakes_in_it_are_told(self):
        for content, words in (
            ('{"planner.slwo": {"low": 0.1, "high": 0.5}}', "no setting 'planner.slwo'"), ('{"planner.slwo": null}', "planner.slwo"),
            ('{"planner.slow": {"low": 0.3, "high": 0.5}}', "must include 0.2"), ('{"planner.slow": {"low": 0.1}}', "high"),
            ('{"planner.slow": {"low": 0.1, "high": 3}}', "planner.slow is 3"), ('{"transition.padding": ["zeros"]}', "must include"),
            ('{"planner.promising": {"low": 0, "high": 1, "log": true}}', "must include"), ("[", "no search space"), ("[1]", "no search space"),
            ('{"world": {"low": 0, "high": 1}}', "no setting 'world'"), ('{"world.slip": {"low": 0, "high": 1}}', "not to be searched"),
            ('{"transition.padding": {"low": 0, "high": 1}}', "no number"), ('{"context.hidden": [64, 64.7]}', "context.hidden"),
            ('{"planner.slow": {"low": 0.1, "high": 0.5, "when": "planner.promisng"}}', "planner.promisng"),
            ('{"planner.slow": {"low": "a", "high": "b"}}', "planner.slow"),
            ('{"planner.slow": {"low": 0.1, "high": 0.5, "when": "world.edges"}}', "must be a number"),
            ('{"planner.slow": {"low": 0.1, "high": 0.5, "when": "planner.likely"}, "planner.promising": null, "planner.likely": null}', "always"),
        ):  # fmt: skip
            folder = study_folder()
            (folder / "space.json").write_text(content)
            with self.subTest(content), self.assertRaisesRegex(UserError, words):
                read_space(folder / "space.json", Settings())


class TestStudy(unittest.TestCase):
    def test_it_goes_on_and_its_best_set_can_be_applied(self):
        folder = study_folder()
        for trials, left in ((1, 1), (4, 3), (4, 0)):
            self.assertIn(f"{left} of {trials} trials left", in_process(folder, trials=trials))
        best = json.loads((folder / "runs/tune-default/best.json").read_text())
        self.assertEqual(best.pop("preset"), "default")
        tuned = merge(Settings(), best)
        self.assertEqual(tuned.world.grid, 4)  # what the search began from is part of it
        trials = trials_of(folder)
        self.assertEqual(trials[0]["params"], {name: value_of(merge(Settings(), TINY), name) for name in SPACE})
        done = sorted((trial for trial in trials if trial["state"] == "COMPLETE"), key=lambda trial: -trial["score"])
        self.assertEqual(value_of(tuned, "planner.slow"), done[0]["params"]["planner.slow"])
        self.assertGreaterEqual(done[0]["score"], trials[0]["score"])
        for name in ("history.png", "slices.png", "curves.png"):
            self.assertGreater((folder / "runs/tune-default" / name).stat().st_size, 5_000)
        for trial in trials:  # all keep what they were and did, the best three their checkpoints
            runs = folder / f"runs/tune-default/trial-{trial['number']:04d}"
            self.assertTrue((runs / "seed-0/metrics.jsonl").exists() and (runs / "seed-0/config.json").exists())
            self.assertEqual((runs / "seed-0/checkpoint.pt").exists(), trial["number"] in [t["number"] for t in done[:3]])
        with contextlib.chdir(folder):
            agent = tune_hyperparams.RunFolder(Path(f"runs/tune-default/trial-{done[0]['number']:04d}/seed-0")).load()[0]
            self.assertEqual(set(agent), {"modules", "counters"})
            with self.assertRaisesRegex(UserError, "other settings"):
                in_process(folder, trials=4, preset="quick")
            with self.assertRaisesRegex(UserError, "other space"):
                in_process(folder, trials=4, space=Path("space.json"))

    def test_a_trial_that_diverges_fails_with_its_reason_and_the_study_goes_on(self):
        folder, advance = study_folder(), Learner.advance
        calls = iter([False, True, False])

        def diverges(learner):
            advance(learner)
            if learner.update == 1:
                learner.diverges = next(calls)
            if learner.diverges:
                learner.metrics["value/value"] = tune_hyperparams.torch.tensor(math.nan)

        with mock.patch.object(Learner, "advance", diverges):
            said = in_process(folder, trials=3)
        self.assertIn("seed 0 diverged: value/value is not finite at update 3", said)
        states = [trial["state"] for trial in trials_of(folder)]
        self.assertEqual((states[0], states[1], states[2] in ("COMPLETE", "PRUNED")), ("COMPLETE", "FAIL", True))

    def test_a_full_disk_ends_it_and_its_trial_is_tried_again(self):
        folder = study_folder()
        with mock.patch.object(tune_hyperparams, "write_metrics", side_effect=OSError("No space left on device")):
            with self.assertRaisesRegex(OSError, "No space left"):
                in_process(folder, trials=1)
        self.assertIn("1 of 1 trials left", in_process(folder, trials=1))
        self.assertEqual([trial["state"] for trial in trials_of(folder)], ["FAIL", "COMPLETE"])
        self.assertEqual(trials_of(folder)[0]["params"], trials_of(folder)[1]["params"])

    def test_a_torn_journal_is_mended(self):
        folder = study_folder()
        in_process(folder, trials=1)
        with open(folder / "runs/tune-default/journal.log", "a") as journal:
            journal.write('{"op_code": 4, "wor')  # what a kill or a full disk leaves
        self.assertIn("1 of 2 trials left", in_process(folder, trials=2))
        self.assertIn("0 of 2 trials left", in_process(folder, trials=2))

    def test_whatever_a_trial_raises_the_study_goes_on(self):
        folder = study_folder()
        with mock.patch.object(tune_hyperparams, "evaluate", side_effect=[RuntimeError("out of memory"), *[{"return_mean": 1.0}] * 9]):
            said = in_process(folder, trials=2)
        self.assertIn("trial 0 failed: RuntimeError: out of memory", said)
        self.assertNotIn("where the search began", said)

    def test_another_storage_does_not_touch_a_studys_folder(self):
        folder = study_folder()
        in_process(folder, trials=1)
        with self.assertRaisesRegex(UserError, "another storage"):
            in_process(folder, trials=1, storage=f"sqlite:///{folder}/x.db")

    def test_a_file_means_here_what_it_means_in_main(self):
        folder = temporary_folder()
        for content, preset, bins in (
            (TINY | {"preset": "quick"}, "quick", (-1.0, 0.0, 1.0)), (TINY | {"world": TINY["world"] | {"worths": [1, 0.5]}}, "default", (0.0, 0.5, 1.0)),
        ):  # fmt: skip
            (folder / "tiny.json").write_text(json.dumps(content))
            with mock.patch.object(tune_hyperparams, "read_space", side_effect=UserError("so far")) as read:
                with self.assertRaisesRegex(UserError, "so far"):
                    in_process(folder)
            base = read.call_args.args[1]
            self.assertEqual((base.preset, base.transition.reward_bins), (preset, bins))

    def test_jobs_share_the_trials_and_run_as_many_as_were_asked_for(self):
        folder = study_folder()
        done = command(*SHORT, "--trials", 5, "--jobs", 2, "--space", "space.json", folder=folder, script="tune_hyperparams.py")
        self.assertEqual(done.returncode, 0, done.stderr)
        trials = trials_of(folder)
        self.assertEqual((len(trials), len({tuple(trial["worker"]) for trial in trials})), (5, 2))

    def test_bad_arguments_are_refused_before_anything_is_written(self):
        folder = study_folder()
        for options, words in (
            ({"trials": 0}, "trials is 0"), ({"study": "../elsewhere"}, "'../elsewhere'"), ({"lifetimes": 1}, "lifetimes is 1"),
            ({"jobs": 0}, "jobs is 0"), ({"config": Path("nowhere.json")}, "nowhere.json"), ({"space": Path("tiny.json")}, "tiny.json"),
            ({"storage": "teapot://x"}, "storage teapot://x cannot"), ({"device": "abacus"}, "abacus"), ({"preset": "gym"}, "gym_id"),
        ):  # fmt: skip
            with self.subTest(**options), self.assertRaisesRegex((UserError, ValueError), words):
                in_process(folder, **options)
        done = command("--storage", "sqlite:////nowhere/x.db", folder=folder, script="tune_hyperparams.py")
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertNotIn("Traceback", done.stderr)
        self.assertFalse((folder / "runs").exists() and list((folder / "runs").iterdir()))


class TestBudget(unittest.TestCase):
    def test_a_shorter_training_begins_each_part_as_much_sooner(self):
        for preset, given, updates in (("default", None, 300), ("quick", None, 140), ("default", 500, 500), ("default", 2000, 2000)):
            base = with_preset(Settings(), preset)
            short, full = tune_hyperparams.shortened(base, given).training, base.training
            self.assertEqual(short.updates, updates)
            share = min(1, updates / full.updates)
            self.assertEqual((short.value_from, short.plan_from), (round(full.value_from * share), round(full.plan_from * share)))
            self.assertEqual(short.outcome_updates, full.outcome_updates)

    def test_the_schedule_that_shrinks_is_not_searched(self):
        folder = study_folder(**{"training.plan_from": {"low": 10, "high": 300}})
        with self.assertRaisesRegex(UserError, "training.plan_from is not to be searched"):
            read_space(folder / "space.json", Settings())


class TestFaults(unittest.TestCase):
    def test_the_quick_study_is_killed_in_the_middle_and_goes_on(self):
        folder = temporary_folder()
        line = ["--preset", "quick", "--trials", "3", "--updates", "12", "--lifetimes", "64"]  # of one seed each
        process = start(*line, folder=folder, script="tune_hyperparams.py")
        metrics = folder / "runs/tune-default/trial-0001/seed-0/metrics.jsonl"
        wait_for(lambda: metrics.exists() or process.poll() is not None, 300)
        process.kill()
        process.communicate()
        done = command(*line, folder=folder, script="tune_hyperparams.py")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("2 of 3 trials left", done.stdout)
        trials = trials_of(folder)
        self.assertEqual([trial["state"] for trial in trials[:2]], ["COMPLETE", "FAIL"])
        self.assertEqual((len(trials), trials[2]["params"]), (4, trials[1]["params"]))  # tried again

    @unittest.skipIf(os.name == "nt", "sends POSIX signals")
    def test_ctrl_c_ends_cleanly_with_all_workers_and_the_same_command_goes_on(self):
        for jobs in (1, 2):
            folder = study_folder()
            options = ["--trials", "4", "--jobs", str(jobs), "--updates", "4000", "--space", "space.json"]
            process = start_study(folder, *options)
            self.addCleanup(process.kill)  # it would slow all that follows
            wait_for(lambda: len(list(folder.glob("runs/tune-default/trial-*/seed-0/metrics.jsonl"))) == jobs or process.poll() is not None)
            for pid in (process.pid, *(children_of(process) if jobs > 1 else ())):  # as a terminal does
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGINT)
            _, errors = process.communicate(timeout=60)
            self.assertEqual(process.returncode, 130, errors)
            self.assertIn("stopped; the same command goes on", errors)
            self.assertNotIn("Traceback", errors)
            with contextlib.chdir(folder):
                states = [trial.state.name for trial in open_study(TuneArguments(), Path("runs/tune-default")).get_trials()]
            self.assertEqual(sorted(states), ["FAIL"] * jobs + ["WAITING"] * jobs)

    def test_a_silent_worker_elsewhere_is_given_up_by_the_database(self):
        folder = study_folder()
        url = f"sqlite:///{folder}/study.db"
        arguments = TuneArguments(storage=url)
        with mock.patch.multiple(tune_hyperparams, HEARTBEAT=1, SILENCE=2), contextlib.chdir(folder):
            trial = open_study(arguments, folder).ask({"planner.slow": optuna.distributions.FloatDistribution(0.1, 0.5)})
            tune_hyperparams.reclaim(open_study(arguments, folder), folder)  # whose it is has not been said yet
            trial.set_user_attr("worker", (socket.gethostname(), "somebody in another folder"))
            study = open_study(arguments, folder)
            tune_hyperparams.reclaim(study, folder)
            self.assertEqual(study.trials[0].state.name, "RUNNING")  # who is elsewhere may be alive
            study._storage.record_heartbeat(trial._trial_id)
            time.sleep(4)
            study.optimize(lambda again: again.suggest_float("planner.slow", 0.1, 0.5), n_trials=1)
        self.assertEqual([trial.state.name for trial in study.trials], ["FAIL", "COMPLETE"])
        self.assertEqual(study.trials[0].params, study.trials[1].params)


def serve(url: str, port: int) -> None:
    optuna.storages.run_grpc_proxy_server(optuna.storages.RDBStorage(url), host="localhost", port=port)


@unittest.skipUnless(POSTGRES and importlib.util.find_spec("psycopg2"), "needs PostgreSQL (apt-get install postgresql) and psycopg2-binary")
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
        subprocess.run([f"{cls.programs}/{name}", *arguments], check=True, stdout=subprocess.DEVNULL, cwd="/", **cls.user)

    def test_two_workers_share_a_study_of_which_one_is_killed(self):
        folder = study_folder()
        options = ["--storage", self.url, "--trials", "5", "--space", "space.json"]
        workers = [start_study(folder, *options) for _ in range(2)]
        wait_for(lambda: (folder / "runs/tune-default/trial-0001/seed-0/metrics.jsonl").exists())
        workers[0].kill()
        workers[0].communicate()
        said, errors = workers[1].communicate(timeout=240)
        self.assertEqual(workers[1].returncode, 0, errors)
        states = [trial["state"] for trial in trials_of(folder)]
        self.assertEqual(sum(state in ("COMPLETE", "PRUNED") for state in states), 5)
        self.assertLessEqual(states.count("FAIL"), 1)
        self.assertNotIn("RUNNING", states)

    @unittest.skipUnless(importlib.util.find_spec("grpc"), "needs grpcio")
    def test_it_can_be_reached_through_a_proxy(self):
        port = free_port()
        server = multiprocessing.get_context("spawn").Process(target=serve, args=(self.url, port), daemon=True)
        server.start()
        self.addCleanup(server.terminate)
        wait_for(lambda: answers(port))
        folder = study_folder()
        in_process(folder, trials=2, study="proxied", space=Path("space.json"), storage=f"grpc://localhost:{port}")
        direct = open_study(dataclasses.replace(TuneArguments(), storage=self.url, study="proxied"), folder)
        self.assertEqual(len(direct.trials), 2)


if __name__ == "__main__":
    unittest.main()
