"""2,000 requests from four worker processes through three tiers that are too small for them.

Each run compares every byte of every hit, and ends with nothing held and no slot lost: once
undisturbed, once with workers killed again and again, once with the daemon killed and restarted.
"""

import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import unittest

import harness
import stubs
from harness import LARDER, environment, wait_until

REQUESTS = int(os.environ.get("TEST_REPLAY_REQUESTS", "2000"))
SEED = int(os.environ.get("TEST_SEED", "20261122"))
REPLAY_SECONDS = 600
WORKERS = 4


class Replay(harness.LarderTest):

    def setUp(self):
        super().setUp()
        print(f"seed {SEED}")
        self.source = random.Random(SEED)
        trace = pathlib.Path(self.directory, "trace.jsonl")
        trace.write_text(subprocess.run(
            [sys.executable, pathlib.Path(__file__).with_name("workload.py"),
             f"--requests={REQUESTS}", f"--seed={SEED}"], capture_output=True, text=True,
            check=True).stdout)
        self.block_refs = sum(len(json.loads(line)["hash_ids"])
                              for line in trace.read_text().splitlines())
        # The prompts of four workers at a time fit into GPU; the chats fit into no tier.
        self.larderd = self.daemon(gpu=128, host=256, nvme=1024)
        self.argv = [LARDER, "replay", f"--address={self.larderd.address}", f"--trace={trace}",
                     f"--workers={WORKERS}", "--verify", "--json"]

    def start_replay(self, *flags):
        self.replay = subprocess.Popen(
            [*self.argv, *flags], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env=environment())
        self.addCleanup(self.replay.kill)
        self.output = {}

        def read():
            self.output["out"], self.output["err"] = self.replay.communicate()

        self.reader = threading.Thread(target=read)
        self.reader.start()

    def finish_replay(self):
        self.reader.join(REPLAY_SECONDS)
        self.assertFalse(self.reader.is_alive(), "the replay does not end")
        print(self.output["out"])
        self.assertEqual(self.replay.returncode, 0, self.output["out"] + self.output["err"])
        return json.loads(self.output["out"])

    def replaying(self):
        return self.replay.poll() is None

    def kill_a_worker(self):
        """SIGKILL to one of the replay's workers; False when there is none."""
        listing = pathlib.Path(f"/proc/{self.replay.pid}/task/{self.replay.pid}/children")
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            workers = listing.read_text().split()
            if workers:
                os.kill(int(self.source.choice(workers)), signal.SIGKILL)
                return True
        return False

    def wait_lookups(self, count):
        """Until the daemon has served so many lookups or the replay is over."""
        wait_until(lambda: not self.replaying() or self.larderd.status().lookups >= count,
                   f"{count} lookups", REPLAY_SECONDS)

    def check(self, result):
        self.assertEqual(result["bytes_wrong"], 0)
        self.assertGreater(result["bytes_verified"], 0)
        self.assertEqual(result["gave_up"], [])
        self.assertEqual(result["block_refs"],
                         result["block_hits"] + result["computed"])
        for tier, hits in result["hits_by_tier"].items():
            self.assertGreater(hits, 0, tier)
        self.assert_nothing_held(self.larderd)
        self.assertEqual(self.larderd.status().corrupt_blocks, 0)
        # As the command line tells it.
        status = json.loads(harness.run_larder(
            "status", f"--address={self.larderd.address}", "--json").stdout)
        for field in ("sessions", "sessions_lost", "leases", "reserved_blocks"):
            self.assertEqual(status[field], 0, field)
        # Every slot belongs to a block that can be evicted: none has leaked.
        for tier in ("GPU", "HOST", "NVME"):
            self.assertGreater(self.larderd.tier(tier).evictions, 0, tier)
        for tier in ("GPU", "HOST", "NVME"):
            self.larderd.wait_idle()
            self.assertEqual(self.larderd.evict(tier).kept_blocks, 0, tier)
            self.assertEqual(self.larderd.tier(tier).bytes_used, 0, tier)

    def test_replay(self):
        self.start_replay("--flush-every=10")
        result = self.finish_replay()
        self.assertEqual((result["requests"], result["undone"]), (REQUESTS, 0))
        self.assertEqual(result["block_refs"], self.block_refs)
        self.assertEqual(result["errors"], {})
        self.check(result)

    def test_replay_while_workers_are_killed(self):
        self.start_replay("--respawn")
        kills = 0
        while self.replaying():
            self.wait_lookups(self.larderd.status().lookups + REQUESTS // 20)
            kills += self.kill_a_worker()
        result = self.finish_replay()
        self.assertGreaterEqual(kills, 5)
        self.assertGreaterEqual(result["workers_killed"], 5)
        # At most the request that a killed worker was in is missing.
        self.assertLessEqual(result["undone"], result["workers_killed"])
        self.check(result)

    def test_replay_while_the_daemon_is_killed(self):
        self.start_replay("--flush-every=5")
        for _ in range(3):
            # The count starts again with each daemon.
            self.wait_lookups(self.source.randint(REQUESTS // 8, REQUESTS // 5))
            self.assertTrue(self.replaying())
            self.larderd.restart()
        result = self.finish_replay()
        self.assertEqual(result["undone"], 0)
        self.assertEqual(len(result["phases"]), 4)
        self.assertGreaterEqual(result["reconnects"], 3)
        # Each daemon serves from NVMe what the ones before it wrote.
        for phase in result["phases"][1:]:
            self.assertGreater(phase["hits_by_tier"]["nvme"], 0)
        self.check(result)


if __name__ == "__main__":
    unittest.main()
