"""How fast everything is, beside what it can be compared with: `python3 -m tests.benchmarks [RUN] [--output FOLDER]`.

Every figure is a ratio_of_means, measured in one run beside a physical limit or somebody else's code: drawing worlds beside filling as
many bytes and beside MiniGrid, decisions and updates beside bare matrix products of as many floating-point operations, and the
cost of each part as sizes double. RUN is a trained run: an untrained belief is vague and branches far more; without one, `quick`
is trained first. Where there is a GPU, all is timed there too. `--recorded` times a few things for a minute and compares them
with `ratios.json`, which `--record` has written.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from collections.abc import Callable, Iterator

import numpy as np
import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tyro.conf import Positional

from agent import Learner, System
from environment import HiddenRulesWorld, WorldSettings, make_inner_env
from main import Settings, build_system, load_system, train, with_preset
from memory import UserError, merge, write_json
from transition_model import EffectCache

RATIOS = Path(__file__).parent / "ratios.json"
MINIGRID = "MiniGrid-Empty-8x8-v0"
GROWTH: dict[str, tuple[dict, ...]] = {  # what doubles, and how
    "cells": tuple({"world": {"grid": n}} for n in (4, 6, 8, 11)),  # about twice as many each time
    "num_effects": tuple({"transition": {"num_effects": n}} for n in (12, 24, 48)),
    "actions": tuple({"world": {"actions": n}} for n in (4, 8)),
    "batch": tuple({"training": {"envs": n, "batch": n, "value_batch": n // 4, "random_lifetimes": n}} for n in (32, 64, 128)),
    "lifetime": tuple({"world": {"lifetime": n}} for n in (32, 64, 128)),
}


@dataclass(frozen=True)
class Arguments:
    """Time everything, as ratios."""

    run: Positional[Path | None] = None
    """A trained run; `quick` is trained if there is none."""
    output: Path = Path("runs/benchmarks")
    """Where speed.md, speed.json and growth.png go; written over."""
    peers: bool = False
    """Train RecurrentPPO beside the run too: five times the run's seconds and more."""
    recorded: bool = False
    """Only the few ratios of ratios.json, compared; exit code 1 where one has fallen below half."""
    record: bool = False
    """Write these few into ratios.json."""


class Row(NamedTuple):
    """One line of the table."""

    what: str
    figure: str
    ratio_of_means: float
    beside: str


