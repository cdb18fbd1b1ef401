"""The tuning: it starts from the preset, goes on where it stopped, and its best set can be applied."""

import json
import unittest

from main import Settings
from memory import merge
from tests.shared import command, temporary_folder
from tune_hyperparams import SPACE, nested, value_of

SHORT = ["--preset", "quick", "--seeds", "1", "--updates", "2", "--lifetimes", "8"]


class TestTune(unittest.TestCase):
    def test_the_space_names_real_settings_and_holds_the_defaults(self):
        settings = Settings()
        for name, (low, high, log) in SPACE.items():
            self.assertTrue(low <= value_of(settings, name) <= high, name)
            self.assertTrue(low < high and (low > 0 or not log), name)
            for edge in (low, high):
                merge(settings, nested({name: type(value_of(settings, name))(edge)}))

    def test_a_study_goes_on_and_its_best_set_can_be_applied(self):
        folder = temporary_folder()
        for trials, left in ((1, 1), (2, 1), (2, 0)):
            done = command(*SHORT, "--trials", trials, folder=folder, script="tune_hyperparams.py")
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertIn(f"{left} of {trials} trials left", done.stdout)
        best = json.loads((folder / "runs" / "tune-default" / "best.json").read_text())
        self.assertEqual(best.pop("preset"), "quick")
        self.assertEqual({f"{section}.{name}" for section in best for name in best[section]}, set(SPACE))
        self.assertIsInstance(merge(Settings(), best), Settings)
        done = command(*SHORT[:-4], "--updates", "3", folder=folder, script="tune_hyperparams.py")
        self.assertEqual(done.returncode, 2)
        self.assertIn("was begun with", done.stderr)

    def test_bad_arguments_are_refused(self):
        folder = temporary_folder()
        for arguments in (["--trials", "0"], ["--study", "../elsewhere"], ["--lifetimes", "1"]):
            done = command(*arguments, folder=folder, script="tune_hyperparams.py")
            self.assertEqual(done.returncode, 2, done.stderr)
        self.assertFalse((folder / "runs").exists())


if __name__ == "__main__":
    unittest.main()
