"""Make the tables of the two READMEs from records, and the records that are missing or of another version.

A record is one small JSON file in tests/benchmarks/records: what was run, by which commit, when, on what, and the
figures. Tables need nothing but records. Without options this lists the records that are missing or made by another
version of the code, and writes the tables. --make measures these, one job a core, and can be stopped and started
again at any point, on any machine: trainings go on from their checkpoints. What a record holds is never edited.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from main import Settings, with_preset
from memory import UserError, write_json
from tests.benchmarks import ROOT, command_line, over_seeds, run_command, score_cells
from world_model import AGENTS, format_ci

RECORDS = ROOT / "tests" / "benchmarks" / "records"
PAGES = (ROOT / "README.md", ROOT / "tests" / "benchmarks" / "README.md")
# Lifetimes to evaluate on, and parts of a lifetime, which are its episodes where these have a fixed length.
CLASSICS = {"HiddenGoal": (256, 4), "Darkroom": (128, 10), "DarkroomPermuted": (64, 4), "FrozenLakeMeta": (128, 10)}
CLASSICS |= {"DarkKeyToDoor": (64, 8)}
FOLDS = tuple(f"HiddenGoal{fold}" for fold in range(1, 5))
TABLES = ("PRESETS", "WORLDS")
PICTURES, SHOWN = ("adaptation.png", "lifetime.gif"), "default-0"  # in README.md, and the record that they come with
# The modules that a benchmark measures, where it is not all of them: RL2 is another agent in the same worlds.
MEASURED = {"tests.benchmarks.rl2": ("environment.py", "memory.py", "context_engine.py")}
DRAWING = ("plot_", "picture_", "label_", "show_", "save_animation")  # how functions begin that do not change figures
ORIGIN = {"commit": "Commit ", "date": "", "processor": "", "threads": "threads: ", "torch": "torch "}
ROOMS = ("Empty-Random-6x6", "Empty-8x8", "LavaGapS5", "SimpleCrossingS9N1", "DoorKey-5x5")


@dataclass(frozen=True)
class Measurement:
    """What one record holds."""

    # of python3; {NAME} stands for the folder of the training that record NAME is of, KEPT for a name in runs/, unlike
    # that of any other measurement or version, under which it keeps what it has so far
    command: tuple[str, ...]
    minutes: float  # about how long it takes one core
    alone: bool = False  # nothing else may run beside it
    gpu: bool = False  # it needs a GPU


def training(*options: str, seed: int, **about: float) -> Measurement:
    """A training, with options of main.py."""
    return Measurement(("main.py", *options, "--seed", str(seed)), **about)


def benchmark(name: str, *arguments: str, **about: float) -> Measurement:
    """Another benchmark."""
    return Measurement(("-m", f"tests.benchmarks.{name}", *arguments), **about)


def measurements() -> dict[str, Measurement]:
    """Everything that the tables show, by the name of its record."""
    worlds: dict[str, tuple[int, float, tuple[str, ...]]] = {"default": (5, 4, ())}
    for preset, minutes in {"quick": 1, "large": 10, "switching": 8, "tinted": 9, "everything": 22}.items():
        worlds[preset] = (3, minutes, ("--preset", preset))
    worlds["permutations"] = (3, 5, ("--world.holdout", "permutations"))
    for name in CLASSICS:
        minutes = 12 if name == "DarkKeyToDoor" else 5
        worlds[name] = (3, minutes, ("--world.gym-id", f"tests.benchmarks.classics:{name}-v0"))
    for fold in FOLDS:
        worlds[fold] = (3, 1, ("--world.gym-id", f"tests.benchmarks.classics:{fold}-v0"))
    worlds |= {room: (3, 10, ("--world.gym-id", f"MiniGrid-{room}-v0")) for room in ROOMS}
    found = {
        f"{name}-{seed}": training(*options, seed=seed, minutes=minutes)
        for name, (seeds, minutes, options) in worlds.items()
        for seed in range(seeds)
    }
    runs = {name: tuple(f"{{{name}-{seed}}}" for seed in range(seeds)) for name, (seeds, *_) in worlds.items()}
    for name, (lifetimes, columns) in (CLASSICS | dict.fromkeys(ROOMS, (32, 8))).items():
        options = ("--lifetimes", str(lifetimes), "--columns", str(columns))
        found[f"external-{name}"] = benchmark("external", *runs[name], *options, minutes=3)
    search = ("--lifetimes", "256", "--columns", "4", "--split", "train")
    found["external-HiddenGoal-train"] = benchmark("external", *runs["HiddenGoal"], *search, minutes=1)
    found |= {
        "tuning": benchmark("tuning", *runs["quick"], "--name", "KEPT", minutes=13),
        "folds": benchmark("folds", *(run for name in ("HiddenGoal", *FOLDS) for run in runs[name]), minutes=3),
        "places": benchmark("places", *runs["HiddenGoal"], minutes=5),
        "references": benchmark("references", "{default-0}", minutes=7),
        "belief": benchmark("belief", "{default-0}", minutes=1),
        "effects": benchmark("effects", *runs["default"], *runs["everything"], minutes=1),
        "robustness": benchmark("robustness", *runs["default"][:3], minutes=5),
        "switching": benchmark("switching", *runs["switching"], minutes=3),
        "appearance": benchmark("appearance", *runs["tinted"], minutes=1),
        "ablations": benchmark("ablations", "--output", "runs/KEPT", minutes=25),
        "speed": benchmark("speed", "{default-0}", minutes=1, alone=True),
        "speedrun": benchmark("speedrun", minutes=16, alone=True),
        "processes": benchmark("processes", "--preset", "quick", "--name", "KEPT", minutes=8, alone=True),
    }
    on_gpu, once = ("--device", "cuda"), Settings().training
    sizes = {name.replace("_", "-"): getattr(once, name) for name in once.SHARED}  # eight processes would share these
    wide = [part for name, size in sizes.items() for part in (f"--training.{name}", str(8 * size))]
    found["gpu-1-0"] = training(*on_gpu, seed=0, minutes=4, gpu=True)
    found["gpu-8-0"] = training(*on_gpu, *wide, "--memory.budget-mb", "4096", seed=0, minutes=5, gpu=True)
    found["speed-gpu"] = benchmark("speed", "{default-0}", "--gpu", minutes=2, alone=True, gpu=True)
    many, aids = (*on_gpu, "--lifetimes", "4096", "--frames", "60000000"), ("--symbols", "--relabel", "--labels", "1")
    for preset in ("quick", "default"):
        for name, options in {"plain": (), "aided": aids}.items():
            command = ("rl2", "--preset", preset, *options, *many)
            found[f"rl2-{preset}-{name}"] = benchmark(*command, minutes=8, gpu=True)
    return found


# -------------------------------------------------------------------------------------------------------------- records
@functools.cache
def code_of(text: str) -> ast.Module:
    """A module's code without prose and errors, what only draws, and presets, of which `version` adds what matters."""
    tree = ast.parse(text)
    tree.body = [node for node in tree.body if not getattr(node, "name", "").startswith(DRAWING)]
    tree.body = [node for node in tree.body if getattr(getattr(node, "target", None), "id", "") not in TABLES]
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body[0].value.value = ""
        if isinstance(node, ast.Raise):
            node.exc = node.cause = None
    return tree


