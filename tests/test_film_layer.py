"""FiLM: the identity at initialisation, the equation, and shapes."""

import re
import unittest

import torch

from film_layer import FiLMLayer, modulate


class TestFiLMLayer(unittest.TestCase):
    def test_zero_scale_is_the_identity_for_every_context(self):
        layer = FiLMLayer(5, 3, scale=0)
        for shape in ((2, 3), (2, 7, 3), (2, 3, 4, 4)):
            features = torch.randn(shape)
            self.assertTrue(torch.equal(layer(features, torch.randn(2, 5)), features))

    def test_the_equation_holds_in_every_layout(self):
        layer, context = FiLMLayer(5, 3), torch.randn(2, 5)
        gamma, beta = layer.generator(context).chunk(2, -1)
        flat = torch.randn(2, 3)
        torch.testing.assert_close(layer(flat, context), (1 + gamma) * flat + beta)
        sequence = torch.randn(2, 7, 3)
        torch.testing.assert_close(layer(sequence, context)[:, 4], layer(sequence[:, 4], context))
        image = torch.randn(2, 3, 4, 6)
        torch.testing.assert_close(layer(image, context)[:, :, 2, 5], layer(image[:, :, 2, 5], context))

    def test_each_feature_vector_may_have_its_own_context(self):
        layer, features, context = FiLMLayer(5, 3), torch.randn(2, 7, 3), torch.randn(2, 7, 5)
        torch.testing.assert_close(layer(features, context)[1, 6], layer(features[1:, 6], context[1:, 6])[0])

    def test_scale_multiplies_the_weights_of_the_generator(self):
        torch.manual_seed(0)
        plain = FiLMLayer(5, 3)
        torch.manual_seed(0)
        torch.testing.assert_close(FiLMLayer(5, 3, scale=3).generator.weight, 3 * plain.generator.weight)

    def test_the_context_receives_a_gradient(self):
        layer, context = FiLMLayer(5, 3), torch.randn(2, 5, requires_grad=True)
        layer(torch.randn(2, 3), context).sum().backward()
        self.assertGreater(context.grad.abs().sum(), 0)

    def test_features_that_share_a_context_may_be_modulated_by_what_was_computed_once(self):
        layer, context, row = FiLMLayer(5, 3), torch.randn(2, 5), torch.tensor([1, 0, 1, 1])
        features, (scale, shift) = torch.randn(4, 3), layer.modulation(context)
        torch.testing.assert_close(modulate(features, scale[row], shift[row]), layer(features, context[row]))

    def test_errors_name_the_values(self):
        for sizes, words in (((0, 3), "context_dim >= 1.*not 0"), ((5, 0), "5, 0"), ((5, 3, -1), "scale >= 0.*-1")):
            with self.assertRaisesRegex(ValueError, words):
                FiLMLayer(*sizes)
        wrong = [((2, 4), (2, 5)), ((2, 3), (2, 7, 5)), ((5, 3), (2, 5)), ((2, 3), (2, 4)), ((2, 6, 3), (2, 7, 5))]
        for features, context in wrong:
            with self.assertRaisesRegex(ValueError, rf"\(B, 3\).*not {re.escape(f'{features} and {context}')}"):
                FiLMLayer(5, 3)(torch.randn(features), torch.randn(context))


if __name__ == "__main__":
    unittest.main()
