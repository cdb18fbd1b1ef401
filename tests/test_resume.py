"""Runs that stop and go on: killed, interrupted, damaged, on a full disk, two at once."""

import json
import os
import signal
import subprocess
import sys
import unittest
from pathlib import Path
from unittest import mock

import torch

import main
from agent import Learner
from memory import RunFolder, UserError
from tests.shared import ROOT, command, in_process, only_run, start, temporary_folder, tiny, tiny_folder, wait_for


class TestResume(unittest.TestCase):
    def test_kill_and_resume_equal_no_stop_byte_for_byte(self):
        whole, killed = tiny_folder(), tiny_folder()
        done = command("--config", "tiny.json", folder=whole)
        self.assertEqual(done.returncode, 0, done.stderr)
        process = start("--config", "tiny.json", folder=killed)  # until update 18 of 38 is logged: checkpoints are every third
        wait_for(lambda: any(len(log.read_text().splitlines()) >= 6 for log in killed.glob("runs/*/metrics.jsonl")))
        process.kill()
        process.communicate()
        run = only_run(killed)
        state, logged = RunFolder(run).load()
        self.assertTrue(3 <= state["counters"][0] < 38, "the kill came too late to test anything")
        with open(run / "metrics.jsonl", "a") as log:
            log.write("torn")  # what a kill in mid-line leaves
        done = command("resume", run, folder=killed)
        self.assertEqual(done.returncode, 0, done.stderr)
        for name in ("metrics.jsonl", "evaluation.json"):
            self.assertEqual((run / name).read_bytes(), (only_run(whole) / name).read_bytes(), name)

    @unittest.skipIf(os.name == "nt", "sends POSIX signals")
    def test_a_run_goes_on_past_its_end_and_stops_on_ctrl_c(self):
        folder = tiny_folder()
        process = start("--config", "tiny.json", folder=folder)
        wait_for(lambda: list(folder.glob("runs/*/checkpoint.pt")))
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate()
        self.assertEqual(process.returncode, 130)
        self.assertRegex(output, "python3 main.py resume .* goes on")
        done = command("resume", only_run(folder), "--updates", "30", folder=folder)
        self.assertEqual(done.returncode, 0, done.stderr)
        lines = [json.loads(line) for line in (only_run(folder) / "metrics.jsonl").read_text().splitlines()]
        self.assertEqual([line["update"] for line in lines], [*range(3, 44, 3), 44])
        done = command("resume", only_run(folder), "--updates", "5", folder=folder)
        self.assertEqual(done.returncode, 2)
        self.assertIn("already past 5 updates", done.stderr)

    def test_a_second_ctrl_c_stops_at_once_and_the_last_checkpoint_stays(self):
        folder, advance = tiny_folder(), Learner.set_learning_rates

        def interrupted(learner):
            if learner.update == 10:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
                self.fail("the update went on")
            advance(learner)

        with mock.patch.object(Learner, "set_learning_rates", interrupted):
            code, _ = in_process(["--config", "tiny.json"], folder)
        self.assertEqual(code, 130)
        self.assertEqual(RunFolder(only_run(folder)).load()[0]["counters"][0], 9)
        self.assertEqual(in_process(["resume", str(only_run(folder))], folder)[0], 0)

    def test_a_damaged_or_unsafe_checkpoint_is_refused(self):
        folder = temporary_folder()
        run = RunFolder(folder)
        with self.assertRaisesRegex(UserError, "no checkpoint yet"):
            run.load()
        torch.save({"format": 999}, run.checkpoint)
        with self.assertRaisesRegex(UserError, "format 999"):
            run.load()
        torch.save({"format": RunFolder.FORMAT, "logged": 0, "learner": os.system}, run.checkpoint)  # a pickle that would run code
        with self.assertRaisesRegex(UserError, "[Ww]eights.?only.*damaged or foreign"):
            run.load()
        run.checkpoint.write_bytes(run.checkpoint.read_bytes()[:100])
        with self.assertRaisesRegex(UserError, "damaged or foreign"):
            run.load()

    @unittest.skipUnless(hasattr(os, "fork"), "file sizes can be limited on POSIX systems alone")
    def test_a_full_disk_leaves_the_last_checkpoint_and_a_run_that_goes_on(self):
        folder, whole = tiny_folder(), tiny_folder()
        self.assertEqual(in_process(["--config", "tiny.json"], whole)[0], 0)
        process = start("--config", "tiny.json", folder=folder)
        wait_for(lambda: list(folder.glob("runs/*/checkpoint.pt")))
        process.kill()
        process.communicate()
        run = only_run(folder)
        before, room = RunFolder(run).load()[0]["counters"][0], (run / "checkpoint.pt").stat().st_size + 1000
        script = (
            f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))\n"
            f"sys.argv = ['main.py', 'resume', {str(run)!r}]; import main; main.main()"
        )
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertRegex(done.stderr, "could not write .*checkpoint.pt .*the last checkpoint is whole")
        self.assertGreaterEqual(RunFolder(run).load()[0]["counters"][0], before)
        self.assertEqual(in_process(["resume", str(run)], folder)[0], 0)
        for name in ("metrics.jsonl", "evaluation.json"):
            self.assertEqual((run / name).read_bytes(), (only_run(whole) / name).read_bytes(), name)

    def test_a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(self):
        loss, created, learners = main.Planner.loss, Learner.__init__, []

        def poisoned(planner, value, experience, context):
            losses = loss(planner, value, experience, context)
            if learners[-1].update == 24:
                losses["value"] = losses["value"] * torch.nan
            return losses

        def remembered(learner, *arguments, **parts):
            learners.append(learner)
            return created(learner, *arguments, **parts)

        folder = tiny_folder()
        with mock.patch.object(main.Planner, "loss", poisoned), mock.patch.object(Learner, "__init__", remembered):
            code, errors = in_process(["--config", "tiny.json", "--training.checkpoint-every", "12"], folder)
        run = only_run(folder)
        self.assertEqual(code, 2)
        self.assertRegex(" ".join(errors.split()), "is not finite at update 27, .* last checkpoint. Try lower learning rates")
        self.assertEqual(RunFolder(run).load()[0]["counters"][0], 24)
        code, errors = in_process(["resume", str(run)], folder)  # the poison is gone
        self.assertEqual(code, 0, errors)

    def test_two_processes_never_share_a_run_and_new_runs_never_a_folder(self):
        folder = temporary_folder()
        before = Path.cwd()
        os.chdir(folder)
        try:
            one, other = RunFolder.new(tiny()), RunFolder.new(tiny())
        finally:
            os.chdir(before)
        self.assertNotEqual(one.folder, other.folder)
        run = RunFolder(folder / one.folder)
        with run.locked():
            script = f"from pathlib import Path; from memory import RunFolder\nwith RunFolder(Path({str(run.folder)!r})).locked(): pass"
            done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
            self.assertIn("being trained by another process", done.stderr)


if __name__ == "__main__":
    unittest.main()
