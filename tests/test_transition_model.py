"""Changes and the effects that they show, how effects are learnt, and the prior, reward and termination heads."""

import unittest
from unittest import mock

import torch

from agent import AgentController, Learner
from context_engine import rollout
from environment import HiddenRulesWorld
from main import build_system, train
from memory import Experience, RunFolder, empty_experience
from tests.shared import make_generator, places_of, temporary_folder, tiny, tiny_system
from transition_model import (
    ABSENT,
    EffectCache,
    EffectNetwork,
    TransitionModel,
    TransitionSettings,
    change_counts,
    change_keys,
    connected,
    contact_pairs,
    distinct,
    find_effects,
    largest_of,
    pair_of,
    top_p_filter,
)


def model_of(codes=3, grid=(4, 4), num_effects=6, **settings):
    torch.manual_seed(0)
    return TransitionModel(TransitionSettings(**settings), codes, grid, context_dim=5, num_effects=num_effects)


def random_codes(n, seed=0):
    return torch.randint(3, (n, 16), generator=make_generator(seed), dtype=torch.uint8)


class TestEffects(unittest.TestCase):
    def test_the_likelihoods_of_all_grids_sum_to_one(self):
        torch.manual_seed(0)
        network = EffectNetwork(TransitionSettings(), codes=2, grid=(2, 2), num_effects=2)
        everything = torch.cartesian_prod(*[torch.arange(2, dtype=torch.uint8)] * 4)  # all 16 grids
        total = network.log_likelihood(everything[5:6].expand(16, 4), everything).exp().sum(0)
        torch.testing.assert_close(total, torch.ones(2))

    def test_predictions_are_the_most_likely_grids(self):
        network, codes = model_of().effects, random_codes(20)
        with torch.no_grad():
            network.head.weight.normal_(0, 3, generator=make_generator())
        grids, *_ = network.predict(codes)
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
        grids, first, key = network.predict(codes)
        self.assertTrue(torch.equal(key, network.key(grids)))
        for state in range(4):
            twins = (grids[state][:, None] == grids[state]).all(-1)
            self.assertEqual(first[state].tolist(), [row.tolist().index(True) for row in twins])
        self.assertTrue((first[:, 4] == first[:, 1]).all())

    def test_grids_that_occur_again_are_computed_once(self):
        network, codes, after = model_of().effects, random_codes(5), random_codes(20, 1)
        repeated = codes[torch.randint(5, (20,), generator=make_generator())]
        with mock.patch.object(network, "hidden", wraps=network.hidden) as hidden:
            likelihood = network.log_likelihood(repeated, after)
            predicted = network.predict_each_once(repeated, network.key(repeated))
        self.assertEqual([len(call.args[0]) for call in hidden.call_args_list], [5, 5])
        alone = [network.log_likelihood(repeated[[i]], after[[i]]) for i in range(20)]
        torch.testing.assert_close(likelihood, torch.cat(alone))
        for once, each in zip(predicted, network.predict(repeated), strict=True):
            self.assertTrue(torch.equal(once, each))

    def test_before_training_a_grid_most_likely_stays_as_it_is(self):
        codes = random_codes(50)
        grids, *_ = model_of().effects.predict(codes)
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


