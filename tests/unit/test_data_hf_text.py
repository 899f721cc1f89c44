"""Documents read through `datasets`: tokenised, packed, cached; every wrong name in one line."""

import json
from pathlib import Path

import numpy as np
import pytest

datasets = pytest.importorskip("datasets")

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from pentode.config.kinds.datasets import PretrainDatasetsArgs  # noqa: E402
from pentode.data.sources.hf_text import open_hf_text  # noqa: E402
from pentode.data.tokenizer import ByteTokenizer, load_tokenizer  # noqa: E402
from pentode.data.windows import Windows  # noqa: E402
from pentode.errors import DataError, StorageError  # noqa: E402

END = 1
DOCUMENTS = ["a b c d", "e f", "g h i j k"]
TOKENS = [2, 3, 4, 5, END, 6, 7, END, 8, 9, 10, 11, 12, END]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture
def tokenizer(tmp_path: Path) -> object:
    words = {"[UNK]": 0, "</s>": END} | {chr(ord("a") + i): i + 2 for i in range(26)}
    fast = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "words").mkdir()
    fast.save(str(tmp_path / "words" / "tokenizer.json"))
    return load_tokenizer(str(tmp_path / "words"))


def jsonl(path: Path, documents: list[str | None]) -> str:
    path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in documents))
    return str(path)


def open_rows(
    names: object, tokenizer: object, *, sequence_length: int = 4, held_out: float = 0.0, **args: object
) -> tuple[Windows, Windows | None]:
    config = PretrainDatasetsArgs(hf_dataset_or_datasets=names, **args)
    return open_hf_text(config, tokenizer=tokenizer, sequence_length=sequence_length, validation_fraction=held_out)


def tokens_of(windows: Windows) -> list[int]:
    """All tokens that are read, from windows of two."""
    rows = windows.samples(np.arange(len(windows)))
    assert (rows[1:, 0] == rows[:-1, -1]).all()
    return [int(rows[0, 0]), *rows[:, 1:].flatten().tolist()]


def test_documents_are_joined_by_the_end_token_and_cut_into_rows_that_share_one(
    tmp_path: Path, tokenizer: object
) -> None:
    train, validation = open_rows(jsonl(tmp_path / "a.jsonl", DOCUMENTS), tokenizer)
    assert validation is None
    rows = train.samples(np.arange(len(train)))
    assert rows.tolist() == [TOKENS[0:5], TOKENS[4:9], TOKENS[8:13]]  # the last token is left over
    assert rows.dtype == np.int64
    assert (train.vocab_size, train.largest_id) == (28, 12)


def test_every_form_of_the_same_documents_gives_the_same_tokens(tmp_path: Path, tokenizer: object) -> None:
    table = datasets.Dataset.from_dict({"text": DOCUMENTS, "n": [1, 2, 3]})
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(tmp_path / "splits"))
    table.to_parquet(str(tmp_path / "a.parquet"))
    for folder in ("parquets", "texts"):
        (tmp_path / folder).mkdir()
    table.to_parquet(str(tmp_path / "parquets" / "train.parquet"))
    for i, text in enumerate(DOCUMENTS):
        (tmp_path / "texts" / f"{i}.txt").write_text(text.replace(" ", "\n\n"))  # a file is one document
    (tmp_path / "list.json").write_text(json.dumps([{"text": text} for text in DOCUMENTS]))
    jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    fingerprints = set()
    for name in ("saved", "splits", "a.parquet", "parquets", "texts", "a.jsonl", "list.json"):
        train, _ = open_rows(str(tmp_path / name), tokenizer, sequence_length=1)
        assert tokens_of(train) == TOKENS, name
        fingerprints.add(train.fingerprint)
    assert len(fingerprints) == 1  # it is the content's


