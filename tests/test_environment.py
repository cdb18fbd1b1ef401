"""The environment: rules, splits, steps, rendering, Gymnasium interfaces, and external environments."""

import itertools
import unittest
import warnings
from dataclasses import replace
from unittest import mock

import gymnasium
import numpy as np
import torch
from gymnasium.utils.env_checker import check_env

import environment
from context_engine import RandomAgent
from environment import MOVES, PALETTE, SPLITS, WORLDS, HiddenRulesWorld, HiddenRulesWrapper, PixelEnv, WorldSettings
from memory import make_generator
from tests.shared import installed, temporary_folder

CLEAR = WorldSettings(noise=0, slip=0)
ROOM = WorldSettings(gym_id="Room-v0", lifetime=25, cell=4, slip=0, noise=0)


def world_of(settings=CLEAR, batch=64, split="train", seed=0):
    world = HiddenRulesWorld(settings, batch, split, seed)
    return world, world.reset()


def expected_frames(world):
    """The frames of `world` without noise, one by one."""
    frames, s = [], world.settings
    for row in range(world.batch):
        frame = torch.full((s.grid, s.grid, 3), environment.BACKGROUND)
        if world.walls is not None:
            frame[world.walls[row]] = environment.WALL
        for role in reversed(range(1 + len(s.reward_values))):  # the body last, on top of the objects
            frame[tuple(world.position[row, role])] = PALETTE[world.rule.colours[row, role]].long()
        if s.tint:
            frame = (frame * world.gains[row] + world.brightness[row]).round().clamp(0, 255)
        frames.append(frame.repeat_interleave(s.cell, 0).repeat_interleave(s.cell, 1).byte())
    return torch.stack(frames)


