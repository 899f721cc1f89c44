"""What a rank without ZeRO steps, by parameter name and in its shape."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pentode.optim.master import MasterWeights


def whole(master: MasterWeights, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Tensors beside the shards as views in the parameters' shapes; writing into them writes there."""
    found = {}
    for name, parts in master.by_name(tensors).items():
        ((start, flat),) = parts
        assert start == 0
        found[name] = flat.view(master.gradients[name].shape)
    return found


def weights(master: MasterWeights) -> dict[str, Tensor]:
    """The master weights."""
    return whole(master, [shard.weight for shard in master.shards])


def publish(master: MasterWeights) -> None:
    """Give the model the master weights, as a step does."""
    with torch.no_grad():
        for shard in master.shards:
            shard.round_()
            master.send(shard)
