"""Where mutants are made, and what each is tried on: the layouts of layouts.py, or tests of the project.

Every file that calls a collective is in one of the two tables, or in the third one with the reason.
"""

from dataclasses import dataclass

# Tried on layouts: files that decide the numbers of a training step or what is written, and which of their functions,
# where not all do.
FILES: dict[str, tuple[str, ...] | None] = {
    "dist/collectives.py": None,
    "dist/p2p.py": None,
    "generate/engine.py": None,
    "models/gpt2.py": ("Positions.__init__", "build"),
    "models/llama.py": ("build",),
    "nn/attention.py": None,
    "nn/causal_lm.py": None,
    "nn/dropout.py": None,
    "nn/norm.py": None,
    "optim/clip.py": None,
    "optim/flat.py": None,
    "optim/layout.py": None,
    "optim/master.py": None,
    "parallel/batch.py": None,
    "parallel/loss.py": None,
    "parallel/pipeline/runner.py": None,
    "parallel/pipeline/schedules.py": None,
    "parallel/recompute.py": None,
    "parallel/spec.py": None,
    "parallel/tensor.py": None,
    "parallel/tensor_overlap.py": None,
    "run/build.py": ("assemble", "build_mesh", "build_stages", "names_of_model", "padded_vocabulary"),
    "train/evaluate.py": None,
    "train/signals.py": ("StopSignal.asked_anywhere",),
    "train/step.py": None,
}


@dataclass(frozen=True)
class Trial:
    """Functions of a file (None: all) that no layout of ours shows at work, and the tests that do."""

    file: str
    functions: tuple[str, ...] | None
    tests: tuple[str, ...]


PROOF, TOLD, HEADERS = (f"tests/parity/test_{name}.py" for name in ("proof", "told_to_all", "headers"))
PIECES = "tests/unit/test_checkpoint_layouts.py::test_"
LIMITS, SAVING = "tests/unit/test_save_limits.py::test_", "tests/parity/test_saving.py::test_"
GENERATION = "tests/parity/test_generation.py::test_"
BY_TESTS = (
    Trial(
        "checkpoint/proof.py",
        None,
        (f"{PROOF}::test_what_one_rank_cannot_see_or_do_all_hear_of", PROOF, HEADERS),
    ),
    Trial(
        "checkpoint/save.py",
        ("save", "save.write"),
        (
            "tests/parity/test_checkpoint_ranks.py",
            f"{PIECES}what_only_the_first_rank_is_wrong_in_stops_all",
            f"{PIECES}an_error_at_any_call_of_any_rank_is_raised_by_all_and_undone",
        ),
    ),
    Trial("dist/board.py", None, ("tests/parity/test_board.py",)),
    Trial("dist/collectives.py", ("beside", "gather_objects"), ("tests/parity/test_board.py",)),
    Trial(
        "dist/collectives.py",
        ("wait_for_all",),
        ("tests/parity/test_leaving.py::test_who_waits_for_all_waits_until_the_last_has_come",),
    ),
    Trial("dist/inbox.py", None, ("tests/unit/test_inbox.py",)),
    Trial("dist/p2p.py", ("Channels.open_inbox",), ("tests/unit/test_inbox.py",)),
    Trial("dist/symmetric.py", None, ("tests/unit/test_symmetric.py",)),
    Trial("dist/together.py", None, ("tests/unit/test_together.py",)),
    Trial(
        "generate/command.py",
        ("generate_from",),
        (
            f"{GENERATION}two_processes_write_the_text_of_a_checkpoint_of_one",
            f"{GENERATION}a_reader_who_has_seen_enough_ends_all_processes_in_peace",
        ),
    ),
    Trial("optim/layout.py", ("_round_up",), ("tests/unit/test_layout.py",)),
    Trial("run/agree.py", None, ("tests/parity/test_agreement.py::test_a_config_of_its_own_is_refused_on_every_rank",)),
    Trial("run/build.py", ("initialise_weights", "_opened"), (TOLD, HEADERS, "tests/parity/test_existing_weights.py")),
    Trial("train/copies.py", None, (TOLD, "tests/unit/test_s3_ranks.py")),
    Trial("train/sanity.py", None, ("tests/parity/test_sanity.py",)),
    Trial(
        "train/saving.py",
        None,
        (
            f"{SAVING}room_is_asked_for_what_all_ranks_write",
            f"{SAVING}a_disk_that_is_full_for_one_rank_leaves_run_and_checkpoints_intact",
            f"{SAVING}a_thread_that_broke_holds_up_nobody",
            f"{SAVING}the_first_rank_alone_removes_older_checkpoints",
            f"{LIMITS}the_saves_to_come_are_counted",
            f"{LIMITS}a_disk_that_will_be_full_is_told",
        ),
    ),
)

EXCUSED = {
    "train/start.py": "it hands wait_for_all on to dist/together.py, where whether it is called is tried",
}