class TestRules(unittest.TestCase):
    def test_splits_are_fixed_disjoint_and_complete(self):
        for holdout, sizes in (("combinations", (100, 16, 28)), ("permutations", (92, 16, 36))):
            parts = [environment.task_split(WorldSettings(holdout=holdout), split) for split in SPLITS]
            self.assertEqual(tuple(map(len, parts)), sizes)
            self.assertEqual(torch.cat(parts).sort().values.tolist(), list(range(144)))
            if holdout == "combinations":
                expected = torch.randperm(144, generator=torch.Generator().manual_seed(7))[:28]
                self.assertTrue(torch.equal(parts[2], expected.sort().values))
            else:  # no action map of the test tasks is in another split
                maps = [set((part // 6).tolist()) for part in parts]
                self.assertEqual(len(maps[2]), 6)
                self.assertFalse(maps[2] & (maps[0] | maps[1]))

    def test_every_task_has_a_different_rule(self):
        for settings, size in ((WorldSettings(), 144), (WorldSettings(**WORLDS["everything"]), 120 * 24 * 2 * 20)):
            space = environment.rule_space_of(settings)
            rule = space.rule(torch.arange(len(space)))
            digits = torch.cat([rule.action_map, rule.colours, *(part[:, None] for part in rule[2:])], 1)
            self.assertEqual(len(digits.unique(dim=0)), size)
            self.assertEqual(len(space), size)

    def test_no_wall_layout_is_in_two_splits(self):
        for walls, sizes in ((4, [300, 100, 100]), (1, [22, 7, 7])):  # with one wall there are only 36 layouts
            by_split = environment.layouts(6, walls)
            self.assertEqual([len(layouts) for layouts in by_split.values()], sizes)
            sets = [{tuple(layout.flatten().tolist()) for layout in layouts} for layouts in by_split.values()]
            self.assertEqual(len(set.union(*sets)), sum(sizes))
            world, _ = world_of(replace(CLEAR, walls=walls), split="test")
            self.assertTrue(all(tuple(layout.flatten().tolist()) in sets[2] for layout in world.walls))

    def test_bad_settings_are_refused(self):
        for changes, message in (
            ({"slip": float("nan")}, "world.slip is nan.*between 0 and 1"),
            ({"walls": 13}, "walls is 13.*between 0 and 12"),
            ({"actions": 3}, "actions is 3"),
            ({"wind": 1.0}, "wind is 1.0"),
            ({"edges": "soft"}, "'soft'.*block, wrap or hidden"),
            ({"holdout": "all"}, "'all'.*combinations or permutations"),
            ({"reward_values": (-1.0,)}, "one above 0"),
            ({"reward_values": (1.0, 0.0)}, "not 0"),
            ({"reward_values": (1.0, 2.0, 3.0, 4.0, 5.0)}, "1 to 4"),
            ({"reward_values": (1.0, 1.0, -1.0)}, "different"),
            ({"reward_values": (float("nan"),)}, "reward_values is nan"),
            ({"switch_step": 5}, "switch_step is 5 and world.switch is 0"),
            ({"gym_id": "Room-v0", "walls": 2}, "world.walls is not for an external environment"),
            ({"shuffle": ("0", "1", "2", "3")}, "give world.gym_id"),
        ):
            with self.subTest(**changes), self.assertRaisesRegex(ValueError, message):
                WorldSettings(**changes)
        with self.assertRaisesRegex(ValueError, "'exam'.*train, validation, test"):
            environment.task_split(WorldSettings(), "exam")


class TestSteps(unittest.TestCase):
    def test_the_body_moves_by_the_action_map_and_stops_at_walls_and_edges_or_wraps(self):
        for settings in (CLEAR, replace(CLEAR, edges="hidden"), replace(CLEAR, walls=8)):
            world, _ = world_of(settings, batch=512)
            rows, stopped = torch.arange(512), 0
            for t in range(60):
                before = world.position.clone()
                to = before[:, 0] + MOVES[world.rule.action_map[:, t % 4]]
                to = torch.where(world.rule.wraps[:, None], to % 6, to.clamp(0, 5))
                if settings.walls:
                    self.assertFalse(world.walls[rows[:, None], *before.unbind(-1)].any())
                    blocked = world.walls[rows, *to.unbind(1)]
                    to, stopped = torch.where(blocked[:, None], before[:, 0], to), int(blocked.sum())
                world.step(torch.full((512,), t % 4))
                self.assertTrue(torch.equal(world.next_position[:, 0], to))
                self.assertTrue(torch.equal(world.next_position[:, 1:], before[:, 1:]))
            self.assertAlmostEqual(
                float(world.rule.wraps.float().mean()), 0.5 * (settings.edges == "hidden"), delta=0.1
            )
            if settings.walls:
                self.assertEqual(world.walls.flatten(1).sum(1).unique().tolist(), [8])
                self.assertGreater(stopped, 5)

    def test_rewards_and_ends_follow_from_the_next_position_and_extra_actions_do_nothing(self):
        for values, actions in (((1.0, -1.0), 4), ((2.0, 0.5, -1.0), 6)):
            world, _ = world_of(replace(CLEAR, reward_values=values, actions=actions), batch=512)
            nothing = world.rule.action_map == 4
            self.assertTrue((nothing.sum(1) == actions - 4).all())
            generator, age, rewards = make_generator(0, 9), torch.zeros(512), set()
            for _ in range(40):
                before, action = world.position.clone(), torch.randint(actions, (512,), generator=generator)
                step = world.step(action)
                stays = nothing[torch.arange(512), action]
                self.assertTrue(torch.equal(world.next_position[stays], before[stays]))
                age += 1
                reached = (world.next_position[:, :1] == world.next_position[:, 1:]).all(-1)
                self.assertTrue(torch.equal(step.reward, reached.float() @ torch.tensor(values)))
                self.assertTrue(torch.equal(step.terminated, reached.any(1)))
                self.assertTrue(torch.equal(step.truncated, (age == 18) & ~step.terminated))
                ended = step.terminated | step.truncated
                self.assertTrue(torch.equal(step.ended, ended))
                self.assertTrue(torch.equal(step.obs[~ended], step.next_obs[~ended]))
                self.assertTrue(torch.equal(step.final_obs, step.next_obs[ended]))
                self.assertTrue((world.position[ended, :1] != world.position[ended, 1:]).any(-1).all())  # a new start
                age[ended] = 0
                rewards |= set(step.reward.tolist())
            self.assertEqual(rewards, {0.0, *values})

    def test_slips_have_their_rates(self):
        world, _ = world_of(WorldSettings(noise=0, slip=0.4, slip_random=0.25, grid=16), batch=4000)
        intended = MOVES[world.rule.action_map[:, 0]]
        before = world.position[:, 0].clone()
        world.step(torch.zeros(4000, dtype=torch.int64))
        moved = world.next_position[:, 0] - before
        inside = ((before > 0) & (before < 15)).all(-1)
        self.assertAlmostEqual(float((moved == 0).all(-1)[inside].float().mean()), 0.3, delta=0.03)
        self.assertAlmostEqual(float((moved == intended).all(-1)[inside].float().mean()), 0.6 + 0.1 / 4, delta=0.03)

    def test_steps_without_frames_are_the_same_steps(self):
        seen, unseen = (world_of(WorldSettings(), seed=5)[0] for _ in range(2))
        unseen.set_state(seen.task, seen.position, seen.episode_step)
        for _ in range(40):
            action = torch.randint(4, (64,))
            step, other = seen.step(action), unseen.step_unseen(action)
            for name in ("reward", "terminated", "truncated"):
                self.assertTrue(torch.equal(getattr(step, name), getattr(other, name)))
            for name in ("position", "next_position"):
                self.assertTrue(torch.equal(getattr(seen, name), getattr(unseen, name)))
        self.assertIsNone(other.obs)

    def test_random_numbers_do_not_depend_on_the_actions(self):
        worlds = [world_of(WorldSettings(), split="validation", seed=3)[0] for _ in range(2)]
        self.assertTrue(torch.equal(worlds[0].task, worlds[1].task))
        for step in range(20):
            for world, action in zip(worlds, (step % 4, (step + 1) % 4), strict=True):
                world.step(torch.full((64,), action))
        self.assertTrue(torch.equal(worlds[0]._sample_starts(), worlds[1]._sample_starts()))

    def test_an_agent_with_the_same_seed_shares_no_random_numbers_with_the_world(self):
        seeds = itertools.product((0, 1, 2**32, 10**18), range(9))
        samples = [tuple(torch.randint(1000, (9,), generator=make_generator(*pair)).tolist()) for pair in seeds]
        self.assertEqual(len(set(samples)), len(samples))
        world, frames = world_of(WorldSettings(), batch=4000, seed=3)
        agent = RandomAgent(3)
        agent.reset(frames)
        self.assertLess(float((agent.act() == world.task % 4).float().mean()), 0.3)

    def test_starts_are_uniform_over_distinct_cells(self):
        world, _ = world_of(WorldSettings(grid=3), batch=30_000)
        cell = world._sample_starts() @ torch.tensor([3, 1])
        for one, other in ((0, 1), (0, 2), (1, 2)):
            self.assertTrue((cell[:, one] != cell[:, other]).all())
        counts = torch.bincount(cell @ torch.tensor([81, 9, 1]), minlength=729)
        counts = counts[counts > 0].float()
        self.assertEqual(len(counts), 9 * 8 * 7)
        self.assertLess(float(counts.std() / counts.mean()), 0.2)

    def test_wrong_shapes_are_refused(self):
        world, _ = world_of()
        with self.assertRaisesRegex(ValueError, r"\(63,\).*\(64,\)"):
            world.step(torch.zeros(63, dtype=torch.int64))

    def test_a_switch_is_not_visible_and_applies_from_the_next_step(self):
        world, _ = world_of(replace(CLEAR, switch=0.01, switch_step=5), batch=256)
        initial = world.task.clone()
        for t in range(12):
            task, before = world.task.clone(), world.position.clone()
            action = torch.randint(4, (256,))
            step = world.step(action)
            self.assertEqual(world.step_segment.unique().tolist(), [int(t >= 5)])
            moved = MOVES[world.space.rule(task).action_map[torch.arange(256), action]]
            expected = (before[:, 0] + moved).clamp(0, 5)
            self.assertTrue(torch.equal(world.next_position[:, 0], expected))  # by the rule from before the step
            self.assertTrue(torch.equal(world.render(), step.obs))  # by the rule from after the step
        self.assertGreater(int((world.task != initial).sum()), 240)

    def test_switches_have_their_rate_and_change_no_other_random_numbers(self):
        worlds = [world_of(WorldSettings(switch=switch), batch=512)[0] for switch in (0.1, 0.0)]
        for _ in range(40):
            action = torch.randint(4, (512,))
            for world in worlds:
                world.step(action)
        self.assertAlmostEqual(float(worlds[0].segment.float().mean()), 4, delta=0.3)
        self.assertEqual(int(worlds[1].segment.max()), 0)
        self.assertTrue(torch.equal(*(world.generator.get_state() for world in worlds)))

    def test_wind_has_its_direction_and_rate_and_every_split_its_own_strengths(self):
        strengths = {}
        for split in SPLITS:
            world, _ = world_of(replace(CLEAR, grid=16, wind=0.5), batch=8000, split=split)
            strengths[split] = {round(x, 3) for x in world.rule.strength.tolist()}
            before = world.position[:, 0].clone()
            action = (world.rule.action_map == (world.rule.wind ^ 1)[:, None]).float().argmax(1)  # against the wind
            world.step(action)
            carried = (world.next_position[:, 0] == before + MOVES[world.rule.wind]).all(-1).float()
            inside = ((before > 0) & (before < 15)).all(-1)
            for strength in world.rule.strength.unique():
                rate = carried[inside & (world.rule.strength == strength)].mean()
                self.assertAlmostEqual(float(rate), float(strength), delta=0.05)
        self.assertEqual(strengths, {"train": {0.1, 0.3, 0.5}, "validation": {0.2}, "test": {0.4}})


class TestRendering(unittest.TestCase):
    def test_frames_without_noise_are_those_rendered_one_by_one(self):
        everything = WorldSettings(**WORLDS["everything"] | {"noise": 0})
        for settings in (CLEAR, everything, replace(everything, tint=0.8), replace(CLEAR, grid=3, cell=3, tint=0.4)):
            world, frames = world_of(settings)
            self.assertTrue(torch.equal(frames, expected_frames(world)))
            world.position[:30, 0] = world.position[:30, 1]  # the body stands on the goal
            self.assertTrue(torch.equal(world.render(), expected_frames(world)))
            rows = torch.tensor([40, 3, 11])
            self.assertTrue(torch.equal(world.render(rows), expected_frames(world)[rows]))

    def test_every_cell_has_noise_of_the_right_size_that_does_not_repeat(self):
        with mock.patch.object(environment, "BACKGROUND", 128):  # far from 0 and 255: nothing is clipped
            noisy, _ = world_of(replace(CLEAR, noise=0.05, grid=16, walls=30), batch=64)
            clean, _ = world_of(replace(CLEAR, grid=16, walls=30), batch=64)
        frames = torch.stack([noisy.render().float(), noisy.render().float()])
        grey = clean.render() == 128
        self.assertAlmostEqual(float(frames[0][grey].mean()), 128, delta=0.02 * 128)
        self.assertAlmostEqual(float(frames[0][grey].std()), 12.75, delta=0.02 * 12.75)
        self.assertLess(abs(float(torch.corrcoef(frames[:, grey])[0, 1])), 0.01)
        noise = (frames[0] - clean.render()).masked_fill(~grey, 0)
        self.assertLess(float(noise.abs().max()), 6.5 * 12.75)
        sums = [x.float().view(64, 16, 4, 16, 4, 3).sum((0, 2, 4, 5)) for x in (noise.square(), grey)]
        self.assertLess(float(((sums[0] / sums[1]).sqrt() / 12.75 - 1).abs().max()), 0.1)  # in every cell

    def test_bodies_and_objects_have_noise_of_their_own(self):
        for cell, batch in ((4, 2000), (3, 2000), (48, 20)):  # rows of a cell are copied as words of 4, 1 and 8 bytes
            settings = WorldSettings(noise=0.05, cell=cell)
            worlds = [world_of(one, batch=batch)[0] for one in (settings, replace(settings, noise=0))]
            frames = [world.render().float().view(batch, 6, cell, 6, cell, 3).transpose(2, 3) for world in worlds]
            index = (torch.arange(batch)[:, None], *worlds[0].position.unbind(-1))
            noisy, clean = (x[index].flatten(2) for x in frames)  # (batch, role, numbers in a cell)
            unclipped = (clean > 50) & (clean < 210)
            noise = (noisy - clean).masked_fill(~unclipped, 0)
            self.assertAlmostEqual(float(noise[unclipped].mean()), 0, delta=0.5)
            self.assertAlmostEqual(float(noise[unclipped].std()), 12.75, delta=0.5)
            for one, other in ((0, 1), (0, 2), (1, 2)):
                both = unclipped[:, one] & unclipped[:, other]
                pair = torch.stack([noise[:, one][both], noise[:, other][both]])
                self.assertLess(abs(float(torch.corrcoef(pair)[0, 1])), 0.03)

    def test_prepared_sums_of_colours_and_noise_equal_sums_on_demand(self):
        world, _ = world_of(WorldSettings(walls=3), batch=16)
        renderers = [environment.Renderer(6, 4, 0.3, make_generator(0, 1)) for _ in range(2)]
        shades = renderers[1].tint(torch.ones(16, 3), torch.zeros(16, 1))
        for _ in range(20):
            world.step(torch.zeros(16, dtype=torch.int64))
            state = (world.position, world.rule.colours, world.walls)
            prepared = renderers[0].render(*state, None, world.rows)
            self.assertTrue(torch.equal(prepared, renderers[1].render(*state, shades, world.rows)))

    def test_all_randomness_is_from_the_given_generator(self):
        world, _ = world_of()
        for noise in (0, 0.1):
            generators = [make_generator(0, 1) for _ in range(2)]
            renderers = [environment.Renderer(6, 4, noise, generator) for generator in generators]
            before = generators[0].get_state()
            state = (world.position, world.rule.colours, None, None, world.rows)
            self.assertTrue(torch.equal(*(renderer.render(*state) for renderer in renderers)))
            self.assertEqual(torch.equal(generators[0].get_state(), before), noise == 0)

    def test_a_tint_is_drawn_for_every_lifetime_and_changes_no_other_random_numbers(self):
        plain, tinted = (HiddenRulesWorld(replace(CLEAR, tint=tint), 64, "train", 0) for tint in (0, 0.8))
        gains = []
        for _ in range(2):
            plain.reset()
            self.assertTrue(torch.equal(tinted.reset(), expected_frames(tinted)))
            self.assertTrue(torch.equal(plain.position, tinted.position) and torch.equal(plain.task, tinted.task))
            self.assertTrue(0.2 <= float(tinted.gains.min()) < 0.3)
            self.assertTrue(float(tinted.brightness.min()) >= 0 and 60 < float(tinted.brightness.max()) <= 80)
            gains.append(tinted.gains)
        self.assertFalse((gains[0] == gains[1]).any())
        frames = tinted.step(torch.zeros(64, dtype=torch.int64)).obs
        self.assertTrue(torch.equal(frames, expected_frames(tinted)) and torch.equal(tinted.gains, gains[1]))
        self.assertRegex(tinted.describe_rule(0), "gains .*brightness")


class TestGymnasiumInterfaces(unittest.TestCase):
    def test_check_env_is_silent(self):
        for preset in WORLDS:
            name = "HiddenRules-v0" if preset == "default" else f"HiddenRules-{preset}-v0"
            with self.subTest(name), warnings.catch_warnings():
                warnings.simplefilter("error")
                check_env(gymnasium.make(name, render_mode="rgb_array").unwrapped)
            self.assertEqual(gymnasium.make_vec(name, num_envs=3).reset(seed=0)[0].shape[0], 3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message=".*(different from the unwrapped version|infinity)")
            check_env(HiddenRulesWrapper(gymnasium.make("Room-v0"), 20), skip_render_check=True)

    @installed("moviepy")
    def test_common_wrappers_work(self):
        folder = temporary_folder() / "videos"
        env = gymnasium.make("HiddenRules-quick-v0", render_mode="rgb_array")
        env = gymnasium.wrappers.RecordEpisodeStatistics(gymnasium.wrappers.FrameStackObservation(env, 3))
        env = gymnasium.wrappers.RecordVideo(env, str(folder), episode_trigger=lambda _: True, disable_logger=True)
        obs, _ = env.reset(seed=0)
        self.assertEqual(obs.shape, (3, 48, 48, 3))
        truncated, total = False, 0.0
        while not truncated:
            _, reward, _, truncated, info = env.step(env.action_space.sample())
            total += reward
        self.assertAlmostEqual(float(info["episode"]["r"]), total)
        env.close()
        self.assertGreater(next(folder.glob("*.mp4")).stat().st_size, 1000)

    def test_the_rule_is_revealed_on_request(self):
        env = PixelEnv(WorldSettings(slip=0, noise=0), reveal_rule=True)
        obs, info = env.reset(seed=3)
        for t in range(64):
            colour = PALETTE[info["rule"]["colours"][0]].numpy()
            before, action = np.argwhere((obs[::4, ::4] == colour).all(-1)), t % 4
            expected = np.clip(before + MOVES[info["rule"]["action_map"][action]].numpy(), 0, 5)
            obs, _, _, _, info = env.step(action)
            after = info.get("final_frame", obs)
            self.assertTrue(np.array_equal(np.argwhere((after[::4, ::4] == colour).all(-1)), expected))

    def test_infos_never_hold_the_rule_or_the_tint(self):
        for settings in (WorldSettings(), WorldSettings(tint=0.5, noise=0)):
            env = PixelEnv(settings, render_mode="rgb_array")
            env.reset(seed=0)
            for t in range(64):
                info = env.step(t % 4)[4]
                self.assertLessEqual(set(info), {"episode_terminated", "episode_truncated", "final_frame"})

    def test_a_gymnasium_episode_is_one_lifetime(self):
        env = gymnasium.make("HiddenRules-v0", render_mode="rgb_array")
        obs, _ = env.reset(seed=1)
        self.assertEqual(env.render().shape, (384, 384, 3))
        self.assertEqual((obs.shape, obs.dtype), ((48, 48, 3), np.uint8))
        ends = 0
        for t in range(64):
            obs, reward, terminated, truncated, info = env.step(t % 4)
            self.assertEqual((terminated, truncated), (False, t == 63))
            ended = info["episode_terminated"] or info["episode_truncated"]
            self.assertEqual("final_frame" in info, ended)
            self.assertEqual(abs(reward) == 1, info["episode_terminated"])
            ends += ended
        self.assertGreaterEqual(ends, 3)

    def test_a_seed_fixes_all_lifetimes(self):
        runs = []
        for _ in range(2):
            env = PixelEnv()
            env.reset(seed=5)
            lifetime = [env.step(1)[0] for _ in range(64)]
            runs.append(np.stack([*lifetime, env.reset()[0]]))
        self.assertTrue(np.array_equal(*runs))

    def test_the_vector_environment_agrees_with_its_world_and_resets_in_the_same_step(self):
        env = gymnasium.make_vec("HiddenRules-v0", num_envs=5, vectorization_mode="vector_entry_point")
        self.assertEqual(env.metadata["autoreset_mode"], gymnasium.vector.AutoresetMode.SAME_STEP)
        obs, _ = env.reset(seed=2)
        self.assertTrue(env.observation_space.contains(obs))
        world = HiddenRulesWorld(env.settings, 5, "train", environment.seed_from(np.random.default_rng(2)))
        self.assertTrue(np.array_equal(world.reset(), obs))
        for t in range(64):
            same = world.step(torch.full((5,), t % 4))
            obs, reward, terminated, truncated, info = env.step(np.full(5, t % 4))
            self.assertTrue(np.array_equal(info.get("_final_frame", np.zeros(5)), same.ended))
            if same.ended.any():
                self.assertTrue(np.array_equal(info["final_frame"][same.ended], same.final_obs))
            self.assertTrue(np.array_equal(info["episode_terminated"], reward != 0))
            self.assertTrue((truncated == (t == 63)).all() and not terminated.any())
        self.assertTrue(np.array_equal(info["final_obs"], same.obs))
        self.assertFalse(np.array_equal(info["final_obs"], obs))
        self.assertFalse(env.step(np.zeros(5, int))[3].any())

    def test_bad_actions_are_refused(self):
        env, vector = PixelEnv(), environment.PixelVectorEnv(3)
        with self.assertRaises(gymnasium.error.ResetNeeded):
            env.step(0)
        env.reset(seed=0)
        vector.reset(seed=0)
        with self.assertRaisesRegex(ValueError, "action is 4"):
            env.step(4)
        with self.assertRaisesRegex(ValueError, "3 integers"):
            vector.step(np.array([0, 1]))


if __name__ == "__main__":
    unittest.main()
