"""The agent: how it plans, acts and meta-learns.

One step: observation -> VAE codes -> context of the present belief -> planner -> action; then next observation -> which
effect happened -> episodic memory -> belief.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from context_engine import AppearanceEngine, ContextInferenceEngine, rollout
from environment import make_worlds
from memory import EpisodicMemory, Experience, LifetimeStore, PlaceMemory, Processes, RunFolder, UserError, WorldStep
from memory import as_tensor, make_generator, remove_stale_blocks, require, require_all
from transition_model import ODD, EffectCache, Expansion, TransitionModel, distinct, find_effects
from transition_model import merge_equal, top_p_filter
from world_model import VAE, Value, ValueTerms, distinct_patches


@dataclass(frozen=True)
class PlannerSettings:
    """Search and the value that it ends in."""

    discount: float = 0.95  # discount of rewards per step, in (0, 1)
    top_p: float = 0.95  # probability of the effects that are expanded, in (0, 1]; the least likely ones are left out
    nodes: int = 16  # most grids of codes that a decision expands, at least 1; 1 looks one step ahead
    collect_nodes: int = 4  # the same while collecting lifetimes to learn from
    layers: int = 3  # most steps that a search looks ahead, at least 1
    # actions are searched deeper whose value is this close to the best one's, as a share of that plus the largest
    # reward; 0 for none
    expand_margin: float = 0.06
    min_branch_prob: float = 0.3  # grids that such actions reach with more than this are expanded, in [0, .999]
    keypoints: int = 8  # points that the value finds in a grid of codes, at least 1
    width: int = 192  # hidden features of the value, at least 1
    lambda_: float = 0.8  # lambda of the lambda-returns that the value learns from, in [0, 1]
    tau: float = 0.2  # the target value moves this share of the way to the learnt one at each update, in (0, 1]
    learning_rate: float = 4e-3  # Adam's initial learning rate of the value, in [0, 1]; it decays with the run

    def __post_init__(self) -> None:
        sizes = dict(keypoints=(1, 1024), width=(1, 4096), **dict.fromkeys(("nodes", "collect_nodes"), (1, 65536)))
        search = dict(top_p=(1e-6, 1), expand_margin=(0, 1e6), min_branch_prob=(0, 0.999))
        learning = dict(discount=(1e-3, 0.9999), lambda_=(0, 1), tau=(1e-6, 1), learning_rate=(0, 1))
        require_all("planner", self, **sizes, **search, **learning, layers=(1, 1024))


class Knowledge(NamedTuple):
    """What a plan knows of B lifetimes: computed once for all grids of its search."""

    prior: Tensor  # (B, A, K): pi(k|a, c)
    heads: tuple[Tensor, ...]  # of reward and termination, see `TransitionModel.modulate_heads`
    value: ValueTerms
    places: PlaceMemory


class Planner:
    """Search under the present belief as deep as it is sure, then the learnt value.

        Q(z, a) = sum_k pi(k|a, c) [ r(z, z'_k, c) + discount ((1 - e) U(z'_k) + e W(c)) ]

    z'_k is the most likely grid of codes under effect k, r the expected reward, e the probability that the episode
    ends. U(z) is max_a Q(z, a) where z is expanded, else the learnt value V(z, c). A layer of the search expands the
    grids, each once, that actions close to the best one reach from the root with more than `min_branch_prob`, if the
    budget has room for all. The last of many layers have few grids, cost as much time each, and change little: `layers`
    bounds their number. Where an episode after a termination began with the same grid as the first one, the next ones
    count as beginning there too: it is a second root, and U of it takes the place of W, which knows no places. The
    belief does not change inside a plan: what an action would reveal counts only as far as V and W have learnt it.
    Sources: Russell and Wefald, 1991; Hansen and Zilberstein, 2001 (LAO*).
    """

    # States expanded at once, and 16 times as many on a GPU, which must be kept busy: bounds memory while the belief is
    # vague and many effects are likely.
    CHUNK = 1024

    def __init__(self, settings: PlannerSettings, transition: TransitionModel, value: Value) -> None:
        self.settings, self.transition, self.value = settings, transition, value

    @torch.inference_mode()  # a decision for one environment takes an eighth less time than with no_grad
    def action_values(
        self, codes: Tensor, context: Tensor, places: PlaceMemory, nodes: int = 0, predict: Callable | None = None
    ) -> Tensor:
        """Q (B, A) of code grids (B, S) uint8 under contexts (B, A + 1, D) and memories of B lifetimes.

        At most `nodes` grids are expanded for a decision; 0 for the setting. `predict` is an `EffectCache`, for as long
        as the effects do not learn.
        """
        predict, transition = predict or self.transition.effects.predict_each_once, self.transition
        prior = transition.log_prior(context[:, :-1]).exp()
        known = Knowledge(prior, transition.modulate_heads(context[:, -1]), self.value.read(context), places)
        row = torch.arange(len(codes), device=codes.device)
        nodes, depth = nodes or self.settings.nodes, torch.ones_like(row)
        again = (places.begun > 1) & (nodes > 1)
        start = torch.where(again, len(row) - 1 + again.cumsum(0), -1)  # (B,): which state a new episode begins in
        codes, row = torch.cat([codes, places.start[again]]), torch.cat([row, row[again]])
        left = depth * (nodes - 1) - again.long()  # grids that each row may still expand
        key, reach = transition.effects.key(codes) + row * ODD, prior.new_ones(len(codes))
        layers = [self._expand(codes, key, row, known, predict, [])]
        while len(layers) < min(nodes, self.settings.layers):
            edge, reach = self._follow(layers, reach, left)
            if len(edge) == 0:
                break
            last = layers[-1]
            row = last.row[last.state[edge]]
            layers.append(self._expand(last.next_codes[edge], last.next_key[edge], row, known, predict, layers))
            left, depth[row] = left - row.bincount(minlength=len(left)), len(layers)
        # Values of a start that is known go around in a circle: they need all sweeps.
        return self._iterate(layers, depth.masked_fill(again, len(layers)), start)

    def _expand(
        self, codes: Tensor, key: Tensor, row: Tensor, known: Knowledge, predict: Callable, layers: list[Expansion]
    ) -> Expansion:
        """The likely effects in states (N, S), with keys and rows (N,), and what each brings; see `Expansion`."""
        chunk = self.CHUNK if codes.device.type == "cpu" else 16 * self.CHUNK
        if len(codes) > chunk:
            parts = zip(codes.split(chunk), key.split(chunk), row.split(chunk), strict=True)
            return Expansion.join([self._expand(*part, known, predict, layers) for part in parts])
        transition = self.transition
        grids, first, grid_key = predict(codes, key - row * ODD)  # (N, K, S), (N, K), (N, K)
        probability = top_p_filter(merge_equal(known.prior[row], first), self.settings.top_p)
        state, effect = (probability > 0).any(1).nonzero(as_tuple=True)  # (P,)
        next_codes, own = grids[state, effect], row[state]
        next_key = grid_key[state, effect] + own * ODD
        log_reward, end = transition.reward_and_termination(codes[state], next_codes, known.places, known.heads, own)
        reward, end = log_reward.exp() @ transition.reward_bins, torch.sigmoid(end)
        # A grid that occurs again, here or in an earlier layer, is evaluated once.
        seen = torch.cat([*(layer.next_key for layer in layers), next_key])
        value = torch.cat([*(layer.next_value for layer in layers), torch.zeros_like(end)])
        each, which = distinct(seen)
        before = len(seen) - len(end)
        new = each[each >= before] - before
        value[before + new] = self.value(self.value.statistics(next_codes[new]), known.value, own[new])
        outcome = (reward, end, value[each[which[before:]]], known.value.reset_value[own])
        return Expansion(row, key, probability, state, effect, next_codes, next_key, *outcome)

    def _follow(self, layers: list[Expansion], reach: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """Which effects (M,) int64 of the last layer lead to the grids of the next, and how probable those are (M,).

        The states of the last layer are reached with `reach` (N,); a row may expand so many more grids: `left` (B,).
        """
        last = layers[-1]
        q = last.back_up(last.next_value, self.settings.discount)
        best = q.amax(1, keepdim=True)
        scale = best.abs() + self.transition.reward_bins.abs().max()
        close = q > best - self.settings.expand_margin * scale  # (N, A)
        if len(layers) == 1:
            close &= (close.sum(1) > 1)[:, None]  # a single candidate leaves nothing to choose
        likely = (last.probability * close[:, :, None]).amax(1)  # (N, K)
        reach = reach[last.state] * likely[last.state, last.effect] * (1 - last.end)  # (P,)
        row = last.row[last.state]
        edge = ((reach > self.settings.min_branch_prob) & (left[row] > 0)).nonzero()[:, 0]
        if len(edge) == 0:
            return edge, reach
        edge = edge[reach[edge].argsort(descending=True, stable=True)]  # the most probable way to a grid comes first
        seen = torch.cat([layer.key for layer in layers])
        each, _ = distinct(torch.cat([seen, last.next_key[edge]]))
        edge = edge[each[each >= len(seen)].sort().values - len(seen)]  # each grid once
        # Part of a layer would favour the actions that lead to it.
        fits = row[edge].bincount(minlength=len(left)) <= left
        edge = edge[fits[row[edge]]]
        return edge, reach[edge]

    def _iterate(self, layers: list[Expansion], depth: Tensor, start: Tensor) -> Tensor:
        """Q (B, A) of the first B states, the roots: as many sweeps of value iteration as each row has layers, `depth`.

        New episodes of a row begin in the state `start` (B,), where it is not -1.
        """
        discount = self.settings.discount
        if len(layers) == 1:
            return layers[0].back_up(layers[0].next_value, discount)[: len(depth)]
        graph = Expansion.join(layers)
        q = graph.back_up(graph.next_value, discount)
        key, states = graph.key.sort()
        place = torch.searchsorted(key, graph.next_key).clamp_max(len(key) - 1)
        expanded, following = key[place] == graph.next_key, states[place]  # (P,)
        anew = start[graph.row[graph.state]]  # (P,)
        for sweep in range(1, len(layers)):
            best = q.amax(1)
            next_value = torch.where(expanded, best[following], graph.next_value)
            reset_value = torch.where(anew >= 0, best[anew], graph.reset_value)
            swept = graph._replace(reset_value=reset_value).back_up(next_value, discount)
            q = torch.where((depth > sweep)[graph.row, None], swept, q)
        return q[: len(depth)]

    def loss(self, value: Value, experience: Experience, context: Tensor) -> dict[str, Tensor]:
        """Learn the values of states and of new episodes, from stored lifetimes and the planner's own search.

        Backwards along each lifetime, with the target value V- (the planner's) and e_t = the episode ended at t:

            after_t = V-(z_t+1, c_t+1) if e_t else V-(z'_t, c_t+1)
            boot_t  = lambda g_t+1 + (1 - lambda) after_t
            g_t     = (r_t + discount boot_t + max_a Q_t) / 2  where the action taken maximises Q_t,
                      max_a Q_t                                where it does not
            loss    = mean (V(z_t, c_t) - g_t)^2 + mean over terminations (W(c_t) - g_t+1)^2

        W reads the belief before the termination and learns what was earned with the belief after it. So it counts what
        terminations reveal, which a plan does not: if it learned from the belief at the start of an episode, to wait
        beside an object of unknown reward would seem better than to touch it. After the last step of a lifetime z_0
        stands for z_t+1. Q is searched one step deep to save time.
        `value` learns, from experience (B, T, ...) under contexts (B, T + 1, A + 1, D), without gradient. Returns both
        terms, value and reset_value, in squared units of reward.
        """
        B, T = experience.action.shape
        codes, ended = experience.codes.flatten(0, 1), experience.ended
        places = PlaceMemory.before_steps(experience, value.codes)
        q = self.action_values(codes, context[:, :-1].flatten(0, 1), places, nodes=1).view(B, T, -1)
        best, choice = q.max(-1)
        with torch.no_grad():
            terms = self.value.read(context[:, 1:].flatten(0, 1))
            following = torch.where(ended[..., None], experience.codes.roll(-1, 1), experience.next_codes).flatten(0, 1)
            after = self.value(self.value.statistics(following), terms).view(B, T)
        # g_t is constant_t + factor_t g_t+1
        discount, lambda_, chosen = self.settings.discount, self.settings.lambda_, experience.action == choice
        taken = (experience.reward + discount * (1 - lambda_) * after + best) / 2
        constant, factor = torch.where(chosen, taken, best), discount * lambda_ / 2 * chosen
        target, g = torch.zeros_like(best), after[:, -1]
        for t in reversed(range(T)):
            g = torch.addcmul(constant[:, t], factor[:, t], g)
            target[:, t] = g
        terms = value.read(context[:, :-1].flatten(0, 1))
        predicted = value(value.statistics(codes), terms).view(B, T)
        error = terms.reset_value.view(B, T)[:, :-1] - target[:, 1:]
        over = experience.terminated[:, :-1]
        of_reset = (error.square() * over).sum() / over.sum().clamp_min(1)
        return {"value": F.mse_loss(predicted, target), "reset_value": of_reset}


@dataclass
class System:
    """The parts of an agent; main.py wires them."""

    settings: Any  # main.Settings
    device: torch.device
    vae: VAE
    transition: TransitionModel
    engine: ContextInferenceEngine
    appearance: AppearanceEngine | None
    value: Value  # learns
    target_value: Value  # follows it; the planner's
    planner: Planner

    def modules(self) -> dict[str, nn.Module]:
        """The parts that have weights, by name."""
        names = ("vae", "transition", "engine", "appearance", "value", "target_value")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def set_num_effects(self, num_effects: int) -> None:
        """Make what is as large as the number of effects K anew; they depend on the seed alone."""
        torch.manual_seed(self.settings.seed)
        self.transition.set_num_effects(num_effects)
        self.engine.set_num_effects(num_effects)

    def load(self, states: dict[str, dict]) -> None:
        """Take over the weights of all parts, from their `state_dict`s by name."""
        self.set_num_effects(len(states["transition"]["effects.marginal"]))
        for name, module in self.modules().items():
            module.load_state_dict(states[name])


class AgentController:
    """Perceives, infers the rules, plans and acts, in B environments at once.

    The appearance context modulates the VAE if the system has one, else the context's world row, which then reaches the
    decoder alone (see `VAE`). With `keep_frames` the observations stay in `memory`, for the store of past lifetimes;
    for `nodes` see `Planner.action_values`. After a decision `context` (B, A + 1, D), `codes` (B, S) uint8 and `values`
    (B, A) are those it saw.
    """

    def __init__(self, system: System, keep_frames: bool = False, nodes: int = 0) -> None:
        self.vae, self.transition, self.engine = system.vae, system.transition, system.engine
        self.appearance, self.planner, self.lifetime = system.appearance, system.planner, system.settings.world.lifetime
        self.keep_frames, self.nodes, self.exploration, self.generator = keep_frames, nodes, 0.0, None

    def explore(self, exploration: float, generator: torch.Generator) -> None:
        """From now on act at random with probability `exploration` in [0, 1], sampled from `generator`."""
        self.exploration, self.generator = exploration, generator

    @torch.no_grad()
    def reset(self, obs: Tensor | np.ndarray) -> None:
        """A lifetime begins: memory and belief are reset, because what happened under another rule says nothing here.
        `obs` is (B, H, W, 3) uint8; a single (H, W, 3) is a batch of one."""
        obs = as_tensor(obs) if isinstance(obs, np.ndarray) else obs
        obs = obs.to(next(self.vae.parameters()).device)
        self.obs = obs[None] if obs.ndim == 3 else obs
        batch, sizes = len(self.obs), (math.prod(self.vae.grid), self.engine.codes, self.engine.num_effects)
        self.memory = EpisodicMemory(batch, self.lifetime, *sizes, obs.device, self.keep_frames)
        self.belief, self.appearance_state = self.engine.initial_belief(batch), None
        self.effect_cache = EffectCache(self.transition.effects)
        self.nll: list[Tensor] = []  # (B,) for each step: its negative log-likelihood, as in ExactFilter

    @torch.no_grad()
    def act(self) -> Tensor:
        """Choose actions (B,) int64, once a step: greedy on the planner's values, or random where exploring."""
        self.context = self.engine.context(self.belief)  # (B, A + 1, D)
        self.visual_context = self._visual_context()  # both observations around this action are encoded under it
        self.codes = self.vae.encode(self.obs, self.visual_context)
        if self.exploration >= 1:  # nothing to plan
            return self._random_action()
        known = (self.context, self.memory.places, self.nodes, self.effect_cache)
        self.values = self.planner.action_values(self.codes, *known)  # (B, A)
        action = self.values.argmax(-1)
        if self.exploration > 0:
            chance = torch.rand(len(action), generator=self.generator, device=action.device)
            action = torch.where(chance < self.exploration, self._random_action(), action)
        return action

    @torch.no_grad()
    def observe(self, action: Tensor, step: WorldStep) -> None:
        """Find out which effect happened, remember the step, and update the belief. IndexError after as many steps as a
        lifetime has: call `reset`."""
        action, step = action.to(self.obs.device), WorldStep(*(part.to(self.obs.device) for part in step))
        next_codes = self.vae.encode(step.next_obs, self.visual_context)
        likelihood = self.transition.effects.log_likelihood(self.codes, next_codes)
        posterior = self.transition.effect_posterior(likelihood)
        self.nll.append(self.transition.nll(likelihood, action, self.context))
        self.memory.append(self.codes, next_codes, posterior, action, self.obs, step)
        self.belief = self.engine.step(self.belief, self.memory.latest())
        self.obs = step.obs

    def _visual_context(self) -> Tensor:
        """The context (B, D) that modulates perception."""
        if self.appearance is None:
            return self.context[:, -1]
        patches = self.vae.patches(self.obs)[:, None]
        contexts, self.appearance_state = self.appearance.sequence(patches, self.appearance_state)
        return contexts[:, 0]

    def _random_action(self) -> Tensor:
        shape, device = (len(self.obs),), self.obs.device
        return torch.randint(self.engine.actions, shape, generator=self.generator, device=device)


@dataclass(frozen=True)
class TrainingSettings:
    """The order and amount of meta-training: perception, then effects, then adaptation."""

    updates: int = 440  # updates of context engine and value (adaptation), at least 1: the length of the run
    envs: int = 64  # environments that are collected from at once, at least 1
    random_lifetimes: int = 512  # lifetimes collected at random before anything is learnt; a multiple of `envs`
    perception_updates: int = 150  # updates of the VAE alone, first, at least 1
    effect_updates: int = 200  # updates of the effects alone, after perception, at least 1
    batch: int = 32  # stored lifetimes in an update of the context engine, at least 1
    value_batch: int = 16  # of these, lifetimes in an update of the value, 1 to `batch`
    effect_batch: int = 8  # stored lifetimes in an update of the effects, at least 1
    frame_batch: int = 256  # stored frames in an update of the VAE, at least 1
    value_from: int = 30  # first update of adaptation at which the value learns
    plan_from: int = 60  # first one that collects with the planner; before it at random and a quarter as often
    collect_every: int = 16  # updates between collections of new lifetimes, at least 1
    effect_every: int = 4  # updates between updates of the effects, at least 1
    perception_every: int = 8  # updates between updates of the VAE, at least 1
    exploration: float = 0.3  # share of random actions when planning begins, in [0, 1]
    exploration_end: float = 0.03  # the same at the end of the run, in [0, 1]; linear in between
    final_lr_scale: float = 0.1  # learning rates fall linearly to this share of their initial values, in [0, 1]
    evaluation_lifetimes: int = 4096  # held-out lifetimes for each agent in the final evaluation, at least 2
    # updates of adaptation between validations, 0 for none: greedy, with `planner.collect_nodes`, on the same
    # held-out lifetimes each time
    validate_every: int = 220
    validation_lifetimes: int = 256  # of each validation, at least 2
    log_every: int = 20  # updates between lines of metrics.jsonl, at least 1
    checkpoint_every: int = 200  # updates between checkpoints, at least 1

    SHARED = ("envs", "batch", "value_batch", "effect_batch", "frame_batch", "random_lifetimes")  # among processes

    def __post_init__(self) -> None:
        every = ("collect_every", "effect_every", "perception_every", "log_every", "checkpoint_every")
        counts = ("updates", "perception_updates", "effect_updates", *self.SHARED, *every)
        require_all("training", self, **dict.fromkeys(counts, (1, 10**9)), value_from=(0, 10**9), plan_from=(0, 10**9))
        shares = dict.fromkeys(("exploration", "exploration_end", "final_lr_scale"), (0, 1))
        lifetimes = dict.fromkeys(("evaluation_lifetimes", "validation_lifetimes"), (2, 10**7))
        require_all("training", self, **shares, **lifetimes, validate_every=(0, 10**9))
        require("training.value_batch", self.value_batch, 1, self.batch)
        if missing := -self.random_lifetimes % self.envs:
            choice = f"a multiple of training.envs: choose {self.random_lifetimes + missing}."
            raise ValueError(f"training.random_lifetimes is {self.random_lifetimes}, but must be {choice}")

    def share(self, processes: int) -> TrainingSettings:
        """Each process's share; UserError unless the shares are equal."""
        whole = {name: getattr(self, name) for name in self.SHARED}
        for name, number in whole.items():
            if missing := -number % processes:
                choice = f"which {processes} processes cannot share equally: choose {number + missing}."
                raise UserError(f"training.{name} is {number}, {choice}")
        return replace(self, **{name: number // processes for name, number in whole.items()})


class Learner:
    """The steps of meta-training, which main.train puts in order. All that decides its future is in `state_dict`.

    Gradients do not cross between parts: the VAE learns from frames, the effects from codes, the context engine with
    prior and heads from stored effect posteriors, the value from the planner's search. Several `processes` learn
    together, each with a Learner of its own.
    """

    LABELLED = ("codes", "next_codes", "action", "segment")  # what `find_effects` reads

    def __init__(self, system: System, processes: Processes | None = None) -> None:
        self.system, self.settings, self.device = system, system.settings, system.device
        self.processes = processes or Processes()
        rank, count = self.processes.rank, self.processes.count
        self.training = self.settings.training.share(count)
        self.store = LifetimeStore(self.settings.memory, self.device, rank, count)
        self.generator = make_generator(self.settings.seed, 4 + 100 * rank, self.device)
        self.sampler = make_generator(self.settings.seed, 5 + 100 * rank)  # of stored lifetimes, on the CPU
        self.optimizers = self._make_optimizers()
        self.total = sum((self.training.perception_updates, self.training.effect_updates, self.training.updates))
        self.update = self.collections = self.env_steps = 0
        self.metrics: dict[str, Tensor] = {}
        self.seconds = 0.0  # of training, so far
        self.validations: list[list[float]] = []  # see `plot_learning`

    def _make_optimizers(self) -> dict[str, torch.optim.Adam]:
        """One for each group of parts that learn together."""
        system = self.system
        encoder = [p for name, p in system.vae.named_parameters() if name.startswith("encoder")]
        for parameter in encoder:  # without an appearance to allow for, it is right as initialized
            parameter.requires_grad_(system.appearance is not None)
        decoder = [p for name, p in system.vae.named_parameters() if not name.startswith("encoder")]
        appearance = [{"params": system.appearance.parameters()}] if system.appearance else []
        groups = {
            "vae": [{"params": encoder}, {"params": decoder}, *appearance],
            "effects": system.transition.effects.parameters(),
            "context": [*system.engine.parameters(), *system.transition.contextual_parameters()],
            "value": system.value.parameters(),
        }
        return {name: torch.optim.Adam(parameters, fused=True) for name, parameters in groups.items()}

    def phase(self) -> tuple[str, int]:
        """The present phase (perception, effects or adaptation), and the number of the present update in it."""
        effects = self.training.perception_updates
        begins = {"adaptation": effects + self.training.effect_updates, "effects": effects, "perception": 0}
        return next((phase, self.update - begin) for phase, begin in begins.items() if self.update >= begin)

    def exploration(self, update: int) -> float:
        """The share of random actions in what an update of adaptation collects; all of them before planning begins."""
        t = self.training
        if update < t.plan_from:
            return 1.0
        done = (update - t.plan_from) / max(1, t.updates - t.plan_from)
        return t.exploration + (t.exploration_end - t.exploration) * min(1.0, done)

    def warm_start(self, run: RunFolder) -> None:
        """Begin with adaptation, on the weights of `run`; UserError if its sizes differ."""
        try:
            self.system.load(run.load()[0]["modules"])
        except (RuntimeError, KeyError) as error:
            raise UserError(f"{run.folder} has parts of other sizes: use the settings it was trained with.") from error
        self.optimizers = self._make_optimizers()
        self.collect_random_lifetimes()
        self.count_kinds()
        self.update = self.training.perception_updates + self.training.effect_updates

    def collect_random_lifetimes(self) -> None:
        """Fill the store with random behaviour; UserError if processes have room for different numbers of lifetimes."""
        while self.collections < self.training.random_lifetimes // self.training.envs:
            self.collect(exploration=1.0)
        held = self.processes.all_gather_object(len(self.store))
        if min(held) < self.training.random_lifetimes:
            budget = f"memory.budget_mb is {self.settings.memory.budget_mb:g}, which holds only {sum(held)}"
            text = f"{budget} of {self.settings.training.random_lifetimes} random lifetimes: raise it"
            if len(set(held)) > 1:  # they find effects together
                raise UserError(f"{text}, because processes hold different numbers ({held}).")
            warnings.warn(f"{text}, because effects are found from them.", stacklevel=2)

    def collect(self, exploration: float) -> None:
        """Roll out lifetimes in training tasks, with a share `exploration` of random actions, and store them."""
        settings, bins = self.settings, self.settings.transition.reward_bins
        # Environments of their own for every collection of every process of every run.
        seed = (settings.seed + 1) * 2**32 + self.processes.rank * 2**22 + self.collections
        world = make_worlds(settings.world, self.training.envs, "train", seed, self.device)
        agent = AgentController(self.system, keep_frames=True, nodes=settings.planner.collect_nodes)
        agent.explore(exploration, self.generator)
        trajectories = rollout(world, agent)
        self.store.add(agent.memory, world.task, trajectories.segment, self.update)
        self.collections += 1
        self.env_steps += trajectories.reward.numel() * self.processes.count
        self.metrics["return"] = trajectories.reward.sum(1).mean()
        if trajectories.reward.min() < bins[0] or trajectories.reward.max() > bins[-1]:
            warnings.warn(f"rewards beyond transition.reward_bins, {bins}, are clipped: widen them.", stacklevel=2)

    def reencode_all(self, perception: bool = False) -> None:
        """`reencode` every block of the store."""
        for index in range(len(self.store.blocks)):
            self.reencode(index, perception)

    @torch.no_grad()
    def reencode(self, index: int, perception: bool = False, rows: int = 8) -> None:
        """Replace a stored block's effect posteriors by the present models' ones, so many rows at a time; its codes too
        if `perception` has changed, which it does all the time only where an appearance is inferred."""
        system, block, device = self.system, self.store.blocks[index], self.device
        experience = self.store.experience.rows(self.store.rows_of(index))
        anew, made = perception or system.appearance is not None, []
        for first in range(0, len(block), rows):
            some = slice(first, first + rows)
            codes, next_codes = experience.codes[some].flatten(0, 1), experience.next_codes[some].flatten(0, 1)
            if anew:
                frames, next_obs = (x.to(device) for x in (block.frames[some], block.next_obs(some)))
                # Without an appearance the encoder's FiLM is the identity under every context.
                seen = torch.zeros(len(codes), self.settings.context.context, device=device)
                seen = self._appearance(frames).flatten(0, 1) if system.appearance else seen
                codes, next_codes = (system.vae.encode(x, seen) for x in (frames.flatten(0, 1), next_obs.flatten(0, 1)))
            likelihood = system.transition.effects.log_likelihood(codes, next_codes)
            made.append((codes, next_codes, system.transition.effect_posterior(likelihood)))
        parts = (torch.cat(part).view(*experience.action.shape, -1) for part in zip(*made, strict=True))
        self.store.reencode(index, *parts, self.update)

    def _appearance(self, frames: Tensor) -> Tensor:
        """Contexts (n, T, D) for the perception of whole lifetimes of frames (n, T, H, W, 3)."""
        patches = self.system.vae.patches(frames.flatten(0, 1))
        return self.system.appearance.sequence(patches.unflatten(0, frames.shape[:2]))[0]

    def learn_perception(self, rows: Tensor, beliefs: Tensor | None = None) -> None:
        """One update of the VAE on frames of lifetimes `rows`, under beliefs (B, T + 1, A + 1, H + K) if there are any.

        Where the appearance is inferred it learns too, from whole lifetimes, of which sixteen frames each are decoded.
        """
        size, system, lifetime = self.training.frame_batch, self.system, self.settings.world.lifetime
        which = torch.randint(len(rows), (size,), generator=self.sampler)
        step = torch.randint(lifetime, (size,), generator=self.sampler)
        if system.appearance:
            few, which = which[: -(-size // 16)], torch.arange(size) // 16
            every = torch.arange(lifetime).repeat(len(few))
            frames = self.store.frames_at(rows[few].repeat_interleave(lifetime), every, every < 0).to(self.device)
            frames = frames.unflatten(0, (len(few), lifetime))
            frames, context = frames[which, step], self._appearance(frames)[which, step]
        else:
            after = torch.arange(size) % 2 == 1  # for a half, because final observations are encoded too
            frames = self.store.frames_at(rows[which], step, after).to(self.device)
            context = torch.zeros(size, self.settings.context.context, device=self.device)
            if beliefs is not None:
                context = system.engine.context(beliefs[which, step])[:, -1].detach()
        if self.update == 0:
            sample = system.vae.patches(self.processes.all_gather(frames)).flatten(0, 1)
            system.vae.init_codes_kmeans(sample if system.appearance else self._distinct_patches())
            self.processes.broadcast(system.vae)
        self.optimizer_step("vae", system.vae.loss(frames, context), clip=1e4)

    @torch.no_grad()
    def drop_codes(self, every: int = 16) -> None:
        """Where appearances differ, drop codes that stand for no kind of patch of their own; see `VAE.drop_codes`."""
        if self.system.appearance:
            frames = self.store.blocks[0].frames.to(self.device)
            sample = (frames, self._appearance(frames))
            self.system.vae.drop_codes(*(self.processes.all_gather(x[:, ::every].flatten(0, 1)) for x in sample))
            self.processes.broadcast(self.system.vae)

    def count_kinds(self) -> None:
        """Log how many kinds of patch there are, and how many of them share a code."""
        self.metrics |= self.system.vae.count_kinds(self._distinct_patches())

    def _distinct_patches(self) -> Tensor:
        """Patches (n, P) float32 of all that is stored, final observations included; see `distinct_patches`."""
        seen = (torch.cat([block.frames.flatten(0, 1), block.final_obs]) for block in self.store.blocks)
        mine = distinct_patches(map(self.system.vae.cut, seen))
        return torch.cat(self.processes.all_gather_object(mine)).to(self.device) / 255 - 0.5

    def find_effects(self) -> None:
        """Find out from the stored random lifetimes which effects there are; labels take the place of posteriors."""
        stored, system, every, s = self.store.experience, self.system, self.processes, self.settings
        sample = stored._replace(**{name: every.all_gather(getattr(stored, name)) for name in self.LABELLED})
        found = find_effects(sample, system.engine.actions, system.vae.grid, s.transition.max_effects, s.seed)
        label, shown, number = every.all_gather_object(found)[0]  # the main process's
        system.set_num_effects(number)
        system.transition.effects.init_marginal(label)
        system.transition.find_telling_pairs(sample)
        every.broadcast(system.transition), every.broadcast(system.engine)
        mine = slice(every.rank * len(stored.action), (every.rank + 1) * len(stored.action))
        posterior = F.one_hot(label[mine], number) * shown[mine, :, None]
        self.store.experience = stored._replace(posterior=posterior.half())
        self.optimizers = self._make_optimizers()
        self.metrics["effects/found"] = torch.tensor(float(number))

    def learn_effects(self, labelled: bool = False) -> None:
        """One update of the effects, from stored lifetimes; see `TransitionModel.effect_loss`."""
        rows = self.store.sample(self.training.effect_batch, self.sampler)
        experience = self.store.experience.rows(rows.to(self.device))
        losses = self.system.transition.effect_loss(experience, self.system.engine.actions, labelled)
        self.optimizer_step("effects", losses, clip=20)

    def learn_context(self, experience: Experience) -> Tensor:
        """One update of context engine, prior and heads; returns the beliefs (B, T + 1, A + 1, H + K)."""
        losses, beliefs = self.system.engine.loss(experience, self.system.transition, self.generator)
        self.optimizer_step("context", losses, clip=20)
        return beliefs

    def learn_value(self, experience: Experience, beliefs: Tensor) -> None:
        """One update of the value, and a step of the target value towards it."""
        system = self.system
        context = system.engine.context(beliefs).detach()
        self.optimizer_step("value", system.planner.loss(system.value, experience, context), clip=10)
        with torch.no_grad():
            for target, learnt in zip(system.target_value.parameters(), system.value.parameters(), strict=True):
                target.lerp_(learnt, self.settings.planner.tau)

    def optimizer_step(self, name: str, losses: dict[str, Tensor], clip: float) -> None:
        """Descend the sum of losses; gradients are averaged over processes and clipped in norm."""
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        learnt = [p for group in optimizer.param_groups for p in group["params"]]
        self.processes.average([p.grad for p in learnt if p.grad is not None])
        nn.utils.clip_grad_norm_(learnt, clip)
        optimizer.step()
        self.metrics |= {f"{name}/{key}": loss.detach() for key, loss in losses.items()}

    def set_learning_rates(self, phase: str, update: int) -> None:
        """Set the learning rates of an update: those of perception fall in its own phase, the encoder's
        after a warm-up in the first tenth of it, all others in adaptation."""
        s, adapts = self.settings, phase == "adaptation"
        scale = 1 - (1 - s.training.final_lr_scale) * min(1.0, update / s.training.updates if adapts else 0)
        early = 1 - (1 - s.vae.final_lr_scale) * min(1.0, self.update / s.training.perception_updates)
        # The decoder learns first, or the encoder would soon give one code to several kinds of patch.
        warmup = min(1.0, 10 * self.update / s.training.perception_updates)
        perception = (s.vae.encoder_lr * warmup, s.vae.decoder_lr, s.context.learning_rate)
        rates = {
            "vae": [s.vae.late_lr] * 3 if adapts else [early * rate for rate in perception],
            "effects": [s.transition.learning_rate * scale],
            "context": [s.context.learning_rate * scale],
            "value": [s.planner.learning_rate * scale],
        }
        for name, optimizer in self.optimizers.items():
            for group, rate in zip(optimizer.param_groups, rates[name], strict=False):
                group["lr"] = rate

    def average_metrics(self) -> None:
        """Replace the metrics by their means over all processes."""
        if self.processes.count > 1:
            means = torch.stack([value.detach().float().cpu() for _, value in sorted(self.metrics.items())])
            self.processes.average([means])
            self.metrics = dict(zip(sorted(self.metrics), means, strict=True))

    def state_dict(self) -> dict:
        """Everything that decides the future of the run, except the stored frames; all processes must call this.
        RuntimeError if their weights differ."""
        modules = {name: module.state_dict() for name, module in self.system.modules().items()}
        if self.processes.count > 1:
            weights = [x.detach().flatten().cpu().double() for state in modules.values() for x in state.values()]
            digest = hashlib.sha256(torch.cat(weights).numpy().tobytes()).hexdigest()
            if len(set(self.processes.all_gather_object(digest))) > 1:
                raise RuntimeError(f"the processes' weights differ at update {self.update}: please report this defect.")
        generators = [self.generator.get_state(), self.sampler.get_state()]
        return {
            "modules": modules,
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "counters": [self.update, self.collections, self.env_steps],
            "metrics": {name: float(value) for name, value in self.metrics.items()},
            "seconds": self.seconds,
            "validations": self.validations,
            "shards": self.processes.all_gather_object({"generators": generators, "store": self.store.state_dict()}),
        }

    def load_state_dict(self, state: dict, blocks: Path) -> None:
        """Restore from a `state_dict` and the folder of the stored blocks; UserError if another number of processes
        made it."""
        if "shards" not in state:
            raise UserError("a checkpoint of a tuning trial can be evaluated and watched, not resumed.")
        shards, rank, count = state["shards"], self.processes.rank, self.processes.count
        if len(shards) != count:
            raise UserError(f"the run was trained by {len(shards)} processes, not {count}: resume it with as many.")
        self.system.load(state["modules"])
        self.optimizers = self._make_optimizers()
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.sampler.set_state(shards[rank]["generators"][1].cpu())
        try:
            self.generator.set_state(shards[rank]["generators"][0].cpu())
        except RuntimeError:  # another kind of device has other states: begin a new stream
            stream = 10**6 + state["counters"][0] * count + rank
            self.generator = make_generator(self.settings.seed, stream, self.device)
        self.update, self.collections, self.env_steps = state["counters"]
        self.metrics = {name: torch.tensor(value) for name, value in state["metrics"].items()}
        self.seconds, self.validations = state["seconds"], state["validations"]
        if self.processes.is_main:
            remove_stale_blocks(blocks, [shard["store"] for shard in shards])
        self.store.load_state_dict(shards[rank]["store"], blocks)
