"""What people really do with it: bad inputs by table, damaged folders, other people's environments, ends of processes.

The kinds of fault are those that public trackers of this field report.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import unittest
from pathlib import Path
from unittest import mock

import gymnasium
import numpy as np
import torch

import environment
import main
import tune_hyperparams
from agent import Learner
from environment import HiddenRulesWrapper
from main import Settings, build_system, train
from memory import RunFolder, UserError, WorldStep, as_tensor
from tests.benchmarks import run_folders
from tests.shared import (
    ROOT,
    TINY,
    Room,
    copy_of,
    in_process,
    only_run,
    stopped_at,
    temporary_folder,
    tiny,
    tiny_folder,
)
from tests.shared import tiny_run

FLAGS = """
--preset default,quik | --preset= | --seed -1 | --seed 1.5 | --seed x | --seed 1000001 | --device gpu
--device cuda:99 | --world.grid 2 | --world.grid 17 | --world.grid six | --world.cell 0 | --world.lifetime 1
--world.episode-limit 0 | --world.slip 1.1 | --world.slip -0.1 | --world.slip nan | --world.noise -1
--world.noise inf | --world.switch 0.9 | --world.tint 1 | --world.reward-values 0 1 | --world.reward-values 1 1
--world.reward-values -1 | --world.actions 3 | --world.reward-values | --world.walls 99 | --world.edges open
--world.wind 1 | --world.holdout some | --world.gym-id | --world.gym-id Nowhere-v0
--world.gym-id no.such.module:Room-v0 | --world.gym-id CartPole-v1 | --world.shuffle 0 1 2 3
--world.gym-id Room-v0 --world.cell 4 --world.shuffle 0 0 1 2 | --world.gym-id Room-v0 --world.shuffle some
--world.gym-id Room-v0 --world.cell 5 | --world.gym-id Room-v0 --world.walls 2 | --world.switch-step 5
--world.gym-id Room-v0 --world.holdout permutations | --world.gym-id Room-v0 --world.slip-random 0
--transition.reward-bins 0 nan | --transition.reward-bins 0 inf
--memory.budget-mb 0 | --memory.budget-mb 1 | --vae.num-codes 1 | --vae.num-codes 256 | --vae.patch 5
--vae.obs-std 0 | --transition.kernel 2 | --transition.max-effects 1 | --transition.padding mirror
--transition.reward-bins 1 | --transition.reward-bins 1 0 | --transition.reward-bins -1 0
--transition.place-width 0 | --context.hidden 0 | --context.hidden 2.5 | --context.learning-rate -1
--planner.discount 1 | --planner.nodes 0 | --planner.top-p 0 | --planner.min-branch-prob 1 | --planner.tau 0
--training.updates 0 | --training.envs 0 | --training.batch 4 --training.value-batch 9
--training.random-lifetimes 3 | --training.exploration 2 | --training.log-every 0
--training.evaluation-lifetimes 1 | --init-from nowhere | --run a/b | --run .. | --config nowhere.json
--config . | --nonsense 1 | --preset gym | --updates 3 | trian | evaluate | evaluate nowhere | resume nowhere
watch nowhere | resume | watch RUN --seed -1 | watch RUN --fps 0 | watch RUN --output x.png
watch RUN --output no/such/folder.gif | evaluate RUN --lifetimes 1 | evaluate RUN --split train
evaluate RUN --device abacus | resume RUN --updates 0 | resume RUN --updates 1
"""
FILES = (  # contents of a --config
    ("", "{", "[]", "3", "null", "{'preset': 'quick'}", '{"preset": 3}', '{"preset": "best"}', '{"world": 3}')
    + ('{"world": {"grid": "6"}}', '{"world": {"grid": 6.5}}', '{"world": {"grd": 6}}', '{"world": {"grid": null}}')
    + ('{"wrld": {}}', '{"seed": true}', '{"training": {"updates": -1}}', '{"world": {"shuffle": [0, 1]}}', "\x00\x01")
    + ('{"world": {"gym_id": 5}}', '{"run": "x"}', '{"planner": {"discount": 1%s}}' % ("0" * 400))
    + ('{"transition": {"reward_bins": [0, 1%s]}}' % ("0" * 400),)
)
DAMAGE = {  # of the folder of a run
    "no checkpoint": lambda run: (run / "checkpoint.pt").unlink(),
    "an empty checkpoint": lambda run: (run / "checkpoint.pt").write_bytes(b""),
    "half a checkpoint": lambda run: cut(run / "checkpoint.pt", 2),
    "a checkpoint without its end": lambda run: cut(run / "checkpoint.pt", 1.01),
    "a foreign checkpoint": lambda run: torch.save({"state_dict": torch.zeros(2)}, run / "checkpoint.pt"),
    "a checkpoint of a list": lambda run: torch.save([1, 2], run / "checkpoint.pt"),
    "a Git LFS pointer": lambda run: (run / "checkpoint.pt").write_text("version https://git-lfs.github.com/spec/v1\n"),
    "a folder as checkpoint": lambda run: ((run / "checkpoint.pt").unlink(), (run / "checkpoint.pt").mkdir()),
    "no config": lambda run: (run / "config.json").unlink(),
    "an empty config": lambda run: (run / "config.json").write_text(""),
    "half a config": lambda run: cut(run / "config.json", 2),
    "other keys in the config": lambda run: edit(run, lambda config: config | {"wheels": 4}),
    "another type in the config": lambda run: edit(run, lambda config: config | {"world": [6]}),
    "another lifetime": lambda run: edit(run, lambda config: config["world"].update(lifetime=13) or config),
    "another phase": lambda run: edit(run, lambda config: config["training"].update(effect_updates=9) or config),
    "another size": lambda run: edit(run, lambda config: config["context"].update(hidden=9) or config),
}
BLOCKS = {
    "no blocks": lambda run: shutil.rmtree(run / "store"),
    "a missing block": lambda run: next((run / "store").iterdir()).unlink(),
    "an empty block": lambda run: next((run / "store").iterdir()).write_bytes(b""),
    "half a block": lambda run: cut(next((run / "store").iterdir()), 2),
    "a foreign block": lambda run: torch.save({"frames": 3}, next((run / "store").iterdir())),
}


def cut(path: Path, share: float) -> None:
    """Keep the beginning of a file, one of so many parts."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) / share)])