def test_the_last_part_is_held_out(tmp_path: Path, tokenizer: object) -> None:
    train, validation = open_rows(jsonl(tmp_path / "a.jsonl", DOCUMENTS), tokenizer, sequence_length=1, held_out=0.3)
    assert tokens_of(train) == TOKENS[:10]
    assert tokens_of(validation) == TOKENS[10:]


def test_a_dictionary_reads_the_first_fraction_of_each(tmp_path: Path, tokenizer: object) -> None:
    one, two = jsonl(tmp_path / "1.jsonl", ["a", "b", "c", "d"]), jsonl(tmp_path / "2.jsonl", ["w", "x", "y", "z"])
    mixed = tokens_of(open_rows({one: 0.5, two: 0.25}, tokenizer, sequence_length=1)[0])
    assert sorted(mixed) == [END, END, END, 2, 3, 24]
    everything = tokens_of(open_rows([one, two], tokenizer, sequence_length=1)[0])
    assert sorted(everything) == [END] * 8 + [2, 3, 4, 5, 24, 25, 26, 27]
    assert everything == tokens_of(open_rows([one, two], tokenizer, sequence_length=1)[0])
    with pytest.raises(DataError, match=r"its fraction is 1\.5"):
        open_rows({one: 1.5}, tokenizer)


def test_several_splits_are_read_one_after_the_other(tmp_path: Path, tokenizer: object) -> None:
    tables = {s: datasets.Dataset.from_dict({"text": [text]}) for s, text in (("train", "a"), ("test", "b"))}
    datasets.DatasetDict(tables).save_to_disk(str(tmp_path / "splits"))
    train, _ = open_rows(str(tmp_path / "splits"), tokenizer, sequence_length=1, hf_dataset_splits=["test", "train"])
    assert tokens_of(train) == [3, END, 2, END]
    name = jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    part, _ = open_rows(name, tokenizer, sequence_length=1, hf_dataset_splits="train[:2]")
    assert tokens_of(part) == TOKENS[:8]


def test_empty_and_missing_documents_leave_no_trace(tmp_path: Path, tokenizer: object) -> None:
    train, _ = open_rows(jsonl(tmp_path / "a.jsonl", [None, "a b", "", "c"]), tokenizer, sequence_length=1)
    assert tokens_of(train) == [2, 3, END, 4, END]


def test_more_processes_give_the_same_tokens(tmp_path: Path, tokenizer: object) -> None:
    name = jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    train, _ = open_rows(name, tokenizer, sequence_length=1, dataset_processing_num_proc_per_process=2)
    assert tokens_of(train) == TOKENS


def test_our_own_tokenizers_read_documents_too(tmp_path: Path) -> None:
    train, _ = open_rows(jsonl(tmp_path / "a.jsonl", ["ab", "c"]), ByteTokenizer(), sequence_length=1)
    assert tokens_of(train) == [97, 98, 99]


