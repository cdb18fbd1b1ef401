"""Speed of environments, decisions and learning, as ratios to physical limits and other libraries.

Every ratio is measured in one process: rendering environments beside filling as many bytes and beside MiniGrid,
decisions and updates beside bare matrix products of as many floating-point operations, and how the cost of each part
grows as sizes double. RUN is a trained run, because an untrained belief is vague, and a plan under it has far more
branches; without one, the preset `quick` is trained first. --gpu times a GPU instead. --recorded measures a few ratios
for a minute and compares them with ratios.json, which --record writes; exit code 1 if one has fallen below half.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
from matplotlib.figure import Figure
from tyro.conf import Positional

from agent import AgentController, Learner, System
from environment import HiddenRulesWorld, WorldSettings, make_inner_env
from main import Settings, build_system, load_system, train, with_preset
from memory import UserError, merge, write_json
from tests.benchmarks import command_line
from tests.benchmarks._measure import FlopCounter, best_seconds, count_flops, matrix_product, now, threads
from transition_model import EffectCache

RATIOS = Path(__file__).parent / "ratios.json"
MINIGRID = "MiniGrid-Empty-8x8-v0"
BASE = merge(Settings(), {"transition": {"max_effects": 24}})  # about as many as the default world has
GROWTH: dict[str, tuple[dict, ...]] = {  # the settings that make each size about double
    "cells": tuple({"world": {"grid": n}} for n in (4, 6, 8, 11)),
    "effects": tuple({"transition": {"max_effects": n}} for n in (12, 24, 48)),
    "actions": tuple({"world": {"actions": n}} for n in (4, 8)),
    "batch": tuple(
        {"training": {"envs": n, "batch": n, "value_batch": n // 4, "random_lifetimes": n}} for n in (32, 64, 128)
    ),
    "lifetime": tuple({"world": {"lifetime": n}} for n in (32, 64, 128)),
}


class Row(NamedTuple):
    """One row of the table."""

    name: str  # what is measured
    value: str  # the measurement with its unit
    ratio: float  # above 0, the larger the better; for growth the exponent
    reference: str  # what the ratio is to


def world_row(device: str, batch: int) -> Row:
    """Noisy frames per second of so many environments at once, beside filling as many bytes with a constant."""
    world = HiddenRulesWorld(WorldSettings(), batch, "train", 0, device)
    action, frames = torch.zeros(batch, dtype=torch.int64, device=device), world.reset()
    step, fill = best_seconds(lambda: world.step(action), lambda: frames.fill_(0))
    return Row(f"world, {batch} at once", f"{batch / step:,.0f} frames per second", fill / step, "a memory fill")


def minigrid_rate(kind: type[gymnasium.vector.VectorEnv], copies: int) -> float:
    """MiniGrid's frames per second in so many copies; 8x8 tiles of 3 pixels are 24x24 pixels, as ours."""
    worlds = kind([lambda: make_inner_env(MINIGRID, 3)] * copies)
    worlds.reset(seed=0)
    rate = copies / best_seconds(lambda: worlds.step(np.full(copies, 2)))[0]
    worlds.close()
    return rate


def minigrid_rows(batch: int = 4096) -> list[Row]:
    """Our frames per second by two threads beside the best of MiniGrid's under Gymnasium's vector environments."""
    world, action = HiddenRulesWorld(WorldSettings(), batch, "train", 0), torch.zeros(batch, dtype=torch.int64)
    world.reset()
    with threads(2):
        own = batch / best_seconds(lambda: world.step(action))[0]
    rows = []
    kinds = {"one after the other": gymnasium.vector.SyncVectorEnv, "in processes": gymnasium.vector.AsyncVectorEnv}
    for name, kind in kinds.items():
        best = max(minigrid_rate(kind, copies) for copies in (2, 8, 32))
        value = f"MiniGrid: {best:,.0f} frames per second"
        rows.append(Row(f"world, beside MiniGrid {name}", value, own / best, "MiniGrid's best"))
    return rows