def edit(run: Path, change) -> None:
    """Change a run's config.json."""
    (run / "config.json").write_text(json.dumps(change(json.loads((run / "config.json").read_text()))))


class TestBadInputs(unittest.TestCase):
    def refused(self, arguments, folder) -> str:
        """The message with which a command is refused: exit code 2, no traceback, nothing written."""

        def content() -> list[Path]:
            return [path for path in sorted(folder.rglob("*")) if path.name != ".lock"]

        before = content()
        code, printed = in_process(arguments, folder)
        self.assertEqual(code, 2, printed)
        self.assertNotIn("Traceback", printed)
        self.assertGreater(len(printed.split()), 3)
        self.assertEqual(content(), before)
        return printed

    def test_flags_and_commands(self):
        folder = temporary_folder()
        flags = [line.strip() for line in FLAGS.replace("\n", "|").split("|") if line.strip()]
        self.assertGreaterEqual(len(flags) + len(FILES) + 2 * len(DAMAGE) + len(BLOCKS), 120)
        for line in flags:
            with self.subTest(line):
                self.refused([str(tiny_run()) if word == "RUN" else word for word in line.split()], folder)

    def test_configurations(self):
        folder = temporary_folder()
        for content in FILES:
            (folder / "some.json").write_text(content)
            with self.subTest(content):
                self.assertIn("some.json", self.refused(["--config", "some.json"], folder))

    def test_damaged_runs(self):
        for name, damage in (DAMAGE | BLOCKS).items():
            run = copy_of(tiny_run())
            damage(run)
            commands = {"resume"} if name in BLOCKS else {"resume", "evaluate", "watch"}
            for command in commands - ({"resume"} if name == "no checkpoint" else set()):  # it begins again
                with self.subTest(name, command=command):
                    printed = self.refused([command, run], run)
                    self.assertNotIn("weights_only", printed)
                    if name == "a Git LFS pointer":
                        self.assertIn("git lfs pull", printed)

    def test_settings_that_differ_from_the_checkpoint_are_named_and_some_may(self):
        run = copy_of(tiny_run())
        edit(run, lambda config: config["world"].update(lifetime=13) or config)
        for command in ("resume", "evaluate", "watch"):
            printed = " ".join(self.refused([command, run], run).split())
            self.assertIn("world.lifetime was 12 and is 13", printed)
            self.assertIn("What may differ: device, training.updates", printed)
        run = copy_of(tiny_run())
        edit(run, lambda config: config["training"].update(log_every=5, evaluation_lifetimes=8) or config)
        self.assertEqual(in_process(["resume", run], run)[0], 0)