def test_tokens_are_packed_once_until_asked_again_or_changed(
    tmp_path: Path, tokenizer: object, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    packed = []
    encode = type(tokenizer).encode_documents
    monkeypatch.setattr(
        type(tokenizer), "encode_documents", lambda self, texts: packed.append(1) or encode(self, texts)
    )
    one = open_rows(name, tokenizer)[0]
    two = open_rows(name, tokenizer, sequence_length=2)[0]  # the pack serves every length
    assert one.fingerprint == two.fingerprint
    assert len(packed) == 1
    open_rows(name, tokenizer, dataset_overwrite_cache=True)
    assert len(packed) == 2
    jsonl(tmp_path / "a.jsonl", ["z z z z z"])
    assert open_rows(name, tokenizer)[0].fingerprint != one.fingerprint
    assert len(packed) == 3
    assert sorted(path.suffix for path in (cache / "pentode").iterdir()) == [".bin", ".bin", ".json", ".json"]


@pytest.mark.parametrize("damage", ["short", "no facts", "other facts"])
def test_a_damaged_pack_is_made_again(tmp_path: Path, tokenizer: object, cache: Path, damage: str) -> None:
    name = jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    open_rows(name, tokenizer)
    (tokens,), (facts,) = (list((cache / "pentode").glob(f"*{suffix}")) for suffix in (".bin", ".json"))
    if damage == "short":
        tokens.write_bytes(tokens.read_bytes()[:-1])
    else:
        facts.write_text("{" if damage == "no facts" else '{"count": 3}')
    assert tokens_of(open_rows(name, tokenizer, sequence_length=1)[0]) == TOKENS


def test_a_pack_cut_short_while_it_is_read_is_an_error_and_not_a_dead_process(
    tmp_path: Path, tokenizer: object, cache: Path
) -> None:
    train, _ = open_rows(jsonl(tmp_path / "a.jsonl", DOCUMENTS), tokenizer)
    (tokens,) = (cache / "pentode").glob("*.bin")
    with tokens.open("r+b") as file:
        file.truncate(0)
    with pytest.raises(DataError, match="has 0 bytes now, 14 when it was made"):
        train.samples(np.array([0]))


def test_a_cache_that_cannot_be_written_is_a_storage_error(
    tmp_path: Path, tokenizer: object, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left on device; make room, or set HF_HOME"):
        open_rows(jsonl(tmp_path / "a.jsonl", DOCUMENTS), tokenizer)
    assert list((cache / "pentode").iterdir()) == []


def saved(tmp_path: Path, **columns: list) -> str:
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "saved"))
    return str(tmp_path / "saved")


def test_wrong_names_inside_a_dataset_are_told_with_the_right_ones(tmp_path: Path, tokenizer: object) -> None:
    name = saved(tmp_path, title=["x"], words=[["a", "b"]], n=[1])
    cases = {
        "has no column 'text'; text_column_name can be one of title, words, n": {},
        "column 'n' holds int64; text_column_name must name": {"text_column_name": "n"},
        "column 'words' holds no text": {"text_column_name": "words"},
        "has no split 'test'; hf_dataset_splits can be train": {"hf_dataset_splits": "test"},
        "without configurations; set hf_dataset_config_name: null": {"hf_dataset_config_name": "en"},
    }
    for message, args in cases.items():
        with pytest.raises(DataError, match=message):
            open_rows(name, tokenizer, **args)
    with pytest.raises(DataError, match='Unknown split "test"'):
        open_rows(jsonl(tmp_path / "a.jsonl", DOCUMENTS), tokenizer, hf_dataset_splits="test")


def test_wrong_files_are_one_line(tmp_path: Path, tokenizer: object) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not")
    (tmp_path / "data.csv").write_text("text\na\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    cases = {
        "bad.jsonl": "cannot be read as a dataset",
        "bad.parquet": "cannot be read as a dataset",
        "bad.txt": "cannot be read as a dataset",
        "data.csv": r"is none of \.jsonl, \.json, \.parquet, \.txt",
        "folder": "cannot be read as a dataset",
        "absent": "no such file or folder",
        "absent.jsonl": "no such file or folder",
        "loop": "no such file or folder",
    }
    for name, message in cases.items():
        with pytest.raises(DataError, match=message) as caught:
            open_rows(str(tmp_path / name), tokenizer)
        assert "\n" not in str(caught.value)
    for documents in ([], [""], ["a"]):
        with pytest.raises(DataError, match=r"tokens, needs 5|is empty"):
            open_rows(jsonl(tmp_path / "short.jsonl", documents), tokenizer)


def test_a_hub_that_cannot_be_reached_is_one_line(tokenizer: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'some/data' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        DataError, match=r"^some/data: cannot be read as a dataset: Couldn't reach 'some/data' on the Hub$"
    ):
        open_rows("some/data", tokenizer)


def test_a_missing_library_names_the_extra(tokenizer: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r'pip install "pentode\[data\]"'):
        open_rows("some/data", tokenizer)
