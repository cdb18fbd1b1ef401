"""What the benchmarks of effects and of external environments compute, and the classics."""

import contextlib
import io
import re
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import gymnasium
import numpy as np
import torch

from environment import SPLITS, HiddenRulesWorld, WorldSettings
from main import PRESETS, load_system
from memory import UserError
from tests.benchmarks import classics, effects, results, rl2
from tests.shared import installed, make_generator, temporary_folder, tiny_run


CLASSICS = (
    classics.HiddenGoal,
    classics.Darkroom,
    classics.DarkroomPermuted,
    classics.DarkKeyToDoor,
    classics.FrozenLakeMeta,
)


class TestResults(unittest.TestCase):
    def test_the_readmes_hold_what_the_records_say_and_no_other_figures(self):
        records, places = results.read_records(), set()
        for page in results.PAGES:
            text = page.read_text()
            self.assertEqual(results.written(text, records), text, f"{page}: python3 -m tests.benchmarks.results")
            places |= {name for _, name, _ in results.PLACE.findall(text)}
        self.assertNotRegex(results.PLACE.sub("", text), r"\d\.\d\d", "a figure without a record")
        every = results.measurements()
        self.assertLessEqual(set(records), set(every))
        self.assertLessEqual(places - {"readme", "worlds", "external", "gpu"}, {*every, "default"})
        self.assertLessEqual({name for name, one in every.items() if one.command[0] == "-m"}, places)

    def test_a_record_is_of_another_version_when_code_changes_and_not_when_prose_does(self):
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(results, "ROOT", Path(folder)):
            file, seen = Path(folder) / "agent.py", set()
            for text in ('"""A."""\nx = 1\n', '"""B."""\nx = 1  # why\n', '"""B."""\nx = 2\n'):
                file.write_text(text + f"if x > 3:\n    raise ValueError({len(seen)})\n")
                seen.add(results.version.__wrapped__(("main.py",)))
            self.assertEqual(len(seen), 2)
            file.write_text('"""B."""\nx = 2\nif x > 3:\n    raise ValueError\nPRESETS: dict = {"gym": {}}\n')
            seen.add(results.version.__wrapped__(("main.py",)))
            self.assertEqual(len(seen), 2, "another preset's settings count nothing")
            with mock.patch.dict(PRESETS, {"default": {"planner": {"width": 3}}}):
                self.assertNotIn(results.version.__wrapped__(("main.py",)), seen)
            self.assertNotIn(results.version.__wrapped__(("main.py", "--seed", "1")), seen)

    def test_only_the_benchmark_of_tuning_is_of_another_version_when_the_search_changes(self):
        seen: dict[str, set[str]] = {"tuning": set(), "belief": set()}
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(results, "ROOT", Path(folder)):
            (Path(folder) / "tests" / "benchmarks").mkdir(parents=True)
            for name in seen:
                (Path(folder) / f"tests/benchmarks/{name}.py").touch()
            for text in ("trials = 20", "trials = 30"):
                (Path(folder) / "tune_hyperparams.py").write_text(text)
                for name, versions in seen.items():
                    versions.add(results.version.__wrapped__(("-m", f"tests.benchmarks.{name}")))
        self.assertEqual({name: len(versions) for name, versions in seen.items()}, {"tuning": 2, "belief": 1})

    def test_what_measures_another_agent_is_of_another_version_when_the_world_changes_only(self):
        command, seen = results.measurements()["rl2-quick-plain"].command, set()
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(results, "ROOT", Path(folder)):
            (Path(folder) / "tests" / "benchmarks").mkdir(parents=True)
            (Path(folder) / "tests/benchmarks/rl2.py").write_text("world()")
            world = "x: int = 1\ndef world():\n    return rule()\ndef rule():\n    return x\n"
            for unused, agent in ("12", "11", "22"):
                (Path(folder) / "environment.py").write_text(f"{world}y = {unused}\n")
                (Path(folder) / "agent.py").write_text(f"x = {agent}")
                seen.add(results.version.__wrapped__(command))
            self.assertEqual(len(seen), 1)
            with mock.patch.dict(PRESETS, {"quick": {"planner": {"width": 3}}}):
                self.assertIn(results.version.__wrapped__(command), seen)
            (Path(folder) / "environment.py").write_text(world.replace("1", "2"))
            self.assertNotIn(results.version.__wrapped__(command), seen)

    def test_what_is_missing_is_made_and_kept(self):
        tiny, folder = tiny_run(), temporary_folder()
        made = {"default-0": results.Measurement(("-c", "print('| a | 1 |')"), 1)}
        made["default-1"] = results.Measurement(("-c", "raise SystemExit('no room')"), 1)
        made["default-2"] = results.Measurement(("-c", "print('no table')"), 1)
        with mock.patch.object(results, "measurements", lambda: made), mock.patch.object(results, "RECORDS", folder):
            results.make_record("default-0", 1)
            record = results.read_records()["default-0"]
            self.assertEqual(record["output"], ["| a | 1 |"])
            with self.assertRaisesRegex(UserError, "default-1 failed.*no room"):
                results.make_record("default-1", 1)
            with self.assertRaisesRegex(UserError, "default-2 failed: it printed no table"):
                results.make_record("default-2", 1)
        runs = [results.training_figures(tiny) | {"commit": "a", "date": "b", "processor": "c", "threads": 1}] * 2
        text = results.tables({"default-0": runs[0], "default-1": runs[1]})
        self.assertIn(f"**{runs[0]['return_mean']:.2f} ± 0.00**", text["readme"])
        self.assertIn("| all 2 |", text["default"])
        (folder / ".github").mkdir()
        with mock.patch.object(results, "ROOT", folder):
            results.keep_pictures(tiny)
        for picture in results.PICTURES:
            self.assertEqual((folder / ".github" / picture).read_bytes(), (tiny / picture).read_bytes())
            self.assertIn(f".github/{picture}", results.PAGES[0].read_text())


