"""The memory of a lifetime, the store of past ones, checks of settings, run folders, atomic writes, and processes."""

import contextlib
import dataclasses
import io
import json
import os
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from agent import Learner
from main import Settings, build_system, run_training, train
from memory import (
    EpisodicMemory,
    Experience,
    FrameBlock,
    LifetimeStore,
    MemorySettings,
    PlaceMemory,
    Processes,
    RunFolder,
    UserError,
    WorldStep,
    empty_experience,
    make_generator,
    merge,
    remove_stale_blocks,
    save_atomically,
    write_json,
)
from tests import shared
from tests.shared import free_port, in_parallel, in_process, only_run, temporary_folder, tiny, tiny_folder, tiny_run
from transition_model import find_effects

T, BATCH, ENDS = 7, 2, {(0, 2), (0, 6), (1, 4)}  # (row, step) at which an episode ends
SEGMENT = torch.tensor([[0] * T, [0] * 3 + [1] * 3 + [300]])  # the rule of the second lifetime changes


def counted(lifetime: int = 0) -> EpisodicMemory:
    """A lifetime in which every frame is filled with its number, and restarts add 100."""

    def frame(numbers: torch.Tensor) -> torch.Tensor:
        return numbers.to(torch.uint8)[:, None, None, None].expand(-1, 2, 2, 3)

    memory = EpisodicMemory(BATCH, T, patches=4, codes=256, num_effects=3, keep_frames=True)
    now = torch.tensor([0, 50]) + lifetime
    for step in range(T):
        ended = torch.tensor([(row, step) in ENDS for row in range(BATCH)])
        next_obs, obs = now + 1, torch.where(ended, 100 + now, now + 1)
        none = torch.zeros(BATCH, dtype=torch.bool)
        happened = WorldStep(frame(obs), next_obs.float(), ended, none, frame(next_obs[ended]))
        codes = [frame(numbers)[:, 0, 0, :1].expand(-1, 4) for numbers in (now, next_obs)]
        memory.append(*codes, torch.full((BATCH, 3), step / 8), torch.full((BATCH,), step), frame(now), happened)
        now = obs
    return memory


def random_experience(codes: int = 3) -> tuple[Experience, list[WorldStep]]:
    """Ten steps of four lifetimes on five patches, and the same step by step."""
    generator, shape = torch.Generator().manual_seed(0), (4, 10)
    experience = empty_experience(*shape, 5, 2, "cpu")
    experience = experience._replace(
        codes=torch.randint(codes, (*shape, 5), generator=generator).byte(),
        next_codes=torch.randint(codes, (*shape, 5), generator=generator).byte(),
        reward=torch.randint(-1, 2, shape, generator=generator).float(),
        terminated=torch.rand(shape, generator=generator) < 0.2,
        truncated=torch.rand(shape, generator=generator) < 0.1,
    )
    parts = zip(*(x.unbind(1) for x in (experience.reward, experience.terminated, experience.truncated)), strict=True)
    return experience, [WorldStep(None, *part, None) for part in parts]


