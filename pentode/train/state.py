"""Where a run stands, and how it goes to disk and comes back: weights, masters, optimizer, position in the data."""

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TypedDict

import torch

from pentode import log
from pentode.checkpoint.folder import Checkpoint
from pentode.checkpoint.layout import Saved, share_of
from pentode.checkpoint.load import MASTER, global_shapes, read_tensors
from pentode.checkpoint.proof import hear_headers
from pentode.config.dump import to_yaml
from pentode.dist.together import together
from pentode.errors import CheckpointError
from pentode.parallel.shards import pieces_of_range
from pentode.parallel.spec import specs_of
from pentode.run.build import Run, names_of_model
from pentode.version import VERSION


@dataclass
class TrainState:
    """Counts that decide the next step.

    step              updates done
    consumed_samples  samples seen by the whole run
    stage_samples     samples each data stage has given, by its name
    order_keys        what decided each stage's samples and their order (`Feed.order_key`), by its name
    """

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    stage_samples: dict[str, int] = field(default_factory=dict)
    order_keys: dict[str, str] = field(default_factory=dict)

    def advance(self, run: Run) -> None:
        """Count one step as done."""
        stage, samples = run.feed.stage, run.config.global_batch_size
        self.step += 1
        self.consumed_samples += samples
        self.consumed_tokens += samples * stage.sequence_length
        self.stage_samples[stage.name] = self.stage_samples.get(stage.name, 0) + samples
        self.order_keys[stage.name] = run.feed.order_key


class Content(TypedDict):
    """What a checkpoint of a run holds, as `checkpoint.save.save` takes it."""

    step: int
    groups: dict[str, dict[str, Saved]]
    state: dict[str, object]
    files: dict[str, bytes]


def content(run: Run, state: TrainState) -> Content:
    """The run as it stands after `state.step` updates; tensors are views of what the next update changes."""
    run.master.wait_for()
    general = replace(run.config.general, step=state.step, consumed_train_samples=state.consumed_samples)
    files = {"config.yaml": to_yaml(replace(run.config, general=general)).encode()}
    if run.feed.tokenizer is not None:
        files |= run.feed.tokenizer.files()
    return {
        "step": state.step,
        "groups": {"weights": _weights(run, owned=True), "optimizer": _optimizer(run, owned=True)},
        "state": {
            "train": asdict(state),
            "updates": int(run.optimizer.updates),
            "versions": {"pentode": VERSION, "torch": torch.__version__, "python": platform.python_version()},
        },
        "files": files,
    }


def restore(run: Run, checkpoint: Checkpoint, *, optimizer: bool = True, counts: bool = True) -> TrainState:
    """Read a checkpoint into the run, whatever layout wrote it.

    Without `optimizer` only the weights are taken, as the model held them; without `counts` the run starts at step 1 of
    its schedule and data. The model's dtype may be another: master weights are then read from the weights there, if
    those are precise enough to have no masters beside them, or weights from the masters there.
    """
    log.info(f"Loading weights from {checkpoint.folder}")
    names = names_of_model(run.stages, run.mesh)
    hear_headers(checkpoint, ["weights", "optimizer"] if optimizer else ["weights"], run.mesh.world)
    together(lambda: _read(run, checkpoint, names, optimizer=optimizer), run.mesh.world)
    if optimizer:
        run.optimizer.updates.fill_(checkpoint.state["updates"])
    return TrainState(**checkpoint.state["train"]) if counts else TrainState()


def _read(run: Run, checkpoint: Checkpoint, names: Sequence[str], *, optimizer: bool) -> None:
    weights, stepped = _weights(run, owned=False), _optimizer(run, owned=False)
    kinds = list(beside_shards(run))
    has_masters = optimizer and any(name.startswith(MASTER) for name in global_shapes(checkpoint, "optimizer"))
    if has_masters and run.master.shares_storage:
        stepped |= {MASTER + name: saved for name, saved in weights.items()}
        kinds.append(MASTER[:-1])
    else:
        read_tensors(checkpoint, "weights", weights, names=names, rounded=not run.master.shares_storage)
    if not has_masters and not run.master.shares_storage:
        kinds.remove(MASTER[:-1])
        masters = {name: stepped.pop(MASTER + name) for name in weights if MASTER + name in stepped}
        read_tensors(checkpoint, "weights", masters, names=names)
    if optimizer:
        read_tensors(checkpoint, "optimizer", stepped, names=[f"{kind}/{name}" for kind in kinds for name in names])


def check_data(run: Run, state: TrainState) -> None:
    """Refuse to go on with a stage whose samples are not those that it was trained on so far."""
    step = min(state.step + 1, run.config.tokens.train_steps)
    stage = run.feed.stage_at(step)
    if stage.name not in state.order_keys:
        if stage.first_step < step:
            log.warning(f"data_stages: {stage.name!r} was not in this run before; it begins with its first sample")
        return
    run.feed.open(step)

    def compare() -> None:
        if run.feed.order_key != state.order_keys[stage.name]:
            raise CheckpointError(
                f"data_stages: the data of {stage.name!r}, its sequence length or its seed is not what step "
                f"{state.step} was trained on; set it back, give the new data a stage of its own, or start over with "
                "--fresh"
            )

    together(compare, run.mesh.world)


def beside_shards(run: Run) -> dict[str, list[torch.Tensor]]:
    """What a run keeps for each shard, by kind: masters, where they are not the weights, and the optimizer's own."""
    masters = {} if run.master.shares_storage else {"master": [shard.weight for shard in run.master.shards]}
    return masters | run.optimizer.state()


def _weights(run: Run, *, owned: bool) -> dict[str, Saved]:
    """The model's weights that this rank holds; with `owned` the share of them that it writes."""
    found = {
        name: Saved.of(parameter.detach(), spec.global_shape, spec.owned() if owned else spec.boxes())
        for stage in run.stages.values()
        for (name, parameter), spec in zip(stage.named_parameters(), specs_of(stage).values(), strict=True)
    }
    return share_of(found, run.mesh.data) if owned else found


def _optimizer(run: Run, *, owned: bool) -> dict[str, Saved]:
    """What this rank steps: masters, where they are not the weights themselves, and the optimizer's own tensors.

    With `owned`, what of it this rank writes: its shards, or its share of what all ranks of `data` step alike.
    """
    specs = {name: spec for stage in run.stages.values() for name, spec in specs_of(stage).items()}
    found = {}
    for kind, tensors in beside_shards(run).items():
        for name, parts in run.master.by_name(tensors).items():
            spec = specs[name]
            pieces = [piece for start, flat in parts for piece in pieces_of_range(spec, flat, start, owned=owned)]
            found[f"{kind}/{name}"] = Saved(spec.global_shape, pieces)
    return share_of(found, run.mesh.data) if owned and not run.master.sharded else found
