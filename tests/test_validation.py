"""Validation while training: it changes nothing in it, is repeated after a resume, and is shown."""

import json
import unittest

from tests.shared import in_process, only_run, stopped_at, tiny_folder, tiny_run


class TestValidation(unittest.TestCase):
    def test_it_changes_nothing_in_the_training_and_is_repeated_after_a_resume(self):
        folder = tiny_folder(validate_every=7, validation_lifetimes=16)
        with stopped_at(30, RuntimeError("as if killed")), self.assertRaisesRegex(RuntimeError, "as if killed"):
            in_process(["--config", "tiny.json"], folder)
        run = only_run(folder)
        code, printed = in_process(["resume", run], run)
        self.assertEqual(code, 0, printed)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        validated = {line["update"]: line["validation/return"] for line in lines if "validation/return" in line}
        self.assertEqual(list(validated), [21, 30, 36, 38])
        self.assertGreater(len(set(validated.values())), 1)
        self.assertIn("validation/of_thompson", lines[-1])
        without = [json.dumps({k: v for k, v in line.items() if not k.startswith("validation")}) for line in lines]
        self.assertEqual("\n".join(without) + "\n", (tiny_run() / "metrics.jsonl").read_text())
        self.assertEqual((run / "evaluation.json").read_bytes(), (tiny_run() / "evaluation.json").read_bytes())
        rows = json.loads((run / "timing.json").read_text())["validations"]
        self.assertEqual([row[0] for row in rows], [21, 28, 35, 38])
        self.assertEqual(rows[-1][3], lines[-1]["validation/return"])
        self.assertTrue(all(before < after for before, after in zip(rows, rows[1:], strict=False)))
        self.assertGreater((run / "learning.png").stat().st_size, 10_000)

    def test_it_shows_pictures_in_tensorboard(self):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        folder = tiny_folder(validate_every=12, validation_lifetimes=8)
        code, printed = in_process(["--config", "tiny.json"], folder)
        self.assertEqual(code, 0, printed)
        events = EventAccumulator(str(only_run(folder) / "tensorboard"), {"images": 0})
        events.Reload()
        for tag in ("adaptation", "lifetime"):
            self.assertEqual([event.step for event in events.Images(tag)], [26, 38], tag)


if __name__ == "__main__":
    unittest.main()