def used_by(benchmark: ast.Module, modules: list[ast.Module]) -> list[ast.AST]:
    """The definitions in `modules` that a benchmark uses by name, itself or through others of them."""
    defined: dict[str, ast.AST] = {}
    for node in itertools.chain(*(module.body for module in modules)):
        for named in (node, getattr(node, "target", None), *getattr(node, "targets", ())):  # also assignments
            defined[getattr(named, "name", getattr(named, "id", ""))] = node
    used: dict[str, ast.AST] = {}
    found: list[ast.AST] = [benchmark]
    while found:
        names = {child.id for node in found for child in ast.walk(node) if isinstance(child, ast.Name)}
        new = {name: defined[name] for name in names & defined.keys() - used.keys()}
        used, found = used | new, list(new.values())
    return [used[name] for name in sorted(used)]


def content(node: Any) -> str:
    """What a part of a syntax tree holds. Nothing empty: which empty fields there are depends on the Python version."""
    if isinstance(node, ast.AST):
        parts = (f"{name}={content(value)}" for name, value in ast.iter_fields(node) if value not in (None, []))
        return f"{type(node).__name__}({', '.join(parts)})"
    return f"[{', '.join(map(content, node))}]" if isinstance(node, list) else repr(node)


@functools.cache
def encoded(node: ast.AST) -> bytes:
    """The content of a definition or module, which many versions count."""
    return content(node).encode()


