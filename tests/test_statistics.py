"""Scores: returns, intervals, probability of probability_of_improvement, adaptation from episode to episode."""

import unittest

import numpy as np
import torch

from agent import Trajectories
from main import by_episode, compare, probability_of_improvement, bootstrap_ci, mean, ratio_of_means, statistics, summary


def lifetimes(reward: list[list[float]], truncated: list[list[bool]] | None = None) -> Trajectories:
    """Trajectories whose episodes end with every reward."""
    rewards = torch.tensor(reward, dtype=torch.float32)
    ended = torch.zeros_like(rewards).bool() if truncated is None else torch.tensor(truncated)
    return Trajectories(rewards, rewards != 0, ended, torch.zeros_like(rewards).long())


class TestSummary(unittest.TestCase):
    def test_summary_of_known_lifetimes(self):
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

    def test_episodes_by_hand(self):
        no, yes = False, True
        lived = lifetimes(
            [[0, 1, 0, 0, 0, 0, -1, 0], [0, 0, -1, 1, 0, 0, 1, 0]],
            [[no, no, no, no, yes, no, no, no], [no] * 8],
        )
        found = by_episode(lived)
        self.assertEqual(found["success"], [0.5, 0.5, 0.5])  # goal then time-out then hazard; hazard then goal then goal
        self.assertEqual(found["hazard"], [0.5, 0, 0.5])
        self.assertEqual(found["timeout"], [0, 0.5, 0])
        self.assertEqual(found["steps_to_goal"], [2, 1, 3])

    def test_episodes_that_most_lifetimes_never_reach_are_left_out(self):
        lived = lifetimes([[1, 1, 1, 1]] + [[0, 1, 0, 1]] * 19)
        self.assertEqual(len(by_episode(lived)["success"]), 2)
        self.assertEqual(by_episode(lifetimes([[0, 0]]))["success"], [])


class TestIntervals(unittest.TestCase):
    def test_intervals_cover_as_often_as_they_say(self):
        draw, covered = np.random.default_rng(0), 0
        for _ in range(100):
            low, high = bootstrap_ci(mean, draw.normal(3, 1, (1, 100)))
            covered += low <= 3 <= high
        self.assertGreaterEqual(covered, 88)
        self.assertLessEqual(covered, 99)

    def test_pairing_narrows_the_interval_of_a_ratio(self):
        draw = np.random.default_rng(0)
        luck = draw.normal(10, 3, 200)
        low, high = bootstrap_ci(ratio_of_means, np.stack([luck + draw.normal(0, 0.1, 200), luck]))
        self.assertLess(high - low, 0.01)

    def test_runs_are_strata(self):
        """Two runs that differ much, each without spread: resampling lifetimes leaves no doubt about their mean."""
        self.assertEqual(bootstrap_ci(mean, np.full((1, 50), 3.0), np.full((1, 50), 9.0)), [6.0, 6.0])

    def test_luck_that_runs_share_counts_once(self):
        draw = np.random.default_rng(0)
        one, *others = (draw.normal(3, 1, (1, 400)) for _ in range(4))
        width = lambda *strata: float(np.diff(bootstrap_ci(mean, *strata))[0])  # noqa: E731
        self.assertAlmostEqual(width(one, one, one, one) / width(one), 1)
        self.assertAlmostEqual(width(one, *others) / width(one), 0.5, delta=0.1)

    def test_a_ratio_to_nothing_has_no_number(self):
        self.assertEqual(bootstrap_ci(ratio_of_means, np.stack([np.ones(10), np.zeros(10)])), [None, None])

    def test_improvement_counts_ties_half(self):
        self.assertEqual(float(probability_of_improvement(np.array([1, 2, 3, 4.0]), np.array([1, 1, 4, 4.0]))), 0.5)
        self.assertEqual(float(probability_of_improvement(np.array([2.0, 1.0]), np.array([1.0, 1.0]))), 0.75)


class TestComparison(unittest.TestCase):
    def setUp(self):
        draw = torch.Generator().manual_seed(0)
        reward = {"random": -0.1, "thompson": 0.5, "agent": 0.7, "known_rule": 0.9}
        self.lived = {name: lifetimes((torch.rand(40, 16, generator=draw) < abs(p)).float().mul(np.sign(p)).tolist())
                      for name, p in reward.items()}  # fmt: skip

    def test_what_is_said_of_an_agent(self):
        result = compare(self.lived)
        returns = {name: np.array(values) for name, values in result["returns"].items()}
        self.assertAlmostEqual(result["of_thompson"], returns["agent"].mean() / returns["thompson"].mean())
        scale = returns["known_rule"].mean() - returns["random"].mean()
        self.assertAlmostEqual(result["normalised"], (returns["agent"].mean() - returns["random"].mean()) / scale)
        late = {name: one.reward[:, -2:].sum(1).mean() for name, one in self.lived.items()}
        self.assertAlmostEqual(result["late_of_known_rule"], float(late["agent"] / late["known_rule"]), places=5)
        self.assertGreater(result["probability_of_improvement"], 0.8)
        low, high = result["normalised_ci95"]
        self.assertTrue(low < result["normalised"] < high)

    def test_several_runs_are_said_together(self):
        one, other = compare(self.lived), compare(self.lived | {"agent": self.lived["known_rule"]})
        joined = statistics(one, other)
        for name in ("return_mean", "of_thompson", "probability_of_improvement", "normalised"):
            self.assertAlmostEqual(joined[name], (one[name] + other[name]) / 2)
        self.assertEqual(statistics(one)["return_iqm_ci95"], one["return_iqm_ci95"])


if __name__ == "__main__":
    unittest.main()
