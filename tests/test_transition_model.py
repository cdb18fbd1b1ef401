"""Effects and their labels, the prior of a lifetime, split moves, reward and termination heads, and the value."""

import unittest
from unittest import mock

import torch

from memory import empty_experience
from tests.shared import make_generator
from transition_model import (
    EffectCache,
    EffectNetwork,
    TransitionModel,
    TransitionSettings,
    Value,
    contact_pairs,
    entropy,
    top_p_filter,
)


def model_of(codes=3, grid=(4, 4), **settings):
    torch.manual_seed(0)
    return TransitionModel(TransitionSettings(**({"num_effects": 6} | settings)), codes, grid, context_dim=5)


def random_codes(n, seed=0):
    return torch.randint(3, (n, 16), generator=make_generator(seed), dtype=torch.uint8)


class TestEffects(unittest.TestCase):
    def test_the_likelihoods_of_all_grids_sum_to_one(self):
        torch.manual_seed(0)
        network = EffectNetwork(TransitionSettings(num_effects=2), codes=2, grid=(2, 2))
        everything = torch.cartesian_prod(*[torch.arange(2, dtype=torch.uint8)] * 4)  # all 16 grids
        total = network.log_likelihood(everything[5:6].expand(16, 4), everything).exp().sum(0)
        torch.testing.assert_close(total, torch.ones(2))

    def test_predictions_are_the_most_likely_grids(self):
        network, codes = model_of().effects, random_codes(20)
        with torch.no_grad():
            network.head.weight.normal_(0, 3, generator=make_generator())
        grids, _ = network.predict(codes)
        for k in range(6):
            best = network.log_likelihood(codes, grids[:, k])[:, k]
            for seed in range(5):
                changed = torch.rand(20, 16, generator=make_generator(seed)) < 0.2
                other = torch.where(changed, random_codes(20, seed), grids[:, k])
                self.assertTrue((network.log_likelihood(codes, other)[:, k] <= best + 1e-4).all())

    def test_effects_with_equal_predictions_are_counted_as_the_first_of_them(self):
        network, codes = model_of().effects, random_codes(4)
        with torch.no_grad():
            network.head.weight.normal_(0, 3, generator=make_generator())
            rows = network.head.weight.view(6, 3, -1)
            rows[4] = rows[1]
            network.head.bias.view(6, 3)[4] = network.head.bias.view(6, 3)[1]
        grids, first = network.predict(codes)
        for state in range(4):
            twins = (grids[state][:, None] == grids[state]).all(-1)
            self.assertEqual(first[state].tolist(), [row.tolist().index(True) for row in twins])
        self.assertTrue((first[:, 4] == first[:, 1]).all())

    def test_before_training_a_grid_most_likely_stays_as_it_is(self):
        codes = random_codes(50)
        grids, _ = model_of().effects.predict(codes)
        self.assertGreater(float((grids == codes[:, None]).float().mean()), 0.9)

    def test_circular_padding_sees_the_other_side_and_where_the_edges_are(self):
        def features(padding, column, changed):
            codes = torch.zeros(1, 16, dtype=torch.uint8)
            codes[0, 4 + column] = 1 + changed
            network = model_of(padding=padding).effects
            return network.hidden(torch.nn.functional.one_hot(codes.long(), 3).float())[0].view(4, 4, -1)

        for padding, seen in (("zeros", False), ("circular", True)):
            with mock.patch("torch.nn.GroupNorm", torch.nn.Identity):  # whose statistics depend on all patches
                one, other = (features(padding, 3, changed) for changed in (0, 1))
            self.assertEqual(not torch.equal(one[1, 0], other[1, 0]), seen)  # the leftmost column
            self.assertFalse(torch.equal(one[1, 3], other[1, 3]))
        with mock.patch("torch.nn.GroupNorm", torch.nn.Identity):
            inner, outer = features("circular", 1, 0)[:, 1], features("circular", 3, 0)[:, 3]
        self.assertFalse(torch.allclose(inner, outer))  # the same surroundings, but for the edge

    def test_an_effect_that_mixes_several_is_split_until_each_is_apart(self):
        """Three effects are modelled by one; its copies are too rare to become different by themselves."""
        torch.manual_seed(0)
        network = EffectNetwork(TransitionSettings(num_effects=3), codes=2, grid=(3, 3))
        generator = make_generator()
        optimizer = torch.optim.Adam(network.parameters(), 1e-2)

        def steps(n):
            before, after = torch.zeros(n, 9, dtype=torch.uint8), torch.zeros(n, 9, dtype=torch.uint8)
            before[:, 4] = 1
            to = torch.tensor([1, 3, 5])[torch.randint(3, (n,), generator=generator)]
            after[torch.arange(n), to] = 1
            return before, after

        with torch.no_grad():  # all three begin alike, so gradients keep them alike
            rows = network.head.weight.view(3, 2, -1)
            rows[1:] = rows[0]
            network.head.bias.view(3, 2)[1:] = network.head.bias.view(3, 2)[0]
            network.marginal.copy_(torch.tensor([0.0, -4, -4]))  # and two of them are hardly used

        def learn(updates):
            for _ in range(updates):
                loss = -(network.log_likelihood(*steps(64)) + network.marginal.log_softmax(0)).logsumexp(-1).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            return float(loss.detach())

        self.assertGreater(learn(100), 1.7)
        splits = 0
        for _ in range(10):
            splits += network.split(*steps(256), generator)
            loss = learn(50)
        self.assertGreaterEqual(splits, 1)
        self.assertLess(loss, 1.2)  # ln 3: one effect of the network for each effect of the data
        self.assertFalse(network.split(*steps(256), generator))