class TestRL2(unittest.TestCase):
    def test_it_learns_from_whole_lifetimes_and_whole_passes_equal_steps(self):
        world = HiddenRulesWorld(WorldSettings(grid=4, lifetime=8), 16, "train", 0)
        for symbols in (False, True):
            torch.manual_seed(0)
            net = rl2.RL2(rl2.observe(world, world.reset(), None, symbols).shape[1], 4, 3)
            lived = rl2.roll_out(net, world, symbols, True, make_generator())
            log_prob, value, memory, _ = net(lived.seen, lived.previous, torch.zeros(1, 16, net.hidden))
            chosen = log_prob.gather(-1, lived.action[..., None])[..., 0]
            torch.testing.assert_close((chosen, value), (lived.log_prob, lived.value), atol=1e-5, rtol=1e-5)
            optimizer = torch.optim.Adam(net.parameters(), 1e-2)
            before = float(net.rule_loss(memory, lived.rule).detach())
            for _ in range(8):
                rl2.learn(net, optimizer, lived, 0.01, 1.0, make_generator())
            after = net(lived.seen, lived.previous, torch.zeros(1, 16, net.hidden))[2]
            self.assertLess(float(net.rule_loss(after, lived.rule).detach()), 0.9 * before)

    def test_advantages_reach_to_the_end_of_the_lifetime(self):
        reward, value = torch.tensor([[0.0], [0.0], [1.0]]), torch.zeros(3, 1)
        lived = rl2.Lifetimes(*[torch.zeros(3, 1)] * 4, value, reward, torch.zeros(1, 7))
        advantage, returns = rl2.advantages(lived, gamma=0.5, lambda_=1.0)
        torch.testing.assert_close(advantage[:, 0], torch.tensor([0.25, 0.5, 1.0]))
        torch.testing.assert_close(returns, advantage)


