"""What was reported durable is there after a SIGKILL, bit for bit, and nothing else is made up."""

import contextlib
import os
import random
import re
import resource
import subprocess
import unittest

import harness
import worker as workers
from worker import BLOCK_TOKENS, Refused, prompt

SEED = int(os.environ.get("TEST_SEED", "20261122"))


class Durability(harness.LarderTest):

    def test_a_durable_prefix_survives_sigkill(self):
        daemon = self.daemon()
        worker = self.worker(daemon)
        trunk = prompt("trunk", 10)
        paths = [trunk, trunk + prompt("left", 7), trunk + prompt("right", 3), prompt("alone", 20)]
        for path in paths:
            lease = worker.fill(path)["lease"]
            self.assertEqual(worker.flush(lease)["durable"], len(path) // BLOCK_TOKENS)
            worker.release(lease)
        for _ in range(3):
            daemon.restart()
            again = self.worker(daemon)
            for path in paths:
                result = again.restore(path)
                self.assert_restored(result, len(path) // BLOCK_TOKENS)
                again.release(result["lease"])
        self.assertEqual(daemon.status().corrupt_blocks, 0)
        self.assertEqual(daemon.status().orphans_collected, 0)

    def test_more_than_memory_holds_comes_back(self):
        """The drive holds several times what both memories do; all of it is served."""
        daemon = self.daemon(gpu=16, host=32)
        worker = self.worker(daemon)
        prompts = [prompt(f"many {i}", 12) for i in range(20)]
        for tokens in prompts:
            lease = worker.fill(tokens)["lease"]
            worker.flush(lease)
            worker.release(lease)
        daemon.restart()
        again = self.worker(daemon)
        for tokens in prompts:
            result = again.restore(tokens)
            self.assertEqual(result["matched"], 12)
            self.assertEqual((result["wrong"], result["unreadable"]), ([], None))
            self.assertGreater(result["read"], 0)
            again.release(result["lease"])
        # Where nothing else is in the way, a prompt comes up whole.
        for tokens in prompts:
            daemon.evict("GPU")
            daemon.evict("HOST")
            result = again.restore(tokens)
            self.assert_restored(result, 12)
            again.release(result["lease"])

    def test_killed_at_random_points_under_load(self):
        """Whatever a Put or Flush had reported durable by then is served afterwards."""
        source = random.Random(SEED)
        print(f"seed {SEED}")
        daemon = self.daemon(gpu=32, host=48, nvme=2048)
        durable = {}  # name of a prompt -> blocks
        for round_number in range(6):
            worker = self.remote_worker(daemon)
            for step in range(source.randint(2, 14)):
                name, blocks = f"{round_number} {step}", source.randint(1, 12)
                tokens = prompt(name, blocks)
                lease = worker.fill(tokens)["lease"]
                if source.random() < 0.7:
                    durable[name] = worker.flush(lease)["durable"]
                    self.assertEqual(durable[name], blocks)
                else:
                    # To where it is already: says what is durable and changes nothing.
                    durable[name] = worker.truncate(lease, blocks)["durable"]
                worker.release(lease)
            # Into the middle of a prompt: computing, writing down, nobody knows.
            worker.begin("fill", prompt(f"{round_number} unfinished", 24))
            daemon.restart()
            worker.kill()

            reader = self.worker(daemon)
            for name, blocks in durable.items():
                result = reader.restore(prompt(name, 12))
                self.assertGreaterEqual(result["matched"], blocks, name)
                self.assertEqual((result["wrong"], result["unreadable"]), ([], None), name)
                reader.release(result["lease"])
            tokens = prompt(f"{round_number} unfinished", 24)
            result = reader.restore(tokens)
            self.assertEqual((result["wrong"], result["unreadable"]), ([], None))
            reader.release(result["lease"])
            self.assertEqual(daemon.status().corrupt_blocks, 0)

    def test_a_torn_payload_is_a_miss_after_restart(self):
        """A prefix as far as it is whole; never a byte of what is not."""
        daemon = self.daemon()
        worker = self.worker(daemon)
        tokens = prompt("torn", 16)
        worker.flush(worker.fill(tokens)["lease"])
        fifth = worker.kv(tokens, 5)
        daemon.kill()
        torn = 0
        for path in daemon.slot_files():
            content = path.read_bytes()
            at = content.find(fifth)
            if at >= 0:
                torn += 1
                with open(path, "r+b") as file:
                    file.seek(at + workers.BLOCK_BYTES // 2)
                    file.write(bytes(workers.BLOCK_BYTES // 2))
        self.assertEqual(torn, 1)
        daemon.start()
        again = self.worker(daemon)
        found = again.lookup(tokens)
        ready = again.prefetch(found["lease"])
        self.assertEqual(ready["unreadable"], 5)
        self.assertEqual([block["position"] for block in ready["blocks"]], [0, 1, 2, 3, 4])
        self.assertEqual(again.wrong(ready["blocks"], tokens), [])
        self.assertEqual(daemon.status().corrupt_blocks, 1)
        again.truncate(found["lease"], 5)
        again.release(found["lease"])
        self.assertEqual(again.lookup(tokens, peek=True)["matched"], 5 * BLOCK_TOKENS)

    def test_a_sick_drive_degrades_and_recovers_by_itself(self):
        """Writes stop, reads go on, Reserve never waits for the drive, and then it heals."""
        daemon = self.daemon(gpu=16, host=32)
        worker = self.worker(daemon)
        healthy = prompt("before", 8)
        lease = worker.fill(healthy)["lease"]
        worker.flush(lease)
        worker.release(lease)
        daemon.wait_idle()

        daemon.limit_file_size(4096)  # every write past a file's first page fails
        # Twice what both memories hold: something must be dropped, nothing may hang.
        for i in range(16):
            lease = worker.fill(prompt(f"sick {i}", 6))["lease"]
            worker.release(lease)
        harness.wait_until(lambda: daemon.tier("NVME").health.startswith("DEGRADED"),
                           "the tier says that it is degraded")
        sick = worker.fill(prompt("never written", 2))["lease"]
        with self.assertRaises(Refused) as caught:
            worker.flush(sick, seconds=5)
        self.assertIn(caught.exception.code, ("UNAVAILABLE", "DEADLINE_EXCEEDED"))
        daemon.evict("GPU")
        daemon.evict("HOST")
        result = worker.restore(healthy)
        self.assert_restored(result, 8)
        worker.release(result["lease"])

        daemon.limit_file_size(resource.RLIM_INFINITY)
        harness.wait_until(lambda: daemon.tier("NVME").health == "OK", "the tier recovers")
        after = prompt("after", 4)
        lease = worker.fill(after)["lease"]

        def flushed():
            with contextlib.suppress(Refused):
                return worker.flush(lease)["durable"] == 4

        harness.wait_until(flushed, "a prompt becomes durable again")
        daemon.restart()
        again = self.worker(daemon)
        self.assert_restored(again.restore(healthy), 8)
        self.assert_restored(again.restore(after), 4)

    def test_a_drive_that_becomes_read_only(self):
        """Under a running daemon, files that the kernel lets nobody write; and what health says.

        Where this user or this file system cannot make files immutable, they stop growing instead.
        """
        daemon = self.daemon(gpu=16, host=32)
        worker = self.worker(daemon)
        healthy = prompt("before", 8)
        lease = worker.fill(healthy)["lease"]
        worker.flush(lease)
        worker.release(lease)
        daemon.wait_idle()
        states = daemon.watch_health("larder.v1.Nvme")
        self.assertEqual(next(states), "SERVING")

        self.addCleanup(daemon.set_immutable, False)
        immutable = daemon.set_immutable(True)
        if not immutable:
            daemon.limit_file_size(4096)
        lease = worker.fill(prompt("read-only", 6))["lease"]
        with self.assertRaises(Refused):
            worker.flush(lease, seconds=5)
        worker.release(lease)
        self.assertEqual(next(states), "NOT_SERVING")
        self.assertEqual(daemon.health("larder.v1.Nvme"), "NOT_SERVING")
        for service in ("", "larder.v1.KvCache"):
            self.assertEqual(daemon.health(service), "SERVING")
        self.assertIn("Operation not permitted" if immutable else "File too large",
                      daemon.tier("NVME").health)
        daemon.evict("GPU")
        daemon.evict("HOST")
        result = worker.restore(healthy)
        self.assert_restored(result, 8)
        worker.release(result["lease"])

        daemon.set_immutable(False)
        daemon.limit_file_size(resource.RLIM_INFINITY)
        self.assertEqual(next(states), "SERVING")
        after = prompt("after", 4)
        lease = worker.fill(after)["lease"]
        self.assertEqual(worker.flush(lease)["durable"], 4)
        daemon.kill()
        if daemon.set_immutable(True):
            refused = subprocess.run(daemon.argv(), capture_output=True, text=True, check=False,
                                     timeout=harness.DEADLINE_SECONDS, env=harness.environment())
            self.assertNotEqual(refused.returncode, 0)
            self.assertIn("nvme-dir: nvme directory", refused.stdout + refused.stderr)
            daemon.set_immutable(False)
        daemon.start()
        again = self.worker(daemon)
        self.assert_restored(again.restore(healthy), 8)
        self.assert_restored(again.restore(after), 4)

    def test_a_smaller_drive_after_a_restart(self):
        """Records that no longer fit are dropped; the rest is right."""
        daemon = self.daemon(nvme=256)
        worker = self.worker(daemon)
        prompts = [prompt(f"shrink {i}", 16) for i in range(12)]
        for tokens in prompts:
            lease = worker.fill(tokens)["lease"]
            worker.flush(lease)
            worker.release(lease)
        daemon.kill()
        daemon.sizes["nvme"] = 128
        daemon.start()
        again = self.worker(daemon)
        for tokens in prompts:
            result = again.restore(tokens)
            self.assertEqual((result["wrong"], result["unreadable"]), ([], None))
            again.release(result["lease"])
        self.assertLessEqual(daemon.tier("NVME").bytes_used, 128 * workers.BLOCK_BYTES)


    def test_growing_and_shrinking_keep_what_fits(self):
        """Also where 48 KiB blocks do not line up with the slabs of the new size."""
        spec = dict(workers.SPEC, name="three layers", layers=3)
        daemon = self.daemon(nvme=128)
        worker = self.worker(daemon, spec=spec)
        prompts = [prompt(f"resize {i}", 12) for i in range(10)]
        for tokens in prompts:
            lease = worker.fill(tokens)["lease"]
            worker.flush(lease)
            worker.release(lease)
        for blocks in (1024, 300, 128):
            daemon.kill()
            daemon.sizes["nvme"] = blocks
            daemon.start()
            self.assertEqual(daemon.tier("NVME").blocks, 120)
            again = self.worker(daemon, spec=spec)
            for tokens in prompts:
                daemon.evict("GPU")
                daemon.evict("HOST")
                result = again.restore(tokens)
                self.assert_restored(result, 12)
                again.release(result["lease"])
            again.close()
        self.assertEqual(daemon.status().orphans_collected, 0)

    def test_models_that_nobody_opens_are_kept(self):
        daemon = self.daemon()
        worker = self.worker(daemon)
        tokens = prompt("patient", 9)
        worker.flush(worker.fill(tokens)["lease"])
        for _ in range(2):
            daemon.restart()
            other = self.worker(daemon, spec=dict(workers.SPEC, name="other"))
            lease = other.fill(prompt("other", 3))["lease"]
            other.flush(lease)
            self.assertEqual(other.lookup(tokens, peek=True)["matched"], 0)
            other.close()
        self.assert_restored(self.worker(daemon).restore(tokens), 9)

    def test_what_was_evicted_from_nvme_stays_away(self):
        daemon = self.daemon()
        worker = self.worker(daemon)
        tokens = prompt("evicted", 6)
        lease = worker.fill(tokens)["lease"]
        worker.flush(lease)
        worker.release(lease)
        for tier in ("GPU", "HOST", "NVME"):
            daemon.wait_idle()
            daemon.evict(tier)
        self.assertEqual(daemon.tier("NVME").blocks, 0)
        worker.close()
        daemon.stop()
        daemon.start()
        self.assertEqual(daemon.tier("NVME").blocks, 0)
        self.assertEqual(self.worker(daemon).lookup(tokens, peek=True)["matched"], 0)

    def test_writes_stay_within_their_limit(self):
        """1 MiB a day are 16 blocks; the rest is served from memory or computed again."""
        daemon = self.daemon(gpu=16, host=32, flags=["--nvme-write-limit-day=1MiB"])
        worker = self.worker(daemon)
        for i in range(12):
            worker.release(worker.fill(prompt(f"worn {i}", 8))["lease"])
        daemon.wait_idle()
        self.assertEqual(daemon.tier("NVME").blocks, 16)
        self.assertEqual(daemon.tier("NVME").health, "OK")
        metrics = daemon.metrics()
        self.assertIn('larder_nvme_bytes_total{operation="write"} 1048576', metrics)
        limited = float(re.search(r"^larder_nvme_limited_blocks_total (\S+)", metrics, re.M).group(1))
        self.assertGreater(limited, 0)
        with self.assertRaises(Refused) as caught:
            worker.flush(worker.fill(prompt("flushed", 2))["lease"], seconds=1)
        self.assertEqual(caught.exception.code, "DEADLINE_EXCEEDED")

        # A daemon that dies again and again gets no day's worth each time.
        for i in range(2):
            daemon.restart()
            again = self.worker(daemon)
            for j in range(12):
                again.release(again.fill(prompt(f"worn again {i} {j}", 8))["lease"])
            daemon.wait_idle()
            self.assertEqual(daemon.tier("NVME").blocks, 16)
            self.assertIn('larder_nvme_bytes_total{operation="write"} 0', daemon.metrics())

    def test_a_folder_of_somebody_else_is_refused_and_left_alone(self):
        daemon = harness.Daemon(self.directory)
        daemon.nvme.mkdir()
        (daemon.nvme / "thesis.tex").write_text("precious")
        done = subprocess.run(daemon.argv(), capture_output=True, text=True, check=False,
                              timeout=harness.DEADLINE_SECONDS, env=harness.environment())
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("choose an empty one", done.stdout + done.stderr)
        self.assertEqual([path.name for path in daemon.nvme.iterdir()], ["thesis.tex"])


if __name__ == "__main__":
    unittest.main()