class TestPriorOfALifetime(unittest.TestCase):
    def experience(self, action, segment=None):
        experience = empty_experience(1, len(action), 16, 6, "cpu")
        experience.action[0] = torch.tensor(action)
        if segment:
            experience.segment[0] = torch.tensor(segment)
        return experience

    def test_it_counts_the_other_uses_of_the_same_action(self):
        model = model_of(num_effects=2)
        likelihood = torch.full((1, 4, 2), -50.0)
        likelihood[0, torch.arange(4), torch.tensor([0, 0, 1, 1])] = 0  # certain labels
        prior = model._lifetime_prior(likelihood, self.experience([0, 0, 0, 1]), n_actions=2).exp()[0]
        torch.testing.assert_close(prior[0], torch.tensor([0.5 + 1, 0.5 + 1]) / 3)  # uniform p0, others: 0 and 1
        torch.testing.assert_close(prior[2], torch.tensor([0.5 + 2, 0.5]) / 3)
        torch.testing.assert_close(prior[3], torch.tensor([0.5, 0.5]))  # never used again: nothing known

    def test_counts_stay_within_a_segment(self):
        model = model_of(num_effects=2)
        likelihood = torch.tensor([[[0.0, -50], [0, -50], [-50, 0]]])
        prior = model._lifetime_prior(likelihood, self.experience([0, 0, 0], [0, 0, 1]), n_actions=1).exp()[0]
        torch.testing.assert_close(prior[2], torch.tensor([0.5, 0.5]))

    def test_the_losses_follow_the_schedule_of_phases(self):
        settings = TransitionSettings(warmup_updates=10, annealed_updates=9, split_every=3)
        self.assertEqual([settings.likelihood_exponent(u) for u in (0, 9, 10, 19, 500)], [0, 0, 0.1, 1, 1])
        self.assertEqual([u for u in range(30) if settings.splits_at(u)], [3, 6, 9, 12, 15, 18])
        experience = self.experience([0, 1, 1, 0])
        self.assertEqual(set(model_of().effect_loss(experience, 2, 0)), {"marginal"})
        self.assertEqual(set(model_of().effect_loss(experience, 2, 0.5)), {"marginal", "consistent"})

    def test_effects_learn_without_the_context(self):
        model, experience = model_of(), self.experience([0, 1, 1, 0])
        sum(model.effect_loss(experience, 2, 1).values()).backward()
        self.assertTrue(all(p.grad is None for p in model.contextual_parameters()))
        self.assertTrue(all(p.grad is not None for p in model.effects.parameters()))


