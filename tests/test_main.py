"""The command line and the run: settings, errors, resume after a kill, what was trained on."""

import ast
import copy
import dataclasses
import json
import subprocess
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import main
from agent import Learner, Planner
from context_engine import ContextInferenceEngine
from environment import WORLDS, task_split
from main import PRESETS, Settings, build_system, evaluate, train, with_preset
from memory import RunFolder, UserError, merge
from tests.benchmarks import references, report
from tests.shared import ROOT, TINY, command, in_process, only_run, temporary_folder, tiny, tiny_folder


class TestSettings(unittest.TestCase):
    def test_merge_checks_every_name_and_type(self):
        for changes, words in (
            ({"wrld": {}}, "unknown setting wrld.*world"),
            ({"world": {"gird": 5}}, "unknown setting world.gird.*grid"),
            ({"world": {"grid": "five"}}, "world.grid is 'five'.*int"),
            ({"world": {"grid": 5.5}}, "world.grid is 5.5.*int"),
            ({"world": {"grid": True}}, "world.grid is True"),
            ({"world": 3}, "world. is 3.*object"),
            ([1], "object of settings"),
            ({"training": {"value_batch": 99}}, "training.value_batch is 99.*between 1 and 48"),
            ({"training": {"random_lifetimes": 100}}, "multiple of training.envs: choose 128"),
            ({"memory": {"budget_mb": 1}}, "raise memory.budget_mb"),
            ({"planner": {"discount": float("nan")}}, "planner.discount is nan"),
            ({"transition": {"reward_bins": [None]}}, "transition.reward_bins is .None.*tuple"),
        ):
            with self.subTest(changes=changes), self.assertRaisesRegex(ValueError, words):
                merge(Settings(), changes)

    def test_integers_serve_as_floats_and_lists_as_tuples(self):
        merge_equal = merge(Settings(), {"world": {"noise": 0}, "transition": {"reward_bins": [-1, 0, 1, 2]}})
        self.assertEqual((merge_equal.world.noise, merge_equal.transition.reward_bins), (0.0, (-1.0, 0.0, 1.0, 2.0)))

    def test_presets_are_valid_and_complete_in_the_command_line(self):
        for name in PRESETS:
            self.assertIsInstance(with_preset(Settings(), name), Settings)


    def test_every_setting_refuses_values_of_another_type_and_out_of_its_range(self):
        wrong = {
            bool: ["yes", 1], int: ["a lot", -(10**12), 10**20, None, 1.5], float: ["a lot", -1e12, 1e20, None, float("nan")],
            str: [5, "soft"], tuple: ["1", [None]],
        }  # fmt: skip
        cases = 0
        for section, values in dataclasses.asdict(Settings()).items():
            for name, value in values.items() if isinstance(values, dict) else ():
                for bad in [{"x": 1}, *wrong[type(value)]]:
                    with self.subTest(setting=f"{section}.{name}", value=bad):
                        with self.assertRaisesRegex(ValueError, rf"{section}\.{name}"):
                            merge(Settings(), {section: {name: bad}})
                        cases += 1
        self.assertGreater(cases, 400)


