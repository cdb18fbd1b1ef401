"""The Gymnasium faces of the world: environment, vector environment, wrappers, videos."""

import importlib.util
import unittest
import warnings

import gymnasium
import numpy as np
import torch
from gymnasium.utils.env_checker import check_env

import environment
from environment import HiddenRulesWorld, MOVES, PALETTE, PixelEnv, PixelVectorEnv, WorldSettings, seed_from
from tests.benchmarks.peers import PreviousStep
from tests.shared import temporary_folder


class TestFaces(unittest.TestCase):
    def test_check_env_is_silent_on_every_registered_world(self):
        for preset in environment.WORLDS:
            name = "HiddenRules-v0" if preset == "default" else f"HiddenRules-{preset}-v0"
            with self.subTest(name), warnings.catch_warnings():
                warnings.simplefilter("error")
                check_env(gymnasium.make(name, render_mode="rgb_array").unwrapped)
            self.assertEqual(gymnasium.make_vec(name, num_envs=3).reset(seed=0)[0].shape[0], 3)

    @unittest.skipUnless(importlib.util.find_spec("moviepy"), "RecordVideo needs moviepy: pip install -r tests/requirements.txt")
    def test_common_wrappers_work(self):
        folder = temporary_folder() / "videos"
        env = gymnasium.make("HiddenRules-quick-v0", render_mode="rgb_array")
        env = gymnasium.wrappers.RecordEpisodeStatistics(gymnasium.wrappers.FrameStackObservation(env, 3))
        env = gymnasium.wrappers.RecordVideo(env, str(folder), episode_trigger=lambda episode: True, disable_logger=True)
        seen, _ = env.reset(seed=0)
        self.assertEqual(seen.shape, (3, 48, 48, 3))
        truncated, earned = False, 0.0
        while not truncated:
            _, reward, _, truncated, info = env.step(env.action_space.sample())
            earned += reward
        self.assertAlmostEqual(float(info["episode"]["r"]), earned)
        env.close()
        self.assertGreater(next(folder.glob("*.mp4")).stat().st_size, 1000)

    def test_the_rule_is_revealed_to_those_who_ask(self):
        env = PixelEnv(WorldSettings(slip=0, noise=0), reveal_rule=True)
        seen, info = env.reset(seed=3)
        for step in range(64):
            colour = PALETTE[info["rule"]["colours"][0]].numpy()
            before, action = np.argwhere((seen[::4, ::4] == colour).all(-1)), step % 4
            expected = np.clip(before + MOVES[info["rule"]["action_map"][action]].numpy(), 0, 5)
            seen, _, _, _, info = env.step(action)
            after = info.get("final_frame", seen)
            self.assertTrue(np.array_equal(np.argwhere((after[::4, ::4] == colour).all(-1)), expected))

    def test_an_outer_episode_is_one_lifetime(self):
        env = gymnasium.make("HiddenRules-v0")
        picture, _ = env.reset(seed=1)
        self.assertEqual((picture.shape, picture.dtype), ((48, 48, 3), np.uint8))
        ends = 0
        for step in range(64):
            picture, reward, terminated, truncated, info = env.step(step % 4)
            self.assertFalse(terminated)
            self.assertEqual(truncated, step == 63)
            ended = info["episode_terminated"] or info["episode_truncated"]
            self.assertEqual("final_frame" in info, ended)
            self.assertEqual(abs(reward) == 1, info["episode_terminated"])
            ends += ended
        self.assertGreaterEqual(ends, 3)

    def test_one_seed_gives_one_stream(self):
        streams = []
        for _ in range(2):
            env = PixelEnv()
            env.reset(seed=5)
            for _ in range(64):
                last = env.step(1)[0]
            streams.append((last, env.reset()[0]))
        self.assertTrue(np.array_equal(streams[0][0], streams[1][0]) and np.array_equal(streams[0][1], streams[1][1]))

    def test_info_never_holds_the_rule(self):
        env = PixelEnv()
        env.reset(seed=0)
        for step in range(64):
            self.assertLessEqual(set(env.step(step % 4)[4]), {"episode_terminated", "episode_truncated", "final_frame"})

    def test_a_rendered_frame_is_large_and_square(self):
        env = PixelEnv(render_mode="rgb_array")
        env.reset(seed=0)
        height, width, _ = env.render().shape
        self.assertGreaterEqual(width, 384)
        self.assertEqual(height, width)

    def test_vector_env_agrees_with_its_world_and_resets_in_the_same_step(self):
        env = gymnasium.make_vec("HiddenRules-v0", num_envs=5, vectorization_mode="vector_entry_point")
        self.assertEqual(env.metadata["autoreset_mode"], gymnasium.vector.AutoresetMode.SAME_STEP)
        pictures, _ = env.reset(seed=2)
        self.assertTrue(env.observation_space.contains(pictures))
        world = HiddenRulesWorld(env.settings, 5, "train", seed_from(np.random.default_rng(2)))
        self.assertTrue(np.array_equal(world.reset(), pictures))
        for step in range(64):
            same = world.step(torch.full((5,), step % 4))
            pictures, reward, terminated, truncated, info = env.step(np.full(5, step % 4))
            self.assertTrue(np.array_equal(info.get("_final_frame", np.zeros(5)), same.ended))
            if same.ended.any():
                self.assertTrue(np.array_equal(info["final_frame"][same.ended], same.final_obs))
            self.assertTrue(np.array_equal(info["episode_terminated"], reward != 0))
            self.assertTrue((truncated == (step == 63)).all() and not terminated.any())
        self.assertTrue(np.array_equal(info["final_obs"], same.obs))
        self.assertFalse(np.array_equal(info["final_obs"], pictures))
        self.assertFalse(env.step(np.zeros(5, int))[3].any())

    def test_recurrent_agents_can_be_shown_the_previous_step(self):
        env = PreviousStep(gymnasium.make("HiddenRules-v0"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message=".*(different from the unwrapped version|infinity)")  # rewards may be any
            check_env(env, skip_render_check=True)
        seen, _ = env.reset(seed=1)
        self.assertEqual(seen["previous"].tolist(), [0] * 6)
        for step in range(64):
            seen, reward, _, _, info = env.step(step % 4)
            ended = info["episode_terminated"] or info["episode_truncated"]
            self.assertEqual(seen["previous"].tolist(), [float(step % 4 == a) for a in range(4)] + [reward, ended])
            self.assertTrue(env.observation_space.contains(seen))

    def test_bad_actions_are_refused(self):
        env, vector = PixelEnv(), PixelVectorEnv(3)
        with self.assertRaises(gymnasium.error.ResetNeeded):
            env.step(0)
        env.reset(seed=0), vector.reset(seed=0)
        with self.assertRaisesRegex(ValueError, "action is 4"):
            env.step(4)
        with self.assertRaisesRegex(ValueError, "3 integers"):
            vector.step(np.array([0, 1]))


if __name__ == "__main__":
    unittest.main()
