"""The VAE: shapes, the evidence lower bound, codes, modulation by the context; and the statistics of evaluations."""

import unittest
from unittest import mock

import numpy as np
import torch

from environment import HiddenRulesWorld, WorldSettings
from tests.shared import make_generator
from transition_model import ABSENT
from world_model import (
    VAE,
    Trajectories,
    VAESettings,
    Value,
    belief_nll,
    bootstrap_ci,
    compare,
    distinct_patches,
    kinds_of_patch,
    mean,
    picture_effects,
    probability_of_improvement,
    ratio_of_means,
    report,
    statistics,
    summary,
)


def frames_of(noise=0.1, batch=64):
    return HiddenRulesWorld(WorldSettings(noise=noise), batch, "train", 0).reset()


def vae_of(**settings):
    torch.manual_seed(0)
    return VAE(VAESettings(**({"patch": 4} | settings)), (24, 24, 3), context_dim=5)


class TestVAE(unittest.TestCase):
    def test_one_code_for_each_patch_and_back_to_a_frame(self):
        vae, context = vae_of(), torch.randn(64, 5)
        codes = vae.encode(frames_of(), context)
        self.assertEqual((codes.shape, codes.dtype, vae.grid), ((64, 36), torch.uint8, (6, 6)))
        self.assertEqual(vae.decode(codes, context).shape, (64, 24, 24, 3))

    def test_a_patch_affects_only_its_own_code_and_its_own_pixels(self):
        vae, context = vae_of(), torch.zeros(1, 5)
        frames = frames_of(noise=0, batch=1)
        changed = frames.clone()
        changed[:, 8:12, 16:20] = 200  # row 2, column 4
        differs = (vae.logits(frames, context) != vae.logits(changed, context)).any(-1)[0]
        self.assertEqual(differs.nonzero()[:, 0].tolist(), [2 * 6 + 4])
        codes = torch.zeros(1, 36, dtype=torch.uint8)
        other = codes.clone()
        other[0, 2 * 6 + 4] = 1
        differs = (vae.decode(codes, context) != vae.decode(other, context)).any(-1)[0].nonzero()
        self.assertEqual((differs.amin(0).tolist(), differs.amax(0).tolist()), ([8, 16], [11, 19]))

    def test_the_context_changes_nothing_at_first_and_can_be_learnt(self):
        vae, frames = vae_of(), frames_of()
        one, other = torch.randn(64, 5), torch.randn(64, 5)
        self.assertTrue(torch.equal(vae.logits(frames, one), vae.logits(frames, other)))
        sum(vae.loss(frames, one).values()).backward()
        for layer in (vae.encoder_film, vae.decoder_film):
            self.assertGreater(layer.generator.weight.grad.abs().sum(), 0)

    def test_the_terms_of_the_bound_equal_those_computed_by_hand(self):
        vae, frames, context = vae_of(obs_std=0.5), frames_of(), torch.zeros(64, 5)
        q = vae.logits(frames, context).softmax(-1)
        by_hand = (q * (q / (1 / 6)).log()).sum((1, 2)).mean()  # the prior is uniform at the start
        loss = vae.loss(frames, context)
        torch.testing.assert_close(loss["kl"], by_hand)
        with torch.no_grad():
            for layer in (vae.decoder_out[-1].weight, vae.decoder_out[-1].bias):
                layer.zero_()  # reconstructs mid-grey
        expected = ((frames / 255.0 - 0.5) ** 2).sum((1, 2, 3)).mean() / (2 * 0.25)
        torch.testing.assert_close(vae.loss(frames, context)["reconstruction"], expected)

    def test_the_reconstruction_term_is_the_exact_sum_over_codes(self):
        vae, frames, context = vae_of(obs_std=0.5), frames_of(batch=3), torch.randn(3, 5)
        torch.nn.init.normal_(vae.decoder_film.generator.weight)
        q, expected = vae.logits(frames, context).softmax(-1), 0.0
        for code in range(6):
            rebuilt = vae.decode(torch.full((3, 36), code, dtype=torch.uint8), context)
            error = (rebuilt - frames / 255).square().view(3, 6, 4, 6, 4, 3).sum((2, 4, 5)).flatten(1)  # of each patch
            expected += (q[..., code] * error).sum(1).mean() / (2 * 0.25)
        loss = vae.loss(frames, context)
        torch.testing.assert_close(loss["reconstruction"], expected)
        sum(loss.values()).backward()
        self.assertGreater(float(vae.encoder_in.weight.grad.abs().sum()), 0)

    def test_initialisation_gives_every_colour_its_own_code_on_every_seed(self):
        for seed in range(5):
            torch.manual_seed(seed)
            vae, frames = VAE(VAESettings(patch=4), (24, 24, 3), 5), frames_of()
            vae.init_codes_kmeans(vae.patches(frames).flatten(0, 1))
            codes = vae.encode(frames, torch.zeros(64, 5))
            clear = frames_of(noise=0).view(64, 6, 4, 6, 4, 3)[:, :, 0, :, 0].flatten(1, 2)  # (64, 36, 3), same places
            colours = clear.flatten(0, 1).unique(dim=0)
            kinds = {tuple(colour): set(codes[(clear == colour).all(-1)].tolist()) for colour in colours}
            self.assertEqual(len(kinds), 4)
            self.assertEqual([len(of_kind) for of_kind in kinds.values()], [1] * 4)
            self.assertEqual(len(set().union(*kinds.values())), 4)

    def test_kinds_are_equal_patches_where_there_is_no_noise_and_clusters_where_there_is(self):
        vae = vae_of()
        for noise in (0.0, 0.05, 0.1, 0.15):
            patches = vae.patches(frames_of(noise=noise, batch=256)).flatten(0, 1)
            self.assertEqual(len(kinds_of_patch(patches)), 4, noise)
        close = torch.zeros(200, 48)
        close[:, 0] = torch.arange(200) / 255  # the least that pixels can differ
        self.assertEqual(len(kinds_of_patch(close)), 200)

    def test_a_rare_kind_gets_a_code_of_its_own_beside_a_frequent_one_that_is_close(self):
        for seed in range(5):
            torch.manual_seed(seed)
            vae = VAE(VAESettings(patch=4, num_codes=20), (24, 24, 3), 5)
            frames = torch.zeros(500, 24, 24, 3, dtype=torch.uint8)
            frames[0, :4, :4] = 20  # once, and much closer to the background than the other kinds are to each other
            frames[1, :4, :4] = torch.randint(256, (4, 4, 3))
            for kind in range(17):
                frames[2 + kind, 4:8, :4, kind % 3] = 50 + 12 * kind
            patches = distinct_patches(map(vae.cut, frames.split(100)))
            self.assertEqual(len(patches), 20)
            patches = patches / 255 - 0.5
            vae.init_codes_kmeans(patches)
            found = vae.count_kinds(patches)
            self.assertEqual((int(found["vae/kinds"]), int(found["vae/shared_codes"])), (20, 0))
            torch.nn.init.zeros_(vae.encoder_out[-1].weight)  # now all get the most likely code
            self.assertEqual(int(vae.count_kinds(patches)["vae/shared_codes"]), 20)

    def test_of_many_different_patches_a_sample_is_taken(self):
        vae, frames = vae_of(), frames_of(batch=16)
        self.assertEqual(len(distinct_patches([vae.cut(frames)])), 16 * 36)
        some = distinct_patches([vae.cut(frames), None], most=100)  # the second block is not read
        self.assertTrue(80 <= len(some) <= 100)
        self.assertTrue(torch.isin(some, vae.cut(frames)).all())

    def perfect_vae(self):
        """A VAE, frames and contexts for it, their codes, and what its decoder makes of each code: its very patches."""
        vae, frames, context = vae_of(obs_std=0.1), frames_of(noise=0), torch.zeros(64, 5)
        vae.init_codes_kmeans(vae.patches(frames).flatten(0, 1))
        codes = vae.encode(frames, context)
        self.assertEqual(len(codes.unique()), 4)
        clear, wanted = vae.patches(frames), torch.zeros(6, 48)
        for code in codes.unique().tolist():
            wanted[code] = clear[codes == code][0]
        vae._decode_patches = lambda one_hot, context: one_hot @ wanted
        return vae, frames, context, codes, wanted

    def test_codes_that_others_can_stand_for_are_dropped(self):
        vae, frames, context, before, wanted = self.perfect_vae()
        used = before.unique().tolist()
        self.assertEqual(vae.drop_codes(frames, context), 0)
        self.assertTrue(torch.equal(vae.encode(frames, context), before))

        common, *_, rarest = sorted(used, key=lambda code: -int((before == code).sum()))
        # Now two codes are rebuilt alike, halfway between both kinds of patch.
        wanted[[common, rarest]] = (wanted[common] + wanted[rarest]) / 2
        self.assertEqual(vae.drop_codes(frames, context), 1)
        after = vae.encode(frames, context)
        self.assertEqual(set(after.unique().tolist()), set(used) - {rarest})
        self.assertTrue(torch.equal(after[before != rarest], before[before != rarest]))
        with mock.patch.object(vae, "_square_errors", lambda *_: torch.zeros(64, 36, 6)):
            self.assertEqual(vae.drop_codes(frames, context), 2)  # one remains
        dropped = (vae.encoder_out[-1].bias == ABSENT).nonzero().flatten()
        self.assertEqual(set(dropped.tolist()), set(used) - {common})
        self.assertFalse(torch.isin(vae.encode(frames, context), dropped).any())
        restored = vae_of(obs_std=0.1)
        restored.load_state_dict(vae.state_dict())
        self.assertTrue(torch.equal(restored.encode(frames, context), vae.encode(frames, context)))

    def test_a_code_that_two_kinds_share_beside_their_own_is_dropped(self):
        vae, frames, context, codes, wanted = self.perfect_vae()
        first, second, *_ = sorted(codes.unique().tolist(), key=lambda code: int((codes == code).sum()))
        spare = next(code for code in range(6) if code not in codes.unique())
        wanted[spare] = (wanted[first] + wanted[second]) / 2
        shared = ((codes == first) | (codes == second)) & (torch.arange(64) % 4 == 0)[:, None]
        logits = torch.nn.functional.one_hot(torch.where(shared, spare, codes.long()), 6).float()
        with mock.patch.object(vae, "logits", lambda *_: logits):
            self.assertEqual(vae.drop_codes(frames, context), 1)
        self.assertEqual((vae.encoder_out[-1].bias == ABSENT).nonzero().flatten().tolist(), [spare])

    def test_bad_sizes_are_refused(self):
        with self.assertRaisesRegex(ValueError, "vae.patch is 5.*24x24.*such as 24"):
            VAE(VAESettings(patch=5), (24, 24, 3), 5)
        with self.assertRaisesRegex(ValueError, "vae.patch is 0"):
            VAE(VAESettings(), (24, 24, 3), 5)
        with self.assertRaisesRegex(ValueError, "uint8, not"):
            vae_of().encode(torch.zeros(1, 24, 24, 3), torch.zeros(1, 5))


