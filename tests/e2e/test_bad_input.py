"""Foreign bytes: the right code, a message that names field, value and bound, nothing changed."""

import contextlib
import os
import socket
import struct
import unittest

import grpc

import harness
import worker as workers
from stubs import inspector, kv_cache, types
from worker import BLOCK_TOKENS, HANDOVER_MAGIC, HANDOVER_REQUEST, Refused, prompt

TOKENS_MAX = 1_048_576


class BadInput(harness.LarderTest):

    def setUp(self):
        super().setUp()
        self.larderd = self.daemon()
        self.one = self.worker(self.larderd, name="one")
        self.two = self.worker(self.larderd, name="two")
        self.tokens = prompt("bad input", 4)
        self.lease = self.one.fill(self.tokens)["lease"]
        self.one.reserve(self.lease, 4, 2)
        self.larderd.wait_idle()

    def state(self):
        status = self.larderd.status()
        return dict(
            leases=status.leases, sessions=status.sessions, lost=status.sessions_lost,
            reserved=status.reserved_blocks, models=status.models,
            tiers=[(t.bytes_used, t.bytes_pinned, t.blocks) for t in status.tiers],
            held=[(s.session_id, [(l.lease_id, l.end, l.reserved_blocks) for l in s.leases])
                  for s in sorted(self.larderd.sessions(), key=lambda s: s.session_id)])

    @contextlib.contextmanager
    def nothing_changes(self):
        before = self.state()
        yield
        self.assertEqual(self.state(), before)
        self.assertTrue(self.larderd.process.running())

    def bad(self, code, parts, call, *args, **kwargs):
        with self.subTest(call=call.__name__, code=code, parts=parts):
            with self.refused(code, *parts), self.nothing_changes():
                call(*args, **kwargs)

    def test_unknown_ids(self):
        one = self.one
        unknown, name = 0x1234567890ABCDEF, "1234567890abcdef"
        for call, args in ((one.reserve, (4, 1)), (one.put, (4, prompt("x", 1))),
                           (one.truncate, (1,)), (one.fork, ()), (one.release, ()),
                           (one.flush, ()), (one.prefetch, ())):
            self.bad("NOT_FOUND", ["lease_id", name], call, unknown, *args)
        self.bad("NOT_FOUND", ["lease_id", name], one.lookup, self.tokens, lease=unknown)
        session, one.session = one.session, unknown
        for call, args in ((one.reserve, (4, 1)), (one.put, (4, prompt("x", 1))),
                           (one.truncate, (1,)), (one.fork, ()), (one.release, ()),
                           (one.flush, ()), (one.prefetch, ())):
            self.bad("NOT_FOUND", ["session_id", name], call, self.lease, *args)
        self.bad("NOT_FOUND", ["session_id", name], one.lookup, self.tokens)
        one.session = session
        model, one.model.model_id = one.model.model_id, unknown
        self.bad("NOT_FOUND", ["model_id", name], one.lookup, self.tokens)
        self.bad("NOT_FOUND", ["model_id", name], one.download, tokens=self.tokens)
        one.model.model_id = model

    def test_foreign_leases(self):
        two = self.two
        for call, args in ((two.reserve, (4, 1)), (two.put, (4, prompt("x", 1))),
                           (two.truncate, (1,)), (two.fork, ()), (two.release, ()),
                           (two.flush, ()), (two.prefetch, ())):
            self.bad("PERMISSION_DENIED", ["lease"], call, self.lease, *args)
        self.bad("PERMISSION_DENIED", ["lease"], two.lookup, self.tokens, lease=self.lease)
        self.bad("PERMISSION_DENIED", ["lease"], two.download, lease=self.lease)

    def test_counts(self):
        one = self.one
        self.bad("INVALID_ARGUMENT", ["count", 0], one.reserve, self.lease, 4, 0)
        self.bad("INVALID_ARGUMENT", ["count", 65_537, 65_536], one.reserve, self.lease, 4, 65_537)
        self.bad("INVALID_ARGUMENT", ["count", 2**32 - 1, 65_536],
                 one.reserve, self.lease, 4, 2**32 - 1)
        self.bad("RESOURCE_EXHAUSTED", ["GPU"], one.reserve, self.lease, 4, 65_536)
        self.bad("INVALID_ARGUMENT", ["tier", 3, "HOST"], one.reserve, self.lease, 4, 1, "NVME")
        self.bad("INVALID_ARGUMENT", ["position", 5, 4], one.truncate, self.lease, 5)
        self.bad("INVALID_ARGUMENT", ["position", 2**32 - 1], one.truncate, self.lease, 2**32 - 1)
        self.bad("INVALID_ARGUMENT", ["tokens", TOKENS_MAX + 1, TOKENS_MAX],
                 one.lookup, [7] * (TOKENS_MAX + 1), peek=True)
        self.bad("INVALID_ARGUMENT", ["timeout_ms", 0], one.prefetch, self.lease, "GPU", "TIMEOUT")
        self.bad("INVALID_ARGUMENT", ["timeout_ms", 3_600_001, 3_600_000],
                 one.prefetch, self.lease, "GPU", "TIMEOUT", 3_600_001)
        self.bad("INVALID_ARGUMENT", ["tier", 3, "HOST"], one.prefetch, self.lease, "NVME")
        for rate in (-1.0, float("nan"), float("inf")):
            self.bad("INVALID_ARGUMENT", ["prefill_tokens_per_second"],
                     one.lookup, self.tokens, rate=rate)

    def test_put_of_what_is_not_whole_blocks(self):
        one = self.one
        for count in (1, BLOCK_TOKENS - 1, BLOCK_TOKENS + 1, 2 * BLOCK_TOKENS - 1):
            self.bad("INVALID_ARGUMENT", ["tokens", count, BLOCK_TOKENS],
                     one.put, self.lease, 4, [9] * count)
        self.bad("INVALID_ARGUMENT", ["tokens", 0], one.put, self.lease, 4, [])
        self.bad("FAILED_PRECONDITION", ["3", "2"], one.put, self.lease, 4, prompt("x", 3))

    def test_inline_data(self):
        one = self.one
        block = prompt("inline", 1)
        whole = one.inline(block, 0, 1)
        for data in (whole[:1000], one.inline(block + block, 0, 2)):
            self.bad("INVALID_ARGUMENT", ["data", workers.BLOCK_BYTES],
                     one.put, 0, 0, block, data)
        self.bad("INVALID_ARGUMENT", ["data"], one.put, 0, 0, block, "")
        self.bad("INVALID_ARGUMENT", ["prefix"], one.put, 0, 1, block, whole)
        self.bad("INVALID_ARGUMENT", ["prefix"], one.put, 0, 0, block, whole, block)
        # The prefix must be cached: K/V without its history has no meaning.
        with self.assertRaises(Refused) as caught, self.nothing_changes():
            one.put(0, 1, block, whole, prompt("nobody put this", 1))
        self.assertIn(caught.exception.code, ("FAILED_PRECONDITION", "ABORTED"))

    def test_geometry(self):
        one = self.one
        spec = dict(workers.SPEC)
        mla = dict(kv_heads=0, head_dim=0)
        for change, parts in (
                (dict(name=""), ["name", 0, 256]), (dict(name="x" * 257), ["name", 257, 256]),
                (dict(weights_revision="x" * 257), ["weights_revision", 257, 256]),
                (dict(lora="x" * 257), ["lora", 257, 256]), (dict(salt=b"x" * 65), ["salt", 65, 64]),
                (dict(layers=0), ["layers", 0, 1]), (dict(layers=1025), ["layers", 1025, 1024]),
                (dict(kv_heads=0), ["kv_heads", 0, 1]),
                (dict(kv_heads=1025), ["kv_heads", 1025, 1024]),
                (dict(head_dim=0), ["head_dim", 0, 1]),
                (dict(head_dim=4097), ["head_dim", 4097, 4096]),
                (dict(mla_latent_dim=512), ["kv_heads", 2, 0]),  # MLA has no heads
                (dict(mla, mla_latent_dim=8193), ["mla_latent_dim", 8193, 8192]),
                (dict(mla, mla_rope_dim=64), ["mla_latent_dim", 0, 1]),
                (dict(mla, mla_latent_dim=1, mla_rope_dim=8193), ["mla_rope_dim", 8193, 8192]),
                (dict(block_tokens=0), ["block_tokens", 0, 1]),
                (dict(block_tokens=1025), ["block_tokens", 1025, 1024]),
                (dict(dtype=types.DTYPE_UNSPECIFIED), ["dtype", 0, "DTYPE_BF16"]),
                (dict(dtype=77), ["dtype", 77, "DTYPE_BF16"]),
                (dict(shards=2), ["shards", 2, 1]),  # the daemon's ranks
                (dict(shards=17), ["shards", 17, 16]),
                (dict(shards=3), ["kv_heads", 2, "multiple of shards", 3])):
            self.bad("INVALID_ARGUMENT", parts, one.open_model, **{**spec, **change})
        # Right in every field, and a block of 512 MiB fits into no tier.
        self.bad("RESOURCE_EXHAUSTED", [512 << 20], one.open_model,
                 **{**spec, "layers": 512, "block_tokens": 512, "head_dim": 256})
        # 4 GiB a block is beyond the bound of any machine.
        self.bad("INVALID_ARGUMENT", [4 << 30, 1 << 30], one.open_model,
                 **{**spec, "layers": 1024, "block_tokens": 1024, "head_dim": 512})

    def test_names_and_sizes_of_the_other_calls(self):
        with self.refused("INVALID_ARGUMENT", "worker", 129, 128), self.nothing_changes():
            workers.Worker(self.larderd.address, name="x" * 129, mapped=False)
        for request, call in (
                (inspector.EvictRequest(tier=9), self.larderd.inspector.Evict),
                (inspector.TopPrefixesRequest(count=1001), self.larderd.inspector.TopPrefixes),
                (inspector.ExplainRequest(model_id=1), self.larderd.inspector.Explain),
                (inspector.EchoRequest(response_bytes=(64 << 20) + 1),
                 self.larderd.inspector.Echo)):
            with self.subTest(request=str(request)), self.nothing_changes():
                with self.assertRaises(grpc.RpcError) as caught:
                    call(request, timeout=workers.CALL_SECONDS)
                self.assertIn(caught.exception.code(),
                              (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND))

    # --- Below gRPC ----------------------------------------------------------------------

    def speak(self, path, sent):
        """Sends bytes to a unix socket and returns what comes back until it is closed."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
            peer.settimeout(harness.DEADLINE_SECONDS)
            peer.connect("\0" + path[1:] if path.startswith("@") else path)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                peer.sendall(sent)
                peer.shutdown(socket.SHUT_WR)
                answer, fds, _, _ = socket.recv_fds(peer, 1 << 16, 16)
                for fd in fds:
                    os.close(fd)
                return answer, fds
        return b"", []

    def test_garbage_on_the_handover_socket(self):
        path, boot, session = self.one.handover_socket, self.one.boot, self.two.session
        good = HANDOVER_REQUEST.pack(HANDOVER_MAGIC, boot, session)
        cases = {
            "nothing": (b"", 1),
            "one byte": (good[:1], 1),
            "a byte too few": (good[:-1], 1),
            "wrong magic": (HANDOVER_REQUEST.pack(HANDOVER_MAGIC + 1, boot, session), 1),
            "HTTP": (b"GET / HTTP/1.1\r\nHost: larder\r\n\r\n", 1),
            "zeros": (bytes(4096), 1),
            "other boot": (HANDOVER_REQUEST.pack(HANDOVER_MAGIC, boot + 1, session), 2),
            "unknown session": (HANDOVER_REQUEST.pack(HANDOVER_MAGIC, boot, session + 999), 2),
        }
        for name, (sent, status) in cases.items():
            with self.subTest(case=name), self.nothing_changes():
                answer, fds = self.speak(path, sent)
                self.assertEqual(fds, [], "an address was given away")
                self.assertEqual(struct.unpack_from("<QII", answer),
                                 (HANDOVER_MAGIC, status, 0))
        # The socket still serves who asks properly.
        third = self.worker(self.larderd, name="three")
        self.assertEqual({tier for tier, _ in third.arenas.values()}, {"GPU", "HOST"})

    def test_many_idle_handover_connections(self):
        """Connections that say nothing do not keep others out for ever."""
        path = self.one.handover_socket
        with contextlib.ExitStack() as stack:
            for _ in range(200):
                peer = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                peer.settimeout(harness.DEADLINE_SECONDS)
                peer.connect("\0" + path[1:] if path.startswith("@") else path)
            self.assertTrue(self.larderd.process.running())
        harness.wait_until(self.another_worker, "the hand-over serves again")

    def another_worker(self):
        worker = self.worker(self.larderd, name="late", mapped=False)
        with contextlib.suppress(Refused, ConnectionError, TimeoutError):
            worker.map()
        return bool(worker.arenas)

    def test_garbage_on_the_grpc_socket(self):
        source = workers.random.Random(1)
        path = str(self.larderd.socket)
        for sent in (b"", b"\n", b"GET / HTTP/1.1\r\n\r\n", bytes(1 << 16), source.randbytes(1 << 16),
                     b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + source.randbytes(4096)):
            with self.subTest(sent=sent[:24]), self.nothing_changes():
                self.speak(path, sent)

    def test_garbage_messages(self):
        """Bytes that are no protobuf, and mutations of bytes that are."""
        source = workers.random.Random(2)
        requests = {
            "KvCache/OpenModel": kv_cache.OpenModelRequest(spec=types.ModelSpec(**workers.SPEC)),
            "KvCache/LookupPrefix": kv_cache.LookupPrefixRequest(
                session_id=self.two.session, model_id=self.two.model.model_id,
                tokens=self.tokens, peek=True),
            "KvCache/Reserve": kv_cache.ReserveRequest(
                session_id=self.two.session, lease_id=1, position=4, count=1),
            "KvCache/Put": kv_cache.PutRequest(session_id=self.two.session, lease_id=1,
                                               position=4, tokens=self.tokens),
            "KvCache/Download": kv_cache.DownloadRequest(blocks=kv_cache.BlockSelector(
                model_id=self.two.model.model_id, tokens=self.tokens)),
            "Inspector/Explain": inspector.ExplainRequest(
                model_id=self.two.model.model_id, tokens=self.tokens),
        }
        with workers.connect(self.larderd.address) as channel:
            for method, request in requests.items():
                call = channel.unary_stream(f"/larder.v1.{method}")
                for _ in range(60):
                    raw = bytearray(request.SerializeToString())
                    for _ in range(source.randint(1, 8)):
                        raw[source.randrange(len(raw))] = source.randrange(256)
                    with contextlib.suppress(grpc.RpcError):
                        for _ in call(bytes(raw), timeout=workers.CALL_SECONDS):
                            pass
        self.assertTrue(self.larderd.process.running())
        # What was there is there, bit for bit.
        found = self.one.lookup(self.tokens)
        self.assertEqual(found["matched"], len(self.tokens))
        self.assertEqual(self.one.wrong(found["blocks"], self.tokens), [])


if __name__ == "__main__":
    unittest.main()
