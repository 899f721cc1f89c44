"""A stage of the config becomes samples, or one line that says why not."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from pentode.config.kinds.datasets import NanosetDatasetsArgs, PretrainDatasetsArgs, TextFileDatasetArgs
from pentode.config.schema import DataArgs, DatasetStageArgs, TokenizerArgs
from pentode.data.open import StageData
from pentode.data.tokenizer import CharTokenizer, HFTokenizer
from pentode.errors import DataError


def opened(
    dataset: object,
    *,
    tokenizer: str | None = None,
    vocab_size: int = -1,
    held_out: float = 0.0,
    own_length: int | None = None,
) -> StageData:
    data = DataArgs(dataset=dataset, seed=3, validation_fraction=held_out)
    stage = DatasetStageArgs(name="main", start_training_step=1, data=data, sequence_length=own_length)
    args = TokenizerArgs(tokenizer_name_or_path=tokenizer)
    return StageData.open(stage, sequence_length=4, tokenizer_args=args, vocab_size=vocab_size)


@pytest.fixture
def text(tmp_path: Path) -> TextFileDatasetArgs:
    (tmp_path / "a.txt").write_text("abcdefghij" * 5)
    return TextFileDatasetArgs(text_file=str(tmp_path / "a.txt"))


def test_a_text_file_tells_its_vocabulary_and_holds_out_its_end(text: TextFileDatasetArgs) -> None:
    data = opened(text, held_out=0.2)
    assert (data.vocab_size, len(data.train), len(data.validation)) == (10, 36, 2)
    assert isinstance(data.tokenizer, CharTokenizer)
    assert data.fingerprint == data.train.fingerprint


def test_a_stage_may_have_its_own_sequence_length(text: TextFileDatasetArgs) -> None:
    assert opened(text, own_length=7).train.samples(np.array([0])).shape == (1, 8)


def test_hugging_face_text_uses_the_configured_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    fast = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a b a b a"}))
    documents = PretrainDatasetsArgs(hf_dataset_or_datasets=str(tmp_path / "a.jsonl"))
    data = opened(documents, tokenizer=str(tmp_path / "tokenizer.json"))
    assert isinstance(data.tokenizer, HFTokenizer)
    assert data.train.samples(np.array([0])).tolist() == [[0, 1, 0, 1, 0]]
    with pytest.raises(DataError, match=r"has token id 1, beyond the model's vocabulary of 1; set .* to 2"):
        opened(documents, tokenizer=str(tmp_path / "tokenizer.json"), vocab_size=1)
    with pytest.raises(DataError, match=r"tokenizer\.tokenizer_name_or_path: is null"):
        opened(documents)


def test_dummy_samples_depend_on_their_number_and_the_seed_alone() -> None:
    source = opened(None, vocab_size=100).train
    rows = source.samples(np.array([5, 0, 5, 2**40 - 1]))
    assert rows.shape == (4, 5)
    assert np.array_equal(rows[0], rows[2])
    assert len(np.unique(rows[[0, 1, 3]])) > 8
    many = source.samples(np.arange(2000))
    assert (many.min(), many.max()) == (0, 99)
    assert abs(many.mean() - 49.5) < 1
    assert abs(np.corrcoef(many[:-1].flatten(), many[1:].flatten())[0, 1]) < 0.05


def test_what_dummy_data_cannot_do_is_refused() -> None:
    with pytest.raises(DataError, match="no end to hold out"):
        opened(None, vocab_size=8, held_out=0.1)
    with pytest.raises(DataError, match="dummy data cannot tell it"):
        opened(None)


def test_a_vocabulary_that_is_too_small_is_refused_before_the_first_step(text: TextFileDatasetArgs) -> None:
    assert opened(text, vocab_size=10).vocab_size == 10
    with pytest.raises(DataError, match=r"a\.txt: has token id 9, beyond the model's vocabulary of 9; set .* to 10"):
        opened(text, vocab_size=9)


def test_kinds_that_are_not_built_yet_are_named() -> None:
    with pytest.raises(DataError, match="main: NanosetDatasetsArgs is not built yet"):
        opened(NanosetDatasetsArgs(dataset_folder="x"))