class TestEnvironments(unittest.TestCase):
    """What other people's environments return and do."""

    def failure(self, **changes) -> str:
        """The message of the error that a lifetime in a changed `Room` ends in, by whatever way it is stepped."""
        messages = []
        with mock.patch.multiple(Room, **changes):
            wrapper = HiddenRulesWrapper(Room(), lifetime=30)
            worlds = environment.ExternalWorlds(environment.WorldSettings(gym_id="Room-v0", cell=4), 1, "train", 0)
            for reset, step, error in (
                (lambda: wrapper.reset(seed=0), wrapper.step, ValueError),
                (worlds.reset, lambda action: worlds.step(torch.tensor([action])), environment.ExternalEnvError),
            ):
                with self.assertRaises(error) as raised:
                    reset()
                    for action in range(30):
                        step(action % 5)
                messages.append(str(raised.exception))
        self.assertIn(messages[0].partition("returned")[2], messages[1])
        return messages[0]

    def test_what_it_returns_is_checked_against_what_it_promises(self):
        frame, step, reset = Room._render, Room.step, Room.reset
        for answer, message in (
            (lambda result: (result[0].astype(float), *result[1:]), r"\(12, 12, 3\) float64"),
            (lambda result: (result[0][:6], *result[1:]), r"\(6, 12, 3\) uint8"),
            (lambda result: (result[0].tolist(), *result[1:]), "an observation list"),
            (lambda result: (None, *result[1:]), "an observation NoneType"),
            (lambda result: (result[0], None, *result[2:]), "reward None"),
            (lambda result: (result[0], np.zeros(1), *result[2:]), r"reward array\("),
            (lambda result: (result[0], "1", *result[2:]), "reward '1'"),
            (lambda result: (result[0], 1e39, *result[2:]), r"reward 1e\+39.*float32"),
            (lambda result: (result[0], float("nan"), *result[2:]), "reward nan"),
            (lambda result: result[:4], "4 values.*five-tuple"),
            (lambda result: result[0], "ndarray.*five-tuple"),
        ):
            with self.subTest(message):
                changed = lambda room, action, answer=answer: answer(step(room, action))  # noqa: E731
                self.assertRegex(self.failure(step=changed), message)
        for answer, message in (
            (lambda result: result[0], "reset returned ndarray"),
            (lambda result: (result[0] / 255, {}), "float64"),
        ):
            changed = lambda room, answer=answer, **options: answer(reset(room, **options))  # noqa: E731
            self.assertRegex(self.failure(reset=changed), message)
        self.assertIs(Room._render, frame)

    def test_an_environment_that_cannot_be_made_is_one_sentence(self):
        def raising():
            raise RuntimeError("no display")

        gymnasium.register("Raising-v0", raising)
        gymnasium.register("Needy-v0", lambda size: Room())
        for gym_id, reason in (
            ("Raising-v0", "RuntimeError: no display"),
            ("Needy-v0", "TypeError"),
            ("nowhere.at.all:Room-v0", "ModuleNotFoundError"),
        ):
            code, printed = in_process(["--world.gym-id", gym_id], temporary_folder())
            self.assertEqual(code, 2)
            self.assertIn(reason, printed)
            self.assertEqual(len(printed.splitlines()), 1)

    def test_one_buffer_for_all_frames_changes_nothing(self):
        class Reused(Room):
            buffer = np.zeros((12, 12, 3), np.uint8)

            def _render(self):
                self.buffer[:] = super()._render()
                return self.buffer

        found = []
        for room in (Room(), Reused()):
            env = HiddenRulesWrapper(room, lifetime=40)
            seen = [env.reset(seed=3)[0]]
            for t in range(40):
                frame, *_, info = env.step(t % 5)
                seen += [frame, info.get("final_frame", frame)]
            found.append(np.stack(seen))
        np.testing.assert_array_equal(*found)
        frame = np.zeros((2, 2, 3), np.uint8)
        step = WorldStep.of(frame, 0.0, {"episode_terminated": False, "episode_truncated": False})
        kept = as_tensor(frame)
        frame += 1
        self.assertEqual((int(step.obs.sum()), int(kept.sum())), (0, 0))

    def test_the_wrapper_checks_as_the_built_in_environment_does(self):
        for env in (HiddenRulesWrapper(Room()), gymnasium.make("HiddenRules-v0", disable_env_checker=True).unwrapped):
            with self.assertRaisesRegex(gymnasium.error.ResetNeeded, r"call reset\(\) first"):
                env.step(0)
            env.reset(seed=0)
            for action in (-1, 9, 1.0, None):
                with self.assertRaisesRegex(ValueError, "must be an integer from 0 to"):
                    env.step(action)

    def test_what_is_built_in_refuses_settings_of_an_external_environment(self):
        settings = environment.WorldSettings(gym_id="Room-v0", cell=4)
        for env in (environment.PixelEnv(settings), environment.PixelVectorEnv(2, settings)):
            with self.assertRaisesRegex(ValueError, "'Room-v0', but this world is built in"):
                env.reset(seed=0)

    def test_an_environment_with_too_few_actions_to_shuffle_is_one_sentence(self):
        class Narrow(Room):
            action_space = gymnasium.spaces.Discrete(2)

        with self.assertRaisesRegex(ValueError, "has 2 actions, too few permutations.*--world.shuffle none"):
            HiddenRulesWrapper(Narrow())

    def test_inner_episodes_get_the_options_of_the_lifetime(self):
        seen, reset = [], Room.reset

        def watched(room, *, seed=None, options=None):
            seen.append(options)
            return reset(room, seed=seed, options=options)

        with mock.patch.object(Room, "reset", watched):
            env = HiddenRulesWrapper(Room(), lifetime=40)
            env.reset(seed=0, options={"size": 3})
            for t in range(40):
                env.step(t % 5)
        self.assertGreater(len(seen), 3)
        self.assertEqual({str(options) for options in seen}, {"{'size': 3}"})

    def test_a_module_in_the_working_directory_is_found(self):
        folder = temporary_folder()
        text = "import gymnasium\nfrom tests.shared import Room\ngymnasium.register('Local-v0', Room)\n"
        (folder / "local_rooms.py").write_text(text)
        (folder / "tiny.json").write_text(json.dumps(TINY | {"world": {"lifetime": 12, "cell": 4}}))
        code, printed = in_process(["--config", "tiny.json", "--world.gym-id", "local_rooms:Local-v0"], folder)
        self.assertEqual(code, 0, printed)