def lifetimes(reward: list[list[float]], truncated: list[list[bool]] | None = None) -> Trajectories:
    """Trajectories in which every reward ends an episode."""
    rewards = torch.tensor(reward, dtype=torch.float32)
    ended = torch.zeros_like(rewards).bool() if truncated is None else torch.tensor(truncated)
    return Trajectories(rewards, rewards != 0, ended, torch.zeros_like(rewards).long())


class TestStatistics(unittest.TestCase):
    def test_the_summary_of_known_lifetimes(self):
        reward = torch.zeros(8, 4)
        reward[:, 1] = torch.tensor([1, 1, 1, 1, 1, 1, 1, -1.0])
        truncated = torch.zeros(8, 4, dtype=torch.bool)
        truncated[:2, 3] = True
        result = summary(Trajectories(reward, reward != 0, truncated, torch.zeros(8, 4, dtype=torch.int64)))
        self.assertEqual((result["return_mean"], result["return_iqm"]), (0.75, 1.0))
        self.assertEqual(result["by_step"], [0, 0.75, 0, 0])
        self.assertEqual((result["goals"], result["hazards"], result["timeouts"]), (0.875, 0.125, 0.25))
        low, high = result["return_mean_ci95"]
        self.assertTrue(-1 <= low < 0.75 < high <= 1)

    def test_intervals_have_their_coverage(self):
        random, covered = np.random.default_rng(0), 0
        for _ in range(100):
            low, high = bootstrap_ci(mean, random.normal(3, 1, (1, 100)))
            covered += low <= 3 <= high
        self.assertGreaterEqual(covered, 88)
        self.assertLessEqual(covered, 99)

    def test_pairing_narrows_the_interval_of_a_ratio(self):
        random = np.random.default_rng(0)
        common = random.normal(10, 3, 200)
        low, high = bootstrap_ci(ratio_of_means, np.stack([common + random.normal(0, 0.1, 200), common]))
        self.assertLess(high - low, 0.01)

    def test_runs_are_strata(self):
        """Resampling lifetimes within two runs, each without spread, leaves no doubt about their mean."""
        self.assertEqual(bootstrap_ci(mean, np.full((1, 50), 3.0), np.full((1, 50), 9.0)), [6.0, 6.0])

    def test_random_numbers_that_runs_have_in_common_count_once(self):
        random = np.random.default_rng(0)
        one, *others = (random.normal(3, 1, (1, 400)) for _ in range(4))

        def width(*strata: np.ndarray) -> float:
            low, high = bootstrap_ci(mean, *strata)
            return high - low

        self.assertAlmostEqual(width(one, one, one, one) / width(one), 1)
        self.assertAlmostEqual(width(one, *others) / width(one), 0.5, delta=0.1)

    def test_a_ratio_to_zero_has_no_value(self):
        self.assertEqual(bootstrap_ci(ratio_of_means, np.stack([np.ones(10), np.zeros(10)])), [None, None])

    def test_the_probability_of_improvement_counts_ties_half(self):
        ties = probability_of_improvement(np.array([1, 2, 3, 4.0]), np.array([1, 1, 4, 4.0]))
        self.assertEqual(float(ties), 0.5)
        self.assertEqual(float(probability_of_improvement(np.array([2.0, 1.0]), np.array([1.0, 1.0]))), 0.75)

    def test_the_nll_of_the_belief_is_averaged_over_lifetimes_and_late_steps(self):
        agent, exact = torch.arange(12.0).view(6, 2), torch.arange(6.0).view(6, 1).expand(-1, 2)
        found = belief_nll(list(agent), list(exact))
        self.assertEqual(found["agent"], [0.5, 2.5, 4.5, 6.5, 8.5, 10.5])
        self.assertEqual((found["exact"], found["late"]), ([0, 1, 2, 3, 4, 5], 3))
        self.assertEqual(found["late_excess"], 8.5 - 4)
        self.assertEqual(belief_nll(list(agent), None), {"agent": found["agent"], "late": 3, "late_excess": None})


