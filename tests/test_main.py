"""Settings and presets, the command line, runs that stop and resume, statistics of evaluations, and figures."""

import contextlib
import dataclasses
import io
import itertools
import json
import re
import signal
import unittest
from pathlib import Path
from unittest import mock

import gymnasium
import numpy as np
import torch

import main
from agent import Learner
from environment import WORLDS, permutation_split
from main import PRESETS, Settings, build_system, evaluate, load_system, train, with_preset
from memory import RunFolder, UserError, merge
from tests.benchmarks import references, report
from tests.shared import (
    TINY,
    Room,
    TOTAL,
    copy_of,
    in_process,
    installed,
    only_run,
    stopped_at,
    temporary_folder,
    tiny,
    tiny_folder,
    tiny_run,
)

COMMANDS = ("train", "evaluate", "resume", "watch")


def unwrapped(printed: str) -> str:
    """Printed text on one line, without the frames that tyro draws around its messages."""
    return " ".join(printed.replace("│", " ").split())


def new_run(arguments: list, folder: Path) -> dict:
    """The config.json of a run that the command line starts and at once stops, as Ctrl-C would."""
    with mock.patch.object(main, "train", return_value=signal.SIGINT):
        code, printed = in_process(arguments, folder)
    assert code == 130, printed
    return json.loads((only_run(folder) / "config.json").read_text())


class TestSettings(unittest.TestCase):
    def test_presets_are_valid(self):
        for name in PRESETS:
            settings = with_preset(Settings(), name)
            self.assertEqual(settings.preset, name)
            for key, value in WORLDS.get(name, {}).items():
                self.assertEqual(getattr(settings.world, key), value)

    def test_settings_that_do_not_fit_together_are_refused(self):
        for changes, words in (
            ({"preset": "slow"}, "preset is 'slow'.*quick"),
            ({"seed": -1}, "seed is -1"),
            ({"training": {"value_batch": 99}}, "training.value_batch is 99.*between 1 and 32"),
            ({"training": {"random_lifetimes": 100}}, "multiple of training.envs: choose 128"),
            ({"memory": {"budget_mb": 1}}, "raise memory.budget_mb"),
        ):
            with self.subTest(changes=changes), self.assertRaisesRegex(ValueError, words):
                merge(Settings(), changes)
        with self.assertRaisesRegex(ValueError, "transition.reward_bins is .*world.reward_values has 2"):
            build_system(tiny(world={"reward_values": [2, -1]}))

    def test_reward_bins_follow_the_reward_values(self):
        for arguments, bins in (
            (["--world.reward_values", "1", ".5", "-1"], [-1, 0, 0.5, 1]),
            (["--preset", "everything", "--world.reward_values", "2", "-1"], [-1, 0, 2]),
            (["--transition.reward-bins", "-2", "-1", "0", "1"], [-2, -1, 0, 1]),
        ):
            self.assertEqual(new_run(arguments, temporary_folder())["transition"]["reward_bins"], bins)

    def test_flags_beat_the_file_and_the_file_beats_the_preset(self):
        folder = tiny_folder()
        content = TINY | {"preset": "quick", "world": TINY["world"] | {"slip": 0.2}}
        (folder / "both.json").write_text(json.dumps(content))
        config = new_run(["--config", "both.json", "--world.lifetime", "10"], folder)
        self.assertEqual(config["preset"], "quick")
        self.assertEqual(config["world"]["noise"], WORLDS["quick"]["noise"])  # from the preset
        self.assertEqual((config["world"]["slip"], config["world"]["grid"]), (0.2, 4))  # from the file
        self.assertEqual(config["world"]["lifetime"], 10)  # from the flag

    def test_the_preset_that_is_asked_for_keeps_its_name_over_that_of_a_file(self):
        path = temporary_folder() / "some.json"
        path.write_text(json.dumps({"preset": "quick", "world": {"slip": 0.3}}))
        settings, _ = main.with_file(Settings(), path, "large")
        self.assertEqual((settings.preset, settings.world.grid, settings.world.slip), ("large", 8, 0.3))

    def test_the_configuration_of_a_run_starts_the_same_run(self):
        config = tiny_run() / "config.json"
        self.assertEqual(new_run(["--config", config], temporary_folder()), json.loads(config.read_text()))
        self.assertEqual(json.loads(config.read_text()), json.loads(json.dumps(dataclasses.asdict(tiny()))))


