"""Running it: flags, help, exit codes, metrics, locks, restarts, a full stop."""

import json
import os
import pathlib
import re
import resource
import signal
import socket
import stat
import subprocess
import threading
import unittest

import harness
import worker as workers
from harness import LARDERD, environment, run_larder
from worker import BLOCK_TOKENS, prompt

# A line of Prometheus text format: name, labels, value.
SAMPLE = re.compile(
    r'^([a-zA-Z_:][a-zA-Z0-9_:]*)(\{([a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\.)*",?)*\})? '
    r'(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?|NaN|[+-]?Inf)$', re.IGNORECASE)
COMMENT = re.compile(r"^# (HELP [a-zA-Z_:][a-zA-Z0-9_:]* .*|"
                     r"TYPE [a-zA-Z_:][a-zA-Z0-9_:]* (counter|gauge|histogram|summary|untyped))$")

PROMISED_METRICS = (
    "larder_build_info", "larder_tier_bytes", "larder_tier_blocks", "larder_tier_hits_total",
    "larder_tier_evictions_total", "larder_moves_total", "larder_move_bytes_total",
    "larder_moves_queued", "larder_moves_in_flight", "larder_move_bytes_per_second",
    "larder_lookups_total", "larder_lookup_blocks_total", "larder_put_blocks_total",
    "larder_models", "larder_sessions", "larder_leases", "larder_reserved_blocks",
    "larder_exhausted_total", "larder_corrupt_blocks_total", "larder_orphans_collected_total",
    "larder_nvme_degraded", "larder_nvme_operations_total", "larder_nvme_bytes_total",
    "larder_nvme_errors_total", "larder_nvme_limited_blocks_total",
    "larder_calls_total", "larder_call_seconds_bucket",
)


def run_larderd(*args, env=None):
    return subprocess.run([LARDERD, *args], capture_output=True, text=True,
                          timeout=harness.DEADLINE_SECONDS, stdin=subprocess.DEVNULL,
                          env={**environment(), **(env or {})})


def run_larder_until_ready(address):
    harness.wait_until(lambda: run_larder("status", f"--address={address}",
                                          check=False).returncode == 0, f"{address} answers")


