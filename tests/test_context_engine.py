"""The belief, its losses and its symmetry in the actions; the inferred appearance; the exact filter and references."""

import unittest
from dataclasses import replace
from unittest import mock

import torch

from context_engine import (
    ActionValues,
    AppearanceEngine,
    ContextInferenceEngine,
    ContextSettings,
    ExactFilter,
    KnownRuleAgent,
    RandomAgent,
    ThompsonAgent,
    likelihood_by_case,
    references,
    reward_consistent,
    rollout,
    spread_over_rules,
)
from environment import WORLDS, HiddenRulesWorld, WorldSettings
from memory import EpisodicMemory, Experience, WorldStep
from tests.shared import make_generator
from transition_model import TransitionModel, TransitionSettings

A, K, C, S, B, T = 4, 6, 3, 16, 5, 9
CLEAR = WorldSettings(noise=0, slip=0)
EVERYTHING = WorldSettings(**WORLDS["everything"] | {"noise": 0})


def engine_of():
    torch.manual_seed(0)
    engine = ContextInferenceEngine(ContextSettings(hidden=8, context=5), A, C, K)
    torch.nn.init.normal_(next(p for p in engine.parameters() if p.shape == (2, 8)))  # the initial belief
    return engine


def transition_model():
    return TransitionModel(TransitionSettings(), C, (4, 4), 5, K)


