"""The planner, the controller, what the agent may know, and the learner; test_processes.py has several processes."""

import contextlib
import copy
import gc
import types
import unittest
import warnings
from dataclasses import replace
from unittest import mock

import numpy as np
import torch

from agent import AgentController, Learner, Planner, PlannerSettings
from context_engine import ContextInferenceEngine, ExactFilter, rollout
from environment import HiddenRulesWorld, Rule, task_split
from main import build_system, load_system, train
from memory import PlaceMemory, WorldStep
from tests.shared import TOTAL, make_generator, places_of, temporary_folder, tiny, tiny_run, tiny_system
from transition_model import EffectCache

VALIDATION = "validation"


class TestPlanner(unittest.TestCase):
    def setUp(self):
        self.system = tiny_system()
        torch.nn.init.normal_(self.system.transition.effects.head.weight)  # untrained effects all change nothing
        torch.nn.init.normal_(self.system.target_value.state_out.weight)
        torch.nn.init.normal_(self.system.target_value.reset_out[-1].weight)
        self.codes = torch.randint(6, (9, 16), generator=make_generator(), dtype=torch.uint8)
        self.context = torch.randn(9, 5, 32, generator=make_generator())
        torch.nn.init.normal_(self.system.transition.place_out[-1].weight)
        self.places = places_of(9, 16, 6)

    def lifetimes(self):
        """Experience (6, 12, ...) of the untrained agent, and the contexts on the way."""
        agent = AgentController(self.system)
        rollout(HiddenRulesWorld(self.system.settings.world, 6, VALIDATION, 0), agent)
        experience = agent.memory.experience()
        return experience, self.system.engine.context(self.system.engine.sequence(experience)).detach()

    def test_permuting_the_actions_permutes_the_values(self):
        planner, order = self.system.planner, torch.tensor([2, 0, 3, 1, 4])
        values, permuted = (
            planner.action_values(self.codes, c, self.places) for c in (self.context, self.context[:, order])
        )
        torch.testing.assert_close(permuted, values[:, order[:4]])
        self.assertGreater(float(values.std(1).min()), 0)

    def test_values_of_one_step_equal_those_computed_by_hand(self):
        """One state, a loop over all effects, none left out and none merged."""
        system, planner = self.system, self.system.planner
        planner.settings = PlannerSettings(nodes=1, top_p=1.0)
        codes, context, places = self.codes[:1], self.context[:1], places_of(1, 16, 6)
        transition, value = system.transition, system.target_value
        grids, *_ = transition.effects.predict(codes)
        expected, terms = torch.zeros(4), value.read(context)
        with torch.no_grad():
            for action in range(4):
                for k in range(grids.shape[1]):
                    known = (places, transition.modulate_heads(context[:, -1]), torch.tensor([0]))
                    log_reward, end = transition.reward_and_termination(codes, grids[:, k], *known)
                    next_value, e = value(value.statistics(grids[:, k]), terms), torch.sigmoid(end)
                    following = 0.95 * ((1 - e) * next_value + e * terms.reset_value)
                    chance = transition.log_prior(context[:, :-1])[0, action, k].exp()
                    expected[action] += float(chance * (log_reward[0].exp() @ transition.reward_bins + following))
        torch.testing.assert_close(planner.action_values(codes, context, places)[0], expected, atol=1e-4, rtol=1e-4)

    def outcomes(self, grid, context):
        """What follows a grid, by the grid that it leads to: probability (A,), reward, end and V; W besides."""
        transition, value = self.system.transition, self.system.target_value
        codes, terms, found = torch.tensor(grid, dtype=torch.uint8)[None], value.read(context), {}
        known = (PlaceMemory.empty(1, 16, 6), transition.modulate_heads(context[:, -1]), torch.tensor([0]))
        prior = transition.log_prior(context[:, :-1])[0].exp()
        for k, after in enumerate(transition.effects.predict(codes)[0][0]):
            log_reward, end = transition.reward_and_termination(codes, after[None], *known)
            next_value = value(value.statistics(after[None]), terms)
            worth = map(float, (log_reward[0].exp() @ transition.reward_bins, end[0].sigmoid(), next_value))
            key = tuple(after.tolist())
            found[key] = (found.get(key, [0])[0] + prior[:, k], *worth)
        return found, float(terms.reset_value)

    def loops(self, codes, context, settings):
        """Q (A,) of one decision and the number of grids expanded, by loops."""

        def back_up(grid, values):
            q, (following, reset_value) = torch.zeros(4), graph[grid]
            for after, (chance, reward, end, next_value) in following.items():
                going_on = values.get(after, next_value)
                q += chance * (reward + 0.95 * ((1 - end) * going_on + end * reset_value))
            return q

        root = tuple(codes.tolist())
        graph, frontier, layers = {root: self.outcomes(root, context)}, {root: 1.0}, 1
        while True:
            reached = {}
            for grid, reach in frontier.items():
                q = back_up(grid, {})
                margin = settings.expand_margin * (q.max().abs() + 1)  # 1 is the largest reward
                close = [a for a in range(4) if q[a] > q.max() - margin]
                if not close or (grid == root and len(close) == 1):
                    continue
                for after, (chance, _, end, _) in graph[grid][0].items():
                    p = reach * float(chance[close].max()) * (1 - end)
                    if p > settings.min_branch_prob and after not in graph:
                        reached[after] = max(p, reached.get(after, 0))
            if not 0 < len(reached) <= settings.nodes - len(graph):
                break
            frontier, layers = reached, layers + 1
            graph |= {grid: self.outcomes(grid, context) for grid in reached}
        values = {}
        for _ in range(layers):
            q = {grid: back_up(grid, values) for grid in graph}
            values = {grid: float(of_grid.max()) for grid, of_grid in q.items()}
        return q[root], len(graph)

    @torch.no_grad()
    def test_a_search_equals_loops_one_decision_at_a_time(self):
        """Equal grids are expanded once, no decision exceeds its budget, and decisions do not influence each other."""
        planner = self.system.planner
        codes, context = self.codes[[*range(9), 0, 0]], self.context[[*range(9), 0, 1]]
        planner.CHUNK, most = 1000, []
        for nodes, margin, probability in (
            (1, 9, 0),
            (8, 9, 0),
            (9, 9, 0),
            (30, 9, 0.05),
            (40, 0.2, 0.001),
            (99, 0.2, 0.001),
        ):
            settings = PlannerSettings(nodes=nodes, top_p=1.0, expand_margin=margin, min_branch_prob=probability)
            planner.settings = settings
            with self.subTest(settings), mock.patch.object(planner, "_expand", wraps=planner._expand) as expanded:
                q = planner.action_values(codes, context, PlaceMemory.empty(len(codes), 16, 6))
                pairs = [pair for call in expanded.call_args_list for pair in zip(*call.args[2::-2], strict=True)]
                grids = [(int(row), tuple(grid.tolist())) for row, grid in pairs]
                self.assertEqual(len(set(grids)), len(grids))
                counts = np.bincount([row for row, _ in grids])
                expected = [self.loops(codes[row], context[row, None], settings) for row in range(len(codes))]
                self.assertEqual(counts.tolist(), [number for _, number in expected])
                torch.testing.assert_close(q, torch.stack([values for values, _ in expected]), atol=1e-4, rtol=1e-4)
                most.append(counts.max())
                self.assertLessEqual(most[-1], nodes)
        self.assertGreater(len(set(most)), 2)  # from a single step to three

    # A corridor of 16 patches: one action moves the body right, one left, two nothing; the goal is four steps away.
    in_corridor = torch.tensor([[0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0]], dtype=torch.uint8)

    def predict(self, grids, key):
        """What eight effects, of which six do nothing, make of grids of the corridor."""
        place, after = (grids == 1).int().argmax(1), []
        for move in (1, -1, *[0] * 6):
            moved = torch.where(grids == 1, 0, grids)
            after.append(moved.scatter(1, (place + move).clamp(0, 15)[:, None], 1))
        first = torch.tensor([0, 1, *[2] * 6]).expand(len(grids), -1)
        return torch.stack(after, 1), first, self.system.transition.effects.key(torch.stack(after, 1))

    @contextlib.contextmanager
    def corridor(self, logits, ends=False):
        """The corridor's prior and heads; with `ends`, what does nothing ends the episode."""

        def heads(codes, next_codes, places, modulation, row):
            reached = ((codes == 2) & (next_codes == 1)).any(1, keepdim=True)
            reward = torch.where(reached, torch.tensor([-99.0, -99, 0]), torch.tensor([-99.0, 0, -99]))
            return reward, torch.where((codes == next_codes).all(1) & ends, 99.0, -99.0)

        with (
            mock.patch.object(self.system.transition, "log_prior", lambda context: logits.log_softmax(-1)),
            mock.patch.object(self.system.transition, "reward_and_termination", heads),
        ):
            yield

    def test_a_deep_search_sees_a_distant_reward_where_the_belief_is_sure(self):
        system, planner = self.system, self.system.planner
        for layer in (system.target_value.state_out, system.target_value.reset_out[-1]):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
        sure, doubt = 99 * torch.eye(4, 8)[None], torch.zeros(1, 4, 8)
        for logits, nodes, found in ((sure, 1, 0), (sure, 3, 0), (sure, 12, 0.95**3), (doubt, 12, 0)):
            planner.settings = PlannerSettings(nodes=nodes, layers=4)
            with self.corridor(logits):
                q = planner.action_values(
                    self.in_corridor, self.context[:1], PlaceMemory.empty(1, 16, 6), predict=self.predict
                )[0]
            with self.subTest(nodes=nodes, found=found):
                self.assertAlmostEqual(float(q[0]), found, places=4)
                self.assertEqual(bool(q[0] > q[1:].max()), found > 0)

    def test_an_episode_is_worth_ending_for_what_the_next_one_is_known_to_begin_with(self):
        """The same corridor, in which doing nothing ends the episode, and episodes begin beside the goal."""
        system, planner = self.system, self.system.planner
        planner.settings = PlannerSettings(nodes=12, layers=4)
        for layer in (system.target_value.state_out, system.target_value.reset_out[-1]):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
        places = PlaceMemory.empty(1, 16, 6)
        places.start[0, 8], places.start[0, 9] = 1, 2
        for begun, found in ((1, 0), (-1, 0), (2, 0.95)):
            places.begun.fill_(begun)
            with self.corridor(99 * torch.eye(4, 8)[None], ends=True):
                q = planner.action_values(self.in_corridor, self.context[:1], places, predict=self.predict)[0]
            with self.subTest(begun=begun):
                self.assertAlmostEqual(float(q[2]), found, places=4)
                self.assertAlmostEqual(float(q[0]), max(0.95**3, found * 0.95), places=4)

    def test_the_belief_does_not_change_within_a_plan(self):
        """However deep the search, contexts are read once, those of the present."""
        planner = self.system.planner
        planner.settings = PlannerSettings(nodes=9, expand_margin=100, min_branch_prob=0)
        with mock.patch.object(planner.value, "read", wraps=planner.value.read) as read:
            planner.action_values(self.codes, self.context, self.places)
        self.assertEqual([call.args[0] is self.context for call in read.call_args_list], [True])

    def test_cached_effects_change_nothing(self):
        planner, network = self.system.planner, self.system.transition.effects
        plain = planner.action_values(self.codes, self.context, self.places)
        for slots in (1 << 15, 3):  # with room for all grids, and with hardly any
            cache = EffectCache(network, slots)
            for _ in range(2):
                cached = planner.action_values(self.codes, self.context, self.places, predict=cache)
                torch.testing.assert_close(cached, plain)

    def test_chunks_change_nothing(self):
        planner = self.system.planner
        planner.settings = PlannerSettings(nodes=9, expand_margin=100, min_branch_prob=0)
        whole = planner.action_values(self.codes, self.context, self.places)
        planner.CHUNK = 4
        predict = mock.Mock(wraps=self.system.transition.effects.predict_each_once)
        chunked = planner.action_values(self.codes, self.context, self.places, predict=predict)
        torch.testing.assert_close(chunked, whole)
        self.assertEqual(max(len(call.args[0]) for call in predict.call_args_list), 4)

    def test_a_context_that_is_not_finite_does_not_stop_the_planner(self):
        """The training stops when it next checks its losses, and names the one that is not finite."""
        values = self.system.planner.action_values(self.codes, self.context * torch.nan, self.places)
        self.assertEqual(values.shape, (9, 4))

    def test_the_value_learns_and_the_target_value_and_the_belief_do_not(self):
        system = self.system
        losses = system.planner.loss(system.value, *self.lifetimes())
        self.assertEqual(set(losses), {"value", "reset_value"})
        sum(losses.values()).backward()
        self.assertTrue(all(p.grad is not None for p in system.value.parameters()))
        fixed = [*system.target_value.parameters(), *system.engine.parameters()]
        self.assertTrue(all(p.grad is None for p in fixed))

    def test_actions_that_the_planner_would_not_choose_end_the_return(self):
        """Where every action taken differs from the planner's choice, targets are the planner's maxima."""
        system = self.system
        experience, context = self.lifetimes()
        codes, contexts = experience.codes.flatten(0, 1), context[:, :-1].flatten(0, 1)
        places = PlaceMemory.before_steps(experience, 6)
        values = system.planner.action_values(codes, contexts, places, nodes=1)
        never = experience._replace(action=((values.argmax(-1) + 1) % 4).view(6, 12))
        predicted = system.value(system.value.statistics(codes), system.value.read(contexts))
        expected = (predicted - values.amax(-1)).square().mean()
        torch.testing.assert_close(system.planner.loss(system.value, never, context)["value"], expected)

    def test_lambda_returns_equal_those_computed_by_hand(self):
        """Where every action is the planner's choice: backwards through one lifetime, across ends of episodes."""
        system, slow = self.system, self.system.target_value
        experience, context = self.lifetimes()
        codes, contexts = experience.codes.flatten(0, 1), context[:, :-1].flatten(0, 1)
        places = PlaceMemory.before_steps(experience, 6)
        values = system.planner.action_values(codes, contexts, places, nodes=1)
        chosen = experience._replace(action=values.argmax(-1).view(6, 12))
        best, squares, of_reset = values.amax(-1).view(6, 12), [], []
        with torch.no_grad():
            predicted = system.value(system.value.statistics(codes), system.value.read(contexts)).view(6, 12)
            for row in range(6):
                target = None
                for t in reversed(range(12)):
                    before, ended = context[row : row + 1, t], bool(experience.ended[row, t])
                    grid = experience.codes[row, (t + 1) % 12] if ended else experience.next_codes[row, t]
                    after = slow(slow.statistics(grid[None]), slow.read(context[row : row + 1, t + 1]))
                    if target is not None and bool(experience.terminated[row, t]):
                        of_reset.append(float(system.value.read(before).reset_value - target) ** 2)
                    boot = after if target is None else 0.8 * target + 0.2 * after
                    taken = experience.reward[row, t] + 0.95 * boot
                    target = 0.5 * taken + 0.5 * best[row, t]
                    squares.append(float(predicted[row, t] - target) ** 2)
        self.assertTrue(experience.ended.any())
        losses = system.planner.loss(system.value, chosen, context)
        self.assertAlmostEqual(float(losses["value"].detach()), float(np.mean(squares)), places=4)
        self.assertAlmostEqual(float(losses["reset_value"].detach()), float(np.mean(of_reset)), places=4)