class TestChanges(unittest.TestCase):
    """Grids of 4 x 4 patches; a change is given as {patch: (code before, code after)} on a background of zeros."""

    def grids(self, *changes):
        codes, next_codes = torch.zeros(2, len(changes), 16, dtype=torch.uint8)
        for row, change in enumerate(changes):
            for patch, (before, after) in change.items():
                codes[row, patch], next_codes[row, patch] = before, after
        return codes, next_codes

    def keys(self, *changes):
        codes, next_codes = self.grids(*changes)
        first = (codes != next_codes).byte().argmax(1, keepdim=True).expand(-1, 16)
        return change_keys(codes, next_codes, 4, first).sum(1).tolist()

    def experience(self, steps, segment=None):
        """One lifetime of steps (action, change)."""
        codes, next_codes = self.grids(*(change for _, change in steps))
        experience = empty_experience(1, len(steps), 16, 1, "cpu")
        experience.codes[0], experience.next_codes[0] = codes, next_codes
        experience.action[0] = torch.tensor([action for action, _ in steps])
        if segment:
            experience.segment[0] = torch.tensor(segment)
        return experience

    def test_a_change_has_one_key_wherever_it_lies_and_any_other_another(self):
        right = [{n: (1, 0), n + 1: (0, 1)} for n in (0, 1, 6, 14)]
        others = [
            {},
            {0: (1, 0), 4: (0, 1)},  # down
            {0: (0, 1), 1: (1, 0)},  # left
            {3: (0, 1), 4: (1, 0)},  # from a row's beginning to the end of the row above
            {1: (0, 1), 4: (1, 0)},  # up and to the right
            {2: (0, 1), 4: (1, 0)},
            {0: (0, 1), 5: (1, 0)},
            {0: (2, 0), 1: (0, 2)},  # another colour
            {0: (1, 2), 1: (2, 1)},  # onto another colour
            {0: (1, 0)},
        ]
        keys = self.keys(*right, *others)
        self.assertEqual(len(set(keys[:4])), 1)
        self.assertEqual(len(set(keys[3:])), 1 + len(others))

    def test_what_does_not_change_does_not_count(self):
        one, other = self.keys({0: (1, 0), 1: (0, 1)}, {0: (1, 0), 1: (0, 1), 7: (2, 2), 12: (5, 5)})
        self.assertEqual(one, other)

    def test_connected_patches_touch_at_edges_or_corners(self):
        changed = torch.zeros(2, 16, dtype=torch.bool)
        changed[0, [0, 5, 8, 13, 3, 7]] = True  # a crooked line, and the right edge
        changed[1, [3, 4]] = True  # neighbours in memory alone
        first = connected(changed, (4, 4))
        self.assertEqual(first[0, [0, 5, 8, 13, 3, 7]].tolist(), [0, 0, 0, 0, 3, 3])
        self.assertEqual(first[1, [3, 4]].tolist(), [3, 4])
        winding = torch.ones(1, 16, dtype=torch.bool)
        winding[0, [4, 5, 6, 8, 9, 10]] = False
        self.assertEqual(connected(winding, (4, 4))[winding[:1]].unique().tolist(), [0])

    def test_counts_by_lifetime_action_and_change(self):
        right, down = {5: (1, 0), 6: (0, 1)}, {0: (1, 0), 4: (0, 1)}
        steps = [(0, right)] * 10 + [(1, down)] * 9 + [(1, {})] * 12 + [(0, {3: (4, 5)})] * 7  # the last ones are rare
        counts, lifetime, whole = change_counts(self.experience(steps), 2, (4, 4))
        self.assertEqual(counts.tolist(), [[[0, 10, 0], [12, 0, 9]]])  # the most frequent first
        self.assertTrue((lifetime == 0).all())
        self.assertEqual(whole.tolist(), [[1] * 10 + [2] * 9 + [0] * 12 + [-1] * 7])

    def test_stretches_under_one_rule_count_as_lifetimes(self):
        steps = [(0, {}), (0, {0: (1, 0)})] * 10
        experience = self.experience(steps, [0] * 7 + [1] * 13)
        both = Experience(*(torch.cat([part, part]) for part in experience))
        counts, lifetime, _ = change_counts(both, 1, (4, 4))
        self.assertEqual(lifetime.tolist(), [[0] * 7 + [1] * 13, [2] * 7 + [3] * 13])
        self.assertEqual(counts.sum((1, 2)).tolist(), [7, 13, 7, 13])
        self.assertEqual(sorted(counts[0, 0].tolist()), [3, 4])

    def test_rare_changes_are_counted_by_their_parts(self):
        """The body moves right each time, beside a different change of another code far away."""
        steps = [(0, {0: (1, 0), 1: (0, 1), 12: (0, 2 + n)}) for n in range(9)]
        counts, *_ = change_counts(self.experience(steps), 1, (4, 4))
        self.assertEqual(counts.tolist(), [[[9]]])  # the body's alone; the rest occurred only once each
        counts, *_ = change_counts(self.experience(steps), 1, (4, 4), least=1)
        self.assertEqual(counts.sum(), 9)  # here no change is rare, so each is one whole


SIDE = 6
MOVES = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1], [0, 0]])


