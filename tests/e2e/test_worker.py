"""larder-worker with the cache gives the tokens that it gives without, whatever happens to the cache.

The models are tiny and random; every process draws the same weights from the same seed.
"""

import fcntl
import itertools
import json
import pathlib
import random
import subprocess
import unittest

import harness
from harness import LARDER_WORKER, SLOW_LARDERD, environment

VOCAB = 512
CONTEXT = 1024
TINY = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", hidden_size=64,
    intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, vocab_size=VOCAB, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5,
    rope_theta=10000.0, tie_word_embeddings=True)
QWEN = TINY | dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2")
# Little to compute and much to keep: 4 MiB a block of 16 tokens in f32.
WIDE = TINY | dict(num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=32,
                   head_dim=64)
MODELS = harness.stubs.SOURCE / "tests" / "model"
FLUSH = "60s"
# These models are computed so fast that no drive is waited for unless a test says so.
PATIENT = dict(restore_patience=1000)


def prompt(seed, tokens, prefix=(), vocab=VOCAB):
    source = random.Random(seed)
    return list(prefix) + [source.randrange(vocab) for _ in range(tokens - len(prefix))]


def reused(stats):
    return sum(stats["reused_tokens"].values())


def texts(result):
    """What is to be the same: every sample's tokens and why it ended."""
    return [[(c["tokens"], c["finish"]) for c in each["completions"]]
            for each in result["prompts"]]


