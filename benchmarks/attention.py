"""Which of torch's attention kernels is fastest on this GPU, forward and backward, and FlashAttention-4 if installed.

usage: python -m benchmarks.attention

Causal attention as a block calls it, on bfloat16 tensors [B, S, H, E]; milliseconds of a forward, and of both; TFLOP/s
of both by the scores that a causal mask leaves.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

SHAPES = {  # B, S, H, K, E
    "1B": (4, 4096, 32, 8, 64),
    "8B": (4, 4096, 32, 8, 128),
    "gpt2": (16, 1024, 12, 12, 64),
}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_torch(backend: SDPBackend) -> Attend:
    """torch's attention with one of its kernels."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    return attend


def by_flex(sequence: int) -> Attend:
    """flex attention, compiled."""
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, sequence, sequence, device="cuda")
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def by_varlen(batch: int, sequence: int) -> Attend:
    """Attention over sequences one behind another."""
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.arange(0, (batch + 1) * sequence, sequence, device="cuda", dtype=torch.int32)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))  # torch 2.11 has no grouped ones
        y = varlen_attn(q, k, v, ends, ends, sequence, sequence, window_size=(-1, 0))
        return y.unflatten(0, (batch, sequence)).transpose(1, 2)

    return attend


def by_flash_4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention-4, of the package flash-attn-4."""
    from flash_attn.cute import flash_attn_func  # pyright: ignore[reportMissingImports]

    return flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=True)[0].transpose(1, 2)


def timed(work: Callable[[], object], *, times: int = 20) -> float:
    """Milliseconds a call."""
    for _ in range(3):
        work()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / times


def main() -> None:
    """A line for each shape and kernel."""
    print("shape | kernel | forward, ms | both, ms | TFLOP/s")
    for name, shape in SHAPES.items():
        B, S, H, _, E = shape
        kernels = {
            "flash": by_torch(SDPBackend.FLASH_ATTENTION),
            "cudnn": by_torch(SDPBackend.CUDNN_ATTENTION),
            "flex": by_flex(S),
            "varlen": by_varlen(B, S),
            "FlashAttention-4": by_flash_4,
        }
        for kernel, attend in kernels.items():
            try:
                forward, both = measured(attend, shape)
            except Exception as error:  # noqa: BLE001 - a kernel that this GPU or torch has not
                print(f"{name} | {kernel} | {type(error).__name__}: {str(error).splitlines()[0][:100]}")
                continue
            flops = 3.5 * 4 * B * H * S * S * E / 2
            print(f"{name} | {kernel} | {forward:.3f} | {both:.3f} | {flops / both / 1e9:.0f}", flush=True)


def measured(attend: Attend, shape: tuple[int, int, int, int, int]) -> tuple[float, float]:
    """Milliseconds of a forward, and of forward and backward."""
    B, S, H, K, E = shape
    options = {"device": "cuda", "dtype": torch.bfloat16}
    q, k, v = (torch.randn(B, S, heads, E, **options, requires_grad=True) for heads in (H, K, K))
    grad = torch.randn(B, S, H, E, **options).transpose(1, 2)
    views = tuple(t.transpose(1, 2) for t in (q, k, v))

    def both() -> None:
        torch.autograd.grad(attend(*views), (q, k, v), grad)

    with torch.no_grad():
        forward = timed(lambda: attend(*views))
    return forward, timed(both)


if __name__ == "__main__":
    main()
