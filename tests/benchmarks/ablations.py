"""What each part of the agent contributes: ablations at decision time and in training.

With RUNs: disables every part of `Ablation` in these trained agents, whose weights otherwise stay. Without: trains
the full agent and every variant of TRAINED for each seed, in 333 updates, and ablates the full one
in the same way. All are evaluated in the same held-out lifetimes, and differences are paired by lifetime. Results are
kept in the output folder: the same command continues where it was stopped, and several processes with different seeds
may share one folder. Differences of trained variants are between trainings: their intervals are Student's t over seeds.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tyro.conf import Positional

from agent import AgentController, Learner, Planner, System
from film_layer import FiLMLayer
from main import Settings, build_system, evaluate, train
from memory import Experience, PlaceMemory, UserError, WorldStep, merge, write_json
from tests.benchmarks import command_line, load_systems, over_seeds, score_cells
from transition_model import EffectCache
from world_model import Value, ValueTerms, bootstrap_ci, format_ci, mean, statistics

BASE = Settings()
FULL = "nothing"  # what is removed from the full agent
TRAINED: dict[str, dict] = {  # the settings that remove a part from the training
    "trajectory decoding": {"context": {"decoding_weight": 0.0}},
    "initial scales": {"context": {"token_scale": 1.0, "context_scale": 1.0}, "transition": {"film_scale": 1.0}},
    "look-ahead": {},  # by `ModelFree`
}
# What can be disabled at decision time. belief: it stays initial. search: it is one step. All others: the part
# is modulated by the initial context, whatever was inferred; perception only where an appearance is, for without one
# its modulation is the identity.
Ablation = Literal["belief", "perception", "prior", "reward_and_termination", "value", "search"]


class FrozenBelief(AgentController):
    """An agent whose belief stays the initial one."""

    def observe(self, action: Tensor, step: WorldStep) -> None:
        """Remember the step, but infer nothing from it."""
        super().observe(action, step)
        self.belief = self.engine.initial_belief(len(self.obs))


def agent_without(system: System, part: Ablation) -> AgentController:
    """An agent with the weights of `system`, in which one part is disabled; `system` itself stays as it is."""
    system = copy.deepcopy(system)
    transition = system.transition
    with torch.no_grad():
        initial = system.engine.context(system.engine.initial_belief(1))[0]  # (A + 1, D)
        modules = {
            "prior": (transition.prior_film, initial[0]),
            "perception": (system.vae, system.appearance.unseen() if system.appearance else initial[-1]),
            "reward_and_termination": (nn.ModuleList([transition.contact_film, transition.place_film]), initial[-1]),
        }
        terms = system.target_value.read(initial[None])
    module, context = modules.get(part, (None, None))
    for layer in module.modules() if module else ():
        if isinstance(layer, FiLMLayer):
            fix_context(layer, context)
    if part == "value":
        system.target_value.read = lambda context: ValueTerms(*(x.expand(len(context), *x.shape[1:]) for x in terms))
    kind = FrozenBelief if part == "belief" else AgentController
    return kind(system, nodes=1 if part == "search" else 0)


def fix_context(layer: FiLMLayer, context: Tensor) -> None:
    """Make the layer modulate as under `context` (D,), whatever context it is given later."""
    with torch.no_grad():
        layer.generator.bias += layer.generator.weight @ context
        layer.generator.weight.zero_()


class ModelFree(Planner):
    """Q-learning instead of look-ahead, with the same value network and the same stored lifetimes.

    Reading the context row of one action instead of the mean over all of them, the network is Q(z, c, a). It learns by
    Watkins' Q(lambda) (1989).
    """

    def action_values(
        self,
        codes: Tensor,
        context: Tensor,
        places: PlaceMemory | None = None,
        nodes: int = 1,
        predict: EffectCache | None = None,
    ) -> Tensor:
        """Q (B, A) of the target network for code grids (B, S) uint8 under contexts (B, A + 1, D)."""
        with torch.no_grad():
            return self._values(self.value, codes, context)

    def loss(self, value: Value, experience: Experience, context: Tensor) -> dict[str, Tensor]:
        """Mean squared error of Q against lambda-returns along each lifetime, with the target network's Q-:

            v_t  = max_a Q-(z_t, c_t, a),  z_T: the codes that the lifetime ended on
            g_t  = r_t + discount (lambda h_t+1 + (1 - lambda) v_t+1)
            h_t  = g_t if a_t = argmax_a Q-(z_t, c_t, a), else v_t: the trace is cut;  h_T = v_T
            loss = mean over (B, T) of (Q(z_t, c_t, a_t) - g_t)^2

        Args:
            value: the network that learns.
            experience: (B, T, ...).
            context: (B, T + 1, A + 1, D), without gradient.

        Returns:
            value: scalar, in squared units of reward.
        """
        B, T = experience.action.shape
        following_codes = torch.cat([experience.codes[:, 1:], experience.next_codes[:, -1:]], 1)
        now, after = context[:, :-1].flatten(0, 1), context[:, 1:].flatten(0, 1)
        choice = self.action_values(experience.codes.flatten(0, 1), now).view(B, T, -1).argmax(-1)
        next_value = self.action_values(following_codes.flatten(0, 1), after).view(B, T, -1).amax(-1)
        target, following = torch.zeros_like(next_value), next_value[:, -1]
        for t in reversed(range(T)):
            boot = self.settings.lambda_ * following + (1 - self.settings.lambda_) * next_value[:, t]
            target[:, t] = experience.reward[:, t] + self.settings.discount * boot
            greedy = experience.action[:, t] == choice[:, t]
            following = torch.where(greedy, target[:, t], next_value[:, max(0, t - 1)])
        predicted = self._values(value, experience.codes.flatten(0, 1), now)
        predicted = predicted.gather(1, experience.action.flatten()[:, None]).view(B, T)
        return {"value": F.mse_loss(predicted, target)}

    @staticmethod
    def _values(value: Value, codes: Tensor, context: Tensor) -> Tensor:
        statistics, world = value.statistics(codes), context.shape[1] - 1
        return torch.stack([value(statistics, value.read(context[:, [a, world]])) for a in range(world)], 1)


def evaluate_without(system: System, removed: str, lifetimes: int) -> dict[str, Any]:
    """Evaluations of a trained agent by what is removed; the full agent is ablated at decision time too."""
    results = {removed: evaluate(system, "test", lifetimes)}
    if removed == FULL:
        for part in get_args(Ablation):
            if part != "perception" or system.appearance:
                results[part] = evaluate(system, "test", lifetimes, agent_without(system, part))
    return results


def train_variant(removed: str, settings: Settings, lifetimes: int) -> dict[str, Any]:
    """Train without one part, and evaluate: see `evaluate_without`."""
    settings = merge(settings, TRAINED.get(removed, {}))
    learner = Learner(build_system(settings, planner=ModelFree if removed == "look-ahead" else Planner))
    train(learner)
    return evaluate_without(learner.system, removed, lifetimes)


def cached_results(output: Path, removed: str, seed: int, updates: int, lifetimes: int) -> dict[str, Any]:
    """Results of `train_variant`, read from the output folder if they are there already."""
    path = output / f"{re.sub('[^a-z-]+', '-', removed.lower()).strip('-')}-{seed}.json"
    if not path.exists():
        print(f"training, seed {seed}, removed: {removed}", file=sys.stderr)
        settings = merge(BASE, {"seed": seed, "training": {"updates": updates}})
        write_json(train_variant(removed, settings, lifetimes), path)
    return json.loads(path.read_text())


def train_missing(output: Path, seeds: tuple[int, ...], updates: int, lifetimes: int) -> Iterator[dict[str, Any]]:
    """Results of every variant and seed by what is removed; trains those that the output folder lacks."""
    arguments, path = {"updates": updates, "lifetimes": lifetimes}, output / "arguments.json"
    output.mkdir(parents=True, exist_ok=True)
    if path.exists() and (begun := json.loads(path.read_text())) != arguments:
        raise UserError(f"{output} was begun with {begun}: give the same, or another --output.")
    write_json(arguments, path)
    for removed in (FULL, *TRAINED):
        for seed in seeds:
            yield cached_results(output, removed, seed, updates, lifetimes)


def print_table(found: dict[str, list[dict]]) -> None:
    """One row for each ablation: its evaluations joined, and the paired difference to the full agent's."""
    print("| removed | return | normalised | difference | each run |\n|---|---|---|---|---|")
    for name, results in found.items():
        pairs = zip(results, found[FULL], strict=True)
        lost = [np.array([one["returns"]["agent"]]) - np.array([full["returns"]["agent"]]) for one, full in pairs]
        if name == FULL:
            difference = ""
        elif name in TRAINED and len(lost) > 1:
            difference = over_seeds([float(one.mean()) for one in lost], 2)
        else:
            difference = format_ci(float(np.mean(lost)), bootstrap_ci(mean, *lost), 2)
        each = ", ".join(f"{result['return_mean']:.2f}" for result in results)
        print("| " + " | ".join([name, *score_cells(statistics(*results)), difference, each]) + " |")


def main(
    runs: Positional[tuple[Path, ...]] = (),
    seeds: tuple[int, ...] = (0, 1, 2),
    updates: int = 333,
    lifetimes: int = 512,
    output: Path = Path("runs/ablations"),
) -> None:
    """Evaluate, after training what is missing, and print the table.

    Args:
        runs: Folders of trained runs to ablate; without any, new agents are trained.
        seeds: Seeds of the trainings.
        updates: Updates of each training.
        lifetimes: Held-out lifetimes of each evaluation, at least 2.
        output: Folder for the results of the trainings.
    """
    found: dict[str, list[dict]] = {}
    if runs:
        evaluations = (evaluate_without(system, FULL, lifetimes) for system in load_systems(runs))
    else:
        evaluations = train_missing(output, seeds, updates, lifetimes)
    for results in evaluations:
        for name, result in results.items():
            found.setdefault(name, []).append(result)
    print_table(found)
    trained = "" if runs else f", trained for {updates} updates each"
    print(f"\n{lifetimes} lifetimes on the test split for each of {len(found[FULL])} runs{trained}")


if __name__ == "__main__":
    command_line(main)
