"""From a stage of the config to its samples and tokenizer, whichever kind of data it names."""

from dataclasses import dataclass

from pentode import log
from pentode.config.kinds.datasets import PretrainDatasetsArgs, TextFileDatasetArgs
from pentode.config.schema import DatasetStageArgs, TokenizerArgs
from pentode.data.sources.dummy import DummySource
from pentode.data.sources.hf_text import open_hf_text
from pentode.data.sources.text_file import open_text_file
from pentode.data.tokenizer import Tokenizer, installed_version, load_tokenizer
from pentode.data.windows import Source
from pentode.errors import DataError


@dataclass(frozen=True)
class StageData:
    """What a stage trains and validates on."""

    train: Source
    validation: Source | None
    tokenizer: Tokenizer | None

    @property
    def fingerprint(self) -> str:
        """A hash of the training data's content, by which a resumed run knows that it goes on with the same data."""
        return self.train.fingerprint

    @property
    def vocab_size(self) -> int:
        """What the model's vocabulary is where the config leaves it to the data."""
        return self.train.vocab_size

    @staticmethod
    def open(
        stage: DatasetStageArgs, *, sequence_length: int, tokenizer_args: TokenizerArgs | None, vocab_size: int
    ) -> "StageData":
        """The data of `stage`; `vocab_size` is the model's, -1 where the data tell it.

        `sequence_length` is for a stage that names none. DataError for data that are missing, malformed, too short, or
        beyond the model's vocabulary.
        """
        shape = {
            "sequence_length": stage.sequence_length or sequence_length,
            "validation_fraction": stage.data.validation_fraction,
        }
        match stage.data.dataset:
            case None:
                opened = _open_dummy(**shape, vocab_size=vocab_size, seed=stage.data.seed)
            case TextFileDatasetArgs() as args:
                opened = StageData(*open_text_file(args.text_file, tokenization=args.tokenization, **shape))
            case PretrainDatasetsArgs() as args:
                log.info("Using `datasets` library")
                tokenizer = _tokenizer(tokenizer_args)
                opened = StageData(*open_hf_text(args, tokenizer=tokenizer, **shape), tokenizer)
            case other:
                raise DataError(f"data_stages: {stage.name}: {type(other).__name__} is not built yet; use another kind")
        largest = opened.train.largest_id
        if vocab_size != -1 and largest >= vocab_size:
            raise DataError(
                f"{opened.train.name}: has token id {largest}, beyond the model's vocabulary of {vocab_size}; set "
                f"model.model_config.vocab_size to {opened.vocab_size}, or use another tokenizer"
            )
        return opened


def _open_dummy(*, sequence_length: int, validation_fraction: float, vocab_size: int, seed: int) -> StageData:
    if validation_fraction:
        raise DataError("data.validation_fraction: dummy data have no end to hold out; set it to 0, or name a dataset")
    if vocab_size == -1:
        raise DataError("model.model_config.vocab_size: dummy data cannot tell it; give a number, or name a dataset")
    log.info("Using dummy data generator")
    source = DummySource(vocab_size=vocab_size, sequence_length=sequence_length, seed=seed)
    return StageData(source, validation=None, tokenizer=None)


def _tokenizer(args: TokenizerArgs | None) -> Tokenizer:
    if args is None or args.tokenizer_name_or_path is None:
        raise DataError("tokenizer.tokenizer_name_or_path: is null; text datasets need a folder with a tokenizer.json")
    versions = tuple(map(installed_version, ("transformers", "huggingface_hub")))
    log.info(f"Loading tokenizer from {args.tokenizer_name_or_path} and transformers/hf_hub versions {versions}")
    return load_tokenizer(args.tokenizer_name_or_path)
