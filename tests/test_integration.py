"""The whole system through its real commands: one trained `quick` run, judged, broken on purpose, repeated."""

import contextlib
import dataclasses
import importlib.util
import os
import io
import json
import re
import shutil
import subprocess
import sys
import unittest
from pathlib import Path
from typing import get_args
from collections.abc import Callable
from unittest import mock

import gymnasium
import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from agent import Learner
from environment import HiddenRulesWorld, WORLDS
from main import EVALUATION_SEED, Settings, build_system, evaluate, load_system, log, train, with_preset
from memory import RunFolder, WorldStep, merge, write_json
from tests.benchmarks import ablations, belief, endurance, faults, processes, robustness, speed, switching, tinted, tuning
from tests.shared import ROOT, TINY, command, quick_run, temporary_folder, tiny

LIFETIMES = 256


class TestQuickRun(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.run_folder = quick_run()
        cls.result = json.loads((cls.run_folder / "evaluation.json").read_text())

    def score(self, **broken) -> float:
        """Normalised return on validation tasks of the trained agent with some of its methods replaced."""
        system, _ = load_system(self.run_folder)
        for name, replacement in broken.items():
            part, method = name.split("__")
            target = getattr(system, part)
            setattr(target, method, replacement(getattr(target, method)))
        return evaluate(system, "validation", LIFETIMES)["normalised"]

    def test_it_learns_to_infer_rules_and_no_broken_part_does(self):
        self.assertGreaterEqual(self.result["normalised_ci95"][0], 0.25)
        whole = self.score()
        self.assertGreater(whole, 0.25)
        dice = torch.Generator().manual_seed(0)

        def careless(plan):
            return lambda codes, belief, again=True, predict=None: torch.rand(len(codes), 4, generator=dice)

        def frozen(step):
            return lambda belief, experience: belief

        def confused(judge):  # goals look like hazards and hazards like goals
            def judged(present, context, row=None):
                reward, end = judge(present, context, row)
                return reward.flip(-1), end

            return judged

        for broken in ({"planner__action_values": careless}, {"engine__step": frozen}, {"transition__consequences": confused}):
            with self.subTest(broken=list(broken)):
                self.assertLess(self.score(**broken), min(0.1, whole / 2))

    def test_without_its_belief_it_earns_nothing(self):
        system, _ = load_system(self.run_folder)
        result = evaluate(system, "test", LIFETIMES, ablations.agent_without(system, "belief"))
        self.assertLessEqual(result["normalised"], 0.1)

    def test_the_belief_is_near_the_exact_filter(self):
        self.assertLess(self.result["belief_nll"]["late_excess"], 0.5)
        nll = self.result["belief_nll"]["agent"]
        self.assertLess(sum(nll[16:]) / len(nll[16:]), nll[0] - 1)

    def test_outcome_labels_are_pure(self):
        """On a world whose true effects are known, one label means one effect (standing still at an edge aside)."""
        system, _ = load_system(self.run_folder)
        world = HiddenRulesWorld(system.settings.world, 128, "validation", 5)
        agent = system.controller()
        agent.explore(1.0, torch.Generator().manual_seed(0))
        agent.reset(world.reset())
        effects = []
        for _ in range(world.settings.lifetime):
            before, action = world.position[:, 0].clone(), agent.act()
            step = world.step(action)
            agent.observe(action, step)
            moved = (world.next_position[:, 0] - before) @ torch.tensor([3, 1])  # -3, 3, -1, 1, or 0
            effects.append(torch.where(moved == 0, -1, world.rule.colours[:, 0] * 7 + moved + 3))
        effects, label = torch.stack(effects, 1), agent.memory.experience().posterior.float().argmax(-1)
        moving = effects >= 0
        table = torch.zeros(21, label.max() + 1).index_put_((effects[moving], label[moving]), torch.ones(()), accumulate=True)
        self.assertGreater(float(table.amax(0).sum() / table.sum()), 0.97)

    def test_the_evaluation_says_what_the_readme_lists(self):
        for name in ("preset", "seed", "split", "lifetimes", "env_steps", "normalised", "of_thompson", "belief_nll"):
            self.assertIn(name, self.result)
        for agent in ("agent", "random", "thompson", "known_rule"):
            self.assertEqual(len(self.result[agent]["by_step"]), WORLDS["quick"]["lifetime"])
            low, high = self.result[agent]["return_mean_ci95"]
            self.assertTrue(low <= self.result[agent]["return_mean"] <= high)
            total = sum(self.result[agent]["by_step"])
            self.assertAlmostEqual(total, self.result[agent]["return_mean"], places=4)
        order = [self.result[name]["return_mean"] for name in ("random", "agent", "known_rule")]
        self.assertEqual(order, sorted(order))
        self.assertEqual(self.result["split"], "test")

    def test_evaluate_repeats_the_same_numbers(self):
        done = command("evaluate", self.run_folder, folder=self.run_folder)
        self.assertEqual(done.returncode, 0, done.stderr)
        repeated = self.run_folder / f"evaluation-test-{self.result['lifetimes']}.json"
        self.assertEqual(repeated.read_bytes(), (self.run_folder / "evaluation.json").read_bytes())

    def test_pictures_are_made_and_watch_makes_another(self):
        done = command("watch", self.run_folder, "--seed", 3, folder=self.run_folder)
        self.assertEqual(done.returncode, 0, done.stderr)
        for name in ("adaptation.png", "lifetime.gif", "lifetime-3.gif"):
            self.assertGreater((self.run_folder / name).stat().st_size, 10_000)

    @unittest.skipUnless(importlib.util.find_spec("pygame"), "a window needs pygame: pip install -r tests/requirements.txt")
    def test_watch_opens_a_window_or_writes_what_it_is_told_to(self):
        with mock.patch.dict(os.environ, DISPLAY=":0", SDL_VIDEODRIVER="dummy"):
            done = command("watch", self.run_folder, "--seed", 8, "--fps", 100, folder=self.run_folder)
            self.assertEqual((done.returncode, "written" in done.stdout), (0, False), done.stderr)
            self.assertFalse((self.run_folder / "lifetime-8.gif").exists())
            for name, code, words in (("animate_lifetime.mp4", 0, "written"), ("animate_lifetime.mp4", 2, "exists"), ("animate_lifetime.avi", 2, ".mp4")):
                done = command("watch", self.run_folder, "--output", self.run_folder / name, folder=self.run_folder)
                self.assertEqual(done.returncode, code, done.stderr)
                self.assertIn(words, done.stdout + done.stderr)
        self.assertGreater((self.run_folder / "animate_lifetime.mp4").stat().st_size, 10_000)
        self.assertEqual((self.run_folder / "animate_lifetime.mp4").read_bytes()[4:8], b"ftyp")

    def test_robustness_of_a_run(self):
        with mock.patch.multiple(robustness, LIFETIMES=64, NOISES=(0.05, 0.4), SLIPS=(0.1,)):
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                robustness.main([self.run_folder])
        clear, noisy = (float(re.search(rf"\| 0.1 \| {noise} \| (\S+)", printed.getvalue())[1]) for noise in ("0.05", "0.4"))
        self.assertGreater(clear, noisy + 1)
        self.assertGreater((self.run_folder / "robustness.png").stat().st_size, 10_000)

    def test_ablations_of_a_run(self):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            ablations.main(ablations.Arguments(runs=(self.run_folder,), lifetimes=64))
        returns = {part: float(figure) for part, figure in re.findall(r"^\| ([a-z-]+) \| (-?[\d.]+) \[", printed.getvalue(), re.M)}
        self.assertEqual(set(returns), {"nothing", *get_args(ablations.Ablation)})
        for part in ("belief", "prior", "reward_and_termination", "value"):
            self.assertLess(returns[part], returns["nothing"] - 0.5, part)

    def test_recovery_of_a_run(self):
        """The quick run has never met a switch, but the benchmark can put it where there are some."""
        run = temporary_folder() / "run"
        shutil.copytree(self.run_folder, run, ignore=shutil.ignore_patterns("store", "tensorboard"))
        with self.assertRaisesRegex(SystemExit, "--preset switching"):
            switching.main([run])
        config = json.loads((run / "config.json").read_text())
        config["world"]["switch"] = 0.02
        (run / "config.json").write_text(json.dumps(config))
        with mock.patch.object(switching, "LIFETIMES", 64), contextlib.redirect_stdout(io.StringIO()) as printed:
            switching.main([run])
        returns = dict(re.findall(r"^\| ([A-Za-z, ]+) \| (-?[\d.]+) \[", printed.getvalue(), re.M))
        known, knows, none = (float(returns[name]) for name in ("known rule", "Thompson, knows the rate", "Thompson, expects no switch"))
        self.assertTrue(known > knows > none)
        self.assertGreater((run / "switching.png").stat().st_size, 10_000)

    def test_belief_of_a_run(self):
        with mock.patch.object(belief, "LIFETIMES", 128), contextlib.redirect_stdout(io.StringIO()) as printed:
            belief.main(self.run_folder)
        (last,) = re.findall(r"^\| 32 to 63 \|(.*)\|$", printed.getvalue(), re.M)
        agent, exact, calibration, moves, _, roles = map(float, last.split("|"))
        self.assertLess(exact, agent)
        self.assertLess(calibration, 0.1)
        self.assertGreater(min(moves, roles), 0.5)
        self.assertGreater((self.run_folder / "belief.png").stat().st_size, 10_000)

    def test_a_trained_agent_acts_in_a_loop_of_ones_own(self):
        settings = load_system(self.run_folder)[0].settings
        env = gymnasium.make("HiddenRules-quick-v0", settings=settings.world, split="test")
        returns, agent = [], load_system(self.run_folder)[0].controller()
        for seed in range(6):
            picture, info = env.reset(seed=seed)
            agent.reset(picture)
            earned, truncated = 0.0, False
            while not truncated:
                action = agent.act()
                picture, reward, _, truncated, info = env.step(int(action))
                agent.observe(action, WorldStep.of(picture, reward, info))
                earned += reward
            returns.append(earned)
        self.assertGreater(np.mean(returns), 0.25 * self.result["known_rule"]["return_mean"])

    def test_evaluation_worlds_are_their_own(self):
        largest = merge(Settings(), {"seed": 1_000_000}).seed
        self.assertGreater(EVALUATION_SEED, (largest + 1) * 2**32 + 2**32)  # beyond any collection of any run


class TestBenchmarks(unittest.TestCase):
    """The benchmarks that train, on worlds so small that nothing is learnt: what they do, not what they find."""

    def test_ablations_train_what_is_missing_and_print_a_row_for_each(self):
        arguments = ablations.Arguments(seeds=(0,), updates=24, lifetimes=16, output=temporary_folder() / "ablations")
        rows = {"nothing", *get_args(ablations.Ablation), *ablations.TRAINED, *ablations.PEERS}
        with mock.patch.object(ablations, "BASE", tiny()):
            for trains in (True, False):
                with contextlib.redirect_stdout(io.StringIO()) as printed:
                    ablations.main(arguments)
                self.assertEqual("training without" in printed.getvalue(), trains)
        self.assertEqual(set(re.findall(r"^\| ([^|]+?) \| -?[\d.]+ \[", printed.getvalue(), re.M)), rows)
        with self.assertRaisesRegex(SystemExit, "another --output"):
            ablations.main(dataclasses.replace(arguments, updates=25))

    def test_without_look_ahead_it_learns_values_of_actions(self):
        """Watkins' targets of one lifetime by hand: cut where another action was better, the last step from its own next_obs."""
        learner = Learner(build_system(tiny(planner={"discount": 0.9, "lambda_": 0.8}), planner=ablations.ModelFree))
        train(learner, until=20)
        system, experience = learner.system, learner.store.experience.rows(slice(3))
        with torch.no_grad():
            context = system.engine.context(system.engine.sequence(experience))
            loss = float(system.planner.loss(system.value, experience, context)["value"])
            squares, T = [], experience.action.shape[1]
            for row in range(3):
                action = experience.action[row].tolist()
                codes = [*experience.codes[row], experience.next_codes[row, -1]]  # what is seen before each step and at the end
                slow = [system.planner.action_values(codes[t][None], context[row, t][None])[0] for t in range(T + 1)]
                target = None
                for t in reversed(range(T)):
                    kept = t + 1 < T and action[t + 1] == int(slow[t + 1].argmax())
                    best = float(slow[t + 1].max())
                    boot = 0.8 * (target if kept else best) + 0.2 * best
                    target = float(experience.reward[row, t]) + 0.9 * boot
                    own = system.planner._values(system.value, codes[t][None], context[row, t][None])[0, action[t]]
                    squares.append((float(own) - target) ** 2)
        self.assertAlmostEqual(loss, float(np.mean(squares)), places=5)
        self.assertGreater(loss, 0)

    def test_code_accuracy_by_hand(self):
        colours = torch.tensor([[[0, 3, 3, 1], [3, 0, 3, 1]], [[0, 3, 3, 1], [3, 0, 3, 1]]])
        codes = torch.tensor([[[5, 2, 2, 4], [2, 5, 2, 4]], [[4, 2, 2, 4], [2, 4, 2, 4]]])  # in the second both look the same
        self.assertEqual(tinted.code_accuracy(codes[:1], colours[:1], 6), (1.0, 1.0))
        self.assertEqual(tinted.code_accuracy(codes, colours, 6), (0.75, 0.5))

    def printed_by(self, call: Callable, *arguments: object) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            call(*arguments)
        return printed.getvalue()

    def test_tuned_and_untuned_runs_are_compared_lifetime_by_lifetime(self):
        run = quick_run()
        printed = self.printed_by(tuning.main, tuning.Arguments(tuned=(run, run), baseline=(run, run)))
        self.assertRegex(printed, r"\| tuned \| .* \| 0.00 \[0.00, 0.00\] \|")
        study = json.loads((Path(tuning.__file__).parent / "study/trials.json").read_text())
        scores = [trial["score"] for trial in study["trials"] if trial["state"] == "COMPLETE"]
        base, found = (round(score, 3) for score in (study["trials"][study["baseline"]]["score"], max(scores)))
        self.assertTrue(f"{base} to {found}" in (ROOT / "README.md").read_text(), "the README tells of another study")

    def test_runs_of_one_process_beside_runs_of_several(self):
        run, figure = quick_run(), temporary_folder() / "processes.png"
        printed = self.printed_by(processes.main, processes.Arguments(alone=(run,), together=(run,), output=figure))
        self.assertRegex(printed, r"\| total \| \d+ \| \d+ \| 1.00 \|")
        self.assertGreater(figure.stat().st_size, 10_000)

    def test_speeds_are_ratios_and_a_part_half_as_fast_is_noticed(self):
        rows = [speed.Row(name, "", ratio_of_means, "") for name, ratio_of_means in json.loads(speed.RATIOS.read_text()).items()]
        for share, code in ((0.6, 0), (0.4, 1)):
            slower = [row._replace(ratio_of_means=row.ratio_of_means * share) for row in rows]
            with mock.patch.object(speed, "few_rows", lambda: slower):
                self.assertEqual(self.returned_by(speed.compared), code)
        left, right = torch.randn(3, 5), torch.randn(5, 7, requires_grad=True)
        self.assertEqual(speed.operations(lambda: left @ right), 2 * 3 * 5 * 7)
        self.assertEqual(speed.operations(lambda: (left @ right).sum().backward()), 2 * 2 * 3 * 5 * 7)  # and one for the gradient
        self.assertEqual(speed.operations(speed.bare(2 * 64 * 64 * 9, "cpu")), 2 * 64 * 64 * 9)

    @unittest.skipUnless(importlib.util.find_spec("psutil"), "needs tests/requirements.txt")
    def test_every_part_is_timed(self):
        output, system = temporary_folder(), load_system(quick_run())[0]
        few = {"batch": speed.GROWTH["batch"][:2]}
        learner = speed.prepared(tiny(), "cpu")
        with mock.patch.object(speed, "GROWTH", few):
            rows = speed.growth(tiny(), "cpu", output / "growth.png")
        rows += speed.world_rows("cpu", (3,)) + [speed.decision_row(system, 2, True, "cpu")]
        rows += speed.learning_rows(learner, "cpu") + speed.memory_rows(learner)
        self.assertEqual(len(rows), 5 + 1 + 1 + 4 + 2)
        for row in rows:
            self.assertTrue(np.isfinite(row.ratio_of_means) and (row.ratio_of_means > 0 or "growth" in row.what), row)
        self.assertGreater((output / "growth.png").stat().st_size, 5000)

    @staticmethod
    def returned_by(call: Callable) -> object:
        with contextlib.redirect_stdout(io.StringIO()):
            return call()

    @unittest.skipUnless(importlib.util.find_spec("psutil"), "needs tests/requirements.txt")
    def test_a_long_training_watches_itself_and_stops(self):
        class Brief(endurance.Watched):  # its time is over after as many looks, however fast the machine is
            def set_learning_rates(self, phase, update):
                super().set_learning_rates(phase, update)
                if len(self.rows) >= 8:
                    self.end = 0

        output = temporary_folder() / "endurance"
        with mock.patch.multiple(endurance, with_preset=lambda *_: tiny(), Watched=Brief):
            printed = self.printed_by(endurance.main, endurance.Arguments(output=output))
        self.assertRegex(printed, r"resident memory \d+ and \d+ MB")
        seen = json.loads((output / "endurance.json").read_text())
        self.assertEqual(seen["update"], list(range(20, 20 * len(seen["update"]) + 1, 20)))
        self.assertTrue((output / "checkpoint.pt").exists())

    @staticmethod
    def begun(settings: Settings) -> Path:
        """The folder of a run that has seen one update."""
        learner, run = Learner(build_system(settings)), temporary_folder()
        train(learner, until=learner.update + 1)
        write_json(dataclasses.asdict(settings), run / "config.json")
        write_json({"total": 1.0}, run / "timing.json")
        RunFolder(run).save(learner)
        with SummaryWriter(run / "tensorboard") as board, tqdm(disable=True) as bar:
            log(RunFolder(run), board, bar, learner)
        return run

    @unittest.skipUnless(importlib.util.find_spec("sb3_contrib"), "needs pip install -r tests/requirements.txt")
    def test_peers_of_a_run(self):
        from tests.benchmarks import peers

        run, train = self.begun(tiny()), peers.train_recurrent_ppo
        with mock.patch.multiple(peers, LIFETIMES=16, train_recurrent_ppo=lambda world, seed, **_: train(world, seed, frames=100)):
            with contextlib.redirect_stdout(io.StringIO()) as printed, mock.patch.object(peers, "draw", wraps=peers.draw) as drawn:
                peers.main(run)
        self.assertGreater((run / "peers.png").stat().st_size, 10_000)
        for name, points in drawn.call_args.args[1].items():  # seconds and returns of training
            self.assertTrue(len(points) and np.isfinite(points).all(), name)
            self.assertTrue((np.diff(points[:, 0]) > 0).all(), name)
        rows = re.findall(r"^\| (RecurrentPPO, [a-z ]+) \| \d+ \| ([\d,]+) \| -?[\d.]+ \[", printed.getvalue(), re.M)
        self.assertEqual([name for name, _ in rows], [f"RecurrentPPO, {b}" for b in ("as many frames", "as many seconds", "five times the seconds")])
        self.assertTrue(all(int(frames.replace(",", "")) >= 100 for _, frames in rows))

    @unittest.skipUnless(importlib.util.find_spec("minigrid"), "needs pip install -r tests/requirements.txt")
    def test_a_foreign_run_beside_shortest_paths(self):
        from tests.benchmarks import foreign

        settings = merge(with_preset(Settings(), "gym"), TINY)
        run = self.begun(merge(settings, {"world": {"gym_id": "MiniGrid-Empty-5x5-v0", "lifetime": 24, "cell": 8}}))
        with mock.patch.multiple(foreign, LIFETIMES=4, BIN=8), contextlib.redirect_stdout(io.StringIO()) as printed:
            foreign.main([run])
        returns = dict(re.findall(r"^\| ([a-z ,]+) \| (-?[\d.]+) \[?", printed.getvalue(), re.M))
        self.assertGreater(float(returns["known rule, shortest path"]), 3)  # five steps to the goal, and again
        self.assertLess(float(returns["random"]), 1)
        self.assertGreater((run / "foreign.png").stat().st_size, 10_000)

    def test_appearance_of_a_run(self):
        runs = [self.begun(tiny(world={"tint": 0.5}, context={"appearance": features})) for features in (4, 0)]
        with mock.patch.object(tinted, "LIFETIMES", 16), contextlib.redirect_stdout(io.StringIO()) as printed:
            tinted.main(runs)
        self.assertEqual(re.findall(r"^\| (with[a-z ]+) \|", printed.getvalue(), re.M), ["with appearance", "without it"])
        self.assertGreater((runs[0] / "tinted.png").stat().st_size, 10_000)


class TestFaults(unittest.TestCase):
    def test_a_training_that_is_killed_again_and_again_ends_in_the_same_bytes(self):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            self.assertTrue(faults.main(faults.Arguments(kills=3)), printed.getvalue())
        self.assertIn("3 kills of 3", printed.getvalue())


class TestReadme(unittest.TestCase):
    def test_every_command_names_what_exists(self):
        text = (ROOT / "README.md").read_text()
        blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S)
        scripts = re.findall(r"python3 (?:-m )?([\w./]+)", "\n".join(blocks))
        self.assertIn("main.py", scripts)
        self.assertIn("tune_hyperparams.py", scripts)
        for script in scripts:
            path = Path(script if script.endswith(".py") else script.replace(".", "/"))
            self.assertTrue(script in ("venv", "pytest", "unittest") or any((ROOT / p).exists() for p in (path, f"{path}.py")), script)

    def test_flags_in_the_readme_exist(self):
        helped = "".join(command(*words, "--help", folder=ROOT, script=script).stdout for script, words in (
            ("main.py", []), ("main.py", ["evaluate"]), ("main.py", ["resume"]), ("main.py", ["watch"]),
            ("tune_hyperparams.py", []),
        ))  # fmt: skip
        blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
        for flag in re.findall(r"(?<= )--[a-z][\w.-]*", "\n".join(re.findall(r" [\w/]+\.py.*", "\n".join(blocks)))):
            self.assertIn(flag, helped)
        launched = re.findall(r"^torchrun (.*?) main\.py", "\n".join(blocks), re.M)
        known = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--help"], capture_output=True, text=True).stdout
        for flag in re.findall(r"--[a-z][\w-]*", " ".join(launched)):
            self.assertIn(flag, known)

    def test_the_python_examples_run(self):
        worlds, loop = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
        exec(compile(worlds, "README.md", "exec"), {})
        run = temporary_folder()
        settings = merge(Settings(), {"transition": {"num_effects": 4}, "context": {"hidden": 8}})
        learner = Learner(build_system(settings))
        learner.collect(exploration=1.0)
        write_json(dataclasses.asdict(settings), run / "config.json")
        RunFolder(run).save(learner)
        names = {"RUN": run}
        exec(compile(loop, "README.md", "exec"), names)
        self.assertTrue(names["truncated"])
        self.assertEqual(len(names["agent"].memory), 64)

    def test_pictures_exist(self):
        for picture in re.findall(r"!\[.*?\]\((.*?)\)", (ROOT / "README.md").read_text()):
            self.assertTrue((ROOT / picture).exists(), picture)


if __name__ == "__main__":
    unittest.main()
