"""Whether memory and speed of a long training stay constant.

Trains as main.py does, with checkpoints, and every 20 updates records the memory of the process, the bytes of the
store of past lifetimes and the time. Prints how memory and speed have changed since the store was full, and plots
both. CPU seconds are those of this process alone, so that other jobs on the machine disturb them less. Needs
tests/requirements.txt.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from agent import Learner, System
from main import PRESETS, Settings, build_system, train, with_preset
from memory import RunFolder, UserError, merge, require_new, write_json
from tests.benchmarks import command_line

COLUMNS = ("update", "seconds", "cpu_seconds", "resident_mb", "store_mb")
RECORD_EVERY = 20  # updates


class MonitoredLearner(Learner):
    """A learner that records COLUMNS in `rows`, and after so many minutes stops the training as Ctrl-C would."""

    def __init__(self, system: System, minutes: float) -> None:
        import psutil  # of tests/requirements.txt

        super().__init__(system)
        self.process, self.end = psutil.Process(os.getpid()), time.perf_counter() + 60 * minutes
        self.rows: list[tuple[float, ...]] = []

    def set_learning_rates(self, phase: str, update: int) -> None:
        """Called at the beginning of every update."""
        super().set_learning_rates(phase, update)
        if self.update and self.update % RECORD_EVERY == 0:
            megabytes = (self.process.memory_info().rss / 2**20, self.store.bytes / 2**20)
            self.rows.append((self.update, time.perf_counter(), time.process_time(), *megabytes))
        if time.perf_counter() > self.end:
            signal.raise_signal(signal.SIGINT)


def plot(rows: np.ndarray, path: Path) -> None:
    """Memory, and updates per second, over the minutes, to `path` (PNG).

    Args:
        rows: (n, len(COLUMNS)).
    """
    figure = Figure(figsize=(9, 3), layout="constrained")
    memory, speed = figure.subplots(1, 2)
    minutes, steps = (rows[:, 1] - rows[0, 1]) / 60, np.diff(rows, axis=0)
    memory.plot(minutes, rows[:, 3], label="resident memory")
    memory.plot(minutes, rows[:, 4], label="store of past lifetimes")
    memory.set(xlabel="minutes", ylabel="MB", ylim=(0, None))
    memory.legend()
    for column, label in ((1, "wall-clock time"), (2, "CPU time")):
        rate = steps[:, 0] / steps[:, column]
        window = min(25, len(rate))  # 500 updates: intervals with and without a collection differ
        speed.plot(minutes[window:], np.convolve(rate, np.ones(window) / window, "valid"), label=label)
    speed.set(xlabel="minutes", ylabel="updates per second", ylim=(0, None))
    speed.legend()
    figure.savefig(path, dpi=110)


def report(rows: np.ndarray, budget_mb: float) -> str:
    """Changes since the store was full, or in the second half if it never was, in a few lines.

    Args:
        rows: (n, len(COLUMNS)).
        budget_mb: of the store.
    """
    if len(rows) < 6:
        return f"only {len(rows)} records: give more --minutes"
    growing = np.diff(rows[:, 4]) > 0
    full = min(int(growing.nonzero()[0].max(initial=0)) + 1, len(rows) // 2)
    late = rows[full:]
    third = max(2, len(late) // 3)
    begin, end = late[:third], late[-third:]
    speeds = [(part[-1, 0] - part[0, 0]) / (part[-1, 2] - part[0, 2]) for part in (begin, end)]
    minutes, late_minutes = ((part[-1, 1] - part[0, 1]) / 60 for part in (rows, late))
    return (
        f"{rows[-1, 0]:.0f} updates in {minutes:.0f} minutes; "
        f"first and last third of the last {late_minutes:.0f} minutes:\n"
        f"resident memory {begin[:, 3].mean():.0f} and {end[:, 3].mean():.0f} MB, at most {late[:, 3].max():.0f} MB\n"
        f"updates per CPU second {speeds[0]:.2f} and {speeds[1]:.2f}\n"
        f"store at most {rows[:, 4].max():.1f} MB of {budget_mb:g} MB"
    )


def main(minutes: float = 90, preset: str = "default", threads: int = 1, output: Path = Path("runs/endurance")) -> None:
    """Train, and print the report.

    Args:
        minutes: Duration of the training.
        preset: Preset of main.py to train.
        threads: Threads of the training, at least 1.
        output: A new folder for the run, the records and the figure.
    """
    if preset not in PRESETS:
        raise UserError(f"preset is {preset!r}, but must be one of {', '.join(PRESETS)}.")
    require_new(output)
    torch.set_num_threads(threads)
    settings = merge(with_preset(Settings(), preset), {"training": {"updates": 10**6}})
    output.mkdir(parents=True)
    learner = MonitoredLearner(build_system(settings), minutes)
    train(learner, RunFolder(output))
    rows = np.array(learner.rows)
    write_json({name: column.tolist() for name, column in zip(COLUMNS, rows.T, strict=True)}, output / "endurance.json")
    plot(rows, output / "endurance.png")
    print(report(rows, settings.memory.budget_mb) + f"\nfigure and records in {output}")


if __name__ == "__main__":
    command_line(main)
