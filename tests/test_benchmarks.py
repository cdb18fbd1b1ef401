"""What the benchmarks of effects and of external environments compute, and the classics."""

import contextlib
import io
import re
import unittest

import gymnasium
import numpy as np
import torch

from environment import SPLITS
from main import load_system
from tests.benchmarks import classics, effects
from tests.shared import installed, tiny_run


CLASSICS = (
    classics.HiddenGoal,
    classics.Darkroom,
    classics.DarkroomPermuted,
    classics.DarkKeyToDoor,
    classics.FrozenLakeMeta,
)


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
        expected |= {"DarkroomPermuted": (9, 50, 200, 120, 12), "DarkKeyToDoor": (9, 50, 400, 6480, 324)}
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
        env.set_task(0)  # key in cell 0, door in cell 1
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
                grids, _ = system.transition.effects.predict(experience.codes[row, steps])
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