class TestCommandLine(unittest.TestCase):
    def refused(self, arguments: list, folder: Path, *words: str) -> None:
        code, printed = in_process(arguments, folder)
        self.assertEqual(code, 2, printed)
        self.assertNotIn("Traceback", printed)
        for each in words:
            self.assertIn(each, unwrapped(printed))

    def test_bad_input_stops_with_code_2_and_writes_nothing(self):
        folder = tiny_folder()
        (folder / "bad.json").write_text("{")
        (folder / "slow.json").write_text('{"preset": "slow"}')
        (folder / "list.json").write_text('{"preset": ["quick"]}')
        (folder / "empty").mkdir()
        for arguments, words in (
            (["--world.gird", "5"], "world.grid"),
            (["--world.grid", "2"], "world.grid is 2"),
            (["--world.grid", "six"], "six"),
            (["--preset", "slow"], "slow"),
            (["--preset", "gym"], "world.gym"),
            (["--config", "slow.json"], "preset is 'slow'"),
            (["--config", "list.json"], "preset is ['quick']"),
            (["--world.edges", "wrap", "--transition.kernel", "31"], "at most 13"),
            (["--vae.patch", "5"], "does not divide"),
            (["--device", "abacus"], "abacus"),
            (["--config", "bad.json"], "bad.json"),
            (["--config", "missing.json"], "missing.json"),
            (["--init-from", "nowhere"], "nowhere"),
            (["evaluate", "empty"], "empty is not a run"),
            (["evaluate", "nowhere"], "nowhere is not a run"),
            (["resume", "empty"], "empty is not a run"),
            (["watch", "empty", "--seed", "-1"], "seed is -1"),
            (["watch", "empty", "--fps", "0"], "fps is 0"),
            (["evaluate", "empty", "--split", "exam"], "exam"),
        ):
            with self.subTest(arguments=arguments):
                self.refused(arguments, folder, words)
        self.assertFalse((folder / "runs").exists())

    def test_unknown_and_deleted_settings_are_refused_by_name(self):
        folder = temporary_folder()
        for section, name, value in (
            ("planner", "imagine", 1),
            ("planner", "reward_mass", 0.9),
            ("planner", "promising", 0.2),
            ("world", "asynchronous", True),
            ("training", "worlds", 64),
            ("training", "no_such_setting", 1),
        ):
            with self.subTest(setting=f"{section}.{name}"):
                for spelling in {name, name.replace("_", "-")}:
                    self.refused([f"--{section}.{spelling}", str(value)], folder, f"--{section}.{spelling}")
                (folder / "old.json").write_text(json.dumps({section: {name: value}}))
                self.refused(["--config", "old.json"], folder, f"unknown setting {section}.{name}", "old.json")
        self.assertFalse((folder / "runs").exists())

    def test_help_shows_every_command(self):
        code, printed = in_process(["--help"], temporary_folder())
        self.assertEqual(code, 0, printed)
        for name in COMMANDS:
            self.assertRegex(printed, rf"(?m)^\W*{name}\s+\w+")

    def test_help_of_train_shows_every_setting(self):
        code, printed = in_process(["train", "--help"], temporary_folder())
        self.assertEqual(code, 0, printed)
        settings = dataclasses.asdict(Settings())
        sections = {name: values for name, values in settings.items() if isinstance(values, dict)}
        names = [f"{section}.{name}" for section, values in sections.items() for name in values]
        names += [name for name in settings if name not in sections] + ["config", "run"]
        self.assertGreater(len(names), 60)
        flags = ["--" + re.sub(r"_(?=\w)", "-", name) for name in names]
        self.assertEqual([flag for flag in flags if f"{flag} " not in printed], [])
        explained = {flag for flag, text in re.findall(r"(--[\w.-]+) \S+\s+(\S+)", printed) if text != "(default:"}
        self.assertEqual([flag for flag in flags if flag not in explained], [])

    def test_help_of_the_other_commands_shows_their_options(self):
        for name, options in (
            ("evaluate", ("--lifetimes", "--split", "--device")),
            ("resume", ("--updates",)),
            ("watch", ("--seed", "--fps", "--output")),
        ):
            code, printed = in_process([name, "--help"], temporary_folder())
            self.assertEqual(code, 0, printed)
            for option in options:
                self.assertIn(option, printed)

    def test_a_misspelt_command_is_answered_with_the_nearest_one(self):
        for wrong, right in (("evalute", "evaluate"), ("resum", "resume"), ("wacth", "watch"), ("trian", "train")):
            self.refused([wrong, "runs/x"], temporary_folder(), f"did you mean {right}?")

    def test_evaluate_repeats_the_evaluation_of_the_run(self):
        run = copy_of(tiny_run())
        code, printed = in_process(["evaluate", run, "--device", "cpu"], run)
        self.assertEqual(code, 0, printed)
        self.assertEqual((run / "evaluation-test-16.json").read_bytes(), (run / "evaluation.json").read_bytes())
        self.assertRegex(printed, r"agent\s+-?\d+\.\d\d \[.*\]\n")
        code, printed = in_process(["evaluate", run, "--lifetimes", "4", "--split", "validation"], run)
        self.assertEqual(code, 0, printed)
        result = json.loads((run / "evaluation-validation-4.json").read_text())
        self.assertEqual((result["split"], result["lifetimes"], len(result["returns"]["agent"])), ("validation", 4, 4))
        self.refused(["evaluate", run, "--lifetimes", "1"], run, "lifetimes is 1")

    def test_metrics_and_tensorboard_hold_the_same_numbers(self):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        lines = [json.loads(line) for line in (tiny_run() / "metrics.jsonl").read_text().splitlines()]
        self.assertEqual([line["update"] for line in lines], [*range(3, TOTAL, 3), TOTAL])
        events = EventAccumulator(str(tiny_run() / "tensorboard"), {"scalars": 0})
        events.Reload()
        for tag, name in (("charts/return", "return"), ("losses/context/filter", "context/filter")):
            seen = {event.step: event.value for event in events.Scalars(tag)}
            expected = {line["update"]: float(np.float32(line[name])) for line in lines if name in line}
            self.assertEqual(seen, expected)

    def test_another_run_gives_its_weights_or_is_refused(self):
        folder, first, learners = tiny_folder(), tiny_run(), []
        weights = RunFolder(first).load()[0]["modules"]
        with mock.patch.object(main, "train", lambda learner, run: learners.append(learner) or signal.SIGINT):
            code, printed = in_process(["--config", "tiny.json", "--seed", "1", "--init-from", first], folder)
        self.assertEqual(code, 130, printed)
        (learner,) = learners
        for name, module in learner.system.modules().items():
            for key, tensor in module.state_dict().items():
                self.assertTrue(torch.equal(tensor, weights[name][key]), f"{name}.{key}")
        self.assertEqual((len(learner.store), learner.phase()), (16, ("adaptation", 0)))
        frames, context = learner.store.blocks[0].frames[:, 0], torch.zeros(8, 32)
        before = learner.system.vae.encode(frames, context)
        train(learner, until=learner.update + 1)
        self.assertTrue(torch.equal(learner.system.vae.encode(frames, context), before))
        self.assertIn("context/filter", learner.metrics)
        self.refused(["--config", "tiny.json", "--init-from", first, "--context.hidden", "9"], folder, "other sizes")
        self.assertEqual(len(list((folder / "runs").iterdir())), 1)