class TestCode(unittest.TestCase):
    def test_every_public_name_has_a_docstring(self):
        def undocumented(node, path):
            for child in node.body:
                if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and not child.name.startswith("_"):
                    if not ast.get_docstring(child):
                        yield f"{path}{child.name}"
                    if isinstance(child, ast.ClassDef):
                        yield from undocumented(child, f"{path}{child.name}.")

        for file in sorted(ROOT.glob("*.py")):
            self.assertEqual(list(undocumented(ast.parse(file.read_text()), f"{file.name}: ")), [])

    def test_the_top_level_holds_what_the_design_card_lists(self):
        card = {"agent.py", "context_engine.py", "environment.py", "film_layer.py", "main.py", "memory.py", "transition_model.py"}
        card |= {"world_model.py", "tune_hyperparams.py", "tests", "requirements.txt", "README.md"}
        tracked = subprocess.run(["git", "ls-tree", "--name-only", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        if tracked.returncode:
            self.skipTest("not a git checkout")
        self.assertEqual({name for name in tracked.stdout.split() if not name.startswith(".")}, card)


class TestCommandLine(unittest.TestCase):
    def test_bad_input_stops_at_once_with_code_2_and_writes_nothing(self):
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
            (["--config", "slow.json"], "preset is 'slow'"),
            (["--config", "list.json"], "preset is ['quick']"),
            (["--world.edges", "wrap", "--transition.kernel", "31"], "at most 13"),
            (["--vae.patch", "5"], "does not divide"),
            (["--device", "abacus"], "abacus"),
            (["--config", "bad.json"], "bad.json"),
            (["--config", "missing.json"], "missing.json"),
            (["evaluate", "empty"], "not a run"),
            (["evaluate", "nowhere"], "not a run"),
            (["resume", "empty"], "not a run"),
            (["watch", "empty", "--seed", "-1"], "seed is -1"),
            (["evaluate", "empty", "--split", "exam"], "exam"),
        ):
            with self.subTest(arguments=arguments):
                code, errors = in_process(arguments, folder)
                self.assertEqual(code, 2, errors)
                self.assertIn(words, errors.replace("\n", " "))
        done = command("--world.grid", "2", folder=folder)
        self.assertEqual(done.returncode, 2)
        self.assertNotIn("Traceback", done.stderr)
        self.assertFalse((folder / "runs").exists())

    def test_more_lifetimes_than_the_exact_filter_has_room_for_are_refused_before_they_are_lived(self):
        system = build_system(merge(tiny(), {"world": {"walls": 2, "edges": "hidden", "wind": 0.4}}))
        with mock.patch("main.rollout", side_effect=AssertionError), self.assertRaisesRegex(ValueError, "at most [0-9,]+ "):
            evaluate(system, "test", 10**6)

    def test_help_explains_every_setting(self):
        done = command("--help", folder=temporary_folder())
        self.assertEqual(done.returncode, 0)
        for name in ("--seed", "--world.grid", "--training.updates", "--planner.discount", "--config"):
            self.assertIn(name, done.stdout)

    def test_reward_bins_follow_what_things_are_worth(self):
        for arguments, bins in (
            (["--world.reward_values", "1", ".5", "-1"], [-1, 0, 0.5, 1]), (["--preset", "everything", "--world.reward_values", "2", "-1"], [-1, 0, 2]),
        ):  # fmt: skip
            folder = temporary_folder()
            with mock.patch.object(main, "train_and_evaluate"):
                code, errors = in_process(arguments, folder)
            self.assertEqual(code, 0, errors)
            self.assertEqual(json.loads((only_run(folder) / "config.json").read_text())["transition"]["reward_bins"], bins)

    def test_flags_beat_the_file_and_the_file_beats_the_preset(self):
        folder = tiny_folder()
        content = TINY | {"preset": "quick", "world": TINY["world"] | {"slip": 0.2}}
        (folder / "both.json").write_text(json.dumps(content))
        done = command("--config", "both.json", "--world.lifetime", "10", folder=folder)
        self.assertEqual(done.returncode, 0, done.stderr)
        config = json.loads((only_run(folder) / "config.json").read_text())
        self.assertEqual(config["preset"], "quick")
        self.assertEqual(config["world"]["noise"], WORLDS["quick"]["noise"])  # from the preset
        self.assertEqual((config["world"]["slip"], config["world"]["grid"]), (0.2, 4))  # from the file
        self.assertEqual(config["world"]["lifetime"], 10)  # from the flag


class TestInitFrom(unittest.TestCase):
    def test_another_run_gives_what_it_has_learnt_or_is_refused(self):
        folder = tiny_folder()
        self.assertEqual(in_process(["--config", "tiny.json"], folder)[0], 0)
        first = only_run(folder)
        weights = RunFolder(first).load()[0]["modules"]
        with mock.patch.object(main, "train_and_evaluate", lambda run, learner: kept.append(learner)):
            kept = []
            code, errors = in_process(["--config", "tiny.json", "--seed", "1", "--init-from", str(first)], folder)
        self.assertEqual(code, 0, errors)
        (learner,) = kept
        for name, module in learner.system.modules().items():
            for key, tensor in module.state_dict().items():
                self.assertTrue(torch.equal(tensor, weights[name][key]), f"{name}.{key}")
        self.assertEqual(len(learner.store), 16)
        frames, visual_context = learner.store.blocks[0].frames[:, 0], torch.zeros(8, 32)
        before = learner.system.vae.encode(frames, visual_context)
        train(learner, until=learner.update + 1)  # adapts at once: what is seen keeps its name
        self.assertTrue(torch.equal(learner.system.vae.encode(frames, visual_context), before))
        self.assertIn("context/filter", learner.metrics)
        self.assertIn("begun from", report.described(learner.settings))
        runs = sorted((folder / "runs").iterdir())
        for wrong, word in ((["--context.hidden", "9"], "other sizes"), (["--init-from", "nowhere"], "nowhere")):
            code, errors = in_process(["--config", "tiny.json", "--init-from", str(first), *wrong], folder)
            self.assertEqual(code, 2)
            self.assertIn(word, errors)
        self.assertEqual(sorted((folder / "runs").iterdir()), runs)


class TestLearner(unittest.TestCase):
    def test_only_training_tasks_are_ever_stored(self):
        for holdout in ("combinations", "permutations"):
            learner = Learner(build_system(tiny(world={"holdout": holdout})))
            train(learner)
            stored = torch.cat([block.task for block in learner.store.blocks])
            self.assertTrue(torch.isin(stored, task_split(learner.settings.world, "train")).all())

    def test_gradients_do_not_cross(self):
        learner = Learner(build_system(tiny()))
        train(learner, until=20)
        modules = {"vae": learner.system.vae, "num_effects": learner.system.transition.effects, "value": learner.system.value}
        before = {name: [p.detach().clone() for p in module.parameters()] for name, module in modules.items()}
        rows = learner.store.sample(8, learner.sampler)
        learner.learn_context(learner.store.experience.rows(rows))
        for name, module in modules.items():
            self.assertTrue(all(torch.equal(p, old) for p, old in zip(module.parameters(), before[name])), name)

    def test_an_inferred_appearance_learns_with_the_pictures_and_is_kept_in_checkpoints(self):
        settings = tiny(world={"tint": 0.8}, context={"appearance": 4})
        learner = Learner(build_system(settings))
        weights = [p.detach().clone() for p in learner.system.appearance.parameters()]
        train(learner, until=12)
        self.assertTrue(all(not torch.equal(p, old) for p, old in zip(learner.system.appearance.parameters(), weights)))
        folder = temporary_folder()
        learner.store.save_blocks(folder)
        again = Learner(build_system(settings))
        again.load_state_dict(copy.deepcopy(learner.state_dict()), folder)
        for one in (learner, again):
            train(one)
        for name, module in learner.system.modules().items():
            for key, tensor in module.state_dict().items():
                self.assertTrue(torch.equal(tensor, again.system.modules()[name].state_dict()[key]), f"{name}.{key}")
        self.assertTrue(np.isfinite(evaluate(learner.system, "test", 8)["return_mean"]))

    def test_an_engine_of_ones_own_takes_the_place_of_ours(self):
        class Forgetful(ContextInferenceEngine):
            def context(self, belief):
                return super().context(belief) * 0

        learner = Learner(build_system(tiny(), engine=Forgetful))
        train(learner)
        system = learner.system
        rows = system.transition.log_prior(system.engine.context(system.engine.initial_belief(1))[:, :-1])[0]
        self.assertTrue(torch.equal(rows[0], rows[1]))  # without a context all actions are alike

    def test_a_planner_of_ones_own_takes_the_place_of_ours(self):
        class Still(Planner):
            def action_values(self, codes, context, depth=2, predict=None):
                return torch.zeros(len(codes), context.shape[1] - 1)

            def loss(self, value, experience, context):
                return {"none": sum(p.sum() for p in value.parameters()) * 0}

        learner = Learner(build_system(tiny(), planner=Still))
        train(learner)
        self.assertIsInstance(learner.system.planner, Still)
        self.assertIn("value/none", learner.metrics)

    def test_codes_are_renewed_under_the_version_that_made_them(self):
        learner = Learner(build_system(tiny()))
        train(learner)
        self.assertGreater(min(learner.store.version), 0)
        index = learner.store.oldest()
        learner.reencode(index)
        self.assertEqual(learner.store.version[index], learner.update)


class TestReport(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tiny_folder()
        for seed in ("0", "1"):
            code, errors = in_process(["--config", "tiny.json", "--seed", seed], cls.folder)
            assert code == 0, errors
        cls.runs = sorted(map(str, (cls.folder / "runs").iterdir()))

    def test_runs_that_differ_in_the_seed_alone_are_joined(self):
        code, errors = self.report(*self.runs, output="joined")
        self.assertEqual(code, 0, errors)
        ((name, joined),) = json.loads((self.folder / "joined/report.json").read_text()).items()
        self.assertTrue(name.startswith("default, world.grid 4, "))
        self.assertEqual(joined["seeds"], [0, 1])
        singles = [json.loads((Path(run) / "evaluation.json").read_text()) for run in self.runs]
        self.assertAlmostEqual(joined["return_mean"], sum(one["return_mean"] for one in singles) / 2)
        text = (self.folder / "joined/report.md").read_text()
        for words in ("| all 2 |", "| known rule | 1 |", "over seeds the mean return is"):
            self.assertIn(words, text)
        for picture in ("adaptation-0.png", "episodes-0.png"):
            self.assertGreater((self.folder / "joined" / picture).stat().st_size, 5_000)

    def test_an_existing_folder_and_an_unfinished_run_are_refused(self):
        (self.folder / "mine").mkdir(exist_ok=True)
        self.assertEqual(self.report(*self.runs, output="mine")[0], 2)
        unfinished = self.folder / "unfinished"
        unfinished.mkdir(exist_ok=True)
        (unfinished / "config.json").write_text((Path(self.runs[0]) / "config.json").read_text())
        for content in (None, "{", '{"preset": "default"}'):  # none, damaged, of an earlier version
            if content is not None:
                (unfinished / "evaluation.json").write_text(content)
                (unfinished / "timing.json").write_text('{"total": 1}')
            code, errors = self.report(str(unfinished), output="none")
            self.assertEqual(code, 2)
            self.assertIn("main.py resume", errors)
        self.assertFalse((self.folder / "none").exists())

    def report(self, *runs, output):
        """Exit code and message of the benchmark of that name."""
        try:
            report.main(tuple(self.folder / run for run in runs), self.folder / output)
        except (UserError, ValueError) as error:
            return 2, str(error)
        return 0, ""

    def test_references_are_computed_once_and_reported(self):
        ask = references.Arguments(run=self.folder / self.runs[0], lifetimes=4, rollouts=2)
        references.main(ask)
        (kept,) = (self.folder / "runs/references").iterdir()
        content = json.loads(kept.read_text())
        self.assertEqual((content["lifetimes"], content["rollouts"], content["world"]["grid"]), (4, 2, 4))
        names = {"random", "thompson", "known_rule", "bayes_adaptive"}
        self.assertEqual(set(content["agents"]), names)
        with mock.patch.object(references, "references", side_effect=AssertionError("computed again")):
            references.main(ask)
        self.assertEqual(self.report(self.runs[1], output="with")[0], 0)
        self.assertIn("(4 lifetimes, 2 rollouts an action)", (self.folder / "with/report.md").read_text())


if __name__ == "__main__":
    unittest.main()
