"""The context engine: sequence equals steps, memory decides the belief, symmetry of the actions, losses."""

import unittest
from dataclasses import replace

import torch

from context_engine import AppearanceEngine, ContextInferenceEngine, ContextSettings
from memory import EpisodicMemory, Experience, WorldStep
from transition_model import TransitionModel, TransitionSettings
from tests.shared import make_generator

A, K, C, S, B, T = 4, 6, 3, 16, 5, 9


def engine_of():
    torch.manual_seed(0)
    engine = ContextInferenceEngine(ContextSettings(hidden=8, context=5), A, K, C)
    torch.nn.init.normal_(engine.initial)
    return engine


def experience_of(seed=0, segments=1):
    draw = make_generator(seed)
    codes = torch.randint(C, (2, B, T, S), generator=draw, dtype=torch.uint8)
    posterior = torch.rand(B, T, K, generator=draw).softmax(-1)
    action = torch.randint(A, (B, T), generator=draw)
    reward = torch.randint(-1, 2, (B, T), generator=draw).float()
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

    def test_engine_of_memory_is_the_belief_carried(self):
        engine, experience = engine_of(), experience_of()
        memory = EpisodicMemory(B, T, S, K)
        belief, none = engine.initial_belief(B), torch.zeros(B, dtype=torch.bool)
        for t in range(5):
            now = Experience(*(part[:, t] for part in experience))
            memory.append(*now[:4], None, WorldStep(None, now.reward, now.terminated, none, None))
            belief = engine.step(belief, memory.latest())
        torch.testing.assert_close(engine(memory), belief)

    def test_the_belief_never_sees_the_future(self):
        engine, one, other = engine_of(), experience_of(0), experience_of(1)
        mixed = Experience(*(torch.cat([a[:, :4], b[:, 4:]], 1) for a, b in zip(one, other)))
        torch.testing.assert_close(engine.sequence(one)[:, :5], engine.sequence(mixed)[:, :5])
        self.assertFalse(torch.allclose(engine.sequence(one)[:, 5], engine.sequence(mixed)[:, 5]))

    def test_relabelling_the_actions_relabels_the_belief(self):
        engine, experience = engine_of(), experience_of()
        relabel = torch.tensor([2, 0, 3, 1])
        beliefs = engine.sequence(experience)
        relabelled = engine.sequence(experience._replace(action=relabel[experience.action]))
        torch.testing.assert_close(relabelled[:, :, relabel], beliefs[:, :, :A])
        torch.testing.assert_close(relabelled[:, :, A], beliefs[:, :, A])

    def test_without_reward_what_was_touched_says_nothing_about_worth(self):
        engine, experience = engine_of(), experience_of()
        quiet = experience._replace(reward=torch.zeros(B, T))
        elsewhere = quiet._replace(next_codes=quiet.codes)
        torch.testing.assert_close(engine.sequence(quiet), engine.sequence(elsewhere))
        loud = experience._replace(reward=torch.ones(B, T))
        self.assertFalse(torch.allclose(engine.sequence(loud), engine.sequence(loud._replace(next_codes=loud.codes))))


class TestLoss(unittest.TestCase):
    def test_terms_are_named_and_reach_what_they_teach(self):
        engine, experience = engine_of(), experience_of()
        transition = TransitionModel(TransitionSettings(num_effects=K), C, (4, 4), 5)
        losses, beliefs = engine.loss(experience, transition, make_generator())
        self.assertEqual(set(losses), {"filter", "decoding", "reward", "termination"})
        self.assertFalse(beliefs.requires_grad)
        sum(losses.values()).backward()
        for parameter in [*engine.parameters(), *transition.contextual_parameters()]:
            self.assertIsNotNone(parameter.grad)
        self.assertTrue(all(p.grad is None for p in transition.effects.parameters()))

    def test_the_filter_term_by_hand(self):
        engine, experience = engine_of(), experience_of()
        transition = TransitionModel(TransitionSettings(num_effects=K), C, (4, 4), 5)
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
        elsewhen, same = engine_of()._other_times(experience.segment, row, make_generator())
        step = torch.arange(B * T) % T
        self.assertTrue(torch.equal(same.bool(), elsewhen // 3 == step // 3))
        self.assertTrue(same.bool().any() and not same.bool().all())

    def test_without_hindsight_every_target_is_at_its_own_time(self):
        engine, experience = engine_of(), experience_of(segments=3)
        engine.settings = replace(engine.settings, decoding_weight=0.0)
        row, step = torch.arange(B).repeat_interleave(T), torch.arange(B * T) % T
        for asked in (None, step):
            at, valid = engine._other_times(experience.segment, row, make_generator(), asked)
            self.assertTrue(torch.equal(at, step) and bool(valid.all()))
        losses, _ = engine.loss(experience, TransitionModel(TransitionSettings(num_effects=K), C, (4, 4), 5), make_generator())
        self.assertEqual(float(losses["decoding"].detach()), 0)
        self.assertGreater(float(losses["reward"].detach()), 0)

    def test_a_lifetime_without_events_has_a_loss(self):
        engine, experience = engine_of(), experience_of()
        quiet = experience._replace(reward=torch.zeros(B, T), terminated=torch.zeros(B, T, dtype=torch.bool))
        losses, _ = engine.loss(quiet, TransitionModel(TransitionSettings(num_effects=K), C, (4, 4), 5), make_generator())
        self.assertTrue(torch.isfinite(sum(losses.values())))


class TestAppearance(unittest.TestCase):
    def test_pictures_one_by_one_give_what_the_sequence_gives(self):
        torch.manual_seed(0)
        engine, patches = AppearanceEngine(ContextSettings(appearance=4), pixels=12), torch.rand(3, 7, 9, 12) - 0.5
        contexts, last = engine.sequence(patches)
        self.assertEqual((contexts.shape, last.shape), ((3, 7, 32), (1, 3, 64)))
        state = None
        for t in range(7):
            one, state = engine.sequence(patches[:, t : t + 1], state)
            torch.testing.assert_close(one[:, 0], contexts[:, t])
        self.assertEqual(engine.unseen().shape, (32,))

    def test_where_things_lie_says_nothing_of_how_they_look(self):
        engine, patches = AppearanceEngine(ContextSettings(appearance=4), pixels=12), torch.rand(2, 3, 9, 12) - 0.5
        shuffled = patches[:, :, torch.randperm(9)]
        torch.testing.assert_close(engine.sequence(patches)[0], engine.sequence(shuffled)[0])


if __name__ == "__main__":
    unittest.main()
