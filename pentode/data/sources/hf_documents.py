"""Text documents through the `datasets` library: which files, splits and columns a config means.

Names mean, in this order: a saved dataset's folder, a data file, a folder of data files, a dataset on the hub. Text is
data; nothing of it is executed.
"""

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from pentode.config.kinds.datasets import PretrainDatasetsArgs
from pentode.data.files import reason
from pentode.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
MIX_SEED = 42  # Nanotron's, for shuffling the documents of several datasets


def datasets_library() -> ModuleType:
    """The `datasets` package; DataError naming the extra where it is not installed."""
    try:
        import datasets  # takes a second, and only this source needs it
    except ImportError as error:
        raise DataError(
            'Hugging Face datasets: the package `datasets` is missing; pip install "pentode[data]"'
        ) from error
    return datasets


def open_documents(args: PretrainDatasetsArgs) -> "Dataset":
    """One column of text: every split asked for, of every dataset, of each its first fraction where one is given.

    Several datasets are shuffled together by document, so that a held-out last part is a mixture too.
    """
    parts = [
        _first(name, documents, fraction)
        for name, fraction in fractions(args.hf_dataset_or_datasets).items()
        for documents in _splits(name, args)
    ]
    if len(parts) == 1:
        return parts[0]
    try:
        joined = datasets_library().concatenate_datasets(parts)
    except ValueError as error:
        raise DataError(
            f"hf_dataset_or_datasets: they do not fit together: {reason(error)}; make them alike"
        ) from error
    return joined.shuffle(seed=MIX_SEED) if len(fractions(args.hf_dataset_or_datasets)) > 1 else joined


def fractions(names: str | list[str] | dict[str, float]) -> dict[str, float]:
    """What part of each dataset's documents is read."""
    if isinstance(names, dict):
        return names
    return dict.fromkeys([names] if isinstance(names, str) else names, 1.0)


def _first(name: str, documents: "Dataset", fraction: float) -> "Dataset":
    if not 0 < fraction <= 1:
        raise DataError(f"{name}: its fraction is {fraction}; it is a share of the documents, above 0 and at most 1")
    return documents if fraction == 1 else documents.select(range(int(fraction * len(documents))))


def _splits(name: str, args: PretrainDatasetsArgs) -> "list[Dataset]":
    """The text column of each split asked for."""
    wanted = [args.hf_dataset_splits] if isinstance(args.hf_dataset_splits, str) else args.hf_dataset_splits
    try:
        read = _reader(name, args.hf_dataset_config_name)
        return [_text_column(name, read(split), args.text_column_name) for split in wanted]
    except DataError:
        raise
    except StopIteration as error:  # what datasets lets through for a file without a line
        raise DataError(f"{name}: is empty; name a file with documents") from error
    except Exception as error:  # datasets raises its own, pyarrow's, the hub's and the system's errors
        raise DataError(f"{name}: cannot be read as a dataset: {reason(error.__cause__ or error)}") from error


def _reader(name: str, config: str | None) -> "Callable[[str], Dataset]":
    """A function from a split's name to that split of the dataset `name`."""
    datasets = datasets_library()
    path = Path(name).expanduser()
    saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    if config is not None and (saved or path.is_file()):
        raise DataError(f"{name}: is one dataset, without configurations; set hf_dataset_config_name: null")
    if saved:
        return lambda split: _saved_split(name, datasets.load_from_disk(str(path)), split)
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise DataError(f"{name}: is none of {', '.join(BUILDERS)}; convert it, or name a folder")
        return lambda split: _load_files(path, BUILDERS[path.suffix], split)
    if path.is_dir():
        if {file.suffix for file in path.rglob("*") if file.suffix in BUILDERS} == {".txt"}:
            return lambda split: _load_files(path / "**" / "*.txt", "text", split)
        return lambda split: datasets.load_dataset(str(path), config, split=split)
    if os.path.lexists(path) or path.is_absolute() or name.startswith((".", "~")) or path.suffix in BUILDERS:
        raise DataError(f"{name}: no such file or folder; name a saved dataset, a data file or a folder of them")
    return lambda split: datasets.load_dataset(name, config, split=split)


def _load_files(pattern: Path, builder: str, split: str) -> "Dataset":
    """Data files of one kind; each text file is one document."""
    options = {"sample_by": "document"} if builder == "text" else {}
    return datasets_library().load_dataset(builder, data_files=str(pattern), split=split, **options)


def _saved_split(name: str, saved: "Dataset | dict[str, Dataset]", split: str) -> "Dataset":
    splits = saved if isinstance(saved, dict) else {"train": saved}
    if split not in splits:
        raise DataError(f"{name}: has no split {split!r}; hf_dataset_splits can be {', '.join(splits)}")
    return splits[split]


def _text_column(name: str, documents: "Dataset", column: str) -> "Dataset":
    if column not in documents.column_names:
        columns = ", ".join(documents.column_names)
        raise DataError(f"{name}: has no column {column!r}; text_column_name can be one of {columns}")
    kind = getattr(documents.features[column], "dtype", None)
    if kind not in ("string", "large_string"):
        raise DataError(
            f"{name}: column {column!r} holds {kind or 'no text'}; text_column_name must name a column of text"
        )
    return documents.select_columns([column])
