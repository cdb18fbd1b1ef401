"""A long training: `python3 -m tests.benchmarks.endurance [--minutes 90] [--preset default] [--output runs/endurance]`.

Trains as `main.py` does, checkpoints included, and looks every 20 updates at the memory of the process, the bytes of the store
of past lifetimes and the time. Prints, from the time on when the store is full, how memory and speed have changed, and draws
both. Seconds of the processor are those of this process alone, so other jobs on the machine disturb them less.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from agent import Learner
from main import PRESETS, Settings, build_system, train, with_preset
from memory import RunFolder, UserError, merge, write_json

COLUMNS = ("update", "seconds", "processor_seconds", "resident_mb", "store_mb")


@dataclass(frozen=True)
class Arguments:
    """Train for a long time and watch memory and speed."""

    minutes: float = 90
    """How long."""
    preset: str = "default"
    """Of the settings."""
    threads: int = 1
    """Of the training."""
    output: Path = Path("runs/endurance")
    """A new folder."""


class Watched(Learner):
    """Looks at itself on its way, and stops as Ctrl-C would when the time is over."""

    def watch(self, minutes: float) -> list[tuple[float, ...]]:
        """Begin to look; the rows of COLUMNS that will come."""
        import psutil  # of tests/requirements.txt

        self.process, self.rows, self.end = psutil.Process(os.getpid()), [], time.perf_counter() + 60 * minutes
        return self.rows

    def set_learning_rates(self, phase: str, update: int) -> None:
        """An update begins: perhaps a look."""
        super().set_learning_rates(phase, update)
        if self.update and self.update % 20 == 0:
            megabytes = (self.process.memory_info().rss / 2**20, self.store.bytes / 2**20)
            self.rows.append((self.update, time.perf_counter(), time.process_time(), *megabytes))
        if time.perf_counter() > self.end:
            signal.raise_signal(signal.SIGINT)


def draw(rows: np.ndarray, path: Path) -> None:
    """Memory, and updates a second, over the minutes."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3), constrained_layout=True)
    minutes, steps = (rows[:, 1] - rows[0, 1]) / 60, np.diff(rows, axis=0)
    left.plot(minutes, rows[:, 3], label="resident memory")
    left.plot(minutes, rows[:, 4], label="store of past lifetimes")
    left.set(xlabel="minutes", ylabel="MB", ylim=(0, None))
    left.legend()
    for column, name in ((1, "by the clock"), (2, "of the processor")):
        speed = steps[:, 0] / steps[:, column]
        window = min(25, len(speed))  # two collections apart are not equal: 500 updates together
        right.plot(minutes[window:], np.convolve(speed, np.ones(window) / window, "valid"), label=name)
    right.set(xlabel="minutes", ylabel="updates a second", ylim=(0, None))
    right.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def report(rows: np.ndarray, budget_mb: float) -> str:
    """What has changed since the store was full, or since the middle if it never was; nothing can be said of few rows."""
    if len(rows) < 6:
        return f"only {len(rows)} looks: give more --minutes"
    grown = np.diff(rows[:, 4]) > 0
    full = min(int(grown.nonzero()[0].max(initial=0)) + 1, len(rows) // 2)
    late = rows[full:]
    third = max(2, len(late) // 3)
    speeds = [(part[-1, 0] - part[0, 0]) / (part[-1, 2] - part[0, 2]) for part in (late[:third], late[-third:])]
    memory = [part[:, 3].mean() for part in (late[:third], late[-third:])]
    hours = (late[-1, 1] - late[0, 1]) / 3600
    return (
        f"{rows[-1, 0]:.0f} updates in {(rows[-1, 1] - rows[0, 1]) / 60:.0f} minutes; the last {60 * hours:.0f} minutes, first third and last third:\n"
        f"resident memory {memory[0]:.0f} and {memory[1]:.0f} MB, at most {late[:, 3].max():.0f} MB\n"
        f"updates a second of the processor {speeds[0]:.2f} and {speeds[1]:.2f}\n"
        f"store at most {rows[:, 4].max():.1f} MB of {budget_mb:g} MB"
    )


def main(arguments: Arguments) -> None:
    """Train, look, tell."""
    if arguments.preset not in PRESETS or arguments.output.exists():
        raise UserError(f"{arguments.preset} is no preset, or {arguments.output} exists: choose others.")
    torch.set_num_threads(arguments.threads)
    settings = merge(with_preset(Settings(), arguments.preset), {"training": {"updates": 10**6}})
    arguments.output.mkdir(parents=True)
    learner = Watched(build_system(settings))
    rows = learner.watch(arguments.minutes)
    train(learner, RunFolder(arguments.output))
    table = np.array(rows)
    write_json({name: column.tolist() for name, column in zip(COLUMNS, table.T)}, arguments.output / "endurance.json")
    draw(table, arguments.output / "endurance.png")
    print(report(table, settings.memory.budget_mb) + f"\nfigure and numbers in {arguments.output}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
