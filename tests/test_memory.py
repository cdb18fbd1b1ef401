"""Memory: the order of the stream, every restart, blocks that are stored once, the budget, and files."""

import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch

from memory import EpisodicMemory, LifetimeStore, MemorySettings, FrameBlock, WorldStep, remove_stale_blocks, save_atomically
from tests.shared import make_generator, temporary_folder

T, BATCH, ENDS = 7, 2, {(0, 2), (0, 6), (1, 4)}  # (row, step) at which an episode ends
SEGMENT = torch.tensor([[0] * T, [0] * 3 + [1] * 3 + [300]])  # the second lifetime changes its rule


def counted(lifetime: int = 0) -> EpisodicMemory:
    """A lifetime of a counting world: every picture is filled with its number, restarts begin at 100."""
    memory = EpisodicMemory(BATCH, T, patches=4, num_effects=3, keep_frames=True)
    now = torch.tensor([0, 50]) + lifetime
    picture = lambda numbers: numbers.to(torch.uint8)[:, None, None, None].expand(-1, 2, 2, 3)  # noqa: E731
    for step in range(T):
        ended = torch.tensor([(row, step) in ENDS for row in range(BATCH)])
        next_obs, frame = now + 1, torch.where(ended, 100 + now, now + 1)
        none = torch.zeros(BATCH, dtype=torch.bool)
        happened = WorldStep(picture(frame), next_obs.float(), ended, none, picture(next_obs[ended]))
        codes = [picture(numbers)[:, 0, 0, :1].expand(-1, 4) for numbers in (now, next_obs)]
        memory.append(*codes, torch.full((BATCH, 3), step / 8), torch.full((BATCH,), step), picture(now), happened)
        now = frame
    return memory


class TestEpisodicMemory(unittest.TestCase):
    def test_index_t_holds_what_was_seen_before_action_t_and_what_followed(self):
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

    def test_clear_forgets_everything(self):
        memory = counted()
        memory.clear()
        self.assertEqual((len(memory), memory.experience().action.shape, memory.frames), (0, (BATCH, 0), []))

    def test_a_full_lifetime_takes_no_more(self):
        memory = counted()
        with self.assertRaisesRegex(IndexError, "7 steps and is full"):
            memory.append(*[None] * 6)


class TestStore(unittest.TestCase):
    def store(self, lifetimes: int, budget_mb: float = 1.0) -> LifetimeStore:
        store = LifetimeStore(MemorySettings(budget_mb))
        for number in range(lifetimes):
            store.add(counted(number), torch.tensor([number, number]), SEGMENT, version=number)
        return store

    def test_pictures_are_stored_once_and_arrivals_come_back(self):
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

    def test_frames_at_finds_the_picture_of_every_row_and_step(self):
        store = self.store(3)
        row, step = torch.meshgrid(torch.arange(6), torch.arange(T), indexing="ij")
        found = store.frames_at(row.flatten(), step.flatten())[:, 0, 0, 0]
        self.assertTrue(torch.equal(found, store.experience.codes[..., 0].flatten()))

    def test_the_oldest_blocks_leave_whole_and_the_budget_holds(self):
        one = self.store(1)
        store = LifetimeStore(MemorySettings(1.0))
        store.budget = int(3.5 * one.bytes)
        for number in range(6):
            store.add(counted(number), torch.tensor([number, number]), SEGMENT, version=0)
            self.assertLessEqual(store.bytes, store.budget)
        self.assertEqual([block.number for block in store.blocks], [3, 4, 5])
        self.assertEqual(store.experience.codes[:, 0, 0].tolist(), [3, 53, 4, 54, 5, 55])
        self.assertEqual(store.blocks[0].task.tolist(), [3, 3])
        self.assertEqual(int(store.sample(1000, make_generator()).max()), 5)

    def test_a_block_larger_than_the_budget_is_refused(self):
        store = LifetimeStore(MemorySettings(1.0))
        store.budget = 100
        with self.assertRaisesRegex(ValueError, "raise memory.budget_mb"):
            store.add(counted(), torch.zeros(2, dtype=torch.int64), SEGMENT, 0)

    def test_renewal_replaces_what_the_models_made_and_dates_it(self):
        store = self.store(3)
        self.assertEqual(store.oldest(), 0)
        store.reencode(0, torch.full((2, T, 4), 9), torch.full((2, T, 4), 8), torch.full((2, T, 3), 0.5), version=7)
        self.assertEqual((store.oldest(), store.version), (1, [7, 1, 2]))
        self.assertEqual(store.experience.codes[:, 0, 0].tolist(), [9, 9, 1, 51, 2, 52])

    def test_state_comes_back_and_blocks_are_written_once(self):
        store, again = self.store(3), LifetimeStore(MemorySettings(1.0))
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
            again.load_state_dict(store.state_dict(), folder)
            store.blocks = store.blocks[2:]
            remove_stale_blocks(folder, [store.state_dict()])
            self.assertEqual(sorted(path.name for path in folder.iterdir()), ["block-000002.pt", "block-000003.pt"])
        self.assertEqual(len(again), 8)
        for one, other in zip(again.experience, store.experience):
            self.assertTrue(torch.equal(one, other))
        self.assertTrue(torch.equal(again.blocks[2].frames, store.blocks[0].frames))

    def test_shards_share_the_budget_and_number_their_blocks_apart(self):
        folder, shards = temporary_folder(), [LifetimeStore(MemorySettings(4.0), "cpu", shard, 2) for shard in (0, 1)]
        for shard, store in enumerate(shards):
            self.assertEqual(store.budget, 2 * 2**20)
            for number in range(2):
                store.add(counted(2 * number + shard), torch.tensor([number, shard]), SEGMENT, version=number)
            store.save_blocks(folder)
        self.assertEqual([store.state_dict()["numbers"] for store in shards], [[0, 2], [1, 3]])
        for shard, store in enumerate(shards):
            again = LifetimeStore(MemorySettings(4.0), "cpu", shard, 2)
            again.load_state_dict(store.state_dict(), folder)
            self.assertTrue(all(torch.equal(a.frames, b.frames) for a, b in zip(again.blocks, store.blocks)))
            self.assertEqual((again.next, again.version), (store.next, store.version))


class TestAtomicSave(unittest.TestCase):
    def test_a_crash_in_mid_write_leaves_the_old_file(self):
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


if __name__ == "__main__":
    unittest.main()