class TestComparison(unittest.TestCase):
    def setUp(self):
        random = torch.Generator().manual_seed(0)
        rates = {"random": -0.1, "thompson": 0.5, "agent": 0.7, "known_rule": 0.9}
        self.lifetimes = {}
        for name, rate in rates.items():
            happened = (torch.rand(40, 16, generator=random) < abs(rate)).float()
            self.lifetimes[name] = lifetimes((happened * np.sign(rate)).tolist())

    def test_the_agent_is_compared_with_the_references(self):
        result = compare(self.lifetimes)
        returns = {name: np.array(values) for name, values in result["returns"].items()}
        self.assertAlmostEqual(result["of_thompson"], returns["agent"].mean() / returns["thompson"].mean())
        scale = returns["known_rule"].mean() - returns["random"].mean()
        self.assertAlmostEqual(result["normalised"], (returns["agent"].mean() - returns["random"].mean()) / scale)
        late = {name: one.reward[:, -2:].sum(1).mean() for name, one in self.lifetimes.items()}
        self.assertAlmostEqual(result["late_of_known_rule"], float(late["agent"] / late["known_rule"]), places=5)
        self.assertGreater(result["probability_of_improvement"], 0.8)
        low, high = result["normalised_ci95"]
        self.assertTrue(low < result["normalised"] < high)

    def test_the_report_shows_every_agent_with_an_interval(self):
        result = compare(self.lifetimes) | {"lifetimes": 40, "split": "test", "belief_nll": {"late_excess": None}}
        lines = report(result).splitlines()
        known = next(line for line in lines if line.split()[0] == "known_rule")
        low, high = result["known_rule"]["return_mean_ci95"]
        self.assertEqual(known.split()[1], f"{result['known_rule']['return_mean']:.2f}")
        self.assertTrue(known.endswith(f"[{low:.2f}, {high:.2f}]"))
        self.assertFalse([line for line in lines if "nats" in line])
        nothing = lifetimes([[0.0]] * 40)
        nothing = compare(dict.fromkeys(self.lifetimes, nothing))
        nothing |= {"lifetimes": 40, "split": "test", "belief_nll": {"late_excess": 0.25, "late": 16}}
        self.assertRegex(report(nothing), r"of_thompson +-\n")  # a ratio to zero
        self.assertRegex(report(nothing), r"\+0.250 nats .* step 16")

    def test_the_statistics_of_several_runs_are_those_of_their_mean(self):
        one, other = (
            compare(self.lifetimes),
            compare(self.lifetimes | {"agent": self.lifetimes["known_rule"]}),
        )
        joined = statistics(one, other)
        for name in ("return_mean", "of_thompson", "probability_of_improvement", "normalised"):
            self.assertAlmostEqual(joined[name], (one[name] + other[name]) / 2)
        self.assertEqual(statistics(one)["return_iqm_ci95"], one["return_iqm_ci95"])


