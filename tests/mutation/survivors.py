"""The mutants that live, and why each is harmless; docs: the head of mutants.py."""

import re
from collections.abc import Iterable

# Mutants' keys, without lines; `*` stands for any text. Each reason holds for all mutants that its pattern names.
SURVIVORS: dict[str, str] = {
    # Done twice, and the same as done once.
    "pentode/* all_max: *: twice": "the maximum of maxima is that maximum",
    "pentode/* _slice_loss: collectives.all_max(*): twice": "the maximum of maxima is that maximum",
    "pentode/* max_: *: twice": "the maximum of maxima is that maximum",
    "pentode/train/saving.py Saver._wait_for_all: max_(*): twice": "the maximum of maxima is that maximum",
    "pentode/* start_join_: *: twice": "the parts that are joined do not change, so they are joined to the same",
    "pentode/optim/master.py MasterWeights.*: start_join_(*): twice": "what was joined is joined to the same again",
    "pentode/* StopSignal.asked_anywhere: collectives.max_(*): twice": "the maximum of maxima is that maximum",
    "pentode/* broadcast_: *: twice": "the source gives what it gave",
    "pentode/generate/engine.py _continue: broadcast_(*): twice": "the source gives what it gave",
    "pentode/* gather_objects: *: twice": "the second list is equal to the first, and takes its place",
    "pentode/* vocab_logits: *: twice": "the second copy of the vocabulary is cut off, as padding is",
    "pentode/run/build.py names_of_model: gather_objects(own, mesh.pp): wider than mesh.pp": (
        "ranks of tp give their stages' names once more, and a name that is there already is not added"
    ),
    "pentode/dist/collectives.py wait_for_all: dist.barrier(): twice": "all come a second time",
    "pentode/dist/symmetric.py Window.start_read: self.handle.barrier(*): twice": "ranks meet once more than they need",
    # The other axis is as good, or is this one.
    "pentode/dist/p2p.py Channels.open_inbox: *: another axis than self.pp": (
        "where the test plays GPUs there is no other axis; that this one is handed on, tests/unit/test_inbox.py asserts"
    ),
    "pentode/train/sanity.py check_state: _raise_everywhere(*": (
        "every rank has heard every rank's state, so each finds the same by itself"
    ),
    "pentode/* max_: *: another axis than axis": (
        "only the world is ever asked, for signals, and no other axis has its size and other members"
    ),
    "pentode/dist/p2p.py connect: Channels(pp, {}, device=device): another axis than pp": (
        "a rank alone sends nothing, and is the first on either axis"
    ),
    "pentode/dist/p2p.py connect: _every_line(pp): another axis than pp": (
        "of this axis only the size is read, and the other one has the same; a wrong size is another mutant, which dies"
    ),
    "pentode/generate/engine.py Speaker.of: connect(mesh.pp, device=model.place.device): *": (
        "here a model is alone, and each of its axes has one rank"
    ),
    "pentode/parallel/tensor.py ColumnLinear.gated: self.place.enter(x): *": (
        "only where layers multiply in float8, which no layout here does; tests/parity/test_float8.py ends it"
    ),
    # Not a part of a step.
    "pentode/generate/engine.py _continue: max_positions // 2: *": (
        "of a text that outgrows the positions another part is read again; tests/unit/test_generate.py knows which"
    ),
    "pentode/train/signals.py StopSignal.asked_anywhere: self._every * MICROSECONDS / max(1, slowest): *": (
        "ranks ask each other more often, or less; tests/unit/test_signals.py knows at which steps"
    ),
    # Only memory, or the number of messages and kernels.
    "pentode/optim/clip.py _sum_of_squares: gradient.numel() // ALIGN: divided by twice as much": (
        "moves the border between what is summed by rows and the rest, which is summed whole: all counts once; that "
        "long float32 gradients lose digits so, tests/unit/test_clip.py finds"
    ),
    "pentode/optim/flat.py flatten: bucket_bytes // gradient_dtype.itemsize: *": (
        "buckets of another size: the same sums in fewer messages, or in more"
    ),
    "pentode/parallel/loss.py _slices: *": (
        "more slices or fewer, with every token in one; tests/unit/test_loss.py says how many are needed"
    ),
    "pentode/run/build.py padded_vocabulary: -vocab_size // multiple: not divided": (
        "a larger multiple: rows of padding, which count nowhere; tests/unit/test_tensor_parallel.py knows how many"
    ),
    # Waits that something else waits for.
    "pentode/dist/p2p.py connect: channels.flush(): left out": (
        "the receiver waits for this message, and the sender keeps it until it has gone, as any other"
    ),
    "pentode/* Pipeline._run: self.channels.flush(): left out": (
        "the receivers wait; what is under way is kept by its channel, and no rank goes on far: sums over the world, "
        "or drawn tokens, follow every run of a program, and end when all messages have come"
    ),
    "pentode/parallel/tensor_overlap.py matmul_scatter_gather: part.wait(): left out": (
        "the products' parts come from the same ranks, sent after these: on one connection, NCCL stream or copy stream "
        "what was sent first is there first, and those are waited for"
    ),
    # Only on GPUs: windows of symmetric memory, of which a CPU has none.
    "pentode/dist/p2p.py Ring.__init__: window(*): another axis than axis": (
        "on a CPU there is no window, and messages are sent on the axis itself"
    ),
    "pentode/dist/p2p.py Channels.*: *inbox*: *": (
        "on a CPU there is no inbox; tests/unit/test_inbox.py plays one, and tests/gpu has the numbers of real ones"
    ),
    "pentode/parallel/tensor_overlap.py _passed_on: *": (
        "bytes of a window, which a CPU has not: too many only take memory, too few are asserted against (Window.take)"
    ),
    "pentode/train/copies.py Copies._wait: uploader.wait(0.0, folders=folders): left out": (
        "a line of the log more: that an upload is waited for, when it has ended"
    ),
    "pentode/train/copies.py Copies._wait: on_first_at_length(*": (
        "the others wait for the first rank where they meet it next, and hear of its uploads there; only if those took "
        "longer than a collective waits would they not, and no test takes so long"
    ),
    # Another test knows.
    "pentode/optim/flat.py alike: size % ALIGN: *": (
        "which gradients are not moved, all of a size that no layout here has; tests/unit/test_master.py finds it"
    ),
    # Only a refusal.
    "pentode/parallel/spec.py Cut.__post_init__: self.axis.size // copies.size: not divided": (
        "refuses pieces with copies that could be cut; tests/unit/test_spec.py cuts such a one"
    ),
    "pentode/parallel/spec.py Cut.__post_init__: self.axis.size // copies.size: another axis's": (
        "refuses too little, and every layout's pieces can be cut; tests/unit/test_spec.py has one that cannot"
    ),
}


def reason_for(key: str) -> str | None:
    """Why this mutant is known to be harmless; None if it is not."""
    return next((reason for pattern, reason in SURVIVORS.items() if _names(pattern, key)), None)


def unneeded(*, tried: Iterable[str], living: Iterable[str], whole: bool) -> list[str]:
    """Entries of the table of which no mutant lives; those that name none of the tried ones, if all were tried."""
    tried, living = list(tried), list(living)
    return [
        pattern
        for pattern in SURVIVORS
        if not any(_names(pattern, key) for key in living) and (whole or any(_names(pattern, key) for key in tried))
    ]


def _names(pattern: str, key: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), key, re.DOTALL) is not None
