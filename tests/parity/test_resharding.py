"""A run that changes its layout: what was read is what was saved, bit for bit, and training goes on with its numbers.

Each layout reads what the one before it saved, saves it again at once, and trains on: so any is read in any other.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pentode.checkpoint.folder import Checkpoint, open_checkpoint
from pentode.checkpoint.layout import Saved
from pentode.checkpoint.load import global_shapes, read_tensors
from pentode.checkpoint.save import save
from pentode.config.schema import Config
from pentode.dist.launch import World
from pentode.errors import CheckpointError
from pentode.run.build import build, initialise_weights
from pentode.train.loop import one_step
from pentode.train.replay import Steps
from pentode.train.state import TrainState, check_data, content, restore
from tests.helpers.tiny import tiny_config
from tests.helpers.world import WORLD

SAVED = 3  # updates before the save
MORE = 2  # and after it
BATCH = 8  # sequences, in any layout
SHAPE = {
    "type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": -1,
    "max_position_embeddings": 16,
    "tie_word_embeddings": True,
}
Layout = dict[str, Any]
ALONE: Layout = {}
LAYOUTS: list[Layout] = [
    {"dp": 2, "zero": 1},
    {"tp": 2},
    {"pp": 2, "accumulate": 4, "pp_engine": "interleaved"},
    {"dp": 4},
    {"tp": 4, "tp_mode": "REDUCE_SCATTER"},
    {"dp": 2, "tp": 2, "zero": 1},
    {"pp": 4, "accumulate": 4, "pp_engine": "1f1b"},
    {"dp": 2, "pp": 2, "accumulate": 2},
    {"dp": 2, "tp": 2, "pp": 2, "accumulate": 2, "zero": 1, "pp_engine": "interleaved"},
    ALONE,
]


def config_of(folder: Path, layout: Layout, dtype: str) -> Config:
    """The tiny run in this layout, its global batch the same in all."""
    axes = {axis: layout.get(axis, 1) for axis in ("dp", "pp", "tp")}
    accumulate = layout.get("accumulate", 1)
    options = {key: layout[key] for key in ("pp_engine", "tp_mode") if key in layout}
    return tiny_config(
        folder,
        parallelism={**axes, **options},
        model__model_config=SHAPE,
        model__dtype=dtype,
        tokens__micro_batch_size=BATCH // axes["dp"] // accumulate,
        tokens__batch_accumulation_per_replica=accumulate,
        optimizer__zero_stage=layout.get("zero", 0),
    )


def trained(*, config: Config, source: Path | None, root: Path) -> list[float]:
    """Save in `root` what `source` holds, or the run after SAVED steps; the losses of the MORE steps that follow."""
    world = World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else World()
    run, state = build(config, world, first_step=1), TrainState()
    steps = Steps(run)
    if source is None:
        initialise_weights(run)
        for _ in range(SAVED):
            one_step(run, state, steps)
    else:
        state = restore(run, open_checkpoint(source))
        check_data(run, state)
    save(root, **content(run, state), world=run.mesh.world)
    return [one_step(run, state, steps).numbers.wait()[0] for _ in range(MORE)]


def on_ranks(config: Config, source: Path | None, root: Path) -> list[float]:
    if config.world_size == 1:
        return trained(config=config, source=source, root=root)
    return WORLD.run(trained, config.world_size, config=config, source=source, root=root)[0]


def tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All that a checkpoint holds, in whole tensors; the weights under the masters' names where it has no masters."""
    found: dict[str, Tensor] = {}
    for group in ("weights", "optimizer"):
        into = {
            name: torch.zeros(shape, dtype=torch.float64) for name, shape in global_shapes(checkpoint, group).items()
        }
        read_tensors(checkpoint, group, {name: Saved.whole(tensor) for name, tensor in into.items()})
        found |= {name if group == "optimizer" else f"master/{name}": tensor for name, tensor in into.items()}
    return found


def same(some: Checkpoint, others: Checkpoint) -> None:
    ours, theirs = tensors(some), tensors(others)
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])] == []
    assert some.state == others.state


def test_each_layout_goes_on_where_the_one_before_it_stood(tmp_path: Path) -> None:
    expected = on_ranks(config_of(tmp_path, ALONE, "float64"), None, tmp_path / "first")
    first = found = open_checkpoint(tmp_path / "first" / str(SAVED))
    for number, layout in enumerate(LAYOUTS):
        root = tmp_path / str(number)
        losses = on_ranks(config_of(tmp_path, layout, "float64"), found.folder, root)
        assert losses == pytest.approx(expected, rel=1e-12, abs=0), layout
        found = open_checkpoint(root / str(SAVED))
        same(found, first)


def test_each_dtype_goes_on_with_the_masters_of_the_one_before_it(tmp_path: Path) -> None:
    links = [
        ("float32", {"dp": 2}),
        ("bfloat16", {"dp": 2, "zero": 1}),
        ("float32", {"tp": 2}),
        ("float32", {"dp": 2, "zero": 1}),
        ("bfloat16", {"pp": 2, "accumulate": 2}),
        ("float64", {"dp": 2}),
    ]
    found: list[Checkpoint] = []
    for number, (dtype, layout) in enumerate(links):
        root = tmp_path / str(number)
        on_ranks(config_of(tmp_path, layout, dtype), found[-1].folder if found else None, root)
        found.append(open_checkpoint(root / str(SAVED)))
    for before, after in pairwise(found):
        same(before, after)
    rounded = torch.zeros(global_shapes(found[1], "weights")["embed.weight"], dtype=torch.bfloat16)
    names = list(global_shapes(found[1], "weights"))
    read_tensors(found[1], "weights", {"embed.weight": Saved.whole(rounded)}, names=names)
    assert torch.equal(rounded, tensors(found[0])["master/embed.weight"].bfloat16())
    with pytest.raises(CheckpointError, match="is float64 there, float32 here, which cannot hold it"):
        on_ranks(config_of(tmp_path, ALONE, "bfloat16"), found[-1].folder, tmp_path / "narrow")


@pytest.mark.parametrize("zero", [0, 1])
def test_each_rank_of_data_writes_its_share(tmp_path: Path, zero: int) -> None:
    config = config_of(tmp_path, {"dp": 4, "tp": 2, "zero": zero}, "bfloat16")
    on_ranks(config, None, tmp_path / "run")
    found = open_checkpoint(tmp_path / "run" / str(SAVED))
    for group in ("weights", "optimizer"):
        sizes = [found.manifest.files[name].size - found.header(name)[0] for name in found.files_of(group)]
        assert len(sizes) == 8
        if zero == 0 or group == "weights":  # a shard of the optimizer's state may have padding, which is not written
            for tp in (0, 1):  # what only the first rank of tp owns is written beside its own
                assert max(sizes[tp::2]) - min(sizes[tp::2]) <= 2 * 4, "an element more at either end"
