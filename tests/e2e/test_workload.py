"""workload.py writes what it promises, the same each time."""

import json
import pathlib
import subprocess
import sys
import unittest

SCRIPT = str(pathlib.Path(__file__).with_name("workload.py"))


def generate(*args):
    return subprocess.run([sys.executable, SCRIPT, *args], capture_output=True, text=True,
                          check=True, timeout=60).stdout


class Workload(unittest.TestCase):

    def test_is_the_same_for_the_same_seed(self):
        self.assertEqual(generate("--seed=7"), generate("--seed=7"))
        self.assertNotEqual(generate("--seed=7"), generate("--seed=8"))

    def test_ids_are_prefix_chained_and_chats_grow(self):
        requests = [json.loads(line) for line in generate("--requests=500").splitlines()]
        self.assertEqual(len(requests), 500)
        parents, seen, shared, refs, last_ms = {}, set(), 0, 0, 0
        for request in requests:
            ids = request["hash_ids"]
            self.assertEqual(request["input_length"], 512 * len(ids))
            self.assertGreaterEqual(request["timestamp"], last_ms)
            last_ms = request["timestamp"]
            for parent, block in zip([None] + ids, ids):
                self.assertEqual(parents.setdefault(block, parent), parent)
            shared += len(seen.intersection(ids))
            refs += len(ids)
            seen.update(ids)
        # A chat's earlier turns are most of its prompt.
        self.assertGreater(shared / refs, 0.6)

    def test_refuses_what_makes_no_sense(self):
        done = subprocess.run([sys.executable, SCRIPT, "--users=0"], capture_output=True,
                              text=True, timeout=60)
        self.assertEqual(done.returncode, 2)
        self.assertIn("--users: 0 is not at least 1", done.stderr)


if __name__ == "__main__":
    unittest.main()
