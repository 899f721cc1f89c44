"""Tokenizers give text back, survive saving, and refuse what they cannot read."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from pentode.data.tokenizer import ByteTokenizer, CharTokenizer, HFTokenizer, load_tokenizer, save_tokenizer
from pentode.errors import DataError

WORDS = {"<s>": 0, "</s>": 1, "[UNK]": 2, "the": 3, "cat": 4, "sat": 5}


def word_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def folder_with(folder: Path, tokenizer: Tokenizer, **files: dict) -> str:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder)


@given(st.text(min_size=1))
def test_characters_come_back_and_ids_follow_their_order(text: str) -> None:
    tokenizer = CharTokenizer.of(text)
    assert tokenizer.characters == "".join(sorted(set(text)))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert set(ids.tolist()) == set(range(tokenizer.vocab_size))


@given(st.text())
def test_bytes_come_back(text: str) -> None:
    ids = ByteTokenizer().encode(text)
    assert bytes(ids) == text.encode()
    assert ByteTokenizer().decode(ids.tolist()) == text


def test_bytes_that_are_no_text_are_still_decoded() -> None:
    assert ByteTokenizer().decode([255, 65]) == "\N{REPLACEMENT CHARACTER}A"


def test_a_character_outside_the_alphabet_is_named() -> None:
    with pytest.raises(DataError, match=r"'z' \(U\+007A\) at place 2"):
        CharTokenizer("abc").encode("abz")


def test_tokenizers_survive_saving(tmp_path: Path) -> None:
    tokenizers = {
        "char": CharTokenizer("\n a\xe9\N{GRINNING FACE}\ud800"),
        "byte": ByteTokenizer(),
        "words": load_tokenizer(folder_with(tmp_path / "first", word_tokenizer())),
    }
    for name, tokenizer in tokenizers.items():
        save_tokenizer(tokenizer, tmp_path / name)
        again = load_tokenizer(str(tmp_path / name))
        assert type(again) is type(tokenizer)
        assert (again.fingerprint, again.vocab_size, again.eos_id) == (
            tokenizer.fingerprint,
            tokenizer.vocab_size,
            tokenizer.eos_id,
        )
        assert again.files() == tokenizer.files()


def test_fingerprints_tell_tokenizers_apart(tmp_path: Path) -> None:
    plain = load_tokenizer(folder_with(tmp_path / "a", word_tokenizer()))
    other_end = load_tokenizer(folder_with(tmp_path / "b", word_tokenizer(), tokenizer_config={"eos_token": "<s>"}))
    every = [plain, other_end, ByteTokenizer(), CharTokenizer("ab"), CharTokenizer("abc")]
    assert len({tokenizer.fingerprint for tokenizer in every}) == len(every)


def test_a_folder_a_file_and_a_saved_copy_are_the_same_tokenizer(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "a", word_tokenizer(), tokenizer_config={"eos_token": "<s>"})
    one, two = load_tokenizer(folder), load_tokenizer(f"{folder}/tokenizer.json")
    assert one.fingerprint == two.fingerprint
    assert one.encode("the cat sat").tolist() == [3, 4, 5]
    assert one.decode([3, 4, 5]) == "the cat sat"
    assert one.vocab_size == len(WORDS)


@pytest.mark.parametrize(
    ("files", "eos"),
    [
        ({}, 1),  # by its usual name
        ({"tokenizer_config": {"eos_token": "<s>"}}, 0),
        ({"tokenizer_config": {"eos_token": {"content": "<s>", "special": True}}}, 0),
        ({"special_tokens_map": {"eos_token": "<s>"}}, 0),
        ({"config": {"eos_token_id": 5}}, 5),
        ({"config": {"eos_token_id": [4, 5]}}, 4),
        ({"config": {"eos_token_id": 99}}, 1),
        ({"tokenizer_config": {"eos_token": "absent"}}, 1),
    ],
)
def test_the_end_token_is_found_and_kept(tmp_path: Path, files: dict, eos: int) -> None:
    tokenizer = load_tokenizer(folder_with(tmp_path / "a", word_tokenizer(), **files))
    assert tokenizer.eos_id == eos
    save_tokenizer(tokenizer, tmp_path / "saved")
    assert load_tokenizer(str(tmp_path / "saved")).eos_id == eos


def test_there_may_be_no_end_token(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_with(tmp_path / "a", Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))))
    assert tokenizer.eos_id is None
    assert [ids.tolist() for ids in tokenizer.encode_documents(["a"])] == [[0]]


def test_documents_end_with_exactly_one_end_token_and_are_never_cut(tmp_path: Path) -> None:
    fast = word_tokenizer()
    fast.enable_truncation(2)
    fast.enable_padding(length=9)
    assert_documents(fast, tmp_path / "cut", [[3, 4, 5, 1], [4, 1]])
    fast.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    assert_documents(fast, tmp_path / "marked", [[0, 3, 4, 5, 1], [0, 4, 1]])


def assert_documents(fast: Tokenizer, folder: Path, expected: list[list[int]]) -> None:
    tokenizer = load_tokenizer(folder_with(folder, fast))
    assert [ids.tolist() for ids in tokenizer.encode_documents(["the cat sat", "cat"])] == expected


def test_ids_use_the_smallest_type(tmp_path: Path) -> None:
    big = Tokenizer(models.WordLevel({"a": 0, "b": 70_000}, unk_token="a"))
    tokenizer = load_tokenizer(folder_with(tmp_path / "a", big))
    assert tokenizer.vocab_size == 70_001
    assert tokenizer.encode("b").dtype == np.uint32


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "tokenizer.json cannot be read"), (b"{}", "cannot be read"), (b"\xff\x00", "cannot be read")],
)
def test_a_malformed_tokenizer_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_malformed_neighbours_are_one_line(tmp_path: Path) -> None:
    folder_with(tmp_path, word_tokenizer())
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json is not JSON"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "pentode_tokenizer.json").write_text('{"kind": "rot13"}')
    with pytest.raises(DataError, match="is not a tokenizer that this version knows"):
        load_tokenizer(str(tmp_path))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot be read: No such file"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(DataError, match="no such file or folder"):
        load_tokenizer(str(tmp_path / "absent"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(DataError, match="no such file or folder"):
        load_tokenizer(str(tmp_path / "loop"))


def test_a_hub_name_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(folder_with(tmp_path / "hub", word_tokenizer()))
    asked = []

    def download(name: str, file: str) -> str:
        asked.append(name)
        if not (folder / file).exists():
            raise FileNotFoundError(file)
        return str(folder / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    tokenizer = load_tokenizer("robot-test/words")
    assert isinstance(tokenizer, HFTokenizer)
    assert set(asked) == {"robot-test/words"}
    folder.joinpath("tokenizer.json").unlink()
    with pytest.raises(DataError, match="cannot be fetched from the Hugging Face hub"):
        load_tokenizer("robot-test/words")