class TestNamedRuns(unittest.TestCase):
    def test_a_name_is_that_of_a_folder(self):
        for name in ("a/b", "..", "/tmp/run"):
            code, printed = in_process(["--run", name], folder := temporary_folder())
            self.assertEqual((code, name in printed), (2, True), printed)
            self.assertEqual(list(folder.iterdir()), [])

    def test_the_same_command_goes_on_with_a_run_that_died_before_its_first_checkpoint(self):
        folder = tiny_folder(log_every=2, checkpoint_every=100)
        line = ["--config", "tiny.json", "--run", "mine"]
        with stopped_at(9, RuntimeError("as if killed")), self.assertRaisesRegex(RuntimeError, "as if killed"):
            in_process(line, folder)
        run = only_run(folder)
        self.assertEqual((run.name, len((run / "metrics.jsonl").read_text().splitlines())), ("mine", 4))
        (run / "store").mkdir()
        (run / "store" / "block-000000.pt").write_bytes(b"of another training")
        code, printed = in_process(line, folder)
        self.assertEqual(code, 0, printed)
        lines = [json.loads(line) for line in (only_run(folder) / "metrics.jsonl").read_text().splitlines()]
        self.assertEqual([line["update"] for line in lines], list(range(2, 39, 2)))
        self.assertEqual((run / "evaluation.json").read_bytes(), (tiny_run() / "evaluation.json").read_bytes())
        code, printed = in_process([*line, "--training.updates", "25"], folder)
        self.assertEqual(code, 2)
        self.assertRegex(unwrapped(printed), "training.updates.* 24 .*25 ")


