"""Reads and writes safetensors files, and maps torch's dtypes to theirs.

A file is an 8-byte little-endian header length N, N bytes of JSON that give each tensor's dtype,
shape and [begin, end) in the bytes that follow, and those bytes, little-endian and row-major.
"""

import json
import struct

import torch

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def write(path, tensors):
    """Writes `tensors` (name -> tensor) with their own dtypes, in the order given."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, begin = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        end = begin + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # The tensors begin at a multiple of 8.
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            # numpy has no bfloat16: the bytes travel as 16- or 32-bit integers.
            bits = torch.int16 if tensor.element_size() == 2 else torch.int32
            file.write(tensor.detach().cpu().contiguous().view(bits).numpy().tobytes())


def read(path):
    """The tensors of a file as name -> tensor, with the dtypes of the file."""
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        data = file.read()
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        flat = torch.frombuffer(bytearray(data[begin:end]), dtype=DTYPES[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"])
    return tensors
