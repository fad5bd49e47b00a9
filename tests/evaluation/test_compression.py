"""gzip and xz see the same bytes as the model, and their sizes equal the sizes of the real tools' formats."""

import doctest
import gzip
import lzma
import shutil
import subprocess

import pytest

from transformer.evaluation import compression
from transformer.evaluation.compression import compressed_bits_per_byte

TEXTS = ["import os\n" * 50, "é" * 300, "".join(chr(97 + i * i % 26) for i in range(2000))]


def test_decompresses_to_the_texts_at_the_stated_size():
    data = "".join(TEXTS).encode()
    scores = compressed_bits_per_byte(iter(TEXTS))
    assert scores["gzip"] * len(data) / 8 == pytest.approx(len(gzip.compress(data, 9)))
    assert scores["xz"] * len(data) / 8 == pytest.approx(len(lzma.compress(data)))
    assert 0 < scores["xz"] < 8


@pytest.mark.skipif(not shutil.which("gzip"), reason="needs the gzip program")
def test_the_gzip_program_agrees():
    data = "".join(TEXTS).encode()
    size = len(subprocess.run(["gzip", "-9", "-n"], input=data, capture_output=True, check=True).stdout)
    assert compressed_bits_per_byte(TEXTS)["gzip"] == pytest.approx(8 * size / len(data), rel=0.02)


@pytest.mark.parametrize("most", [1, 100, 553, 1150, 3000])
def test_of_a_long_text_the_first_bytes_are_compared(most):
    data, read = "".join(TEXTS).encode(), []
    scores = compressed_bits_per_byte((read.append(text) or text for text in TEXTS), most)
    kept = data[:most]
    assert scores["bytes"] == len(kept)
    assert scores["gzip"] * len(kept) / 8 == pytest.approx(len(gzip.compress(kept, 9)))
    assert scores["xz"] * len(kept) / 8 == pytest.approx(len(lzma.compress(kept)))
    assert len("".join(read[:-1]).encode()) < most, "no more is read than is needed"


def test_docstring_examples():
    assert doctest.testmod(compression).failed == 0


def test_no_text_is_refused():
    with pytest.raises(ValueError, match="at least one byte"):
        compressed_bits_per_byte([""])