def walks(n=96, steps=96, colours=1, actions=4, slip=0.15, wind=0.0, seed=0):
    """Lifetimes of a body in a grid of 6 x 6 that acts at random, and what each action means (n, steps) int64.

    Its colour and what its actions do are those of the lifetime, and so is the direction that the wind blows to. A step
    slips, to any of four sides, or the wind takes it. The edges stop it, and now and then it begins elsewhere.
    """
    random, rows = make_generator(seed), torch.arange(n)
    meaning = torch.stack([torch.randperm(actions, generator=random) for _ in range(n)])
    colour, gust = torch.randint(colours, (n,), generator=random), torch.randint(4, (n,), generator=random)
    experience, true = empty_experience(n, steps, SIDE**2, 1, "cpu"), torch.zeros(n, steps, dtype=torch.int64)
    experience.action.random_(0, actions, generator=random)

    def seen(place):
        codes = torch.zeros(n, SIDE**2, dtype=torch.uint8)
        codes[rows, place[:, 0] * SIDE + place[:, 1]] = (1 + colour).byte()
        return codes

    place = torch.randint(SIDE, (n, 2), generator=random)
    for t in range(steps):
        meant = meaning[rows, experience.action[:, t]]
        slips, blows, resets = torch.rand(3, n, generator=random)
        move = torch.where(slips < slip, torch.randint(4, (n,), generator=random), meant)
        move = torch.where(blows < wind, gust, move)
        experience.codes[:, t] = seen(place)
        place = (place + MOVES[move]).clamp(0, SIDE - 1)
        experience.next_codes[:, t] = seen(place)
        true[:, t] = torch.where(meant == 4, 4 * colours, 4 * colour + meant)
        place = torch.where(resets[:, None] < 0.3, torch.randint(SIDE, (n, 2), generator=random), place)
    return experience, true


def purity(true, found):
    """Which share of steps has the most frequent true effect of its label."""
    table = torch.zeros(int(true.max()) + 1, int(found.max()) + 1)
    table.index_put_((true.flatten(), found.flatten()), torch.ones(()), accumulate=True)
    return float(table.amax(0).sum() / table.sum())


