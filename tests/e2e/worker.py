"""An inference worker without a model: it computes K/V as a hash of the tokens.

`Worker` speaks the whole contract: session, hand-over, mapped arenas, leases. Its arguments and
results are plain JSON values, so that the same object also runs in a process of its own:

  worker.py SOCKET [SPEC]           reads {"call": NAME, "args": [...], "kwargs": {...}} a line
                                    from stdin, answers {"result": ...} or {"code": ...,
                                    "message": ...} a line
  worker.py --member IDENTITY RANK  the same for a Member of the group whose lead has IDENTITY
"""

import base64
import functools
import hashlib
import json
import mmap
import queue
import random
import socket
import struct
import sys
import threading

import grpc

import stubs
from stubs import kv_cache, types

CALL_SECONDS = 30
MESSAGE_BYTES_MAX = 128 << 20

# 16 tokens, 64 KiB.
BLOCK_TOKENS = 16
BLOCK_BYTES = 64 << 10
SPEC = dict(name="test/llama", weights_revision="r1", layers=4, kv_heads=2, head_dim=128,
            dtype=types.DTYPE_BF16, block_tokens=BLOCK_TOKENS, shards=1)

HANDOVER_MAGIC = 0x31564F4852414C31
HANDOVER_REQUEST = struct.Struct("<QQQ")
HANDOVER_REPLY = struct.Struct("<QII")
HANDOVER_ARENA = struct.Struct("<IIIIQ16s64s")
HANDOVER_ARENAS_MAX = 17


class Refused(Exception):
    """A call that ended with a status other than OK."""

    def __init__(self, code, message):
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


def prompt(seed, blocks, block_tokens=BLOCK_TOKENS):
    """Whole blocks of random tokens; equal seeds agree as far as both go."""
    source = random.Random(seed)
    return [source.randrange(1, 128_000) for _ in range(blocks * block_tokens)]


def kv_bytes(tokens, position, model_id=0, block_tokens=BLOCK_TOKENS, block_bytes=BLOCK_BYTES):
    """The K/V of block `position` of a prompt: a hash of the model and of every token so far."""
    history = tokens[:(position + 1) * block_tokens]
    return hashlib.shake_128(
        struct.pack(f"<Q{len(history)}I", model_id, *history)).digest(block_bytes)


def connect(address):
    return grpc.insecure_channel(address, options=[
        ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ])


def refusing(method):
    """Turns gRPC's exceptions into Refused."""

    @functools.wraps(method)
    def wrapped(*args, **kwargs):
        try:
            return method(*args, **kwargs)
        except grpc.RpcError as error:
            raise Refused(error.code().name, error.details()) from None

    return wrapped


def receive_handover(path, boot_id, session_id):
    """Returns (socket, status, {arena: (tier, mmap)}). The socket stays open for the session."""
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    peer.settimeout(CALL_SECONDS)
    peer.connect("\0" + path[1:] if path.startswith("@") else path)
    peer.sendall(HANDOVER_REQUEST.pack(HANDOVER_MAGIC, boot_id, session_id))
    size = HANDOVER_REPLY.size + HANDOVER_ARENAS_MAX * HANDOVER_ARENA.size
    reply, fds, _, _ = socket.recv_fds(peer, size, HANDOVER_ARENAS_MAX)
    while len(reply) < size:
        more = peer.recv(size - len(reply))
        if not more:
            raise ConnectionError(f"hand-over reply ended after {len(reply)} of {size} bytes")
        reply += more
    _, status, count = HANDOVER_REPLY.unpack_from(reply)
    arenas = {}
    for i in range(count):
        arena, tier, _, _, size, _, _ = HANDOVER_ARENA.unpack_from(
            reply, HANDOVER_REPLY.size + i * HANDOVER_ARENA.size)
        mapping = mmap.mmap(fds[i], size)
        mapping.madvise(mmap.MADV_DONTFORK)
        arenas[arena] = (types.Tier.Name(tier).removeprefix("TIER_"), mapping)
        socket.close(fds[i])
    return peer, status, arenas


def blocks_of(runs):
    """Runs, one entry a block."""
    blocks = []
    for run in runs:
        for i in range(run.blocks):
            blocks.append(dict(tier=types.Tier.Name(run.tier).removeprefix("TIER_"),
                               arena=run.arena, position=run.position + i,
                               offset=run.offsets[i] if run.offsets else None))
    return blocks


def tier_number(name):
    return types.Tier.Value("TIER_" + (name or "UNSPECIFIED"))


