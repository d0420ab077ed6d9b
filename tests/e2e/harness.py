"""Starts larderd and worker processes for end-to-end tests.

A test class derives from LarderTest; each test starts the daemons it needs in a temporary
directory of its own and talks to them over unix sockets. Nothing here waits by the clock: it
waits for a line, an exit or a state, and fails when that has not come within DEADLINE_SECONDS.

Environment: TEST_LARDERD, TEST_LARDER, TEST_LARDER_WORKER and TEST_SLOW_LARDERD name the binaries.
"""

import contextlib
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.request

import stubs
import worker as workers
from stubs import inspector, types
from worker import Refused

# Sanitizers make everything several times slower; a deadline here only ends a hang.
DEADLINE_SECONDS = 60
LARDERD = os.environ.get("TEST_LARDERD", str(stubs.SOURCE / "build/release/server/larderd"))
SLOW_LARDERD = os.environ.get("TEST_SLOW_LARDERD",
                              str(stubs.SOURCE / "build/release/tests/e2e/slow_larderd"))
LARDER_WORKER = os.environ.get("TEST_LARDER_WORKER",
                               str(stubs.SOURCE / "build/release/client/worker/larder-worker"))
LARDER = os.environ.get("TEST_LARDER", str(stubs.SOURCE / "build/release/client/larder"))

# Blocks of worker.SPEC (64 KiB) that each tier holds unless a test says otherwise.
GPU_BLOCKS, HOST_BLOCKS, NVME_BLOCKS = 64, 128, 1024


def wait_until(condition, what, seconds=DEADLINE_SECONDS):
    """Polls until `condition()` is true and returns its value."""
    pause = threading.Event()
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what() if callable(what) else what}")
        pause.wait(0.02)


def environment():
    """Ours, less what larderd or larder would read as settings."""
    return {key: value for key, value in os.environ.items() if not key.startswith("LARDER_")}


class Process:
    """A child whose output is read as it comes."""

    def __init__(self, argv, name):
        self.name = name
        self.lines = []
        self._news = threading.Condition()
        self._ended = False
        # SIGXFSZ stays ignored, as Python has it, for limit_file_size().
        self.child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                      stderr=subprocess.STDOUT, text=True, env=environment(),
                                      errors="replace", restore_signals=False)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.child.stdout:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def wait_for_line(self, pattern, seconds=DEADLINE_SECONDS):
        """The first line that matches, or an error when the process ends without one."""
        def found():
            return next((line for line in self.lines if re.search(pattern, line)), None)

        with self._news:
            self._news.wait_for(lambda: found() or self._ended, seconds)
            if found() is None:
                raise AssertionError(f"{self.name} printed no /{pattern}/:\n" + self.output())
            return found()

    def output(self):
        return "\n".join(self.lines[-80:])

    def signal(self, number):
        self.child.send_signal(number)

    def wait(self, seconds=DEADLINE_SECONDS):
        code = self.child.wait(seconds)
        self._reader.join(seconds)
        self.child.stdout.close()
        return code

    def running(self):
        return self.child.poll() is None


