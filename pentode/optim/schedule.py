"""The learning rate as a pure function of the step."""

import math

from pentode.config.schema import LRSchedulerArgs


def learning_rate(step: int, args: LRSchedulerArgs, *, train_steps: int) -> float:
    """The rate that update number `step` (from 1) is made with.

    Nanotron's shapes: warm-up, plateau until `lr_decay_starting_step`, decay to `min_decay_lr`, and that rate from
    there on. Steps count from 1, so a linear warm-up never makes an update with rate 0. Where the config is silent,
    the decay starts after the warm-up, takes all remaining steps, and ends at `learning_rate` itself, so that nothing
    decays. A decay of no steps is no decay.
    """
    peak, warmup = args.learning_rate, args.lr_warmup_steps
    if step <= warmup:
        return peak if args.lr_warmup_style == "constant" else peak * step / warmup
    start = warmup if args.lr_decay_starting_step is None else args.lr_decay_starting_step
    steps = train_steps - start if args.lr_decay_steps is None else args.lr_decay_steps
    if step < start or steps <= 0:
        return peak
    floor = peak if args.min_decay_lr is None else args.min_decay_lr
    if step >= start + steps:
        return floor
    return floor + (peak - floor) * _remaining((step - start) / steps, args.lr_decay_style)


def _remaining(progress: float, style: str) -> float:
    """What is left of the way from the floor to the peak, 1 at progress 0 and 0 at progress 1."""
    match style:
        case "linear":
            return 1 - progress
        case "cosine":
            return (1 + math.cos(math.pi * progress)) / 2
        case "1-sqrt":
            return 1 - math.sqrt(progress)
    raise ValueError(f"lr_decay_style: {style!r}; use linear, cosine or 1-sqrt")
