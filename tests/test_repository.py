"""README and repository: what they claim exists and runs, and the code is formatted and documented."""

import ast
import json
import re
import subprocess
import sys
import unittest
from unittest import mock

from agent import Learner
from main import Settings, build_system
from memory import RunFolder, merge
from tests.shared import ROOT, TINY, command, in_process, installed, only_run, temporary_folder


class TestReadme(unittest.TestCase):
    def setUp(self):
        self.text = (ROOT / "README.md").read_text()
        self.commands = "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", self.text, re.S))

    def test_every_command_names_what_exists(self):
        scripts = re.findall(r"python3 (?:-m )?([\w./]+)", self.commands)
        self.assertLessEqual({"main.py", "tune_hyperparams.py"}, set(scripts))
        for script in scripts:
            path = ROOT / (script if script.endswith(".py") else script.replace(".", "/"))
            known = script in ("venv", "unittest") or path.exists() or path.with_suffix(".py").exists()
            self.assertTrue(known, script)

    def test_every_flag_exists(self):
        helped = command("--help", folder=ROOT, script="tune_hyperparams.py").stdout
        for name in ("train", "evaluate", "resume", "watch"):
            helped += in_process([name, "--help"], ROOT)[1]
        lines = "\n".join(re.findall(r" [\w/]+\.py.*", self.commands))
        for flag in re.findall(r"(?<= )--[a-z][\w.-]*", lines):
            self.assertIn(flag, helped)
        from torch.distributed.run import get_args_parser

        launched = re.findall(r"^torchrun (.*?) main\.py", self.commands, re.M)
        for flag in re.findall(r"--[a-z][\w-]*", " ".join(launched)):
            self.assertIn(flag, get_args_parser().format_help())

    def test_the_python_examples_run(self):
        examples = re.findall(r"```python\n(.*?)```", self.text, re.S)
        settings = merge(Settings(), {"context": {"hidden": 8}})
        learner, run = Learner(build_system(settings)), RunFolder(temporary_folder())
        with run.locked(settings):
            learner.collect(exploration=1.0)
            run.save(learner)
        names = {"RUN": run.folder}
        for example in examples:
            exec(compile(example, "README.md", "exec"), names)
        self.assertTrue(names["truncated"])
        self.assertEqual(len(names["agent"].memory), 64)

    def test_the_task_distribution_of_the_readme_is_trained_on(self):
        (example,) = (text for text in re.findall(r"```python\n(.*?)```", self.text, re.S) if "set_task" in text)
        folder = temporary_folder()
        (folder / "mine.py").write_text(example)
        (folder / "tiny.json").write_text(json.dumps({"training": TINY["training"], "context": TINY["context"]}))
        with mock.patch.object(sys, "path", [str(folder), *sys.path]):
            code, printed = in_process(["--config", "tiny.json", "--world.gym-id", "mine:Corridor-v0"], folder)
        self.assertEqual(code, 0, printed)
        result = json.loads((only_run(folder) / "evaluation.json").read_text())
        self.assertEqual(set(result["returns"]), {"agent", "random", "known_rule"})
        self.assertEqual(len(result["agent"]["by_step"]), 60)
        self.assertGreater(result["known_rule"]["return_mean"], 40)
        self.assertIn("normalised", result)

    def test_links_and_figures_exist(self):
        for target in re.findall(r"\]\(([^)#]+)", self.text):
            if "://" not in target:
                self.assertTrue((ROOT / target).exists(), target)


class TestRepository(unittest.TestCase):
    @installed("ruff")
    def test_it_is_formatted_and_has_no_lint(self):
        for arguments in (("format", "--check"), ("check",)):
            line = [sys.executable, "-m", "ruff", *arguments, "--no-cache", "."]
            done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def test_every_public_name_has_a_docstring(self):
        def undocumented(node, path):
            for child in node.body:
                if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and not child.name.startswith("_"):
                    if not ast.get_docstring(child):
                        yield f"{path}{child.name}"
                    if isinstance(child, ast.ClassDef):
                        yield from undocumented(child, f"{path}{child.name}.")

        for file in sorted(ROOT.glob("*.py")):
            self.assertEqual(list(undocumented(ast.parse(file.read_text()), f"{file.name}: ")), [])

    def test_the_top_level_holds_the_modules_and_nothing_else(self):
        modules = ("agent", "context_engine", "environment", "film_layer", "main", "memory", "transition_model")
        expected = {f"{name}.py" for name in (*modules, "world_model", "tune_hyperparams")}
        tracked = subprocess.run(["git", "ls-tree", "--name-only", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        if tracked.returncode:
            self.skipTest("not a git checkout")
        names = {name for name in tracked.stdout.split() if not name.startswith(".")}
        self.assertEqual(names, expected | {"tests", "requirements.txt", "README.md"})


if __name__ == "__main__":
    unittest.main()