class Daemon:
    """larderd on sockets in `directory`; may be killed and started again on the same NVMe tier."""

    def __init__(self, directory, gpu=GPU_BLOCKS, host=HOST_BLOCKS, nvme=NVME_BLOCKS, flags=(),
                 program=LARDERD):
        self.directory = pathlib.Path(directory)
        self.socket = self.directory / "larder.sock"
        self.address = f"unix:{self.socket}"
        self.nvme = self.directory / "nvme"
        self.sizes = dict(gpu=gpu, host=host, nvme=nvme)
        self.flags = list(flags)
        self.program = program
        self.process = None
        self.channel = None

    def argv(self):
        size = {tier: f"{blocks * workers.BLOCK_BYTES // 1024}KiB"
                for tier, blocks in self.sizes.items()}
        # Tiers this small need a larger part kept free, or what is put at once drops what is dirty.
        argv = [self.program, f"--listen={self.address}", "--metrics=127.0.0.1:0", "--low-water=25%",
                f"--host-bytes={size['host']}"]
        if self.sizes["gpu"]:
            argv += ["--gpu=emulated", f"--gpu-bytes={size['gpu']}"]
        if self.sizes["nvme"]:
            argv += [f"--nvme-dir={self.nvme}", f"--nvme-bytes={size['nvme']}"]
        return argv + self.flags

    def start(self):
        self.process = Process(self.argv(), "larderd")
        self.process.wait_for_line("^larderd ready")
        self.channel = workers.connect(self.address)
        self.inspector = stubs.inspector_grpc.InspectorStub(self.channel)
        return self

    def kill(self):
        self.process.signal(signal.SIGKILL)
        self.process.wait()
        self.channel.close()

    def stop(self):
        """SIGTERM; returns the exit code."""
        self.process.signal(signal.SIGTERM)
        code = self.process.wait()
        self.channel.close()
        return code

    def restart(self):
        self.kill()
        return self.start()

    # --- What it says about itself -------------------------------------------------------

    def status(self):
        return self.inspector.GetStatus(inspector.GetStatusRequest(),
                                        timeout=workers.CALL_SECONDS)

    def tier(self, name):
        number = workers.tier_number(name)
        return next(tier for tier in self.status().tiers if tier.tier == number)

    def health(self, service):
        """What grpc.health.v1 says of it."""
        return self._health(self.channel.unary_unary, "Check", service, workers.CALL_SECONDS)

    def watch_health(self, service):
        """An iterator over its states, the present one first."""
        return self._health(self.channel.unary_stream, "Watch", service, DEADLINE_SECONDS)

    def _health(self, kind, call, service, seconds):
        # Messages of one field each; Python's distribution packages have no stubs of it.
        states = {b"\x08\x01": "SERVING", b"\x08\x02": "NOT_SERVING", b"\x08\x03": "UNKNOWN"}
        request = b"\x0a" + bytes([len(service)]) + service.encode()
        return kind(f"/grpc.health.v1.Health/{call}", request_serializer=bytes,
                    response_deserializer=states.__getitem__)(request, timeout=seconds)

    def sessions(self):
        return self.inspector.ListSessions(inspector.ListSessionsRequest(leases=True),
                                           timeout=workers.CALL_SECONDS).sessions

    def wait_status(self, condition, what):
        return wait_until(lambda: condition(self.status()),
                          lambda: f"{what}; status:\n{self.status()}")

    def evict(self, tier):
        """Drops every copy in the tier that is neither pinned nor moving."""
        return self.inspector.Evict(inspector.EvictRequest(tier=workers.tier_number(tier)),
                                    timeout=workers.CALL_SECONDS)

    def wait_idle(self):
        """No move under way: the cleaner has caught up."""
        self.wait_status(lambda s: s.moves_in_flight == 0, "moves end")

    def explain(self, model, tokens):
        return self.inspector.Explain(inspector.ExplainRequest(model_id=model, tokens=tokens),
                                      timeout=workers.CALL_SECONDS)

    def metrics(self):
        line = self.process.wait_for_line("metrics served")
        port = re.search(r"127\.0\.0\.1:(\d+)", line).group(1)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics",
                                    timeout=workers.CALL_SECONDS) as answer:
            return answer.read().decode()

    # --- Its files -----------------------------------------------------------------------

    def slot_files(self):
        """Where NVMe payloads are: the files of the directory that RocksDB does not own."""
        return [path for path in self.nvme.rglob("*")
                if path.is_file() and path.stat().st_size >= workers.BLOCK_BYTES
                and "index" not in path.relative_to(self.nvme).parts[:-1]]

    def limit_file_size(self, size):
        """Writes past `size` of any file fail with EFBIG from now on, as on a full disk."""
        pid = self.process.child.pid
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def set_immutable(self, immutable):
        """No file of its NVMe tier can be written any more, also by who has it open. False: not
        by this user, or not on this file system."""
        done = subprocess.run(["chattr", "-R", "+i" if immutable else "-i", str(self.nvme)],
                              capture_output=True, check=False)
        return done.returncode == 0

    def flip_payloads(self):
        """Inverts one byte in each 4 KiB of every payload file."""
        for path in self.slot_files():
            with open(path, "r+b") as file:
                content = bytearray(file.read())
                for at in range(0, len(content), 4096):
                    content[at] ^= 0xFF
                file.seek(0)
                file.write(content)
                os.fsync(file.fileno())


