"""Several processes that hold one model write what one process writes, in float64: token by token, text by text."""

import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pentode.cli import run_command
from pentode.generate.engine import Speaker, generate
from pentode.generate.sampling import Sampling
from pentode.train.step import train_step
from tests.helpers.cases import VOCABULARY, Case, Problem, batches_of, run_of
from tests.helpers.slurm import forked_for_slurm
from tests.helpers.source import ROOT
from tests.helpers.tiny import tiny_yaml
from tests.helpers.world import WORLD

POSITIONS = 32
LLAMA = Problem(shape=(("max_position_embeddings", POSITIONS), ("num_key_value_heads", 2)))
TIED = Problem(shape=(*LLAMA.shape, ("tie_word_embeddings", True)))
ONE_KV_HEAD = Problem(shape=(LLAMA.shape[0], ("num_key_value_heads", 1)))
GPT2 = Problem(model="gpt2", shape=(("n_positions", POSITIONS),))
DROPPING = Problem(model="gpt2", shape=(*GPT2.shape, ("resid_pdrop", 0.5), ("embd_pdrop", 0.5)))


@dataclass(frozen=True)
class Request:
    """What is to be continued, and how."""

    rows: int
    length: int
    sampling: Sampling
    max_positions: int = POSITIONS
    eos_id: int | None = None

    def prompt(self) -> Tensor:
        return torch.randint(VOCABULARY, (self.rows, self.length), generator=torch.Generator().manual_seed(self.length))


GREEDY = Sampling(20, temperature=0)
DRAWN = Sampling(20, temperature=0.8, top_k=9, seed=3)
REQUESTS = {
    "greedy": Request(3, 5, GREEDY),
    "one token": Request(1, 1, GREEDY),
    "temperature and top-k": Request(3, 5, DRAWN),
    "top-p": Request(2, 3, Sampling(20, temperature=1.5, top_p=0.8, seed=4)),
    "a text that outgrows the positions": Request(2, 5, DRAWN, max_positions=8),
    "a prompt beyond the positions": Request(2, POSITIONS + 9, GREEDY),
    "an end": Request(3, 5, DRAWN, eos_id=-1),  # which token ends a text is taken from the text without an end
}


def written(case: Case, requests: dict[str, Request]) -> tuple[dict[str, list[list[int]]], list[float]]:
    """What this rank writes after a step of training, nothing on other replicas; and what the next step finds."""
    run = run_of(case)
    train_step(run, batches_of(case, run.mesh, 0), learning_rate=1e-2)
    texts = {}
    if run.mesh.data.rank == 0:
        run.master.wait_for()
        speaker = Speaker(run.stages, run.mesh, run.pipeline.channels, run.pipeline.schedule.placement)
        for name, request in requests.items():
            tokens = generate(
                speaker,
                request.prompt(),
                sampling=request.sampling,
                max_positions=request.max_positions,
                eos_id=request.eos_id,
            )
            texts[name] = tokens.tolist()
    after = train_step(run, batches_of(case, run.mesh, 1), learning_rate=1e-2)
    return texts, [after.loss.item(), after.norm.item()]


@cache
def one_process(problem: Problem) -> tuple[dict[str, Request], dict[str, list[list[int]]], list[float]]:
    """The requests, an end of text chosen that some rows reach, what one process writes, and the step after it."""
    free = {name: replace(request, eos_id=None) for name, request in REQUESTS.items()}
    end = written(Case(problem), {"an end": free["an end"]})[0]["an end"][0][9]
    requests = free | {"an end": replace(REQUESTS["an end"], eos_id=end)}
    return requests, *written(Case(problem), requests)


SEVERAL: dict[str, Any] = {"sequence_parallel": True, "micro_batches": 2}
CASES = [
    *(Case(problem, tp=2, **SEVERAL) for problem in (LLAMA, GPT2, DROPPING)),
    *(Case(problem, pp=2, engine="1f1b", micro_batches=2) for problem in (LLAMA, TIED, GPT2)),
    *(Case(problem, tp=2, pp=2, engine="1f1b", **SEVERAL) for problem in (LLAMA, TIED, GPT2)),
    Case(ONE_KV_HEAD, tp=4, **SEVERAL),
    Case(LLAMA, pp=2, engine="interleaved", stages_per_rank=2, micro_batches=2),
    Case(TIED, tp=2, dp=2, zero=1, pad_vocabulary=16, **SEVERAL),
    Case(GPT2, tp=2, overlap=True, **SEVERAL),
]