class TestContextualHeads(unittest.TestCase):
    def test_contact_pairs_lists_codes_before_and_after(self):
        before, after = torch.tensor([[0, 1, 1, 2]], dtype=torch.uint8), torch.tensor([[0, 1, 2, 2]], dtype=torch.uint8)
        self.assertEqual(contact_pairs(before, after, 3)[0].nonzero()[:, 0].tolist(), [0, 4, 5, 8])

    def test_prior_reward_and_termination_depend_on_the_context(self):
        model = model_of()
        context = torch.randn(2, 3, 5)
        prior = model.log_prior(context).exp()
        torch.testing.assert_close(prior.sum(-1), torch.ones(2, 3))
        self.assertFalse(torch.allclose(prior[0], prior[1]))
        present = contact_pairs(random_codes(2), random_codes(2, 1), 3)
        log_reward, end = model.reward_and_termination(present, context[:, -1])
        torch.testing.assert_close(log_reward.exp().sum(-1), torch.ones(2))
        self.assertEqual((log_reward.shape, end.shape), ((2, 3), (2,)))
        alone, row = model.reward_and_termination(present[1:], context[1:, -1])[0], torch.tensor([1, 0, 1])
        torch.testing.assert_close(alone, log_reward[1:])  # other rows have no influence
        shared, _ = model.reward_and_termination(present[row], context[:, -1], row)
        torch.testing.assert_close(shared, log_reward[row])
        self.assertEqual(model.reward_and_termination(present[:0], context[:, -1], row[:0])[0].shape, (0, 3))

    def test_the_nll_is_that_of_the_mixture_under_the_chosen_action(self):
        model, context, action = model_of(), torch.randn(4, 3, 5), torch.tensor([0, 1, 1, 0])
        likelihood = model.effects.log_likelihood(random_codes(4), random_codes(4, 1))
        by_hand = -(model.log_prior(context)[torch.arange(4), action].exp() * likelihood.exp()).sum(-1).log()
        torch.testing.assert_close(model.nll(likelihood, action, context), by_hand)

    def test_top_p_filter_keeps_the_smallest_set_of_enough_probability(self):
        kept, weight = top_p_filter(torch.tensor([[0.9, 0.09, 0.01], [0.02, 0.49, 0.49]]), 0.95)
        self.assertEqual(kept.tolist(), [[True, True, False], [False, True, True]])
        torch.testing.assert_close(weight.sum(-1), torch.ones(2))
        all_but_zero = top_p_filter(torch.tensor([[0.5, 0.3, 0.2, 0.0]]), 1.0)[0]
        self.assertEqual(all_but_zero.tolist(), [[True, True, True, False]])
        self.assertEqual(top_p_filter(torch.tensor([[0.5, 0.3, 0.2]]), 0.4)[0].tolist(), [[True, False, False]])

    def test_two_hot_weights_have_the_reward_as_their_mean(self):
        weights = model_of(reward_bins=(-1.0, 0.0, 2.0)).two_hot(torch.tensor([-3.0, -1, 0, 0.5, 2, 7]))
        self.assertEqual(weights.tolist(), [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0.75, 0.25], [0, 0, 1], [0, 0, 1]])

    def test_entropy_of_a_certain_and_of_a_fair_outcome(self):
        found = entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        torch.testing.assert_close(found, torch.tensor([0.0, 0.6931]), atol=1e-4, rtol=0)

    def test_bad_settings_are_refused(self):
        for wrong, words in (
            ({"kernel": 4}, "odd"),
            ({"padding": "nil"}, "zeros"),
            ({"reward_bins": (1.0, 0.0)}, "increasing"),
            ({"reward_bins": (1.0,)}, "at least two"),
        ):
            with self.assertRaisesRegex(ValueError, words):
                TransitionSettings(**wrong)
        with self.assertRaisesRegex(
            ValueError, "kernel is 11, but in a grid of 4x5 whose edges wrap it may be at most 9"
        ):
            EffectNetwork(TransitionSettings(kernel=11, padding="circular"), 6, (4, 5))


