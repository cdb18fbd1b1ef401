"""The world: rules, alignment in time, splits, noise, pairing and the exact solution."""

import dataclasses
import unittest
import unittest.mock
from dataclasses import replace

import torch

import environment
from agent import Learner, RandomAgent
from context_engine import ActionValues, ExactFilter, likelihood_by_case, spread_over_rules, reward_consistent
from environment import HiddenRulesWorld, MOVES, PALETTE, PixelEnv, WorldSettings, rule_space_of, task_split
from main import Settings, build_system, references, train
from memory import merge, make_generator
from tests.shared import tiny

CLEAR = WorldSettings(noise=0, slip=0)
EVERYTHING = WorldSettings(**environment.WORLDS["everything"] | {"noise": 0})


def world_of(settings=CLEAR, batch=64, split="train", seed=0):
    world = HiddenRulesWorld(settings, batch, split, seed)
    return world, world.reset()


class TestRules(unittest.TestCase):
    def test_splits_are_disjoint_and_complete(self):
        for holdout, sizes in (("combinations", (100, 16, 28)), ("permutations", (92, 16, 36))):
            parts = [task_split(WorldSettings(holdout=holdout), split).tolist() for split in ("train", "validation", "test")]
            self.assertEqual(tuple(map(len, parts)), sizes)
            self.assertEqual(sorted(sum(parts, [])), list(range(144)))

    def test_held_out_permutations_never_occur_in_training(self):
        maps = {split: set((task_split(WorldSettings(holdout="permutations"), split) // 6).tolist()) for split in ("train", "validation", "test")}
        self.assertEqual(len(maps["test"]), 6)
        self.assertFalse(maps["test"] & (maps["train"] | maps["validation"]))

    def test_the_test_split_is_that_of_the_benchmark(self):
        expected = torch.randperm(144, generator=torch.Generator().manual_seed(7))[:28].sort().values
        self.assertTrue(torch.equal(task_split(WorldSettings(), "test"), expected))

    def test_every_task_is_another_rule(self):
        for settings in (WorldSettings(), WorldSettings(**environment.WORLDS["everything"])):
            space = rule_space_of(settings)
            rule = space.rule(torch.arange(len(space)))
            digits = torch.cat([rule.action_map, rule.colours, *(part[:, None] for part in rule[2:])], 1)
            self.assertEqual(len(digits.unique(dim=0)), len(space))
        self.assertEqual(len(space), 120 * 24 * 2 * 20)

    def test_unknown_names_are_refused(self):
        with self.assertRaisesRegex(ValueError, "'exam'.*train, validation, test"):
            task_split(WorldSettings(), "exam")
        with self.assertRaisesRegex(ValueError, "world.slip is nan.*between 0 and 1"):
            WorldSettings(slip=float("nan"))


class TestWorld(unittest.TestCase):
    def test_actions_move_the_body_by_the_hidden_rule(self):
        world, _ = world_of()
        for action in range(4):
            before = world.position.clone()
            world.step(torch.full((64,), action))
            expected = (before[:, 0] + MOVES[world.rule.action_map[:, action]]).clamp(0, 5)
            self.assertTrue(torch.equal(world.next_position[:, 0], expected))
            self.assertTrue(torch.equal(world.next_position[:, 1:], before[:, 1:]))

    def test_rewards_and_ends_follow_from_the_arrival(self):
        world, _ = world_of(batch=512)
        generator, age = make_generator(0, 9), torch.zeros(512)
        for _ in range(40):
            step = world.step(torch.randint(4, (512,), generator=generator))
            age += 1
            goal = (world.next_position[:, 0] == world.next_position[:, 1]).all(-1)
            hazard = (world.next_position[:, 0] == world.next_position[:, 2]).all(-1)
            self.assertTrue(torch.equal(step.reward, goal.float() - hazard.float()))
            self.assertTrue(torch.equal(step.terminated, goal | hazard))
            self.assertTrue(torch.equal(step.truncated, (age == 18) & ~step.terminated))
            ended = step.terminated | step.truncated
            self.assertTrue(torch.equal(step.ended, ended))
            self.assertTrue(torch.equal(step.obs[~ended], step.next_obs[~ended]))
            self.assertTrue(torch.equal(step.final_obs, step.next_obs[ended]))
            age[ended] = 0
        self.assertTrue((world.position[:, 0] != world.position[:, 1]).any(-1)[ended].all())

    def test_pictures_show_body_goal_and_hazard_in_their_colours(self):
        world, frames = world_of()
        for role in range(3):
            row, column = (4 * world.position[:, role] + 1).unbind(1)
            seen = frames[torch.arange(64), row, column]
            self.assertTrue(torch.equal(seen, PALETTE[world.rule.colours[:, role]]))
        self.assertEqual(int((frames != environment.BACKGROUND).any(-1).sum()), 64 * 3 * 16)

    def test_slips_have_their_rates(self):
        world, _ = world_of(WorldSettings(noise=0, slip=0.4, slip_random=0.25, grid=16), batch=4000)
        intended = MOVES[world.rule.action_map[:, 0]]
        before = world.position[:, 0].clone()
        world.step(torch.zeros(4000, dtype=torch.int64))
        moved = world.next_position[:, 0] - before
        free = ((before > 0) & (before < 15)).all(-1)
        self.assertAlmostEqual(float((moved == 0).all(-1)[free].float().mean()), 0.3, delta=0.03)
        self.assertAlmostEqual(float((moved == intended).all(-1)[free].float().mean()), 0.6 + 0.1 / 4, delta=0.03)

    def test_noise_has_its_mean_and_deviation_and_does_not_repeat(self):
        settings = WorldSettings(noise=0.05, grid=16)
        with unittest.mock.patch.object(environment, "BACKGROUND", 128):  # far from both ends: nothing is clipped
            world, _ = world_of(settings, batch=64)
            first, second = world.render().float(), world.render().float()
            world._noise, world._ground, world._noisy = None, None, torch.zeros_like(world._noisy[:1])
            grey = world.render() == 128
        self.assertAlmostEqual(float(first[grey].mean()), 128, delta=0.02 * 128)
        self.assertAlmostEqual(float(first[grey].std()), 12.75, delta=0.02 * 12.75)
        both = torch.stack([first[grey], second[grey]])
        self.assertLess(abs(float(torch.corrcoef(both)[0, 1])), 0.01)

    def test_things_have_noise_of_their_own(self):
        for cell, batch in ((4, 2000), (3, 2000), (48, 20)):  # rows of a cell are copied as words of 4, 1 and 8 bytes
            settings = WorldSettings(noise=0.05, cell=cell)
            worlds = [world_of(one, batch=batch)[0] for one in (settings, dataclasses.replace(settings, noise=0))]
            noisy, plain = (world.render().float().view(batch, 6, cell, 6, cell, 3).transpose(2, 3) for world in worlds)
            rows, place = torch.arange(batch)[:, None], worlds[0].position
            noisy, plain = (x[rows, place[..., 0], place[..., 1]].flatten(2) for x in (noisy, plain))  # (batch, 3 things, numbers)
            visible = (plain > 50) & (plain < 210)  # hardly ever clipped
            noise = (noisy - plain).masked_fill(~visible, 0)
            self.assertAlmostEqual(float(noise[visible].mean()), 0, delta=0.5)
            self.assertAlmostEqual(float(noise[visible].std()), 12.75, delta=0.5)
            for one, other in ((0, 1), (0, 2), (1, 2)):
                both = visible[:, one] & visible[:, other]
                pair = torch.stack([noise[:, one][both], noise[:, other][both]])
                self.assertLess(abs(float(torch.corrcoef(pair)[0, 1])), 0.03)

    def test_empty_worlds_with_noise_are_what_adding_it_gives(self):
        copied, added = (world_of(WorldSettings(noise=0.3, walls=3), batch=16)[0] for _ in range(2))
        added._ground = None
        for _ in range(20):
            steps = [world.step(torch.zeros(16, dtype=torch.int64)) for world in (copied, added)]
            for one, other in zip(*steps):
                self.assertTrue(torch.equal(one, other))

    def test_same_seed_same_luck_whatever_the_agent_does(self):
        worlds = [world_of(WorldSettings(), split="validation", seed=3)[0] for _ in range(2)]
        self.assertTrue(torch.equal(worlds[0].task, worlds[1].task))
        for step in range(20):
            for world, action in zip(worlds, (step % 4, (step + 1) % 4)):
                world.step(torch.full((64,), action))
        self.assertTrue(torch.equal(worlds[0]._starts(), worlds[1]._starts()))

    def test_steps_without_pictures_are_the_same_steps(self):
        seen, unseen = (world_of(WorldSettings(), seed=5)[0] for _ in range(2))
        unseen.set_state(seen.task, seen.position, seen.episode_step)
        for _ in range(40):
            action = torch.randint(4, (64,))
            step, other = seen.step(action), unseen.step_unseen(action)
            for name in ("reward", "terminated", "truncated"):
                self.assertTrue(torch.equal(getattr(step, name), getattr(other, name)))
            self.assertTrue(torch.equal(seen.position, unseen.position) and torch.equal(seen.next_position, unseen.next_position))
        self.assertIsNone(other.obs)

    def test_no_agent_shares_its_luck_with_the_world(self):
        """An agent make_generator like its world must not choose its actions by the hidden task."""
        seeds = (0, 1, 2**32, 10**18)
        draws = [tuple(torch.randint(1000, (9,), generator=make_generator(seed, stream)).tolist()) for seed in seeds for stream in range(9)]
        self.assertEqual(len(set(draws)), len(draws))
        world, frames = world_of(WorldSettings(), batch=4000, seed=3)
        agent = RandomAgent(3)
        agent.reset(frames)
        self.assertLess(float((agent.act() == world.task % 4).float().mean()), 0.3)

    def test_starts_are_uniform_over_distinct_cells(self):
        world, _ = world_of(WorldSettings(grid=3), batch=30_000)
        cell = world._starts() @ torch.tensor([3, 1])
        self.assertTrue((cell[:, 0] != cell[:, 1]).all() and (cell[:, 0] != cell[:, 2]).all() and (cell[:, 1] != cell[:, 2]).all())
        counts = torch.bincount(cell @ torch.tensor([81, 9, 1]), minlength=729)
        self.assertEqual(int((counts > 0).sum()), 9 * 8 * 7)
        self.assertLess(float(counts[counts > 0].float().std() / counts[counts > 0].float().mean()), 0.2)

    def test_wrong_shapes_are_refused(self):
        world, _ = world_of()
        with self.assertRaisesRegex(ValueError, r"\(63,\).*\(64,\)"):
            world.step(torch.zeros(63, dtype=torch.int64))


class TestSwitching(unittest.TestCase):
    def test_a_switch_shows_in_no_picture_and_rules_the_next_step(self):
        settings = replace(CLEAR, switch=0.01, switch_step=5)
        world = HiddenRulesWorld(settings, 256, "train", 0)
        world.reset()
        first = world.task.clone()
        for step in range(12):
            task, before = world.task.clone(), world.position.clone()
            action = torch.randint(4, (256,))
            happened = world.step(action)
            self.assertEqual(world.step_segment.unique().tolist(), [int(step >= 5)])
            moved = MOVES[world.space.rule(task).action_map[torch.arange(256), action]]
            expected = (before[:, 0] + moved).clamp(0, settings.grid - 1)
            self.assertTrue(torch.equal(world.next_position[:, 0], expected))  # by the rule from before the step
            self.assertTrue(torch.equal(world.render(), happened.obs))  # as if nothing had been
        self.assertGreater(int((world.task != first).sum()), 240)

    def test_a_step_of_switching_needs_a_rate_to_expect(self):
        with self.assertRaisesRegex(ValueError, "switch_step is 5 and world.switch 0"):
            WorldSettings(switch_step=5)

    def test_switches_have_their_rate_and_leave_all_other_luck_alone(self):
        settings = replace(WorldSettings(), switch=0.1)
        worlds = [HiddenRulesWorld(s, 512, "train", 0) for s in (settings, WorldSettings())]
        for world in worlds:
            world.reset()
        for _ in range(40):
            action = torch.randint(4, (512,))
            for world in worlds:
                world.step(action)
        self.assertAlmostEqual(float(worlds[0].segment.float().mean()), 4, delta=0.3)
        self.assertEqual(int(worlds[1].segment.max()), 0)
        states = [world.generator.get_state() for world in worlds]
        self.assertTrue(torch.equal(*states))

    def test_the_filter_that_knows_the_rate_finds_the_new_rule_first(self):
        settings = WorldSettings(switch=0.01, switch_step=32)
        world = HiddenRulesWorld(settings, 256, "train", 0)
        knows, stubborn = ExactFilter(world), ExactFilter(world, switch=0, floor=1e-3)
        belief = {"knows": [], "stubborn": []}
        frames = world.reset()
        agent = RandomAgent(0)
        for listener in (agent, knows, stubborn):
            listener.reset(frames)
        for _ in range(64):
            action = agent.act()
            step = world.step(action)
            for name, listener in (("knows", knows), ("stubborn", stubborn)):
                listener.observe(action, step)
                right = listener.log_posterior.exp()[torch.arange(256), world.task]
                belief[name].append(float(right.mean()))
            agent.observe(action, step)
        self.assertGreater(belief["knows"][31 + 16], belief["stubborn"][31 + 16] + 0.1)
        self.assertGreater(min(belief["knows"][30], belief["stubborn"][30]), 0.5)
        self.assertGreater(belief["knows"][-1], 0.5)


class TestMoreRules(unittest.TestCase):
    def test_walls_are_seen_stop_the_body_and_hang_together(self):
        world, frames = world_of(replace(CLEAR, walls=8), batch=256)
        self.assertEqual(world.walls.flatten(1).sum(1).unique().tolist(), [8])
        seen = (frames[:, 1::4, 1::4] == environment.WALL).all(-1)
        self.assertTrue(torch.equal(seen, world.walls))
        rows = torch.arange(256)
        for step in range(60):
            before = world.position[:, 0].clone()
            action = torch.full((256,), step % 4)
            to = (before + MOVES[world.rule.action_map[rows, action]]).clamp(0, 5)
            blocked = world.walls[rows, to[:, 0], to[:, 1]]
            world.step(action)
            self.assertTrue(torch.equal(world.next_position[:, 0], torch.where(blocked[:, None], before, to)))
            places = world.position
            self.assertFalse(world.walls[rows[:, None], places[..., 0], places[..., 1]].any())
        self.assertGreater(int(blocked.sum()), 5)

    def test_no_layout_is_in_two_splits(self):
        for walls, sizes in ((4, [300, 100, 100]), (1, [22, 7, 7])):  # of one wall there are but 36 layouts
            made = environment.layouts(6, walls)
            self.assertEqual([len(layouts) for layouts in made.values()], sizes)
            kinds = [{tuple(layout.flatten().tolist()) for layout in layouts} for layouts in made.values()]
            self.assertEqual(sum(map(len, kinds)), len(set.union(*kinds)))
        kinds = [{tuple(layout.flatten().tolist()) for layout in layouts} for layouts in environment.layouts(6, 4).values()]
        drawn = world_of(replace(CLEAR, walls=4), batch=64, split="test")[0].walls
        self.assertTrue(all(tuple(walls.flatten().tolist()) in kinds[2] for walls in drawn))

    def test_edges_wrap_or_block_by_the_rule(self):
        world, _ = world_of(replace(CLEAR, edges="hidden"), batch=512)
        self.assertAlmostEqual(float(world.rule.wraps.float().mean()), 0.5, delta=0.1)
        rows = torch.arange(512)
        for step in range(24):
            before, action = world.position[:, 0].clone(), torch.full((512,), step % 4)
            to = before + MOVES[world.rule.action_map[rows, action]]
            world.step(action)
            expected = torch.where(world.rule.wraps[:, None], to % 6, to.clamp(0, 5))
            self.assertTrue(torch.equal(world.next_position[:, 0], expected))

    def test_the_wind_has_its_direction_and_its_rate_and_the_test_a_strength_of_its_own(self):
        strengths = {}
        for split in ("train", "validation", "test"):
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

    def test_actions_beyond_the_moves_do_nothing_and_things_have_their_worth(self):
        world, _ = world_of(replace(CLEAR, actions=6, reward_values=(2.0, 0.5, -1.0)), batch=512)
        self.assertEqual((world.rule.action_map == 4).sum(1).unique().tolist(), [2])
        seen, rows = set(), torch.arange(512)
        for step in range(40):
            action, before = torch.full((512,), step % 6), world.position.clone()
            happened = world.step(action)
            nothing = world.rule.action_map[rows, action] == 4
            self.assertTrue(torch.equal(world.next_position[nothing], before[nothing]))
            reached = (world.next_position[:, :1] == world.next_position[:, 1:]).all(-1)
            self.assertTrue(torch.equal(happened.reward, reached.float() @ torch.tensor([2.0, 0.5, -1.0])))
            self.assertTrue(torch.equal(happened.terminated, reached.any(1)))
            seen |= set(happened.reward.tolist())
        self.assertEqual(seen, {0.0, 2.0, 0.5, -1.0})

    def test_references_keep_their_order_with_all_rules_together(self):
        settings = replace(EVERYTHING, grid=4, walls=1, lifetime=40, reward_values=(1.0, -1.0), actions=4)
        lived = references(settings, 48, "validation", 0, torch.device("cpu"))
        means = {name: float(one.reward.sum(1).mean()) for name, one in lived.items()}
        self.assertGreater(means["known_rule"], means["thompson"] + 0.5)
        self.assertGreater(means["thompson"], means["random"] + 2)

    def test_every_setting_trains_a_tiny_agent_at_the_smallest_and_the_largest_grid(self):
        for grid in (5, 16):
            world = dict(grid=grid, edges="hidden", walls=3, wind=0.3, actions=6, reward_values=(1.0, 0.5, -1.0), switch=0.05, tint=0.3)
            settings = tiny(world=world | {"lifetime": 6}, transition={"reward_bins": (-1.0, 0.0, 0.5, 1.0)}, training={"updates": 6})
            learner = Learner(build_system(settings))
            train(learner)
            self.assertTrue(all(torch.isfinite(value) for value in learner.metrics.values()))

    def test_bad_rules_are_refused(self):
        for changes, words in (
            ({"walls": 13}, "walls is 13.*between 0 and 12"), ({"actions": 3}, "actions is 3"), ({"wind": 1.0}, "wind is 1.0"),
            ({"edges": "soft"}, "'soft'.*block, wrap or hidden"), ({"reward_values": (-1.0,)}, "one above 0"), ({"reward_values": (1.0, 0.0)}, "not 0"),
            ({"reward_values": (1.0, 2.0, 3.0, 4.0, 5.0)}, "1 to 4"), ({"reward_values": (1.0, 1.0, -1.0)}, "different"), ({"reward_values": (float("nan"),)}, "reward_values is nan"),
            ({"gym_id": "Room-v0", "walls": 2}, "world.walls is not for"),
        ):  # fmt: skip
            with self.subTest(**changes), self.assertRaisesRegex(ValueError, words):
                WorldSettings(**changes)
        with self.assertRaisesRegex(ValueError, "reward_bins.*0.5: add it"):
            Learner(build_system(tiny(world={"reward_values": (1.0, 0.5)})))
        with self.assertRaisesRegex(ValueError, "403,200 rules.*at most 665"):
            merge(Settings(), {"world": {"actions": 8, "edges": "hidden", "wind": 0.4}})


class TestTint(unittest.TestCase):
    def test_the_picture_is_the_plain_one_through_gains_and_brightness(self):
        plain, tinted = (HiddenRulesWorld(replace(CLEAR, tint=tint), 64, "train", 0) for tint in (0, 0.8))
        for _ in range(2):  # every lifetime has its own
            before, after = plain.reset().float(), tinted.reset().float()
            self.assertTrue(torch.equal(plain.position, tinted.position) and torch.equal(plain.task, tinted.task))
            expected = (before * tinted.gains[:, None, None] + tinted.brightness[:, None, None]).clamp(0, 255)
            self.assertLessEqual(float((after - expected).abs().max()), 1)
            self.assertTrue(bool((tinted.gains >= 0.2).all()) and float(tinted.gains.min()) < 0.3)
            self.assertTrue(0 <= float(tinted.brightness.min()) and 60 < float(tinted.brightness.max()) <= 80)
        step = tinted.step(torch.zeros(64, dtype=torch.int64))
        self.assertTrue(bool((step.next_obs.float() <= (255 * tinted.gains + tinted.brightness)[:, None, None] + 1).all()))

    def test_it_lasts_for_the_lifetime_and_no_info_tells_it(self):
        env = PixelEnv(WorldSettings(tint=0.5, noise=0), render_mode="rgb_array")
        env.reset(seed=0)
        first = env.world.gains.clone()
        for step in range(40):
            _, _, _, _, info = env.step(step % 4)
            self.assertLessEqual(set(info), {"episode_terminated", "episode_truncated", "final_frame"})
        self.assertTrue(torch.equal(env.world.gains, first))
        self.assertRegex(env.world.describe_rule(0), "gains .*brightness")


class TestExactSolution(unittest.TestCase):
    def test_likelihoods_of_all_arrivals_sum_to_one(self):
        for settings in (WorldSettings(noise=0), EVERYTHING):
            world, _ = world_of(settings, batch=32)
            before, action = world.order_by_colour(world.position), torch.arange(32) % settings.actions
            rows, body = torch.arange(32), world.rule.colours[:, 0]
            total = torch.zeros(32)
            for cell in range(36):
                after = before.clone()
                after[rows, body] = torch.tensor([cell // 6, cell % 6])
                total += spread_over_rules(world, likelihood_by_case(world, before, action, after)).exp()[rows, world.task]
            torch.testing.assert_close(total, torch.ones(32))

    def test_likelihoods_are_the_frequencies_of_what_happens(self):
        world, _ = world_of(replace(EVERYTHING, walls=6, actions=4, reward_values=(1.0, -1.0)), batch=4000)
        task, position = world.task[:1].expand(4000), world.position[:1].expand(4000, -1, -1)
        world.set_state(task, position, world.episode_step, world.walls[:1].expand(4000, -1, -1))
        before, action = world.order_by_colour(position), torch.full((4000,), 2)
        world.step(action)
        after = world.order_by_colour(world.next_position)
        expected = spread_over_rules(world, likelihood_by_case(world, before, action, after)).exp()[torch.arange(4000), task]
        for likelihood in expected.unique():
            cells = after[expected == likelihood].flatten(1).unique(dim=0)
            share = float((expected == likelihood).float().mean()) / len(cells)
            self.assertAlmostEqual(share, float(likelihood), delta=0.03)

    def test_rewards_rule_out_the_wrong_roles(self):
        world, generator = world_of(batch=256)[0], make_generator(0, 9)
        for _ in range(10):
            step = world.step(torch.randint(4, (256,), generator=generator))
            consistent = reward_consistent(world, world.order_by_colour(world.next_position), step.reward)
            self.assertTrue(consistent[torch.arange(256), world.task % 6].all())
            self.assertTrue((consistent.sum(1)[step.reward != 0] < 6).all())

    def test_values_without_slip_are_discounted_distances(self):
        world, _ = world_of(batch=2)
        task = torch.zeros(2, dtype=torch.int64)
        position = torch.tensor([[[0, 1], [0, 0], [5, 5]], [[0, 2], [0, 0], [5, 5]]])  # one step and two from the goal
        q = ActionValues(CLEAR, discount=0.5)(world, task, position)
        near, far = q.amax(1)
        self.assertAlmostEqual(float(far / near), 0.5, places=4)
        self.assertEqual(int(q[0].argmax()), 2)  # left
        self.assertGreater(float(near), 1)  # the reward, and what the next episode is worth


    def test_a_table_and_an_answer_to_the_question_agree(self):
        settings = WorldSettings(grid=3, wind=0.3, edges="hidden", actions=5)
        world, _ = world_of(settings, batch=64)
        whole = ActionValues(settings)
        with unittest.mock.patch.object(ActionValues, "TABLE", 0):
            asked = ActionValues(settings)
        self.assertTrue(whole.table is not None and asked.table is None)
        answers = [values(world, world.task, world.position) for values in (whole, asked)]
        torch.testing.assert_close(*answers, atol=5e-3, rtol=0)
        exact = ActionValues(WorldSettings(grid=5))
        with unittest.mock.patch.object(ActionValues, "PLACES", 1):  # reset_value starts are drawn instead of gone through
            drawn = ActionValues(WorldSettings(grid=5))
        self.assertAlmostEqual(float(drawn.reset_value), float(exact.reset_value), delta=0.03 * float(exact.reset_value))


if __name__ == "__main__":
    unittest.main()