class TestClassics(unittest.TestCase):
    def test_the_published_sizes(self):
        sizes = {}
        for family in CLASSICS:
            env = family()
            parts = [len(env.tasks[split]) for split in SPLITS]
            sizes[family.__name__] = (env.size, env.episode, env.metadata["lifetime"], sum(parts), parts[-1])
        lakes = sizes.pop("FrozenLakeMeta")
        self.assertEqual(lakes[:3], (5, 25, 200))
        expected = {"HiddenGoal": (5, 15, 60, 21, 4), "Darkroom": (9, 20, 200, 81, 16)}
        expected |= {"DarkroomPermuted": (9, 50, 200, 120, 12), "DarkKeyToDoor": (9, 50, 400, 6561, 328)}
        self.assertEqual(sizes, expected)

    def test_who_knows_the_task_takes_the_shortest_path_to_the_goal(self):
        for family, start in ((classics.HiddenGoal, 0), (classics.Darkroom, 40)):
            env = family()
            for task in env.tasks["test"]:
                env.set_task(task)
                env.reset(seed=0)
                goal = int(env.reward[task, 0].argmax())
                distance = sum(abs(a - b) for a, b in zip(divmod(goal, env.size), divmod(start, env.size), strict=True))
                rewards = [env.step(env.expert_action())[1] for _ in range(env.episode)]
                self.assertEqual(rewards.count(1.0), env.episode - max(0, distance - 1))

    def test_a_search_visits_new_cells_until_it_finds_the_goal_and_stays(self):
        for family, most in ((classics.HiddenGoal, 40), (classics.DarkKeyToDoor, 300)):
            env = family()
            for task in env.tasks["test"][:3]:
                env.set_task(task)
                env.reset(seed=0)
                rewards = []
                for _ in range(env.metadata["lifetime"]):
                    _, reward, _, truncated, _ = env.step(env.search_action())
                    rewards.append(reward)
                    if truncated:
                        env.reset()
                self.assertIn(1.0, rewards[:most])
                last = rewards[-env.episode :]
                env.reset()
                best = sum(env.step(env.expert_action())[1] for _ in range(env.episode))
                self.assertAlmostEqual(sum(last), best)

    def test_both_swaps_of_a_lake_are_for_one_split_and_falling_costs_only_a_new_start(self):
        env = classics.FrozenLakeMeta()
        for tasks in env.tasks.values():
            self.assertEqual({task ^ 1 for task in tasks}, set(tasks))
        reward, ends = np.zeros((2, 1, 25)), np.zeros((2, 1, 25), bool)
        env.reward, env.ends, env.slip = reward, ends, 0.0
        reward[0, 0, 5], ends[0, 0, [5, 23]] = 1, True  # the goal below the start, a hole beside the far corner
        with mock.patch.dict(classics.PLANS, clear=True):
            self.assertEqual(int(env.plan(0)[0, 24]), 2)  # into the hole: seven steps less

    def test_agents_meet_the_same_slips(self):
        env, seen = classics.FrozenLakeMeta(), []
        for samples in (False, True):
            env.set_task(0)
            env.reset(seed=5)
            cells = []
            for _ in range(10):
                if samples:
                    env.thompson_action()
                env.step(4 if len(cells) % 2 else 1)
                cells.append(env.cell)
            seen.append(cells)
        self.assertEqual(*seen)

    def test_posterior_sampling_finds_out_the_task_and_never_excludes_it(self):
        for family in CLASSICS:
            env, earned = family(), np.zeros(2)
            for task in env.tasks["test"][:2]:
                env.set_task(task)
                env.reset(seed=0)
                for step in range(env.metadata["lifetime"]):
                    _, reward, terminated, truncated, _ = env.step(env.thompson_action())
                    earned[int(2 * step >= env.metadata["lifetime"])] += reward
                    self.assertTrue(np.isfinite(env.log_posterior[task]))
                    if terminated or truncated:
                        env.reset()
            with self.subTest(family.__name__):
                self.assertGreater(earned[1], earned[0])

    def test_the_key_comes_before_the_door_and_frames_do_not_show_it(self):
        env = classics.DarkKeyToDoor()
        env.set_task(1)  # key in cell 0, door in cell 1
        env.reset(seed=0)
        env.cell = 2
        rewards = [env.step(action)[1] for action in (2, 2, 3, 2, 3)]  # by the door to the key, back, and once more
        self.assertEqual(rewards, [0, 1, 1, 0, 0])
        self.assertEqual(len(np.unique(env.draw().reshape(-1, 3), axis=0)), 2)  # the body and the ground


