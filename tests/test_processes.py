"""Several processes train one agent: shares, messages, checkpoints, torchrun."""

import contextlib
import io
import os
import unittest
from pathlib import Path
from unittest import mock

import torch

from agent import Learner
from main import build_system, run_training, train
from memory import (
    Experience,
    LifetimeStore,
    Processes,
    RunFolder,
    UserError,
)
from tests.shared import free_port, in_parallel, in_process, only_run, temporary_folder, tiny, tiny_folder, tiny_run
from transition_model import find_effects


class TestProcesses(unittest.TestCase):
    def test_one_process_exchanges_nothing(self):
        processes, one = Processes(), torch.arange(3.0)
        processes.average([one])
        processes.broadcast(torch.nn.Linear(2, 2))
        self.assertEqual(one.tolist(), [0, 1, 2])
        self.assertEqual(processes.all_gather(one).tolist(), [0, 1, 2])
        self.assertEqual(processes.all_gather_object("x"), ["x"])
        self.assertEqual([processes.any_rank(happened) for happened in (False, True)], [False, True])

    def test_several_processes_average_gather_and_broadcast(self):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(3, 2) for _ in range(3)]

        def work(processes):
            rank = processes.rank
            tensors = [torch.full((2,), float(rank)), torch.full((2, 2), 10.0 * rank)]
            processes.average(tensors)
            processes.broadcast(layers[rank])
            gathered = processes.all_gather(torch.full((2, 3), rank))
            flags = [processes.any_rank(rank == number) for number in (1, 9)]
            return tensors, gathered, processes.all_gather_object({"rank": rank}), flags, processes.is_main

        results = in_parallel(work, 3)
        for (small, large), gathered, objects, flags, _ in results:
            self.assertEqual((small.tolist(), large.tolist()), ([1, 1], [[10, 10], [10, 10]]))
            self.assertEqual(gathered.tolist(), [[rank] * 3 for rank in (0, 0, 1, 1, 2, 2)])
            self.assertEqual(objects, [{"rank": 0}, {"rank": 1}, {"rank": 2}])
            self.assertEqual(flags, [True, False])
        self.assertEqual([result[-1] for result in results], [True, False, False])
        for layer in layers[1:]:
            self.assertTrue(torch.equal(layer.weight, layers[0].weight))
            self.assertTrue(torch.equal(layer.bias, layers[0].bias))


