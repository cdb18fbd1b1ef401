"""What each part is worth: `python3 -m tests.benchmarks.ablations [RUN ...] [--seeds 0 1 2] [--output runs/ablations]`.

With RUNs: takes every part of `Ablation` from these trained agents, whose weights stay. Without: trains the whole agent
and every variant of TRAINED for each seed, at a third of the default updates, and takes parts from the whole one in the same
way. All live the same held-out lifetimes, and differences are paired by lifetime. What is done is kept in the output folder,
so the same command goes on where it was stopped, and several processes with different seeds may fill one folder. The last
line of the table is another kind of agent: RecurrentPPO of sb3-contrib with previous action, reward and restart in its
observation (RL2, Duan et al., 2016), for the same seconds of training.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from tyro.conf import Positional

from agent import AgentController, Learner, Planner, System
from film_layer import FiLMLayer
from main import Settings, build_system, evaluate, bootstrap_ci, load_system, mean, format_ci, statistics, train
from memory import Experience, WorldStep, merge, write_json
from transition_model import EffectCache, Value
from tests.benchmarks import scores

BASE = Settings()
TRAINED: dict[str, dict] = {  # what a variant does without: the settings that take it away
    "hindsight decoding": {"context": {"decoding_weight": 0.0}},
    "labels consistent over the lifetime": {"transition": {"warmup_updates": 900}},  # of at most 684 outcome updates
    "initial scales": {"context": {"token_scale": 1.0, "context_scale": 1.0}, "transition": {"film_scale": 1.0}},
    "look-ahead": {},
}
Ablation = Literal["belief", "perception", "prior", "reward_and_termination", "value", "depth"]
"""What an agent can do without at decision time: its belief stays initial; one of its parts is modulated by the initial context
alone; the search has depth 1."""
PEER = "everything: RecurrentPPO"
PEERS = [PEER] if importlib.util.find_spec("sb3_contrib") else []


class FrozenBelief(AgentController):
    """An agent whose belief stays as it was before any experience."""

    def observe(self, action: Tensor, step: WorldStep) -> None:
        """Remember, but infer nothing."""
        super().observe(action, step)
        self.belief = self.engine.initial_belief(len(self.obs))


def agent_without(system: System, part: Ablation) -> AgentController:
    """The agent of a copy of `system`, whose weights otherwise stay, without one part."""
    system = copy.deepcopy(system)
    with torch.no_grad():
        first = system.engine.context(system.engine.initial_belief(1))[0]  # (A + 1, D)
        held = {
            "perception": (system.vae, system.appearance.unseen() if system.appearance else first[-1]),
            "prior": (system.transition.prior_film, first[0]),
            "reward_and_termination": (system.transition.contact_film, first[-1]),
            "value": (system.target_value, system.target_value.pool(first[None])[0]),
        }  # fmt: skip
    module, context = held.get(part, (None, None))
    for layer in module.modules() if module else ():
        if isinstance(layer, FiLMLayer):
            hold(layer, context)
    return system.controller(FrozenBelief if part == "belief" else AgentController, search_depth=1 if part == "depth" else 2)


def hold(layer: FiLMLayer, context: Tensor) -> None:
    """Let the layer modulate as under `context` (D,) from now on, whatever context it is given."""
    with torch.no_grad():
        layer.generator.bias += layer.generator.weight @ context
        layer.generator.weight.zero_()


class ModelFree(Planner):
    """No look-ahead: the same value network, reading the row of one action in the place of the mean over all of them, is
    Q(z, c, a), and learns by Watkins' Q(lambda) (1989) along the same stored lifetimes."""

    def action_values(self, codes: Tensor, context: Tensor, depth: int = 1, predict: EffectCache | None = None) -> Tensor:
        """Q (B, A) of code grids (B, S) uint8 under contexts (B, A + 1, D), of the slow value."""
        with torch.no_grad():
            return self._values(self.value, codes, context)

    def loss(self, value: Value, experience: Experience, context: Tensor) -> dict[str, Tensor]:
        """Mean squared error of Q(z_t, c_t, a_t) from lambda-returns that are cut where another action was better."""
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
        seen, world = value.statistics(codes), context.shape[1] - 1
        return torch.stack([value(seen, value.pool(context[:, [action, world]])) for action in range(world)], 1)