class TestPlaceMemory(unittest.TestCase):
    def test_what_is_recalled_equals_loops_over_the_past(self):
        """Step by step and for all steps at once; a code that never occurs has nothing."""
        experience, steps = random_experience()
        carried, made = PlaceMemory.empty(4, 5, 7), PlaceMemory.before_steps(experience, 7)
        row, place, code = (x.flatten() for x in torch.meshgrid(*map(torch.arange, (4, 5, 7)), indexing="ij"))
        for t, step in enumerate(steps):
            expected = torch.zeros(4, 5, 7, 5)
            earned = torch.zeros(4)
            for b in range(4):
                for past in range(t):
                    reward = float(experience.reward[b, past])
                    before = float(earned[b].tanh())
                    ended = float(experience.terminated[b, past])
                    happened = torch.tensor([1, reward, ended, before, reward * before])
                    for s in range(5):
                        expected[b, s, int(experience.next_codes[b, past, s])] += happened
                    earned[b] = 0 if experience.ended[b, past] else earned[b] + reward
            expected = (expected.sign() * expected.abs().log1p()).flatten(0, 2)
            torch.testing.assert_close(carried.recall(row, place, code), expected)
            torch.testing.assert_close(made.recall(row * 10 + t, place, code), expected)
            torch.testing.assert_close(carried.earned, earned)
            torch.testing.assert_close(made.earned.view(4, 10)[:, t], earned)
            carried.add(experience.codes[:, t], experience.next_codes[:, t], step)

    def test_where_episodes_begin_is_known_while_it_is_the_same(self):
        """Of what begins after a time limit nothing is compared: no plan leads there."""
        places = PlaceMemory.empty(2, 3, 7)
        begins = {0: (1, 1), 2: (1, 2), 4: (3, 1), 6: (1, 1)}  # step -> code of the grid in either lifetime
        seen = []
        for t in range(7):
            codes = torch.tensor(begins.get(t, (5, 5)), dtype=torch.uint8)[:, None].expand(2, 3)
            ended = torch.tensor([t + 1 in begins] * 2)
            limit = ended & torch.tensor([t == 3] * 2)
            step = WorldStep(None, torch.zeros(2), ended & ~limit, limit, None)
            places.add(codes, codes, step)
            seen.append(places.begun.tolist())
        self.assertEqual(seen, [[1, 1], [1, 1], [2, -1], [2, -1], [2, -1], [2, -1], [3, -1]])
        self.assertEqual(places.start[0].tolist(), [1, 1, 1])

    def test_events_are_what_is_unusual(self):
        experience, _ = random_experience()
        reward = torch.full((4, 10), -0.1)
        reward[1, 3] = 1.0
        experience = experience._replace(reward=reward, terminated=reward == 2)
        self.assertEqual(experience.events.nonzero().tolist(), [[1, 3]])


class TestEpisodicMemory(unittest.TestCase):
    def test_index_t_holds_the_codes_before_action_t_and_what_followed(self):
        experience = counted().experience()
        for t in range(T):
            self.assertEqual(experience.action[:, t].tolist(), [t, t])
            torch.testing.assert_close(experience.next_codes[:, t], experience.codes[:, t] + 1)
            torch.testing.assert_close(experience.reward[:, t], experience.next_codes[:, t, 0].float())
            if t + 1 < T:
                for row in range(BATCH):
                    follows = experience.codes[row, t + 1, 0] == experience.next_codes[row, t, 0]
                    self.assertEqual(bool(follows), (row, t) not in ENDS)

    def test_the_store_knows_the_segments_and_the_memory_does_not(self):
        memory, store = counted(), LifetimeStore(MemorySettings(), torch.device("cpu"))
        self.assertEqual(int(memory.experience().segment.max()), 0)
        store.add(memory, torch.zeros(2, dtype=torch.int64), SEGMENT, 0)
        self.assertEqual(store.experience.segment.tolist(), [[0] * T, [0] * 3 + [1] * 3 + [255]])

    def test_latest_is_the_last_step(self):
        memory = counted()
        self.assertEqual(memory.latest().action.tolist(), [[T - 1]] * BATCH)

    def test_clear_removes_everything(self):
        memory = counted()
        memory.clear()
        self.assertEqual((len(memory), memory.experience().action.shape, memory.frames), (0, (BATCH, 0), []))

    def test_a_full_memory_accepts_no_further_step(self):
        memory = counted()
        with self.assertRaisesRegex(IndexError, "7 steps and is full"):
            memory.append(*[None] * 6)

    def test_a_step_of_a_gymnasium_environment_is_a_batch_of_one(self):
        frame = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
        going_on = WorldStep.of(frame, 0.5, {"episode_terminated": False, "episode_truncated": False})
        self.assertEqual((going_on.obs.shape, going_on.reward.tolist()), ((1, 2, 2, 3), [0.5]))
        self.assertFalse(going_on.ended)
        self.assertTrue(np.array_equal(going_on.next_obs[0], frame))
        info = {"episode_terminated": False, "episode_truncated": True, "final_frame": frame[::-1]}
        ended = WorldStep.of(frame, 0.0, info)
        self.assertTrue(ended.ended)
        self.assertTrue(np.array_equal(ended.next_obs[0], frame[::-1]))