@functools.cache
def version(command: tuple[str, ...]) -> str:
    """A hash of a command and of what it measures: the modules' code and the benchmark's own (see `code_of`), the
    settings of its preset, and the versions of the trainings that it reads. Of `MEASURED` ones only what they use of
    the modules that these name, and the world's settings."""
    modules = {file.name: code_of(file.read_text()) for file in sorted(ROOT.glob("*.py"))}
    if "tests.benchmarks.tuning" not in command:
        modules.pop("tune_hyperparams.py", None)
    benchmarks, code = ROOT / "tests" / "benchmarks", list(modules.values())
    measured = MEASURED.get(command[1]) if command[0] == "-m" else None
    if command[0] == "-m":
        own = code_of((ROOT / Path(*command[1].split(".")).with_suffix(".py")).read_text())
        if measured:
            code = used_by(own, [tree for name, tree in modules.items() if name in measured])
        code += [own, *(code_of(file.read_text()) for file in sorted(benchmarks.glob("_*.py")))]
    if any("classics" in part for part in command):
        code.append(code_of((benchmarks / "classics.py").read_text()))
    digest = hashlib.sha256(" ".join(command).encode())
    for node in code:
        digest.update(encoded(node))
    preset = "gym" if "--world.gym-id" in command else "default"
    if "--preset" in command:
        preset = command[command.index("--preset") + 1]
    settings = with_preset(Settings(), preset)
    digest.update(repr(settings.world if measured else settings).encode())
    for name in parts(command):
        digest.update(version(measurements()[name].command).encode())
    return digest.hexdigest()[:12]


def run_of(name: str) -> Path:
    """The folder of a training by the present version."""
    return ROOT / "runs" / f"record-{name}-{version(measurements()[name].command)}"


def read_records() -> dict[str, dict[str, Any]]:
    """All records by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))}


def parts(command: tuple[str, ...]) -> list[str]:
    """The trainings whose folders a command needs."""
    return [part[1:-1] for part in command if part.startswith("{")]


def commit() -> str:
    """The present commit; with a plus if the code differs from it."""
    head = run_command(["git", "rev-parse", "--short", "HEAD"], ROOT).strip()
    return head + "+" * bool(run_command(["git", "diff", "--name-only", "HEAD", "--", "*.py"], ROOT))


def make_record(name: str, cores: int) -> None:
    """Run a measurement with so many threads, and write its record; UserError if it fails."""
    version.cache_clear()
    one = measurements()[name]
    for training in parts(one.command):
        if not (run_of(training) / "evaluation.json").exists():
            raise UserError(f"{name} needs {run_of(training)}, which is not trained: make {training} first.")
    folders = {f"{{{training}}}": str(run_of(training)) for training in parts(one.command)}
    command = [folders.get(part, part).replace("KEPT", run_of(name).name) for part in one.command]
    if one.command[0] == "main.py":
        command += ["--run", run_of(name).name]
    about = {
        "command": " ".join(("python3", *one.command)),
        "commit": commit(),
        "version": version(one.command),
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(one.gpu),
        "torch": torch.__version__,
        "threads": cores,
    }
    environment, start = os.environ | {"OMP_NUM_THREADS": str(cores)}, time.perf_counter()
    try:
        printed = run_command([sys.executable, *command], ROOT, environment)
    except UserError as error:
        raise UserError(f"{name} failed: {error}") from error
    about["seconds"] = round(time.perf_counter() - start, 1)
    version.cache_clear()
    if version(one.command) != about["version"]:
        raise UserError(f"{name} was measured while the code changed: measure it again.")
    if trains := one.command[0] == "main.py":
        figures = training_figures(run_of(name))
    else:  # the tables, and how much was measured; not where a figure lies
        lines = [line.partition("; figure in ")[0] for line in printed.splitlines()]
        figures = {"output": [line for line in lines if not line.startswith("written to ")]}
    if not trains and not any(line.startswith("|") for line in lines):
        raise UserError(f"{name} failed: it printed no table: see python3 {' '.join(command)}")
    RECORDS.mkdir(exist_ok=True)
    write_json(about | figures, RECORDS / f"{name}.json")
    if trains:
        shutil.rmtree(run_of(name) / "store")  # half a gigabyte at the most, for going on only
        if name == SHOWN:
            keep_pictures(run_of(name))


def keep_pictures(run: Path) -> None:
    """Copy a run's pictures to where README.md shows them."""
    for picture in PICTURES:
        shutil.copyfile(run / picture, ROOT / ".github" / picture)