class TestValue(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)
        self.value = Value(codes=6, grid=(4, 4), context_dim=5, keypoints=3, width=16)
        torch.nn.init.normal_(self.value.state_out.weight)
        torch.nn.init.normal_(self.value.reset_out[-1].weight)
        self.codes = torch.randint(6, (9, 16), generator=make_generator(), dtype=torch.uint8)
        self.context = torch.randn(9, 5, 5, generator=make_generator())

    def test_statistics_are_number_and_places_of_every_code(self):
        codes = torch.tensor([[0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 2]], dtype=torch.uint8)
        count, y, x = self.value.statistics(codes)[0].unbind(-1)
        self.assertEqual(count[:4].tolist(), [13, 1, 2, 0])
        torch.testing.assert_close((y[1], x[1], y[2], x[2]), tuple(map(torch.tensor, (-1.0, -1 / 3, 4 / 3, 2.0))))

    def test_codes_that_are_absent_change_nothing(self):
        value = self.value
        statistics = value.statistics(torch.randint(4, (9, 16), generator=make_generator(), dtype=torch.uint8))
        before = value(statistics, value.read(self.context))
        with torch.no_grad():
            value.code_features[:, 4:] += 1
        torch.testing.assert_close(value(statistics, value.read(self.context)), before)
        with torch.no_grad():
            value.code_features[:, :4] += 1
        self.assertFalse(torch.allclose(value(statistics, value.read(self.context)), before))

    def test_the_order_of_the_actions_changes_nothing_and_the_context_does(self):
        value, order = self.value, torch.tensor([2, 0, 3, 1, 4])
        statistics, terms, reordered = (
            value.statistics(self.codes),
            value.read(self.context),
            value.read(self.context[:, order]),
        )
        torch.testing.assert_close(value(statistics, reordered), value(statistics, terms))
        torch.testing.assert_close(reordered.reset_value, terms.reset_value)
        other = value.read(self.context.flip(0))
        self.assertFalse(torch.allclose(value(statistics, other), value(statistics, terms)))

    def test_states_that_share_a_context_equal_states_with_copies_of_it(self):
        value, row = self.value, torch.tensor([1, 0, 1, 1, 0, 0, 0, 1, 1])
        statistics = value.statistics(self.codes)
        shared = value(statistics, value.read(self.context[:2]), row)
        torch.testing.assert_close(shared, value(statistics, value.read(self.context[row])))


