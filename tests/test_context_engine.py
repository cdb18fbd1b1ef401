"""The belief, its losses and its symmetry in the actions; the inferred appearance; the exact filter and references."""

import unittest
from dataclasses import replace

import torch

from agent import RandomAgent, rollout
from context_engine import (
    ActionValues,
    AppearanceEngine,
    ContextInferenceEngine,
    ContextSettings,
    ExactFilter,
    KnownRuleAgent,
    ThompsonAgent,
)
from environment import HiddenRulesWorld, WorldSettings
from memory import EpisodicMemory, Experience, WorldStep
from tests.shared import make_generator
from transition_model import TransitionModel, TransitionSettings

A, K, C, S, B, T = 4, 6, 3, 16, 5, 9


def engine_of():
    torch.manual_seed(0)
    engine = ContextInferenceEngine(ContextSettings(hidden=8, context=5), A, K, C)
    torch.nn.init.normal_(next(p for p in engine.parameters() if p.shape == (2, 8)))  # the initial belief
    return engine


def transition_model():
    return TransitionModel(TransitionSettings(num_effects=K), C, (4, 4), 5)


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
        self.assertEqual(beliefs.shape, (B, T + 1, A + 1, 8))
        belief = engine.initial_belief(B)
        torch.testing.assert_close(beliefs[:, 0], belief)
        for t in range(T):
            belief = engine.step(belief, Experience(*(part[:, t : t + 1] for part in experience)))
            torch.testing.assert_close(beliefs[:, t + 1], belief)

    def test_the_belief_of_a_memory_equals_the_one_carried_along(self):
        engine, experience = engine_of(), experience_of()
        memory = EpisodicMemory(B, T, S, K)
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
                total -= float((experience.posterior[row, t] * log_prior.detach()).sum())
        losses, _ = engine.loss(experience, transition, make_generator())
        self.assertAlmostEqual(losses["filter"].item(), total / (B * T), places=4)

    def test_targets_stay_within_their_segment(self):
        experience = experience_of(segments=3)
        row = torch.arange(B).repeat_interleave(T)
        other_time, same = engine_of()._other_times(experience.segment, row, make_generator())
        step = torch.arange(B * T) % T
        self.assertTrue(torch.equal(same.bool(), other_time // 3 == step // 3))
        self.assertTrue(same.bool().any() and not same.bool().all())

    def test_without_decoding_every_target_is_at_its_own_time(self):
        engine, experience = engine_of(), experience_of(segments=3)
        engine.settings = replace(engine.settings, decoding_weight=0.0)
        row, step = torch.arange(B).repeat_interleave(T), torch.arange(B * T) % T
        for asked in (None, step):
            at, valid = engine._other_times(experience.segment, row, make_generator(), asked)
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


if __name__ == "__main__":
    unittest.main()
