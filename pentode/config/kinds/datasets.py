"""Where text comes from: the kinds of dataset that a stage may read."""

from typing import Literal

from pydantic import Field

from pentode.config.section import AtLeastOne, NotNegative, section

KIND = "the kind; found by the other keys when left out"


@section
class PretrainDatasetsArgs:
    """Documents read by Hugging Face `datasets`: tokenized, an EOS between them, packed into whole sequences."""

    type: Literal["hf_text"] = Field("hf_text", repr=False, description=KIND)
    hf_dataset_or_datasets: str | list[str] | dict[str, float] = Field(
        description="a saved dataset's folder, a JSONL, JSON, parquet or text file or a folder of them, or a hub name; "
        "several in a list, or as {name: fraction read of it}"
    )
    hf_dataset_splits: str | list[str] = Field("train", description="which split, or splits")
    hf_dataset_config_name: str | None = Field(None, description="which configuration of a hub dataset")
    dataset_processing_num_proc_per_process: AtLeastOne = Field(1, description="processes that tokenize")
    dataset_overwrite_cache: bool = Field(False, description="tokenize again even if the packed tokens are there")
    text_column_name: str = Field("text", description="which column holds the documents")


@section
class SFTDatasetsArgs:
    """Prompts and completions; only completions are learned."""

    type: Literal["sft"] = Field("sft", repr=False, description=KIND)
    hf_dataset_or_datasets: str | list[str] | dict[str, float] = Field(description="as for pretraining text")
    hf_dataset_splits: str | list[str] = Field("train", description="which split")
    hf_dataset_config_name: str | None = Field(None, description="which configuration of a hub dataset")
    dataset_processing_num_proc_per_process: AtLeastOne = Field(1, description="processes that tokenize")
    dataset_overwrite_cache: bool = Field(False, description="process again even if a cached result is there")
    sft_dataloader: bool = Field(description="tells this kind from pretraining text")
    debug_max_samples: AtLeastOne | None = Field(None, description="read no more samples than this")


@section
class NanosetDatasetsArgs:
    """Token files made by datatrove: `*.ds` with their `.ds.index` and `.ds.metadata`."""

    type: Literal["nanoset"] = Field("nanoset", repr=False, description=KIND)
    dataset_folder: str | list[str] = Field(description="folder or folders of token files, or {folder: weight}")
    dataset_weights: list[float] | None = Field(None, description="share of each folder; null: by size")
    dataset_read_path: str | list[str] | None = Field(None, description="local mirrors of remote folders")
    tokenizer_name: str | None = Field(None, description="tokenizer of the files; null: as their metadata says")
    vocab_size: AtLeastOne | None = Field(None, description="vocabulary of that tokenizer")
    token_size_in_bytes: Literal[2, 4] | None = Field(None, description="bytes of one token in the files")
    return_positions: bool = Field(True, description="positions start again at each document")
    skip_in_stream: bool = Field(False, description="skip what was consumed inside the stream")
    pad_samples_to_global_batch_size: bool = Field(False, description="pad the last partial batch")
    dataset_max_tokens: list[NotNegative] | None = Field(None, description="read no more tokens of each folder")
    shuffle_files: bool = Field(False, description="read the files in a random order")
    use_old_brrr_dataloader: bool = Field(False, description="Nanotron's streaming implementation")


@section
class TextFileDatasetArgs:
    """One text, by characters or bytes; every offset of the training part starts a sample."""

    type: Literal["text_file"] = Field("text_file", repr=False, description=KIND)
    text_file: str = Field(description="a path, or pydoc_data.topics: the Python manual in the standard library")
    tokenization: Literal["character", "byte"] = Field(
        "character", description="character: the text's own alphabet, sorted; byte: UTF-8, 256 ids"
    )
