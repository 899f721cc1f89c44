"""Ranks that were not started alike all refuse, with one line that says who differs and how."""

import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pentode.checkpoint.lock import locked
from pentode.cli import run_command
from pentode.config.load import config_from_dict
from pentode.dist.mesh import Axis
from pentode.errors import ConfigError
from pentode.run import agree
from pentode.run.agree import check_agreement
from tests.helpers.config import outcome, small
from tests.helpers.slurm import environments, forked_for_slurm
from tests.helpers.source import ROOT
from tests.helpers.tiny import rows, tiny_yaml
from tests.helpers.world import WORLD

GPT2 = {"type": "gpt2", "vocab_size": 256}
LONG = "somewhere/" * 10
PATIENCE = 120  # seconds after which processes wait for each other for ever
THREE = "pp=1 x dp=3 x cp=1 x tp=1 = 3 ranks, but WORLD_SIZE is 2; start as many"
STAGE: dict[str, Any] = {"name": "a", "start_training_step": 1, "data": {"dataset": None}}


def agreement(sections: list[dict[str, Any]], versions: list[dict[str, str]]) -> list[str]:
    """The problems that this rank finds, when rank i has the i-th changes of SMALL and of the versions."""
    rank, size = dist.get_rank(), dist.get_world_size()
    data = small(**{name: value for name, value in sections[rank].items() if isinstance(value, dict)})
    data |= {name: value for name, value in sections[rank].items() if not isinstance(value, dict)}
    installed = {"pentode": "1", "torch": "2", "python": "3"} | versions[rank]
    for owner, name, found in (
        (agree, "VERSION", installed["pentode"]),
        (torch, "__version__", installed["torch"]),
        (platform, "python_version", lambda: installed["python"]),
    ):
        PATCH.setattr(owner, name, found)
    world = Axis("world", size, rank, dist.group.WORLD)
    try:
        return outcome(lambda: check_agreement(config_from_dict(data), world))
    finally:
        PATCH.undo()


PATCH = pytest.MonkeyPatch()


def on_ranks(*sections: dict[str, Any], versions: dict[int, dict[str, str]] | None = None) -> list[str]:
    """The problems of all ranks, which must be one list."""
    installed = [(versions or {}).get(rank, {}) for rank in range(len(sections))]
    first, *others = WORLD.run(agreement, len(sections), sections=list(sections), versions=installed)
    assert all(other == first for other in others)
    return first


@pytest.mark.parametrize("ranks", [2, 3])
def test_equal_ranks_pass(ranks: int) -> None:
    assert on_ranks(*[{}] * ranks) == []


def test_one_process_agrees_with_itself() -> None:
    check_agreement(config_from_dict(small()), Axis("world"))


@pytest.mark.parametrize(
    ("sections", "difference"),
    [
        ([{}, {"tokens": {"train_steps": 20}}, {}], "tokens.train_steps is 10 on ranks 0 and 2, 20 on rank 1"),
        ([{}, {"tokens": {"train_steps": 20}}], "tokens.train_steps is 10 on rank 0, 20 on rank 1"),
        ([{}, {}, {"general": {"seed": 7}}], "general.seed is 42 on ranks 0 and 1, 7 on rank 2"),
        ([{"general": {"seed": n}} for n in range(3)], "general.seed is 0 on rank 0, 1 on rank 1, 2 on rank 2"),
        ([{"general": {"device": "cpu"}}, {}], "general.device is 'cpu' on rank 0, 'auto' on rank 1"),
        ([{}, {"checkpoints": {"checkpoints_path": "b"}}], "checkpoints.checkpoints_path is 'here' on rank 0, 'b' on"),
        ([{}, {"parallelism": {"tp": 2}}], "parallelism.tp is 1 on rank 0, 2 on rank 1"),
        ([{}, {"model": {"model_config": GPT2}}], "model.model_config.type is 'llama' on rank 0, 'gpt2' on"),
        (
            [{"checkpoints": {"checkpoints_path": LONG + word}} for word in ("here", "there")],
            f"checkpoints.checkpoints_path is '{LONG}here' on rank 0, '{LONG}there' on rank 1",
        ),
        (
            [{}, {"data_stages": [STAGE, STAGE | {"name": "b", "start_training_step": 5}]}],
            "data_stages.1 is absent on rank 0, a section on rank 1",
        ),
        (
            [{}, {"optimizer": {"weight_decay_exclude_named_params": ["x"]}}],
            "optimizer.weight_decay_exclude_named_params.0 is absent on rank 0, 'x' on rank 1",
        ),
        ([{}, {"tokenizer": {"tokenizer_name_or_path": "t"}}], "tokenizer is null on rank 0, a section on rank 1"),
    ],
)
def test_a_config_of_its_own_is_refused_on_every_rank(sections: list[dict[str, Any]], difference: str) -> None:
    [problem] = on_ranks(*sections)
    assert problem.startswith(f"config: {difference}")
    assert problem.endswith("; start all ranks with the same file")


@pytest.mark.parametrize("name", ["pentode", "torch", "python"])
def test_versions_differ_before_configs_do(name: str) -> None:
    problems = on_ranks({}, {"general": {"seed": 7}}, {}, versions={2: {name: "9"}})
    usual = {"pentode": "1", "torch": "2", "python": "3"}[name]
    assert problems == [
        f"versions: {name} is {usual} on ranks 0 and 1, 9 on rank 2; install the same on all hosts",
    ]