class TestController(unittest.TestCase):
    def test_it_acts_and_remembers_in_one_world_or_many(self):
        system = tiny_system()
        for batch in (1, 7):
            agent = AgentController(system)
            lifetimes = rollout(HiddenRulesWorld(system.settings.world, batch, VALIDATION, 0), agent)
            self.assertEqual(lifetimes.reward.shape, (batch, 12))
            self.assertEqual((len(agent.memory), len(agent.nll)), (12, 12))
            torch.testing.assert_close(system.engine(agent.memory), agent.belief, atol=1e-4, rtol=1e-4)

    def test_it_accepts_views_of_arrays(self):
        agent, frame = AgentController(tiny_system()), np.arange(768, dtype=np.uint8).reshape(16, 16, 3)
        for view in (frame[::-1], frame.transpose(1, 0, 2)):
            agent.reset(view)
            ended = {"episode_terminated": True, "episode_truncated": False, "final_frame": view}
            agent.observe(agent.act(), WorldStep.of(view, 1.0, ended))
            self.assertTrue(np.array_equal(agent.obs[0], view))

    def test_a_new_lifetime_begins_with_an_empty_memory_and_the_initial_belief(self):
        system = tiny_system()
        agent, world = AgentController(system), HiddenRulesWorld(tiny().world, 3, VALIDATION, 0)
        rollout(world, agent)
        agent.reset(world.reset())
        self.assertEqual(len(agent.memory), 0)
        torch.testing.assert_close(agent.belief, system.engine.initial_belief(3))

    def test_it_explores_with_the_given_probability(self):
        agent = AgentController(tiny_system())
        agent.reset(HiddenRulesWorld(tiny().world, 400, VALIDATION, 0).reset())
        greedy, differing = agent.act(), []
        for exploration in (0.0, 0.4, 1.0):
            agent.explore(exploration, make_generator())
            differing.append(float((agent.act() != greedy).float().mean()))
        self.assertEqual(differing[0], 0)
        self.assertAlmostEqual(differing[1], 0.4 * 3 / 4, delta=0.08)  # a random action is the greedy one in a quarter
        self.assertAlmostEqual(differing[2], 3 / 4, delta=0.08)


