"""Runs joined into tables (Markdown, JSON) and figures: `python3 -m tests.benchmarks.report RUN [RUN ...] [--output FOLDER]`.

Runs that differ in more than the seed stand apart.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import tyro
from matplotlib.figure import Figure
from tyro.conf import Positional

from environment import WorldSettings
from main import Settings, plot_adaptation, agents_present, format_ci, statistics, available_metrics, with_preset
from memory import RunFolder, UserError, write_json

HEADS = {
    "return_mean": "return", "return_iqm": "IQM", "normalised": "normalised", "of_thompson": "of Thompson",
    "probability_of_improvement": "above Thompson", "late_of_known_rule": "last eighth, of known rule",
}  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    """Join the final evaluations of finished runs."""

    runs: Positional[tuple[Path, ...]]
    """Folders of finished runs."""
    output: Path | None = None
    """A new folder; runs/report-<time> if not given."""


def result_table(results: Sequence[dict[str, Any]], joined: dict[str, Any]) -> str:
    """Markdown: a line for each evaluation, one for all of them (`statistics`), and the references below."""
    names = available_metrics(results[0])
    heads = ["seed", *(HEADS[name] for name in names), "belief, nll over exact", "training"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for result in [*results, joined] if len(results) > 1 else results:
        figures = [format_ci(result[name], result[f"{name}_ci95"], 2 if name.startswith("return") else 3) for name in names]
        one = result is not joined
        excess = result["belief_nll"]["late_excess"] if one else None
        rest = ["-" if excess is None else f"{excess:+.3f}", f"{result['seconds']:.0f} s"] if one else ["", ""]
        lines.append("| " + " | ".join([str(result["seed"]) if one else f"all {len(results)}", *figures, *rest]) + " |")
    first, means = results[0], [result["return_mean"] for result in results]
    bars = {name: label for name, label in agents_present(results).items() if name != "agent"}
    said = [f"{label} {format_ci(first[name]['return_mean'], first[name]['return_mean_ci95'], 2)}" for name, label in bars.items()]
    text = f"{first['lifetimes']} lifetimes on the {first['split']} split for each agent; {', '.join(said)}"
    if first["references"] and "bayes_adaptive" in first["references"]["agents"]:
        deep = first["references"]["agents"]["bayes_adaptive"]
        text += f", Bayes-adaptive rollouts {format_ci(deep['return_mean'], deep['return_mean_ci95'], 2)} "
        text += f"({first['references']['lifetimes']} lifetimes, {first['references']['rollouts']} rollouts an action)"
    if len(results) > 1:
        spread = scipy.stats.t.ppf(0.975, len(means) - 1) * scipy.stats.sem(means)
        text += f"; over seeds the mean return is {np.mean(means):.2f} +- {spread:.2f} (95%, Student's t of {len(means)} runs)"
    return "\n".join(lines) + f"\n\n{text}."


def episode_table(results: Sequence[dict[str, Any]], numbers: Sequence[int] = (1, 2, 3, 4, 6, 8, 12)) -> str:
    """Markdown: how the first, second, ... episode of a lifetime ends, for every agent, averaged over evaluations."""
    lines = ["| agent | episode | goal | hazard | time-out | steps to the goal |", "|" + "---|" * 6]
    for name, label in agents_present(results).items():
        curves = {kind: [result[name]["by_episode"][kind] for result in results] for kind in results[0][name]["by_episode"]}
        for number in numbers:
            if number <= min(map(len, curves["success"])):
                means = {kind: np.mean([curve[number - 1] for curve in each]) for kind, each in curves.items()}
                shares = " | ".join(f"{means[kind]:.1%}" for kind in ("success", "hazard", "timeout"))
                lines.append(f"| {label} | {number} | {shares} | {means['steps_to_goal']:.1f} |")
    return "\n".join(lines)


def plot_episodes(results: Sequence[dict[str, Any]], path: Path) -> None:
    """How episodes end, and steps to the goal, by number of the episode, averaged over the evaluations, to `path` (PNG)."""
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 4), ("success", "hazard", "timeout", "steps_to_goal")):
        for name, label in agents_present(results).items():
            curves = [result[name]["by_episode"][kind] for result in results]
            length = min(map(len, curves))
            axes.plot(range(1, length + 1), np.mean([curve[:length] for curve in curves], 0), marker=".", label=label)
        axes.set(title=kind.replace("_", " "), xlabel="episode of the lifetime")
        axes.set_ylim(bottom=0)
    axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


def described(settings: Settings) -> str:
    """A preset and what a run changed in it, but the seed and the device: runs that share it belong together."""
    base = with_preset(Settings(), settings.preset)
    changed = [
        f"{section}.{name} {value}"
        for section, values in dataclasses.asdict(settings).items() if isinstance(values, dict)
        for name, value in values.items() if value != getattr(getattr(base, section), name)
    ]  # fmt: skip
    return ", ".join([settings.preset, *changed, *([f"begun from {settings.init_from}"] if settings.init_from else [])])


def known_references(run: Path, world: WorldSettings) -> dict | None:
    """The largest test of the references in this run's world that `references` has left beside it."""
    found = [json.loads(path.read_text()) for path in sorted((run.parent / "references").glob("test-*.json"))]
    same = [one for one in found if one["world"] == json.loads(json.dumps(dataclasses.asdict(world)))]
    return max(same, key=lambda one: (one["lifetimes"], one["rollouts"]), default=None)


def main(runs: tuple[Path, ...], output: Path | None = None) -> None:
    """Join the final evaluations of runs into tables (Markdown, JSON) and figures; runs that differ in more than the
    seed stand apart.

    Args:
        runs: Folders of finished runs.
        output: A new folder; runs/report-<time> if not given.
    """
    output = output or Path("runs") / f"report-{time.strftime('%Y%m%d-%H%M%S')}"
    if not runs or output.exists():
        raise UserError(f"{output} exists: name another --output." if runs else "name at least one finished run.")
    groups: dict[str, list[dict]] = {}
    for run in runs:
        settings = RunFolder(run).settings(Settings())
        try:
            result, timing = (json.loads((run / name).read_text()) for name in ("evaluation.json", "timing.json"))
            result |= {"seconds": timing["total"], "references": known_references(run, settings.world)}
            result["said"] = {key: result[key] for name in available_metrics(result) for key in (name, f"{name}_ci95")}
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{run} has no final evaluation of this version: make it with python3 main.py resume {run}.") from error
        groups.setdefault(described(settings), []).append(result)
    output.mkdir(parents=True)
    joined, text = {}, []
    for number, (name, results) in enumerate(groups.items()):
        results.sort(key=lambda result: result["seed"])
        joined[name] = statistics(*results) | {"seeds": [result["seed"] for result in results]}
        joined[name]["runs"] = [result["said"] for result in results]
        text.append(f"## {name}\n\n{result_table(results, joined[name])}\n\n{episode_table(results)}\n")
        plot_adaptation(results, output / f"adaptation-{number}.png")
        plot_episodes(results, output / f"episodes-{number}.png")
        text.append(f"![reward by step](adaptation-{number}.png)\n![by episode](episodes-{number}.png)\n")
    (output / "report.md").write_text("\n".join(text))
    write_json(joined, output / "report.json")
    print("\n".join(text) + f"\nwritten to {output}")


if __name__ == "__main__":
    try:
        given = tyro.cli(Arguments, prog="python3 -m tests.benchmarks.report")
        main(given.runs, given.output)
    except (UserError, ValueError) as error:
        sys.exit(f"report: {error}")
