"""larder simulate: the cache's own code on a trace that was worked out by hand.

Four blocks, least recently used, leaves only:

    request   hits  why                                     then resident
    1 2 3        0  empty                                   1 2 3
    1 2 4        2                                          1 2 3 4
    5 6          0  3 goes, then 4 (2 has no child left,    1 2 5 6
                    but was used with 4)
    1 2 3        2  6 goes, the only leaf nobody holds      1 2 3 5
    5 6          1  3 goes                                  1 2 5 6
    1 2          2

With five blocks 3 alone goes for 5 and 6, then 4 for 3, and the fifth request hits both: one
hit more, which a second tier of one block must give. With room for all, the fourth request hits
three: one more still.
"""

import json
import os
import subprocess
import tempfile
import unittest

LARDER = os.environ["TEST_LARDER"]
REQUESTS = [[1, 2, 3], [1, 2, 4], [5, 6], [1, 2, 3], [5, 6], [1, 2]]


def signature(hits):
    """FNV-1a-64 over each request's hits as u32, little-endian."""
    value = 1469598103934665603
    for hit in hits:
        for byte in hit.to_bytes(4, "little"):
            value = (value ^ byte) * 1099511628211 % 2**64
    return f"{value:016x}"


class Simulate(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.trace = os.path.join(folder.name, "trace.jsonl")
        self.write_trace(REQUESTS)

    def write_trace(self, requests):
        with open(self.trace, "w", encoding="utf-8") as file:
            for ids in requests:
                line = {"timestamp": 0, "input_length": 512 * len(ids), "output_length": 1,
                        "hash_ids": ids}
                file.write(json.dumps(line) + "\n")

    def run_larder(self, *flags):
        return subprocess.run([LARDER, "simulate", "--trace", self.trace, "--json", *flags],
                              capture_output=True, text=True, timeout=60, check=False)

    def simulate(self, *flags):
        done = self.run_larder(*flags)
        self.assertEqual(done.returncode, 0, done.stderr)
        return json.loads(done.stdout)

    def test_one_tier_hits_exactly_what_was_worked_out(self):
        for tier in ("gpu", "host"):
            got = self.simulate(f"--{tier}-blocks=4")
            self.assertEqual(got["requests"], 6)
            self.assertEqual(got["block_refs"], 15)
            self.assertEqual(got["block_hits"], 7)
            self.assertEqual(got["hits_by_tier"][tier], 7)
            self.assertEqual(got["signature"], signature([0, 2, 0, 2, 1, 2]))
        self.assertEqual(self.simulate("--gpu-blocks=5")["signature"],
                         signature([0, 2, 0, 2, 2, 2]))

    def test_tiers_are_exclusive(self):
        got = self.simulate("--gpu-blocks=4", "--host-blocks=1", "--nvme-blocks=unbounded")
        self.assertEqual(got["hits_by_tier"], {"gpu": 7, "host": 1, "nvme": 1})
        self.assertEqual(got["signature"], signature([0, 2, 0, 3, 2, 2]))
        self.assertGreater(got["nvme_blocks_written"], 0)

    def test_finished_conversations_are_not_written(self):
        """1 2 goes on as 1 2 3; the others end at once, and so does 1 2 3."""
        self.write_trace([[1, 2], [10, 11], [1, 2, 3], [20, 21], [30, 31]])
        flags = ["--gpu-blocks=1", "--host-blocks=1", "--nvme-blocks=unbounded"]
        everything = self.simulate(*flags)["nvme_blocks_written"]
        finished = self.simulate(*flags, "--finish")["nvme_blocks_written"]
        self.assertGreater(finished, 0)
        self.assertLess(finished, everything)

    def test_bad_input_names_key_value_and_bound(self):
        for flags, words in [
            ([], ["--gpu-blocks", "--host-blocks", "0"]),
            (["--gpu-blocks=many"], ["--gpu-blocks", "many", "unbounded"]),
            (["--gpu-blocks=4", "--nvme-blocks=4"], ["--host-blocks", "0"]),
            (["--gpu-blocks=4", "--policy=random"], ["--policy", "random", "lru"]),
        ]:
            done = self.run_larder(*flags)
            self.assertEqual(done.returncode, 2, done.stderr)
            for word in words:
                self.assertIn(word, done.stderr)


if __name__ == "__main__":
    unittest.main()
