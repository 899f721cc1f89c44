"""Training that begins with existing weights: in every layout the files' bits, and no rank reads more than its part."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers

from pentode.checkpoint.folder import open_checkpoint
from pentode.config.kinds.shape import Shape
from pentode.convert.command import convert
from pentode.models.registry import model_for
from tests.helpers.begun import Begun, begun, begun_with_each
from tests.helpers.cases import Case, Problem, config_of, global_batch
from tests.helpers.hf import from_hf
from tests.helpers.world import WORLD

FEW_HEADS = (("num_key_value_heads", 2),)
TIED = (("tie_word_embeddings", True),)
PROBLEMS = {
    "llama": Problem(shape=FEW_HEADS),
    "llama, tied": Problem(shape=FEW_HEADS + TIED),
    "gpt2": Problem(model="gpt2"),
}
SOURCES = ("llama/hf", "llama, tied/hf", "gpt2/hf", "llama, tied/pentode")
LAYOUTS = [
    Case(dp=2, zero=1),
    Case(tp=2, sequence_parallel=True, pad_vocabulary=8),
    Case(tp=4),
    Case(pp=2),
    Case(pp=2, engine="interleaved", stages_per_rank=2, micro_batches=2),
    Case(dp=2, tp=2, pp=2, zero=1),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each problem's model as transformers saves it, in several files, and the same as a checkpoint."""
    folder = tmp_path_factory.mktemp("models")
    for name in PROBLEMS:
        theirs(name).save_pretrained(folder / name / "hf", max_shard_size="8KB")
        assert (folder / name / "hf" / "model.safetensors.index.json").exists()
        list(convert(folder / name / "hf", folder / name / "pentode"))
    return folder


def theirs(name: str) -> transformers.PreTrainedModel:
    """The model of a problem, its weights drawn anew."""
    torch.manual_seed(0)
    kind = transformers.AutoConfig.for_model(**shape_of(name).to_hf(), attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(kind, dtype=torch.float32).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(0.3 * torch.randn_like(param))
    return model


@pytest.mark.parametrize("name", PROBLEMS)
def test_one_process_begins_with_the_files_weights_and_gives_transformers_logits(folders: Path, name: str) -> None:
    model = theirs(name)
    want = from_hf(model_for(shape_of(name)).HF_NAMES, model.state_dict(), tied=shape_of(name).tied)
    with torch.no_grad():
        logits = model.double()(global_batch(Problem(), 0)[0][:, :-1]).logits.flatten(0, 1)
    for kind in ("hf", "pentode"):
        got = begun(Case(PROBLEMS[name]), str(folders / name / kind), "float64")
        assert got.weights.keys() == want.keys()
        assert all(torch.equal(got.weights[key], tensor.double()) for key, tensor in want.items())
        assert got.logits is not None
        torch.testing.assert_close(got.logits, logits, atol=2e-6, rtol=0)  # its norms and angles are float32


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_a_layout_gives_one_processs_weights(folders: Path, case: Case) -> None:
    paths = {folders / name: PROBLEMS[name.split("/")[0]] for name in SOURCES}
    cases = {str(path): replace(case, problem=problem) for path, problem in paths.items()}
    for found in WORLD.run(begun_with_each, case.ranks, cases=cases):
        for path, got in zip(paths, found, strict=True):
            want = one_process(path)
            assert got.weights.keys() == want.weights.keys()
            assert all(torch.equal(got.weights[key], tensor) for key, tensor in want.weights.items())
            assert all(torch.equal(got.masters[key], tensor) for key, tensor in want.masters.items())


@pytest.mark.parametrize("case", [Case(pp=2), Case(tp=2), Case(tp=2, pp=2)], ids=lambda case: case.name)
def test_a_rank_reads_its_part(folders: Path, case: Case) -> None:
    case = replace(case, problem=PROBLEMS["llama"])
    for got in WORLD.run(begun, case.ranks, case=case, path=str(folders / "llama" / "hf"), dtype="float64"):
        cut = (
            4 * (16 * 16 + 16 * 24) // case.pp if case.tp > 1 else 0
        )  # out and down, cut along rows that are read whole
        assert 0 < got.read <= got.held + cut // 2 * torch.float32.itemsize


def test_the_ranks_share_the_reading_for_checksums(folders: Path) -> None:
    path = folders / "llama" / "pentode"
    case = Case(PROBLEMS["llama"], pp=2)
    first, second = WORLD.run(begun, 2, case=case, path=str(path), dtype="float64")
    weights = next(path.glob("weights-*")).stat().st_size
    assert weights <= first.hashed < 1.5 * weights, "it is one file"
    assert first.hashed + second.hashed == sum(facts.size for facts in open_checkpoint(path).manifest.files.values())
    assert second.hashed > 0
    assert second.read < weights
    grid = WORLD.run(begun, 4, case=replace(case, dp=2, tp=2, pp=1), path=str(path), dtype="float64")
    assert sum(rank.hashed for rank in grid) == first.hashed + second.hashed


def test_masters_of_bfloat16_are_not_rounded(folders: Path) -> None:
    want = one_process(folders / "llama" / "hf")
    for case in (Case(dp=2, zero=1), Case(tp=2)):
        case = replace(case, problem=PROBLEMS["llama"])
        for got in WORLD.run(begun, 2, case=case, path=str(folders / "llama" / "hf"), dtype="bfloat16"):
            assert all(torch.equal(got.masters[key], tensor) for key, tensor in want.weights.items())
            assert all(torch.equal(got.weights[key], w.bfloat16().double()) for key, w in want.weights.items())


@cache
def one_process(path: Path) -> Begun:
    """The reference that the layouts are compared with."""
    return begun(Case(PROBLEMS[path.parent.name]), str(path), "float64")


def shape_of(name: str) -> Shape:
    """A problem's shape."""
    return config_of(Case(PROBLEMS[name])).model.model_config