class Frozen(AgentController):
    """An agent that never learns from what it observes."""

    def observe(self, action, step):
        super().observe(action, step)
        self.belief = self.engine.initial_belief(len(self.obs))


class TestWhatTheAgentMayKnow(unittest.TestCase):
    def test_the_rule_never_reaches_the_agent(self):
        """Another hidden rule behind equal observations changes nothing."""
        settings = tiny(world={"slip": 0.0}).world
        system, seen = tiny_system(), []
        for another in (False, True):
            world = HiddenRulesWorld(settings, 5, VALIDATION, 0)
            world.reset()
            world.position[:] = torch.tensor([[0, 0], [3, 3], [3, 2]])  # a corner, where up and left change nothing
            frames, rule = world.render(), world.rule
            action = (rule.action_map == 0).float().argmax(1)  # up
            if another:  # exchange the two moves that are not used
                swapped = rule.action_map.clone()
                for row in range(5):
                    down, right = ((rule.action_map[row] == move).nonzero().item() for move in (1, 3))
                    swapped[row, down], swapped[row, right] = 3, 1
                world.rule = world.rule._replace(action_map=swapped)
            agent = AgentController(system)
            agent.reset(frames)
            agent.act()
            step = world.step(action)
            agent.observe(action, step)
            seen.append((agent.act(), agent.belief, *step))
        for one, other in zip(*seen, strict=True):
            self.assertTrue(torch.equal(one, other))
        names = vars(agent) | agent.memory.experience()._asdict()
        self.assertFalse(any("rule" in name or "task" in name for name in names))

    def test_no_reference_leads_from_the_agent_to_anything_hidden(self):
        """Not to the world, its rule or its random streams, nor to the filter of the references."""
        system = tiny_system()
        agent, world = AgentController(system), HiddenRulesWorld(tiny().world, 3, VALIDATION, 0)
        exact = ExactFilter(world)
        rollout(world, agent, [exact])
        hidden = (HiddenRulesWorld, ExactFilter, Rule, torch.Generator)
        self.assertEqual([type(one) for one in reachable(agent) if isinstance(one, hidden)], [])
        storages = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(agent)}
        secret = [tensor for root in (world, exact) for tensor in tensors_of(root) if tensor.numel() > 3]
        self.assertFalse(storages & {tensor.untyped_storage().data_ptr() for tensor in secret})
        for leak in (world, [exact], {"step": world.step}, lambda: world.rule):  # the search would find it
            agent.leak = leak
            self.assertTrue(any(isinstance(one, hidden) for one in reachable(agent)), leak)

    def test_random_streams_of_a_world_depend_neither_on_the_agent_nor_on_observers(self):
        system, lifetimes, states = tiny_system(), [], []
        for watched, seed, kind in ((False, 1, AgentController), (True, 2, AgentController), (True, 3, Frozen)):
            torch.manual_seed(seed)  # whatever else is random in the process
            world = HiddenRulesWorld(tiny().world, 8, VALIDATION, 0)
            lifetimes.append(rollout(world, kind(system), [ExactFilter(world)] if watched else []))
            states.append([x.get_state() for x in vars(world).values() if isinstance(x, torch.Generator)])
        for one, other in zip(lifetimes[0], lifetimes[1], strict=True):
            self.assertTrue(torch.equal(one, other))
        self.assertGreater(len(states[0]), 1)
        for one, other in zip(states[0], states[2], strict=True):
            self.assertTrue(torch.equal(one, other))


