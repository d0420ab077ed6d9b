"""A tensor-parallel group: four ranks, four processes, one session, one block table."""

import json
import unittest

import harness
import worker as workers
from stubs import types
from worker import BLOCK_TOKENS, prompt

RANKS = 4
# A part has 32 KiB, a block 128 KiB.
SPEC = dict(workers.SPEC, name="test/sharded", kv_heads=4, shards=RANKS)


class Group:
    """The lead and its members, each in a process of its own."""

    def __init__(self, test, daemon):
        self.lead = test.remote_worker(daemon, SPEC)
        self.members = [test.remote_member(self.lead, rank) for rank in range(1, RANKS)]

    def everywhere(self, call, blocks, tokens):
        """All ranks at once, each with its own part; the answers by rank."""
        self.lead.begin(call, blocks, tokens, rank=0)
        for member in self.members:
            member.begin(call + "_part", blocks, tokens)
        return [process.end() for process in (self.lead, *self.members)]

    def fill(self, tokens, tier=""):
        found = self.lead.lookup(tokens)
        have = found["matched"] // BLOCK_TOKENS
        blocks = self.lead.reserve(found["lease"], have, len(tokens) // BLOCK_TOKENS - have, tier)
        self.everywhere("write", blocks, tokens)
        self.lead.put(found["lease"], have, tokens[have * BLOCK_TOKENS:])
        return found["lease"]

    def restored(self, tokens, tier):
        """Brings the prompt up to the tier; (blocks there, wrong positions by rank)."""
        lease = self.lead.lookup(tokens)["lease"]
        ready = self.lead.prefetch(lease, tier)
        wrong = self.everywhere("wrong", ready["blocks"], tokens)
        self.lead.release(lease)
        return [block["tier"] for block in ready["blocks"]], wrong

    def kill(self):
        for process in (self.lead, *self.members):
            process.kill()


class Shards(harness.LarderTest):

    def start(self, **options):
        return self.daemon(flags=[f"--gpu-ranks={RANKS}"], **options)

    def assert_restored_everywhere(self, group, tokens, tier):
        tiers, wrong = group.restored(tokens, tier)
        self.assertEqual(tiers, [tier] * (len(tokens) // BLOCK_TOKENS))
        self.assertEqual(wrong, [[]] * RANKS)

    def test_through_every_tier_and_a_killed_daemon(self):
        daemon = self.start()
        group = Group(self, daemon)
        tokens = prompt("group", 12)
        lease = group.fill(tokens, "GPU")
        self.assertEqual(group.lead.flush(lease)["durable"], 12)
        group.lead.release(lease)
        tiers = {types.Tier.Name(tier.tier): tier for tier in daemon.status().tiers}
        self.assertEqual(tiers["TIER_GPU"].ranks, RANKS)
        self.assertEqual(tiers["TIER_GPU"].bytes_used, 12 * group.lead.identity["block_bytes"])
        self.assertEqual(tiers["TIER_NVME"].bytes_used,
                         12 * RANKS * group.lead.identity["block_bytes"])
        self.assert_restored_everywhere(group, tokens, "GPU")

        daemon.evict("GPU")
        self.assert_restored_everywhere(group, tokens, "HOST")
        self.assert_restored_everywhere(group, tokens, "GPU")
        daemon.evict("GPU")
        daemon.evict("HOST")
        self.assertEqual(daemon.tier("HOST").blocks, 0)
        self.assert_restored_everywhere(group, tokens, "GPU")

        daemon.restart()
        group.kill()
        group = Group(self, daemon)
        self.assertEqual(daemon.tier("NVME").blocks, 12)
        self.assert_restored_everywhere(group, tokens, "GPU")
        # Whole blocks over the wire: the parts of all ranks in order.
        reader = self.worker(daemon, spec=SPEC, mapped=False)
        self.assertEqual(reader.download(tokens=tokens),
                         {at: reader.kv(tokens, at) for at in range(12)})

    def test_the_lead_dies(self):
        """What was reserved goes to nobody else before the last process of the group is gone."""
        daemon = self.start(nvme=0)
        group = Group(self, daemon)
        tokens = prompt("unpublished", 8)
        lease = group.lead.lookup(tokens)["lease"]
        mine = group.lead.reserve(lease, 0, 8, "GPU")
        group.everywhere("write", mine, tokens)
        held = {block["offset"] for block in mine}

        group.lead.kill()

        daemon.wait_status(lambda s: s.sessions_lost == 1, "the group's session is lost")
        other = self.worker(daemon, spec=SPEC)
        taken = other.lookup(prompt("other", 1))["lease"]
        room = daemon.tier("GPU").bytes_total // other.block_bytes
        blocks = other.reserve(taken, 0, room - 8, "GPU")
        self.assertFalse(held & {block["offset"] for block in blocks})
        for member in group.members:
            # Nobody wrote over what this process may still be reading.
            self.assertEqual(member.wrong_part(mine, tokens), [])
            self.assertEqual(daemon.status().sessions_lost, 1)
            with self.refused("RESOURCE_EXHAUSTED", "GPU"):
                other.reserve(other.lookup(prompt("more", 1))["lease"], 0, 1, "GPU")
            member.kill()

        daemon.wait_status(lambda s: s.sessions_lost == 0, "the session ends with its last process")
        again = other.reserve(other.lookup(prompt("more", 1))["lease"], 0, 8, "GPU")
        self.assertEqual({block["offset"] for block in again}, held)

    def test_a_member_dies(self):
        """The lead goes on; what it held stays its own until it lets go."""
        daemon = self.start(nvme=0)
        group = Group(self, daemon)
        tokens = prompt("kept", 8)
        lease = group.fill(tokens, "GPU")
        mine = group.lead.reserve(lease, 8, 4, "GPU")

        group.members.pop().kill()

        status = daemon.status()
        self.assertEqual((status.sessions, status.sessions_lost, status.reserved_blocks),
                         (1, 0, 4))
        # It may even publish: the daemon takes the lead's word that all ranks have written.
        more = prompt("kept", 12)
        group.lead.write(mine, more)
        group.lead.put(lease, 8, more[8 * BLOCK_TOKENS:])
        group.lead.release(lease)
        self.assert_restored(self.worker(daemon, spec=SPEC).restore(more, "GPU"), 12)
        for process in (*group.members, group.lead):
            process.kill()
        daemon.wait_status(lambda s: s.sessions == 1 and s.sessions_lost == 0, "the group is gone")

    def test_bounds(self):
        daemon = self.start()
        one = self.worker(daemon)
        for change, parts in (
                (dict(shards=3), ["kv_heads: 4", "multiple of shards, 3"]),
                (dict(shards=5, kv_heads=5), ["shards: 5", "1 to 4", "ranks"]),
                (dict(shards=17, kv_heads=17), ["shards: 17", "1 to 16"])):
            with self.refused("INVALID_ARGUMENT", *parts):
                one.open_model(**{**SPEC, **change})
        one.open_model(**{**SPEC, "shards": 0})
        self.assertEqual((one.shards, one.block_bytes), (1, 128 << 10))
        one.open_model(**SPEC)
        tokens = prompt("inline", 2)
        one.block_bytes //= 2  # a data of half the bytes
        with self.refused("INVALID_ARGUMENT", "data: 131072 bytes", "262144 needed"):
            one.put(0, 0, tokens, one.inline(tokens, 0, 2))
        one.block_bytes *= 2
        one.put(0, 0, tokens, one.inline(tokens, 0, 2))
        self.assert_restored(one.restore(tokens), 2)
        # One degree never finds the blocks of another.
        for shards in (1, 2):
            one.open_model(**{**SPEC, "shards": shards})
            self.assertEqual(one.lookup(tokens)["matched"], 0)

    def test_a_member_needs_a_live_session_of_this_boot(self):
        daemon = self.start()
        lead = self.remote_worker(daemon, SPEC)
        identity = dict(lead.identity)
        for change in (dict(boot=identity["boot"] ^ 1), dict(session=identity["session"] + 1)):
            lead.identity = {**identity, **change}
            with self.refused("HANDOVER", "status 2"):
                self.remote_member(lead, 1)
        lead.identity = identity
        lead.cut()
        daemon.wait_status(lambda s: s.sessions == 0, "the session ends: it held nothing")
        with self.refused("HANDOVER", "status 2"):
            self.remote_member(lead, 1)

    def test_the_command_line(self):
        daemon = self.start()

        def larder(*flags):
            done = harness.run_larder("--address", daemon.address, "--json", *flags)
            return json.loads(done.stdout)

        # 8 layers of 4 heads of 64: 32 KiB a part, 128 KiB a block.
        model = ["--model", "cli", "--kv-heads=4", "--shards=4"]
        here = ["--text", "x" * 64, *model]
        wire = ["--text", "y" * 64, *model]
        for prompt_flags, way in ((here, []), (wire, ["--inline"])):
            put = larder("put", *prompt_flags, "--fill", "--flush", *way)
            self.assertEqual((put["put"], put["durable"], put["shards"], put["block_bytes"]),
                             (4, 4, 4, 128 << 10))
            daemon.evict("GPU")
            daemon.evict("HOST")
            got = larder("get", *prompt_flags, "--verify", "--output", "/dev/null")
            self.assertEqual((got["blocks"], got["bytes"], got["bytes_wrong"]),
                             (4, 512 << 10, 0))
        models = harness.run_larder("--address", daemon.address, "models").stdout
        self.assertIn("4 x 32.0 KiB", models)
        status = harness.run_larder("--address", daemon.address, "status").stdout
        self.assertIn("4 x 4.0 MiB", status)
        # The ranks' bytes differ: what fills one is not what fills another.
        whole = self.worker(daemon, mapped=False)
        whole.model.model_id = int(larder("models")["models"][0]["model"]["model_id"], 16)
        block = whole.download(tokens=[ord("x")] * 64)[0]
        parts = {block[at:at + (32 << 10)] for at in range(0, len(block), 32 << 10)}
        self.assertEqual(len(parts), 4)

    def test_a_model_of_one_shard_uses_the_first_rank(self):
        daemon = self.start()
        worker = self.worker(daemon)
        tokens = prompt("one", 4)
        blocks = worker.fill(tokens, "GPU")["blocks"]
        self.assertEqual({block["arena"] for block in blocks}, {0})
        for rank in range(1, RANKS):
            for block in blocks:
                part = worker.arenas[rank][1][block["offset"]:block["offset"] + worker.block_bytes]
                self.assertEqual(part, bytes(worker.block_bytes))
        self.assertEqual(worker.wrong(blocks, tokens), [])


if __name__ == "__main__":
    unittest.main()
