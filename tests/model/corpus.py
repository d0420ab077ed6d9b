"""The text: Jane Austen's six novels, as Debian's package r-cran-janeaustenr ships them.

The novels are in the public domain, the package is under the MIT licence. Text is bytes: a token is
a byte of UTF-8, and byte 0 stands before each chapter, as begin-of-text. Every twentieth chapter is
held out from training.
"""

import pathlib
import re
import struct
import subprocess
import tempfile
import zlib

PACKAGE = "r-cran-janeaustenr"
DATA = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
CHAPTER = re.compile(rb"chapter [0-9ivxl]+", re.IGNORECASE)
VOLUME = re.compile(rb"volume [ivx]+", re.IGNORECASE)
HELD_OUT_EVERY = 20


def split():
    """(training text, held-out text), both bytes."""
    train, held_out = [], []
    for number, chapter in enumerate(chapters()):
        part = held_out if number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else train
        part.append(b"\0" + chapter)
    return b"".join(train), b"".join(held_out)


def chapters():
    """The chapters of all novels, one paragraph a line and a blank line between paragraphs."""
    found = []
    for novel in _novels(_package_data()):
        novel = [line for line in novel if not VOLUME.fullmatch(line)]
        starts = [i for i, line in enumerate(novel) if CHAPTER.fullmatch(line)] + [len(novel)]
        for start, end in zip(starts, starts[1:]):
            paragraphs = b"\n".join(novel[start:end]).strip().split(b"\n\n")
            lines = [b" ".join(p.split()).replace(b"_", b"") for p in paragraphs]
            found.append(b"\n\n".join(line for line in lines if line) + b"\n")
    return found


def _package_data():
    """The package's data file. The package is only unpacked: installing it would bring R along."""
    installed = pathlib.Path("/") / DATA
    if installed.exists():
        return installed.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        # As root, apt would download as a user who may not write here, and warn.
        options = ["-qq", "-o", "APT::Sandbox::User=root"]
        subprocess.run(["apt-get", *options, "download", PACKAGE], cwd=folder, check=True)
        (package,) = pathlib.Path(folder).glob("*.deb")
        subprocess.run(["dpkg", "-x", package.name, "."], cwd=folder, check=True)
        return (pathlib.Path(folder) / DATA).read_bytes()


def _novels(data):
    """Each novel as a list of lines.

    The file is a row of R objects, each a 4-byte length and a zlib stream of R's serialization
    format 3 (R Internals, section 1.8): "X\\n", three versions, the length and name of the
    encoding, then a vector of strings, each of flags, a length and bytes.
    """
    while data:
        stream = zlib.decompressobj()
        vector = stream.decompress(data[4:])
        data = stream.unused_data
        (encoding_bytes,) = struct.unpack_from(">i", vector, 14)
        offset = 18 + encoding_bytes
        flags, lines = struct.unpack_from(">ii", vector, offset)
        assert vector[:2] == b"X\n" and flags & 255 == 16, "not a vector of strings"
        offset += 8
        novel = []
        for _ in range(lines):
            (length,) = struct.unpack_from(">i", vector, offset + 4)
            novel.append(vector[offset + 8 : offset + 8 + length])
            offset += 8 + length
        yield novel
