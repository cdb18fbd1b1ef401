"""Agents: the order of the references, the exact filter, the value, the planner, and that the rule never reaches the agent."""

import gc
import types
import unittest
from unittest import mock

import numpy as np
import torch

from agent import AgentController, Learner, PlannerSettings, RandomAgent, top_p_filter, rollout
from context_engine import ActionValues, ExactFilter, KnownRuleAgent, ThompsonAgent
from environment import HiddenRulesWorld, Rule, WorldSettings
from main import build_system, evaluate, train
from memory import WorldStep
from tests.benchmarks.references import BayesAdaptiveAgent
from transition_model import EffectCache, contact_pairs
from tests.benchmarks.ablations import FrozenBelief
from tests.shared import make_generator, tiny

VALIDATION = "validation"


class TestReferences(unittest.TestCase):
    def test_known_rule_beats_thompson_beats_random(self):
        settings = WorldSettings()
        q = ActionValues(settings)

        def mean(make):
            world = HiddenRulesWorld(settings, 256, VALIDATION, 0)
            return float(rollout(world, make(world)).reward.sum(1).mean())

        known, random = mean(lambda w: KnownRuleAgent(w, q)), mean(lambda w: RandomAgent(0))
        thompson = mean(lambda w: ThompsonAgent(w, q, 0))
        self.assertGreater(known, thompson + 1)
        self.assertGreater(thompson, random + 5)
        self.assertAlmostEqual(known, 13.15, delta=0.7)
        self.assertAlmostEqual(thompson, 10.79, delta=0.8)

    def test_the_filter_finds_the_rule_of_a_clear_world(self):
        world = HiddenRulesWorld(WorldSettings(noise=0, slip=0), 128, torch.arange(144), 0)
        exact = ExactFilter(world)
        rollout(world, RandomAgent(0), [exact])
        certain = exact.log_posterior.exp()[torch.arange(128), world.task]
        self.assertGreater(float((certain > 0.999).float().mean()), 0.8)  # the rest never contact_features goal nor hazard
        self.assertGreater(float(certain.min()), 0.15)  # and knows all but which is which
        self.assertLess(float(torch.stack(exact.nll[32:]).mean()), 0.05)

    def test_rollouts_agree_with_the_known_rule_where_nothing_is_hidden(self):
        settings = WorldSettings(grid=4, slip=0, lifetime=32)
        q = ActionValues(settings)
        world = HiddenRulesWorld(settings, 8, VALIDATION, 0)
        agent = BayesAdaptiveAgent(world, q, 0, rollouts=64, horizon=4)
        agent.reset(world.reset())
        agent.filter.log_posterior = torch.nn.functional.one_hot(world.task, 144).float().log()
        known = KnownRuleAgent(world, q).values()
        chosen = known.gather(1, agent._mean_returns(torch.arange(8)).argmax(1)[:, None])[:, 0]
        self.assertLess(float((known.amax(1) - chosen).mean()), 0.1 * float((known.amax(1) - known.mean(1)).mean()))

    def test_rollouts_earn_more_than_thompson_sampling_at_the_beginning(self):
        settings = WorldSettings(grid=4, lifetime=24, episode_limit=10)
        q, returns = ActionValues(settings), []
        for make in (lambda w: BayesAdaptiveAgent(w, q, 0, rollouts=8, horizon=12), lambda w: ThompsonAgent(w, q, 0)):
            world = HiddenRulesWorld(settings, 128, VALIDATION, 0)
            returns.append(rollout(world, make(world)).reward.sum(1))
        self.assertGreater(float((returns[0] - returns[1]).mean()), 0)


