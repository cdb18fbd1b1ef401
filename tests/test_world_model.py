"""The VAE: shapes, the evidence lower bound, initialisation and merging of codes, and modulation by the context."""

import unittest
from unittest import mock

import torch

from environment import HiddenRulesWorld, WorldSettings
from world_model import VAE, VAESettings


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
            self.assertGreaterEqual(vae.init_codes_kmeans(frames, torch.zeros(64, 5)), 4)
            codes = vae.encode(frames, torch.zeros(64, 5))
            clear = frames_of(noise=0).view(64, 6, 4, 6, 4, 3)[:, :, 0, :, 0].flatten(1, 2)  # (64, 36, 3), same places
            colours = clear.flatten(0, 1).unique(dim=0)
            kinds = {tuple(colour): set(codes[(clear == colour).all(-1)].tolist()) for colour in colours}
            self.assertEqual(len(kinds), 4)
            self.assertEqual(len(set().union(*kinds.values())), sum(map(len, kinds.values())))

    def test_only_codes_that_are_interchangeable_are_merged(self):
        vae, frames, context = vae_of(obs_std=0.1), frames_of(noise=0), torch.zeros(64, 5)
        vae.init_codes_kmeans(frames, context)
        before = vae.encode(frames, context)
        used = before.unique().tolist()
        self.assertEqual(len(used), 4)
        clear = vae.patches(frames)
        with torch.no_grad():  # a decoder that rebuilds each code's patches exactly
            wanted = torch.zeros(6, 48)
            for code in used:
                wanted[code] = clear[before == code][0]
            vae._decode_patches = lambda one_hot, context: one_hot @ wanted
        self.assertEqual(vae.merge_codes(frames, context), 0)
        self.assertTrue(torch.equal(vae.encode(frames, context), before))
        first, second = used[0], used[1]
        # Now two codes are rebuilt alike, halfway between both kinds of patch.
        wanted[[first, second]] = (clear[before == first][0] + clear[before == second][0]) / 2
        self.assertEqual(vae.merge_codes(frames, context), 1)
        self.assertEqual(len(vae.encode(frames, context).unique()), 3)
        third = used[2]  # a chain: the third is replaced by the first, the first by the second
        with mock.patch.object(vae, "_square_errors", lambda *_: torch.zeros(64, 36, 6)):
            self.assertEqual(vae.merge_codes(frames, context), 3)  # of four that are used
        self.assertEqual(len(vae.encode(frames, context).unique()), 1)
        self.assertEqual(int(vae.code_alias[third]), int(vae.code_alias[first]))
        restored = vae_of(obs_std=0.1)
        restored.load_state_dict(vae.state_dict())
        self.assertTrue(torch.equal(restored.encode(frames, context), vae.encode(frames, context)))

    def test_bad_sizes_are_refused(self):
        with self.assertRaisesRegex(ValueError, "vae.patch is 5.*24x24.*such as 24"):
            VAE(VAESettings(patch=5), (24, 24, 3), 5)
        with self.assertRaisesRegex(ValueError, "vae.patch is 0"):
            VAE(VAESettings(), (24, 24, 3), 5)
        with self.assertRaisesRegex(ValueError, "uint8, not"):
            vae_of().encode(torch.zeros(1, 24, 24, 3), torch.zeros(1, 5))


if __name__ == "__main__":
    unittest.main()
