"""An agent beside Thompson sampling where every task is held out once.

Few held-out tasks say little: which of four hidden goals a search comes to first is luck. So each of RUNs is trained
with other tasks held out, as in classics.HiddenGoal, and evaluated on its own test tasks. The last row joins them; its
intervals are over lifetimes.
"""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from main import evaluate
from memory import UserError
from tests.benchmarks import command_line, load_systems, score_cells
from world_model import statistics


def main(runs: Positional[tuple[Path, ...]], lifetimes: int = 1024) -> None:
    """Print a row for each fold, and one for all.

    Args:
        runs: Folders of trained runs, one for each fold.
        lifetimes: Held-out lifetimes of each, at least 2.
    """
    results, names = [], []
    for system in load_systems(runs):
        names.append(system.settings.world.gym_id or system.settings.preset)
        results.append(evaluate(system, "test", lifetimes))
    if any("thompson" not in result for result in results):
        raise UserError("these environments offer no thompson_action(): there is nothing to compare with.")
    thompson = [result["thompson"]["return_mean"] for result in results]
    names, thompson = [*names, f"all {len(results)}"], [*thompson, sum(thompson) / len(thompson)]
    print("| tasks | return | Thompson sampling | of Thompson |\n|---|---|---|---|")
    for name, expected, stats in zip(names, thompson, [*map(statistics, results), statistics(*results)], strict=True):
        returns, share = score_cells(stats, ("return_mean", "of_thompson"))
        print(f"| {name.rpartition(':')[2]} | {returns} | {expected:.2f} | {share} |")
    print(f"\n{lifetimes} lifetimes on the test split of each")


if __name__ == "__main__":
    command_line(main)