class TestValueAndPlanner(unittest.TestCase):
    def setUp(self):
        self.system = build_system(tiny())
        torch.nn.init.normal_(self.system.transition.effects.head.weight)  # untrained effects all leave things as they are
        torch.nn.init.normal_(self.system.target_value.state_out.weight)
        torch.nn.init.normal_(self.system.target_value.reset_out[-1].weight)
        self.codes = torch.randint(6, (9, 16), generator=make_generator(), dtype=torch.uint8)
        self.context = torch.randn(9, 5, 32, generator=make_generator())

    def test_branches_are_the_smallest_set_of_enough_mass(self):
        kept, weight = top_p_filter(torch.tensor([[0.9, 0.09, 0.01], [0.02, 0.49, 0.49]]), 0.95)
        self.assertEqual(kept.tolist(), [[True, True, False], [False, True, True]])
        torch.testing.assert_close(weight.sum(-1), torch.ones(2))
        self.assertEqual(top_p_filter(torch.tensor([[0.5, 0.3, 0.2, 0.0]]), 1.0)[0].tolist(), [[True, True, True, False]])
        self.assertEqual(top_p_filter(torch.tensor([[0.5, 0.3, 0.2]]), 0.4)[0].tolist(), [[True, False, False]])

    def test_statistics_are_share_and_centre_of_every_code(self):
        codes = torch.tensor([[0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 2]], dtype=torch.uint8)
        share, y, x = self.system.value.statistics(codes)[0].unbind(-1)
        torch.testing.assert_close(share[:4], torch.tensor([13, 1, 2, 0]) / 16)
        torch.testing.assert_close((y[1], x[1], y[2], x[2]), tuple(map(torch.tensor, (-1.0, -1 / 3, 2 / 3, 1.0))))

    def test_codes_that_are_absent_change_nothing(self):
        value, present = self.system.target_value, torch.randint(4, (9, 16), generator=make_generator(), dtype=torch.uint8)
        pooled = value.pool(torch.randn(9, 5, 32, generator=make_generator()))
        before = value(value.statistics(present), pooled)
        with torch.no_grad():
            value.code_features[:, 4:] += 1
        torch.testing.assert_close(value(value.statistics(present), pooled), before)

    def test_relabelling_the_actions_relabels_the_plan(self):
        planner, order = self.system.planner, torch.tensor([2, 0, 3, 1, 4])
        plan, relabelled = (planner.action_values(self.codes, context) for context in (self.context, self.context[:, order]))
        torch.testing.assert_close(relabelled, plan[:, order[:4]])
        self.assertGreater(float(plan.std(1).min()), 0)

    def test_the_plan_by_hand(self):
        """One state, every effect in a loop, no cut and no merging."""
        system, planner = self.system, self.system.planner
        planner.settings = PlannerSettings(top_p=1.0, expand_margin=0)
        codes, context = self.codes[:1], self.context[:1]
        transition, value = system.transition, system.target_value
        grids, _ = transition.effects.predict(codes)
        expected, pooled = torch.zeros(4), value.pool(context)
        with torch.no_grad():
            for action in range(4):
                for k in range(grids.shape[1]):
                    log_reward, end = transition.reward_and_termination(contact_pairs(codes, grids[:, k], 6), context[:, -1])
                    next_value, e = value(value.statistics(grids[:, k]), pooled), torch.sigmoid(end)
                    following = 0.95 * ((1 - e) * next_value + e * value.reset_value(pooled))
                    chance = transition.log_prior(context[:, :-1])[0, action, k].exp()
                    expected[action] += float(chance * (log_reward[0].exp() @ transition.reward_bins + following))
        torch.testing.assert_close(planner.action_values(codes, context)[0], expected, atol=1e-4, rtol=1e-4)

    def test_depth_two_backs_up_the_best_of_the_next_step(self):
        """Where the choice is close; the others keep their value of depth one."""
        planner = self.system.planner
        once = planner.action_values(self.codes, self.context, depth=1)
        margin = float((once.amax(1) - once.median(1).values).mean())  # some actions are close, some are not
        planner.settings = PlannerSettings(expand_margin=margin, min_branch_prob=0)
        twice = planner.action_values(self.codes, self.context)
        close = once > once.amax(1, keepdim=True) - margin
        close &= (close.sum(1) > 1)[:, None]
        self.assertTrue(close.any() and not close.all())
        expected, chances = self.backed_up(close, 0)
        torch.testing.assert_close(twice, expected, atol=1e-5, rtol=1e-5)
        self.assertFalse(torch.allclose(twice[close], once[close]))
        middle = float(chances.median())
        min_branch_prob, _ = self.backed_up(close, middle)
        self.assertFalse(torch.allclose(min_branch_prob, expected))
        planner.settings = PlannerSettings(expand_margin=margin, min_branch_prob=middle)
        torch.testing.assert_close(planner.action_values(self.codes, self.context), min_branch_prob, atol=1e-5, rtol=1e-5)
        planner.settings = PlannerSettings(expand_margin=margin, min_branch_prob=0.999)
        torch.testing.assert_close(planner.action_values(self.codes, self.context), once)

    def backed_up(self, close, min_branch_prob):
        """Q (B, A) by a loop over effects: those more min_branch_prob than this to follow a close action and to go on are searched
        one step deeper; and these chances."""
        planner, predict = self.system.planner, self.system.transition.effects.predict
        with torch.inference_mode():
            expansion = planner._expand(self.codes, self.context, predict)
        chances, expected = [], torch.zeros(len(self.codes), 4)
        for p, (state, effect) in enumerate(zip(expansion.state.tolist(), expansion.effect.tolist())):
            probability, end = expansion.probability[state, :, effect], expansion.end[p]
            going_on = (probability * (1 - end))[close[state]]
            chances.append(going_on)
            next_value = expansion.next_value[p]
            if (going_on > min_branch_prob).any():
                next_value = planner.action_values(expansion.next_codes[p][None], self.context[state][None], depth=1).max()
            expected[state] += probability * (expansion.reward[p] + 0.95 * torch.lerp(next_value, expansion.reset_value[p], end))
        chances = torch.cat(chances)
        return expected, chances[chances > 0]

    def test_the_belief_stays_as_it_is_in_a_plan(self):
        """Every state that is valued, at either depth, is valued under the context as it was."""
        planner = self.system.planner
        planner.settings = PlannerSettings(expand_margin=100, min_branch_prob=0)
        value, contexts = planner.value, []
        pool = value.pool
        with mock.patch.object(value, "pool", lambda context: contexts.append(context) or pool(context)):
            planner.action_values(self.codes, self.context)
        self.assertGreater(len(contexts), 1)
        for context in contexts:
            self.assertTrue(all(any(torch.equal(row, own) for own in self.context) for row in context))

    def test_a_table_of_modes_changes_nothing(self):
        planner, network = self.system.planner, self.system.transition.effects
        plain = planner.action_values(self.codes, self.context)
        for slots in (1 << 15, 3):  # with room for all, and with hardly any
            table = EffectCache(network, slots)
            for _ in range(2):
                torch.testing.assert_close(planner.action_values(self.codes, self.context, predict=table), plain)
        table = EffectCache(network)
        first = table(self.codes)
        with mock.patch.object(network, "predict", side_effect=AssertionError("computed again")):
            for looked_up, computed in zip(table(self.codes.flip(0)), first):
                self.assertTrue(torch.equal(looked_up.flip(0), computed))

    def test_chunks_change_nothing(self):
        planner = self.system.planner
        planner.settings = PlannerSettings(expand_margin=100, min_branch_prob=0)  # every step is looked at again
        whole = planner.action_values(self.codes, self.context)
        planner.CHUNK = 4
        with mock.patch.object(planner, "_expand", wraps=planner._expand) as expanded:
            torch.testing.assert_close(planner.action_values(self.codes, self.context), whole)
        self.assertLessEqual(max(len(call.args[0]) for call in expanded.call_args_list), 4)

    def test_a_context_that_is_no_number_plans_nothing(self):
        """Training notices it at its next look at the losses, and says so."""
        values = self.system.planner.action_values(self.codes, self.context * torch.nan)
        self.assertEqual(values.shape, (9, 4))

    def test_value_learns_and_the_slow_value_and_the_belief_do_not(self):
        system = self.system
        world = HiddenRulesWorld(system.settings.world, 6, VALIDATION, 0)
        agent = system.controller()
        rollout(world, agent)
        experience = agent.memory.experience()
        context = system.engine.context(system.engine.sequence(experience)).detach()
        losses = system.planner.loss(system.value, experience, context)
        self.assertEqual(set(losses), {"value", "reset_value"})
        sum(losses.values()).backward()
        self.assertTrue(all(p.grad is not None for p in system.value.parameters()))
        self.assertTrue(all(p.grad is None for p in [*system.target_value.parameters(), *system.engine.parameters()]))

    def test_returns_of_a_lifetime_by_hand(self):
        """With trace 1 and the planner's choice never taken as correction, targets are the planner's maxima."""
        system = self.system
        world = HiddenRulesWorld(system.settings.world, 6, VALIDATION, 0)
        agent = system.controller()
        rollout(world, agent)
        experience = agent.memory.experience()
        context = system.engine.context(system.engine.sequence(experience)).detach()
        values = system.planner.action_values(experience.codes.flatten(0, 1), context[:, :-1].flatten(0, 1), depth=1)
        values = values.view(6, 12, 4)
        never = experience._replace(action=(values.argmax(-1) + 1) % 4)
        pooled = system.value.pool(context[:, :-1].flatten(0, 1))
        predicted = system.value(system.value.statistics(experience.codes.flatten(0, 1)), pooled)
        expected = (predicted - values.amax(-1).flatten()).square().mean()
        torch.testing.assert_close(system.planner.loss(system.value, never, context)["value"], expected)


