"""Other people's worlds: the wrapper, the batched face, training on them, and what is refused."""

import importlib.util
import itertools
import json
import unittest
import warnings
from dataclasses import replace
from unittest import mock

import gymnasium
import numpy as np
import torch
from gymnasium.utils.env_checker import check_env

import main
from agent import Learner, RandomAgent, rollout, infer_reward_bins
from environment import ExternalWorlds, HiddenRulesWrapper, ExternalEnvError, WorldSettings, make_worlds, permutation_rank, permutation_split
from main import Settings, build_system, evaluate, train, with_preset
from memory import UserError, merge
from tests.benchmarks import references, report
from tests.benchmarks.peers import PreviousStep
from tests.shared import TINY, Room, in_process, only_run, temporary_folder

gymnasium.register("OtherRoom-v0", entry_point=Room)  # another of the same kind
ROOM = WorldSettings(gym_id="Room-v0", lifetime=25, cell=4, slip=0, noise=0)


def merge_json(one: dict, other: dict) -> dict:
    return {key: {**one.get(key, {}), **other.get(key, {})} for key in {*one, *other}}


class TestPermutations(unittest.TestCase):
    def test_ranks_number_them_in_order_and_every_split_has_its_own(self):
        for n in (4, 5):
            ranks = [permutation_rank(np.array(order)) for order in itertools.permutations(range(n))]
            self.assertEqual(ranks, list(range(len(ranks))))
            splits = [permutation_split(rank) for rank in ranks]
            self.assertEqual(set(splits), {"train", "validation", "test"})
            self.assertGreaterEqual(splits.count("train"), len(ranks) / 2)


class TestWrapper(unittest.TestCase):
    def test_check_env_accepts_it(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message=".*different from the unwrapped version")
            check_env(HiddenRulesWrapper(gymnasium.make("Room-v0"), lifetime=20), skip_render_check=True)

    def test_actions_are_shuffled_for_a_lifetime_of_many_episodes(self):
        env, maps = HiddenRulesWrapper(Room(), lifetime=40), set()
        env.reset(seed=0)
        for _ in range(8):
            maps.add(tuple(env.action_map))
            self.assertEqual(permutation_split(env.task), "train")
            ends = 0
            for step in range(40):
                before = env.unwrapped.place.copy()
                picture, reward, terminated, truncated, info = env.step(step % 5)
                expected = np.clip(before + Room.MOVES[env.action_map[step % 5]], 0, 2)
                ended = info["episode_terminated"] or info["episode_truncated"]
                if not ended:
                    self.assertEqual(env.unwrapped.place.tolist(), expected.tolist())
                else:
                    self.assertEqual(info["final_frame"][tuple(4 * expected)][0], 250)  # where it arrived, before the restart
                self.assertEqual(reward, 0.5 * info["episode_terminated"])
                self.assertEqual((terminated, truncated), (False, step == 39))
                ends += ended
            self.assertGreaterEqual(ends, 3)
            env.reset()
        self.assertGreater(len(maps), 5)

    def test_some_actions_can_be_left_alone_and_held_out_rules_are_others(self):
        env, ranks = HiddenRulesWrapper(Room(), shuffled=(0, 1, 2, 3)), {}
        for split in ("train", "validation", "test"):
            env.split = split
            env.reset(seed=0)
            ranks[split] = set()
            for _ in range(60):
                env.reset()
                self.assertEqual(env.action_map[4], 4)
                self.assertEqual(sorted(env.action_map), [0, 1, 2, 3, 4])
                ranks[split].add(env.task)
        self.assertEqual(sum(map(len, ranks.values())), len(set().union(*ranks.values())))

    def test_the_rule_shares_no_luck_with_the_world_inside(self):
        class Ordered(Room):  # begins as its own generator says, by the very draw that the rule is made with
            def reset(self, *, seed=None, options=None):
                seen = super().reset(seed=seed)
                if seed is not None:
                    self.order = np.random.default_rng(seed).permutation(5)
                return seen

        env = HiddenRulesWrapper(Ordered())
        same = 0
        for seed in range(120):
            env.reset(seed=seed)
            same += env.action_map.tolist() == env.unwrapped.order.tolist()
        self.assertLess(same, 8)  # 1 in 120 is chance; sharing a stream gives 60% and more

    def test_slips_and_noise(self):
        env = HiddenRulesWrapper(Room(), slip=0.5, noise=0.1, lifetime=400)
        first, _ = env.reset(seed=0)
        self.assertGreater(len(np.unique(first)), 10)
        still, stayed = int(np.argmax(env.action_map == 4)), 0
        for _ in range(400):
            before, age = env.unwrapped.place.copy(), env.unwrapped.episode_step
            env.step(still)
            stayed += env.unwrapped.episode_step == age + 1 and bool((env.unwrapped.place == before).all())
        self.assertTrue(200 < stayed < 360)  # .5 did as available_metrics, and of the others a fifth or more stayed by chance

    def test_worlds_of_another_kind_are_refused(self):
        class Continuous(Room):
            action_space = gymnasium.spaces.Box(-1, 1, (2,))

        class Symbolic(Room):
            observation_space = gymnasium.spaces.Discrete(9)

        for env, options, word in (
            (Continuous(), {}, "must be Discrete"), (Symbolic(), {}, "must be pictures"), (Room(), {"shuffled": (0, 1)}, "must be 4 to 20"),
            (Room(), {"shuffled": (0, 1, 2, 9)}, "Discrete\\(5\\)"), (Room(), {"lifetime": 1}, "lifetime is 1"),
            (Room(), {"split": "best"}, "split is 'best'"), (Room(), {"slip": 2}, "slip is 2"),
        ):  # fmt: skip
            with self.subTest(word), self.assertRaisesRegex(ValueError, word):
                HiddenRulesWrapper(env, **options)
        env = HiddenRulesWrapper(Room(reward=float("nan")))
        env.reset(seed=0)
        with self.assertRaisesRegex(ValueError, "reward nan"):
            for action in np.random.default_rng(0).integers(0, 5, 300):
                env.step(action)

    def test_recurrent_agents_can_be_shown_its_previous_step(self):
        env = PreviousStep(HiddenRulesWrapper(Room()))
        self.assertEqual(env.reset(seed=0)[0]["previous"].shape, (7,))
        self.assertEqual(env.step(2)[0]["previous"][:5].tolist(), [0, 0, 1, 0, 0])


