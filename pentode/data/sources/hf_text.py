"""Documents of the `datasets` library as training data: tokenised, packed once, and read from the pack ever after.

Documents follow each other, each ended by the tokenizer's end token where it has one, and are cut into rows of
sequence_length + 1 tokens that share one token with the next (Nanotron's rule, without the rows it lost).
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from pentode import log
from pentode.config.kinds.datasets import PretrainDatasetsArgs
from pentode.data.files import reason
from pentode.data.pack import PackedTokens, write_pack
from pentode.data.sources.hf_documents import datasets_library, fractions, open_documents
from pentode.data.tokenizer import Tokenizer
from pentode.data.windows import Windows, fingerprint_of, split
from pentode.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

PACKING = 1  # the number of the rule by which documents become tokens; another rule needs another number


def open_hf_text(
    args: PretrainDatasetsArgs, *, tokenizer: Tokenizer, sequence_length: int, validation_fraction: float
) -> tuple[Windows, Windows | None]:
    """Training and validation samples of the datasets that `args` names; the pack lies in the datasets' own cache."""
    datasets = datasets_library()
    documents = open_documents(args)
    key = fingerprint_of(PACKING, documents._fingerprint, tokenizer.fingerprint)  # the first is datasets' content hash
    path = Path(datasets.config.HF_DATASETS_CACHE) / "pentode" / key[:32]
    packed = None if args.dataset_overwrite_cache else _cached(path)
    if packed is None:
        _pack(documents, path, tokenizer=tokenizer, processes=args.dataset_processing_num_proc_per_process)
        packed = PackedTokens(path)

    training, held_out = split(packed.tokens, validation_fraction=validation_fraction)
    name = " + ".join(fractions(args.hf_dataset_or_datasets))
    facts = {
        "sequence_length": sequence_length,
        "stride": sequence_length,
        "vocab_size": tokenizer.vocab_size,
        "largest_id": packed.facts.largest_id,
        "fingerprint": fingerprint_of(tokenizer.fingerprint, len(training), packed.facts.count, packed.facts.sha256),
        "check": packed.check,
    }
    train = Windows(training, name=name, **facts)
    if not len(held_out):
        return train, None
    return train, Windows(held_out, name=f"{name}, its last {validation_fraction}", **facts)


def _cached(path: Path) -> PackedTokens | None:
    try:
        return PackedTokens(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, DataError) as error:
        log.warning(f"{path}: the packed tokens are damaged ({reason(error)}) and are made again")
        return None


def _pack(documents: "Dataset", path: Path, *, tokenizer: Tokenizer, processes: int) -> None:
    """Tokenise the documents in `processes` processes (one process uses all cores too) and write the pack."""
    datasets = datasets_library()
    (column,) = documents.column_names

    def encode(batch: dict[str, list[str | None]]) -> dict[str, list[np.ndarray]]:
        return {"ids": tokenizer.encode_documents([text for text in batch[column] if text])}

    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent) as scratch:
        coded = documents.map(
            encode,
            batched=True,
            num_proc=processes if processes > 1 else None,
            remove_columns=[column],
            features=datasets.Features({"ids": datasets.Sequence(datasets.Value("uint32"))}),
            cache_file_name=str(Path(scratch) / "coded.arrow"),
            load_from_cache_file=False,
            new_fingerprint=path.name,
            desc="Tokenizing",
        )
        write_pack(_rows(coded), path, vocab_size=tokenizer.vocab_size)


def _rows(coded: "Dataset") -> Iterator[np.ndarray]:
    """The tokens of a thousand documents at a time, end to end."""
    for batch in coded.with_format("arrow").iter(batch_size=1000):
        yield batch["ids"].combine_chunks().flatten().to_numpy()