class TestEffects(unittest.TestCase):
    def test_agreement(self):
        true = torch.tensor([0, 0, 0, 1, 1, 1])
        for found, expected in (
            ([0, 0, 0, 2, 2, 2], (1, 1, 2)),
            ([0, 0, 1, 2, 2, 2], (1, 5 / 6, 3)),  # one effect found twice
            ([2, 2, 2, 2, 2, 2], (0.5, 1, 1)),  # two effects taken for one
        ):
            found = torch.tensor(found)
            same = torch.nn.functional.one_hot(found, 3).bool()
            purity, completeness, used = effects.agreement(true, found, same)
            self.assertAlmostEqual(purity, expected[0], places=6)
            self.assertAlmostEqual(completeness, expected[1], places=6)
            self.assertEqual(used, expected[2])
        same[2, 0] = True  # where the lifetime does not tell effects apart, either is right
        self.assertEqual(effects.agreement(true, torch.tensor([0, 0, 1, 2, 2, 2]), same), (1, 1, 2))

    def test_the_arguments_of_agreement_equal_loops(self):
        system, _ = load_system(tiny_run())
        experience, true = effects.random_lifetimes(system, 5)
        torch.nn.init.normal_(system.transition.effects.head.weight)
        found, first, wrong = effects.found_effects(system, experience)
        expected = []
        for row in range(5):
            for action in sorted(set(experience.action[row].tolist())):
                steps = (experience.action[row] == action).nonzero()[:, 0]
                (own,) = found[row, steps].unique().tolist()
                grids, *_ = system.transition.effects.predict(experience.codes[row, steps])
                expected.append((own, (grids == grids[:, own, None]).all(-1).all(0).tolist()))
                came = (grids[:, own] == experience.next_codes[row, steps]).all(-1)
                self.assertEqual(wrong[row, steps].tolist(), (~came).tolist())
        _, own, same = effects.by_action(experience, true, found, first)
        self.assertEqual(list(zip(own.tolist(), same.tolist(), strict=True)), expected)

    def test_both_tables(self):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            effects.main((tiny_run(),), lifetimes=8)
        (row,), counts = (
            re.findall(r"\| (\d.*) \|\n\n", printed.getvalue())[:1],
            re.findall(r"of (\d+)", printed.getvalue()),
        )
        self.assertEqual(len(row.split("|")), 5)
        self.assertEqual(sum(map(int, counts)), 8 * 12)  # every step is of one kind


@installed("minigrid")
class TestShortestPath(unittest.TestCase):
    def test_it_reaches_the_goal_by_key_and_door_and_past_lava(self):
        from tests.benchmarks.external import first_action

        for name, longest in (("Empty-Random-5x5", 8), ("DoorKey-5x5", 20), ("LavaGapS5", 9)):
            env = gymnasium.make(f"MiniGrid-{name}-v0")
            for seed in range(8):
                env.reset(seed=seed)
                for _ in range(longest):
                    _, reward, terminated, _, _ = env.step(first_action(env.unwrapped))
                    if terminated:
                        break
                self.assertGreater(reward, 0, name)


if __name__ == "__main__":
    unittest.main()
