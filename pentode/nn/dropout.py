"""The dropout layer: acts while training only, by a mask that depends on tokens and place, not on when it is asked."""

import torch
from torch import Tensor, nn

from pentode.ops.dropout import dropout


class Dropout(nn.Module):
    """One dropout of the model; `site` is its number in the whole model, so that no two share a mask."""

    site: Tensor

    def __init__(self, p: float, *, site: int, device: torch.device) -> None:
        super().__init__()
        self.p = p
        # A tensor, because a number read from the module would give each layer its own compiled graph.
        self.register_buffer("site", torch.tensor(site, device=device), persistent=False)

    @property
    def acts(self) -> bool:
        """Whether it changes anything now."""
        return self.training and self.p > 0

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """x [T, D], and a key for each of its tokens; without keys there is no dropout."""
        if not self.acts:
            return x
        assert keys is not None, f"dropout of {self.p} without the tokens' keys"
        return dropout(x, self.p, keys=keys, site=self.site)