class TestLearner(unittest.TestCase):
    def test_collecting_searches_as_deep_as_set(self):
        for nodes in (2, 5):
            learner = Learner(build_system(tiny(planner={"collect_nodes": nodes})))
            with mock.patch.object(Planner, "action_values", return_value=torch.zeros(8, 4)) as values:
                learner.collect(exploration=0.0)
            self.assertEqual({call.args[3] for call in values.call_args_list}, {nodes})

    def test_only_training_tasks_are_ever_stored(self):
        for holdout in ("combinations", "permutations"):
            learner = Learner(build_system(tiny(world={"holdout": holdout})))
            train(learner, until=24)  # with and without the planner
            stored = torch.cat([block.task for block in learner.store.blocks])
            self.assertTrue(torch.isin(stored, task_split(learner.settings.world, "train")).all())

    def test_perception_keeps_apart_what_only_final_observations_show(self):
        world = {"gym_id": "Room-v0", "lifetime": 40, "noise": 0.0, "slip": 0.0}
        for seed in range(3):
            settings = tiny(world=world, transition={"reward_bins": (0.0, 0.5)}, planner={"keypoints": 2})
            learner = Learner(build_system(replace(settings, seed=seed)))
            train(learner, until=TOTAL - 1)
            # Background, goal, body, and the body on the goal, which ends the episode.
            found = [int(learner.metrics[name]) for name in ("vae/kinds", "vae/shared_codes")]
            self.assertEqual(found, [4, 0])
            seen = torch.cat([block.final_obs for block in learner.store.blocks])
            vae = learner.system.vae
            codes, patches = vae.encode(seen, torch.zeros(len(seen), 32)).flatten(), vae.cut(seen).flatten(0, 1)
            self.assertEqual(len(patches.unique(dim=0)), 4)
            self.assertEqual(len(torch.cat([patches, codes[:, None]], 1).unique(dim=0)), 4)
            self.assertEqual(len(codes.unique()), 4)

    def test_the_encoder_learns_and_codes_are_dropped_only_where_an_appearance_is_inferred(self):
        for appearance in (0, 4):
            learner = Learner(build_system(tiny(context={"appearance": appearance})))
            train(learner, until=1)
            before = copy.deepcopy(learner.system.vae)
            with mock.patch.object(type(before), "drop_codes") as drop_codes:
                train(learner, until=20)
            self.assertEqual(drop_codes.call_count, 2 if appearance else 0)
            pairs = zip(before.named_parameters(), learner.system.vae.parameters(), strict=True)
            same = {name for (name, old), new in pairs if torch.equal(old, new)}
            self.assertEqual("encoder_in.weight" in same, appearance == 0)
            self.assertNotIn("decoder_in.weight", same)

    def test_gradients_do_not_cross(self):
        learner = Learner(build_system(tiny()))
        train(learner, until=20)
        system, rows = learner.system, learner.store.sample(8, learner.sampler)
        experience = learner.store.experience.rows(rows)
        engine = [*system.engine.parameters(), *system.transition.contextual_parameters()]
        parts = {
            "vae": list(system.vae.parameters()),
            "effects": list(system.transition.effects.parameters()),
            "engine": engine,
            "value": list(system.value.parameters()),
        }
        beliefs = learner.learn_context(experience)
        for name, learn in (
            ("vae", lambda: learner.learn_perception(rows, beliefs)),
            ("effects", lambda: learner.learn_effects()),
            ("engine", lambda: learner.learn_context(experience)),
            ("value", lambda: learner.learn_value(experience, beliefs)),
        ):
            before = {part: [p.detach().clone() for p in parameters] for part, parameters in parts.items()}
            learn()
            for part, parameters in parts.items():
                same = all(torch.equal(p, old) for p, old in zip(parameters, before[part], strict=True))
                self.assertEqual(same, part != name, f"{part} in an update of {name}")

    def test_the_target_value_follows_the_value(self):
        learner = Learner(build_system(tiny(planner={"tau": 1.0})))
        train(learner, until=18)
        states = zip(learner.system.target_value.parameters(), learner.system.value.parameters(), strict=True)
        self.assertTrue(all(torch.equal(target, value) for target, value in states))

    def test_its_state_decides_its_future(self):
        """Also while effects are learnt from labels; an inferred appearance is kept in checkpoints too."""
        settings = tiny(world={"tint": 0.8}, context={"appearance": 4})
        learner = Learner(build_system(settings))
        weights = [p.detach().clone() for p in learner.system.appearance.parameters()]
        train(learner, until=9)
        self.assertEqual(learner.phase(), ("effects", 3))
        changed = zip(learner.system.appearance.parameters(), weights, strict=True)
        self.assertTrue(all(not torch.equal(p, old) for p, old in changed))
        folder = temporary_folder()
        learner.store.save_blocks(folder)
        restored = Learner(build_system(settings))
        restored.load_state_dict(copy.deepcopy(learner.state_dict()), folder)
        for one in (learner, restored):
            train(one)
        self.assertEqual(learner.metrics, restored.metrics)
        self.assertEqual(learner.env_steps, restored.env_steps)
        for name, module in learner.system.modules().items():
            for key, tensor in module.state_dict().items():
                self.assertTrue(torch.equal(tensor, restored.system.modules()[name].state_dict()[key]), f"{name}.{key}")

    def test_blocks_are_reencoded_under_the_present_version(self):
        learner = Learner(build_system(tiny()))
        train(learner, until=20)
        self.assertGreater(min(learner.store.version), 0)
        index = learner.store.oldest()
        learner.reencode(index)
        self.assertEqual(learner.store.version[index], learner.update)

    def test_phases_exploration_and_learning_rates_follow_their_schedules(self):
        learner = Learner(build_system(tiny(training={"final_lr_scale": 0.5}, vae={"final_lr_scale": 0.1})))
        phases, rates = [], []
        for number in range(TOTAL):
            learner.update = number
            phase, update = learner.phase()
            learner.set_learning_rates(phase, update)
            phases.append((phase, update))
            rates.append({name: o.param_groups[0]["lr"] for name, o in learner.optimizers.items()})
        names = ["perception"] * 6 + ["effects"] * 8 + ["adaptation"] * 24
        self.assertEqual(phases, list(zip(names, [*range(6), *range(8), *range(24)], strict=True)))
        settings = learner.settings
        self.assertEqual(rates[0]["vae"], 0)  # the encoder warms up in the first tenth
        self.assertAlmostEqual(rates[1]["vae"], 0.85 * settings.vae.encoder_lr)
        self.assertAlmostEqual(rates[6]["vae"], 0.1 * settings.vae.encoder_lr)
        self.assertAlmostEqual(rates[-1]["vae"], settings.vae.late_lr)
        sections = {"context": settings.context, "value": settings.planner, "effects": settings.transition}
        for name, section in sections.items():
            self.assertAlmostEqual(rates[14][name], section.learning_rate)
            self.assertAlmostEqual(rates[14 + 12][name], 0.75 * section.learning_rate)
        shares = [round(learner.exploration(update), 3) for update in (0, 3, 4, 14, 24, 99)]
        self.assertEqual(shares, [1, 1, 0.3, 0.165, 0.03, 0.03])

    def test_rewards_beyond_the_bins_are_noticed(self):
        learner = Learner(build_system(tiny()))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            learner.collect(exploration=1.0)
        bins = learner.settings.transition.reward_bins
        self.assertEqual(bins, (-1, 0, 1))
        step = HiddenRulesWorld.step

        def doubled(world, action):
            happened = step(world, action)
            return happened._replace(reward=2 * happened.reward)

        with (
            mock.patch.object(HiddenRulesWorld, "step", doubled),
            self.assertWarnsRegex(UserWarning, r"\(-1.0, 0.0, 1.0\)"),
        ):
            learner.collect(exploration=1.0)

    def test_a_store_too_small_for_the_random_lifetimes_is_said(self):
        learner = Learner(build_system(tiny()))
        learner.collect(exploration=1.0)
        learner.store.budget = learner.store.bytes * 3 // 2
        with self.assertWarnsRegex(UserWarning, "holds only 8 of 16 random lifetimes: raise it"):
            learner.collect_random_lifetimes()

    def test_another_engine_takes_the_place_of_the_built_in_one(self):
        class Forgetful(ContextInferenceEngine):
            def context(self, belief):
                return super().context(belief) * 0

        system = build_system(tiny(), engine=Forgetful)
        train(Learner(system), until=20)
        rows = system.transition.log_prior(system.engine.context(system.engine.initial_belief(1))[:, :-1])[0]
        self.assertTrue(torch.equal(rows[0], rows[1]))  # without a context all actions are alike

    def test_another_planner_takes_the_place_of_the_built_in_one(self):
        class Still(Planner):
            def action_values(self, codes, context, places, nodes=0, predict=None):
                return torch.zeros(len(codes), context.shape[1] - 1)

            def loss(self, value, experience, context):
                return {"none": sum(p.sum() for p in value.parameters()) * 0}

        learner = Learner(build_system(tiny(), planner=Still))
        train(learner)
        self.assertIsInstance(learner.system.planner, Still)
        self.assertIn("value/none", learner.metrics)
        self.assertIsInstance(load_system(tiny_run(), planner=Still)[0].planner, Still)


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


def tensors_of(root: object) -> list[torch.Tensor]:
    """Every tensor that references lead to from an object."""
    return [one for one in reachable(root) if isinstance(one, torch.Tensor)]


if __name__ == "__main__":
    unittest.main()
