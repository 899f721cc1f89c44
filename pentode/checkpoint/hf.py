"""Hugging Face's weights to ours and back, bit for bit, by a model's table of names. All tensors are global ones."""

import re
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from pentode.errors import CheckpointError
from pentode.nn.hf_rules import HFNames
from pentode.parallel.spec import ParamSpec


def from_hf(names: HFNames, theirs: Mapping[str, Tensor], *, tied: bool) -> dict[str, Tensor]:
    """Our tensors from theirs, of a whole model or its bare trunk; some files of tied models repeat the head.

    Raises CheckpointError for a tensor that no rule reads, and for an output layer that should be tied and is not.
    """
    unread = {_full_name(name, names): tensor for name, tensor in theirs.items()}
    unread = {name: tensor for name, tensor in unread.items() if not _ignored(name, names)}
    head, embedding = names.tied
    if tied and head in unread and embedding in unread and not torch.equal(unread.pop(head), unread[embedding]):
        raise CheckpointError(
            f"Hugging Face weights: {head} differs from {embedding}; tie_word_embeddings should be false"
        )
    ours: dict[str, Tensor] = {}
    for rule in names.rules:
        for numbers in _numbers(rule.theirs[0], unread):
            wanted = [pattern.format(*numbers) for pattern in rule.theirs]
            missing = [name for name in wanted if name not in unread]
            if missing:
                raise CheckpointError(f"Hugging Face weights: {missing[0]} is not there, but {wanted[0]} is")
            parts = [unread.pop(name) for name in wanted]
            try:
                joined = torch.cat([part.T if rule.transposed else part for part in parts])
            except RuntimeError as error:
                shapes = ", ".join(str(list(part.shape)) for part in parts)
                raise CheckpointError(
                    f"Hugging Face weights: {', '.join(wanted)} are {shapes}, which fit no layer"
                ) from error
            ours[rule.ours.format(*numbers)] = joined.contiguous()
    if unread:
        raise CheckpointError(f"Hugging Face weights: {min(unread)} has no place in this model ({len(unread)} such)")
    return ours


def to_hf(names: HFNames, ours: Mapping[str, Tensor], *, specs: Mapping[str, ParamSpec]) -> dict[str, Tensor]:
    """Their tensors from ours; the specs say of which pieces a fused tensor is made."""
    unwritten = dict(ours)
    theirs: dict[str, Tensor] = {}
    for rule in names.rules:
        for numbers in _numbers(rule.ours, unwritten):
            name = rule.ours.format(*numbers)
            tensor, cut = unwritten.pop(name), specs[name].cut
            parts = tensor.split(cut.pieces) if len(rule.theirs) > 1 and cut is not None else (tensor,)
            for pattern, part in zip(rule.theirs, parts, strict=True):
                theirs[pattern.format(*numbers)] = (part.T if rule.transposed else part).contiguous()
    if unwritten:
        raise CheckpointError(f"Hugging Face has no name for {min(unwritten)} ({len(unwritten)} such)")
    return theirs


def _full_name(name: str, names: HFNames) -> str:
    """The name in a whole model's file, from either kind of file."""
    return name if name.startswith(names.prefix) or name == names.tied[0] else names.prefix + name


def _ignored(name: str, names: HFNames) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in names.ignored)


def _numbers(pattern: str, tensors: Collection[str]) -> Iterator[tuple[str, ...]]:
    """What stands for `{}` in each name that fits the pattern."""
    regex = re.compile(re.escape(pattern).replace(r"\{\}", r"(\d+)"))
    matches = [regex.fullmatch(name) for name in tensors]
    return iter([match.groups() for match in matches if match])