@dataclass(frozen=True)
class Arguments:
    """What each part is worth."""

    runs: Positional[tuple[Path, ...]] = ()
    """Folders of trained runs to take parts from; if there are none, agents are trained without each."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the trainings."""
    updates: int = 333
    """Updates of each training."""
    lifetimes: int = 512
    """Held-out lifetimes of each evaluation."""
    output: Path = Path("runs/ablations")
    """Where results are kept."""


def results_of(variant: str, seed: int, arguments: Arguments) -> dict[str, Any]:
    """Evaluations of one trained variant, by what was taken away: made now, or kept from before."""
    path = arguments.output / f"{variant.replace(' ', '-').replace(':', '')}-{seed}.json"
    if not path.exists():
        print(f"training without {variant}, seed {seed}", flush=True)
        settings = merge(BASE, {"seed": seed, "training": {"updates": arguments.updates}})
        if variant in PEERS:
            from tests.benchmarks.peers import evaluate_peer, train_recurrent_ppo  # needs tests/requirements.txt

            seconds = results_of("nothing", seed, arguments)["seconds"]
            model, _ = train_recurrent_ppo(settings.world, seed, seconds)
            results = {variant: evaluate_peer(model, settings, arguments.lifetimes)}
        else:
            results, seconds = train_variant(variant, settings, arguments.lifetimes)
        write_json(results | {"seconds": seconds}, path)
    return json.loads(path.read_text())


def train_variant(variant: str, settings: Settings, lifetimes: int) -> tuple[dict[str, Any], float]:
    """Train, and evaluate; the whole agent also without each part at decision time."""
    settings = merge(settings, TRAINED.get(variant, {}))
    learner = Learner(build_system(settings, planner=ModelFree if variant == "look-ahead" else Planner))
    started = time.perf_counter()
    train(learner)
    seconds = time.perf_counter() - started
    return decided_without(learner.system, variant, lifetimes), seconds


def decided_without(system: System, variant: str, lifetimes: int) -> dict[str, Any]:
    """Evaluations of a trained agent, and of the whole agent ("nothing") also without each part at decision time."""
    results = {variant: evaluate(system, "test", lifetimes)}
    if variant == "nothing":
        results |= {part: evaluate(system, "test", lifetimes, agent_without(system, part)) for part in get_args(Ablation)}
    return results


def trained(arguments: Arguments) -> Iterator[dict[str, Any]]:
    """Results of every variant and seed, what is missing trained first."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    asked, begun = {"updates": arguments.updates, "lifetimes": arguments.lifetimes}, arguments.output / "arguments.json"
    if begun.exists() and json.loads(begun.read_text()) != asked:
        sys.exit(f"{arguments.output} was begun with {json.loads(begun.read_text())}: use the same or another --output.")
    write_json(asked, begun)
    if not PEERS:
        print("RecurrentPPO is left out: pip install -r tests/requirements.txt")
    for variant in ("nothing", *TRAINED, *PEERS):
        for seed in arguments.seeds:
            results = results_of(variant, seed, arguments)
            yield {name: result for name, result in results.items() if name != "seconds"}


def main(arguments: Arguments) -> None:
    """Evaluate, train what is missing, and print the table."""
    found: dict[str, list[dict]] = {}
    given = (decided_without(load_system(run)[0], "nothing", arguments.lifetimes) for run in arguments.runs)
    for results in given if arguments.runs else trained(arguments):
        for name, result in results.items():
            found.setdefault(name, []).append(result)
    print("| without | return | normalised | difference | of which seeds |\n|---|---|---|---|---|")
    whole = found["nothing"]
    for name, results in found.items():
        said = statistics(*results)
        lost = [np.array([one["returns"]["agent"]]) - np.array([all_["returns"]["agent"]]) for one, all_ in zip(results, whole)]
        difference = "" if name == "nothing" else format_ci(float(np.mean(lost)), bootstrap_ci(mean, *lost), 2)
        each = ", ".join(f"{result['return_mean']:.2f}" for result in results)
        print("| " + " | ".join([name, *scores(said), difference, each]) + " |")
    available_metrics = "as they are" if arguments.runs else f"of {arguments.updates} updates each"
    print(f"\n{arguments.lifetimes} lifetimes on the test split, {len(whole)} runs {available_metrics}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