class TestEffectCache(unittest.TestCase):
    def network(self):
        network = model_of().effects
        torch.nn.init.normal_(network.head.weight, generator=make_generator())
        return network

    def test_it_answers_like_the_network_with_room_for_all_grids_or_for_few(self):
        network = self.network()
        for slots in (1 << 15, 3):
            cache = EffectCache(network, slots)
            for seed in (0, 1, 0):
                codes = random_codes(30, seed)
                for cached, computed in zip(cache(codes), network.predict(codes), strict=True):
                    self.assertTrue(torch.equal(cached, computed))

    def test_a_grid_is_computed_once(self):
        network, codes = self.network(), random_codes(10)
        cache = EffectCache(network)
        first = cache(codes)
        with mock.patch.object(network, "predict", side_effect=AssertionError("computed twice")):
            for cached, computed in zip(cache(codes.flip(0)), first, strict=True):
                self.assertTrue(torch.equal(cached.flip(0), computed))


class TestValue(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)
        self.value = Value(codes=6, grid=(4, 4), context_dim=5, keypoints=3, width=16)
        torch.nn.init.normal_(self.value.state_out.weight)
        torch.nn.init.normal_(self.value.reset_out[-1].weight)
        self.codes = torch.randint(6, (9, 16), generator=make_generator(), dtype=torch.uint8)
        self.context = torch.randn(9, 5, 5, generator=make_generator())

    def test_statistics_are_share_and_centre_of_every_code(self):
        codes = torch.tensor([[0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 2]], dtype=torch.uint8)
        share, y, x = self.value.statistics(codes)[0].unbind(-1)
        torch.testing.assert_close(share[:4], torch.tensor([13, 1, 2, 0]) / 16)
        torch.testing.assert_close((y[1], x[1], y[2], x[2]), tuple(map(torch.tensor, (-1.0, -1 / 3, 2 / 3, 1.0))))

    def test_codes_that_are_absent_change_nothing(self):
        value, pooled = self.value, self.value.pool(self.context)
        statistics = value.statistics(torch.randint(4, (9, 16), generator=make_generator(), dtype=torch.uint8))
        before = value(statistics, pooled)
        with torch.no_grad():
            value.code_features[:, 4:] += 1
        torch.testing.assert_close(value(statistics, pooled), before)
        with torch.no_grad():
            value.code_features[:, :4] += 1
        self.assertFalse(torch.allclose(value(statistics, pooled), before))

    def test_the_order_of_the_actions_changes_nothing_and_the_context_does(self):
        value, order = self.value, torch.tensor([2, 0, 3, 1, 4])
        statistics = value.statistics(self.codes)
        pooled, reordered = value.pool(self.context), value.pool(self.context[:, order])
        torch.testing.assert_close(value(statistics, reordered), value(statistics, pooled))
        torch.testing.assert_close(value.reset_value(reordered), value.reset_value(pooled))
        other = value.pool(self.context.flip(0))
        self.assertFalse(torch.allclose(value(statistics, other), value(statistics, pooled)))

    def test_states_that_share_a_context_equal_states_with_copies_of_it(self):
        value, row = self.value, torch.tensor([1, 0, 1, 1, 0, 0, 0, 1, 1])
        statistics, pooled = value.statistics(self.codes), value.pool(self.context[:2])
        torch.testing.assert_close(value(statistics, pooled, row), value(statistics, pooled[row]))


if __name__ == "__main__":
    unittest.main()