class TestFindEffects(unittest.TestCase):
    def assert_found(self, number, experience, true, actions=4):
        """So many effects, and exactly the true partition of the steps."""
        label, _, found = find_effects(experience, actions, (SIDE, SIDE), 64, seed=0)
        self.assertEqual((found, purity(true, label), purity(label, true)), (number, 1, 1))

    def test_moves_and_standing_still(self):
        for seed in range(2):
            self.assert_found(4 + 1, *walks(seed=seed))

    def test_every_colour_of_the_body_has_moves_of_its_own(self):
        self.assert_found(2 * 4 + 1, *walks(colours=2))

    def test_an_action_that_does_nothing_is_standing_still(self):
        self.assert_found(4 + 1, *walks(actions=5), actions=5)

    def test_rules_that_switch_are_found_stretch_by_stretch(self):
        """Two lifetimes of 96 steps as one."""
        experience, true = walks()
        experience.segment[1::2] = 1
        joined = Experience(*(part.reshape(48, 192, *part.shape[2:]) for part in experience))
        self.assert_found(4 + 1, joined, true.view(48, 192))

    def test_in_wind_actions_that_differ_have_labels_of_their_own(self):
        experience, true = walks(wind=0.3)
        label, *_ = find_effects(experience, 4, (SIDE, SIDE), 64, seed=0)
        self.assertGreater(purity(true, label), 0.98)

    def test_slips_are_told_from_what_the_action_does(self):
        experience, true = walks()
        _, shown, _ = find_effects(experience, 4, (SIDE, SIDE), 64, seed=0)
        place, after = (codes.argmax(-1) for codes in (experience.codes, experience.next_codes))
        inside = ((place // SIDE - 2.5).abs() < 2) & ((place % SIDE - 2.5).abs() < 2)  # all moves differ there
        move = torch.stack([after // SIDE - place // SIDE, after % SIDE - place % SIDE], -1)
        own = (move == MOVES[true]).all(-1)
        self.assertGreater(shown[inside & own].mean(), 0.9)
        self.assertLess(shown[inside & ~own].mean(), 0.3)

    def test_names_of_actions_do_not_count(self):
        experience, true = walks(colours=2)
        renamed = torch.stack([torch.randperm(4, generator=make_generator(n)) for n in range(96)])
        self.assert_found(9, experience._replace(action=renamed.gather(1, experience.action)), true)

    def test_the_seed_decides(self):
        experience, _ = walks(n=24, steps=32, colours=2, wind=0.3)  # too few to be sure of anything
        first, again = (find_effects(experience, 4, (SIDE, SIDE), 64, seed=3) for _ in range(2))
        self.assertTrue(torch.equal(first[0], again[0]))
        self.assertTrue(torch.equal(first[1], again[1]))
        self.assertEqual(first[2], again[2])

    def test_there_are_no_more_than_allowed(self):
        experience, _ = walks(colours=2)
        for most in (2, 3, 6):
            label, _, number = find_effects(experience, 4, (SIDE, SIDE), most, seed=0)
            self.assertEqual((number, int(label.max()) + 2), (most, most))

    def test_without_any_frequent_change_there_is_one_label(self):
        experience = empty_experience(4, 10, 16, 1, "cpu")
        for seed, part in enumerate((experience.codes, experience.next_codes)):
            part.random_(0, 9, generator=make_generator(seed))
        experience.action.random_(0, 4, generator=make_generator(2))
        label, _, number = find_effects(experience, 4, (4, 4), 64, seed=0)
        self.assertEqual((int(label.max()), number), (0, 2))


class TestEffectLoss(unittest.TestCase):
    def experience(self, n=3, steps=10, num_effects=6):
        experience, random = empty_experience(n, steps, 16, num_effects, "cpu"), make_generator(0)
        experience.codes.random_(0, 3, generator=random)
        experience.next_codes.random_(0, 3, generator=random)
        experience.action.random_(0, 2, generator=random)
        label = torch.randint(num_effects, (n, steps), generator=random)
        return experience._replace(posterior=torch.nn.functional.one_hot(label, num_effects).half())

    def likelihood(self, model, experience):
        codes, next_codes = experience.codes.flatten(0, 1), experience.next_codes.flatten(0, 1)
        return model.effects.log_likelihood(codes, next_codes).view(*experience.action.shape, -1).detach()

    def test_labelled_it_is_the_cross_entropy_of_the_labelled_effect(self):
        model, experience = model_of(), self.experience()
        torch.nn.init.normal_(model.effects.marginal, generator=make_generator())
        likelihood, total = self.likelihood(model, experience), 0.0
        for row in range(3):
            for t in range(10):
                total -= float(likelihood[row, t, experience.posterior[row, t].argmax()])
        losses = model.effect_loss(experience, 2, labelled=True)
        self.assertAlmostEqual(losses["consistent"].item(), total / 30, places=4)
        mixture = (likelihood + model.effects.marginal.detach().log_softmax(0)).logsumexp(-1)
        self.assertAlmostEqual(losses["marginal"].item(), -0.1 * float(mixture.mean()), places=4)

    def test_steps_from_where_an_event_followed_weigh_as_much_as_all_others(self):
        """Whatever followed on them: a step from the same grid, without an event, counts with them."""
        model, experience = model_of(), self.experience()
        experience.reward[0, 2], experience.terminated[1, 5] = -1.0, True
        experience.codes[2, 7] = experience.codes[0, 2]
        each = -(experience.posterior * self.likelihood(model, experience)).sum(-1)
        event = experience.terminated | (experience.reward != 0)
        event[2, 7] = True
        expected = 0.5 * each[event].mean() + 0.5 * each[~event].mean()
        found = model.effect_loss(experience, 2, labelled=True)["consistent"]
        torch.testing.assert_close(found.detach(), expected)
        self.assertNotAlmostEqual(float(expected), float(each.mean()), places=2)

    def labels(self, effect, action, compromise):
        """Posteriors of the first lifetime's steps, each explained well by one effect and badly by others.

        The last effect explains every step alike.
        """
        likelihood = torch.full((1, len(effect), 4), -40.0)
        likelihood[0, torch.arange(len(effect)), torch.tensor(effect)] = -0.1
        likelihood[..., 3] = compromise
        member = torch.nn.functional.one_hot(torch.tensor([action])).float()
        return *model_of(num_effects=4).lifetime_labels(likelihood, member), likelihood

    def test_an_action_has_the_effect_that_explains_most_of_its_steps(self):
        """Though two of eight slip, so badly that the product of likelihoods is highest under an effect between."""
        label, odds, likelihood = self.labels([0] * 6 + [1] * 2 + [2] * 4, [0] * 8 + [1] * 4, compromise=-9.0)
        self.assertEqual(int(likelihood[0, :8].sum(0).argmax()), 3)
        self.assertGreater(float(label[0, :8, 0].min()), 0.99)
        self.assertGreater(float(label[0, 8:, 2].min()), 0.99)
        torch.testing.assert_close(label.sum(-1), torch.ones(1, 12))
        self.assertGreater(float(odds[0, 0, 1]), float(odds[0, 0, [0, 2]].max()))  # slips have that effect

    def test_the_background_is_larger_where_more_steps_slip(self):
        share = []
        for effect in ([0] * 12, [0] * 9 + [1] * 3):
            _, odds, _ = self.labels(effect, [0] * 12, compromise=-40.0)
            share.append(float(odds.logsumexp(-1).sigmoid()))
        self.assertLess(share[0] + 0.05, share[1])
        self.assertLessEqual(share[1], 0.5)

    def test_unlabelled_it_is_the_likelihood_with_slips_under_the_labels(self):
        model, experience = model_of(), self.experience()
        torch.nn.init.normal_(model.effects.head.weight, std=0.3, generator=make_generator())
        experience.segment[:, 5:] = 1
        likelihood = self.likelihood(model, experience)
        group = experience.segment.long() * 2 + experience.action
        label, odds = model.lifetime_labels(likelihood, torch.nn.functional.one_hot(group).float())
        same, total = group[..., None] == group[:, None], 0.0
        spread = (label[:, :, None] - label[:, None]).abs().amax(-1)
        self.assertLess(float(spread[same].max()), 1e-6)  # equal labels where action and rule are
        self.assertGreater(float(spread[~same].max()), 0.1)
        for row in range(3):
            background = (likelihood[row].exp() * odds[row].exp()).sum(-1, keepdim=True)
            slips = (likelihood[row].exp() + background).log()
            total -= float((label[row] * (0.98 * slips + 0.02 * likelihood[row])).sum())
        found = model.effect_loss(experience, 2)["consistent"]
        self.assertAlmostEqual(found.item(), total / 30, places=3)

    def test_effects_learn_without_the_context(self):
        for labelled in (True, False):
            model, experience = model_of(), self.experience()
            sum(model.effect_loss(experience, 2, labelled).values()).backward()
            self.assertTrue(all(p.grad is None for p in model.contextual_parameters()))
            self.assertTrue(all(p.grad is not None for p in model.effects.parameters()))

    def test_the_marginal_begins_with_the_shares_of_the_labels(self):
        network = model_of(num_effects=3).effects
        network.init_marginal(torch.tensor([[0] * 60, [1] * 60]))
        share = network.marginal.softmax(0)
        torch.testing.assert_close(share, torch.tensor([60.0, 60, 7]) / 127)  # effect 2 has no label yet


class TestNumberOfEffects(unittest.TestCase):
    def test_everything_is_as_large_as_the_number(self):
        system = tiny_system(7)
        grids, first, _ = system.transition.effects.predict(random_codes(4))
        self.assertEqual((grids.shape, first.shape), ((4, 7, 16), (4, 7)))
        self.assertEqual(system.transition.log_prior(torch.zeros(4, 4, 32)).shape, (4, 4, 7))
        self.assertEqual((system.transition.effects.num_effects, system.engine.num_effects), (7, 7))
        agent = AgentController(system)
        rollout(HiddenRulesWorld(system.settings.world, 3, "validation", 0), agent)
        self.assertEqual(agent.memory.experience().posterior.shape, (3, 12, 7))

    def test_the_new_layers_depend_on_the_seed_alone(self):
        one = tiny_system(7)
        torch.manual_seed(99)
        other = build_system(tiny())
        torch.rand(5)
        for number in (3, 7):
            other.set_num_effects(number)
        self.assertTrue(torch.equal(one.transition.effects.head.weight, other.transition.effects.head.weight))
        self.assertTrue(torch.equal(one.engine.world_event.weight, other.engine.world_event.weight))
        tokens = build_system(tiny(context={"token_scale": 10.0}))
        tokens.set_num_effects(7)
        torch.testing.assert_close(tokens.engine.own_effect.weight, 2 * one.engine.own_effect.weight)

    def test_weights_of_another_number_are_loaded(self):
        trained, system = tiny_system(5), tiny_system(8)
        states = {name: module.state_dict() for name, module in trained.modules().items()}
        system.load(states)
        for name, module in system.modules().items():
            for key, tensor in module.state_dict().items():
                self.assertTrue(torch.equal(tensor, states[name][key]), f"{name}.{key}")
        self.assertIs(system.planner.transition, system.transition)

    def optimized(self, learner):
        """Ids of the parameters that the learner's optimizers learn."""
        groups = [group for optimizer in learner.optimizers.values() for group in optimizer.param_groups]
        return sorted(id(p) for group in groups for p in group["params"])

    def learnable(self, learner):
        modules = learner.system.modules()
        return sorted(id(p) for name, one in modules.items() for p in one.parameters() if name != "target_value")

    def test_optimizers_learn_the_new_layers(self):
        learner = Learner(build_system(tiny()))
        train(learner, until=7)  # the first update of the effects
        number = learner.system.transition.effects.num_effects
        self.assertGreater(number, 1)
        self.assertEqual(int(learner.metrics["effects/found"]), number)
        self.assertEqual(learner.store.experience.posterior.shape[-1], number)
        self.assertEqual(self.optimized(learner), self.learnable(learner))
        run = RunFolder(temporary_folder())
        with run.locked(learner.settings):
            run.save(learner)
        warm = Learner(build_system(tiny()))
        warm.warm_start(run)
        self.assertEqual(warm.system.transition.effects.num_effects, number)
        self.assertEqual(self.optimized(warm), self.learnable(warm))

    def test_labels_are_learnt_first_and_kept_until_then(self):
        learner, seen = Learner(build_system(tiny())), []
        loss = TransitionModel.effect_loss

        def watched(model, experience, n_actions, labelled=False):
            seen.append((labelled, bool((experience.posterior.sort(-1)[0][..., :-1] == 0).all())))
            return loss(model, experience, n_actions, labelled)

        with mock.patch.object(TransitionModel, "effect_loss", watched):
            train(learner, until=16)
        self.assertEqual([labelled for labelled, _ in seen], [True] * 8 + [False])
        self.assertTrue(all(one_hot for _, one_hot in seen[:8]))
        self.assertFalse(seen[8][1])  # in adaptation they are posteriors again


class TestContextualHeads(unittest.TestCase):
    def test_contact_pairs_lists_codes_before_and_after(self):
        before, after = torch.tensor([[0, 1, 1, 2]], dtype=torch.uint8), torch.tensor([[0, 1, 2, 2]], dtype=torch.uint8)
        pairs = contact_pairs(pair_of(before, after, 3), 3)
        self.assertEqual(pairs[0].nonzero()[:, 0].tolist(), [0, 4, 5, 8])

    def test_prior_reward_and_termination_depend_on_the_context(self):
        model = model_of()
        context = torch.randn(2, 3, 5)
        prior = model.log_prior(context).exp()
        torch.testing.assert_close(prior.sum(-1), torch.ones(2, 3))
        self.assertFalse(torch.allclose(prior[0], prior[1]))
        torch.nn.init.normal_(model.place_out[-1].weight)
        now, own = (random_codes(2), random_codes(2, 1)), torch.arange(2)
        known = (places_of(2, now[0].shape[1], 3), model.modulate_heads(context[:, -1]))
        log_reward, end = model.reward_and_termination(*now, *known, own)
        torch.testing.assert_close(log_reward.exp().sum(-1), torch.ones(2))
        self.assertEqual((log_reward.shape, end.shape), ((2, 3), (2,)))
        alone = model.reward_and_termination(*(x[1:] for x in now), *known, own[1:])[0]
        torch.testing.assert_close(alone, log_reward[1:])  # other rows have no influence
        row = torch.tensor([1, 0, 1])
        shared, _ = model.reward_and_termination(*(x[row] for x in now), *known, row)
        torch.testing.assert_close(shared, log_reward[row])
        none = model.reward_and_termination(*(x[:0] for x in now), *known, row[:0])[0]
        self.assertEqual(none.shape, (0, 3))

    def test_what_fills_the_grid_or_never_changes_says_nothing_where_it_stays(self):
        """Codes: 0 floor, 1 a body that moves, 2 a wall, 3 never seen."""
        model, experience = model_of(codes=4), empty_experience(1, 2, 16, 1, "cpu")
        experience.codes[..., 5], experience.next_codes[..., 6] = 1, 1
        experience.codes[..., 0], experience.next_codes[..., 0] = 2, 2
        model.find_telling_pairs(experience)
        self.assertEqual((~model.telling).nonzero()[:, 0].tolist(), [0 * 4 + 0, 2 * 4 + 2])
        torch.nn.init.normal_(model.place_out[-1].weight)
        now, places = (experience.codes[0, :1], experience.next_codes[0, :1]), places_of(1, 16, 4)
        modulation, row = model.modulate_heads(torch.zeros(1, 5)), torch.tensor([0])
        before = model.reward_and_termination(*now, places, modulation, row)[0]
        for place, changes in ((0, False), (1, False), (6, True)):
            changed = places._replace(sums=places.sums.index_fill(1, torch.tensor(place), 3.0))
            after = model.reward_and_termination(*now, changed, modulation, row)[0]
            self.assertEqual(not torch.equal(before, after), changes)

    def test_a_step_that_effects_explain_alike_leaves_open_which_it_was(self):
        model, context, action = model_of(), torch.randn(4, 3, 5, requires_grad=True), torch.tensor([0, 1, 1, 0])
        alike = model.effect_posterior(torch.full((4, 6), -3.0))
        own = context[torch.arange(4), action]
        model.prior_loss(own, alike).sum().backward()
        torch.testing.assert_close(context.grad, torch.zeros_like(context), atol=1e-6, rtol=0)
        likelihood = torch.randn(4, 6)
        loss = model.prior_loss(own, model.effect_posterior(likelihood))
        nll = model.nll(likelihood, action, context)
        torch.testing.assert_close(loss, nll + likelihood.logsumexp(-1))

    def test_the_nll_is_that_of_the_mixture_under_the_chosen_action(self):
        model, context, action = model_of(), torch.randn(4, 3, 5), torch.tensor([0, 1, 1, 0])
        likelihood = model.effects.log_likelihood(random_codes(4), random_codes(4, 1))
        by_hand = -(model.log_prior(context)[torch.arange(4), action].exp() * likelihood.exp()).sum(-1).log()
        torch.testing.assert_close(model.nll(likelihood, action, context), by_hand)

    def test_top_p_filter_keeps_the_smallest_set_of_enough_probability(self):
        kept = top_p_filter(torch.tensor([[0.9, 0.09, 0.01], [0.02, 0.49, 0.49]]), 0.95)
        torch.testing.assert_close(kept, torch.tensor([[10 / 11, 1 / 11, 0], [0, 0.5, 0.5]]))
        everything = torch.tensor([[0.5, 0.3, 0.2, 0.0]])
        torch.testing.assert_close(top_p_filter(everything, 1.0), everything)
        self.assertEqual(top_p_filter(everything, 0.4).tolist(), [[1, 0, 0, 0]])

    def test_the_largest_features_of_every_group(self):
        features = torch.tensor([[1.0, -3], [-5, 2], [4, -9]])
        found = largest_of(features, torch.tensor([1, 0, 1, 2]), torch.tensor([0, 1, 1, 3]), 4)
        self.assertEqual(found.tolist(), [[-5, 2], [1, 2], [ABSENT, ABSENT], [4, -9]])

    def test_distinct_keys_where_they_first_occur(self):
        first, which = distinct(torch.tensor([7, 3, 7, -1, 3]))
        self.assertEqual((first.tolist(), which.tolist()), ([3, 1, 0], [2, 1, 2, 0, 1]))
        self.assertEqual([len(part) for part in distinct(torch.zeros(0, dtype=torch.int64))], [0, 0])

    def test_two_hot_weights_have_the_reward_as_their_mean(self):
        weights = model_of(reward_bins=(-1.0, 0.0, 2.0)).two_hot(torch.tensor([-3.0, -1, 0, 0.5, 2, 7]))
        self.assertEqual(weights.tolist(), [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0.75, 0.25], [0, 0, 1], [0, 0, 1]])

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
            EffectNetwork(TransitionSettings(kernel=11, padding="circular"), 6, (4, 5), 2)


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
                for cached, computed in zip(cache(codes, network.key(codes)), network.predict(codes), strict=True):
                    self.assertTrue(torch.equal(cached, computed))

    def test_a_grid_is_computed_once(self):
        network, codes = self.network(), random_codes(10)
        cache = EffectCache(network)
        first = cache(codes, network.key(codes))
        with mock.patch.object(network, "predict", side_effect=AssertionError("computed twice")):
            for cached, computed in zip(cache(codes.flip(0), network.key(codes.flip(0))), first, strict=True):
                self.assertTrue(torch.equal(cached.flip(0), computed))


if __name__ == "__main__":
    unittest.main()