def decision_row(system: System, batch: int, nodes: int = 0, lifetimes: int = 1) -> Row:
    """Seconds to plan and act, averaged over whole lifetimes, beside a matrix product of as many operations."""
    world = HiddenRulesWorld(system.settings.world, batch, "validation", 0, system.device)
    agent, steps = AgentController(system, nodes=nodes), system.settings.world.lifetime
    flops = count_decision_flops(world, agent, steps)
    product = matrix_product(flops // steps, system.device)
    acting = observing = multiplying = 0.0
    for _ in range(lifetimes):
        agent.reset(world.reset())
        for _ in range(steps):
            times = [now()]
            action = agent.act()
            times.append(now())
            step = world.step(action)
            times.append(now())
            agent.observe(action, step)
            times.append(now())
            product()
            times.append(now())
            spent = np.diff(times)
            acting, observing, multiplying = acting + spent[0], observing + spent[2], multiplying + spent[3]
    act, observe = acting / (steps * lifetimes), observing / (steps * lifetimes)
    value = f"{1e3 * act:.2f} ms, {batch / act:,.0f} per second; {1e3 * observe:.2f} ms to observe"
    name = f"decision, nodes {nodes or system.settings.planner.nodes}, {batch} worlds"
    return Row(name, value, float(multiplying / acting), "bare matrix products")


def count_decision_flops(world: HiddenRulesWorld, agent: AgentController, steps: int) -> int:
    """Floating-point operations of all decisions of a lifetime."""
    flops = 0
    agent.reset(world.reset())
    for _ in range(steps):
        with FlopCounter() as counter:
            action = agent.act()
        flops += counter.total
        agent.observe(action, world.step(action))
    return flops


def prepare_learner(settings: Settings, lifetimes: int = 0) -> Learner:
    """An untrained learner with as many effects as it may find, and at least so many random lifetimes in its store, one
    collection if 0. Its codes are chosen, so that as many grids differ as in training: what occurs again costs nothing.
    """
    system = build_system(settings)
    system.set_num_effects(settings.transition.max_effects)
    learner = Learner(system)
    while len(learner.store) < max(lifetimes, settings.training.envs):
        learner.collect(exploration=1.0)
    learner.learn_perception(torch.arange(settings.training.envs))  # at update 0 it chooses the codes
    learner.reencode_all(perception=True)
    learner.update = 1
    return learner


def updates(learner: Learner) -> dict[str, Callable[[], object]]:
    """One update of each part, as calls."""
    t = learner.training
    rows = learner.store.sample(t.batch, learner.sampler)
    experience = learner.store.experience.rows(rows.to(learner.device))
    value_experience = experience.rows(slice(t.value_batch))
    with torch.no_grad():
        beliefs = learner.system.engine.sequence(value_experience)
    return {
        "VAE": lambda: learner.learn_perception(rows),
        "effects": lambda: learner.learn_effects(),
        "context": lambda: learner.learn_context(experience),
        "value": lambda: learner.learn_value(value_experience, beliefs),
    }


def learning_rows(learner: Learner) -> list[Row]:
    """Updates per second of each part, beside a matrix product of as many operations; and its share of all updates."""
    t = learner.training
    per_update = {"VAE": 1 / t.perception_every, "effects": 1 / t.effect_every, "context": 1.0, "value": 1.0}
    flops, times = {}, {}
    for part, call in updates(learner).items():
        flops[part] = count_flops(call)
        times[part] = best_seconds(call, matrix_product(flops[part], learner.device), repeats=7)
    whole = sum(times[part][0] * share for part, share in per_update.items())
    rows = []
    for part, (update, product) in times.items():
        speed = f"{1 / update:.1f} updates and {flops[part] / update / 1e9:.1f} billion operations per second"
        share = update * per_update[part] / whole
        rows.append(
            Row(
                f"learning, {part}",
                f"{speed}, {share:.0%} of the updates",
                product / update,
                "bare matrix products",
            )
        )
    return rows


def memory_rows(learner: Learner) -> list[Row]:
    """Bytes of a stored step beside its frame, and the memory of this process beside the store's budget."""
    import psutil  # of tests/requirements.txt

    settings, store = learner.settings, learner.store
    stored = store.bytes / (len(store) * settings.world.lifetime)
    frame = float(np.prod(settings.world.sizes.obs_shape))
    resident = psutil.Process().memory_info().rss / 2**20
    return [
        Row("a stored step", f"{stored:,.0f} bytes", frame / stored, "its frame alone"),
        Row("resident memory", f"{resident:.0f} MB", settings.memory.budget_mb / resident, "the store's budget"),
    ]


def sharpen(system: System) -> None:
    """Make an untrained model predict one effect and one reward each, about as a trained one does.

    The number of branches of vague predictions would depend on chance, and differently for each size.
    """
    with torch.no_grad():
        for layer in (system.transition.prior_out[-1], system.transition.contact_out):
            layer.weight.mul_(1000)


def part_costs(settings: Settings) -> dict[str, float]:
    """Seconds of each part under these settings."""
    learner = prepare_learner(settings)
    system, envs = learner.system, settings.training.envs
    sharpen(system)
    world, agent = HiddenRulesWorld(settings.world, envs, "train", 0, learner.device), AgentController(system)
    agent.reset(world.reset())
    action = agent.act()
    learning = updates(learner)
    experience = learner.store.experience.rows(slice(envs))

    def plan() -> None:
        agent.effect_cache = EffectCache(system.transition.effects)  # or it would find all states of the last call
        agent.act()

    with torch.no_grad():
        costs = {
            "world": best_seconds(lambda: world.step(action), repeats=5)[0],
            "inference": best_seconds(lambda: system.engine.sequence(experience), repeats=5)[0],
            "planning": best_seconds(plan, repeats=5)[0],
        }
    return costs | {part: best_seconds(learning[part], repeats=5)[0] for part in ("context", "value")}


def size_of(change: dict) -> int:
    """The size that a change of GROWTH sets; of a grid its number of cells."""
    (values,) = change.values()
    name, size = next(iter(values.items()))
    return size**2 if name == "grid" else size


def growth(base: Settings, path: Path) -> list[Row]:
    """Exponents of each part's cost over each size, fitted by least squares, and a figure of them to `path` (PNG)."""
    figure = Figure(figsize=(3 * len(GROWTH), 3), layout="constrained")
    rows = []
    panels = figure.subplots(1, len(GROWTH), sharey=True, squeeze=False)[0]
    for axes, (name, changes) in zip(panels, GROWTH.items(), strict=True):
        sizes = [size_of(change) for change in changes]
        costs = [part_costs(merge(base, change)) for change in changes]
        for part in costs[0]:
            seconds = np.array([cost[part] for cost in costs])
            exponent = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
            axes.loglog(sizes, seconds / seconds[0], "o-", label=f"{part}: {exponent:.2f}")
            rows.append(Row(f"growth of {part} with {name}", f"exponent {exponent:.2f}", exponent, "1 is proportional"))
        axes.set_xticks(sizes, [f"{size}" for size in sizes])
        axes.set_yticks([1, 2, 4], ["1", "2", "4"])
        axes.minorticks_off()
        axes.set(xlabel=name)
        axes.legend(fontsize=7)
    figure.axes[0].set_ylabel("relative cost")
    figure.savefig(path, dpi=110)
    return rows


def recorded_rows() -> list[Row]:
    """The rows of ratios.json: one thread, untrained weights, the same for everybody."""
    with threads(1):
        learner = prepare_learner(merge(BASE, {"training": {"envs": 48, "random_lifetimes": 48}}))
        rows = [world_row("cpu", 64), world_row("cpu", 1024), decision_row(learner.system, 16, nodes=1)]
        return rows + learning_rows(learner) + memory_rows(learner)[:1]


def record_ratios(trials: int = 5) -> None:
    """Write the median of several trials to ratios.json: single ones may be slowed or favoured by the machine."""
    tables = [recorded_rows() for _ in range(trials)]
    ratios = {}
    for rows in zip(*tables, strict=True):
        ratios[rows[0].name] = round(float(np.median([row.ratio for row in rows])), 4)
    write_json(ratios, RATIOS)


def check_ratios(trials: int = 3) -> int:
    """Print present ratios beside the recorded ones; 1 if the best of all trials of one is below half, else 0."""
    recorded, best = json.loads(RATIOS.read_text()), {}
    for _ in range(trials):
        for row in recorded_rows():
            share = row.ratio / recorded[row.name]
            best[row.name] = max(best.get(row.name, 0.0), share)
            print(f"{row.name}: {row.ratio:.4f} of {row.reference}, recorded {recorded[row.name]:.4f}: {share:.2f}")
        if min(best.values()) >= 0.5:
            return 0
    return 1


def cpu_rows(system: System) -> list[Row]:
    """Environments and decisions by one thread and by two."""
    rows = []
    for number, label, batches in ((1, "1 thread", (1, 16)), (2, "2 threads", (256,))):
        with threads(number):
            timed = [world_row("cpu", batch) for batch in (1, 64, 1024, 4096)]
            timed += [decision_row(system, batch, nodes) for nodes in (1, 0) for batch in batches]
        rows += [row._replace(name=f"{row.name}, {label}") for row in timed]
    return rows


def gpu_rows(system: System) -> list[Row]:
    """Environments, decisions and learning on the GPU, learning also with batches 32 times as large."""
    on_gpu = build_system(merge(system.settings, {"device": "cuda"}))
    on_gpu.load({name: module.state_dict() for name, module in system.modules().items()})
    rows = [world_row("cuda", batch) for batch in (64, 1024, 4096, 65536)]
    rows += [decision_row(on_gpu, batch, nodes) for nodes in (1, 0) for batch in (1, 256, 4096)]
    for wider in (1, 32):
        training = {name: wider * getattr(BASE.training, name) for name in BASE.training.SHARED}
        wide = merge(BASE, {"device": "cuda", "training": training, "memory": {"budget_mb": 8192}})
        learnt = learning_rows(prepare_learner(wide, lifetimes=training["batch"]))
        rows += [row._replace(name=f"{row.name}, batches times {wider}") for row in learnt]
    return rows


def all_rows(system: System, output: Path) -> list[Row]:
    """Everything that processors can measure; growth.png goes to `output`."""
    rows = cpu_rows(system)
    if importlib.util.find_spec("minigrid"):
        rows += minigrid_rows()
    else:
        print("MiniGrid is left out: pip install -r tests/requirements.txt")
    learner = prepare_learner(BASE, lifetimes=512)
    rows += learning_rows(learner) + memory_rows(learner)
    small = {"training": {"envs": 32, "batch": 32, "value_batch": 8, "random_lifetimes": 32}}
    return rows + growth(merge(BASE, small), output / "growth.png")


def trained_system() -> System:
    """The agent of the preset `quick`, trained now."""
    learner = Learner(build_system(with_preset(Settings(), "quick")))
    train(learner)
    return learner.system


def main(
    run: Positional[Path | None] = None,
    output: Path = Path("runs/benchmarks"),
    gpu: bool = False,
    recorded: bool = False,
    record: bool = False,
) -> int:
    """Measure, print and save the table; the exit code.

    Args:
        run: Folder of a trained run; `quick` is trained if there is none.
        output: Folder for speed.md, speed.json and growth.png; overwritten.
        gpu: Time the GPU, not the processor.
        recorded: Only compare a few ratios with ratios.json.
        record: Write these ratios to ratios.json first.
    """
    if record:
        record_ratios()
    if record or recorded:
        return check_ratios()
    if gpu and not torch.cuda.is_available():
        raise UserError("there is no GPU here: leave out --gpu.")
    system = load_system(run)[0] if run else trained_system()
    output.mkdir(parents=True, exist_ok=True)
    rows = gpu_rows(system) if gpu else all_rows(system, output)
    lines = ["| what | value | ratio | to |", "|---|---|---|---|"]
    lines += [f"| {row.name} | {row.value} | {row.ratio:.3g} | {row.reference} |" for row in rows]
    (output / "speed.md").write_text("\n".join(lines) + "\n")
    write_json([row._asdict() for row in rows], output / "speed.json")
    print("\n".join(lines) + f"\n\nwritten to {output}")
    return 0


if __name__ == "__main__":
    command_line(main)
