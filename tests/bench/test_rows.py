"""Rows on the disk: what is written is read again, and damage is always found."""

import math
import random

import numpy as np
import pytest

from hypergrad.bench.rows import (
    CorruptRowError,
    append_row,
    move_incomplete_line,
    parse_line,
    read_rows,
    to_line,
)

ROW = {
    "method": "Neumann, 20 terms", "seed": 3, "error": 1.25e-9, "trusted": True,
    "curve": [1.0, 0.5, 0.25], "settings": {"rate": 0.1}, "note": None, "é": "ü",
}  # fmt: skip


def test_a_row_is_read_as_it_was_written():
    assert parse_line(to_line(ROW).rstrip("\n"), "here") == ROW


def test_numbers_of_numpy_become_json_and_what_is_not_finite_becomes_null():
    row = {"a": np.float32(0.5), "b": np.arange(2), "c": math.nan, "d": [math.inf, 1.0]}
    read = parse_line(to_line(row).rstrip("\n"), "here")
    assert read == {"a": 0.5, "b": [0, 1], "c": None, "d": [None, 1.0]}


def test_each_of_a_thousand_flipped_bits_is_found(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = "".join(to_line(ROW | {"seed": seed}) for seed in range(4)).encode()
    generator = random.Random(0)
    for _ in range(1000):
        content = bytearray(lines)
        bit = generator.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(CorruptRowError):
            read_rows(path)


@pytest.mark.parametrize(
    "line",
    ["", "{}", "[1]", '{"a": NaN, "sha256": ""}', to_line(ROW).replace(", ", ",", 1)],
    ids=["empty", "no checksum", "no object", "not strict", "not canonical"],
)
def test_lines_that_were_not_written_by_us_are_refused(line):
    with pytest.raises(CorruptRowError):
        parse_line(line.rstrip("\n"), "here")


def test_a_line_that_was_cut_off_is_an_error_and_is_kept_aside(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_row(path, ROW)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])
    with pytest.raises(CorruptRowError, match="line 2"):
        read_rows(path)
    move_incomplete_line(path)
    assert path.read_bytes() == whole
    assert path.with_name("rows.jsonl.cut").read_bytes() == whole[:40] + b"\n"


def test_a_line_that_was_cut_off_is_not_written_through_a_link(tmp_path):
    path, other = tmp_path / "rows.jsonl", tmp_path / "other"
    path.write_bytes(b"cut")
    other.write_text("other")
    path.with_name("rows.jsonl.cut").symlink_to(other)
    with pytest.raises(OSError, match=r"rows\.jsonl\.cut"):
        move_incomplete_line(path)
    assert other.read_text() == "other"
    assert path.read_bytes() == b"cut"