class Flags(harness.LarderTest):

    def test_help_is_complete(self):
        for binary in (LARDERD, harness.LARDER):
            done = subprocess.run([binary, "--help"], capture_output=True, text=True,
                                  timeout=harness.DEADLINE_SECONDS, env=environment())
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertEqual(done.stderr, "")
        text = run_larderd("--help").stdout
        for flag in ("--listen", "--gpu", "--gpu-bytes", "--host-bytes", "--nvme-dir",
                     "--nvme-bytes", "--metrics"):
            self.assertIn(flag, text)
            self.assertIn("LARDER_" + flag.strip("-").replace("-", "_").upper(), text)

    def test_a_wrong_value_names_key_value_and_what_is_allowed(self):
        socket_path = f"unix:{self.directory}/larder.sock"
        for args, parts in (
                (["--host-bytes=12parsecs"], ["host-bytes", "12parsecs", "GiB"]),
                (["--host-bytes=-1"], ["host-bytes", "-1"]),
                (["--gpu=quantum"], ["gpu", "quantum", "emulated"]),
                (["--no-such-flag=1"], ["no-such-flag"]),
                ([f"--nvme-dir={self.directory}/n", "--nvme-bytes=lots"],
                 ["nvme-bytes", "lots"]),
                (["--metrics=nowhere"], ["metrics", "nowhere"]),
                (["--log-level=shout"], ["log-level", "shout", "info"]),
                (["--listen=carrier-pigeon://7"], ["listen", "carrier-pigeon://7", "unix:"])):
            with self.subTest(args=args):
                if not args[0].startswith("--listen"):
                    args = [f"--listen={socket_path}", *args]
                done = run_larderd(*args)
                self.assertEqual(done.returncode, 2, done.stdout + done.stderr)
                for part in parts:
                    self.assertIn(part, done.stderr)

    def test_environment_is_read_and_flags_win(self):
        done = run_larderd(env=dict(LARDER_HOST_BYTES="12parsecs"))
        self.assertEqual(done.returncode, 2)
        self.assertIn("12parsecs", done.stderr)

    def test_plaintext_tcp_beyond_loopback_is_refused(self):
        done = run_larderd("--listen=0.0.0.0:0", "--host-bytes=8MiB")
        self.assertEqual(done.returncode, 2, done.stdout + done.stderr)
        self.assertIn("loopback", done.stderr)

    def test_command_line_exit_codes(self):
        for args in (["no-such-command"], ["lookup", "--no-such-flag"], []):
            with self.subTest(args=args):
                self.assertEqual(run_larder(*args, check=False).returncode, 2)
        # No daemon there: an error, with its address in the message, and no hang.
        done = run_larder("status", f"--address=unix:{self.directory}/none.sock", check=False)
        self.assertEqual(done.returncode, 3)
        self.assertIn("none.sock", done.stderr)

    def test_a_full_disk_under_stdout_is_an_error(self):
        with open("/dev/full", "w") as full:
            size = [harness.LARDER, "size", "--layers=4", "--kv-heads=2", "--head-dim=64"]
            for argv in ([harness.LARDER, "--help"], size, [harness.LARDER_WORKER, "--help"],
                         [LARDERD, "--help"]):
                with self.subTest(argv=argv):
                    done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True,
                                          timeout=harness.DEADLINE_SECONDS, env=environment())
                    self.assertEqual(done.returncode, 1, done.stderr)
                    self.assertIn("No space left on device", done.stderr)

    def test_log_lines_are_json_also_those_of_grpc(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            done = run_larderd(f"--listen={address}", "--host-bytes=4MiB", "--log-json")
        self.assertEqual(done.returncode, 1, done.stderr)
        lines = [json.loads(line) for line in done.stderr.splitlines()]
        self.assertIn("grpc", [line["event"] for line in lines])
        self.assertIn(address, lines[-1]["why"])


class Running(harness.LarderTest):

    def start_with(self, prepare):
        """A daemon in whose process `prepare()` runs before it starts. Its output is lost."""
        daemon = harness.Daemon(self.directory)
        child = subprocess.Popen(daemon.argv(), preexec_fn=prepare, env=environment(),
                                 stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                 stderr=subprocess.DEVNULL)
        self.addCleanup(child.wait)
        self.addCleanup(child.kill)
        run_larder_until_ready(daemon.address)
        return daemon, child

    def test_closed_standard_files_are_not_taken_by_others(self):
        """What is logged must not go into an arena or the slots of the NVMe tier."""
        daemon, child = self.start_with(lambda: [os.close(fd) for fd in range(3)])
        for fd in range(3):
            self.assertEqual(os.readlink(f"/proc/{child.pid}/fd/{fd}"), "/dev/null")
        child.terminate()
        self.assertEqual(child.wait(harness.DEADLINE_SECONDS), 0)
        for slots in daemon.slot_files():
            self.assertNotIn(b"larderd ready", slots.read_bytes())

    def test_as_many_files_as_are_allowed(self):
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        _, child = self.start_with(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, most)))
        self.assertEqual(resource.prlimit(child.pid, resource.RLIMIT_NOFILE), (most, most))

    def test_a_signal_ends_the_start(self):
        """Of an arena of some hundred ms; larger ones take minutes."""
        argv = [LARDERD, f"--listen=unix:{self.directory}/s", "--host-bytes=1GiB",
                "--huge-pages=false", "--prefault-threads=1"]
        process = harness.Process(argv, "larderd")
        self.addCleanup(process.child.kill)
        status = pathlib.Path(f"/proc/{process.child.pid}/status")
        bit = 1 << (signal.SIGTERM - 1)
        harness.wait_until(lambda: int(re.search(r"SigBlk:\s+(\w+)", status.read_text())[1], 16)
                           & bit, "it takes signals")
        process.signal(signal.SIGTERM)
        self.assertEqual(process.wait(), 0)
        self.assertIn("stopped before it was ready", process.output())

    def test_a_terminal_that_is_closed_drains_it(self):
        daemon = self.daemon()
        daemon.process.signal(signal.SIGHUP)
        daemon.process.wait_for_line("drained")
        self.assertEqual(daemon.process.wait(), 0)

    def test_socket_is_for_owner_and_group(self):
        daemon = self.daemon()
        self.assertEqual(stat.S_IMODE(os.stat(daemon.socket).st_mode), 0o660)

    def test_metrics_are_prometheus_text(self):
        daemon = self.daemon()
        worker = self.worker(daemon)
        tokens = prompt("metrics", 6)
        worker.flush(worker.fill(tokens)["lease"])
        worker.lookup(tokens)
        names = {}
        for line in daemon.metrics().splitlines():
            if line.startswith("#"):
                self.assertRegex(line, COMMENT)
                continue
            match = SAMPLE.match(line)
            self.assertIsNotNone(match, line)
            names.setdefault(match.group(1), []).append((match.group(2) or "", match.group(4)))
        for name in PROMISED_METRICS:
            self.assertIn(name, names)
        for tier in ("gpu", "host", "nvme"):
            self.assertTrue(any(f'tier="{tier}"' in labels
                                for labels, _ in names["larder_tier_bytes"]), tier)

    def test_second_daemon_on_the_same_directory_refuses_to_start(self):
        daemon = self.daemon()
        other = harness.Daemon(self.directory)
        other.socket = pathlib.Path(self.directory, "second.sock")
        other.address = f"unix:{other.socket}"
        done = run_larderd(*other.argv()[1:])
        self.assertNotEqual(done.returncode, 0)
        self.assertIn(str(daemon.nvme), done.stdout + done.stderr)
        # The first one is unharmed.
        worker = self.worker(daemon)
        self.assertEqual(worker.flush(worker.fill(prompt("lock", 3))["lease"])["durable"], 3)

    def test_a_dead_daemons_socket_file_is_taken_over(self):
        daemon = self.daemon()
        daemon.kill()
        self.assertTrue(daemon.socket.exists())
        daemon.start()
        self.assertEqual(daemon.stop(), 0)
        self.assertFalse(daemon.socket.exists())

    def test_sigterm_under_load_exits_0_and_loses_nothing_durable(self):
        daemon = self.daemon(flags=["--drain-timeout=2s"])  # the worker never leaves by itself
        worker = self.remote_worker(daemon)
        durable = {}
        for i in range(8):
            tokens = prompt(f"load {i}", 12)
            lease = worker.fill(tokens)["lease"]
            durable[i] = worker.flush(lease)["durable"]
            worker.release(lease)
        # Under way when the signal comes: writes to NVMe and a call every now and then.
        worker.begin("fill", prompt("under way", 40))
        self.assertEqual(daemon.stop(), 0)
        worker.kill()
        daemon.start()
        again = self.worker(daemon)
        for i, blocks in durable.items():
            result = again.restore(prompt(f"load {i}", 12))
            self.assertGreaterEqual(result["matched"], blocks)
            self.assertEqual((result["wrong"], result["unreadable"]), ([], None))
            again.release(result["lease"])
        self.assertEqual(daemon.status().corrupt_blocks, 0)

    def test_second_signal_ends_it_at_once(self):
        daemon = self.daemon(flags=["--drain-timeout=1h"])
        self.worker(daemon).fill(prompt("twice", 4))  # and never leaves
        daemon.process.signal(signal.SIGTERM)
        daemon.process.wait_for_line("draining")
        daemon.process.signal(signal.SIGTERM)
        self.assertEqual(daemon.process.wait(), 128 + signal.SIGTERM)

    def test_sigterm_ends_also_while_a_client_reads_nothing(self):
        """A stopped process acknowledges no goodbye, and its socket is full."""
        daemon = self.daemon(host=512, nvme=0, flags=["--drain-timeout=0s"])
        tokens = ["--tokens", ",".join(map(str, range(256 * BLOCK_TOKENS)))]
        model = ["--model", "stopped", "--address", daemon.address]
        run_larder("put", "--fill", *tokens, *model)
        client = subprocess.Popen([harness.LARDER, "get", *tokens, *model], env=environment(),
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.addCleanup(client.stdout.close)
        self.addCleanup(client.wait)
        self.addCleanup(client.kill)
        self.assertEqual(len(client.stdout.read(1)), 1)  # blocks are on their way
        client.send_signal(signal.SIGSTOP)
        self.assertEqual(daemon.stop(), 0)
        self.assertRegex(daemon.process.output(), "drained .*connections_cut_off=1")

    def test_without_gpu_and_without_nvme(self):
        daemon = self.daemon(gpu=0, nvme=0)
        worker = self.worker(daemon)
        tokens = prompt("host only", 8)
        filled = worker.fill(tokens)
        self.assertEqual({block["tier"] for block in filled["blocks"]}, {"HOST"})
        self.assert_restored(worker.restore(tokens), 8)
        with self.refused("FAILED_PRECONDITION", "NVME"):
            worker.flush(filled["lease"])
        with self.assertRaises(workers.Refused):
            worker.reserve(filled["lease"], 8, 1, "GPU")
        self.assertEqual([tier.health for tier in daemon.status().tiers],
                         ["ABSENT", "OK", "ABSENT"])

    def test_deadlines_are_honoured(self):
        """A wait that cannot end ends with its deadline."""
        daemon = self.daemon(nvme=16)
        worker = self.worker(daemon)
        # More blocks than the drive holds: they never become durable all at once.
        lease = worker.fill(prompt("never durable", 40))["lease"]
        with self.refused("DEADLINE_EXCEEDED"):
            worker.flush(lease, seconds=0.3)
        self.assertEqual(worker.truncate(lease, 0)["end"], 0)

    def test_a_stuck_reader_does_not_stop_the_others(self):
        """A client that reads none of its Download holds nobody up."""
        daemon = self.daemon()
        slow, quick = self.worker(daemon), self.worker(daemon)
        tokens = prompt("slow reader", 48)
        lease = slow.fill(tokens)["lease"]
        stream = slow.cache.Download(workers.kv_cache.DownloadRequest(
            blocks=workers.kv_cache.BlockSelector(session_id=slow.session, lease_id=lease)))
        self.addCleanup(stream.cancel)
        next(stream)
        done = threading.Thread(target=lambda: [
            quick.release(quick.fill(prompt(f"quick {i}", 2))["lease"]) for i in range(50)])
        done.start()
        done.join(harness.DEADLINE_SECONDS)
        self.assertFalse(done.is_alive())


class CommandLine(harness.LarderTest):
    """`larder` on a running daemon: each command, for people and as JSON."""

    TEXT = "You are a helpful assistant. Answer briefly, and say so when you"  # 4 blocks

    def setUp(self):
        super().setUp()
        self.larderd = self.daemon()

    def larder(self, command, *args, code=0):
        done = run_larder(command, f"--address={self.larderd.address}", *args, check=False)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        return done.stdout

    def json(self, command, *args, code=0):
        return json.loads(self.larder(command, "--json", *args, code=code))

    def test_status_models_sessions(self):
        worker = self.worker(self.larderd, name="someone")
        lease = worker.fill(prompt("cli", 4))["lease"]
        for word in ("GPU", "HOST", "NVME", "emulated", "OK"):
            self.assertIn(word, self.larder("status"))
        status = self.json("status")
        self.assertEqual((status["sessions"], status["leases"]), (1, 1))
        self.assertEqual([tier["tier"] for tier in status["tiers"]], ["GPU", "HOST", "NVME"])
        self.assertIn("test/llama", self.larder("models"))
        model, = self.json("models")["models"]
        self.assertEqual(model["model"]["model_id"], f"{worker.model.model_id:016x}")
        self.assertIn("someone", self.larder("sessions", "--leases"))
        session, = self.json("sessions", "--leases")["sessions"]
        self.assertEqual(session["pid"], os.getpid())
        self.assertEqual([each["lease_id"] for each in session["leases"]], [f"{lease:016x}"])

    def test_put_lookup_explain_get_prefetch_evict(self):
        prompt_flags = ["--model=cli/model", "--text", self.TEXT + " do not know"]
        whole_flags = ["--model=cli/model", "--text", self.TEXT]
        put = self.json("put", *whole_flags, "--fill", "--flush")
        self.assertEqual((put["blocks"], put["put"], put["durable"]), (4, 4, 4))
        self.assertEqual(self.json("put", *whole_flags, "--fill")["put"], 0)
        self.assertEqual(self.json("lookup", *prompt_flags)["matched_tokens"], 64)
        why = self.json("explain", *prompt_flags)
        self.assertEqual((why["asked_blocks"], why["matched_blocks"]), (4, 4))

        self.json("evict", "--tier=gpu")
        self.json("evict", "--tier=host")
        self.assertEqual([run["tier"] for run in self.json("lookup", *whole_flags)["runs"]],
                         ["NVME"])
        self.assertEqual(self.json("prefetch", *whole_flags)["ready_blocks"], 4)
        file = pathlib.Path(self.directory, "bytes")
        self.json("get", *whole_flags, "--verify", f"--output={file}")
        self.assertEqual(file.stat().st_size, 4 * put["block_bytes"])

        # Bytes from a file, over the wire, and back.
        data = os.urandom(4 * put["block_bytes"])
        file.write_bytes(data)
        other = ["--model=cli/model", "--text", self.TEXT[::-1]]
        self.json("put", *other, "--inline", f"--data={file}")
        copy = pathlib.Path(self.directory, "copy")
        self.json("get", *other, f"--output={copy}")
        self.assertEqual(copy.read_bytes(), data)
        # Those are not the bytes that put --fill derives: get says so.
        self.larder("get", *other, "--verify", f"--output={copy}", code=1)

    def test_exit_codes_for_scripts(self):
        self.larder("get", "--model=cli/model", "--text", self.TEXT, code=1)  # not cached
        self.larder("lookup", "--model=cli/model", "--tokens=1,2,x", code=2)
        self.larder("evict", "--tier=floppy", code=2)


if __name__ == "__main__":
    unittest.main()
