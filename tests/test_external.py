"""External environments: hidden rules, tasks of their own, advice, and many of them at once."""

import itertools
import unittest
from dataclasses import replace
from unittest import mock

import gymnasium
import numpy as np
import torch

import environment
from context_engine import RandomAgent, infer_reward_bins, rollout
from environment import SPLITS, HiddenRulesWrapper, WorldSettings
from tests.shared import Room, installed

ROOM = WorldSettings(gym_id="Room-v0", lifetime=25, cell=4, slip=0, noise=0)


class TestHiddenRulesWrapper(unittest.TestCase):
    def test_ranks_number_permutations_in_order_and_every_split_has_some(self):
        for n in (4, 5):
            ranks = [environment.permutation_rank(np.array(order)) for order in itertools.permutations(range(n))]
            self.assertEqual(ranks, list(range(len(ranks))))
            splits = [environment.permutation_split(rank) for rank in ranks]
            self.assertEqual(set(splits), set(SPLITS))
            self.assertGreaterEqual(splits.count("train"), len(ranks) / 2)

    def test_actions_are_shuffled_for_a_lifetime_of_many_episodes(self):
        env, maps = HiddenRulesWrapper(Room(), lifetime=40), set()
        env.reset(seed=0)
        for _ in range(8):
            maps.add(tuple(env.action_map))
            self.assertEqual(environment.permutation_split(env.task), "train")
            ends = 0
            for t in range(40):
                before = env.unwrapped.place.copy()
                _, reward, terminated, truncated, info = env.step(t % 5)
                expected = np.clip(before + Room.MOVES[env.action_map[t % 5]], 0, 2)
                ended = info["episode_terminated"] or info["episode_truncated"]
                if ended:  # the final frame is from before the restart
                    self.assertEqual(info["final_frame"][tuple(4 * expected)][0], 250)
                else:
                    self.assertEqual(env.unwrapped.place.tolist(), expected.tolist())
                self.assertEqual(reward, 0.5 * info["episode_terminated"])
                self.assertEqual((terminated, truncated), (False, t == 39))
                ends += ended
            self.assertGreaterEqual(ends, 3)
            env.reset()
        self.assertGreater(len(maps), 5)

    def test_actions_can_be_left_unshuffled_and_splits_have_different_rules(self):
        env, ranks = HiddenRulesWrapper(Room(), shuffle=("0", "1", "2", "3")), {}
        for split in SPLITS:
            env.split = split
            env.reset(seed=0)
            ranks[split] = set()
            for _ in range(60):
                env.reset()
                self.assertEqual(env.action_map[4], 4)
                self.assertEqual(sorted(env.action_map), [0, 1, 2, 3, 4])
                ranks[split].add(env.task)
        self.assertEqual(sum(map(len, ranks.values())), len(set().union(*ranks.values())))

    def test_the_rule_shares_no_random_numbers_with_the_wrapped_environment(self):
        class Ordered(Room):  # draws from its own generator exactly what the wrapper draws for a rule
            def reset(self, *, seed=None, options=None):
                result = super().reset(seed=seed)
                if seed is not None:
                    self.order = np.random.default_rng(seed).permutation(5)
                return result

        env = HiddenRulesWrapper(Ordered())
        same = 0
        for seed in range(120):
            env.reset(seed=seed)
            same += env.action_map.tolist() == env.unwrapped.order.tolist()
        self.assertLess(same, 8)  # 1 in 120 is chance; a shared random stream gives 60% and more

    def test_slips_and_noise(self):
        env = HiddenRulesWrapper(Room(), slip=0.5, noise=0.1, lifetime=400)
        frame, _ = env.reset(seed=0)
        self.assertGreater(len(np.unique(frame)), 10)
        still, stayed = int(np.argmax(env.action_map == 4)), 0
        for _ in range(400):
            before, age = env.unwrapped.place.copy(), env.unwrapped.episode_step
            env.step(still)
            stayed += env.unwrapped.episode_step == age + 1 and bool((env.unwrapped.place == before).all())
        self.assertTrue(200 < stayed < 360)  # half did not slip; of the others a fifth or more stayed by chance

    def test_other_environments_are_refused(self):
        class Continuous(Room):
            action_space = gymnasium.spaces.Box(-1, 1, (2,))

        class Symbolic(Room):
            observation_space = gymnasium.spaces.Discrete(9)

        for env, options, message in (
            (Continuous(), {}, "must be Discrete"),
            (Symbolic(), {}, "must be uint8"),
            (Room(), {"shuffle": ("0", "1")}, "4 to 20"),
            (Room(), {"shuffle": ("0", "1", "2", "9")}, "from 0 to 4"),
            (Room(), {"lifetime": 1}, "lifetime is 1"),
            (Room(), {"split": "best"}, "split is 'best'"),
            (Room(), {"slip": 2}, "slip is 2"),
        ):
            with self.subTest(message), self.assertRaisesRegex(ValueError, message):
                HiddenRulesWrapper(env, **options)
        env = HiddenRulesWrapper(Room(reward=float("nan")))
        env.reset(seed=0)
        with self.assertRaisesRegex(ValueError, "reward nan"):
            for action in np.random.default_rng(0).integers(0, 5, 300):
                env.step(action)


