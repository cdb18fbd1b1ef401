"""The memory of a lifetime, the store of past ones, checks of settings, and random streams."""

import dataclasses
import tempfile
import unittest
from pathlib import Path

import numpy as np
import torch

from main import Settings
from memory import (
    EpisodicMemory,
    Experience,
    FrameBlock,
    LifetimeStore,
    MemorySettings,
    PlaceMemory,
    WorldStep,
    empty_experience,
    make_generator,
    merge,
    remove_stale_blocks,
)
from tests import shared
from tests.shared import temporary_folder

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
            expected = torch.cat([expected.flatten(0, 2), earned[row, None]], 1)
            expected = expected.sign() * expected.abs().log1p()
            torch.testing.assert_close(carried.recall(row, place, code, earned[row]), expected)
            torch.testing.assert_close(made.recall(row * 10 + t, place, code, earned[row]), expected)
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


if __name__ == "__main__":
    unittest.main()