def training_figures(run: Path) -> dict[str, Any]:
    """What a record keeps of a finished run."""
    result, timing = (json.loads((run / name).read_text()) for name in ("evaluation.json", "timing.json"))
    kept = {name: result[name] for name in ("lifetimes", "env_steps", "return_mean", "return_mean_ci95")}
    for name in ("normalised", "of_thompson", "late_of_known_rule"):
        if name in result:
            kept |= {name: result[name], f"{name}_ci95": result[f"{name}_ci95"]}
    kept["belief"] = result["belief_nll"]["late_excess"]
    for name in AGENTS:
        if name in result and name != "agent":
            kept[name] = {key: result[name][key] for key in ("return_mean", "return_mean_ci95")}
    return kept | {"training_seconds": round(timing["total"], 1), "validations": timing["validations"]}


def processor(gpu: bool) -> str:
    """The name of this machine's processor, and of its GPU where that was used."""
    names = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", names.read_text()) if names.exists() else None
    name = f"{found[1] if found else platform.processor()}, {os.cpu_count()} cores"
    return f"{torch.cuda.get_device_name()}; {name}" if gpu else name


# --------------------------------------------------------------------------------------------------------------- tables
def markdown(heads: tuple[str, ...], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (list(heads), ["---"] * len(heads), *rows))


def seeds_of(records: dict[str, dict], name: str) -> list[dict]:
    """The records of the trainings called `name`, by seed."""
    keys = (key for key in sorted(records) if re.fullmatch(rf"{re.escape(name)}-\d+", key))
    return [records[key] | {"seed": key.rpartition("-")[2]} for key in keys]


def readme_table(worlds: dict[str, list[dict]], records: dict[str, dict]) -> str:
    """The first table of README.md."""
    (runs,) = worlds.values()
    known = {name: runs[0][name] for name in AGENTS if name in runs[0]}
    cell = {name: format_ci(one["return_mean"], one["return_mean_ci95"], 2) for name, one in known.items()}
    bayes = "exact Bayes filter over all 144 rules; plans for a rule sampled from it at every step"
    rows = [
        ["random", "nothing", cell["random"]],
        ["Thompson sampling", bayes, cell["thompson"]],
        ["**this agent**", "observations and rewards", f"**{over_seeds([run['return_mean'] for run in runs], 2)}**"],
    ]
    for line in records.get("references", {}).get("output", ()):
        if "adaptive" in line:
            knows = "the filter; tries every action in 64 imagined rollouts"
            rows.append(["Bayes-adaptive rollouts", knows, line.split("|")[2].strip()])
    rows.append(["known rule", "the hidden rule; value iteration", cell["known_rule"]])
    return markdown(("agent", "what it knows", "return per lifetime, held-out rules"), rows)


def default_table(worlds: dict[str, list[dict]], records: dict[str, dict]) -> str:
    """Every seed of the default world."""
    columns = {"return": ("return_mean", 2), "normalised": ("normalised", 3), "of Thompson": ("of_thompson", 3)}
    columns |= {"last eighth, of known rule": ("late_of_known_rule", 3)}
    others = {"belief, nats above exact filter": ("belief", 3), "seconds": ("training_seconds", 0)}
    (runs,), rows = worlds.values(), []
    for run in runs:
        scores = score_cells(run, [key for key, _ in columns.values()])
        rows.append([run["seed"], *scores, *(f"{run[key]:.{digits}f}" for key, digits in others.values())])
    columns |= others
    means = [over_seeds([run[key] for run in runs], digits) for key, digits in columns.values()]
    return markdown(("seed", *columns), [*rows, [f"all {len(runs)}", *means]])


def worlds_table(worlds: dict[str, list[dict]], records: dict[str, dict]) -> str:
    """Trainings in several worlds, a row each."""
    heads = ("world", "seeds", "return", "Thompson sampling", "known rule", "of Thompson", "normalised")
    rows = []
    for name, runs in worlds.items():
        returns, first = over_seeds([run["return_mean"] for run in runs], 2), runs[0]
        known = [f"{first[x]['return_mean']:.2f}" if x in first else "-" for x in ("thompson", "known_rule")]
        shares = ("of_thompson", "normalised")
        shares = [over_seeds([run[key] for run in runs], 3) if key in first else "-" for key in shares]
        spent = [f"{np.mean([run[key] for run in runs]):,.0f}" for key in ("env_steps", "training_seconds")]
        rows.append([name, str(len(runs)), returns, *known, *shares, *spent])
    return markdown((*heads, "frames", "seconds"), rows)


