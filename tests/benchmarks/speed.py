"""How fast the world, the decisions and the parts of meta-training are: `python3 -m tests.benchmarks.speed RUN`.

RUN is a trained run: an untrained belief is vague, branches far more and would be timed unfairly slow. Seconds belong to
the machine; beside each stands what it is compared with.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from collections.abc import Callable

import torch

from environment import HiddenRulesWorld, WorldSettings
from main import Settings, load_system
from memory import RunFolder
from tests.benchmarks import named_runs


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median seconds of one call, after a warm-up."""
    work()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return sorted(taken)[repeats // 2]


def world_speed(threads: int) -> None:
    """Steps with drawn and noisy pictures a second, beside filling as many bytes with a constant."""
    torch.set_num_threads(threads)
    for batch in (1, 64, 1024, 4096):
        world = HiddenRulesWorld(WorldSettings(), batch, "train", 0)
        action, plain = torch.zeros(batch, dtype=torch.int64), world.reset()
        step, fill = seconds(lambda: world.step(action), 30), seconds(lambda: plain.fill_(0), 30)
        print(f"| world, {batch} at once, {threads} threads | {batch / step:,.0f} noisy 24x24 frames a second | {fill / step:.3f} of a memory fill |")


def decision_speed(run: Path, batch: int, threads: int, look_again: bool) -> None:
    """Perceive, infer, plan and act: one agent step, in the middle of lifetimes and averaged over a whole one."""
    torch.set_num_threads(threads)
    system, _ = load_system(run, "cpu")
    world = HiddenRulesWorld(system.settings.world, batch, "validation", 0)
    agent = system.controller(look_again=look_again)
    for lifetime in range(2):  # the first is the warm-up
        agent.begin(world.reset())
        spent, planned = 0.0, []
        for _ in range(system.settings.world.lifetime):
            start = time.perf_counter()
            action = agent.act()
            planned.append(time.perf_counter() - start)
            step = world.step(action)
            start = time.perf_counter()
            agent.observe(action, step)
            spent += planned[-1] + time.perf_counter() - start
    each, acted = spent / system.settings.world.lifetime, sum(planned) / len(planned)
    print(
        f"| decision, {'two looks' if look_again else 'one look'}, {batch} worlds, {threads} threads | {1e3 * acted:.2f} ms to act, {1e3 * each:.2f} ms with observing | "
        f"{batch / acted:,.0f} decisions a second ({batch / each:,.0f} with observing) |"
    )


def learning_shares(run: Path) -> None:
    """Seconds of each part of a whole training, as its timing.json has them."""
    timing = json.loads((run / "timing.json").read_text())
    total = timing.pop("total")
    settings = RunFolder(run).settings(Settings())
    for part, spent in sorted(timing.items(), key=lambda item: -item[1]):
        print(f"| {part} | {spent:.0f} s | {spent / total:.0%} of {total:.0f} s, {settings.training.updates} updates |")


if __name__ == "__main__":
    (folder,) = named_runs("speed", several=False)
    print("| what | figure | beside |\n|---|---|---|")
    world_speed(2)
    for look_again in (False, True):
        for batch, threads in ((1, 1), (16, 2), (256, 2)):
            decision_speed(folder, batch, threads, look_again)
    learning_shares(folder)