def now() -> float:
    """Seconds on a clock, once a GPU has done what it was available_metrics to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(*works: Callable[[], object], repeats: int = 30) -> list[float]:
    """Seconds of one call of each, in turns, so that they share whatever else the machine does: the best after a warm-up."""
    for work in works:
        work()
    best = [float("inf")] * len(works)
    for _ in range(repeats):
        for number, work in enumerate(works):
            start = now()
            work()
            best[number] = min(best[number], now() - start)
    return best


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Compute with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


class Operations(TorchDispatchMode):
    """Counts the floating-point operations of matrix products and convolutions, gradients included, by torch's own formulas.
    (Its FlopCounterMode hooks modules too, which fails where a call switches gradients off in its middle.)"""

    total = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        """Do it, and count it; what is made of other operations is taken apart first."""
        if function._overloadpacket not in flop_registry:
            with self:
                result = function.decompose(*arguments, **(options or {}))
            if result is not NotImplemented:
                return result
        result = function(*arguments, **(options or {}))
        if (formula := flop_registry.get(function._overloadpacket)) is not None:
            self.total += formula(*arguments, **(options or {}), out_val=result)
        return result


def operations(work: Callable[[], object]) -> int:
    """Floating-point operations of a call."""
    with Operations() as counter:
        work()
    return counter.total


def bare(count: int, device: str, size: int = 64) -> Callable[[], object]:
    """One matrix product of so many operations, with as many columns as our layers have units."""
    left, right = torch.randn(max(1, count // (2 * size * size)), size, device=device), torch.randn(size, size, device=device)
    return lambda: left @ right


# -------------------------------------------------------------------------------------------------------- what is timed


def world_rows(device: str, batches: tuple[int, ...]) -> list[Row]:
    """Steps with drawn and noisy pictures a second, beside filling as many bytes with a constant."""
    rows = []
    for batch in batches:
        world = HiddenRulesWorld(WorldSettings(), batch, "train", 0, device)
        action, plain = torch.zeros(batch, dtype=torch.int64, device=device), world.reset()
        step, fill = seconds(lambda: world.step(action), lambda: plain.fill_(0))
        rows.append(Row(f"world, {batch} at once", f"{batch / step:,.0f} noisy 24x24 frames a second", fill / step, "a memory fill"))
    return rows


def minigrid_rows(ours: float) -> list[Row]:
    """Our best frames a second beside the best of MiniGrid's whole picture of as many pixels under Gymnasium's vectorisers."""
    import gymnasium

    rows = []
    kinds = {"one after the other": gymnasium.vector.SyncVectorEnv, "in processes": gymnasium.vector.AsyncVectorEnv}
    for name, kind in kinds.items():
        best = 0.0
        for copies in (2, 8, 32):
            worlds = kind([lambda: make_inner_env(MINIGRID, 3)] * copies)  # 8x8 tiles of 3 pixels: 24x24 as ours
            worlds.reset(seed=0)
            best = max(best, copies / seconds(lambda: worlds.step(np.full(copies, 2)))[0])
            worlds.close()
        rows.append(Row(f"world, beside MiniGrid {name}", f"{best:,.0f} frames a second are MiniGrid's", ours / best, "MiniGrid's best"))
    return rows


def decision_row(system: System, batch: int, search_depth: int, device: str, lifetimes: int = 1) -> Row:
    """Plan and act, averaged over whole lifetimes, beside a bare matrix product of as many operations."""
    world = HiddenRulesWorld(system.settings.world, batch, "validation", 0, system.device)
    agent = system.controller(search_depth=search_depth)
    acted, observed, multiplied, count, steps = 0.0, 0.0, 0.0, 0, system.settings.world.lifetime
    for lifetime in range(lifetimes + 1):  # the first is the warm-up, in which operations are counted
        product = bare(count // steps, device)
        agent.reset(world.reset())
        for _ in range(steps):
            if lifetime == 0:
                found: list[torch.Tensor] = []
                count += operations(lambda: found.append(agent.act()))
                agent.observe(found[0], world.step(found[0]))
                continue
            start = now()
            action = agent.act()
            acted += now() - start
            step = world.step(action)
            start = now()
            agent.observe(action, step)
            observed += now() - start
            start = now()
            product()
            multiplied += now() - start
    each = acted / (steps * lifetimes)
    looks = f"depth {search_depth}"
    figure = f"{1e3 * each:.2f} ms, {batch / each:,.0f} a second; {1e3 * observed / (steps * lifetimes):.2f} ms to observe"
    return Row(f"decision, {looks}, {batch} worlds", figure, multiplied / acted, "bare matrix products")


def prepared(settings: Settings, device: str, lifetimes: int = 0) -> Learner:
    """A learner with random lifetimes in its store, named by models that have not learnt."""
    learner = Learner(build_system(settings))
    while len(learner.store) < max(lifetimes, settings.training.envs):
        learner.collect(exploration=1.0)
    return learner


def updates(learner: Learner) -> dict[str, Callable[[], object]]:
    """One update of each part, as calls."""
    t = learner.training
    rows = learner.store.sample(t.batch, learner.sampler)
    experience = learner.store.experience.rows(rows.to(learner.device))
    few = experience.rows(slice(t.value_batch))
    with torch.no_grad():
        beliefs = learner.system.engine.sequence(few)
    return {
        "VAE": lambda: learner.learn_perception(rows),
        "num_effects": lambda: learner.learn_effects(1),
        "context": lambda: learner.learn_context(experience),
        "value": lambda: learner.learn_value(few, beliefs),
    }


def learning_rows(learner: Learner, device: str) -> list[Row]:
    """Updates a second of each part, beside a bare matrix product of as many operations; how often each part is due."""
    t = learner.training
    due = {"VAE": 1 / t.perception_every, "num_effects": 1 / t.effect_every, "context": 1.0, "value": 1.0}
    learner.update = 1
    calls = updates(learner)
    counted = {part: operations(call) for part, call in calls.items()}
    taken = {part: seconds(call, bare(counted[part], device), repeats=7) for part, call in calls.items()}
    whole = sum(taken[part][0] * share for part, share in due.items())
    rows = []
    for part, (spent, product) in taken.items():
        speed = f"{1 / spent:.1f} updates and {counted[part] / spent / 1e9:.1f} billion operations a second"
        rows.append(Row(f"learning, {part}", f"{speed}, {spent * due[part] / whole:.0%} of the time", product / spent, "bare matrix products"))
    return rows


def memory_rows(learner: Learner) -> list[Row]:
    """Bytes of a stored step beside its picture, and the memory of this process beside the store's budget."""
    import psutil  # of tests/requirements.txt

    settings, store = learner.settings, learner.store
    each = store.bytes / (len(store) * settings.world.lifetime)
    picture = float(np.prod(settings.world.sizes.obs_shape))
    resident = psutil.Process().memory_info().rss / 2**20
    return [
        Row("a stored step", f"{each:,.0f} bytes", picture / each, "its picture alone"),
        Row("resident memory", f"{resident:.0f} MB", settings.memory.budget_mb / resident, "the store's budget"),
    ]


