"""The folder of a run: its lock, checkpoints and files that are whole or absent."""

import json
import os
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch

from main import Settings
from memory import (
    RunFolder,
    UserError,
    save_atomically,
    write_json,
)
from tests.shared import temporary_folder, tiny, tiny_run


class TestRunFolder(unittest.TestCase):
    def folder_with_config(self) -> RunFolder:
        run = RunFolder(temporary_folder() / "run")
        with run.locked(tiny()):
            pass
        return run

    def test_new_runs_never_share_a_folder(self):
        before = Path.cwd()
        os.chdir(temporary_folder())
        try:
            with mock.patch("time.strftime", return_value="now"):  # within the same second
                runs = [RunFolder.new(tiny(seed=3)) for _ in range(3)]
        finally:
            os.chdir(before)
        self.assertEqual([run.folder.name for run in runs], ["default-3-now", "default-3-now-1", "default-3-now-2"])

    def test_a_new_run_keeps_its_settings_and_an_existing_one_too(self):
        run = self.folder_with_config()
        self.assertEqual(run.settings(Settings()), tiny())
        with run.locked(tiny(seed=5)):
            self.assertEqual(run.settings(Settings()), tiny())
        changed = run.settings(Settings(), training={"updates": 99})
        self.assertEqual(changed, tiny(training={"updates": 99}))

    def test_a_folder_without_readable_settings_is_not_a_run(self):
        run = self.folder_with_config()
        for content in (None, "{", '{"world": {"asynchronous": true}}', "[]"):
            run.config.unlink(missing_ok=True)
            if content is not None:
                run.config.write_text(content)
            with self.subTest(content=content), self.assertRaisesRegex(UserError, "is not a run that can be read"):
                run.settings(Settings())

    def test_only_one_holds_a_run_at_a_time(self):
        run = self.folder_with_config()
        refused = self.assertRaisesRegex(UserError, "being trained by another process")
        with run.locked(), refused, RunFolder(run.folder).locked():
            self.fail("both hold it")
        with run.locked():
            pass

    def test_a_damaged_or_unsafe_checkpoint_is_refused(self):
        run = RunFolder(temporary_folder())
        with self.assertRaisesRegex(UserError, "no checkpoint yet"):
            run.load()
        torch.save({"format": 999}, run.checkpoint)
        with self.assertRaisesRegex(UserError, "format 999"):
            run.load()
        torch.save(
            {"format": RunFolder.FORMAT, "logged": 0, "learner": os.system}, run.checkpoint
        )  # code, if unpickled
        with self.assertRaisesRegex(UserError, "[Ww]eights.?only.*damaged"):
            run.load()
        run.checkpoint.write_bytes(run.checkpoint.read_bytes()[:100])
        with self.assertRaisesRegex(UserError, "cannot be read.*damaged"):
            run.load()

    def test_remnants_of_a_training_without_a_checkpoint_are_removed(self):
        run = self.folder_with_config()
        run.blocks.mkdir()
        (run.blocks / "block-000000.pt").write_bytes(b"of another training")
        run.metrics.write_text("{}\n")
        run.remove_stale()
        self.assertEqual((run.metrics.exists(), list(run.blocks.iterdir())), (False, []))

    def test_a_run_holds_the_files_that_its_documentation_names(self):
        files = {path.name for path in tiny_run().iterdir()}
        expected = {"config.json", "metrics.jsonl", "tensorboard", "checkpoint.pt", "store", "evaluation.json"}
        self.assertLessEqual(expected | {"timing.json", "adaptation.png", "lifetime.gif"}, files)
        self.assertFalse([name for name in files if ".tmp" in name])
        state, logged = RunFolder(tiny_run()).load()
        self.assertEqual(logged, (tiny_run() / "metrics.jsonl").stat().st_size)
        names = {f"block-{number:06d}.pt" for shard in state["shards"] for number in shard["store"]["numbers"]}
        self.assertEqual({path.name for path in (tiny_run() / "store").iterdir()}, names)


class TestAtomicWrites(unittest.TestCase):
    def test_a_crash_in_the_middle_of_a_write_leaves_the_old_file(self):
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "file.pt"
            save_atomically({"value": 1}, path)

            def torn(content, file):
                file.write(b"half")
                raise RuntimeError("no space left on device")

            with mock.patch("torch.save", torn), self.assertRaisesRegex(OSError, "no space left"):
                save_atomically({"value": 2}, path)
            self.assertEqual(torch.load(path, weights_only=True), {"value": 1})
            self.assertEqual([p.name for p in Path(name).iterdir()], ["file.pt"])

    def test_json_has_lists_of_numbers_on_one_line_and_no_nan(self):
        path = temporary_folder() / "file.json"
        content = {"a": [1.5, -2e-7, 3], "b": {"c": None, "d": ["x", "y"]}}
        write_json(content, path)
        self.assertEqual(json.loads(path.read_text()), content)
        self.assertIn('"a": [ 1.5, -2e-07, 3 ]', path.read_text())
        with self.assertRaises(ValueError):
            write_json({"a": float("nan")}, path)
        self.assertEqual(json.loads(path.read_text()), content)


if __name__ == "__main__":
    unittest.main()