class TestPictures(unittest.TestCase):
    def test_effects_are_drawn_as_arrows_as_changes_or_as_nothing(self):
        """Codes: 0 background, 1 to 3 things; effects: 1 goes left, 2 becomes 3, nothing."""
        grid = torch.zeros(6, 6, dtype=torch.uint8)
        grid[2, 3], grid[4, 4] = 1, 2
        left, other = grid.clone(), grid.clone()
        left[2, 3], left[2, 2], other[4, 4] = 0, 1, 3
        codes, after = grid.view(1, 36).repeat(3, 1), torch.stack([left, other, grid]).view(1, 3, 36).repeat(3, 1, 1)
        effects, telling = mock.Mock(predict=lambda _: (after, None, None)), torch.arange(36) > 0
        transition, vae, context = mock.Mock(effects=effects, telling=telling, codes=6), vae_of(), torch.zeros(1, 5)
        moves, becomes, nothing = picture_effects(vae, transition, codes, context)
        self.assertEqual((moves.arrow, becomes.arrow, nothing.arrow), ("←", "", "·"))
        self.assertEqual((moves.patches.shape, becomes.patches.shape), ((4, 17, 3), (4, 9, 3)))
        pictured = vae.decode(torch.stack([codes[0], after[0, 1]]), context.expand(2, -1)).clamp(0, 1)
        for x, frame in ((slice(0, 4), pictured[0]), (slice(5, 9), pictured[1])):
            np.testing.assert_allclose(becomes.patches[:, x], frame[16:20, 16:20].detach(), rtol=1e-6)


if __name__ == "__main__":
    unittest.main()
