"""larder nvme: what a person can ask of an NVMe directory while no daemon has it."""

import json
import unittest

import harness
import worker as workers
from worker import prompt


class NvmeTools(harness.LarderTest):

    def setUp(self):
        super().setUp()
        self.tier = self.daemon()
        worker = self.worker(self.tier)
        self.paths = [prompt("long", 20), prompt("short", 4)]
        for tokens in self.paths:
            lease = worker.fill(tokens)["lease"]
            worker.flush(lease)
            worker.release(lease)
        self.model = f"{worker.model.model_id:016x}"

    def nvme(self, action, *flags, code=0):
        done = harness.run_larder("nvme", action, "--dir", self.tier.nvme, *flags, check=False)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        return done

    def answer(self, action, *flags, code=0):
        return json.loads(self.nvme(action, "--json", *flags, code=code).stdout)

    def test_a_running_daemon_keeps_them_out(self):
        for action, flags in (("check", []), ("stats", []), ("drop", ["--model", self.model])):
            done = self.nvme(action, *flags, code=1)
            self.assertIn(f"in use by process {self.tier.process.child.pid}", done.stderr)

    def test_check_finds_nothing_then_a_flipped_bit_then_repairs(self):
        self.tier.kill()
        self.assertEqual(self.answer("check")["findings"], [])
        self.assertIn("nothing is wrong", self.nvme("check").stdout)
        self.tier.flip_payloads()
        found = self.answer("check", code=1)
        self.assertEqual(found["problems"]["wrong checksum"], 24)
        self.assertEqual({each["model_id"] for each in found["findings"]}, {self.model})
        self.assertIn("24 problems", self.nvme("check", "--repair", code=1).stdout)
        self.assertEqual(self.answer("check")["findings"], [])
        self.tier.start()
        self.assertEqual(self.tier.tier("NVME").blocks, 0)

    def test_stats_counts_what_is_there(self):
        self.tier.kill()
        stats = self.answer("stats")
        self.assertEqual((stats["blocks"], stats["bytes"]), (24, 24 * workers.BLOCK_BYTES))
        self.assertEqual(stats["bytes_total"], harness.NVME_BLOCKS * workers.BLOCK_BYTES)
        model, = stats["models"]
        self.assertEqual((model["model_id"], model["blocks"]), (self.model, 24))
        self.assertLess(model["oldest_seconds"], 600)
        self.assertEqual(sum(stats["ages"].values()), 24)
        self.assertEqual(stats["depths"]["0"], 2)
        self.assertEqual(stats["depths"]["1 to 3"], 6)
        self.assertEqual(stats["depths"]["4 to 15"], 12)
        self.assertEqual(stats["depths"]["16 to 63"], 4)
        self.assertIn(self.model, self.nvme("stats").stdout)

    def test_drop_removes_one_model_only(self):
        other = self.worker(self.tier, spec=dict(workers.SPEC, name="other"))
        tokens = prompt("of another model", 5)
        lease = other.fill(tokens)["lease"]
        other.flush(lease)
        self.tier.kill()
        dropped = self.answer("drop", "--model", self.model)
        self.assertEqual(dropped["dropped_blocks"], 24)
        self.assertEqual(self.answer("check")["findings"], [])
        self.assertEqual(self.answer("stats")["blocks"], 5)
        self.assertEqual(self.answer("drop", "--model", self.model)["dropped_blocks"], 0)
        self.tier.start()
        again = self.worker(self.tier, spec=dict(workers.SPEC, name="other"))
        self.assert_restored(again.restore(tokens), 5)
        self.assertEqual(self.worker(self.tier).lookup(self.paths[0], peek=True)["matched"], 0)

    def test_a_folder_without_a_tier_is_named(self):
        done = harness.run_larder("nvme", "stats", "--dir", self.directory + "/nowhere", check=False)
        self.assertEqual(done.returncode, 1)
        self.assertIn("holds no NVMe tier", done.stderr)


if __name__ == "__main__":
    unittest.main()
