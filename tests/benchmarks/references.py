"""All reference agents in a run's world, the costly Bayes-adaptive rollouts too: `python3 -m tests.benchmarks.references RUN`.

The result is kept in references/ beside the run, where the report finds it; it is computed once for a world.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor
from tyro.conf import Positional

from agent import rollout
from context_engine import ActionValues, KnownRuleAgent, ThompsonAgent
from environment import HiddenRulesWorld, order_by_role, rule_space_of
from main import EVALUATION_SEEDS, Settings, references, format_ci, summary
from memory import RunFolder, UserError, WorldStep, require, write_json


@dataclass(frozen=True)
class Arguments:
    """Roll out every reference agent in a run's world."""

    run: Positional[Path]
    """Folder of the run; only its world counts."""
    lifetimes: int = 1024
    """Held-out lifetimes, at least 2."""
    rollouts: int = 64
    """Imagined lifetimes for each action of the Bayes-adaptive agent; 0 to leave it out."""
    split: Literal["validation", "test"] = "test"
    """Which tasks."""


class BayesAdaptiveAgent(ThompsonAgent):
    """Bayes-adaptive rollouts: tries every action in imagined lifetimes, each under a rule drawn from the exact
    posterior and continued by Thompson sampling, and takes the action with the best mean.

    One step of policy probability_of_improvement on Thompson sampling in the Bayes-adaptive decision process (Bertsekas and Castanon,
    "Rollout Algorithms", 1999; root sampling as in Guez et al., "BAMCP", 2012): what it earns bounds the Bayes optimum
    from below. Where the posterior is certain nothing is imagined, because there is nothing to find out.

    Args:
        world, q, seed: as in `ThompsonAgent`.
        rollouts: imagined lifetimes for each action, at least 1; all actions meet the same rules and the same luck.
        horizon: steps of each, at least 1; from there on counts what the drawn rule's own planner expects.
        certain: nll of entropy below which the posterior counts as certain.
    """

    CHUNK = 8192 * 144  # numbers in the posteriors of imagined lifetimes; bounds memory

    def __init__(
        self, world: HiddenRulesWorld, q: ActionValues, seed: int, rollouts: int = 64, horizon: int = 16, certain: float = 0.01
    ) -> None:  # fmt: skip
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
        """The actions (B,) int64 with the best mean; Thompson sampling's where the posterior is certain."""
        action = super().act()
        unsure = (torch.special.entr(self.filter.log_posterior.exp()).sum(1) > self.certain).nonzero()[:, 0]
        some = max(1, self.CHUNK // (len(self.world.space) * self.rollouts))
        for rows in unsure.split(some) if len(unsure) else ():
            action[rows] = self._mean_returns(rows).argmax(1)
        return action

    def _mean_returns(self, rows: Tensor) -> Tensor:
        """Means (n, A) over the imagined lifetimes of worlds `rows` (n,) that begin with each action."""
        each = rows.repeat_interleave(self.rollouts)
        log_posterior = self.filter.log_posterior[each]
        task = self.sample_task(log_posterior)
        position = order_by_role(self.world.order_by_colour(self.world.position)[each], self.world.space.rule(task))  # if that rule held
        unseen = replace(self.world.settings, noise=0, switch=0, switch_step=0)  # rules last for as long as it imagines
        self.imagined += 1
        means = []
        walls = None if self.world.walls is None else self.world.walls[each]
        for action in range(self.world.settings.actions):
            world = HiddenRulesWorld(unseen, len(each), task, self.imagined, self.world.device)
            world.set_state(task, position, self.world.episode_step[each], walls)
            returns = self._imagine(world, torch.full_like(task, action), log_posterior)
            means.append(returns.view(len(rows), self.rollouts).mean(1))
        return torch.stack(means, 1)

    def _imagine(self, world: HiddenRulesWorld, action: Tensor, log_posterior: Tensor) -> Tensor:
        """Returns (N,) of imagined worlds that begin with `action` (N,) under log posteriors (N, rules)."""
        agent = ThompsonAgent(world, self.q, self.imagined)
        agent.reset(action)  # instead of pictures, of which it only counts the rows
        agent.filter.log_posterior = log_posterior
        earned = torch.zeros(world.batch, device=world.device)
        for _ in range(min(self.horizon, self.left)):
            step = world.step_unseen(action)
            agent.observe(action, step)
            earned, action = earned + step.reward, agent.act()
        if self.left > self.horizon:
            earned += KnownRuleAgent(world, self.q).values().amax(1)
        return earned


def main(arguments: Arguments) -> None:
    """Compute what is missing, and print it."""
    run, split, lifetimes, rollouts = arguments.run, arguments.split, arguments.lifetimes, arguments.rollouts
    require("lifetimes", lifetimes, 2, 10**6)
    require("rollouts", rollouts, 0, 10**6)
    world = RunFolder(run).settings(Settings()).world
    if world.gym_id:
        raise UserError(f"{world.gym_id} has no exact solution, so no references but the random agent, which evaluate shows.")
    if rollouts and len(rule_space_of(world)) > 1000:
        raise UserError(f"rollouts over {len(rule_space_of(world)):,} rules would take days: leave them out by --rollouts 0.")
    asked = {"world": dataclasses.asdict(world), "split": split, "lifetimes": lifetimes, "rollouts": rollouts}
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
    path = run.parent / "references" / f"{split}-{digest}.json"
    if not path.exists():
        lived = dict(references(world, lifetimes, split, torch.device("cpu")))
        if rollouts:
            worlds = HiddenRulesWorld(world, lifetimes, split, EVALUATION_SEEDS[split])
            lived["bayes_adaptive"] = rollout(worlds, BayesAdaptiveAgent(worlds, ActionValues(world), EVALUATION_SEEDS[split], rollouts))
        path.parent.mkdir(exist_ok=True)
        write_json(asked | {"agents": {name: summary(one) for name, one in lived.items()}}, path)
    for name, one in json.loads(path.read_text())["agents"].items():
        print(f"{name:18s} {format_ci(one['return_mean'], one['return_mean_ci95'], 2)}")
    print(f"in {path}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, prog="python3 -m tests.benchmarks.references"))
    except (UserError, ValueError) as error:
        sys.exit(f"references: {error}")