def test_ranks_are_named_in_short(monkeypatch: pytest.MonkeyPatch) -> None:
    def line(*steps: int) -> str:
        configs = [{"versions": {}, "config": {"tokens.train_steps": str(step)}} for step in steps]
        monkeypatch.setattr(agree, "gather_objects", lambda value, axis: configs)
        with pytest.raises(ConfigError) as error:
            check_agreement(config_from_dict(small()), Axis("world"))
        [problem] = error.value.problems
        return problem.removeprefix("config: tokens.train_steps is ").removesuffix(
            "; start all ranks with the same file"
        )

    assert line(10, 20, 10, 10) == "10 on ranks 0, 2 and 3, 20 on rank 1"
    assert line(10, 20, *[10] * 6) == "10 on ranks 0 and 2-7, 20 on rank 1"
    assert line(*[10] * 6, 20) == "10 on ranks 0-5, 20 on rank 6"
    assert line(*range(8)) == "0 on rank 0, 1 on rank 1, 2 on rank 2, and 5 more values"


def started_by_slurm(file: Path, *words: Sequence[str]) -> tuple[list[int], str]:
    """`pentode train` with the words of each rank, as srun starts them: exit codes, and all that was said on stderr."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "pentode", "train", str(file), *own],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for own, environment in zip(words, environments(len(words)), strict=True)
    ]
    try:
        told = [rank.communicate(timeout=PATIENCE)[1] for rank in ranks]
        return [rank.returncode for rank in ranks], "".join(told)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


TWO = ("parallelism.dp=2", "tokens.train_steps=2", "tokens.val_check_interval=-1")


def test_tasks_that_slurm_started_train_together(tmp_path: Path) -> None:
    file = tiny_yaml(tmp_path)
    assert started_by_slurm(file, TWO, TWO) == ([0, 0], "")
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]
    assert rows(tmp_path / "run")[-1]["consumed_tokens"] == 2 * 2 * 8 * 16  # of both tasks


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            (["general.seed=1", "tokens.train_steps=3"], ["general.seed=2"]),
            "config: general.seed is 1 on rank 0, 2 on rank 1; start all ranks with the same file\n",
        ),
        (
            (["parallelism.dp=1", "parallelism.tp=2"], []),  # each is a layout of two; their groups are not the same
            "config: parallelism.dp is 1 on rank 0, 2 on rank 1; start all ranks with the same file\n",
        ),
        ((["parallelism.dp=3"], ["parallelism.dp=3"]), f"parallelism: {THREE}\n"),
        ((["parallelism.dp=3"], []), f"rank 0: parallelism: {THREE}\n"),  # only what the rank itself cannot accept
        (([], ["tokens.train_steps=0"]), "rank 1: command line: tokens.train_steps: "),
        (([], ["general.seed=x", "tokens.train_stepz=1"]), "rank 1: command line: general.seed: "),
        (
            ([], ["general.device=cuda"]),
            "rank 1: general.device: cuda, but torch finds no GPU here; use device cpu, or",
        ),
        (
            (["--nproc=2"], ["--nproc=2"]),
            "command line: --nproc 2 in a process that a launcher started; leave out one\n",
        ),
    ],
    ids=["seed", "layout", "world", "world of one", "illegal", "illegal twice", "device", "nproc"],
)
def test_processes_that_differ_end_with_64_before_step_1(
    words: tuple[list[str], ...], told: str, tmp_path: Path
) -> None:
    file = tiny_yaml(tmp_path)
    start = started_by_slurm if "general.device=cuda" in words[1] else forked_for_slurm  # which have seen the GPUs
    codes, text = start(file, *((*TWO, *own, "--fresh") for own in words))
    assert codes == [64, 64]
    assert text.startswith(told)
    assert text.count(told) == 1
    assert text.count("\n") == 1 + ("train_stepz" in text)
    assert not (tmp_path / "run").exists()


def test_ranks_that_see_other_checkpoints_end_with_66(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tiny_yaml(tmp_path)
    folders = [tmp_path / "host", tmp_path / "other_host"]
    for folder in folders:
        folder.mkdir()
    here = "checkpoints.checkpoints_path=here"
    alone = ["train", str(file), here, "tokens.train_steps=1", "tokens.val_check_interval=-1"]
    monkeypatch.chdir(folders[0])
    assert run_command(alone) == 0
    codes, text = forked_for_slurm(file, (*TWO, here), (*TWO, here), folders=folders)
    assert codes == [66, 66]
    assert text.startswith(
        "pentode: here: rank 0 found step 1 to go on from, rank 1 no checkpoint; checkpoints must be in"
    )
    assert text.count("\n") == 1


def test_a_text_that_one_rank_does_not_see_ends_all_with_65(tmp_path: Path) -> None:
    file = tiny_yaml(tmp_path, data_stages__0__data__dataset={"text_file": "text.txt"})
    (tmp_path / "elsewhere").mkdir()
    codes, text = forked_for_slurm(file, TWO, TWO, folders=[tmp_path, tmp_path / "elsewhere"])
    assert codes == [65, 65]
    assert text == "pentode: rank 1: text.txt: cannot be read: No such file or directory; name a readable file\n"


def test_a_folder_where_another_trains_ends_all_with_74(tmp_path: Path) -> None:
    file = tiny_yaml(tmp_path)
    with locked(tmp_path / "run"):
        codes, text = forked_for_slurm(file, TWO, TWO)
    assert codes == [74, 74]
    assert text.startswith(f"pentode: {tmp_path / 'run'}: another process trains here; stop it, or use another")
    assert text.count("\n") == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_log_that_one_rank_cannot_write_ends_all_with_74(rank: int, tmp_path: Path) -> None:
    file, path = tiny_yaml(tmp_path), tmp_path / "run" / "logs" / f"rank-{rank}.log"
    path.mkdir(parents=True)
    codes, text = started_by_slurm(file, TWO, TWO)
    assert codes == [74, 74], text
    assert text.startswith(f"pentode: rank {rank}: {path}: Is a directory")
    assert text.count("\n") == 1
