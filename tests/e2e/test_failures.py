"""What happens when something fails, event by event, against real processes.

Each test is one row of the failure table in the README.
"""

import signal
import unittest

import harness
import worker as workers
from worker import BLOCK_TOKENS, prompt


class FailureTable(harness.LarderTest):

    def test_worker_killed(self):
        """Its leases are unpinned, unpublished blocks return to the pool, published ones stay."""
        daemon = self.daemon()
        tokens = prompt("killed", 8)
        victim = self.remote_worker(daemon)
        lease = victim.fill(tokens)["lease"]
        victim.reserve(lease, 8, harness.GPU_BLOCKS - 8)
        before = daemon.status()
        self.assertEqual((before.sessions, before.leases, before.reserved_blocks),
                         (1, 1, harness.GPU_BLOCKS - 8))

        victim.kill()

        self.assert_nothing_held(daemon)
        heir = self.worker(daemon)
        self.assert_restored(heir.restore(tokens), 8)
        # The pool is whole again: all of it can be had at once.
        other = heir.lookup(prompt("other", 1))["lease"]
        self.assertEqual(len(heir.reserve(other, 0, harness.GPU_BLOCKS - 8)),
                         harness.GPU_BLOCKS - 8)

    def test_worker_hangs_stream_lost(self):
        """Pins of a lost session last until its process is gone, shown as quarantined."""
        daemon = self.daemon()
        tokens = prompt("read", 8)
        hung = self.remote_worker(daemon)
        lease = hung.fill(tokens)["lease"]
        mine = hung.reserve(lease, 8, 8)
        hung.write(mine, prompt("half written", 16))
        held = {(block["arena"], block["offset"])
                for block in hung.lookup(tokens)["blocks"] + mine}
        self.assertEqual(len(held), 16)

        hung.cut()

        daemon.wait_status(lambda s: s.sessions_lost == 1, "the session is lost")
        self.assertEqual(daemon.status().sessions, 0)
        session, = daemon.sessions()
        self.assertTrue(session.lost)
        self.assertEqual(session.pid, hung.child.pid)
        with self.refused("FAILED_PRECONDITION"):
            hung.reserve(lease, 8, 8)

        # Another worker takes everything that can be had: never a slot of the lost session.
        other = self.worker(daemon)
        other_lease = other.lookup(prompt("other", 1))["lease"]
        free = harness.GPU_BLOCKS - 16
        blocks = other.reserve(other_lease, 0, free, "GPU")
        self.assertFalse(held & {(block["arena"], block["offset"]) for block in blocks})
        with self.refused("RESOURCE_EXHAUSTED", "GPU"):
            other.reserve(other.lookup(prompt("more", 1))["lease"], 0, 1, "GPU")
        # The bytes under the hung process's eyes are still the ones it may be reading.
        self.assertEqual(hung.wrong(mine, prompt("half written", 16)), [])

        hung.kill()

        daemon.wait_status(lambda s: s.sessions_lost == 0, "the lost session ends")
        daemon.wait_idle()  # its published blocks now sink; a block that moves keeps its slot
        more = other.lookup(prompt("more", 1))["lease"]
        again = other.reserve(more, 0, 16, "GPU")
        self.assertEqual({(block["arena"], block["offset"]) for block in again}, held)

    def test_move_of_a_leased_block_fails(self):
        """The run is reported unreadable; the worker truncates; the lease's end stays put."""
        daemon = self.daemon()
        worker = self.worker(daemon)
        tokens = prompt("fails", 12)
        self.make_cold(daemon, worker, tokens)
        # The files shrink under the daemon: reading them ends early, an I/O error.
        for path in daemon.slot_files():
            with open(path, "r+b") as file:
                file.truncate(0)

        found = worker.lookup(tokens)
        self.assertEqual(found["matched"], 12 * BLOCK_TOKENS)
        ready = worker.prefetch(found["lease"], "GPU")

        bad = ready["unreadable"]
        self.assertEqual(bad, 0)
        self.assertEqual(ready["blocks"], [])
        lease, = [lease for session in daemon.sessions() for lease in session.leases]
        self.assertEqual(lease.end, 12)
        self.assertEqual(worker.truncate(found["lease"], bad)["end"], bad)
        blocks = worker.reserve(found["lease"], bad, 12 - bad)
        worker.write(blocks, tokens)
        self.assertEqual(worker.put(found["lease"], bad, tokens[bad * BLOCK_TOKENS:])["end"], 12)
        self.assertEqual(worker.wrong(blocks, tokens), [])
        worker.release(found["lease"])
        self.assert_restored(worker.restore(tokens), 12)

    def test_daemon_killed(self):
        """Workers see the stream end and compute; NVMe content is served after the restart."""
        daemon = self.daemon()
        worker = self.remote_worker(daemon)
        tokens = prompt("survives", 16)
        lease = worker.fill(tokens)["lease"]
        self.assertEqual(worker.flush(lease)["durable"], 16)
        boot = worker.identity["boot"]

        daemon.kill()

        with self.refused("UNAVAILABLE"):
            worker.lookup(tokens)
        # What it had mapped can still be touched: a kernel in flight does not crash.
        worker.write([dict(tier="GPU", arena=0, offset=0, position=0)], tokens)
        worker.kill()

        daemon.start()
        again = self.remote_worker(daemon)
        self.assertNotEqual(again.identity["boot"], boot)
        self.assertEqual(again.identity["model"], worker.identity["model"])
        self.assert_restored(again.restore(tokens), 16)
        self.assertEqual(daemon.status().corrupt_blocks, 0)

    def test_put_never_reserved_foreign_lease_wrong_counts(self):
        """A clear error, and nothing changed."""
        daemon = self.daemon()
        worker, other = self.worker(daemon, name="one"), self.worker(daemon, name="two")
        tokens = prompt("errors", 4)
        lease = worker.fill(tokens)["lease"]
        more = prompt("errors more", 3)
        worker.reserve(lease, 4, 2)
        before = daemon.status(), daemon.sessions()

        with self.refused("FAILED_PRECONDITION", "3", "2"):  # three blocks of two reserved
            worker.put(lease, 4, more)
        with self.refused("INVALID_ARGUMENT", "tokens", 2 * BLOCK_TOKENS - 1, BLOCK_TOKENS):
            worker.put(lease, 4, more[:2 * BLOCK_TOKENS - 1])
        with self.refused("INVALID_ARGUMENT", "tokens"):
            worker.put(lease, 4, [])
        with self.refused("PERMISSION_DENIED", "lease"):
            other.put(lease, 4, more[:BLOCK_TOKENS])
        with self.refused("NOT_FOUND", "lease"):
            worker.put(lease + 12345, 4, more[:BLOCK_TOKENS])
        other_lease = other.lookup(tokens)["lease"]
        with self.refused("FAILED_PRECONDITION"):
            other.put(other_lease, 4, more[:BLOCK_TOKENS])
        other.release(other_lease)

        after = daemon.status(), daemon.sessions()
        for field in ("leases", "reserved_blocks", "sessions"):
            self.assertEqual(getattr(after[0], field), getattr(before[0], field), field)
        self.assertEqual([(s.session_id, [(l.lease_id, l.end, l.reserved_blocks)
                                          for l in s.leases]) for s in after[1]],
                         [(s.session_id, [(l.lease_id, l.end, l.reserved_blocks)
                                          for l in s.leases]) for s in before[1]])
        # None of the refused tokens was published.
        self.assertEqual(other.lookup(tokens + more, peek=True)["matched"], len(tokens))

    def test_checksum_mismatch(self):
        """A miss; the record is dropped; larder_corrupt_blocks_total counts it."""
        daemon = self.daemon()
        worker = self.worker(daemon)
        tokens = prompt("flipped", 10)
        self.make_cold(daemon, worker, tokens)
        self.assertRegex(daemon.metrics(), r"(?m)^larder_corrupt_blocks_total(\{\})? 0$")
        daemon.flip_payloads()

        found = worker.lookup(tokens)
        ready = worker.prefetch(found["lease"], "GPU")

        self.assertEqual(ready["unreadable"], 0)
        self.assertEqual(ready["blocks"], [])
        daemon.wait_idle()
        corrupt = daemon.status().corrupt_blocks
        self.assertGreaterEqual(corrupt, 1)
        self.assertRegex(daemon.metrics(),
                         rf"(?m)^larder_corrupt_blocks_total(\{{\}})? {corrupt}$")
        worker.truncate(found["lease"], 0)
        worker.release(found["lease"])
        self.assertEqual(worker.lookup(tokens, peek=True)["matched"], 0)
        # The record is gone, not only forgotten: after a restart it is a miss as well.
        daemon.restart()
        fresh = self.worker(daemon)
        self.assertEqual(fresh.lookup(tokens, peek=True)["matched"], 0)
        # And the same prompt can be computed, put and read again.
        lease = fresh.fill(tokens)["lease"]
        self.assertEqual(fresh.flush(lease)["durable"], 10)
        self.assert_restored(fresh.restore(tokens), 10)

    def test_all_slots_pinned(self):
        """RESOURCE_EXHAUSTED at once, naming tier and bytes; nothing evicted."""
        daemon = self.daemon()
        worker = self.worker(daemon)
        tokens = prompt("pinned", harness.GPU_BLOCKS // 2)
        lease = worker.fill(tokens)["lease"]
        second = worker.fork(lease)["lease"]
        worker.reserve(lease, len(tokens) // BLOCK_TOKENS, harness.GPU_BLOCKS // 2)
        daemon.wait_idle()
        evictions = {tier.tier: tier.evictions for tier in daemon.status().tiers}

        with self.refused("RESOURCE_EXHAUSTED", "GPU", workers.BLOCK_BYTES):
            worker.reserve(second, harness.GPU_BLOCKS // 2, 1, "GPU")

        after = daemon.status()
        self.assertEqual({tier.tier: tier.evictions for tier in after.tiers}, evictions)
        self.assertEqual(after.reserved_blocks, harness.GPU_BLOCKS // 2)
        # Letting go of one makes room for one.
        worker.truncate(lease, harness.GPU_BLOCKS // 2)
        self.assertEqual(len(worker.reserve(second, harness.GPU_BLOCKS // 2, 1, "GPU")), 1)

    def test_sigterm(self):
        """New leases refused, moves finished, index flushed, exit 0."""
        daemon = self.daemon()
        worker = self.worker(daemon)
        tokens = prompt("drained", 24)
        lease = worker.fill(tokens)["lease"]
        worker.flush(lease)

        daemon.process.signal(signal.SIGTERM)

        event = worker.events.get(timeout=harness.DEADLINE_SECONDS)
        self.assertTrue(event.HasField("draining"))
        self.assertGreater(event.draining.grace_ms, 0)
        with self.refused("UNAVAILABLE"):
            worker.lookup(tokens)
        worker.release(lease)
        worker.close()
        self.assertEqual(daemon.process.wait(), 0)
        daemon.channel.close()

        # What was durable by then is there after a new start.
        daemon.start()
        self.assert_restored(self.worker(daemon).restore(tokens), 24)

    def make_cold(self, daemon, worker, tokens):
        """Puts the prompt and leaves it on NVMe only."""
        lease = worker.fill(tokens)["lease"]
        worker.flush(lease)
        worker.release(lease)
        daemon.wait_idle()
        daemon.evict("GPU")
        daemon.evict("HOST")
        self.assertEqual([(s.gpu, s.host, s.nvme) for s in
                          daemon.explain(worker.model.model_id, tokens).segments],
                         [(False, False, True)])


if __name__ == "__main__":
    unittest.main()
