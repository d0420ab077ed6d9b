"""larder-worker on a GPU, with a larderd whose GPU tier is in that GPU's memory: the same tokens.

The CPU runs the GPU's kernels (tests/gpu/emulation), and a driver library that worker and daemon find
by LD_LIBRARY_PATH plays its memory (tests/storage/fake_cuda.h), which is NaN until somebody writes it.
"""

import csv
import json
import os
import pathlib
import subprocess
import unittest

import harness
import test_worker
from harness import environment
from test_worker import FLUSH, PATIENT, TINY, prompt, reused, texts

WORKER = os.environ.get("TEST_EMULATED_LARDER_WORKER", str(
    harness.stubs.SOURCE / "build/release/tests/e2e/emulated_larder_worker"))
# As the driver library names its first two devices; the emulated GPU is the first.
DEVICE = "GPU-00102030-4050-6070-8090-a0b0c0d0e0f0"
OTHER_DEVICE = "GPU-01112131-4151-6171-8191-a1b1c1d1e1f1"
# So many that a worker whose output is not read cannot be done.
TOKENS = 300
# Every thread of every kernel is emulated: 2 KiB a block.
SMALL = TINY | dict(hidden_size=32, intermediate_size=64, num_attention_heads=2,
                    num_key_value_heads=1)


class CudaWorkerTest(test_worker.WorkerTest):

    def setUp(self):
        super().setUp()
        self.addCleanup(os.environ.pop, "FAKE_CUDA", None)
        self.set_driver()

    def set_driver(self, settings=""):
        """What the driver library of processes started from now on is told."""
        os.environ["FAKE_CUDA"] = f"touchable=1 {settings}"

    def start_daemon(self, gpu="cuda", gpu_bytes="8MiB", **options):
        return self.daemon(gpu=0, flags=[f"--gpu={gpu}", f"--gpu-bytes={gpu_bytes}",
                                         "--gpu-reserve=1MiB"], **options)

    def argv(self, *arguments, **flags):
        # A GPU's pool is taken at once; short steps are calibrated soon.
        standard = dict(model=SMALL, pool_bytes="16MiB", chunk_tokens=32)
        argv = super().argv(*arguments, **(standard | flags))
        return [WORKER, *argv[1:], "--device=cuda"]


