"""Weight-decay groups and their exclusion patterns."""

import pytest

from pentode.errors import ConfigError
from pentode.optim.groups import Group, weight_decay_groups

NAMES = [
    "embed.weight",
    *(f"layers.{i}.{part}" for i in range(12) for part in ("attn_norm.weight", "attn.qkv.weight", "attn.qkv.bias")),
    "norm.weight",
    "norm.bias",
]


def test_everything_decays_by_default() -> None:
    assert weight_decay_groups(NAMES, weight_decay=0.1) == [Group(tuple(NAMES), 0.1)]


def test_matching_names_are_excluded_and_order_is_kept() -> None:
    decayed, excluded = weight_decay_groups(NAMES, weight_decay=0.1, exclude=[r".*norm\..*", ".*bias"])
    assert decayed.names == ("embed.weight", *(f"layers.{i}.attn.qkv.weight" for i in range(12)))
    assert decayed.weight_decay == 0.1
    assert excluded.weight_decay == 0.0
    assert [name for name in NAMES if name not in decayed.names] == list(excluded.names)


def test_a_pattern_is_matched_from_the_start_of_the_name() -> None:
    _, excluded = weight_decay_groups(NAMES, weight_decay=0.1, exclude=["norm"])
    assert excluded.names == ("norm.weight", "norm.bias")


def test_excluding_everything_leaves_one_group() -> None:
    assert weight_decay_groups(NAMES, weight_decay=0.1, exclude=[".*"]) == [Group(tuple(NAMES), 0.0)]


def test_patterns_that_match_nothing_or_are_none_are_reported_together_with_near_names() -> None:
    with pytest.raises(ConfigError) as caught:
        weight_decay_groups(NAMES, weight_decay=0.1, exclude=[".*bias", ".*atn_norm.*", "(", "embd.weight"])
    first, second, third = caught.value.problems
    assert first.startswith("optimizer.weight_decay_exclude_named_params.1: '.*atn_norm.*' matches no parameter")
    assert "layers.0.attn_norm.weight" in first
    assert second.startswith("optimizer.weight_decay_exclude_named_params.2: '(' is not a regular expression")
    assert "near names: embed.weight" in third
