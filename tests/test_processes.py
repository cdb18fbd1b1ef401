"""Several processes train one agent: the same weights everywhere, the same numbers again, no run lost with a process."""

import json
import os
import re
import signal
import subprocess
import unittest
from pathlib import Path
from unittest import mock

import torch

from agent import Learner
from main import Settings, build_system, train
from memory import LifetimeStore, Processes, RunFolder
from tests.shared import children_of, command, free_port, in_process, only_run, start, temporary_folder, tiny, tiny_folder, wait_for

TORCHRUN = ("-m", "torch.distributed.run")
ALONE = ("--standalone", "--nproc-per-node", "2")


def torchrun(*arguments: str, folder: Path, options: tuple[str, ...] = ALONE, script: str = "main.py") -> subprocess.Popen:
    return start(*arguments, folder=folder, script=script, launcher=(*TORCHRUN, *options, "--"))  # or it takes --run for its own


def finished(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code of a process, and all that it has said."""
    output, errors = process.communicate()
    return process.returncode, output + errors


def results(run: Path) -> tuple[bytes, bytes]:
    return (run / "metrics.jsonl").read_bytes(), (run / "evaluation.json").read_bytes()


class TestProcesses(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tiny_folder()
        cls.code, cls.said = finished(torchrun("--config", "tiny.json", "--run", "two", folder=cls.folder))

    def test_they_train_one_agent_in_one_run(self):
        self.assertEqual(self.code, 0, self.said)
        run = only_run(self.folder)
        self.assertEqual(self.said.count("training runs"), 1)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        self.assertEqual([line["update"] for line in lines], sorted({line["update"] for line in lines}))
        done = command("--config", "tiny.json", folder=(alone := tiny_folder()))
        self.assertEqual(done.returncode, 0, done.stderr)
        last = json.loads((only_run(alone) / "metrics.jsonl").read_text().splitlines()[-1])
        self.assertEqual((lines[-1]["update"], lines[-1]["env_steps"]), (last["update"], last["env_steps"]))

    def test_each_lives_lifetimes_of_its_own(self):
        state, _ = RunFolder(only_run(self.folder)).load()
        stores = [shard["store"] for shard in state["shards"]]
        self.assertEqual([number % 2 for store in stores for number in store["numbers"]], [0] * 8 + [1] * 8)
        self.assertFalse(torch.equal(stores[0]["experience"][3], stores[1]["experience"][3]))  # actions
        self.assertFalse(torch.equal(*(shard["generators"][0] for shard in state["shards"])))
        names = {path.name for path in (only_run(self.folder) / "store").iterdir()}
        self.assertEqual(names, {f"block-{number:06d}.pt" for store in stores for number in store["numbers"]})

    def test_another_number_of_processes_is_refused(self):
        code, errors = in_process(["resume", str(only_run(self.folder)), "--updates", "30"], self.folder)
        self.assertEqual(code, 2)
        self.assertIn("trained by 2 processes, not 1: resume it with as many", " ".join(errors.split()))

    def test_unequal_shares_and_commands_for_one_are_refused(self):
        code, said = finished(torchrun("--config", "tiny.json", "--run", "nine", "--training.batch", "9", folder=self.folder))
        self.assertNotEqual(code, 0)
        self.assertIn("training.batch is 9, which 2 processes cannot share equally: choose 10.", said)
        for arguments, words in ((("evaluate", "runs/x"), "evaluate runs in one process"), (("--config", "tiny.json"), "-- main.py --run NAME")):
            code, said = finished(torchrun(*arguments, folder=self.folder))
            self.assertNotEqual(code, 0)
            self.assertIn(words, said)
        self.assertEqual(len(list((self.folder / "runs").iterdir())), 1)

    def test_each_has_its_share_of_every_batch(self):
        sizes = {}
        for count in (1, 2):
            processes = Processes(0, count)
            processes.average = processes.broadcast = lambda _: None  # nobody else is there
            processes.all_gather = lambda tensor: tensor
            learner, sample = Learner(build_system(tiny()), processes), LifetimeStore.sample
            with mock.patch.object(LifetimeStore, "sample", autospec=True, side_effect=sample) as sampled:
                train(learner)
            sizes[count] = [call.args[1] for call in sampled.call_args_list] + [len(block) for block in learner.store.blocks]
        self.assertEqual(sizes[1], [2 * size for size in sizes[2]])

    def test_weights_that_differ_are_noticed(self):
        folder = tiny_folder()
        (folder / "differ.py").write_text(
            "import torch\nfrom main import Learner, Processes\nfrom tests.shared import tiny\n"
            "with Processes.from_torchrun() as processes:\n"
            "    learner = Learner(build_system(tiny()), processes)\n"
            "    train(learner, until=learner.update + 1)\n    learner.state_dict()\n    print('equal')\n"
            "    next(learner.system.vae.parameters()).data[0] += processes.rank\n    learner.state_dict()\n"
        )
        code, said = finished(torchrun(folder=folder, script=str(folder / "differ.py")))
        self.assertNotEqual(code, 0)
        self.assertEqual(said.count("equal"), 2, said)
        self.assertIn("the processes' weights differ at update 1", said)

    def test_the_same_command_goes_on_with_a_run_that_died_before_its_first_checkpoint(self):
        folder, advance = tiny_folder(log_every=2, checkpoint_every=100), Learner.set_learning_rates

        def fail(learner: Learner) -> None:
            if learner.update == 9:
                raise RuntimeError("as if killed")
            advance(learner)

        line = ["--config", "tiny.json", "--run", "mine"]
        with mock.patch.object(Learner, "set_learning_rates", fail), self.assertRaises(RuntimeError):
            in_process(line, folder)
        run = only_run(folder)
        self.assertEqual((run.name, len((run / "metrics.jsonl").read_text().splitlines())), ("mine", 4))
        (run / "store").mkdir()
        (run / "store" / "block-000000.pt").write_bytes(b"of another training")
        self.assertEqual(in_process(line, folder)[0], 0)
        updates = [json.loads(line)["update"] for line in (only_run(folder) / "metrics.jsonl").read_text().splitlines()]
        self.assertEqual(updates, list(range(2, 39, 2)))
        again = Learner(build_system(RunFolder(run).settings(Settings())))
        again.load_state_dict(RunFolder(run).load()[0], run / "store")
        self.assertEqual(len(again.store), again.env_steps // 12)
        code, errors = in_process([*line, "--training.updates", "25"], folder)
        self.assertEqual(code, 2)
        self.assertIn("training.updates is 24 there and 25 here", " ".join(errors.split()))

    def test_a_run_has_the_name_of_a_folder(self):
        for name in ("a/b", "..", "/tmp/run"):
            code, errors = in_process(["--run", name], folder := temporary_folder())
            self.assertEqual((code, "name of a folder" in " ".join(errors.split())), (2, True), errors)
            self.assertEqual(list(folder.iterdir()), [])


@unittest.skipIf(os.name == "nt", "sends POSIX signals")
class TestElastic(unittest.TestCase):
    def started(self, *options: str, folder: Path) -> subprocess.Popen:
        """A torchrun that does not outlive the test."""
        process = torchrun("--config", "tiny.json", "--run", "elastic", folder=folder, options=options)
        self.addCleanup(process.communicate)
        self.addCleanup(process.terminate)  # which ends those that it has started too
        return process

    def saved_again(self, folder: Path, *processes: subprocess.Popen) -> None:
        """Wait for the run's next checkpoint."""

        def when() -> int:
            return max((path.stat().st_mtime_ns for path in folder.glob("runs/*/checkpoint.pt")), default=0)

        before = when()
        wait_for(lambda: when() > before or all(process.poll() is not None for process in processes))

    def test_a_killed_process_is_started_again_and_the_run_ends_in_the_same_bytes(self):
        folder, whole = tiny_folder(updates=200), tiny_folder(updates=200)
        killed = self.started(*ALONE, "--max-restarts", "2", folder=folder)
        for victim in range(2):  # each of the two once
            self.saved_again(folder, killed)
            os.kill(children_of(killed)[victim], signal.SIGKILL)
        code, said = finished(killed)
        self.assertEqual(code, 0, said)
        self.assertEqual(said.count("training runs"), 3, said)
        undisturbed = self.started(*ALONE, folder=whole)
        code, said = finished(undisturbed)
        self.assertEqual(code, 0, said)
        self.assertEqual(results(only_run(folder)), results(only_run(whole)))

    def test_two_nodes_stop_at_ctrl_c_after_the_update_and_their_job_goes_on(self):
        folder, reached = tiny_folder(updates=4000), 0
        place = f"localhost:{free_port()}"
        node = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", place, "--rdzv-id", "seven")
        for _ in range(2):
            nodes = [self.started(*node, folder=folder) for _ in range(2)]
            self.saved_again(folder, *nodes)
            for each in nodes:
                each.send_signal(signal.SIGINT)
            said = "".join(finished(each)[1] for each in nodes)
            self.assertIn("and saved: python3 main.py resume", said)
            update = int(re.search(r"stopped at update (\d+) and saved", said)[1])
            state, _ = RunFolder(only_run(folder)).load()
            self.assertEqual((state["counters"][0], len(state["shards"])), (update, 2))
            self.assertTrue(reached < update < 4000)
            reached = update


if __name__ == "__main__":
    unittest.main()
