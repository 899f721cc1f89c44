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


def test_one_process_has_no_layout_to_tell(tmp_path: Path) -> None:
    text = "\n".join(meaning(tiny_config(tmp_path, model__model_config__vocab_size=50)))
    for word in ("parallel", "pipeline", "ZeRO", "each rank"):
        assert word not in text


def test_the_layout_is_told(tmp_path: Path) -> None:
    shape = {"type": "llama", "hidden_size": 32, "num_attention_heads": 8, "num_hidden_layers": 4, "vocab_size": 50}
    layout = {"dp": 3, "tp": 4, "pp": 2, "pp_engine": "interleaved", "tp_mode": "REDUCE_SCATTER"}
    config = tiny_config(
        tmp_path,
        model__model_config=shape | {"num_key_value_heads": 2, "intermediate_size": 64},
        parallelism=layout,
        optimizer__zero_stage=1,
    )
    text = "\n".join(meaning(config))
    count = config.model.model_config.parameter_count()
    assert "24 = pp 2 x dp 3 x cp 1 x tp 4" in text
    assert "heads on a rank: 2 query, 1 key/value; each key/value head on 2 ranks; tokens cut" in text
    assert "4 stages, 2 on a rank; interleaved: idle for 20% of a step" in text  # (pp - 1) / (2 x 2 + pp - 1)
    assert "adamW, learning rate 0.01, ZeRO-1 over dp 3" in text
    assert f"{count * (4 + 4 + 8 / 3) / 8 / 1000:.3g}KB of that on each rank" in text
