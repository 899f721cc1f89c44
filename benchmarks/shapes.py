"""The runs that benchmarks/gpu.py times: model shapes and layouts, as configs of random tokens."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

LLAMA = {
    "1B": (2048, 16, 32, 8, 8192),
    "8B8": (4096, 8, 32, 8, 14336),  # 8 layers of the 8B shape
    "8B16": (4096, 16, 32, 8, 14336),
    "8B": (4096, 32, 32, 8, 14336),
}
VOCABULARY = 128256
STEPS, WARM_UP, EVERY = 40, 10, 5  # steps of a run, of these not counted, and between iteration lines
SHORT = {"steps": 15, "warm_up": 5}  # of a run whose steps are long
MANY = {"micro_batches": 8, "steps": 20, "warm_up": 10}  # a GPU alone may record the 9th or 10th step
SEQUENCE = 4096
RATE = {"learning_rate": 3e-4, "lr_warmup_steps": 10}


@dataclass(frozen=True)
class Case:
    """A run: shape, sequences of a micro-batch, what differs from one GPU's defaults, and torchtitan's options for it.

    steps              of the run
    warm_up            how many of them are not counted, the first ones
    titan              options of torchtitan beside the common ones; None where it is not run beside us
    titan_micro_batch  its own best, if that is another; it does as many sequences a step as ours
    """

    shape: str
    micro_batch: int
    gpus: int = 1
    micro_batches: int = 1
    parallelism: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    zero_stage: int = 0
    steps: int = STEPS
    warm_up: int = WARM_UP
    titan: tuple[str, ...] | None = None
    titan_micro_batch: int | None = None


NO_RECOMPUTATION = ("--activation_checkpoint.mode", "none")
SELECTIVE = ("--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_ac_option", "op")
BF16_STATES = ("--training.dtype", "bfloat16")  # torchtitan trains pure tp and pp in float32 otherwise
TP2 = ("--parallelism.tensor_parallel_degree", "2", "--parallelism.enable_async_tensor_parallel")
PP2 = ("--parallelism.pipeline_parallel_degree", "2", "--parallelism.pipeline_parallel_schedule")

CASES = {
    "1B": Case("1B", 4, titan=NO_RECOMPUTATION),
    "8B8": Case("8B8", 4, titan=NO_RECOMPUTATION),
    "1B best": Case("1B", 8, titan=NO_RECOMPUTATION, titan_micro_batch=4),
    "8B8 best": Case("8B8", 6, titan=NO_RECOMPUTATION, titan_micro_batch=3),
    "1B float8": Case("1B", 4, model={"float8": "tensorwise"}),
    "8B8 float8": Case("8B8", 4, model={"float8": "tensorwise"}),
    "1B x8": Case("1B", 4, **MANY, titan=NO_RECOMPUTATION),
    "8B8 x8": Case("8B8", 4, **MANY, titan=NO_RECOMPUTATION),
    "1B best x8": Case("1B", 8, **MANY | {"micro_batches": 4}, titan=NO_RECOMPUTATION, titan_micro_batch=4),
    "gpt2": Case("gpt2", 16),
    "tiny": Case("tiny", 2, steps=500),
}
TWO_GPUS = {
    "zero1": Case("8B", 3, 2, parallelism={"dp": 2, "recompute_layer": "selective"}, zero_stage=1, titan=SELECTIVE),
    "tp2": Case(
        "8B",
        4,
        2,
        parallelism={"tp": 2, "tp_mode": "REDUCE_SCATTER", "tp_linear_async_communication": True},
        titan=(*SELECTIVE, *BF16_STATES, *TP2),
    ),
    "pp2": Case(
        "8B",
        2,
        2,
        micro_batches=8,
        parallelism={"pp": 2, "pp_engine": "1f1b"},
        titan=(*SELECTIVE, *BF16_STATES, *PP2, "1F1B"),
    ),
    "pp2 interleaved": Case(
        "8B",
        2,
        2,
        micro_batches=8,
        parallelism={"pp": 2, "pp_engine": "interleaved"},
        titan=(*SELECTIVE, *BF16_STATES, *PP2, "Interleaved1F1B"),
    ),
}
CASES |= {  # whole where a card has 141 GB, half of the layers where it has 80
    f"{shape} {name}": replace(case, shape=shape, **SHORT)
    for shape in ("8B", "8B16")
    for name, case in TWO_GPUS.items()
}


def config_of(case: Case, folder: Path) -> dict[str, Any]:
    """The config, as a YAML file would have it, of a run that writes its records to `folder` and saves nothing."""
    tiny = case.shape == "tiny"
    sequence = {"tiny": 256, "gpt2": 1024}.get(case.shape, SEQUENCE)
    return {
        "general": {"project": "benchmark"},
        "parallelism": {"dp": 1, "tp": 1, "pp": 1, **case.parallelism},
        "model": {"model_config": _shape(case.shape, sequence), "init_method": {"std": 0.02}, **case.model},
        "checkpoints": {
            "checkpoints_path": str(folder),
            "checkpoint_interval": 1_000_000,
            "save_final_state": False,
        },
        "logging": {"iteration_step_info_interval": 1 if tiny else EVERY},
        "tokens": {
            "sequence_length": sequence,
            "train_steps": case.steps,
            "micro_batch_size": case.micro_batch,
            "batch_accumulation_per_replica": case.micro_batches,
        },
        "optimizer": optimizer(case.zero_stage) | {"learning_rate_scheduler": RATE},
        "data_stages": [{"name": "random", "start_training_step": 1, "data": {"dataset": None}}],
    }


def optimizer(zero_stage: int) -> dict[str, Any]:
    """What every timed run steps with; the rate is missing."""
    adamw = {"adam_eps": 1e-8, "adam_beta1": 0.9, "adam_beta2": 0.95, "torch_adam_is_fused": True}
    rest = {"weight_decay": 0.1, "clip_grad": 1.0, "accumulate_grad_in_fp32": True}
    return {"optimizer_factory": {"name": "adamW", **adamw}, "zero_stage": zero_stage, **rest}


def _shape(name: str, sequence: int) -> dict[str, Any]:
    if name == "gpt2":
        dropout = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
        return {"type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": sequence, **dropout} | {
            "vocab_size": 50304
        }
    if name == "tiny":
        width, layers, heads, kv_heads, features, vocabulary, tied = 16, 2, 4, 4, 64, 256, True
    else:
        (width, layers, heads, kv_heads, features), vocabulary, tied = LLAMA[name], VOCABULARY, False
    return {
        "type": "llama",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": features,
        "vocab_size": vocabulary,
        "max_position_embeddings": sequence,
        "rope_theta": 500000.0,
        "tie_word_embeddings": tied,
    }