class TestSeveralProcesses(unittest.TestCase):
    """Threads stand for processes: see `shared.in_parallel`."""

    def learners(self, **changes):
        """Two learners; built one after the other, because building seeds torch's global generator."""
        systems = [build_system(tiny(**changes)) for _ in range(2)]
        return lambda processes: Learner(systems[processes.rank], processes)

    def test_they_train_one_agent_on_lifetimes_of_their_own(self):
        make, run = self.learners(), RunFolder(temporary_folder())

        def work(processes):
            learner = make(processes)
            run_training(run, learner)
            return learner

        with contextlib.redirect_stdout(io.StringIO()) as printed:
            one, other = in_parallel(work)
        self.assertEqual(printed.getvalue().count("training "), 1)  # one of them writes
        self.assertTrue((run.folder / "evaluation.json").exists())
        for name, module in one.system.modules().items():
            for key, tensor in module.state_dict().items():
                self.assertTrue(torch.equal(tensor, other.system.modules()[name].state_dict()[key]), f"{name}.{key}")
        self.assertEqual(one.metrics, other.metrics)
        self.assertFalse(torch.equal(one.store.experience.action, other.store.experience.action))
        alone = Learner(build_system(tiny()))
        train(alone)
        self.assertEqual((one.update, one.env_steps), (alone.update, alone.env_steps))
        state, _ = run.load()
        stores = [shard["store"] for shard in state["shards"]]
        self.assertEqual([number % 2 for store in stores for number in store["numbers"]], [0] * 8 + [1] * 8)
        names = {f"block-{number:06d}.pt" for store in stores for number in store["numbers"]}
        self.assertEqual({path.name for path in run.blocks.iterdir()}, names)
        with self.assertRaisesRegex(UserError, "trained by 2 processes, not 1: resume it with as many"):
            alone.load_state_dict(state, run.blocks)

    def test_their_state_decides_their_future(self):
        run, first, second = RunFolder(temporary_folder()), self.learners(), self.learners()

        def uninterrupted(processes):
            learner = first(processes)
            train(learner, until=17)
            run.save(learner)
            train(learner)
            return learner

        def resumed(processes):
            learner = second(processes)
            learner.load_state_dict(run.load()[0], run.blocks)
            train(learner)
            return learner

        one, other = in_parallel(uninterrupted)[0], in_parallel(resumed)[0]
        self.assertEqual(one.metrics, other.metrics)
        for name, module in one.system.modules().items():
            for key, tensor in module.state_dict().items():
                self.assertTrue(torch.equal(tensor, other.system.modules()[name].state_dict()[key]), f"{name}.{key}")

    def test_they_find_the_effects_that_one_finds_in_all_their_lifetimes(self):
        make = self.learners()

        def work(processes):
            learner = make(processes)
            train(learner, until=7)  # the first update of the effects
            return learner

        learners = in_parallel(work)
        parts = zip(*(learner.store.experience for learner in learners), strict=True)
        together = Experience(*(torch.cat(part) for part in parts))
        label, shown, number = find_effects(together, 4, (4, 4), learners[0].settings.transition.max_effects, 0)
        self.assertGreater(number, 1)
        posterior = torch.nn.functional.one_hot(label, number) * shown[..., None]
        self.assertTrue(torch.equal(together.posterior, posterior.half()))

    def test_each_has_its_share_of_every_batch(self):
        sizes = {}
        for count in (1, 2):
            processes = Processes(0, count)
            processes.average = processes.broadcast = lambda _: None  # the other process is absent
            processes.all_gather = lambda tensor: tensor
            processes.all_gather_object = lambda content: [content]
            processes.any_rank = bool
            learner, sample = Learner(build_system(tiny()), processes), LifetimeStore.sample
            with mock.patch.object(LifetimeStore, "sample", autospec=True, side_effect=sample) as sampled:
                train(learner)
            sizes[count] = [call.args[1] for call in sampled.call_args_list]
            sizes[count] += [len(block) for block in learner.store.blocks]
        self.assertEqual(sizes[1], [2 * size for size in sizes[2]])

    def test_unequal_shares_are_refused(self):
        with self.assertRaisesRegex(UserError, "batch is 9, which 2 processes cannot share equally: choose 10"):
            tiny(training={"batch": 9}).training.share(2)

    def test_weights_that_differ_are_noticed(self):
        make = self.learners()

        def work(processes):
            learner = make(processes)
            train(learner, until=1)
            learner.state_dict()
            learner.system.value.state_in.bias.data[0] += processes.rank
            learner.state_dict()

        with self.assertRaisesRegex(RuntimeError, "the processes' weights differ at update 1"):
            in_parallel(work)


class TestTorchrun(unittest.TestCase):
    """As torchrun starts it, but in this process; the real one is run in test_integration.py."""

    def launched(self, arguments: list, folder: Path) -> tuple[int, str]:
        launch = {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_RESTART_COUNT": "0", "LOCAL_RANK": "0"}
        only = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        with mock.patch.dict(os.environ, launch | only):
            code, printed = in_process(arguments, folder)
        return code, " ".join(printed.split())

    def test_commands_for_one_process_and_unnamed_runs_are_refused(self):
        folder = tiny_folder()
        for arguments, words in (
            (["evaluate", "runs/x"], "evaluate runs in one process"),
            (["watch", "runs/x"], "watch runs in one process"),
            (["--config", "tiny.json"], "--run NAME"),
        ):
            code, printed = self.launched(arguments, folder)
            self.assertEqual(code, 2)
            self.assertIn(words, printed)
        self.assertFalse((folder / "runs").exists())

    def test_unequal_shares_are_refused_before_anything_is_written(self):
        folder = tiny_folder(batch=9)
        store = torch.distributed.HashStore()
        with (
            mock.patch("torch.distributed.rendezvous", return_value=iter([(store, 0, 2)])),
            mock.patch("torch.distributed.init_process_group") as joined,
        ):
            code, printed = self.launched(["--config", "tiny.json", "--run", "nine"], folder)
        self.assertEqual(code, 2)
        self.assertIn("training.batch is 9, which 2 processes cannot share equally: choose 10", printed)
        self.assertEqual(joined.call_args.kwargs["world_size"], 2)
        self.assertFalse((folder / "runs").exists())

    def test_one_process_of_torchrun_gives_the_same_bytes_and_the_same_command_goes_on(self):
        folder = tiny_folder()
        for _ in range(2):
            try:
                code, printed = self.launched(["--config", "tiny.json", "--run", "one"], folder)
            finally:
                torch.distributed.destroy_process_group()
            self.assertEqual(code, 0, printed)
            for name in ("metrics.jsonl", "evaluation.json"):
                self.assertEqual((only_run(folder) / name).read_bytes(), (tiny_run() / name).read_bytes(), name)


if __name__ == "__main__":
    unittest.main()