class TaskRoom(Room):
    """The room with tasks of its own: the place of the reward, hidden."""

    metadata = {"render_modes": [], "lifetime": 20}

    def __init__(self, tasks=range(9)):
        super().__init__()
        self.tasks = tasks

    def set_task(self, task):
        self.task = task

    def step(self, action):
        frame, *_ = super().step(action)
        return frame, float(self.place @ (3, 1) == self.task), False, self.episode_step >= 5, {}

    def expert_action(self):
        return 3


gymnasium.register("TaskRoom-v0", entry_point=TaskRoom)


class TestTasks(unittest.TestCase):
    def test_a_task_is_drawn_for_every_lifetime_from_disjoint_splits(self):
        drawn, numbers = {}, {}
        for split in SPLITS:
            env = HiddenRulesWrapper(TaskRoom(), lifetime=12, split=split)
            env.reset(seed=1)
            drawn[split], numbers[split] = set(), set()
            for _ in range(80):
                env.reset()
                self.assertEqual(env.action_map.tolist(), [0, 1, 2, 3, 4])  # tasks of its own: nothing is shuffled
                task = env.unwrapped.task
                drawn[split].add(task)
                numbers[split].add(env.task)
                ends = 0
                for action in np.random.default_rng(0).integers(0, 5, 12):
                    ends += env.step(action)[4]["episode_truncated"]
                self.assertEqual((env.unwrapped.task, ends), (task, 2))  # the same in all episodes
        self.assertEqual([len(drawn[split]) for split in SPLITS], [7, 1, 1])
        for sets in (drawn, numbers):
            self.assertEqual(sum(map(len, sets.values())), len(set().union(*sets.values())))

    def test_published_splits_are_kept_and_actions_shuffled_where_asked(self):
        tasks = {"train": [0, 1], "validation": [2], "test": [3]}
        env = HiddenRulesWrapper(TaskRoom(tasks), split="test", shuffle=("all",))
        maps = set()
        for seed in range(9):
            env.reset(seed=seed)
            maps.add(tuple(env.action_map))
            self.assertEqual(env.unwrapped.task, 3)
            self.assertEqual(env.advice("known_rule"), int(np.argmax(env.action_map == 3)))
        self.assertGreater(len(maps), 3)

    def test_tasks_and_advice_that_cannot_be_used_are_refused(self):
        for tasks, message in (
            ([0, 1], "has 2 tasks: at least 3"),
            ({"train": [0, 1], "test": [2]}, "none for validation"),
            ({"train": [0, 1], "validation": [2], "test": []}, "none for test"),
            ([0, 1, 2, 1], "task 1 occurs twice"),
        ):
            with self.subTest(message), self.assertRaisesRegex(ValueError, message):
                HiddenRulesWrapper(TaskRoom(tasks))
        for answer, message in ((5, "returned 5"), (None, "returned None"), (RuntimeError("lost"), "lost")):
            with mock.patch.object(TaskRoom, "expert_action", mock.Mock(side_effect=[answer])):
                worlds = environment.ExternalWorlds(replace(ROOM, gym_id="TaskRoom-v0"), 1, "train", 0)
                worlds.reset()
                with self.subTest(message), self.assertRaisesRegex(environment.ExternalEnvError, message):
                    worlds.advice("known_rule")
            with mock.patch.object(TaskRoom, "expert_action", mock.Mock(side_effect=[answer])):
                environment.external_sizes.cache_clear()
                with self.subTest(message), self.assertRaisesRegex(ValueError, f"TaskRoom-v0 failed.*{message}"):
                    environment.external_sizes("TaskRoom-v0", 4)


