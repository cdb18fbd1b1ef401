"""An agent beside Thompson sampling where every task is held out once.

Few held-out tasks say little: which of four hidden goals a search comes to first is luck. So each of RUNs is trained
with other tasks held out, as in classics.HiddenGoal, and evaluated on its own test tasks, with as many seeds for each
choice of them. Intervals are over seeds; the last row joins all tasks.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from tyro.conf import Positional

from main import evaluate
from memory import UserError
from tests.benchmarks import command_line, load_systems, over_seeds


def main(runs: Positional[tuple[Path, ...]], lifetimes: int = 256) -> None:
    """Print a row for each choice of held-out tasks, and one for all.

    Args:
        runs: Folders of trained runs, equally many for each choice.
        lifetimes: Held-out lifetimes of each run, at least 2.
    """
    systems = load_systems(runs)
    worlds = [system.settings.world.gym_id or system.settings.preset for system in systems]
    counts = Counter(worlds)
    if len(set(counts.values())) > 1:
        given = ", ".join(f"{world} has {count}" for world, count in counts.items())
        raise UserError(f"name equally many runs for each choice of held-out tasks: {given}.")
    found: dict[str, list[tuple[float, float]]] = {}  # returns of the agent and of Thompson sampling
    for world, system in zip(worlds, systems, strict=True):
        result = evaluate(system, "test", lifetimes)
        if "thompson" not in result:
            raise UserError("these environments offer no thompson_action(): there is nothing to compare with.")
        found.setdefault(world, []).append((result["return_mean"], result["thompson"]["return_mean"]))
    print("| tasks | return | Thompson sampling | of Thompson | each run |\n" + "|---" * 5 + "|")
    for name, each in (*found.items(), (f"all {len(found)}", np.mean(list(found.values()), 0))):
        agent, thompson = np.transpose(each)
        shares = ", ".join(f"{share:.2f}" for share in agent / thompson)
        cells = over_seeds(agent, 2), f"{thompson.mean():.2f}", over_seeds(agent / thompson, 3), shares
        print(f"| {name.rpartition(':')[2]} | {' | '.join(cells)} |")
    print(f"\n{lifetimes} lifetimes on the test split for each run")


if __name__ == "__main__":
    command_line(main)