def tables(records: dict[str, dict]) -> dict[str, str]:
    """Every table by the name of its place in a README."""
    presets = ("quick", "large", "permutations", "switching", "tinted", "everything")
    made = {"worlds": (worlds_table, presets), "external": (worlds_table, (*CLASSICS, *ROOMS))}
    made |= {"default": (default_table, ("default",)), "readme": (readme_table, ("default",))}
    made["gpu"] = (worlds_table, ("gpu-1", "gpu-8"))
    found = {}
    for name, (table, names) in made.items():
        runs = {world: each for world in names if (each := seeds_of(records, world))}
        if runs:
            found[name] = table(runs, records)
            if name != "readme":  # the same runs as in the table of the default world
                found[name] += "\n\n" + origin([run for each in runs.values() for run in each])
    for name, record in records.items():
        if "output" in record:
            found[name] = "\n".join(record["output"]) + f"\n\n`{record['command']}`. {origin([record])}"
    return found


def origin(records: list[dict]) -> str:
    """Where figures come from: a line below a table."""
    found = []
    for key, word in ORIGIN.items():
        if each := sorted({str(record[key]) for record in records if key in record}):
            found.append(word + ", ".join(each))
    return "; ".join(found) + "."


PLACE = re.compile(r"(<!-- results: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def written(page: str, records: dict[str, dict]) -> str:
    """The text of a README with its tables made anew; a table without any record says so."""
    found = tables(records)
    return PLACE.sub(lambda place: f"{place[1]}{found.get(place[2], '*Not measured yet.*')}\n{place[3]}", page)


def make_all(todo: dict[str, Measurement]) -> None:
    """Trainings first, one a core; then what reads them, and last what must be alone; UserError names all failures."""
    every, cores, failed = measurements(), os.cpu_count() or 1, []
    trainings = {name for name, one in todo.items() if one.command[0] == "main.py"}
    needed = {part for one in todo.values() for part in parts(one.command)}
    trainings |= {name for name in needed if not (run_of(name) / "evaluation.json").exists()}
    alone = {name for name, one in todo.items() if one.alone}

    def attempt(name: str, threads: int) -> None:
        try:
            make_record(name, threads)
            print(f"made {name}", flush=True)
        except (UserError, OSError, LookupError, ValueError) as error:
            failed.append(f"{name}: {error}")

    for group, jobs in ((trainings, cores), (set(todo) - trainings - alone, cores), (alone, 1)):
        with ThreadPoolExecutor(jobs) as pool:
            order = sorted(group, key=list(every).index)
            list(pool.map(attempt, order, [cores // jobs] * len(order)))
    if failed:
        raise UserError("\n".join(failed))


def main(make: bool = False, only: tuple[str, ...] = ()) -> None:
    """List what is missing or stale, and write the tables.

    Args:
        make: Measure what is missing or stale.
        only: Names of records, or their beginnings; all if none is given.
    """
    records, every = read_records(), measurements()
    stale = {n: one for n, one in every.items() if records.get(n, {}).get("version") != version(one.command)}
    todo = {name: one for name, one in stale.items() if not only or name.startswith(only)}
    if unknown := [name for name in only if not any(known.startswith(name) for known in every)]:
        raise UserError(f"no record is called {unknown[0]!r}: the names are {', '.join(every)}.")
    for name, one in todo.items():
        state = "of another version" if name in records else "missing"
        print(f"{name:28s} {state:18s} {one.minutes:4.0f} minutes{', on a GPU' if one.gpu else ''}")
    if not torch.cuda.is_available():
        todo = {name: one for name, one in todo.items() if not one.gpu}
    hours = sum(one.minutes for one in todo.values()) / 60 / (os.cpu_count() or 1)
    print(
        f"{len(every) - len(stale)} of {len(every)} records are of this version; the above take {hours:.1f} hours here"
    )
    try:
        if make:
            make_all(todo)
    finally:
        for page in PAGES:
            page.write_text(written(page.read_text(), read_records()))


if __name__ == "__main__":
    command_line(main)