class Mapped:
    """A model's blocks in mapped arenas, all ranks' parts of them or one rank's.

    Has `arenas`, `model_id`, `block_tokens`, `block_bytes` (of a part) and `shards`.
    """

    def kv(self, tokens, position):
        """The whole block: the parts of all ranks in order."""
        return kv_bytes(tokens, position, self.model_id, self.block_tokens,
                        self.shards * self.block_bytes)

    def _part(self, block, rank):
        """(mapping, begin) of a rank's part."""
        if block["tier"] == "GPU":
            return self.arenas[block["arena"] + rank][1], block["offset"]
        return self.arenas[block["arena"]][1], block["offset"] + rank * self.block_bytes

    def _ranks(self, rank):
        return range(self.shards) if rank is None else [rank]

    def write(self, blocks, tokens, rank=None):
        for block in blocks:
            whole = self.kv(tokens, block["position"])
            for r in self._ranks(rank):
                mapping, at = self._part(block, r)
                mapping[at:at + self.block_bytes] = whole[r * self.block_bytes:][:self.block_bytes]

    def wrong(self, blocks, tokens, rank=None):
        """Positions whose mapped bytes are not the K/V of these tokens."""
        positions = []
        for block in blocks:
            whole = self.kv(tokens, block["position"])
            for r in self._ranks(rank):
                mapping, at = self._part(block, r)
                if (mapping[at:at + self.block_bytes]
                        != whole[r * self.block_bytes:][:self.block_bytes]):
                    positions.append(block["position"])
                    break
        return positions


class Member(Mapped):
    """One rank of a group other than its lead: arenas, and no call to the daemon."""

    def __init__(self, identity, rank):
        self.rank = rank
        self.model_id, self.shards = identity["model"], identity["shards"]
        self.block_tokens, self.block_bytes = identity["block_tokens"], identity["block_bytes"]
        self.handover, status, self.arenas = receive_handover(
            identity["handover_socket"], identity["boot"], identity["session"])
        if status != 0:
            raise Refused("HANDOVER", f"status {status}")

    def identity(self):
        return dict(rank=self.rank)

    def write_part(self, blocks, tokens):
        self.write(blocks, tokens, self.rank)

    def wrong_part(self, blocks, tokens):
        return self.wrong(blocks, tokens, self.rank)


