"""Which layers each pipeline stage holds: cut so that the slowest stage is as fast as it can be. No torch here."""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from pentode.config.kinds.shape import Shape


def stage_layers(shape: Shape, *, stages: int, sequence_length: int) -> list[range]:
    """The layers of each stage, by the operations that each costs a token; the last stage has the output layer, too."""
    layer, first, last = _costs(shape, sequence_length)
    return cut_layers([layer] * shape.num_layers, stages=stages, first=first, last=last)


def stage_costs(shape: Shape, layers: Sequence[range], *, sequence_length: int) -> list[int]:
    """What each stage costs, if stages hold these layers: multiply-adds of one token's forward."""
    layer, first, last = _costs(shape, sequence_length)
    costs = [len(own) * layer for own in layers]
    costs[0] += first
    costs[-1] += last
    return costs


def cut_layers(layer_costs: Sequence[float], *, stages: int, first: float = 0, last: float = 0) -> list[range]:
    """Cut the layers into `stages` runs of at least one, so that the largest cost of a stage is the smallest possible.

    first, last  what the first and the last stage cost besides their layers

    Of cuts that are equally good, the one whose stages are most alike: the smallest sum of squared costs. Of those,
    the one with the shorter stages first, where most micro-batches are live.
    """
    count = len(layer_costs)
    if not 1 <= stages <= count:
        raise ValueError(f"cut_layers: {count} layers for {stages} stages; each stage needs one layer or more")
    total = list(accumulate(layer_costs, initial=0))  # whole numbers stay whole, and ties exact

    def cost(stage: int, begin: int, end: int) -> float:
        return total[end] - total[begin] + first * (stage == 0) + last * (stage == stages - 1)

    largest, _ = _best_cut(count, stages, lambda so_far, *stage: max(so_far, cost(*stage)))

    def squares(so_far: float, *stage: int) -> float:
        here = cost(*stage)
        return so_far + here**2 if here <= largest else float("inf")

    _, starts = _best_cut(count, stages, squares)
    return [range(begin, end) for begin, end in pairwise((*starts, count))]


def _best_cut(count: int, stages: int, add: Callable[..., float]) -> tuple[float, tuple[int, ...]]:
    """The smallest score of a cut, and the first layer of each of its stages, by dynamic programming.

    add  (score of the stages before, stage, its first layer, its end) -> score with that stage; never falls as the
         first of them rises
    """
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0, ())}  # by the end of the stages so far
    for stage in range(stages):
        ends = range(stage + 1, count - (stages - stage - 1) + 1)
        best = {
            end: min(
                (add(score, stage, begin, end), (*starts, begin))
                for begin, (score, starts) in best.items()
                if begin < end
            )
            for end in ends
        }
    return best[count]


def _costs(shape: Shape, sequence_length: int) -> tuple[int, int, int]:
    """Of a layer, of the embedding and of the output layer: multiply-adds of one token.

    Causal attention sees half of the sequence on average, for the scores and again for the weighted sum. Looking a
    token up copies one row.
    """
    layer = shape.matmul_parameters_per_layer + sequence_length * shape.width
    return layer, shape.width, shape.known_vocab_size() * shape.width