MORE = [Case(problem, tp=4, **SEVERAL) for problem in (LLAMA, GPT2)]  # a token takes four ranks a dozen messages


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.long) for case in MORE)], ids=lambda case: case.name
)
def test_a_layout_writes_one_processs_tokens(case: Case) -> None:
    requests, texts, step = one_process(case.problem)
    for rank, (found, after) in enumerate(WORLD.run(written, case.ranks, case=case, requests=requests)):
        if rank // case.tp % case.dp == 0:
            assert found.keys() == texts.keys()
            for name, tokens in texts.items():
                assert found[name] == tokens, f"{name}, rank {rank}"
        assert after == pytest.approx(step, rel=1e-11, abs=0)  # the model goes on as if it had not written


@pytest.mark.parametrize("problem", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_the_requests_are_what_they_are_called(problem: Problem) -> None:
    requests, texts, _ = one_process(problem)
    end = requests["an end"].eos_id
    rows = texts["an end"]
    assert rows[0][9:] == [end] * len(rows[0][9:])
    assert 25 > len(rows[0]) > 10 or any(end not in row[5:] for row in rows)
    assert len(texts["a text that outgrows the positions"][0]) == 25 > 3 * 8
    assert texts["temperature and top-k"] != texts["greedy"]
    assert len({tuple(row) for row in texts["temperature and top-k"]}) == 3


LLAMA_SHAPE = {
    "type": "llama",
    "vocab_size": -1,
    "max_position_embeddings": 16,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ALONE = ["parallelism.tp=1", "parallelism.pp=1"]


def command(*words: str) -> str:
    """What a command in processes of its own prints."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of four processes, beside a run of it by one."""
    folder = tmp_path_factory.mktemp("llama")
    changes = {"model__model_config": LLAMA_SHAPE, "tokens__train_steps": 8, "tokens__val_check_interval": -1}
    layout = {"parallelism__tp": 2, "parallelism__pp": 2, "parallelism__tp_mode": "REDUCE_SCATTER"}
    file = tiny_yaml(folder, model__dtype="float64", **changes, **layout)
    assert run_command(["train", str(file), *ALONE, f"checkpoints.checkpoints_path={folder / 'one'}"]) == 0
    return file


def test_two_processes_write_the_text_of_a_checkpoint_of_one(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["generate", str(file.parent / "one"), "--prompt=the ", "--prompt=a", "--prompt=", "--top-k=5"]
    capsys.readouterr()
    assert run_command([*asked, "--max-new-tokens=40"]) == 0
    text = capsys.readouterr().out
    assert len(text) > 120
    assert command("-m", "pentode", *asked, "--max-new-tokens=40", "--tp", "2", "--pp", "1") == text


def test_a_reader_who_has_seen_enough_ends_all_processes_in_peace(file: Path) -> None:
    words = ["generate", str(file.parent / "one"), "--tp=2", *["--prompt=the "] * 3]
    with subprocess.Popen(
        [sys.executable, "-m", "pentode", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1) == b"t"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1  # as one process does, by typer


@pytest.fixture(scope="module")
def four(file: Path) -> Path:
    """The run of four processes."""
    run = file.parent / "four"
    codes, said = forked_for_slurm(file, *[[f"checkpoints.checkpoints_path={run}"]] * 4)
    assert codes == [0] * 4, said
    return run


def test_a_run_of_four_processes_ends_with_the_sample_of_one(file: Path, four: Path) -> None:
    sample = (four / "sample.txt").read_text()
    assert len(sample) > 400
    assert sample == (file.parent / "one" / "sample.txt").read_text()


def test_run_generate_under_torchrun_writes_as_one_process_does(
    file: Path, four: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    asked = ["--prompt=the ", "--max-new-tokens=40"]
    assert run_command(["generate", str(file.parent / "one"), "--temperature=0", *asked]) == 0
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=4", "run_generate.py"]
    assert command(*launcher, "--ckpt-path", str(four / "8"), "--tp=0", "--pp=0", *asked) == capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        (["--tp=3"], 64, "parallelism.tp: 3 does not divide model.model_config.n"),
        (["--pp=3"], 64, "parallelism.pp: 3 stages is more than the 2 layers of model.model_config; use pp=2 or less"),
        (["--tp=2", "--prompt=the Q"], 65, "character 'Q' (U+0051) at place 4 is not among"),
    ],
)
def test_what_is_wrong_is_told_once_before_processes_start(
    file: Path,
    words: list[str],
    code: int,
    what: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pentode.dist.launch.start_local", lambda *_: pytest.fail("processes were started"))
    capsys.readouterr()
    assert run_command(["generate", str(file.parent / "one"), *words]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert what in err
    assert err.count("\n") == 1
