"""The wire contract in Python, generated from proto/ when the tests start.

python3-grpc-tools of the distributions is older than their protoc, so this calls protoc and
grpc_python_plugin itself, once a test run, into a temporary directory. Worker processes find
it through TEST_STUBS.
"""

import atexit
import importlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

SOURCE = pathlib.Path(__file__).resolve().parents[2]
PROTO = SOURCE / "proto"
NAMES = ("types", "kv_cache", "inspector")


def _generate():
    directory = tempfile.mkdtemp(prefix="larder-stubs-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    plugin = shutil.which("grpc_python_plugin")
    if plugin is None:
        raise RuntimeError("grpc_python_plugin is not in PATH; run deploy/setup.sh")
    subprocess.run(
        ["protoc", f"-I{PROTO}", f"--python_out={directory}", f"--grpc_out={directory}",
         f"--plugin=protoc-gen-grpc={plugin}"]
        + [str(PROTO / "larder" / "v1" / f"{name}.proto") for name in NAMES],
        check=True)
    return directory


if "TEST_STUBS" not in os.environ:
    os.environ["TEST_STUBS"] = _generate()
sys.path.insert(0, os.environ["TEST_STUBS"])

types = importlib.import_module("larder.v1.types_pb2")
kv_cache = importlib.import_module("larder.v1.kv_cache_pb2")
kv_cache_grpc = importlib.import_module("larder.v1.kv_cache_pb2_grpc")
inspector = importlib.import_module("larder.v1.inspector_pb2")
inspector_grpc = importlib.import_module("larder.v1.inspector_pb2_grpc")