class TestStore(unittest.TestCase):
    def store(self, lifetimes: int, budget_mb: float = 1.0) -> LifetimeStore:
        store = LifetimeStore(MemorySettings(budget_mb))
        for number in range(lifetimes):
            store.add(counted(number), torch.tensor([number, number]), SEGMENT, version=number)
        return store

    def test_frames_are_stored_once_and_next_observations_are_rebuilt(self):
        block = FrameBlock.of(0, counted(), torch.zeros(BATCH, dtype=torch.int64))
        self.assertEqual(block.frames.shape[:2], (BATCH, T))
        self.assertEqual(len(block.final_obs), len(ENDS | {(row, T - 1) for row in range(BATCH)}))
        codes = counted().experience().next_codes
        self.assertTrue(torch.equal(block.next_obs()[..., 0, 0, 0], codes[..., 0]))

    def test_only_whole_lifetimes_are_stored(self):
        memory = counted()
        memory.capacity += 1
        with self.assertRaisesRegex(ValueError, "7 of 8 steps"):
            FrameBlock.of(0, memory, torch.zeros(BATCH, dtype=torch.int64))

    def test_frames_at_finds_the_frame_of_every_row_and_step(self):
        store = self.store(3)
        row, step = torch.meshgrid(torch.arange(6), torch.arange(T), indexing="ij")
        for after, codes in ((False, store.experience.codes), (True, store.experience.next_codes)):
            found = store.frames_at(row.flatten(), step.flatten(), torch.full((6 * T,), after))[:, 0, 0, 0]
            self.assertTrue(torch.equal(found, codes[..., 0].flatten()))

    def test_the_oldest_blocks_are_dropped_whole_and_the_budget_holds(self):
        one = self.store(1)
        store = LifetimeStore(MemorySettings(1.0))
        self.assertEqual((store.bytes, len(store)), (0, 0))
        store.budget = int(3.5 * one.bytes)
        for number in range(6):
            store.add(counted(number), torch.tensor([number, number]), SEGMENT, version=0)
            self.assertLessEqual(store.bytes, store.budget)
        self.assertEqual([block.number for block in store.blocks], [3, 4, 5])
        self.assertEqual(store.experience.codes[:, 0, 0].tolist(), [3, 53, 4, 54, 5, 55])
        self.assertEqual(store.blocks[0].task.tolist(), [3, 3])
        self.assertEqual(int(store.sample(1000, shared.make_generator()).max()), 5)

    def test_a_block_larger_than_the_budget_is_refused(self):
        store = LifetimeStore(MemorySettings(1.0))
        store.budget = 100
        with self.assertRaisesRegex(ValueError, "raise memory.budget_mb"):
            store.add(counted(), torch.zeros(2, dtype=torch.int64), SEGMENT, 0)

    def test_reencoding_replaces_codes_and_posteriors_and_notes_the_version(self):
        store = self.store(3)
        self.assertEqual(store.oldest(), 0)
        store.reencode(0, torch.full((2, T, 4), 9), torch.full((2, T, 4), 8), torch.full((2, T, 3), 0.5), version=7)
        self.assertEqual((store.oldest(), store.version), (1, [7, 1, 2]))
        self.assertEqual(store.experience.codes[:, 0, 0].tolist(), [9, 9, 1, 51, 2, 52])

    def test_a_saved_store_is_restored_and_blocks_are_written_once(self):
        store, restored = self.store(3), LifetimeStore(MemorySettings(1.0))
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "store"
            store.save_blocks(folder)
            written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
            store.add(counted(3), torch.tensor([3, 3]), SEGMENT, version=3)
            store.save_blocks(folder)
            for path, when in written.items():
                self.assertEqual((folder / path).stat().st_mtime_ns, when)
            (folder / "block-000009.pt").write_bytes(b"left by a crash before the checkpoint that would have named it")
            remove_stale_blocks(folder, [store.state_dict()])
            self.assertFalse((folder / "block-000009.pt").exists())
            restored.load_state_dict(store.state_dict(), folder)
            store.blocks = store.blocks[2:]
            remove_stale_blocks(folder, [store.state_dict()])
            self.assertEqual(sorted(path.name for path in folder.iterdir()), ["block-000002.pt", "block-000003.pt"])
        self.assertEqual(len(restored), 8)
        for one, other in zip(restored.experience, store.experience, strict=True):
            self.assertTrue(torch.equal(one, other))
        self.assertTrue(torch.equal(restored.blocks[2].frames, store.blocks[0].frames))

    def test_shards_share_the_budget_and_number_their_blocks_apart(self):
        folder, shards = temporary_folder(), [LifetimeStore(MemorySettings(4.0), "cpu", shard, 2) for shard in (0, 1)]
        for shard, store in enumerate(shards):
            self.assertEqual(store.budget, 2 * 2**20)
            for number in range(2):
                store.add(counted(2 * number + shard), torch.tensor([number, shard]), SEGMENT, version=number)
            store.save_blocks(folder)
        self.assertEqual([store.state_dict()["numbers"] for store in shards], [[0, 2], [1, 3]])
        for shard, store in enumerate(shards):
            restored = LifetimeStore(MemorySettings(4.0), "cpu", shard, 2)
            restored.load_state_dict(store.state_dict(), folder)
            pairs = zip(restored.blocks, store.blocks, strict=True)
            self.assertTrue(all(torch.equal(a.frames, b.frames) for a, b in pairs))
            self.assertEqual((restored.next, restored.version), (store.next, store.version))


