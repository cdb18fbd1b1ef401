"""Which effects a run has found, beside the true ones: purity, completeness and wrong predictions.

Random lifetimes of validation tasks, with neither slips nor wind nor switches: every step is what its action does. The
true effect of an action in a lifetime is the hidden one: the move, the colour of the body and whether edges wrap, or in
an external environment the action of the wrapped environment. All that do nothing are one. The found effect is the one
that the model ascribes to the action after the whole lifetime.

Purity is the share of actions in lifetimes whose true effect is the most frequent one of their found effect, and
completeness the share whose found effect is the most frequent one of their true effect. Where that and the found effect
predict the same in all steps of the action, either is right. A step is predicted wrong if the most likely grid under
the found effect of its action is not the one that came.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tyro.conf import Positional

from agent import AgentController, System
from context_engine import rollout
from environment import NOTHING, ExternalWorlds, HiddenRulesWorld, make_worlds
from main import EVALUATION_SEEDS
from memory import Experience, make_generator
from tests.benchmarks import command_line, load_systems, run_folders


def random_lifetimes(system: System, lifetimes: int) -> tuple[Experience, Tensor]:
    """Experience (B, T, ...) of random actions, and the true effects (B, A) int64 of all actions."""
    settings = replace(system.settings.world, slip=0.0, wind=0.0, switch=0.0, switch_step=0)
    worlds = make_worlds(settings, lifetimes, "validation", EVALUATION_SEEDS["validation"], system.device)
    agent = AgentController(system)
    agent.explore(1.0, make_generator(0, 0, system.device))
    rollout(worlds, agent)
    experience = agent.memory.experience()
    return experience, true_effects(worlds, experience)


def true_effects(worlds: HiddenRulesWorld | ExternalWorlds, experience: Experience) -> Tensor:
    """The true effect (B, A) int64 of every action in every lifetime."""
    if isinstance(worlds, HiddenRulesWorld):
        rule = worlds.rule
        body = 2 * rule.colours[:, :1] + rule.wraps[:, None]
        return torch.where(rule.action_map == NOTHING, -1, rule.action_map + (NOTHING + 1) * body)
    effect = torch.tensor([env.action_map.tolist() for env in worlds.vector.envs], device=worlds.device)
    changed = (experience.codes != experience.next_codes).any(-1)
    taken = effect.gather(1, experience.action)
    return torch.where(torch.isin(effect, taken[changed]), effect, -1)


@torch.no_grad()
def found_effects(system: System, experience: Experience, rows: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """The found effect of every step's action (B, T) int64, the first effect that leads to the same grid as each effect
    (B, T, K) int64 (see `EffectNetwork.predict`), and whether the found one leads to another than came (B, T) bool."""
    effects, parts = system.transition.effects, []
    for few in zip(*(part.split(rows) for part in experience[:4]), strict=True):
        codes, next_codes, _, action = few
        likelihood = effects.log_likelihood(codes.flatten(0, 1), next_codes.flatten(0, 1)).view(*action.shape, -1)
        member = F.one_hot(action, system.engine.actions).float()
        found = system.transition.lifetime_labels(likelihood, member)[0].argmax(-1)
        grids, first, _ = effects.predict(codes.flatten(0, 1))
        grid = grids[torch.arange(found.numel()), found.flatten()].view_as(next_codes)
        parts.append((found, first.view(*action.shape, -1), (grid != next_codes).any(-1)))
    found, first, wrong = map(torch.cat, zip(*parts, strict=True))
    return found, first, wrong


def agreement(true: Tensor, found: Tensor, same: Tensor) -> tuple[float, float, int]:
    """Purity, completeness and the number of effects in use, of n actions in lifetimes.

    Args:
        true: (n,) int64, from 0 on; found: (n,) int64, 0 to K - 1.
        same: (n, K) bool: which effects predict the same as the found one in all steps of the action.
    """
    shape = (int(true.max()) + 1, same.shape[1])
    usual = torch.zeros(shape).index_put_((true, found), torch.ones(len(true)), accumulate=True).argmax(1)[true]
    found = torch.where(same[torch.arange(len(true)), usual], usual, found)
    count = torch.zeros(shape).index_put_((true, found), torch.ones(len(true)), accumulate=True)
    purity, completeness = (float(count.amax(axis).sum() / len(true)) for axis in (0, 1))
    return purity, completeness, len(found.unique())


def by_action(experience: Experience, true: Tensor, found: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments of `agreement`, of all actions in lifetimes that were taken at least once."""
    B, A = true.shape
    group = (torch.arange(B, device=true.device)[:, None] * A + experience.action).flatten()  # (B * T,)
    same = first == first.gather(2, found[..., None])  # (B, T, K)
    differs = torch.zeros(B * A, first.shape[2], device=true.device).index_add_(0, group, (~same).flatten(0, 1).float())
    of_action = torch.full((B * A,), -1, device=true.device).index_copy_(0, group, found.flatten())
    taken = of_action >= 0
    number = true.unique(return_inverse=True)[1].flatten()
    return number[taken].cpu(), of_action[taken].cpu(), (differs == 0)[taken].cpu()


def kinds_of_step(experience: Experience) -> dict[str, Tensor]:
    """Which steps (B, T) bool are of each kind; every step is of one."""
    kinds = {
        "reward above 0": experience.reward > 0,
        "reward below 0": experience.reward < 0,
        "end without reward": experience.terminated,
        "nothing changed": (experience.codes == experience.next_codes).all(-1),
        "everything else": torch.ones_like(experience.terminated),
    }
    earlier = torch.zeros_like(experience.terminated)
    for name, kind in kinds.items():
        kinds[name] = kind & ~earlier
        earlier = earlier | kind
    return kinds


def main(runs: Positional[tuple[Path, ...]], lifetimes: int = 0) -> None:
    """Print both tables.

    Args:
        runs: Folders of trained runs.
        lifetimes: Random lifetimes of each run; 0 for 64, or 16 of an external environment.
    """
    found_rows, wrong_rows = [], []
    runs = run_folders(runs)
    for run, system in zip(runs, load_systems(runs), strict=True):
        experience, true = random_lifetimes(system, lifetimes or (16 if system.settings.world.gym_id else 64))
        found, first, wrong = found_effects(system, experience)
        labels = by_action(experience, true, found, first)
        purity, completeness, used = agreement(*labels)
        counts = (first.shape[2], used, len(labels[0].unique()))
        found_rows.append([run.name, *map(str, counts), f"{purity:.3f}", f"{completeness:.3f}"])
        kinds = kinds_of_step(experience)
        shares = (
            f"{wrong[kind].float().mean():.3f} of {kind.sum():,}" if kind.any() else "-" for kind in kinds.values()
        )
        wrong_rows.append([run.name, *shares])
    heads = ["effects found", "in use", "true effects", "purity", "completeness"]
    for title, names, rows in (("run", heads, found_rows), ("wrong predictions", list(kinds), wrong_rows)):
        print("| " + " | ".join([title, *names]) + " |\n|" + "---|" * (len(names) + 1))
        print("\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n")


if __name__ == "__main__":
    command_line(main)
