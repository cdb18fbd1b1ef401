"""How fast the world, the decisions and the parts of meta-training are: `python3 -m tests.benchmarks.speed RUN`.

RUN is a trained run: an untrained belief is vague, branches far more and would be timed unfairly slow. Seconds belong to
the machine; beside each stands what it is compared with. Where there is a GPU, everything is timed there too.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from collections.abc import Callable

import torch

from environment import HiddenRulesWorld, WorldSettings
from main import Learner, Settings, load_system
from memory import RunFolder, merge
from tests.benchmarks import named_runs


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median seconds of one call, after a warm-up."""
    work()
    taken = []
    for _ in range(repeats):
        start = now()
        work()
        taken.append(now() - start)
    return sorted(taken)[repeats // 2]


def now() -> float:
    """Seconds on a clock, once a GPU has done what it was told to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def worker(device: str, threads: int) -> str:
    """What computes, in words; from now on with so many threads."""
    torch.set_num_threads(threads)
    return torch.cuda.get_device_name() if device == "cuda" else f"{threads} threads"


def world_speed(device: str, threads: int) -> None:
    """Steps with drawn and noisy pictures a second, beside filling as many bytes with a constant."""
    who = worker(device, threads)
    for batch in (1, 64, 1024, 4096, *((65536,) if device == "cuda" else ())):
        world = HiddenRulesWorld(WorldSettings(), batch, "train", 0, device)
        action, plain = torch.zeros(batch, dtype=torch.int64, device=device), world.reset()
        step, fill = seconds(lambda: world.step(action), 30), seconds(lambda: plain.fill_(0), 30)
        print(f"| world, {batch} at once, {who} | {batch / step:,.0f} noisy 24x24 frames a second | {fill / step:.3f} of a memory fill |")


def decision_speed(run: Path, batch: int, device: str, threads: int, look_again: bool) -> None:
    """Perceive, infer, plan and act: one agent step, in the middle of lifetimes and averaged over a whole one."""
    who = worker(device, threads)
    system, _ = load_system(run, device)
    world = HiddenRulesWorld(system.settings.world, batch, "validation", 0, system.device)
    agent = system.controller(look_again=look_again)
    for lifetime in range(2):  # the first is the warm-up
        agent.begin(world.reset())
        spent, planned = 0.0, []
        for _ in range(system.settings.world.lifetime):
            start = now()
            action = agent.act()
            planned.append(now() - start)
            step = world.step(action)
            start = now()
            agent.observe(action, step)
            spent += planned[-1] + now() - start
    each, acted = spent / system.settings.world.lifetime, sum(planned) / len(planned)
    print(
        f"| decision, {'two looks' if look_again else 'one look'}, {batch} worlds, {who} | {1e3 * acted:.2f} ms to act, {1e3 * each:.2f} ms with observing | "
        f"{batch / acted:,.0f} decisions a second ({batch / each:,.0f} with observing) |"
    )


def learning_shares(run: Path) -> None:
    """Seconds of each part of a whole training, as its timing.json has them."""
    timing = json.loads((run / "timing.json").read_text())
    total = timing.pop("total")
    settings = RunFolder(run).settings(Settings())
    for part, spent in sorted(timing.items(), key=lambda item: -item[1]):
        print(f"| {part} | {spent:.0f} s | {spent / total:.0%} of {total:.0f} s, {settings.training.updates} updates |")


def gpu_updates(run: Path, updates: int = 50) -> None:
    """Updates a second of the last phase on the GPU, of a training that goes on from the run's checkpoint."""
    settings = RunFolder(run).settings(Settings(), device="cuda")
    learner = Learner(merge(settings, {"training": {"updates": settings.training.updates + updates}}), torch.device("cuda"))
    learner.load_state_dict(RunFolder(run).load()[0], run / "store")
    learner.advance()
    start = now()
    for _ in range(updates - 1):
        learner.advance()
    print(f"| learning, {torch.cuda.get_device_name()} | {(updates - 1) / (now() - start):.1f} updates a second | |")


if __name__ == "__main__":
    (folder,) = named_runs("speed", several=False)
    print("| what | figure | beside |\n|---|---|---|")
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        world_speed(device, 2)
        for look_again in (False, True):
            for batch, threads in ((1, 1), (16, 2), (256, 2)):
                decision_speed(folder, batch, device, threads, look_again)
    learning_shares(folder)
    if torch.cuda.is_available():
        gpu_updates(folder)
    else:
        print("\nno GPU here: its rows are left out")