def sharpen(system: System) -> None:
    """Let models that have not learnt expect one outcome and one reward each, about as trained ones do: vague ones would top_p_filter by
    chance, and the more by one size the less by another."""
    with torch.no_grad():
        for layer in (system.transition.prior_out[-1], system.transition.contact_out):
            layer.weight.mul_(1000)


def growth(base: Settings, device: str, path: Path) -> list[Row]:
    """How the cost of every part grows as something doubles: exponents, fitted by least squares, in one figure."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(GROWTH), figsize=(3 * len(GROWTH), 3), constrained_layout=True, sharey=True)
    rows = []
    for axis, (name, changes) in zip(np.atleast_1d(axes), GROWTH.items()):
        sizes, costs = [], {part: [] for part in ("world", "inference", "planning", "context", "value")}
        for change in changes:
            settings = merge(base, change)
            learner = prepared(settings, device)
            sharpen(learner.system)
            world, agent = HiddenRulesWorld(settings.world, settings.training.envs, "train", 0, device), learner.system.controller()
            agent.reset(world.reset())
            action = agent.act()
            calls = updates(learner)
            experience = learner.store.experience.rows(slice(settings.training.envs))

            def plan():
                agent.effect_cache = EffectCache(learner.system.transition.effects)  # or the same states would be looked up
                agent.act()

            timed = {
                "world": lambda: world.step(action), "planning": plan, "context": calls["context"], "value": calls["value"],
                "inference": lambda: learner.system.engine.sequence(experience),
            }  # fmt: skip
            for part, call in timed.items():
                with torch.set_grad_enabled(part in ("context", "value")):
                    costs[part] += seconds(call, repeats=5)
            (section, values), *_ = change.items()
            key, size = next(iter(values.items()))
            sizes.append(size**2 if key == "grid" else size)
        for part, taken in costs.items():
            slope = float(np.polyfit(np.log(sizes), np.log(taken), 1)[0])
            axis.loglog(sizes, np.array(taken) / taken[0], "o-", label=f"{part}: {slope:.2f}")
            rows.append(Row(f"growth of {part} with {name}", f"exponent {slope:.2f}", slope, "1 is in proportion"))
        axis.set_xticks(sizes, [f"{size}" for size in sizes])
        axis.set_yticks([1, 2, 4], ["1", "2", "4"])
        axis.minorticks_off()
        axis.set(xlabel=name, ylabel="times the cost" if name == "cells" else None)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return rows


# ------------------------------------------------------------------------------------------------------------- tables


def few_rows() -> list[Row]:
    """What is compared with ratios.json: one thread, weights that have not learnt, the same for everybody."""
    with threads(1):
        learner = prepared(merge(Settings(), {"training": {"envs": 48, "random_lifetimes": 48}}), "cpu")
        rows = world_rows("cpu", (64, 1024)) + [decision_row(learner.system, 16, False, "cpu")]
        return rows + learning_rows(learner, "cpu") + memory_rows(learner)[:1]


def compared() -> int:
    """Print the few ratios beside the recorded ones; 1 if one is below half of its own in three trials."""
    recorded, best = json.loads(RATIOS.read_text()), {}
    for _ in range(3):  # a machine has bad moments
        for row in few_rows():
            best[row.what] = max(best.get(row.what, 0.0), row.ratio_of_means / recorded[row.what])
            print(f"{row.what}: {row.ratio_of_means:.4f} of {row.beside}, recorded {recorded[row.what]:.4f}: {row.ratio_of_means / recorded[row.what]:.2f}")
        if min(best.values()) >= 0.5:
            return 0
    return 1


def every_row(arguments: Arguments) -> list[Row]:
    """All but the peers."""
    system, _ = load_system(arguments.run) if arguments.run else (trained_quick(), None)
    settings = system.settings
    rows = []
    for number in (1, 2):
        with threads(number):
            new = world_rows("cpu", (1, 64, 1024, 4096))
            new += [decision_row(system, batch, again, "cpu") for again in (False, True) for batch in ((1, 16), (256,))[number - 1]]
            rows += [row._replace(what=f"{row.what}, {number} thread{'s'[: number - 1]}") for row in new]
    if importlib.util.find_spec("minigrid"):
        best = max(float(row.figure.split()[0].replace(",", "")) for row in rows if row.what.startswith("world"))
        rows += minigrid_rows(best)
    else:
        print("MiniGrid is left out: pip install -r tests/requirements.txt")
    learner = prepared(Settings(), "cpu", lifetimes=512)
    rows += learning_rows(learner, "cpu") + memory_rows(learner)
    rows += growth(merge(Settings(), {"training": {"envs": 32, "batch": 32, "value_batch": 8, "random_lifetimes": 32}}), "cpu", arguments.output / "growth.png")
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        gpu = load_system(arguments.run, "cuda")[0] if arguments.run else System(settings, torch.device("cuda"))
        new = world_rows("cuda", (64, 1024, 4096, 65536)) + [decision_row(gpu, batch, True, "cuda") for batch in (1, 256, 4096)]
        new += learning_rows(prepared(Settings(), "cuda", lifetimes=512), "cuda")
        rows += [row._replace(what=f"{row.what}, {name}") for row in new]
    else:
        print("no GPU here: its rows are left out")
    return rows


def trained_quick() -> System:
    """The quick preset's agent, trained now: a belief as sharp as agents have."""
    learner = Learner(build_system(with_preset(Settings(), "quick")))
    train(learner)
    return learner.system


def main(arguments: Arguments) -> int:
    """Time, print and keep; the exit code."""
    if arguments.peers and not arguments.run:
        raise UserError("--peers needs the RUN that RecurrentPPO shall be compared with.")
    if arguments.record:
        trials = [few_rows() for _ in range(5)]  # a machine has bad moments, and good ones
        write_json({rows[0].what: round(float(np.median([row.ratio_of_means for row in rows])), 4) for rows in zip(*trials)}, RATIOS)
    if arguments.record or arguments.recorded:
        return compared()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = every_row(arguments)
    lines = ["| what | figure | ratio_of_means | to |", "|---|---|---|---|"]
    lines += [f"| {row.what} | {row.figure} | {row.ratio_of_means:.3g} | {row.beside} |" for row in rows]
    (arguments.output / "speed.md").write_text("\n".join(lines) + "\n")
    write_json([row._asdict() for row in rows], arguments.output / "speed.json")
    print("\n".join(lines) + f"\n\nin {arguments.output}")
    if arguments.peers:
        from tests.benchmarks import peers  # needs tests/requirements.txt

        peers.main(arguments.run)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
