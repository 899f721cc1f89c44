"""A text's windows: training at every offset, validation over the held-out end; bad files in one line."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pentode.data.sources.text_file import open_text_file
from pentode.data.windows import Windows
from pentode.errors import DataError


def open_text(path: Path | str, **changes: object) -> tuple:
    options = {"tokenization": "character", "sequence_length": 4, "validation_fraction": 0.0} | changes
    return open_text_file(str(path), **options)


def written(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_every_offset_is_a_training_sample(tmp_path: Path) -> None:
    train, validation, tokenizer = open_text(written(tmp_path, "hello world"))
    rows = train.samples(np.arange(len(train)))
    assert [tokenizer.decode(row) for row in rows] == ["hello world"[i : i + 5] for i in range(7)]
    assert rows.dtype == np.int64
    assert validation is None
    assert train.vocab_size == len(set("hello world"))


def test_validation_is_the_end_of_the_text_and_predicts_each_token_once(tmp_path: Path) -> None:
    text = "".join(chr(ord("A") + i) for i in range(50))
    train, validation, tokenizer = open_text(written(tmp_path, text), validation_fraction=0.3)
    read = "".join(tokenizer.decode(row) for row in train.samples(np.arange(len(train))))
    assert set(read) == set(text[:35])
    rows = validation.samples(np.arange(len(validation)))
    assert "".join(tokenizer.decode(row[1:]) for row in rows) == text[36:48]  # two are left over
    assert all(rows[i, 0] == rows[i - 1, -1] for i in range(1, len(rows)))


@given(n=st.integers(2, 60), sequence_length=st.integers(1, 12), stride=st.integers(1, 12))
def test_windows_are_what_slices_are(n: int, sequence_length: int, stride: int) -> None:
    tokens = np.arange(n, dtype=np.uint8)
    expected = [tokens[i : i + sequence_length + 1].tolist() for i in range(0, n - sequence_length, stride)]
    options = {"name": "t", "vocab_size": n, "largest_id": n - 1, "fingerprint": ""}
    if not expected:
        with pytest.raises(DataError):
            Windows(tokens, sequence_length=sequence_length, stride=stride, **options)
        return
    windows = Windows(tokens, sequence_length=sequence_length, stride=stride, **options)
    assert windows.samples(np.arange(len(windows))).tolist() == expected


def test_bytes_need_no_decoding(tmp_path: Path) -> None:
    train, _, tokenizer = open_text(written(tmp_path, b"\xff\x00\xfeabc"), tokenization="byte")
    assert train.samples(np.array([0]))[0].tolist() == [255, 0, 254, 97, 98]
    assert tokenizer.vocab_size == train.vocab_size == 256
    assert train.largest_id == 255


def test_the_standard_librarys_text_is_there() -> None:
    train, validation, tokenizer = open_text("pydoc_data.topics", sequence_length=128, validation_fraction=0.1)
    assert len(train) > 300_000
    assert len(validation) > 300
    assert "statement" in tokenizer.decode(train.samples(np.arange(0, 20_000, 128)).flatten())


def test_a_python_without_that_text_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match=r"comes without it; give data\.dataset\.text_file the path"):
        open_text("pydoc_data.topics")


def test_the_fingerprint_follows_the_content_and_nothing_else(tmp_path: Path) -> None:
    one = open_text(written(tmp_path, "some text here"))[0].fingerprint
    (tmp_path / "elsewhere").mkdir()
    moved = written(tmp_path / "elsewhere", "some text here")
    assert open_text(moved)[0].fingerprint == one
    others = {
        open_text(moved, tokenization="byte")[0].fingerprint,
        open_text(moved, validation_fraction=0.4)[0].fingerprint,
        open_text(written(tmp_path, "some text hers"))[0].fingerprint,
    }
    assert len(others | {one}) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"abcd", "has 4 tokens, needs 5 for one sample of sequence_length 4"),
        (b"abc\xffdef", "not UTF-8 text: byte 0xff at offset 3"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "byte 0x89 at offset 0"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(DataError, match=message) as caught:
        open_text(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_held_out_part_that_is_too_short_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"its last 0\.1: has 2 tokens, needs 5"):
        open_text(written(tmp_path, "abcdefghijklmnopqrst"), validation_fraction=0.1)


def test_files_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, why in {"absent": "No such file", "loop": "symbolic links", ".": "Is a directory"}.items():
        with pytest.raises(DataError, match=why):
            open_text(tmp_path / name)