class WorkerTest(harness.LarderTest):

    def setUp(self):
        super().setUp()
        self.configs = {}

    def model_flag(self, model):
        """`model`: the directory of a model, or the config.json of one with random weights."""
        if isinstance(model, dict):
            return f"--random-weights={self.config(model)}"
        return f"--model={model}"

    def config(self, model):
        name = json.dumps(model, sort_keys=True)
        if name not in self.configs:
            path = pathlib.Path(self.directory, f"config{len(self.configs)}.json")
            path.write_text(name)
            self.configs[name] = str(path)
        return self.configs[name]

    def argv(self, prompts, daemon=None, model=TINY, **flags):
        argv = [LARDER_WORKER, "generate", "--json", self.model_flag(model)]
        argv += [f"--tokens={','.join(map(str, each))}" for each in prompts]
        if daemon:
            # A sanitizer's daemon on a busy machine is slow, and none of these tests is about that.
            argv += [f"--cache={daemon.address}", "--cache-timeout=30s"]
        argv += [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
        return argv

    def generate(self, prompts, daemon=None, **flags):
        done = subprocess.run(self.argv(prompts, daemon, **flags), capture_output=True, text=True,
                              timeout=harness.DEADLINE_SECONDS * 2, env=environment(),
                              stdin=subprocess.DEVNULL)
        self.assertEqual(done.returncode, 0, done.stderr)
        return json.loads(done.stdout) | dict(notices=done.stderr)

    def start(self, prompts, daemon=None, **flags):
        child = subprocess.Popen(self.argv(prompts, daemon, **flags), stdin=subprocess.DEVNULL,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                 env=environment())
        self.addCleanup(child.wait)
        self.addCleanup(child.kill)
        return child

    def start_streaming(self, prompts, daemon, **flags):
        """A worker that cannot be more than a page of output ahead of the test."""
        child = self.start(prompts, daemon, stream="true", **flags)
        fcntl.fcntl(child.stdout, fcntl.F_SETPIPE_SZ, 4096)
        return child

    def read_tokens(self, child, count):
        for _ in range(count):
            self.assertIn("token", json.loads(child.stdout.readline()))

    def finish(self, child):
        out, err = child.communicate(timeout=harness.DEADLINE_SECONDS * 2)
        self.assertEqual(child.returncode, 0, err)
        return json.loads(out.splitlines()[-1]) | dict(notices=err)

    def assert_warm(self, result, prompts, block_tokens=16):
        """Every whole block was reused; where that is all of a prompt, all but its last token."""
        for stats, tokens in zip(result["prompts"], prompts):
            whole = len(tokens) // block_tokens * block_tokens
            self.assertEqual(reused(stats), whole - (whole == len(tokens)), stats)
            self.assertEqual(stats["prompt_tokens_computed"], len(tokens) - reused(stats))


class SameTokens(WorkerTest):

    def test_for_every_layout_and_chunk(self):
        prompts = [prompt(i, length)
                   for i, length in enumerate((1, 15, 16, 17, 48, 100, 256, 333))]
        for model, dtype in itertools.product((TINY, QWEN),
                                              ("bf16", "f16", "f32", "f8_e4m3", "i8")):
            # Tiers this small are four slabs, one for each of three models and one to spare: with
            # more, models take slabs from each other and forget what is asked for here.
            daemon = self.daemon(gpu=256, host=512)
            alone = self.generate(prompts, model=model, kv_dtype=dtype, max_tokens=24)
            for block_tokens in (1, 16, 24):
                with self.subTest(dtype=dtype, block_tokens=block_tokens):
                    flags = dict(model=model, kv_dtype=dtype, block_tokens=block_tokens,
                                 max_tokens=24)
                    cold = self.generate(prompts, daemon, chunk_tokens=37, **flags)
                    self.assertEqual([reused(s) for s in cold["prompts"]], [0] * len(prompts))
                    warm = self.generate(prompts, daemon, chunk_tokens=7, max_batch=3, **flags)
                    self.assert_warm(warm, prompts, block_tokens)
                    self.assertEqual(texts(cold), texts(alone))
                    self.assertEqual(texts(warm), texts(alone))
            self.assert_nothing_held(daemon)
            daemon.kill()

    def test_for_models_from_files(self):
        daemon = self.daemon()
        prompts = [prompt(i, length, vocab=256) for i, length in enumerate((47, 200, 330))]
        for name in ("tiny_llama3", "tiny_qwen2", "austen"):
            with self.subTest(model=name):
                alone = self.generate(prompts, model=MODELS / name)
                cold = self.generate(prompts, daemon, model=MODELS / name, chunk_tokens=50)
                warm = self.generate(prompts, daemon, model=MODELS / name)
                self.assertEqual([reused(s) for s in cold["prompts"]], [0] * len(prompts))
                self.assert_warm(warm, prompts)
                self.assertEqual(texts(cold), texts(alone))
                self.assertEqual(texts(warm), texts(alone))

    def test_a_text_is_its_bytes(self):
        text = (harness.stubs.SOURCE / "deploy" / "demo_document.txt").read_bytes()[:500]
        path = pathlib.Path(self.directory, "prompt.txt")
        path.write_bytes(text)
        model = MODELS / "austen"
        expected = self.generate([list(text)], model=model)
        argv = [LARDER_WORKER, "generate", "--json", f"--model={model}", f"--prompt-file={path}",
                f"--prompt={text.decode()}"]
        done = subprocess.run(argv, capture_output=True, check=True, timeout=60)
        self.assertEqual(texts(json.loads(done.stdout)), texts(expected) * 2)
        plain = subprocess.run([arg for arg in argv if arg != "--json"][:-1], capture_output=True,
                               check=True, timeout=60).stdout
        self.assertEqual(list(plain), expected["prompts"][0]["completions"][0]["tokens"] + [10])

    def test_what_was_generated_is_reused_as_a_prompt(self):
        daemon = self.daemon()
        first = self.generate([prompt(1, 40)], daemon, max_tokens=60)
        turn = prompt(1, 40) + first["prompts"][0]["completions"][0]["tokens"]
        chat = [prompt(2, 120, turn)]
        second = self.generate(chat, daemon)
        # The last token's K/V were not computed: 99 tokens are 6 blocks.
        self.assertEqual(reused(second["prompts"][0]), 96)
        self.assertEqual(texts(second), texts(self.generate(chat)))

    def test_for_samples_of_one_prompt(self):
        daemon = self.daemon()
        prompts = [prompt(1, 50), prompt(2, 64)]
        flags = dict(samples=4, temperature=1.0, seed=7, max_tokens=40)
        alone = self.generate(prompts, **flags)
        for completions in texts(alone):
            self.assertEqual(len({tuple(tokens) for tokens, _ in completions}), 4)
        for _ in range(2):
            self.assertEqual(texts(self.generate(prompts, daemon, **flags)), texts(alone))
        # 50 + 39 tokens: 3 shared blocks and 2 of each sample; 64 + 39: 4 and 2.
        put = self.daemon_put_blocks(daemon)
        self.assertEqual(put, (3 + 4 * 2) + (4 + 4 * 2))
        self.assert_nothing_held(daemon)

    def daemon_put_blocks(self, daemon):
        """Blocks of the tree, wherever they are."""
        return max(daemon.tier("GPU").blocks, daemon.tier("HOST").blocks)

    def test_in_any_batch(self):
        prompts = [prompt(i, 20 + 31 * i) for i in range(7)]
        alone = [texts(self.generate([each]))[0] for each in prompts]
        for max_batch, chunk_tokens in ((1, 256), (3, 16), (7, 64)):
            together = self.generate(prompts, max_batch=max_batch, chunk_tokens=chunk_tokens)
            self.assertEqual(texts(together), alone)
            self.assertLessEqual(together["sequences_peak"], max_batch)
        self.assertGreater(together["sequences_peak"], 2)

    def test_of_a_prefix_that_other_requests_of_the_batch_compute(self):
        """A prompt is looked up when its turn comes: the first one's blocks are there by then."""
        daemon = self.daemon()
        document = prompt(0, 160)
        prompts = [prompt(i, 200, document) for i in range(1, 4)]
        result = self.generate(prompts, daemon, chunk_tokens=32)
        self.assertEqual([reused(s) for s in result["prompts"]], [0, 160, 160])
        self.assertEqual(texts(result), texts(self.generate(prompts)))

    def test_when_several_workers_share(self):
        daemon = self.daemon(gpu=16, host=32, nvme=256)
        document = prompt(0, 300)
        questions = [[prompt(10 * i + k, 330, document) for k in range(3)] for i in range(4)]
        alone = [texts(self.generate(prompts)) for prompts in questions]
        for _ in range(2):
            children = [self.start(prompts, daemon, chunk_tokens=64) for prompts in questions]
            self.assertEqual([texts(self.finish(child)) for child in children], alone)
        self.assert_nothing_held(daemon)


class Losses(WorkerTest):

    def test_eviction_and_restart(self):
        daemon = self.daemon()
        prompts = [prompt(1, 333), prompt(2, 160)]
        alone = texts(self.generate(prompts))
        stored = self.generate(prompts, daemon, flush=FLUSH)
        self.assertTrue(all(stats["durable"] for stats in stored["prompts"]))
        for lose in (lambda: (daemon.evict("GPU"), daemon.evict("HOST")), daemon.restart):
            lose()
            restored = self.generate(prompts, daemon, **PATIENT)
            self.assertEqual(texts(restored), alone)
            self.assert_warm(restored, prompts)
            for stats in restored["prompts"]:
                self.assertEqual(stats["reused_tokens"]["nvme"], reused(stats))
        self.assert_nothing_held(daemon)

    def test_damaged_blocks_are_computed(self):
        daemon = self.daemon()
        prompts = [prompt(1, 333)]
        stored = self.generate(prompts, daemon, flush=FLUSH)
        daemon.kill()
        daemon.flip_payloads()
        daemon.start()
        again = self.generate(prompts, daemon)
        self.assertEqual(texts(again), texts(stored))
        self.assertEqual(again["prompts"][0]["given_up_blocks"], 333 // 16)
        self.assertEqual(reused(again["prompts"][0]), 0)

    def test_full_tiers(self):
        """Blocks of 128 KiB, of which HOST holds eight: the rest is the worker's own."""
        model = TINY | dict(num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=4,
                            head_dim=32)
        daemon = self.daemon(gpu=0, host=16, nvme=0)
        prompts = [prompt(1, 300)]
        flags = dict(model=model, kv_dtype="f32", samples=3, temperature=1.0)
        result = self.generate(prompts, daemon, **flags)
        self.assertEqual(texts(result), texts(self.generate(prompts, **flags)))
        self.assertGreater(result["prompts"][0]["published_blocks"], 0)
        self.assertGreater(result["prompts"][0]["local_blocks"], 0)
        self.assert_nothing_held(daemon)

    def test_no_daemon(self):
        prompts = [prompt(1, 100)]
        nobody = harness.Daemon(self.directory)
        result = self.generate(prompts, nobody)
        self.assertEqual(texts(result), texts(self.generate(prompts)))
        self.assertIn("computing without the cache: no larderd answers", result["notices"])

    def test_daemon_killed_while_generating(self):
        daemon = self.daemon()
        prompts = [prompt(1, 100), prompt(2, 120)]
        flags = dict(samples=2, temperature=1.0, max_tokens=400)
        alone = texts(self.generate(prompts, **flags))
        self.generate(prompts, daemon, **(flags | dict(max_tokens=1)))
        child = self.start_streaming(prompts, daemon, **flags)
        self.read_tokens(child, 50)
        daemon.kill()
        result = self.finish(child)
        self.assertEqual(texts(result), alone)
        self.assertIn("computing without the cache", result["notices"])
        for stats in result["prompts"]:
            self.assertGreater(reused(stats), 0)
            self.assertGreater(stats["local_blocks"], 0)

    def test_later_requests_find_the_restarted_daemon(self):
        daemon = self.daemon()
        prompts = [prompt(1, 100), prompt(2, 120)]
        flags = dict(max_batch=1, max_tokens=400)
        alone = texts(self.generate(prompts, **flags))
        child = self.start_streaming(prompts, daemon, **flags)
        self.read_tokens(child, 50)
        daemon.restart()
        result = self.finish(child)
        self.assertEqual(texts(result), alone)
        self.assertIn("using the cache again", result["notices"])
        lost, found = result["prompts"]
        self.assertGreater(lost["local_blocks"], 0)
        self.assertEqual((found["published_blocks"], found["local_blocks"]), (519 // 16, 0))
        self.assert_nothing_held(daemon)

    def test_daemon_that_stops_is_left(self):
        daemon = self.daemon()
        prompts = [prompt(1, 100)]
        child = self.start_streaming(prompts, daemon, max_tokens=400)
        self.read_tokens(child, 50)
        daemon.process.signal(harness.signal.SIGTERM)
        daemon.process.wait_for_line("draining")
        result = self.finish(child)
        self.assertEqual(texts(result), texts(self.generate(prompts, max_tokens=400)))
        self.assertEqual(daemon.process.wait(), 0)
        self.assertIn("the daemon is stopping", result["notices"])


class BreakEven(WorkerTest):

    def test_a_slow_drive_is_not_waited_for(self):
        """Until the daemon knows how slow it is, a worker gives up; then the match is cut."""
        daemon = self.daemon(gpu=0, host=2048, nvme=2048, program=SLOW_LARDERD)
        prompts = [prompt(1, 160)]
        flags = dict(model=WIDE, kv_dtype="f32", max_tokens=4)
        alone = self.generate(prompts, daemon, flush=FLUSH, **flags)
        for _ in range(10):
            daemon.evict("HOST")
            moved = self.restored_blocks(daemon)
            result = self.generate(prompts, daemon, **flags)
            self.assertEqual(texts(result), texts(alone))
            stats = result["prompts"][0]
            daemon.wait_idle()
            if stats["cut_blocks"]:
                break
        self.assertEqual((stats["cut_blocks"], reused(stats)), (10, 0))
        self.assertEqual(self.restored_blocks(daemon), moved)

    def test_a_fast_drive_is(self):
        """256 KiB a block, which take as long to compute as 4 MiB: no busy machine is in doubt."""
        daemon = self.daemon(gpu=0, host=2048, nvme=2048)
        prompts = [prompt(1, 160)]
        flags = dict(model=WIDE | dict(num_key_value_heads=2), kv_dtype="f32", max_tokens=4)
        alone = self.generate(prompts, daemon, flush=FLUSH, **flags)
        daemon.evict("HOST")
        result = self.generate(prompts, daemon, **flags, **PATIENT)
        self.assertEqual(texts(result), texts(alone))
        stats = result["prompts"][0]
        self.assertLessEqual(stats["restore_estimate_ms"], stats["compute_estimate_ms"])
        self.assert_warm(result, prompts)

    def restored_blocks(self, daemon):
        nvme, host = harness.types.TIER_NVME, harness.types.TIER_HOST
        return next(hop.done for hop in daemon.status().moves
                    if (getattr(hop, "from"), hop.to) == (nvme, host))


class BadValues(WorkerTest):

    def refuses(self, *parts, argv):
        done = subprocess.run(argv, capture_output=True, text=True, env=environment(),
                              timeout=harness.DEADLINE_SECONDS)
        self.assertEqual(done.returncode, 2, done.stderr)
        for part in parts:
            self.assertIn(part, done.stdout + done.stderr)

    def test_are_named(self):
        one = [prompt(1, 10)]
        for parts, argv in (
                (("prompt", "1025", "1 to 1024"), self.argv([prompt(1, CONTEXT + 1)])),
                (("512", "0 to 511"), self.argv([[512]])),
                (("samples", "9", "1 to 8"), self.argv(one, samples=9)),
                (("--kv-dtype", "int8", "f8_e4m3, i8"), self.argv(one, kv_dtype="int8")),
                (("--chunk-tokens", "0", "1 to"), self.argv(one, chunk_tokens=0)),
                (("--pool-bytes", "1KB"), self.argv(one, pool_bytes="1KB")),
                (("pool_bytes",), self.argv([prompt(1, 500)], pool_bytes="64KiB")),
                (("--temperature", "-1", "0 to 100"), self.argv(one, temperature=-1)),
                (("must be unix:PATH",), self.argv(one) + ["--cache=nowhere"]),
                (("--prompt", "512 tokens"), self.argv(one) + ["--prompt=text"]),
                (("--model", "/nonexistent"),
                 [LARDER_WORKER, "generate", "--model=/nonexistent", "--tokens=1"]),
                (("--model", "--random-weights"), [LARDER_WORKER, "generate", "--tokens=1"]),
                (("--prompt", "--tokens"),
                 [LARDER_WORKER, "generate", f"--random-weights={self.config(TINY)}"])):
            with self.subTest(parts=parts):
                self.refuses(*parts, argv=argv)

    def test_the_longest_prompt_gives_a_token(self):
        result = self.generate([prompt(1, CONTEXT)])
        self.assertEqual([(len(tokens), why) for tokens, why in texts(result)[0]],
                         [(1, "context")])


if __name__ == "__main__":
    unittest.main()