class RemoteWorker:
    """A Worker, or a Member, in a process of its own; each of its methods can be called on it."""

    def __init__(self, *arguments):
        self.child = subprocess.Popen(
            [sys.executable, str(pathlib.Path(workers.__file__).resolve()), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())
        try:
            self.identity = self._answer()
        except Refused:
            self.kill()
            raise

    def _answer(self):
        line = self.child.stdout.readline()
        if not line:
            raise AssertionError(f"the worker process ended with {self.child.wait()}")
        answer = json.loads(line)
        if "code" in answer:
            raise Refused(answer["code"], answer["message"])
        return answer["result"]

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.begin(name, *args, **kwargs)
            return self._answer()

        return call

    def begin(self, name, *args, **kwargs):
        """Sends a call and does not wait for its answer."""
        self.child.stdin.write(json.dumps(dict(call=name, args=args, kwargs=kwargs)) + "\n")
        self.child.stdin.flush()

    def end(self):
        return self._answer()

    def kill(self):
        self.child.kill()
        self.child.wait(DEADLINE_SECONDS)
        for stream in (self.child.stdin, self.child.stdout):
            with contextlib.suppress(BrokenPipeError):
                stream.close()


class LarderTest(unittest.TestCase):
    maxDiff = 4000

    def setUp(self):
        self.directory = tempfile.mkdtemp(prefix="larder-")
        self.addCleanup(shutil.rmtree, self.directory, ignore_errors=True)
        self.daemons = []
        self.addCleanup(self._end_daemons)

    def _end_daemons(self):
        failed = not self._outcome.success  # then the log belongs to the report
        for daemon in self.daemons:
            if daemon.process and daemon.process.running():
                daemon.kill()
            if failed and daemon.process:
                print(f"--- larderd of {self.id()}:\n{daemon.process.output()}", file=sys.stderr)

    def daemon(self, **options):
        daemon = Daemon(self.directory, **options)
        self.daemons.append(daemon)
        return daemon.start()

    def worker(self, daemon, **options):
        worker = workers.Worker(daemon.address, **options)
        self.addCleanup(worker.close)
        return worker

    def remote_worker(self, daemon, spec=None):
        spec = [json.dumps(spec)] if spec else []
        return self._remote(daemon.address, *spec)

    def remote_member(self, lead, rank):
        """Rank `rank` of the group that a remote worker leads."""
        return self._remote("--member", json.dumps(lead.identity), str(rank))

    def _remote(self, *arguments):
        remote = RemoteWorker(*arguments)
        self.addCleanup(remote.kill)
        return remote

    @contextlib.contextmanager
    def refused(self, code, *parts):
        """The call inside is refused with this code, and the message holds every part."""
        with self.assertRaises(Refused) as caught:
            yield caught
        self.assertEqual(caught.exception.code, code, caught.exception.message)
        for part in parts:
            self.assertIn(str(part), caught.exception.message)

    def assert_restored(self, result, blocks):
        """A Worker.restore() that found so many blocks, each bit for bit."""
        self.assertEqual(result["matched"], blocks)
        self.assertIsNone(result["unreadable"])
        self.assertEqual(result["wrong"], [])
        self.assertEqual(result["read"], blocks)

    def assert_nothing_held(self, daemon):
        """No lease, session, reserved block or pin is left."""
        def held(status):
            return dict(leases=status.leases, sessions=status.sessions,
                        lost=status.sessions_lost, reserved=status.reserved_blocks,
                        moves=status.moves_in_flight,
                        pinned=sum(tier.bytes_pinned for tier in status.tiers))

        daemon.wait_status(lambda s: not any(held(s).values()), "everything is let go")


def run_larder(*args, seconds=DEADLINE_SECONDS, check=True):
    """Runs the command line; returns the completed process."""
    done = subprocess.run([LARDER, *map(str, args)], capture_output=True, text=True,
                          timeout=seconds, env=environment(), stdin=subprocess.DEVNULL)
    if check and done.returncode != 0:
        raise AssertionError(f"larder {' '.join(map(str, args))} exited with {done.returncode}:\n"
                             f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done