class SameTokens(CudaWorkerTest):

    def test_from_every_tier(self):
        daemon = self.start_daemon()
        prompts = [prompt(1, 100), prompt(2, 64), prompt(3, 17)]
        flags = dict(max_tokens=8)
        alone = texts(self.generate(prompts, **flags))
        stored = self.generate(prompts, daemon, flush=FLUSH, **flags)
        self.assertEqual(texts(stored), alone)
        for stats, tokens in zip(stored["prompts"], prompts):
            # All but the unfinished block is published from where it was written.
            self.assertEqual((reused(stats), stats["local_blocks"]), (0, 0))
            self.assertEqual(stats["published_blocks"], (len(tokens) + 7) // 16)
        for tier, lose in (("gpu", lambda: None), ("host", lambda: daemon.evict("GPU")),
                           ("nvme", daemon.restart)):
            with self.subTest(tier):
                lose()
                warm = self.generate(prompts, daemon, **flags, **PATIENT)
                self.assertEqual(texts(warm), alone)
                self.assert_warm(warm, prompts)
                for stats in warm["prompts"]:
                    self.assertEqual(stats["reused_tokens"][tier], reused(stats))
                self.assertEqual(daemon.tier("GPU").backend, "cuda")
                self.assertGreaterEqual(daemon.tier("GPU").blocks, 6 + 4 + 1)
                self.assert_nothing_held(daemon)

    def test_over_codes(self):
        """One byte a number and a scale a row: what is read back is what was written."""
        daemon = self.start_daemon()
        prompts = [prompt(1, 40)]
        for dtype in ("f8_e4m3", "i8"):
            with self.subTest(dtype):
                flags = dict(model=SMALL | dict(head_dim=64), kv_dtype=dtype, max_tokens=10)
                alone = texts(self.generate(prompts, **flags))
                self.assertEqual(texts(self.generate(prompts, daemon, **flags)), alone)
                warm = self.generate(prompts, daemon, **flags)
                self.assertEqual(texts(warm), alone)
                self.assert_warm(warm, prompts)
        self.assert_nothing_held(daemon)

    def test_for_samples_of_one_prompt(self):
        daemon = self.start_daemon()
        prompts = [prompt(1, 50), prompt(2, 64)]
        flags = dict(samples=3, max_tokens=20)
        alone = texts(self.generate(prompts, **flags))
        for _ in range(2):
            self.assertEqual(texts(self.generate(prompts, daemon, **flags)), alone)
        self.assert_nothing_held(daemon)

    def test_when_several_workers_share(self):
        daemon = self.start_daemon()
        document = prompt(0, 100)
        questions = [[prompt(10 * i + k, 115, document) for k in range(2)] for i in range(3)]
        flags = dict(max_tokens=4)
        alone = [texts(self.generate(prompts, **flags)) for prompts in questions]
        for _ in range(2):
            children = [self.start(prompts, daemon, **flags) for prompts in questions]
            self.assertEqual([texts(self.finish(child)) for child in children], alone)
        self.assert_nothing_held(daemon)

    def test_with_a_full_gpu(self):
        """8 blocks of 256 KiB: the rest is the worker's own."""
        model = SMALL | dict(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8,
                             head_dim=128)
        daemon = self.start_daemon(gpu_bytes="2MiB", nvme=0)
        prompts = [prompt(1, 140)]
        flags = dict(model=model, max_tokens=4, samples=2)
        result = self.generate(prompts, daemon, **flags)
        self.assertEqual(texts(result), texts(self.generate(prompts, **flags)))
        self.assertGreater(result["prompts"][0]["published_blocks"], 0)
        self.assertGreater(result["prompts"][0]["local_blocks"], 0)
        self.assert_nothing_held(daemon)


class Losses(CudaWorkerTest):

    def assert_started_again(self, result, tokens, alone, reused_before):
        """A request of `tokens` that lost its blocks once, after k of its new tokens: these are
        `alone`'s, and then come those that follow when they are a prompt's. (Where two tokens are
        nearly tied, prefill may decide otherwise than decoding did: its sums have another order.)
        """
        [completion] = result["completions"]
        count = len(alone)
        # Computed were the prompt and k - 1, then the prompt and k, then one for each that followed.
        k = result["computed_tokens"] - 2 * len(tokens) + reused_before - count + 2
        self.assertIn(k, range(1, count))
        self.assertEqual(completion["tokens"][:k], alone[:k])
        rest = self.generate([tokens + alone[:k]], max_tokens=count - k)
        self.assertEqual(completion["tokens"][k:], rest["prompts"][0]["completions"][0]["tokens"])
        self.assertEqual((reused(result), result["given_up_blocks"]), (0, reused_before // 16))
        self.assertGreaterEqual(result["local_blocks"], (len(tokens) + k) // 16)

    def test_daemon_killed_while_generating(self):
        """Its GPU memory is gone with it: tokens stay, their K/V are computed again."""
        daemon = self.start_daemon()
        tokens = prompt(1, 100)
        flags = dict(max_tokens=TOKENS)
        [[(alone, _)]] = texts(self.generate([tokens], **flags))
        self.generate([tokens], daemon, max_tokens=1)
        child = self.start_streaming([tokens], daemon, **flags)
        self.read_tokens(child, 20)
        daemon.kill()
        result = self.finish(child)
        self.assertIn("computing without the cache", result["notices"])
        self.assert_started_again(result["prompts"][0], tokens, alone, 96)
        # In chunks, as a prompt, and not token by token.
        self.assertLess(result["steps"], TOKENS + 40)

    def test_later_requests_find_the_restarted_daemon(self):
        daemon = self.start_daemon()
        prompts = [prompt(1, 100), prompt(2, 120)]
        flags = dict(max_batch=1, max_tokens=TOKENS)
        alone = texts(self.generate(prompts, **flags))
        child = self.start_streaming(prompts, daemon, **flags)
        self.read_tokens(child, 20)
        daemon.restart()
        result = self.finish(child)
        self.assertIn("using the cache again", result["notices"])
        lost, found = result["prompts"]
        self.assert_started_again(lost, prompts[0], alone[0][0][0], 0)
        self.assertEqual(found["completions"][0]["tokens"], alone[1][0][0])
        blocks = (120 + TOKENS - 1) // 16
        self.assertEqual((found["published_blocks"], found["local_blocks"]), (blocks, 0))
        self.assert_nothing_held(daemon)

    def test_room_for_samples_that_start_again(self):
        """They share no prompt any more: 100 blocks are room for one request, not for two."""
        daemon = self.start_daemon()
        prompts = [prompt(1, 100), prompt(2, 120)]
        flags = dict(samples=2, max_tokens=TOKENS, pool_bytes="200KiB")
        child = self.start_streaming(prompts, daemon, **flags)
        self.read_tokens(child, 20)
        daemon.kill()
        result = self.finish(child)
        self.assertEqual(result["sequences_peak"], 2)
        for [(tokens, _), (same, _)] in texts(result):
            self.assertEqual((len(tokens), tokens[:5]), (TOKENS, same[:5]))

    def test_a_gpu_that_the_daemon_has_lost(self):
        self.set_driver("copy=719")
        daemon = self.start_daemon()
        self.set_driver()
        prompts = [prompt(1, 100)]
        alone = texts(self.generate(prompts, max_tokens=8))
        # To be durable blocks are copied to HOST, and the first copy fails.
        stored = self.generate(prompts, daemon, max_tokens=8, flush="1s")
        self.assertEqual(texts(stored), alone)
        self.assertFalse(stored["prompts"][0]["durable"])
        daemon.wait_status(lambda _: daemon.tier("GPU").health.startswith("DEGRADED: lost"),
                           "the GPU is lost")
        again = self.generate(prompts, daemon, max_tokens=8)
        self.assertEqual(texts(again), alone)
        self.assertEqual(reused(again["prompts"][0]), 0)
        self.assertGreater(again["prompts"][0]["local_blocks"], 0)


class Refused(CudaWorkerTest):

    def refusal(self, daemon):
        done = subprocess.run(self.argv([prompt(1, 20)], daemon), capture_output=True, text=True,
                              timeout=harness.DEADLINE_SECONDS, env=environment())
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertIn(f"--gpu=cuda:{DEVICE} and --gpu-bytes", done.stderr)
        return done.stderr

    def test_a_daemon_without_a_gpu_tier(self):
        self.assertIn(f"no GPU tier for {DEVICE}", self.refusal(self.daemon(gpu=0)))

    def test_a_gpu_tier_that_is_emulated(self):
        self.assertIn("is no device's memory", self.refusal(self.daemon()))

    def test_another_gpu(self):
        self.set_driver("devices=2")
        self.assertIn(f"it is on {OTHER_DEVICE}", self.refusal(self.start_daemon(gpu="cuda:1")))


class Experiments(CudaWorkerTest):

    def test_restore(self):
        """Cold, in place on the GPU, from HOST, and from NVMe after a SIGKILL: counts, no times."""
        self.set_driver(f"bytes={16 << 30}")  # beside the tier a daemon leaves room to workers
        output = pathlib.Path(self.directory, "output")
        rows_file = pathlib.Path(self.directory, "rows")
        model = SMALL | dict(vocab_size=256)
        done = subprocess.run(
            [WORKER, "bench", "restore", "--device=cuda", self.model_flag(model),
             f"--larderd={harness.LARDERD}", f"--directory={self.directory}", f"--output={output}",
             f"--rows={rows_file}", "--chunk-tokens=32", "--prefix-tokens=200"],
            capture_output=True, text=True, timeout=2 * harness.DEADLINE_SECONDS, env=environment())
        self.assertEqual(done.returncode, 0, done.stderr)
        with open(output / "restore.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        # Whole passes, of 32 tokens each, so that a question is computed alike in all of them.
        lengths = [192, 96, 32]
        ways = ["cold", "GPU", "HOST", "NVMe"]
        self.assertEqual([(int(row["prefix tokens"]), row["from"]) for row in rows],
                         [(length, way) for length in lengths for way in ways])
        for row in rows:
            cached = 0 if row["from"] == "cold" else int(row["prefix tokens"])
            self.assertEqual(int(row["reused tokens"]), cached, row)
            moved = cached if row["from"] in ("HOST", "NVMe") else 0
            self.assertAlmostEqual(float(row["MiB read"]), moved / 16 * 2 / 1024, 2, row)
            self.assertEqual(row["same tokens"], "yes")
        figures = [json.loads(line)["name"] for line in rows_file.read_text().splitlines()]
        self.assertEqual(figures, [name + str(length) for length in lengths for name in (
            "gpu_ttft_over_cold_gpu_", "gpu_ttft_over_cold_host_", "gpu_restore_host_",
            "gpu_ttft_over_cold_nvme_", "gpu_restore_nvme_")])


if __name__ == "__main__":
    unittest.main()