class TestGymWorlds(unittest.TestCase):
    def test_one_seed_gives_one_luck_and_arrivals_come_before_restarts(self):
        lived = []
        for seed in (0, 0, 1):
            worlds = ExternalWorlds(ROOM, 6, "train", seed)
            frames, seen = worlds.reset(), []
            self.assertEqual((frames.shape, frames.dtype), ((6, 12, 12, 3), torch.uint8))
            for step in range(25):
                happened = worlds.step(torch.full((6,), step % 5))
                ended = happened.ended
                self.assertEqual(happened.reward.tolist(), (0.5 * happened.terminated).tolist())
                self.assertTrue(torch.equal(happened.next_obs[~ended], happened.obs[~ended]))
                reached = happened.next_obs[happened.terminated][:, 8:, 8:, 0]
                self.assertTrue((reached == 250).all())  # the body stands in the corner
                self.assertTrue((happened.obs[ended][:, 8:, 8:, 0] == 0).all())  # and no longer
                seen.append(happened.obs)
            self.assertIn("actions stand for", worlds.describe_rule(0))
            lived.append((frames, torch.stack(seen), worlds.task))
        vector = worlds.vector
        del worlds
        self.assertTrue(vector.closed)
        self.assertTrue(all(torch.equal(a, b) for a, b in zip(lived[0], lived[1])))
        self.assertFalse(torch.equal(lived[0][2], lived[2][2]))

    def test_actions_that_are_not_shuffled_stay(self):
        worlds = make_worlds(replace(ROOM, shuffled=(0, 1, 2, 3)), 2, "test", 5)
        rollout(worlds, RandomAgent(0, 5))
        self.assertIn("4", worlds.describe_rule(1).split()[-1])

    def test_a_world_that_fails_is_named(self):
        worlds = make_worlds(ROOM, 2, "test", 5)
        worlds.reset()
        with self.assertRaisesRegex(ExternalEnvError, "Room-v0 failed"):
            worlds.step(torch.full((2,), 99))

    def test_reward_bins_are_found_in_the_data(self):
        self.assertEqual(infer_reward_bins(ROOM), (0.0, 0.5, 1.0))  # whoever learns may earn more than was seen
        with mock.patch.object(Room, "step", lambda self, action: (self._sample(), -0.01, False, False, {})):
            self.assertEqual(infer_reward_bins(ROOM), (-0.01, 0.0, 1.0))
        with mock.patch.object(Room, "step", lambda self, action: (self._sample(), 2.3456784, False, False, {})):
            self.assertEqual(torch.tensor(infer_reward_bins(ROOM)).tolist(), torch.tensor([0, 2.3456784]).tolist())  # nothing lies beyond
        with mock.patch.object(Room, "step", lambda self, action: (self._sample(), 0.0, False, False, {})):
            self.assertEqual(infer_reward_bins(ROOM), (-1.0, 0.0, 1.0))
        with mock.patch.object(Room, "step", lambda self, action: (self._sample(), float(np.random.uniform(-3, 0.4)), False, False, {})):
            bins = infer_reward_bins(ROOM)
        self.assertEqual(len(bins), 9)
        self.assertTrue(-3 <= bins[0] < -2.8 and bins[4] == 0 and bins[-1] == 1.0)