def experience_of(seed=0, segments=1):
    random = make_generator(seed)
    codes = torch.randint(C, (2, B, T, S), generator=random, dtype=torch.uint8)
    posterior = torch.rand(B, T, K, generator=random).softmax(-1)
    action = torch.randint(A, (B, T), generator=random)
    reward = torch.randint(-1, 2, (B, T), generator=random).float()
    segment = (torch.arange(T) * segments // T).to(torch.uint8).expand(B, T)
    return Experience(*codes, posterior, action, reward, reward != 0, torch.zeros(B, T, dtype=torch.bool), segment)


class TestBelief(unittest.TestCase):
    def test_step_by_step_equals_the_sequence(self):
        engine, experience = engine_of(), experience_of()
        beliefs = engine.sequence(experience)
        self.assertEqual(beliefs.shape, (B, T + 1, A + 1, 8 + K))
        belief = engine.initial_belief(B)
        torch.testing.assert_close(beliefs[:, 0], belief)
        for t in range(T):
            belief = engine.step(belief, Experience(*(part[:, t : t + 1] for part in experience)))
            torch.testing.assert_close(beliefs[:, t + 1], belief)

    def test_the_belief_of_a_memory_equals_the_one_carried_along(self):
        engine, experience = engine_of(), experience_of()
        memory = EpisodicMemory(B, T, S, C, K)
        belief, none = engine.initial_belief(B), torch.zeros(B, dtype=torch.bool)
        for t in range(5):
            now = Experience(*(part[:, t] for part in experience))
            memory.append(*now[:4], None, WorldStep(None, now.reward, now.terminated, none, None))
            belief = engine.step(belief, memory.latest())
        torch.testing.assert_close(engine(memory), belief)

    def test_the_belief_does_not_depend_on_the_future(self):
        engine, one, other = engine_of(), experience_of(0), experience_of(1)
        mixed = Experience(*(torch.cat([a[:, :4], b[:, 4:]], 1) for a, b in zip(one, other, strict=True)))
        torch.testing.assert_close(engine.sequence(one)[:, :5], engine.sequence(mixed)[:, :5])
        self.assertFalse(torch.allclose(engine.sequence(one)[:, 5], engine.sequence(mixed)[:, 5]))

    def test_permuting_the_actions_permutes_the_belief(self):
        engine, experience = engine_of(), experience_of()
        permutation = torch.tensor([2, 0, 3, 1])
        beliefs = engine.sequence(experience)
        permuted = engine.sequence(experience._replace(action=permutation[experience.action]))
        torch.testing.assert_close(permuted[:, :, permutation], beliefs[:, :, :A])
        torch.testing.assert_close(permuted[:, :, A], beliefs[:, :, A])
        before, after = engine.context(beliefs), engine.context(permuted)
        torch.testing.assert_close(after[:, :, permutation], before[:, :, :A])
        torch.testing.assert_close(after[:, :, A], before[:, :, A])

    def test_what_is_known_of_one_action_reaches_the_contexts_of_all_actions(self):
        engine, belief = engine_of(), torch.randn(B, A + 1, 8 + K)
        for row, reached in ((1, [True] * A + [False]), (A, [False] * A + [True])):
            changed = belief.clone()
            changed[:, row] += 1
            differs = (engine.context(changed) - engine.context(belief)).abs().amax((0, 2)) > 1e-4
            self.assertEqual(differs.tolist(), reached)

    def test_log_evidence_is_the_sum_over_the_steps_of_an_action(self):
        engine, experience = engine_of(), experience_of()
        evidence = engine.sequence(experience)[:, -1, :, 8:]
        expected = torch.zeros(B, A + 1, K)
        for row in range(B):
            for action, posterior in zip(experience.action[row], experience.posterior[row], strict=True):
                expected[row, action] += (posterior / posterior.max() + 0.1).log()
        torch.testing.assert_close(evidence, expected)

    def test_contacts_count_only_in_steps_with_a_reward(self):
        engine, experience = engine_of(), experience_of()
        quiet = experience._replace(reward=torch.zeros(B, T))
        elsewhere = quiet._replace(next_codes=quiet.codes)
        torch.testing.assert_close(engine.sequence(quiet), engine.sequence(elsewhere))
        loud = experience._replace(reward=torch.ones(B, T))
        self.assertFalse(torch.allclose(engine.sequence(loud), engine.sequence(loud._replace(next_codes=loud.codes))))


class TestLoss(unittest.TestCase):
    def test_terms_have_names_and_gradients_reach_the_engine_and_the_heads_alone(self):
        engine, experience = engine_of(), experience_of()
        transition = transition_model()
        losses, beliefs = engine.loss(experience, transition, make_generator())
        self.assertEqual(set(losses), {"filter", "decoding", "reward", "termination"})
        self.assertFalse(beliefs.requires_grad)
        sum(losses.values()).backward()
        for parameter in [*engine.parameters(), *transition.contextual_parameters()]:
            self.assertIsNotNone(parameter.grad)
        self.assertTrue(all(p.grad is None for p in transition.effects.parameters()))

    def test_the_filter_term_equals_that_computed_by_hand(self):
        engine, experience = engine_of(), experience_of()
        transition = transition_model()
        context = engine.context(engine.sequence(experience))
        total = 0.0
        for row in range(B):
            for t in range(T):
                log_prior = transition.log_prior(context[row : row + 1, t])[0, experience.action[row, t]]
                total -= float((experience.posterior[row, t] * log_prior.detach().exp()).sum().log())
        losses, _ = engine.loss(experience, transition, make_generator())
        self.assertAlmostEqual(losses["filter"].item(), total / (B * T), places=4)

    def test_targets_stay_within_their_segment(self):
        experience = experience_of(segments=3)
        row, step = torch.arange(B).repeat_interleave(T), torch.arange(B * T) % T
        other_time, same = engine_of()._other_times(experience.segment, row, step, make_generator())
        self.assertTrue(torch.equal(same.bool(), other_time // 3 == step // 3))
        self.assertTrue(same.bool().any() and not same.bool().all())

    def test_without_decoding_every_target_is_at_its_own_time(self):
        engine, experience = engine_of(), experience_of(segments=3)
        engine.settings = replace(engine.settings, decoding_weight=0.0)
        row, step = torch.arange(B).repeat_interleave(T), torch.arange(B * T) % T
        at, valid = engine._other_times(experience.segment, row, step, make_generator())
        self.assertTrue(torch.equal(at, step) and bool(valid.all()))
        losses, _ = engine.loss(experience, transition_model(), make_generator())
        self.assertEqual(float(losses["decoding"].detach()), 0)
        self.assertGreater(float(losses["reward"].detach()), 0)

    def test_the_loss_is_finite_without_rewards_and_ends(self):
        engine, experience = engine_of(), experience_of()
        quiet = experience._replace(reward=torch.zeros(B, T), terminated=torch.zeros(B, T, dtype=torch.bool))
        losses, _ = engine.loss(quiet, transition_model(), make_generator())
        self.assertTrue(torch.isfinite(sum(losses.values())))


class TestAppearance(unittest.TestCase):
    def test_step_by_step_equals_the_sequence(self):
        torch.manual_seed(0)
        engine, patches = AppearanceEngine(ContextSettings(appearance=4), pixels=12), torch.rand(3, 7, 9, 12) - 0.5
        contexts, last = engine.sequence(patches)
        self.assertEqual((contexts.shape, last.shape), ((3, 7, 32), (1, 3, 64)))
        state = None
        for t in range(7):
            one, state = engine.sequence(patches[:, t : t + 1], state)
            torch.testing.assert_close(one[:, 0], contexts[:, t])
        self.assertEqual(engine.unseen().shape, (32,))

    def test_the_order_of_the_patches_changes_nothing(self):
        engine, patches = AppearanceEngine(ContextSettings(appearance=4), pixels=12), torch.rand(2, 3, 9, 12) - 0.5
        shuffled = patches[:, :, torch.randperm(9)]
        torch.testing.assert_close(engine.sequence(patches)[0], engine.sequence(shuffled)[0])


def world_of(settings=CLEAR, batch=64):
    world = HiddenRulesWorld(settings, batch, "train", 0)
    world.reset()
    return world


class TestExactSolution(unittest.TestCase):
    def test_likelihoods_of_all_next_positions_sum_to_one(self):
        for settings in (WorldSettings(noise=0), EVERYTHING):
            world = world_of(settings, batch=32)
            before, action = world.order_by_colour(world.position), torch.arange(32) % settings.actions
            rows, body = torch.arange(32), world.rule.colours[:, 0]
            total = torch.zeros(32)
            for cell in range(36):
                after = before.clone()
                after[rows, body] = torch.tensor([cell // 6, cell % 6])
                by_case = likelihood_by_case(world, before, action, after)
                total += spread_over_rules(world, by_case).exp()[rows, world.task]
            torch.testing.assert_close(total, torch.ones(32))

    def test_likelihoods_are_the_observed_frequencies(self):
        world = world_of(replace(EVERYTHING, walls=6, actions=4, reward_values=(1.0, -1.0)), batch=4000)
        task, position = world.task[:1].expand(4000), world.position[:1].expand(4000, -1, -1)
        world.set_state(task, position, world.episode_step, world.walls[:1].expand(4000, -1, -1))
        before, action = world.order_by_colour(position), torch.full((4000,), 2)
        world.step(action)
        after = world.order_by_colour(world.next_position)
        by_case = likelihood_by_case(world, before, action, after)
        expected = spread_over_rules(world, by_case).exp()[torch.arange(4000), task]
        for likelihood in expected.unique():
            cells = after[expected == likelihood].flatten(1).unique(dim=0)
            share = float((expected == likelihood).float().mean()) / len(cells)
            self.assertAlmostEqual(share, float(likelihood), delta=0.03)

    def test_rewards_rule_out_wrong_roles(self):
        world, generator = world_of(batch=256), make_generator(9)
        for _ in range(10):
            step = world.step(torch.randint(4, (256,), generator=generator))
            consistent = reward_consistent(world, world.order_by_colour(world.next_position), step.reward)
            self.assertTrue(consistent[torch.arange(256), world.task % 6].all())
            self.assertTrue((consistent.sum(1)[step.reward != 0] < 6).all())

    def test_values_without_slips_are_discounted_distances(self):
        world = world_of(batch=2)
        task = torch.zeros(2, dtype=torch.int64)
        position = torch.tensor([[[0, 1], [0, 0], [5, 5]], [[0, 2], [0, 0], [5, 5]]])  # one and two steps from the goal
        q = ActionValues(CLEAR, discount=0.5)(world, task, position)
        near, far = q.amax(1)
        self.assertAlmostEqual(float(far / near), 0.5, places=4)
        self.assertEqual(int(q[0].argmax()), 2)  # left
        self.assertGreater(float(near), 1)  # the reward plus the value of the next episode

    def test_values_from_a_table_equal_values_computed_on_demand(self):
        settings = WorldSettings(grid=3, wind=0.3, edges="hidden", actions=5)
        world = world_of(settings)
        tabulated = ActionValues(settings)
        with mock.patch.object(ActionValues, "TABLE", 0):
            on_demand = ActionValues(settings)
        self.assertTrue(tabulated.table is not None and on_demand.table is None)
        answers = [values(world, world.task, world.position) for values in (tabulated, on_demand)]
        torch.testing.assert_close(*answers, atol=5e-3, rtol=0)
        exact = ActionValues(WorldSettings(grid=5))
        with mock.patch.object(ActionValues, "PLACES", 1):  # starts are sampled instead of enumerated
            sampled = ActionValues(WorldSettings(grid=5))
        tolerance = 0.03 * float(exact.reset_value)
        self.assertAlmostEqual(float(sampled.reset_value), float(exact.reset_value), delta=tolerance)


class TestReferences(unittest.TestCase):
    def test_known_rule_beats_thompson_sampling_beats_random(self):
        settings = WorldSettings()
        q = ActionValues(settings)

        def mean(make):
            world = HiddenRulesWorld(settings, 256, "validation", 0)
            return float(rollout(world, make(world)).reward.sum(1).mean())

        known, random = mean(lambda world: KnownRuleAgent(world, q)), mean(lambda world: RandomAgent(0))
        thompson = mean(lambda world: ThompsonAgent(world, q, 0))
        self.assertGreater(known, thompson + 1)
        self.assertGreater(thompson, random + 5)
        self.assertAlmostEqual(known, 13.15, delta=0.7)
        self.assertAlmostEqual(thompson, 10.79, delta=0.8)

    def test_the_filter_finds_the_rule_of_a_world_without_noise(self):
        world = HiddenRulesWorld(WorldSettings(noise=0, slip=0), 128, torch.arange(144), 0)
        exact = ExactFilter(world)
        rollout(world, RandomAgent(0), [exact])
        certain = exact.log_posterior.exp()[torch.arange(128), world.task]
        self.assertGreater(float((certain > 0.999).float().mean()), 0.8)  # the rest reach neither goal nor hazard
        self.assertGreater(float(certain.min()), 0.15)  # and know all but which is which
        self.assertLess(float(torch.stack(exact.nll[32:]).mean()), 0.05)

    def test_the_filter_gives_the_same_in_chunks(self):
        def posterior(chunk):
            world = HiddenRulesWorld(WorldSettings(grid=4, lifetime=8), 6, "train", 0)
            exact = ExactFilter(world)
            exact.CHUNK = chunk
            rollout(world, RandomAgent(0), [exact])
            return exact.log_posterior, torch.stack(exact.nll)

        for whole, chunked in zip(posterior(1 << 22), posterior(2 * 144), strict=True):
            torch.testing.assert_close(chunked, whole)

    def test_the_random_agent_repeats_its_actions_by_its_seed(self):
        def actions(seed):
            agent, world = RandomAgent(seed, actions=5), HiddenRulesWorld(WorldSettings(), 4, "validation", 0)
            agent.reset(world.reset())
            return torch.stack([agent.act() for _ in range(30)])

        self.assertTrue(torch.equal(actions(0), actions(0)))
        self.assertFalse(torch.equal(actions(0), actions(1)))
        self.assertEqual(actions(0).unique().tolist(), [0, 1, 2, 3, 4])

    def test_the_filter_that_knows_the_switch_rate_finds_the_new_rule_first(self):
        world = HiddenRulesWorld(WorldSettings(switch=0.01, switch_step=32), 256, "train", 0)
        filters = {"knows": ExactFilter(world), "ignores": ExactFilter(world, switch=0, floor=1e-3)}
        belief = {"knows": [], "ignores": []}
        frames = world.reset()
        agent = RandomAgent(0)
        for listener in (agent, *filters.values()):
            listener.reset(frames)
        for _ in range(64):
            action = agent.act()
            step = world.step(action)
            for name, listener in filters.items():
                listener.observe(action, step)
                right = listener.log_posterior.exp()[torch.arange(256), world.task]
                belief[name].append(float(right.mean()))
            agent.observe(action, step)
        self.assertGreater(belief["knows"][31 + 16], belief["ignores"][31 + 16] + 0.1)
        self.assertGreater(min(belief["knows"][30], belief["ignores"][30]), 0.5)
        self.assertGreater(belief["knows"][-1], 0.5)

    def test_references_keep_their_order_with_all_kinds_of_rules(self):
        settings = replace(EVERYTHING, grid=3, walls=1, lifetime=40, reward_values=(1.0, -1.0), actions=4)
        lifetimes = references(settings, 48, "validation", 0, torch.device("cpu"))
        means = {name: float(one.reward.sum(1).mean()) for name, one in lifetimes.items()}
        self.assertGreater(means["known_rule"], means["thompson"] + 0.5)
        self.assertGreater(means["thompson"], means["random"] + 2)


if __name__ == "__main__":
    unittest.main()
