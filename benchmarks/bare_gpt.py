"""A bare PyTorch training loop of the nano GPT-2: the floor that Pentode's CPU path is measured against."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BareBlock(nn.Module):
    """A pre-norm GPT-2 block of plain modules, without dropout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, s, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, s, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, s, d))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class BareGPT(nn.Module):
    """Tied embeddings, learned positions."""

    def __init__(self, *, vocab: int, block: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(block, width)
        self.blocks = nn.Sequential(*(BareBlock(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]))
        return F.cross_entropy(F.linear(x, self.tokens.weight).flatten(0, 1), labels.flatten())


def bare_loop(
    data: Tensor, *, vocab: int, batch: int, block: int, layers: int, heads: int, width: int
) -> Callable[[], float]:
    """A function that does one step (draw rows, forward, backward, clip, AdamW) and returns the loss."""
    model = BareGPT(vocab=vocab, block=block, layers=layers, heads=heads, width=width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> float:
        starts = torch.randint(len(data) - block - 1, (batch,))
        rows = torch.stack([data[i : i + block + 1] for i in starts.tolist()])
        loss = model(rows[:, :-1], rows[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step
