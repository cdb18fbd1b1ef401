"""Benchmarks: programs that print measurements and assert nothing; the product never imports them.

`python3 -m tests.benchmarks` lists them, `python3 -m tests.benchmarks.NAME --help` shows the options of one. The
project's modules and other large ones are imported inside the functions here, so that the list appears at once.
"""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agent import System


ROOT = Path(__file__).resolve().parent.parent.parent


def descriptions() -> dict[str, str]:
    """First line of the docstring of every benchmark by its name; reads the files, imports none."""
    files = sorted(Path(__file__).parent.glob("[!_]*.py"))
    return {file.stem: ast.get_docstring(ast.parse(file.read_text())).splitlines()[0] for file in files}


def command_line(main: Callable[..., int | None]) -> None:
    """Call `main` with the command line's arguments and exit with the code it returns, 0 for None.

    Its signature and the Args of its docstring define the options, the docstring of its module the text above them.
    Errors that the user can fix end with exit code 2 and one sentence on stderr (`main.run_program`).
    """
    import tyro
    from torch import distributed

    from main import run_program
    from memory import UserError

    module = sys.modules["__main__"]
    program = module.__spec__.name
    parse = functools.partial(tyro.cli, main, prog=f"python3 -m {program}", description=module.__doc__)
    no_pairs = (tyro.conf.FlagCreatePairsOff,)  # --record without --no-record

    def call() -> None:
        if distributed.is_torchelastic_launched():
            raise UserError("a benchmark runs in one process: start it with python3, without torchrun.")
        sys.exit(parse(config=no_pairs))

    run_program(program.removeprefix("tests.benchmarks."), call)


def run_command(command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None) -> str:
    """What a command prints; UserError with its last line if it fails."""
    from memory import UserError

    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(map(str, command))} failed: {(done.stderr.strip().splitlines() or ['-'])[-1]}")
    return done.stdout


def run_folders(runs: Sequence[Path]) -> list[Path]:
    """Folders of runs, each once, their names resolved; what is no run is named and passed. UserError if none is."""
    from memory import UserError

    found = list(dict.fromkeys(Path(run).resolve() for run in runs))
    for folder in found:
        if not (folder / "config.json").exists():
            print(f"{folder} is not the folder of a run: passed", file=sys.stderr)
    found = [folder for folder in found if (folder / "config.json").exists()]
    if not found:
        raise UserError("name the folder of at least one run.")
    return found


def load_systems(runs: Sequence[Path]) -> list[System]:
    """The trained agents of `run_folders`; UserError if there is none or one cannot be loaded."""
    from main import load_system

    return [load_system(run)[0] for run in run_folders(runs)]


def read_result(run: Path, name: str) -> dict[str, Any]:
    """A JSON file that finished runs have, such as evaluation.json; UserError if it is missing or damaged."""
    from memory import UserError

    try:
        return json.loads((run / name).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{run} is not a finished run, because {name} cannot be read: {error}") from error


def half_width(values: Sequence[float]) -> float:
    """Half of the 95% interval of a mean over seeds, by Student's t."""
    import scipy.stats

    return float(scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values))


def over_seeds(values: Sequence[float], digits: int) -> str:
    """A mean over seeds with Student's t interval; the bare figure of one."""
    mean = f"{sum(values) / len(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {half_width(values):.{digits}f}"


def score_cells(stats: dict[str, Any], names: Sequence[str] = ("return_mean", "normalised")) -> list[str]:
    """Cells of a Markdown table: figures with their confidence intervals.

    Args:
        stats: an evaluation, or `world_model.statistics` of several.
        names: which figures.
    """
    from world_model import format_ci

    return [format_ci(stats[name], stats[f"{name}_ci95"], 2 if name.startswith("return") else 3) for name in names]
