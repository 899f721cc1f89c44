"""A bare, compiled PyTorch loop of GPT-2 124M on one GPU, as nanoGPT trains it: the peer of benchmarks/gpu.py's gpt2.

usage: python -m benchmarks.bare_gpt_gpu [--batch 16] [--block 1024] [--steps 40]

bfloat16 by autocast over float32 weights, torch's fused AdamW, clipping; the batch is on the device already. Prints the
median tokens/s of the steps after the first ten, of which each is timed on the device.
"""

import argparse
import statistics

import torch
from torch import nn

from benchmarks.bare_gpt import BareGPT
from benchmarks.shapes import STEPS, WARM_UP


def main() -> None:
    """Train on random tokens and print the speed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--block", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=STEPS)
    asked = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    vocab = 50304
    model = BareGPT(vocab=vocab, block=asked.block, layers=12, heads=12, width=768).cuda()
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    rows = torch.randint(vocab, (asked.batch, asked.block + 1), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = compiled(rows[:, :-1], rows[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    marks = []
    for _ in range(asked.steps + 1):
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()
        step()
    torch.cuda.synchronize()
    times = [begin.elapsed_time(end) for begin, end in zip(marks[WARM_UP:-1], marks[WARM_UP + 1 :], strict=True)]
    ms = statistics.median(times)
    print(f"bare: {asked.batch * asked.block / ms * 1e3:,.0f} tokens/s, {ms:.2f} ms a step", flush=True)


if __name__ == "__main__":
    main()
