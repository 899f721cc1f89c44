"""What `pentode check` says of a run whose stages have sequence lengths of their own."""

from pathlib import Path

from pentode.config.meaning import meaning
from tests.helpers.tiny import tiny_config, tiny_dict


def test_a_stages_own_sequence_length_is_counted(tmp_path: Path) -> None:
    (first,) = tiny_dict(tmp_path)["data_stages"]
    stages = [first, first | {"name": "next", "start_training_step": 5, "sequence_length": 8}]
    config = tiny_config(tmp_path, model__model_config__vocab_size=50, data_stages=stages)
    shape, batch = config.model.model_config, config.global_batch_size
    flops = batch * (4 * shape.flops_per_sequence(16) + 8 * shape.flops_per_sequence(8))
    text = "\n".join(meaning(config))
    assert "12 steps, 1,024 tokens" in text
    assert f"{flops:.3g} FLOP" in text
    assert "128 tokens, at 16 a sequence" in text
    assert "64 tokens, at 8 a sequence" in text


def test_one_length_is_told_once(tmp_path: Path) -> None:
    (first,) = tiny_dict(tmp_path)["data_stages"]
    text = "\n".join(meaning(tiny_config(tmp_path, data_stages=[first | {"sequence_length": 8}])))
    assert "64 tokens, at 8 a sequence" in text
    assert text.count("a sequence") == 1