class Worker(Mapped):
    """One session. Thread safety: none; one caller at a time."""

    def __init__(self, address, name="worker", spec=None, mapped=True):
        self.channel = connect(address)
        self.cache = stubs.kv_cache_grpc.KvCacheStub(self.channel)
        self.name = name
        self.arenas = {}
        self.events = queue.Queue()  # AttachEvents, then None when the stream has ended
        self.handover = None
        self._attach()
        if mapped:
            self.map()
        self.open_model(**(spec or SPEC))

    # --- Session -----------------------------------------------------------------------

    def _attach(self):
        self.stream = self.cache.Attach(kv_cache.AttachRequest(worker=self.name))
        threading.Thread(target=self._read_events, daemon=True).start()
        first = self.events.get(timeout=CALL_SECONDS)
        if first is None:
            raise Refused(self.stream.code().name, self.stream.details())
        self.session, self.boot = first.attached.session_id, first.attached.boot_id
        self.handover_socket = first.attached.handover_socket

    def _read_events(self):
        try:
            for event in self.stream:
                self.events.put(event)
        except grpc.RpcError:
            pass  # how it ended is in stream.code()
        self.events.put(None)

    def map(self):
        self.handover, status, self.arenas = receive_handover(
            self.handover_socket, self.boot, self.session)
        if status != 0:
            raise Refused("HANDOVER", f"status {status}")

    def cut(self):
        """The stream ends; process, mappings and hand-over connection stay."""
        self.stream.cancel()
        while self.events.get(timeout=CALL_SECONDS) is not None:
            pass

    def close(self):
        self.stream.cancel()
        if self.handover:
            self.handover.close()
        self.channel.close()

    def identity(self):
        return dict(session=self.session, boot=self.boot, model=self.model.model_id,
                    handover_socket=self.handover_socket, block_tokens=self.block_tokens,
                    block_bytes=self.block_bytes, shards=self.shards)

    @refusing
    def open_model(self, **spec):
        self.model = self.cache.OpenModel(
            kv_cache.OpenModelRequest(spec=types.ModelSpec(**spec)), timeout=CALL_SECONDS)
        self.model_id, self.shards = self.model.model_id, self.model.spec.shards
        self.block_tokens, self.block_bytes = self.model.block_tokens, self.model.block_bytes
        return dict(model=self.model.model_id, block_bytes=self.model.block_bytes)

    # --- Leases ------------------------------------------------------------------------

    @refusing
    def lookup(self, tokens, lease=0, peek=False, rate=0.0):
        answer = self.cache.LookupPrefix(kv_cache.LookupPrefixRequest(
            session_id=self.session, model_id=self.model.model_id, lease_id=lease, tokens=tokens,
            peek=peek, prefill_tokens_per_second=rate), timeout=CALL_SECONDS)
        return dict(lease=answer.lease_id, matched=answer.matched_tokens,
                    blocks=blocks_of(answer.runs), cut=answer.restore.cut_blocks,
                    restore_bytes=answer.restore.bytes, restore_us=answer.restore.microseconds)

    @refusing
    def prefetch(self, lease, tier="", policy="WAIT_COMPLETE", timeout_ms=0,
                 seconds=CALL_SECONDS):
        request = kv_cache.PrefetchRequest(
            blocks=kv_cache.BlockSelector(session_id=self.session, lease_id=lease),
            tier=tier_number(tier), timeout_ms=timeout_ms,
            policy=kv_cache.PrefetchPolicy.Value("PREFETCH_POLICY_" + policy))
        result = dict(blocks=[], ready=0, promised=0, unreadable=None, done=False)
        for event in self.cache.Prefetch(request, timeout=seconds):
            result["blocks"] += blocks_of(event.runs)
            result["ready"], result["promised"] = event.ready_blocks, event.promised_blocks
            result["done"] = event.done
            if event.unreadable:
                result["unreadable"] = event.unreadable_position
        return result

    @refusing
    def reserve(self, lease, position, count, tier=""):
        return blocks_of(self.cache.Reserve(kv_cache.ReserveRequest(
            session_id=self.session, lease_id=lease, position=position, count=count,
            tier=tier_number(tier)), timeout=CALL_SECONDS).runs)

    @staticmethod
    def _state(state):
        return dict(lease=state.lease_id, end=state.end, durable=state.durable_blocks,
                    reserved=state.reserved_blocks)

    @refusing
    def put(self, lease, position, tokens, data="", prefix=()):
        """`data` in base64. lease 0: a put without a lease, past `prefix`."""
        return self._state(self.cache.Put(kv_cache.PutRequest(
            session_id=self.session, lease_id=lease, position=position, tokens=tokens,
            data=base64.b64decode(data), prefix=prefix,
            model_id=0 if lease else self.model.model_id), timeout=CALL_SECONDS))

    @refusing
    def flush(self, lease, seconds=CALL_SECONDS):
        return self._state(self.cache.Flush(kv_cache.FlushRequest(
            session_id=self.session, lease_id=lease), timeout=seconds))

    @refusing
    def truncate(self, lease, position):
        return self._state(self.cache.Truncate(kv_cache.TruncateRequest(
            session_id=self.session, lease_id=lease, position=position), timeout=CALL_SECONDS))

    @refusing
    def fork(self, lease):
        return self._state(self.cache.Fork(kv_cache.ForkRequest(
            session_id=self.session, lease_id=lease), timeout=CALL_SECONDS))

    @refusing
    def release(self, lease, session_over=False):
        self.cache.Release(kv_cache.ReleaseRequest(
            session_id=self.session, lease_id=lease, session_over=session_over),
            timeout=CALL_SECONDS)

    @refusing
    def download(self, lease=0, tokens=(), position=0, count=0):
        """The blocks' bytes by position."""
        selector = kv_cache.BlockSelector(session_id=self.session, lease_id=lease)
        if not lease:
            selector = kv_cache.BlockSelector(model_id=self.model.model_id, tokens=tokens)
        blocks = {}
        for chunk in self.cache.Download(
                kv_cache.DownloadRequest(blocks=selector, position=position, count=count),
                timeout=CALL_SECONDS):
            block = blocks.setdefault(chunk.position, bytearray(chunk.block_bytes))
            block[chunk.offset:chunk.offset + len(chunk.data)] = chunk.data
        return {at: bytes(block) for at, block in blocks.items()}

    # --- Bytes -------------------------------------------------------------------------

    def inline(self, tokens, first, count):
        """Put.data for blocks [first, first + count) of a prompt."""
        return base64.b64encode(
            b"".join(self.kv(tokens, first + i) for i in range(count))).decode()

    # --- What a worker does for a prompt -------------------------------------------------

    def fill(self, tokens, tier=""):
        """Looks the prompt up, computes what is missing and puts it. Keeps the lease."""
        found = self.lookup(tokens)
        have = found["matched"] // self.model.block_tokens
        want = len(tokens) // self.model.block_tokens
        blocks = []
        if want > have:
            blocks = self.reserve(found["lease"], have, want - have, tier)
            self.write(blocks, tokens)
            self.put(found["lease"], have, tokens[have * self.model.block_tokens:])
        return dict(lease=found["lease"], matched=have, blocks=found["blocks"] + blocks)

    def restore(self, tokens, tier=""):
        """Looks the prompt up, brings it up and compares every byte. Keeps the lease."""
        found = self.lookup(tokens)
        have = found["matched"] // self.model.block_tokens
        if not have:
            return dict(lease=found["lease"], matched=0, wrong=[], unreadable=None)
        ready = self.prefetch(found["lease"], tier)
        return dict(lease=found["lease"], matched=have, unreadable=ready["unreadable"],
                    wrong=self.wrong(ready["blocks"], tokens), read=len(ready["blocks"]))


def start(arguments):
    if arguments[0] == "--member":
        return Member(json.loads(arguments[1]), int(arguments[2]))
    spec = json.loads(arguments[1]) if len(arguments) > 1 else None
    return Worker(arguments[0], name="remote", spec=spec)


def main():
    try:
        worker = start(sys.argv[1:])
    except Refused as refused:
        print(json.dumps(dict(code=refused.code, message=refused.message)), flush=True)
        return
    print(json.dumps(dict(result=worker.identity())), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            method = getattr(worker, request["call"])
            answer = dict(result=method(*request["args"], **request["kwargs"]))
        except Refused as refused:
            answer = dict(code=refused.code, message=refused.message)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