class TestTraining(unittest.TestCase):
    def test_a_foreign_world_is_trained_on_evaluated_and_repeated(self):
        folder = temporary_folder()
        (folder / "tiny.json").write_text(json.dumps(TINY | {"world": {"lifetime": 12, "cell": 4}}))
        code, errors = in_process(["--config", "tiny.json", "--world.gym-id", "Room-v0", "--world.shuffled", *"0123"], folder)
        self.assertEqual(code, 0, errors)
        run = only_run(folder)
        config = json.loads((run / "config.json").read_text())
        self.assertEqual((config["preset"], config["transition"]["reward_bins"]), ("gym", [0.0, 0.5, 1.0]))
        result = json.loads((run / "evaluation.json").read_text())
        self.assertNotIn("thompson", result)
        self.assertNotIn("normalised", result)
        self.assertEqual(set(result["returns"]), {"agent", "random"})
        code, errors = in_process(["evaluate", str(run)], folder)
        self.assertEqual(code, 0, errors)
        again = run / f"evaluation-test-{result['lifetimes']}.json"
        self.assertEqual(again.read_bytes(), (run / "evaluation.json").read_bytes())
        code, errors = in_process(["evaluate", str(run), "--split", "permutations"], folder)
        self.assertEqual(code, 2)
        self.assertIn("permutations", errors)
        code, errors = in_process(["watch", str(run)], folder)
        self.assertEqual(code, 0, errors)
        report.main((run,), folder / "joined")
        with self.assertRaisesRegex(UserError, "no exact solution"):
            references.main(references.Arguments(run=run))

    def test_the_preset_is_found_and_bins_belong_to_their_world(self):
        for arguments, content, bins in (
            (["--world.gym_id", "Room-v0"], {}, [0.0, 0.5, 1.0]),
            ([], {"world": {"gym_id": "Room-v0"}}, [0.0, 0.5, 1.0]),
            ([], {"world": {"gym_id": "Room-v0"}, "transition": {"reward_bins": [0, 0.5]}}, [0.0, 0.5]),
            (["--world.gym-id", "Room-v0"], {"world": {"gym_id": "OtherRoom-v0"}, "transition": {"reward_bins": [0, 9]}}, [0.0, 0.5, 1.0]),
            (["--world.gym-id", "Room-v0", "--transition.reward-bins", "-1", "0", "1"], {}, [-1.0, 0.0, 1.0]),
        ):  # fmt: skip
            folder = temporary_folder()
            (folder / "some.json").write_text(json.dumps(merge_json({"world": {"cell": 4}}, content)))
            with self.subTest(arguments, **content), mock.patch.object(main, "train_and_evaluate"):
                code, errors = in_process(["--config", "some.json", *arguments], folder)
                self.assertEqual(code, 0, errors)
                config = json.loads((only_run(folder) / "config.json").read_text())
                self.assertEqual((config["preset"], config["transition"]["reward_bins"]), ("gym", bins))
        code, errors = in_process(["--preset", "gym"], temporary_folder())
        self.assertEqual(code, 2)
        self.assertIn("--world.gym-id", errors)

    def test_training_draws_only_training_rules(self):
        settings = merge(merge(with_preset(Settings(), "gym"), TINY), {"world": {"gym_id": "Room-v0", "cell": 4}})
        learner = Learner(build_system(settings))
        train(learner)
        self.assertTrue(all(permutation_split(int(rank)) == "train" for block in learner.store.blocks for rank in block.task))
        self.assertEqual(learner.system.engine.actions, 5)
        with self.assertWarnsRegex(UserWarning, "beyond transition.reward_bins, -1 to 0.25"):
            learner.settings = merge(settings, {"transition": {"reward_bins": (-1, 0, 0.25)}})
            for _ in range(4):
                learner.collect(exploration=1.0)
        learner.settings = settings
        held = evaluate(learner.system, "test", 4)
        self.assertTrue(np.isfinite(held["return_mean"]))

    def test_a_world_that_fails_leaves_a_run_that_goes_on_as_if_it_had_not(self):
        class Worn(Room):
            steps, fails = 0, ()

            def step(self, action):
                Worn.steps += 1  # of all worlds together
                if Worn.steps in Worn.fails:
                    raise RuntimeError("the roof came down")
                return super().step(action)

        gymnasium.register("Worn-v0", entry_point=Worn)
        ended = []
        for fails in ((), (192 + 500, 192 + 800)):  # 192 steps are for the reward bins; after the first checkpoint, and again
            folder, (Worn.steps, Worn.fails) = temporary_folder(), (0, fails)
            (folder / "tiny.json").write_text(json.dumps(TINY | {"world": {"lifetime": 12, "cell": 4}}))
            code, errors = in_process(["--config", "tiny.json", "--world.gym-id", "Worn-v0"], folder)
            for _ in fails:
                self.assertEqual(code, 2)
                self.assertIn("Worn-v0 failed: RuntimeError: the roof came down", errors)
                code, errors = in_process(["resume", str(only_run(folder))], folder)
            self.assertEqual(code, 0, errors)
            ended.append([(only_run(folder) / name).read_bytes() for name in ("metrics.jsonl", "evaluation.json")])
        self.assertEqual(ended[0], ended[1])

    def test_what_cannot_be_lived_in_is_refused_before_anything_is_written(self):
        folder = temporary_folder()
        for arguments, word in (
            (["--world.gym-id", "Nowhere-v0"], "Nowhere-v0"), (["--world.gym-id", "CartPole-v1"], "must be pictures"),
            (["--world.gym-id", "Room-v0", "--world.cell", "5"], "does not divide"),
            (["--world.gym-id", "Room-v0", "--world.cell", "4", "--world.shuffled", "0", "1"], "4 to 20"),
            (["--world.shuffled", "0", "1", "2", "3"], "give world.gym_id"),
        ):  # fmt: skip
            code, errors = in_process(arguments, folder)
            self.assertEqual(code, 2, errors)
            self.assertIn(word, " ".join(errors.split()))
        self.assertFalse((folder / "runs").exists())

    @unittest.skipUnless(importlib.util.find_spec("minigrid"), "MiniGrid is not installed: pip install -r tests/requirements.txt")
    def test_minigrid_is_seen_whole(self):
        settings = replace(ROOM, gym_id="MiniGrid-Empty-Random-6x6-v0", cell=8)
        self.assertEqual((settings.sizes.obs_shape, settings.sizes.actions), ((48, 48, 3), 7))
        worlds = ExternalWorlds(settings, 2, "test", 0)
        frames = worlds.reset()
        tiles = frames.view(2, 6, 8, 6, 8, 3).transpose(2, 3).reshape(2, 36, -1)
        self.assertEqual([len(tile.unique(dim=0)) for tile in tiles], [4, 4])  # wall, floor, goal, agent


if __name__ == "__main__":
    unittest.main()
