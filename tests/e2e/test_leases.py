"""The life of a lease, with real bytes in mapped arenas."""

import unittest

import harness
from worker import BLOCK_BYTES, BLOCK_TOKENS, prompt


def places(blocks):
    return [(block["tier"], block["arena"], block["offset"]) for block in blocks]


class Leases(harness.LarderTest):

    def test_put_in_place_keeps_its_offset(self):
        daemon = self.daemon()
        worker = self.worker(daemon)
        for tier in ("GPU", "HOST"):
            with self.subTest(tier=tier):
                tokens = prompt(f"in place {tier}", 6)
                lease = worker.lookup(tokens)["lease"]
                reserved = worker.reserve(lease, 0, 6, tier)
                worker.write(reserved, tokens)
                worker.put(lease, 0, tokens)
                found = worker.lookup(tokens)
                self.assertEqual(found["matched"], len(tokens))
                self.assertEqual(places(found["blocks"]), places(reserved))
                self.assertEqual(worker.wrong(found["blocks"], tokens), [])

    def test_two_processes_share_the_bytes(self):
        """By reference: the second worker reads what the first wrote, where it wrote it."""
        daemon = self.daemon()
        writer, reader = self.remote_worker(daemon), self.remote_worker(daemon)
        tokens = prompt("shared", 5)
        written = writer.fill(tokens)
        found = reader.lookup(tokens)
        self.assertEqual(places(found["blocks"]), places(written["blocks"]))
        self.assertEqual(reader.wrong(found["blocks"], tokens), [])

    def test_wrong_position_is_aborted_and_a_retry_is_harmless(self):
        daemon = self.daemon()
        worker = self.worker(daemon)
        tokens = prompt("position", 6)
        lease = worker.lookup(tokens)["lease"]
        reserved = worker.reserve(lease, 0, 4)
        worker.write(reserved, tokens)
        for position in (1, 7, 2**32 - 1):
            with self.refused("ABORTED", "position", position, 0):
                worker.reserve(lease, position, 1)
            with self.refused("ABORTED", "position", position, 0):
                worker.put(lease, position, tokens[:BLOCK_TOKENS])
        self.assertEqual(daemon.status().reserved_blocks, 4)
        # The same Reserve again gives the same blocks; fewer are the first of them.
        self.assertEqual(places(worker.reserve(lease, 0, 4)), places(reserved))
        self.assertEqual(places(worker.reserve(lease, 0, 2)), places(reserved)[:2])
        self.assertEqual(daemon.status().reserved_blocks, 4)

        state = worker.put(lease, 0, tokens[:2 * BLOCK_TOKENS])
        self.assertEqual((state["end"], state["reserved"]), (2, 2))
        # The answer got lost and the worker sends the Put again.
        with self.refused("ABORTED", "position", 0, 2):
            worker.put(lease, 0, tokens[:2 * BLOCK_TOKENS])
        state = worker.put(lease, 2, tokens[2 * BLOCK_TOKENS:4 * BLOCK_TOKENS])
        self.assertEqual((state["end"], state["reserved"]), (4, 0))
        found = worker.lookup(tokens)
        self.assertEqual(found["matched"], 4 * BLOCK_TOKENS)
        self.assertEqual(places(found["blocks"]), places(reserved))
        self.assertEqual(worker.wrong(found["blocks"], tokens), [])

    def test_fork_shares_and_diverges(self):
        daemon = self.daemon()
        worker = self.worker(daemon)
        trunk = prompt("trunk", 4)
        first = worker.fill(trunk)["lease"]
        used = daemon.tier("GPU").bytes_used
        second = worker.fork(first)
        self.assertEqual((second["end"], second["reserved"]), (4, 0))
        self.assertEqual(daemon.tier("GPU").bytes_used, used)

        tails = {first: prompt("left", 2), second["lease"]: prompt("right", 3)}
        written = {}
        for lease, tail in tails.items():
            whole = trunk + tail
            blocks = worker.reserve(lease, 4, len(tail) // BLOCK_TOKENS)
            worker.write(blocks, whole)
            worker.put(lease, 4, tail)
            written[lease] = blocks
        self.assertFalse(set(places(written[first])) & set(places(written[second["lease"]])))
        for lease, tail in tails.items():
            found = worker.lookup(trunk + tail)
            self.assertEqual(found["matched"], len(trunk + tail))
            self.assertEqual(worker.wrong(found["blocks"], trunk + tail), [])
        # The trunk is pinned by the other cursor when one goes.
        worker.release(first)
        self.assertEqual(worker.truncate(second["lease"], 4)["end"], 4)

    def test_truncate_moves_back(self):
        daemon = self.daemon()
        worker = self.worker(daemon)
        tokens = prompt("back", 8)
        lease = worker.fill(tokens)["lease"]
        worker.reserve(lease, 8, 5)
        state = worker.truncate(lease, 3)
        self.assertEqual((state["end"], state["reserved"]), (3, 0))
        self.assertEqual(daemon.status().reserved_blocks, 0)
        self.assertEqual(daemon.tier("GPU").bytes_pinned, 3 * BLOCK_BYTES)
        with self.refused("INVALID_ARGUMENT", "position", 4, 3):
            worker.truncate(lease, 4)
        # Published blocks stay, and another continuation grows from there.
        other = tokens[:3 * BLOCK_TOKENS] + prompt("another way", 2)
        blocks = worker.reserve(lease, 3, 2)
        worker.write(blocks, other)
        self.assertEqual(worker.put(lease, 3, other[3 * BLOCK_TOKENS:])["end"], 5)
        for path in (tokens, other):
            found = worker.lookup(path)
            self.assertEqual(found["matched"], len(path))
            self.assertEqual(worker.wrong(found["blocks"], path), [])

    def test_two_workers_put_the_same_prefix(self):
        """The first is canonical; the second keeps its own copy for as long as it may read it."""
        daemon = self.daemon()
        first, second = self.remote_worker(daemon), self.remote_worker(daemon)
        tokens = prompt("same", 4)
        leases, blocks = {}, {}
        for worker in (first, second):
            leases[worker] = worker.lookup(tokens)["lease"]
            blocks[worker] = worker.reserve(leases[worker], 0, 4)
            worker.write(blocks[worker], tokens)
        self.assertFalse(set(places(blocks[first])) & set(places(blocks[second])))
        for worker in (first, second):
            self.assertEqual(worker.put(leases[worker], 0, tokens)["end"], 4)

        found = second.lookup(tokens)
        self.assertEqual(places(found["blocks"]), places(blocks[first]))
        self.assertEqual(second.wrong(blocks[second], tokens), [])
        duplicates = {lease.lease_id: lease.duplicate_blocks
                      for session in daemon.sessions() for lease in session.leases}
        self.assertEqual(duplicates[leases[second]], 4)
        self.assertEqual(duplicates[leases[first]], 0)
        used = daemon.tier("GPU").bytes_used
        second.release(leases[second])
        self.assertEqual(daemon.tier("GPU").bytes_used, used - 4 * BLOCK_BYTES)
        self.assertEqual(first.wrong(blocks[first], tokens), [])

    def test_second_copy_is_adopted_where_the_tier_had_none(self):
        daemon = self.daemon()
        worker = self.worker(daemon)
        tokens = prompt("adopted", 3)
        cold = worker.lookup(tokens)["lease"]  # before anything is known
        in_host = worker.lookup(tokens)["lease"]
        worker.write(worker.reserve(in_host, 0, 3, "HOST"), tokens)
        worker.put(in_host, 0, tokens)
        in_gpu = worker.reserve(cold, 0, 3, "GPU")
        worker.write(in_gpu, tokens)
        worker.put(cold, 0, tokens)
        found = worker.lookup(tokens)
        self.assertEqual(places(found["blocks"]), places(in_gpu))
        self.assertEqual(worker.wrong(found["blocks"], tokens), [])
        segment, = daemon.explain(worker.model.model_id, tokens).segments
        self.assertTrue(segment.gpu and segment.host)

    def test_a_lookup_with_a_lease_extends_it(self):
        daemon = self.daemon()
        worker, other = self.worker(daemon), self.worker(daemon)
        tokens = prompt("extends", 6)
        lease = worker.fill(tokens[:2 * BLOCK_TOKENS])["lease"]
        other.release(other.fill(tokens)["lease"])
        found = worker.lookup(tokens[2 * BLOCK_TOKENS:], lease=lease)
        self.assertEqual((found["lease"], found["matched"]), (lease, len(tokens)))
        self.assertEqual([block["position"] for block in found["blocks"]], [2, 3, 4, 5])
        self.assertEqual(worker.wrong(found["blocks"], tokens), [])

    def test_peek_pins_nothing(self):
        daemon = self.daemon()
        worker = self.worker(daemon)
        tokens = prompt("peek", 4)
        worker.release(worker.fill(tokens)["lease"])
        found = worker.lookup(tokens + [1, 2, 3], peek=True)
        self.assertEqual((found["lease"], found["matched"]), (0, len(tokens)))
        status = daemon.status()
        self.assertEqual(status.leases, 0)
        self.assertEqual(sum(tier.bytes_pinned for tier in status.tiers), 0)

    def test_prefetch_brings_blocks_up_from_nvme(self):
        daemon = self.daemon()
        worker = self.worker(daemon)
        tokens = prompt("cold", 20)
        lease = worker.fill(tokens)["lease"]
        worker.flush(lease)
        worker.release(lease)
        daemon.wait_idle()
        daemon.evict("GPU")
        daemon.evict("HOST")
        for tier in ("HOST", "GPU"):
            with self.subTest(tier=tier):
                found = worker.lookup(tokens)
                self.assertEqual(found["matched"], len(tokens))
                ready = worker.prefetch(found["lease"], tier)
                self.assertEqual((ready["ready"], ready["promised"]), (20, 20))
                self.assertEqual([block["position"] for block in ready["blocks"]],
                                 list(range(20)))
                self.assertEqual({block["tier"] for block in ready["blocks"]}, {tier})
                self.assertEqual(worker.wrong(ready["blocks"], tokens), [])
                worker.release(found["lease"])

    def test_a_match_is_cut_where_restoring_does_not_pay(self):
        daemon = self.daemon()
        worker = self.worker(daemon)
        tokens = prompt("cut", 16)
        lease = worker.fill(tokens)["lease"]
        worker.flush(lease)
        worker.release(lease)
        daemon.wait_idle()
        daemon.evict("GPU")
        daemon.evict("HOST")
        # A worker that computes this fast gains nothing from the drive; a slow one does.
        fast = worker.lookup(tokens, rate=1e12)
        self.assertEqual((fast["matched"], fast["cut"]), (0, 16))
        slow = worker.lookup(tokens, rate=1.0)
        self.assertEqual((slow["matched"], slow["cut"]), (len(tokens), 0))
        self.assertEqual(slow["restore_bytes"], 16 * BLOCK_BYTES)
        self.assertGreater(slow["restore_us"], 0)

    def test_inline_put_and_download(self):
        """Whoever cannot map the arenas: with a lease, and without a session's lease at all."""
        daemon = self.daemon()
        worker = self.worker(daemon, mapped=False)
        tokens = prompt("inline", 5)
        lease = worker.lookup(tokens)["lease"]
        state = worker.put(lease, 0, tokens[:2 * BLOCK_TOKENS], data=worker.inline(tokens, 0, 2))
        self.assertEqual(state["end"], 2)
        state = worker.put(0, 2, tokens[2 * BLOCK_TOKENS:], data=worker.inline(tokens, 2, 3),
                           prefix=tokens[:2 * BLOCK_TOKENS])
        self.assertEqual((state["lease"], state["end"]), (0, 5))
        for blocks in (worker.download(tokens=tokens),
                       worker.download(lease=worker.lookup(tokens)["lease"])):
            self.assertEqual(blocks, {at: worker.kv(tokens, at) for at in range(5)})
        self.assertEqual(list(worker.download(tokens=tokens, position=1, count=2)), [1, 2])

    def test_models_never_mix(self):
        """Everything in the spec is identity: one other field, and it is a miss."""
        daemon = self.daemon()
        worker = self.worker(daemon)
        tokens = prompt("identity", 3)
        worker.fill(tokens)
        spec = dict(harness.workers.SPEC)
        first = worker.model.model_id
        self.assertEqual(worker.open_model(**spec)["model"], first)
        seen = {first}
        for change in (dict(name="test/other"), dict(weights_revision="r2"), dict(lora="a"),
                       dict(salt=b"tenant"), dict(layers=2), dict(kv_heads=4),
                       dict(head_dim=64), dict(block_tokens=8),
                       dict(dtype=harness.types.DTYPE_F16)):
            with self.subTest(change=change):
                model = worker.open_model(**{**spec, **change})["model"]
                self.assertNotIn(model, seen)
                seen.add(model)
                self.assertEqual(worker.lookup(tokens, peek=True)["matched"], 0)

    def test_release_lets_go_of_everything(self):
        daemon = self.daemon()
        worker = self.worker(daemon)
        tokens = prompt("release", 4)
        lease = worker.fill(tokens)["lease"]
        worker.reserve(lease, 4, 3)
        other = worker.fork(lease)["lease"]
        worker.release(lease)
        worker.release(other, session_over=True)
        with self.refused("NOT_FOUND", "lease"):
            worker.release(lease)
        daemon.wait_idle()
        status = daemon.status()
        self.assertEqual((status.leases, status.reserved_blocks), (0, 0))
        self.assertEqual(sum(tier.bytes_pinned for tier in status.tiers), 0)
        self.assertEqual(worker.lookup(tokens, peek=True)["matched"], len(tokens))


if __name__ == "__main__":
    unittest.main()
