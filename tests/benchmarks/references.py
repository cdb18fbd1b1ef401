"""A trained agent beside all reference agents, including the costly Bayes-adaptive rollouts.

What the references earn is kept in references/ beside the run's folder, where the report finds it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tyro.conf import Positional

from agent import AgentController, System
from context_engine import ActionValues, KnownRuleAgent, ThompsonAgent, references, rollout
from environment import HiddenRulesWorld, order_by_role, rule_space_of
from main import EVALUATION_SEEDS, Settings, load_system
from memory import RunFolder, UserError, WorldStep, require, write_json
from tests.benchmarks import command_line
from world_model import AGENTS, format_ci, summary


class BayesAdaptiveAgent(ThompsonAgent):
    """Bayes-adaptive rollouts: one step of policy improvement on Thompson sampling.

    Tries every action in imagined lifetimes, each under a rule sampled from the exact posterior and continued by
    Thompson sampling, and takes the action with the best mean return. This is policy improvement in the Bayes-adaptive
    decision process (Bertsekas and Castanon, "Rollout Algorithms", 1999; root sampling as in Guez et al., "BAMCP",
    2012), so its return is a lower bound of the Bayes optimum. Where the posterior is certain it imagines nothing,
    because there is nothing to find out.

    Args:
        world, q, seed: as in `ThompsonAgent`.
        rollouts: imagined lifetimes for each action, at least 1; all actions share their rules and random streams.
        horizon: steps of each, at least 1; beyond it counts what the sampled rule's own planner expects.
        certain: entropy in nats below which the posterior counts as certain.
    """

    CHUNK = 8192 * 144  # numbers in the posteriors of imagined lifetimes; bounds memory

    def __init__(
        self,
        world: HiddenRulesWorld,
        q: ActionValues,
        seed: int,
        rollouts: int = 64,
        horizon: int = 16,
        certain: float = 0.01,
    ) -> None:
        super().__init__(world, q, seed)
        self.rollouts, self.horizon, self.certain = rollouts, horizon, certain
        self.imagined = 0  # worlds so far, and so the seed of the next

    def reset(self, frames: Tensor) -> None:
        """Begin as Thompson sampling does."""
        super().reset(frames)
        self.left = self.world.settings.lifetime

    def observe(self, action: Tensor, step: WorldStep) -> None:
        """Update the posterior."""
        super().observe(action, step)
        self.left -= 1

    def act(self) -> Tensor:
        """The actions (B,) int64 with the best mean return; Thompson sampling's where the posterior is certain."""
        action = super().act()
        entropy = torch.special.entr(self.filter.log_posterior.exp()).sum(1)
        uncertain = (entropy > self.certain).nonzero()[:, 0]
        chunk = max(1, self.CHUNK // (len(self.world.space) * self.rollouts))
        for rows in uncertain.split(chunk) if len(uncertain) else ():
            action[rows] = self._mean_returns(rows).argmax(1)
        return action

    def _mean_returns(self, rows: Tensor) -> Tensor:
        """Means (n, A) over the imagined lifetimes of environments `rows` (n,) that begin with each action."""
        each = rows.repeat_interleave(self.rollouts)
        log_posterior = self.filter.log_posterior[each]
        task = self.sample_task(log_posterior)
        seen = self.world.order_by_colour(self.world.position)[each]
        position = order_by_role(seen, self.world.space.rule(task))  # under the sampled rule
        # Imagined frames are not rendered, and rules do not change within an imagined lifetime.
        settings = dataclasses.replace(self.world.settings, noise=0, switch=0, switch_step=0)
        walls = None if self.world.walls is None else self.world.walls[each]
        self.imagined += 1
        means = []
        for action in range(self.world.settings.actions):
            world = HiddenRulesWorld(settings, len(each), task, self.imagined, self.world.device)
            world.set_state(task, position, self.world.episode_step[each], walls)
            returns = self._imagine(world, torch.full_like(task, action), log_posterior)
            means.append(returns.view(len(rows), self.rollouts).mean(1))
        return torch.stack(means, 1)

    def _imagine(self, world: HiddenRulesWorld, action: Tensor, log_posterior: Tensor) -> Tensor:
        """Returns (N,) of imagined environments that begin with `action` (N,) under log posteriors (N, rules)."""
        agent = ThompsonAgent(world, self.q, self.imagined)
        agent.reset(action)  # in place of frames: it reads only their number
        agent.filter.log_posterior = log_posterior
        total = torch.zeros(world.batch, device=world.device)
        for _ in range(min(self.horizon, self.left)):
            step = world.step_unseen(action)
            agent.observe(action, step)
            total, action = total + step.reward, agent.act()
        if self.left > self.horizon:
            total += KnownRuleAgent(world, self.q).values().amax(1)
        return total


def evaluate_references(system: System, lifetimes: int, split: str, rollouts: int) -> dict[str, Any]:
    """`world_model.summary` of the trained agent and every reference agent by name, in the same lifetimes."""
    seed, world = EVALUATION_SEEDS[split], system.settings.world
    trajectories = {"agent": rollout(HiddenRulesWorld(world, lifetimes, split, seed), AgentController(system))}
    trajectories |= references(world, lifetimes, split, seed, torch.device("cpu"))
    if rollouts:
        worlds = HiddenRulesWorld(world, lifetimes, split, seed)
        agent = BayesAdaptiveAgent(worlds, ActionValues(world), seed, rollouts)
        trajectories["bayes_adaptive"] = rollout(worlds, agent)
    return {name: summary(one) for name, one in trajectories.items()}


def main(
    run: Positional[Path], lifetimes: int = 1024, rollouts: int = 64, split: Literal["validation", "test"] = "test"
) -> None:
    """Evaluate a trained agent and the reference agents, print their returns and keep them for reports.

    Args:
        run: Folder of the run.
        lifetimes: Held-out lifetimes, at least 2.
        rollouts: Imagined lifetimes for each action of the Bayes-adaptive agent; 0 to leave it out.
        split: Which tasks.
    """
    require("lifetimes", lifetimes, 2, 10**6)
    require("rollouts", rollouts, 0, 10**6)
    world = RunFolder(run).settings(Settings()).world
    if world.gym_id:
        raise UserError(
            f"{world.gym_id} has no exact solution; its only reference is the random agent of main.py evaluate."
        )
    if rollouts and len(rule_space_of(world)) > 1000:
        raise UserError(f"rollouts over {len(rule_space_of(world)):,} rules would take days: give --rollouts 0.")
    key = {"world": dataclasses.asdict(world), "split": split, "lifetimes": lifetimes, "rollouts": rollouts}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    path = run.parent / "references" / f"{split}-{digest}.json"
    agents = evaluate_references(load_system(run)[0], lifetimes, split, rollouts)
    path.parent.mkdir(exist_ok=True)
    known = {name: result for name, result in agents.items() if name != "agent"}
    write_json(key | {"agents": known}, path)
    print(f"| agent | return, {lifetimes} lifetimes |\n|---|---|")
    for name, result in agents.items():
        score = format_ci(result["return_mean"], result["return_mean_ci95"], 2)
        print(f"| {AGENTS.get(name, name.replace('_', '-') + ' rollouts')} | {score} |")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    command_line(main)
