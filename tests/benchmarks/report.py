"""Final evaluations of several runs joined into tables (Markdown, JSON) and figures.

Runs that differ in nothing but the seed are joined; all others stand apart.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from environment import WorldSettings
from main import Settings, with_preset
from memory import RunFolder, UserError, require_new, write_json
from tests.benchmarks import command_line, half_width, run_folders, score_cells
from world_model import AGENTS, available_metrics, format_ci, plot_adaptation, statistics

HEADS = {
    "return_mean": "return",
    "return_iqm": "IQM",
    "normalised": "normalised",
    "of_thompson": "of Thompson",
    "probability_of_improvement": "above Thompson",
    "late_of_known_rule": "last eighth, of known rule",
}


def metric_cells(result: dict[str, Any]) -> list[str]:
    """Every available metric of an evaluation or of `statistics` with its confidence interval."""
    return score_cells(result, [name for name in HEADS if name in result])


def result_table(results: Sequence[dict[str, Any]], joined: dict[str, Any]) -> str:
    """Markdown: a row for each evaluation, one for all of them (`statistics`), and the references below."""
    heads = ["seed", *(HEADS[name] for name in available_metrics(results[0]))]
    heads += ["belief, nats above exact filter", "training"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for result in results:
        excess = result["belief_nll"]["late_excess"]
        rest = ["-" if excess is None else f"{excess:+.3f}", f"{result['seconds']:.0f} s"]
        lines.append("| " + " | ".join([str(result["seed"]), *metric_cells(result), *rest]) + " |")
    if len(results) > 1:
        lines.append("| " + " | ".join([f"all {len(results)}", *metric_cells(joined), "", ""]) + " |")
    return "\n".join(lines) + f"\n\n{reference_sentence(results)}."


def reference_sentence(results: Sequence[dict[str, Any]]) -> str:
    """Number of lifetimes, returns of the references, and the spread over seeds."""
    first = results[0]
    returns = {label: first[name] for name, label in AGENTS.items() if name in first and name != "agent"}
    deep = first["references"]["agents"].get("bayes_adaptive") if first["references"] else None
    if deep:
        returns["Bayes-adaptive rollouts"] = deep
    parts = [f"{label} {format_ci(one['return_mean'], one['return_mean_ci95'], 2)}" for label, one in returns.items()]
    if deep:
        asked = first["references"]
        parts[-1] += f" ({asked['lifetimes']} lifetimes, {asked['rollouts']} rollouts per action)"
    text = f"{first['lifetimes']} lifetimes on the {first['split']} split for each agent; {', '.join(parts)}"
    if len(results) > 1:
        means = [result["return_mean"] for result in results]
        text += f"; over seeds the mean return is {np.mean(means):.2f} +- {half_width(means):.2f} "
        text += f"(95%, Student's t of {len(means)} runs)"
    return text


def describe(settings: Settings) -> str:
    """A preset and what a run changed in it, except seed and device; runs with the same description are joined."""
    base = with_preset(Settings(), settings.preset)
    changes = []
    for section, values in dataclasses.asdict(settings).items():
        if isinstance(values, dict):
            default = dataclasses.asdict(getattr(base, section))
            changes += [f"{section}.{name} {value}" for name, value in values.items() if value != default[name]]
    if settings.init_from:
        changes.append(f"begun from {settings.init_from}")
    return ", ".join([settings.preset, *changes])


def saved_references(run: Path, world: WorldSettings) -> dict | None:
    """The largest result of `references` for this run's environment on the test split; None if there is none."""
    found = [json.loads(path.read_text()) for path in sorted((run.parent / "references").glob("test-*.json"))]
    own = json.loads(json.dumps(dataclasses.asdict(world)))
    matching = [one for one in found if one["world"] == own]
    return max(matching, key=lambda one: (one["lifetimes"], one["rollouts"]), default=None)


def read_run(run: Path, settings: Settings) -> dict[str, Any]:
    """The final evaluation of a run, with `seconds` of the training, `references`, and `metrics` with intervals.

    Raises:
        UserError: there is no final evaluation, or an earlier version wrote it.
    """
    try:
        result, timing = (json.loads((run / name).read_text()) for name in ("evaluation.json", "timing.json"))
        names = available_metrics(result)
        metrics = {key: result[key] for name in names for key in (name, f"{name}_ci95")}
        references = saved_references(run, settings.world)
        return result | {"seconds": timing["total"], "references": references, "metrics": metrics}
    except (OSError, ValueError, KeyError) as error:
        message = f"{run} has no final evaluation of this version: make it with python3 main.py resume {run}."
        raise UserError(message) from error


def main(runs: Positional[tuple[Path, ...]], output: Path | None = None) -> None:
    """Write and print the report.

    Args:
        runs: Folders of finished runs.
        output: A new folder; runs/report-<time> if not given.
    """
    output = output or Path("runs") / f"report-{time.strftime('%Y%m%d-%H%M%S')}"
    require_new(output)
    groups: dict[str, list[dict]] = {}
    for run in run_folders(runs):
        settings = RunFolder(run).settings(Settings())
        groups.setdefault(describe(settings), []).append(read_run(run, settings))
    output.mkdir(parents=True)
    joined, text = {}, []
    for number, (name, results) in enumerate(groups.items()):
        results.sort(key=lambda result: result["seed"])
        stats = statistics(*results)
        text.append(f"## {name}\n\n{result_table(results, stats)}\n")
        text.append(f"![reward by step](adaptation-{number}.png)\n")
        plot_adaptation(results).savefig(output / f"adaptation-{number}.png")
        seeds, each = ([result[key] for result in results] for key in ("seed", "metrics"))
        joined[name] = stats | {"seeds": seeds, "runs": each}
    (output / "report.md").write_text("\n".join(text))
    write_json(joined, output / "report.json")
    print("\n".join(text) + f"\nwritten to {output}")


if __name__ == "__main__":
    command_line(main)