class TestResume(unittest.TestCase):
    def assert_same_results(self, run: Path) -> None:
        """As those of a run with tiny settings that nothing stopped."""
        for name in ("metrics.jsonl", "evaluation.json"):
            self.assertEqual((run / name).read_bytes(), (tiny_run() / name).read_bytes(), name)

    def resume(self, run: Path, *options: str) -> tuple[int, str]:
        code, printed = in_process(["resume", run, *options], run)
        return code, unwrapped(printed)

    def test_a_killed_run_that_is_resumed_equals_an_uninterrupted_one_byte_for_byte(self):
        folder = tiny_folder(checkpoint_every=7)
        with stopped_at(20, RuntimeError("as if killed")), self.assertRaisesRegex(RuntimeError, "as if killed"):
            in_process(["--config", "tiny.json"], folder)
        run = only_run(folder)
        self.assertEqual(RunFolder(run).load()[0]["counters"][0], 14)
        lines = [json.loads(line)["update"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        self.assertEqual(lines[-1], 18)  # beyond the checkpoint
        with open(run / "metrics.jsonl", "a") as log:
            log.write("torn")  # what a kill in the middle of a line leaves
        code, printed = self.resume(run)
        self.assertEqual(code, 0, printed)
        self.assert_same_results(run)

    def test_ctrl_c_ends_the_update_and_saves_and_the_run_may_go_on_past_its_end(self):
        folder = tiny_folder()
        with stopped_at(10, interrupts=1):
            code, printed = in_process(["--config", "tiny.json"], folder)
        run = only_run(folder)
        self.assertEqual(code, 130)
        self.assertRegex(unwrapped(printed), f"update 11 .*python3 main.py resume runs/{run.name}")
        self.assertEqual(RunFolder(run).load()[0]["counters"][0], 11)
        self.assertFalse((run / "evaluation.json").exists())
        longer = copy_of(run)
        code, printed = self.resume(run)
        self.assertEqual(code, 0, printed)
        self.assert_same_results(run)
        code, printed = self.resume(longer, "--updates", "30")
        self.assertEqual(code, 0, printed)
        lines = [json.loads(line) for line in (longer / "metrics.jsonl").read_text().splitlines()]
        self.assertEqual([line["update"] for line in lines], [*range(3, 44, 3), 44])
        self.assertEqual(RunFolder(longer).settings(Settings()).training.updates, 30)
        code, printed = self.resume(longer, "--updates", "5")
        self.assertEqual(code, 2)
        self.assertIn("already past 5 updates", printed)

    def test_a_second_ctrl_c_stops_at_once_and_the_last_checkpoint_stays(self):
        folder = tiny_folder()
        with stopped_at(10, AssertionError("the update went on"), interrupts=2):
            code, _ = in_process(["--config", "tiny.json"], folder)
        self.assertEqual(code, 130)
        self.assertEqual(RunFolder(only_run(folder)).load()[0]["counters"][0], 9)

    def test_a_full_disk_leaves_the_last_checkpoint_and_a_run_that_goes_on(self):
        folder, save = tiny_folder(), torch.save

        def full(content: dict, file: object) -> None:
            if content.get("learner", {}).get("counters", [0])[0] == 12:
                file.write(b"half")
                raise RuntimeError("unexpected pos 128 vs 22")  # what torch says when a disk is full
            save(content, file)

        with mock.patch("torch.save", full):
            code, printed = in_process(["--config", "tiny.json"], folder)
        run = only_run(folder)
        self.assertEqual(code, 2)
        self.assertRegex(unwrapped(printed), "could not write .*checkpoint.pt .*MB .*last checkpoint")
        self.assertEqual(RunFolder(run).load()[0]["counters"][0], 9)
        self.assertEqual(self.resume(run)[0], 0)
        self.assert_same_results(run)

    def test_a_training_that_diverges_stops_and_keeps_its_last_good_checkpoint(self):
        folder, loss, calls = tiny_folder(checkpoint_every=12), main.Planner.loss, itertools.count()

        def diverging(*arguments: object) -> dict:
            losses = loss(*arguments)
            return losses | {"value": losses["value"] * torch.nan} if next(calls) == 8 else losses  # at update 24

        with mock.patch.object(main.Planner, "loss", diverging):
            code, printed = in_process(["--config", "tiny.json"], folder)
        run = only_run(folder)
        self.assertEqual(code, 2)
        self.assertRegex(unwrapped(printed), "is not finite at update 27.*[Tt]ry lower learning rates")
        self.assertEqual(RunFolder(run).load()[0]["counters"][0], 24)
        code, printed = self.resume(run)  # the loss is finite again
        self.assertEqual(code, 0, printed)
        self.assert_same_results(run)

    def test_files_that_do_not_belong_together_are_refused(self):
        edited, incomplete, damaged = (copy_of(tiny_run()) for _ in range(3))
        config = json.loads((edited / "config.json").read_text())
        config["context"]["hidden"] = 9
        (edited / "config.json").write_text(json.dumps(config))
        next((incomplete / "store").iterdir()).unlink()
        (damaged / "checkpoint.pt").write_bytes(b"no checkpoint")
        for run, words in ((edited, "does not fit"), (incomplete, "block-"), (damaged, "checkpoint.pt cannot be read")):
            code, printed = self.resume(run)
            self.assertEqual(code, 2)
            self.assertIn(words, printed)
            self.assert_same_results(run)

    def test_a_run_that_is_being_trained_is_refused(self):
        run = copy_of(tiny_run())
        with RunFolder(run).locked():
            code, printed = self.resume(run)
        self.assertEqual(code, 2)
        self.assertIn("being trained by another process", printed)


class TestEvaluation(unittest.TestCase):
    def test_it_holds_all_agents_and_the_nll_of_agent_and_exact_filter(self):
        result = json.loads((tiny_run() / "evaluation.json").read_text())
        for name in ("agent", "random", "thompson", "known_rule"):
            self.assertEqual((len(result["returns"][name]), len(result[name]["by_step"])), (16, 12))
            self.assertAlmostEqual(np.mean(result["returns"][name]), result[name]["return_mean"], places=5)
            self.assertAlmostEqual(sum(result[name]["by_step"]), result[name]["return_mean"], places=5)
        self.assertGreater(result["known_rule"]["return_mean"], result["random"]["return_mean"])
        agent, exact = (np.array(result["belief_nll"][name]) for name in ("agent", "exact"))
        self.assertAlmostEqual(result["belief_nll"]["late_excess"], (agent - exact)[6:].mean())
        lines = [json.loads(line) for line in (tiny_run() / "metrics.jsonl").read_text().splitlines()]
        self.assertEqual(result["env_steps"], lines[-1]["env_steps"])

    def test_more_lifetimes_than_the_exact_filter_has_room_for_are_refused_first(self):
        system = build_system(tiny(world={"walls": 2, "edges": "hidden", "wind": 0.4}))
        with (
            mock.patch("main.rollout", side_effect=AssertionError),
            self.assertRaisesRegex(ValueError, "at most [0-9,]+"),
        ):
            evaluate(system, "test", 10**6)

    def test_it_repeats_and_leaves_the_random_streams_of_the_training_alone(self):
        learner = Learner(build_system(tiny()))
        train(learner, until=1)
        before = [learner.generator.get_state(), learner.sampler.get_state()]
        results = []
        for seed in (1, 2):
            torch.manual_seed(seed)  # whatever else is random in the process
            results.append(evaluate(learner.system, "validation", 8))
        self.assertEqual(*results)
        for one, other in zip(before, (learner.generator.get_state(), learner.sampler.get_state()), strict=True):
            self.assertTrue(torch.equal(one, other))

    def test_evaluation_seeds_are_beyond_those_of_every_training(self):
        largest = merge(Settings(), {"seed": 1_000_000}).seed
        self.assertGreater(min(main.EVALUATION_SEEDS.values()), (largest + 1) * 2**32 + 2**32)

    def test_a_loaded_system_acts_as_the_trained_one(self):
        system, state = load_system(tiny_run())
        self.assertEqual(state["counters"][0], TOTAL)
        result = json.loads((tiny_run() / "evaluation.json").read_text())
        self.assertEqual(evaluate(system, "test", 16)["returns"], result["returns"])


class TestFigures(unittest.TestCase):
    def watch(self, *options: object) -> tuple[int, str]:
        code, printed = in_process(["watch", self.run_folder, *options], self.run_folder)
        return code, unwrapped(printed)

    def setUp(self):
        self.run_folder = copy_of(tiny_run())

    def test_a_run_ends_with_its_figures(self):
        for name in ("adaptation.png", "lifetime.gif"):
            self.assertGreater((self.run_folder / name).stat().st_size, 10_000)
        self.assertEqual((self.run_folder / "lifetime.gif").read_bytes()[:6], b"GIF89a")

    def test_another_seed_shows_another_lifetime(self):
        code, printed = self.watch("--seed", 3, "--fps", 50)
        self.assertEqual((code, "lifetime-3.gif" in printed), (0, True), printed)
        other = (self.run_folder / "lifetime-3.gif").read_bytes()
        self.assertNotEqual(other, (self.run_folder / "lifetime.gif").read_bytes())

    @installed("imageio_ffmpeg")
    def test_an_mp4_is_written_once(self):
        path = self.run_folder / "film.mp4"
        code, printed = self.watch("--output", path)
        self.assertEqual(code, 0, printed)
        self.assertEqual(path.read_bytes()[4:8], b"ftyp")
        code, printed = self.watch("--output", path)
        self.assertEqual((code, "exists" in printed), (2, True), printed)

    def test_other_files_and_an_mp4_without_ffmpeg_are_refused(self):
        code, printed = self.watch("--output", self.run_folder / "film.avi")
        self.assertEqual((code, ".mp4" in printed), (2, True), printed)
        with mock.patch("matplotlib.animation.FFMpegWriter.isAvailable", return_value=False):
            code, printed = self.watch("--output", self.run_folder / "film.mp4")
        self.assertEqual((code, "needs ffmpeg" in printed), (2, True), printed)
        self.assertFalse([path for path in self.run_folder.iterdir() if "film" in path.name])


class TestEveryEnvironment(unittest.TestCase):
    """Training on every kind of rules, and the command line with external environments."""

    def test_rewards_without_a_bin_and_too_many_rules_are_refused(self):
        with self.assertRaisesRegex(ValueError, "reward_bins.*0.5: add it"):
            Learner(build_system(tiny(world={"reward_values": (1.0, 0.5)})))
        with self.assertRaisesRegex(ValueError, "403,200 rules.*at most 665"):
            merge(Settings(), {"world": {"actions": 8, "edges": "hidden", "wind": 0.4}})

    def test_every_kind_of_rules_trains_a_tiny_agent_at_a_small_and_the_largest_grid(self):
        rules = {"edges": "hidden", "walls": 3, "wind": 0.3, "actions": 6, "reward_values": (1.0, 0.5, -1.0)}
        rules |= {"switch": 0.05, "tint": 0.3, "lifetime": 6}
        bins = {"reward_bins": (-1.0, 0.0, 0.5, 1.0)}
        for grid in (5, 16):
            settings = tiny(world=rules | {"grid": grid}, transition=bins, training={"updates": 6})
            learner = Learner(build_system(settings))
            train(learner)
            self.assertTrue(all(torch.isfinite(value) for value in learner.metrics.values()))

    def external(self, *arguments, **world):
        """A new folder with a configuration; exit code and errors of a command in it."""
        folder = temporary_folder()
        (folder / "tiny.json").write_text(json.dumps(TINY | {"world": {"lifetime": 12, "cell": 4, **world}}))
        return folder, *in_process(["--config", "tiny.json", *arguments], folder)

    def test_an_external_environment_is_trained_on_evaluated_and_repeated(self):
        folder, code, errors = self.external("--world.gym-id", "Room-v0", "--world.shuffle", *"0123")
        self.assertEqual(code, 0, errors)
        run = only_run(folder)
        config = json.loads((run / "config.json").read_text())
        self.assertEqual((config["preset"], config["transition"]["reward_bins"]), ("gym", [0.0, 0.5, 1.0]))
        result = json.loads((run / "evaluation.json").read_text())
        self.assertNotIn("thompson", result)
        self.assertNotIn("normalised", result)
        self.assertEqual(set(result["returns"]), {"agent", "random"})
        self.assertIsNone(result["belief_nll"]["late_excess"])
        code, errors = in_process(["evaluate", str(run)], folder)
        self.assertEqual(code, 0, errors)
        repeated = run / f"evaluation-test-{result['lifetimes']}.json"
        self.assertEqual(repeated.read_bytes(), (run / "evaluation.json").read_bytes())
        code, errors = in_process(["evaluate", str(run), "--split", "permutations"], folder)
        self.assertEqual(code, 2)
        self.assertIn("permutations", errors)
        code, errors = in_process(["watch", str(run)], folder)
        self.assertEqual(code, 0, errors)
        with contextlib.redirect_stdout(io.StringIO()):
            report.main((run,), folder / "report")
        with self.assertRaisesRegex(UserError, "no exact solution"):
            references.main(run)

    def test_the_preset_is_found_and_reward_bins_belong_to_their_environment(self):
        room, other = {"cell": 4, "gym_id": "Room-v0"}, {"cell": 4, "gym_id": "OtherRoom-v0"}
        option, bins = ["--world.gym-id", "Room-v0"], ["--transition.reward-bins", "-1", "0", "1"]
        for arguments, content, expected in (
            (["--world.gym_id", "Room-v0"], {"world": {"cell": 4}}, [0.0, 0.5, 1.0]),
            ([], {"world": room}, [0.0, 0.5, 1.0]),
            ([], {"world": room, "transition": {"reward_bins": [0, 0.5]}}, [0.0, 0.5]),
            (option, {"world": other, "transition": {"reward_bins": [0, 9]}}, [0.0, 0.5, 1.0]),
            (option, {"world": {"cell": 4}, "transition": {"reward_bins": [0, 9]}}, [0.0, 9.0]),
            ([*option, *bins], {"world": {"cell": 4}}, [-1.0, 0.0, 1.0]),
        ):
            folder = temporary_folder()
            (folder / "some.json").write_text(json.dumps(content))
            with self.subTest(arguments, **content):
                config = new_run(["--config", "some.json", *arguments], folder)
                self.assertEqual((config["preset"], config["transition"]["reward_bins"]), ("gym", expected))
        code, errors = in_process(["--preset", "gym"], temporary_folder())
        self.assertEqual(code, 2)
        self.assertIn("--world.gym-id", errors)

    def test_training_uses_only_rules_of_the_training_split(self):
        settings = merge(merge(with_preset(Settings(), "gym"), TINY), {"world": {"gym_id": "Room-v0", "cell": 4}})
        learner = Learner(build_system(settings))
        train(learner)
        ranks = [int(rank) for block in learner.store.blocks for rank in block.task]
        self.assertEqual({permutation_split(rank) for rank in ranks}, {"train"})
        self.assertEqual(learner.system.engine.actions, 5)
        with self.assertWarnsRegex(UserWarning, r"beyond transition.reward_bins, \(-1.0, 0.0, 0.25\)"):
            learner.settings = merge(settings, {"transition": {"reward_bins": (-1, 0, 0.25)}})
            for _ in range(4):
                learner.collect(exploration=1.0)
        learner.settings = settings
        result = evaluate(learner.system, "test", 4)
        self.assertTrue(np.isfinite(result["return_mean"]))

    def test_a_run_whose_environment_fails_resumes_to_the_same_result(self):
        class Fragile(Room):
            steps, fails = 0, ()

            def step(self, action):
                Fragile.steps += 1  # of all environments together
                if Fragile.steps in Fragile.fails:
                    raise RuntimeError("the roof came down")
                return super().step(action)

        gymnasium.register("Fragile-v0", entry_point=Fragile)
        results = []
        for fails in ((), (96 + 250, 96 + 400)):  # after the 96 steps for the reward bins and after a checkpoint each
            Fragile.steps, Fragile.fails = 0, fails
            folder, code, errors = self.external("--world.gym-id", "Fragile-v0", lifetime=6)
            for _ in fails:
                self.assertEqual(code, 2)
                self.assertIn("Fragile-v0 failed: RuntimeError: the roof came down", errors)
                code, errors = in_process(["resume", str(only_run(folder))], folder)
            self.assertEqual(code, 0, errors)
            results.append([(only_run(folder) / name).read_bytes() for name in ("metrics.jsonl", "evaluation.json")])
        self.assertEqual(results[0], results[1])

    def test_unsupported_environments_are_refused_before_anything_is_written(self):
        folder, room = temporary_folder(), ["--world.gym-id", "Room-v0"]
        for arguments, message in (
            (["--world.gym-id", "Nowhere-v0"], "Nowhere-v0"),
            (["--world.gym-id", "CartPole-v1"], "must be uint8"),
            ([*room, "--world.cell", "5"], "does not divide"),
            ([*room, "--world.cell", "4", "--world.shuffle", "0", "1"], "4 to 20"),
            (["--world.shuffle", "0", "1", "2", "3"], "give world.gym_id"),
        ):
            code, errors = in_process(arguments, folder)
            self.assertEqual(code, 2, errors)
            self.assertIn(message, " ".join(errors.split()))
        self.assertFalse((folder / "runs").exists())


if __name__ == "__main__":
    unittest.main()
