"""The command line against a GPU tier in a device's memory, which a driver library plays.

LD_LIBRARY_PATH finds that library (tests/storage/fake_cuda.h), for larderd and larder alike.
"""

import os
import re
import unittest

from harness import LarderTest, run_larder

TEXT = "a prompt of some blocks. " * 32
CUDA = ["--gpu=cuda", "--gpu-bytes=8MiB", "--gpu-reserve=1MiB"]


class CudaTest(LarderTest):
    def larder(self, command, *flags):
        # Letters are tokens: whole blocks of 16.
        text = TEXT[:len(TEXT) // 16 * 16]
        return run_larder(command, "--address", self.address, "--model", "demo/llama",
                          "--text", text, *flags)

    def start(self, **options):
        daemon = self.daemon(gpu=0, flags=CUDA, **options)
        self.address = daemon.address
        return daemon

    def test_blocks_go_through_all_tiers_and_come_back(self):
        daemon = self.start()
        self.assertEqual(daemon.tier("GPU").backend, "cuda")
        put = self.larder("put", "--fill", "--flush")  # the CPU cannot write there: over the wire
        blocks = len(TEXT) // 16
        self.assertIn(f"put {blocks} of {blocks}", put.stdout)
        self.assertRegex(self.larder("lookup").stdout, "(?m)^HOST ")
        self.larder("prefetch", "--tier", "gpu")
        self.assertRegex(self.larder("lookup").stdout, "(?m)^GPU ")
        self.assertEqual(daemon.tier("GPU").blocks, blocks)
        got = self.larder("get", "--verify", "--output", os.devnull)
        self.assertRegex(got.stderr, r"\b0 bytes wrong")
        daemon.restart()
        self.assertRegex(self.larder("lookup").stdout, "(?m)^NVME ")
        self.larder("prefetch", "--tier", "gpu")
        daemon.evict("HOST")  # what is read now is in the device's memory only
        got = self.larder("get", "--verify", "--output", os.devnull)
        self.assertRegex(got.stderr, r"\b0 bytes wrong")

    def test_a_missing_device_costs_its_tier_only(self):
        os.environ["FAKE_CUDA"] = "cuInit=803"
        self.addCleanup(os.environ.pop, "FAKE_CUDA")
        daemon = self.start()
        self.assertTrue(re.search(r"GPU none: cuInit: .*\(CUDA 803\)", daemon.process.output()))
        self.assertIn("CUDA 803", daemon.tier("GPU").health)
        self.larder("put", "--fill")
        got = self.larder("get", "--verify", "--output", os.devnull)
        self.assertRegex(got.stderr, r"\b0 bytes wrong")


if __name__ == "__main__":
    unittest.main()
