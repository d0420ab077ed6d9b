"""larder size: what a model's K/V take, and what the tiers would hold. No daemon runs."""

import json
import os
import tempfile
import unittest

import harness

LLAMA3_8B = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 8192, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "vocab_size": 128256}


class Size(unittest.TestCase):

    def size(self, *flags):
        return json.loads(harness.run_larder("size", "--json", *flags).stdout)

    def config(self, content):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        path = os.path.join(folder.name, "config.json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump(content, file)
        return path

    def test_flags_and_config_agree_on_llama_3_8b(self):
        by_flags = self.size("--layers=32", "--kv-heads=8", "--head-dim=128", "--heads=32",
                             "--params=8030261248")
        by_config = self.size("--model", self.config(LLAMA3_8B))
        self.assertEqual(by_flags, by_config)
        self.assertEqual(by_config["bytes_per_token"], 131_072)
        self.assertEqual(by_config["bytes_per_token_layer"], 4096)
        self.assertEqual(by_config["bytes_per_block"], 2 << 20)
        self.assertEqual(by_config["bytes"], 1 << 30)
        self.assertEqual(by_config["weights_bytes"], 2 * 8_030_261_248)
        self.assertEqual({row["name"]: row["bytes_per_token"] for row in by_config["heads"]},
                         {"MHA": 524_288, "GQA": 131_072, "MQA": 16_384, "MLA": 36_864})

    def test_a_flag_wins_over_the_config(self):
        changed = self.size("--model", self.config(LLAMA3_8B), "--dtype=f8_e4m3",
                            "--block-tokens=64")
        # 32 layers of 8 keys and 8 values, each with a scale of four bytes.
        self.assertEqual(changed["bytes_per_token"], 65_536 + 2048)
        self.assertEqual(changed["bytes_per_block"], 64 * (65_536 + 2048))
        # The weights stay what the config says they are.
        self.assertEqual(changed["weights_bytes"], 2 * 8_030_261_248)

    def test_shards(self):
        sizes = self.size("--model", self.config(LLAMA3_8B), "--shards=4", "--gpu-bytes=16GiB",
                          "--host-bytes=64GiB")
        self.assertEqual(sizes["bytes_per_block"], 2 << 20)
        self.assertEqual(sizes["bytes_per_block_rank"], 512 << 10)
        self.assertEqual(sizes["bytes_per_token_rank"], 32_768)
        # 16 GiB in each of four GPUs hold what 64 GiB in one place do.
        self.assertEqual([tier["blocks"] for tier in sizes["tiers"]], [32_768, 32_768])
        self.assertEqual(sizes, self.size("--model", self.config(LLAMA3_8B), "--gpu-bytes=16GiB",
                                          "--host-bytes=64GiB", "--tensor-parallel=4"))
        # Every rank of an MLA model holds the whole latent.
        mla = self.size("--layers=32", "--mla-latent-dim=512", "--mla-rope-dim=64", "--shards=3")
        self.assertEqual(mla["bytes_per_block_rank"], 32 * 16 * 576 * 2)
        self.assertEqual(mla["bytes_per_block"], 3 * mla["bytes_per_block_rank"])

    def test_tiers(self):
        tiers = self.size("--model", self.config(LLAMA3_8B), "--gpu-bytes=64GiB",
                          "--nvme-bytes=1TiB")["tiers"]
        self.assertEqual(tiers, [
            {"tier": "GPU", "bytes": 64 << 30, "blocks": 32_768, "tokens": 524_288},
            {"tier": "NVME", "bytes": 1 << 40, "blocks": 524_288, "tokens": 8_388_608}])

    def test_bad_values_name_key_value_and_bound(self):
        for flags, *parts in [
                ((), "--layers", "0", "1 to 1024"),
                (("--layers=2", "--kv-heads=1"), "--head-dim", "0", "1 to 4096"),
                (("--layers=1025",), "--layers", "1025", "1 to 1024"),
                (("--layers=1", "--kv-heads=1", "--head-dim=1", "--host-bytes=3x"),
                 "--host-bytes", "3x"),
                (("--layers=1", "--kv-heads=1", "--head-dim=1", "--params=many"),
                 "--params", "many"),
                (("--layers=1024", "--kv-heads=1024", "--head-dim=4096"),
                 "--block-tokens", "16", "1073741824"),
                (("--model", self.config({"num_hidden_layers": "two"})),
                 "--model", "num_hidden_layers", "two", "1 to 1024"),
                (("--model", "/does/not/exist"), "--model", "/does/not/exist")]:
            done = harness.run_larder("size", *flags, check=False)
            self.assertEqual(done.returncode, 2, flags)
            for part in parts:
                self.assertIn(part, done.stderr, flags)


if __name__ == "__main__":
    unittest.main()