class TestEnds(unittest.TestCase):
    """How processes end, and what they print."""

    def test_sigterm_saves_as_ctrl_c_does(self):
        folder = tiny_folder()
        with stopped_at(10, interrupts=1, number=signal.SIGTERM):
            code, printed = in_process(["--config", "tiny.json"], folder)
        self.assertEqual(code, 143)
        self.assertIn("stopped at update 11 and saved", printed)
        self.assertEqual(RunFolder(only_run(folder)).load()[0]["counters"][0], 11)

    def test_weights_to_begin_with_are_read_again_after_a_crash_before_the_first_checkpoint(self):
        folder = temporary_folder()
        (folder / "tiny.json").write_text(json.dumps(TINY | {"init_from": str(tiny_run())}))
        with stopped_at(15, RuntimeError("as if killed")), self.assertRaisesRegex(RuntimeError, "as if killed"):
            in_process(["--config", "tiny.json"], folder)
        run = only_run(folder)
        (run / "checkpoint.pt").unlink()
        code, printed = in_process(["resume", run], folder)
        self.assertEqual(code, 0, printed)
        first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
        self.assertGreater(first["update"], TINY["training"]["perception_updates"] + TINY["training"]["effect_updates"])

    def test_a_training_in_a_thread_leaves_signals_alone(self):
        found, learner = [], Learner(build_system(tiny()))
        handler = signal.getsignal(signal.SIGINT)
        thread = threading.Thread(target=lambda: found.append(train(learner, until=2)))
        thread.start()
        thread.join()
        self.assertEqual((found, learner.update), ([0], 2))
        self.assertIs(signal.getsignal(signal.SIGINT), handler)

    def test_ctrl_c_in_the_final_evaluation_says_how_to_finish(self):
        folder = tiny_folder()
        with mock.patch.object(main, "evaluate", side_effect=KeyboardInterrupt):
            code, printed = in_process(["--config", "tiny.json", "--run", "my run"], folder)
        self.assertEqual(code, 130)
        self.assertIn("complete and saved: python3 main.py resume 'runs/my run' evaluates it", printed)
        code, printed = in_process(["resume", "runs/my run"], folder)
        self.assertEqual(code, 0, printed)

    def test_results_are_printed_before_they_are_kept(self):
        run, output = copy_of(tiny_run()), temporary_folder() / "result.json"
        with mock.patch.object(main, "write_json", side_effect=PermissionError(13, "Permission denied")):
            code, printed = in_process(["evaluate", run], run)
        self.assertEqual(code, 2)
        self.assertRegex(printed, r"lifetimes on the test split")
        self.assertRegex(" ".join(printed.split()), "not kept in .*Permission denied.*--output")
        code, printed = in_process(["evaluate", run, "--output", output], run)
        self.assertEqual((code, output.exists()), (0, True), printed)
        code, printed = in_process(["evaluate", run, "--output", output], run)
        self.assertEqual(code, 2)  # nothing is overwritten

    def test_a_run_of_another_device_is_loaded_where_asked(self):
        run = copy_of(tiny_run())
        edit(run, lambda config: config | {"device": "cuda:7"})
        for command in (
            ["watch", run, "--output", run / "x.gif"],
            ["evaluate", run, "--lifetimes", "4"],
            ["resume", run],
        ):
            code, printed = in_process(command, run)
            self.assertEqual(code, 2)
            self.assertIn("--device cpu", printed)
            code, printed = in_process([*command, "--device", "cpu"], run)
            self.assertEqual(code, 0, printed)
        self.assertEqual((run / "metrics.jsonl").read_bytes(), (tiny_run() / "metrics.jsonl").read_bytes())

    def test_output_to_a_file_is_not_silent(self):
        clock = iter(range(0, 10**6, 61))
        folder = tiny_folder()
        with mock.patch.object(main.time, "monotonic", lambda: next(clock)):
            code, printed = in_process(["--config", "tiny.json"], folder)
        self.assertEqual(code, 0, printed)
        lines = [line for line in printed.splitlines() if line.startswith("update ")]
        self.assertTrue(5 <= len(lines) <= 10, printed)
        self.assertRegex(lines[-1], r"update \d+ of 38: .*return=")

    def test_a_configuration_with_a_byte_order_mark_is_read(self):
        folder = temporary_folder()
        (folder / "tiny.json").write_text(json.dumps(TINY), encoding="utf-8-sig")
        with mock.patch.object(main, "train", return_value=signal.SIGINT):
            code, printed = in_process(["--config", "tiny.json"], folder)
        self.assertEqual(code, 130, printed)

    def test_runs_are_counted_once_and_what_is_no_run_is_passed(self):
        run, other = copy_of(tiny_run()), temporary_folder()
        with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.chdir(run):
            found = run_folders([Path("."), run, other, run / ".." / run.name])
        self.assertEqual(found, [run.resolve()])
        self.assertIn(f"{other} is not the folder of a run", errors.getvalue())
        with contextlib.redirect_stderr(io.StringIO()), self.assertRaisesRegex(UserError, "at least one run"):
            run_folders([other])

    def test_a_study_is_refused_under_torchrun_and_over_the_trials_of_another(self):
        arguments = tune_hyperparams.TuneArguments()
        elastic = mock.patch.object(tune_hyperparams.distributed, "is_torchelastic_launched", return_value=True)
        with elastic, self.assertRaisesRegex(UserError, "without torchrun"):
            tune_hyperparams.tune(arguments)
        line, elastic = [sys.executable, "-m", "tests.benchmarks.report"], os.environ | {"TORCHELASTIC_RUN_ID": "x"}
        done = subprocess.run(line, cwd=ROOT, env=elastic, capture_output=True, text=True)
        self.assertEqual((done.returncode, "without torchrun" in done.stderr), (2, True), done.stderr)
        folder = temporary_folder()
        (folder / "runs/tune-default/trial-0000").mkdir(parents=True)
        for _ in range(2):
            refused = self.assertRaisesRegex(UserError, "another --study")
            with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()), refused:
                tune_hyperparams.tune(arguments)

    def test_the_best_set_rebuilds_what_was_scored(self):
        """Flags beat the file, the file beats the preset; so they do when best.json is applied."""
        folder, scored = temporary_folder(), []
        (folder / "some.json").write_text(
            json.dumps({"preset": "default", "world": {"slip": 0.2}, "context": {"hidden": 8}})
        )

        def objective(trial, space, base, arguments, folder):
            scored.append(tune_hyperparams.suggest(trial, space, base))
            return 1.0

        arguments = tune_hyperparams.TuneArguments(preset="quick", config=Path("some.json"), trials=1)
        untrained = mock.patch.multiple(tune_hyperparams, objective=objective, save_figures=lambda *_: [])
        with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()), untrained:
            best = tune_hyperparams.tune(arguments).resolve()
        with mock.patch.object(main, "train", return_value=signal.SIGINT):
            code, printed = in_process(["--config", best], folder)
        self.assertEqual(code, 130, printed)
        applied = load_settings(folder)
        self.assertEqual((applied.preset, applied.world.slip, applied.world.grid), ("quick", 0.2, 4))
        self.assertEqual(tune_hyperparams.shorten_training(applied, None), scored[0])


def load_settings(folder: Path) -> Settings:
    """The settings of the only run in a working directory that is no study."""
    (run,) = (path for path in (folder / "runs").iterdir() if not path.name.startswith("tune-"))
    return RunFolder(run).settings(Settings())


if __name__ == "__main__":
    unittest.main()
