"""The worker's experiments on a small random model: what they claim is counted, nothing is timed."""

import csv
import json
import pathlib
import subprocess
import tempfile
import unittest
import xml.etree.ElementTree

from harness import LARDER_WORKER, LARDERD, environment

BENCH_SECONDS = 240
# Wide enough that restoring a prefix pays, small enough that computing it takes no second.
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 256,
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "hidden_act": "silu", "tie_word_embeddings": True,
}
BLOCK_TOKENS = 16
PREFIX_TOKENS = 432  # whole blocks before a question of 56 tokens and an answer of 16
QUESTION_TOKENS = 56
EXPERIMENTS = ["work", "prefix", "restore", "paging", "heads", "prefetch", "speculation", "sinks"]


class WorkerBench(unittest.TestCase):

    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="larder-")
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.output = self.folder / "output"
        self.config = self.folder / "small.json"
        self.config.write_text(json.dumps(CONFIG))

    def run_bench(self, *arguments, check=True, path=None):
        env = environment()
        if path is not None:
            env["PATH"] = path
        done = subprocess.run([LARDER_WORKER, "bench", *map(str, arguments)], capture_output=True,
                              text=True, timeout=BENCH_SECONDS, env=env)
        if check:
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        return done

    def measure(self, experiment, *arguments, **keywords):
        return self.run_bench(experiment, f"--random-weights={self.config}",
                              f"--larderd={LARDERD}", f"--directory={self.folder}",
                              f"--output={self.output}", *arguments, **keywords)

    def rows(self, name):
        with open(self.output / f"{name}.csv", encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def plot(self, name):
        """The text elements of an SVG, which must be well-formed."""
        root = xml.etree.ElementTree.parse(self.output / f"{name}.svg").getroot()
        return " ".join("".join(element.itertext())
                        for element in root.iter("{http://www.w3.org/2000/svg}text"))

    def column(self, rows, title, kind=int):
        return [kind(row[title]) for row in rows]

    # --- Counts --------------------------------------------------------------------------

    def test_work(self):
        self.measure("work")
        rows = {int(row["new tokens"]): row for row in self.rows("work")}
        self.assertEqual(set(rows), {10, 100, 1000})
        counted = {n: (int(row["K/V computed without"]), int(row["with kept"]))
                   for n, row in rows.items()}
        self.assertEqual(counted[10], (95, 15))
        for n, (without, kept) in counted.items():
            self.assertEqual((without, kept), (sum(range(5, 5 + n)), 5 + n))
        self.assertGreater(counted[1000][0] / counted[1000][1], 100)
        self.assertEqual({row["same tokens"] for row in rows.values()}, {"yes"})
        lengths = self.column(self.rows("work_latency"), "length tokens")
        self.assertEqual(lengths, sorted(set(lengths)))
        self.assertIn("sequence length (tokens)", self.plot("work_latency"))

    def test_prefix(self):
        self.measure("prefix")
        rows = self.rows("prefix")
        self.assertEqual(int(rows[-1]["document tokens"]), PREFIX_TOKENS)
        for row in rows:
            tokens = int(row["document tokens"])
            self.assertEqual(int(row["hit tokens"]), tokens)
            self.assertEqual(int(row["computed tokens"]), QUESTION_TOKENS)
            self.assertEqual(int(row["blocks saved"]), tokens // BLOCK_TOKENS)
            self.assertEqual(row["same tokens"], "yes")

    def test_restore(self):
        rows_file = self.folder / "rows"
        self.measure("restore", f"--rows={rows_file}")
        rows = self.rows("restore")
        self.assertEqual([row["from"] for row in rows], ["cold", "HOST", "NVMe"] * 3)
        for row in rows:
            prompt = int(row["prefix tokens"]) + QUESTION_TOKENS
            self.assertEqual(int(row["reused tokens"]) + int(row["computed tokens"]), prompt)
            self.assertEqual(row["same tokens"], "yes")
            if row["from"] == "cold":
                self.assertEqual(int(row["reused tokens"]), 0)
            else:
                self.assertEqual(int(row["reused tokens"]), int(row["prefix tokens"]))
        self.assertEqual(int(rows[0]["prefix tokens"]), PREFIX_TOKENS)
        figures = [json.loads(line) for line in rows_file.read_text().splitlines()]
        self.assertEqual([figure["name"] for figure in figures],
                         ["ttft_host_over_cold", "ttft_nvme_over_cold"])
        for figure in figures:
            self.assertEqual(set(figure), {"name", "value", "unit", "against", "ratio", "goal",
                                           "met"})
            self.assertEqual(figure["met"], figure["value"] <= float(figure["goal"].split()[1]))

    def test_prefetch(self):
        self.measure("prefetch")
        names = [row["prefetch"] for row in self.rows("prefetch")]
        self.assertEqual((names[0], names[-1]), ("none", "all in HOST"))

    def test_paging(self):
        self.measure("paging")
        contiguous, paged = self.rows("paging")
        self.assertEqual(contiguous["tokens"], paged["tokens"])
        self.assertEqual(int(contiguous["places taken"]), 50 * 2048)
        tokens, places = int(paged["tokens"]), int(paged["places taken"])
        self.assertLess(1 - tokens / places, 0.04)
        self.assertGreater(float(contiguous["waste at end %"]), 50)
        for row in self.rows("paging_forks"):
            prompt, length = (int(row["prompt tokens"]),
                              int(row["prompt tokens"]) + int(row["tokens written each"]))
            whole, all_blocks = prompt // BLOCK_TOKENS, -(-length // BLOCK_TOKENS)
            self.assertEqual(int(row["blocks"]), whole + 4 * (all_blocks - whole))
            self.assertEqual(int(row["without sharing"]), 4 * all_blocks)

    def test_heads(self):
        self.measure("heads")
        rows = self.rows("heads")
        self.assertEqual(self.column(rows, "bytes a token and layer"), [4096, 1024, 256, 576])

    def test_speculation(self):
        self.measure("speculation")
        rows = self.rows("speculation")
        plain = int(rows[0]["passes"])
        self.assertEqual(rows[0]["draft tokens"], "0")
        for row in rows:
            self.assertEqual(row["same tokens"], "yes")
            self.assertEqual(int(row["passes"]) + int(row["accepted"]), plain)
            if row["draft tokens"] != "0":
                # A greedy random model repeats itself, which an n-gram foretells.
                self.assertLess(int(row["passes"]), plain)
                self.assertGreater(int(row["rolled back"]), 0)
            self.assertEqual(int(row["forks"]) > 0, row["branches"] != "1")
        # The same on blocks of a larderd.
        leased = rows[-1]
        self.assertEqual([row["blocks"] for row in rows].count("leased"), 1)
        own = next(row for row in rows if row["draft tokens"] == leased["draft tokens"]
                   and row["branches"] == leased["branches"])
        for title in ("passes", "accepted", "rolled back", "forks"):
            self.assertEqual(leased[title], own[title])

    def test_sinks(self):
        text = self.folder / "text"
        text.write_bytes(pathlib.Path(__file__).read_bytes())
        self.measure("sinks", f"--text={text}")
        full, window, sinks = self.rows("sinks")
        for row in (full, window, sinks):
            for title in ("perplexity within context", "beyond it"):
                self.assertGreater(float(row[title]), 1)
                self.assertLess(float(row[title]), 1e6)
        all_blocks = 8 * CONFIG["max_position_embeddings"] // BLOCK_TOKENS
        self.assertEqual((int(full["blocks at most"]), int(full["blocks given back"])),
                         (all_blocks, 0))
        half, step = 256 // BLOCK_TOKENS, 128 // BLOCK_TOKENS
        for row in (window, sinks):
            self.assertEqual(int(row["blocks at most"]), half + step)
            self.assertEqual(int(row["blocks given back"]), all_blocks - half - step)
        # Another table, other numbers: the first block is there or is not.
        self.assertNotEqual(window["beyond it"], sinks["beyond it"])

    # --- The command ---------------------------------------------------------------------

    def test_help(self):
        text = self.run_bench("--help").stdout
        for word in [*EXPERIMENTS, "--larderd", "--output", "--model", "--random-weights"]:
            self.assertIn(word, text)

    def test_json(self):
        done = self.measure("paging", "--json")
        tables = [json.loads(line) for line in done.stdout.splitlines()]
        self.assertEqual([table["name"] for table in tables], ["paging", "paging_forks"])
        self.assertEqual(tables[0]["rows"], [list(row.values()) for row in self.rows("paging")])

    def test_without_gnuplot(self):
        bare = self.folder / "bin"
        bare.mkdir()
        done = self.measure("paging", path=str(bare))
        self.assertIn("gnuplot is not installed", done.stderr)
        self.assertEqual([path.name for path in self.output.glob("*.svg")], [])
        self.assertEqual(len(self.rows("paging")), 2)

    def test_what_is_not_allowed(self):
        model = f"--random-weights={self.config}"
        output = f"--output={self.output}"
        missing = self.folder / "missing"
        cases = [
            (["typing", model, output], ["EXPERIMENT", '"typing"', "work, prefix"]),
            (["work", output], ["--model", "--random-weights"]),
            (["work", model], ["--output"]),
            (["work", f"--random-weights={missing}", output], ["--random-weights", str(missing)]),
            (["restore", model, output], ["--larderd", "not given"]),
            (["restore", model, output, f"--larderd={missing}"], ["--larderd", str(missing)]),
            (["restore", model, output, f"--larderd={LARDERD}", f"--directory={missing}"],
             ["--directory", str(missing)]),
            (["work", model, output, f"--text={missing}"], ["--text", str(missing)]),
            (["work", model, f"--output={self.config}"], [str(self.config)]),
            (["work", model, output, "--block-tokens=0"], ["--block-tokens", '"0"', "1 to 1024"]),
        ]
        for arguments, parts in cases:
            with self.subTest(arguments):
                done = self.run_bench(*arguments, check=False)
                self.assertEqual(done.returncode, 2, done.stdout + done.stderr)
                for part in parts:
                    self.assertIn(part, done.stderr)


if __name__ == "__main__":
    unittest.main()