class TestExternalWorlds(unittest.TestCase):
    def test_a_seed_fixes_everything_and_next_observations_come_before_restarts(self):
        runs = []
        for seed in (0, 0, 1):
            worlds = environment.ExternalWorlds(ROOM, 6, "train", seed)
            frames = [worlds.reset()]
            self.assertEqual((frames[0].shape, frames[0].dtype), ((6, 12, 12, 3), torch.uint8))
            for t in range(25):
                step = worlds.step(torch.full((6,), t % 5))
                self.assertEqual(step.reward.tolist(), (0.5 * step.terminated).tolist())
                self.assertTrue(torch.equal(step.next_obs[~step.ended], step.obs[~step.ended]))
                reached = step.next_obs[step.terminated][:, 8:, 8:, 0]
                self.assertTrue((reached == 250).all())  # the body is in the corner
                self.assertTrue((step.obs[step.ended][:, 8:, 8:, 0] == 0).all())  # after the restart it is not
                frames.append(step.obs)
            self.assertIn("by action", worlds.describe_rule(0))
            runs.append((torch.stack(frames), worlds.task))
        vector = worlds.vector
        del worlds
        self.assertTrue(vector.closed)
        self.assertTrue(all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True)))
        self.assertFalse(torch.equal(runs[0][1], runs[2][1]))

    def test_unshuffled_actions_stay_and_an_environment_that_fails_is_named(self):
        worlds = environment.make_worlds(replace(ROOM, shuffle=("0", "1", "2", "3")), 2, "test", 5)
        rollout(worlds, RandomAgent(0, 5))
        self.assertEqual("4", worlds.describe_rule(1).split()[-1])
        worlds.reset()
        with self.assertRaisesRegex(environment.ExternalEnvError, "Room-v0 failed"):
            worlds.step(torch.full((2,), 99))

    def test_reward_bins_are_found_from_random_lifetimes(self):
        def bins(reward):
            with mock.patch.object(Room, "step", lambda env, action: (env._render(), reward(), False, False, {})):
                return infer_reward_bins(ROOM)

        self.assertEqual(infer_reward_bins(ROOM), (0.0, 0.5, 1.0))  # a trained agent may get more than was observed
        self.assertEqual(bins(lambda: -0.01), (-0.01, 0.0, 1.0))
        found = torch.tensor(bins(lambda: 2.3456784))
        self.assertEqual(found.tolist(), torch.tensor([0, 2.3456784]).tolist())  # no reward lies beyond the bins
        self.assertEqual(bins(lambda: 0.0), (-1.0, 0.0, 1.0))
        found = bins(lambda: float(np.random.uniform(-3, 0.4)))
        self.assertEqual(len(found), 9)
        self.assertTrue(-3 <= found[0] < -2.8 and found[4] == 0 and found[-1] == 1.0)

    @installed("minigrid")
    def test_minigrid_is_fully_visible(self):
        settings = replace(ROOM, gym_id="MiniGrid-Empty-Random-6x6-v0", cell=8)
        self.assertEqual((settings.sizes.obs_shape, settings.sizes.actions), ((48, 48, 3), 7))
        frames = environment.ExternalWorlds(settings, 2, "test", 0).reset()
        tiles = frames.view(2, 6, 8, 6, 8, 3).transpose(2, 3).reshape(2, 36, -1)
        self.assertEqual([len(tile.unique(dim=0)) for tile in tiles], [4, 4])  # wall, floor, goal, agent


if __name__ == "__main__":
    unittest.main()