class TestChecksOfSettings(unittest.TestCase):
    def test_unknown_names_and_wrong_types_are_refused_by_name(self):
        for changes, words in (
            ({"wrld": {}}, "unknown setting wrld.*world"),
            ({"world": {"gird": 5}}, "unknown setting world.gird.*grid"),
            ({"world": {"grid": "five"}}, "world.grid is 'five'.*int"),
            ({"world": {"grid": 5.5}}, "world.grid is 5.5.*int"),
            ({"world": {"grid": True}}, "world.grid is True"),
            ({"world": 3}, "world. is 3.*object"),
            ([1], "object of settings"),
            ({"planner": {"discount": float("nan")}}, "planner.discount is nan"),
            ({"transition": {"reward_bins": [None]}}, "transition.reward_bins is .None.*list of values of type float"),
        ):
            with self.subTest(changes=changes), self.assertRaisesRegex(ValueError, words):
                merge(Settings(), changes)

    def test_integers_serve_as_floats_and_lists_as_tuples(self):
        merged = merge(Settings(), {"world": {"noise": 0}, "transition": {"reward_bins": [-1, 0, 1, 2]}})
        self.assertEqual((merged.world.noise, merged.transition.reward_bins), (0.0, (-1.0, 0.0, 1.0, 2.0)))

    def test_every_setting_refuses_values_of_another_type_and_out_of_its_range(self):
        wrong = {
            bool: ["yes", 1],
            int: ["a lot", -(10**12), 10**20, None, 1.5],
            float: ["a lot", -1e12, 1e20, None, float("nan")],
            str: [5, "soft"],
            tuple: ["1", [None]],
        }
        cases = 0
        for section, values in dataclasses.asdict(Settings()).items():
            for name, value in values.items() if isinstance(values, dict) else ():
                for bad in [{"x": 1}, *wrong[type(value)]]:
                    with self.subTest(setting=f"{section}.{name}", value=bad):
                        with self.assertRaisesRegex(ValueError, rf"{section}\.{name}"):
                            merge(Settings(), {section: {name: bad}})
                        cases += 1
        self.assertGreater(cases, 400)


class TestRandomStreams(unittest.TestCase):
    def test_every_pair_of_seed_and_stream_has_random_numbers_of_its_own(self):
        def numbers(seed: int, stream: int) -> tuple:
            return tuple(torch.rand(4, generator=make_generator(seed, stream)).tolist())

        pairs = [(seed, stream) for seed in range(5) for stream in range(5)]
        self.assertEqual(len({numbers(*pair) for pair in pairs}), len(pairs))
        self.assertEqual(numbers(3, 2), numbers(3, 2))


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