class TestController(unittest.TestCase):
    def test_it_acts_and_remembers_in_one_world_or_many(self):
        system = build_system(tiny())
        for batch in (1, 7):
            agent = system.controller()
            lifetimes = rollout(HiddenRulesWorld(system.settings.world, batch, VALIDATION, 0), agent)
            self.assertEqual(lifetimes.reward.shape, (batch, 12))
            self.assertEqual(len(agent.memory), 12)
            torch.testing.assert_close(system.engine(agent.memory), agent.belief, atol=1e-4, rtol=1e-4)

    def test_pictures_may_be_views_of_any_kind(self):
        agent, picture = build_system(tiny()).controller(), np.arange(768, dtype=np.uint8).reshape(16, 16, 3)
        for view in (picture[::-1], picture.transpose(1, 0, 2)):
            agent.reset(view)
            ended = {"episode_terminated": True, "episode_truncated": False, "final_frame": view}
            agent.observe(agent.act(), WorldStep.of(view, 1.0, ended))
            self.assertTrue(np.array_equal(agent.obs[0], view))

    def test_a_new_lifetime_begins_with_an_empty_memory_and_the_initial_belief(self):
        system = build_system(tiny())
        agent, world = system.controller(), HiddenRulesWorld(tiny().world, 3, VALIDATION, 0)
        rollout(world, agent)
        agent.reset(world.reset())
        self.assertEqual(len(agent.memory), 0)
        torch.testing.assert_close(agent.belief, system.engine.initial_belief(3))

    def test_a_frozen_belief_stays(self):
        system = build_system(tiny())
        agent = system.controller(FrozenBelief)
        rollout(HiddenRulesWorld(tiny().world, 3, VALIDATION, 0), agent)
        torch.testing.assert_close(agent.belief, system.engine.initial_belief(3))

    def test_the_rule_never_reaches_the_agent(self):
        """Everything the agent is given is recorded; swapping the hidden rule behind equal pictures changes none of it."""
        settings = tiny(world={"slip": 0.0}).world
        system, available_metrics = build_system(tiny()), []
        for another in (False, True):
            world = HiddenRulesWorld(settings, 5, VALIDATION, 0)
            frames = world.reset()
            world.position[:] = torch.tensor([[0, 0], [3, 3], [3, 2]])  # a corner: two moves change nothing there
            frames = world.render()
            rule = world.rule
            action = (rule.action_map == 0).float().argmax(1)  # up: stands still in the corner
            if another:  # exchange what the two unused actions do
                swapped = rule.action_map.clone()
                for row in range(5):
                    down, right = ((rule.action_map[row] == move).nonzero().item() for move in (1, 3))
                    swapped[row, down], swapped[row, right] = 3, 1
                world.rule = world.rule._replace(action_map=swapped)
            agent = system.controller()
            agent.reset(frames)
            agent.act()
            step = world.step(action)
            agent.observe(action, step)
            available_metrics.append((agent.act(), agent.belief, *step))
        for one, other in zip(*available_metrics):
            self.assertTrue(torch.equal(one, other))
        self.assertFalse(any("rule" in name or "task" in name for name in vars(agent) | agent.memory.experience()._asdict()))

    def test_nothing_that_the_agent_holds_leads_to_what_is_hidden(self):
        """The world with its rule and luck, the filter of the references, any random state: no path of references goes there."""
        system = build_system(tiny())
        agent, world = system.controller(), HiddenRulesWorld(tiny().world, 3, VALIDATION, 0)
        exact = ExactFilter(world)
        rollout(world, agent, [exact])
        hidden = (HiddenRulesWorld, ExactFilter, Rule, torch.Generator)
        self.assertEqual([type(one) for one in reachable(agent) if isinstance(one, hidden)], [])
        storages = {tensor.untyped_storage().data_ptr() for tensor in reachable(agent) if isinstance(tensor, torch.Tensor)}
        secret = [tensor for tensor in reachable(world) if isinstance(tensor, torch.Tensor) and tensor.numel() > 3]
        secret += [tensor for tensor in reachable(exact) if isinstance(tensor, torch.Tensor) and tensor.numel() > 3]
        self.assertFalse(storages & {tensor.untyped_storage().data_ptr() for tensor in secret})
        for leak in (world, [exact], {"luck": world.step}, lambda: world.rule):  # the search would find it
            agent.leak = leak
            self.assertTrue(any(isinstance(one, hidden) for one in reachable(agent)), leak)

    def test_the_filter_and_the_luck_of_an_evaluation_go_their_own_way(self):
        system, lived, states = build_system(tiny()), [], []
        for watched, seed, frozen in ((False, 1, False), (True, 2, False), (True, 3, True)):
            torch.manual_seed(seed)  # whatever else is random in the process
            world = HiddenRulesWorld(tiny().world, 8, VALIDATION, 0)
            agent = system.controller(FrozenBelief if frozen else AgentController)
            lived.append(rollout(world, agent, [ExactFilter(world)] if watched else []))
            states.append([x.get_state() for x in vars(world).values() if isinstance(x, torch.Generator)])
        for one, other in zip(lived[0], lived[1]):
            self.assertTrue(torch.equal(one, other))  # no filter, another luck outside: the same lifetimes
        self.assertGreater(len(states[0]), 1)
        for one, other in zip(states[0], states[2]):
            self.assertTrue(torch.equal(one, other))  # another agent: the same luck

    def test_an_evaluation_leaves_the_luck_of_the_training_alone(self):
        learner = Learner(build_system(tiny()))
        train(learner, until=learner.update + 1)
        before = [learner.generator.get_state(), learner.sampler.get_state()]
        results = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            results.append(evaluate(learner.system, "validation", 8))
        self.assertEqual(*results)
        for one, other in zip(before, (learner.generator.get_state(), learner.sampler.get_state())):
            self.assertTrue(torch.equal(one, other))


def reachable(root: object) -> list[object]:
    """Everything that references lead to from an object: attributes, containers, bound methods, closures."""
    found, left = {}, [root]
    while left:
        one = left.pop()
        if id(one) in found or isinstance(one, (type, types.ModuleType, types.BuiltinFunctionType)):
            continue
        found[id(one)] = one
        if isinstance(one, types.MethodType):
            left += [one.__self__, one.__func__]
        elif isinstance(one, types.FunctionType):
            left += [cell.cell_contents for cell in one.__closure__ or ()] + list(one.__defaults__ or ())
        else:
            left += gc.get_referents(one)
    return list(found.values())


if __name__ == "__main__":
    unittest.main()
