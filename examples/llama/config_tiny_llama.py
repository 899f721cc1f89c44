"""Builds the configs of the tiny Llama in Python and writes them as YAML beside this file.

usage: python examples/llama/config_tiny_llama.py && pentode train examples/llama/config_tiny_llama.yaml --nproc 8
"""

from dataclasses import replace
from pathlib import Path

from pentode.config.dump import to_yaml
from pentode.config.kinds.datasets import TextFileDatasetArgs
from pentode.config.kinds.init import RandomInit
from pentode.config.kinds.llama import LlamaConfig
from pentode.config.kinds.optimizers import AdamWOptimizerArgs
from pentode.config.schema import (
    CheckpointsArgs,
    Config,
    DataArgs,
    DatasetStageArgs,
    GeneralArgs,
    LRSchedulerArgs,
    ModelArgs,
    OptimizerArgs,
    ParallelismArgs,
    TokensArgs,
)

EIGHT = """\
# Nanotron's tiny Llama, 12.4K parameters, on eight processes: 2 replicas of 2 stages of 2 tensor-parallel ranks.
#   torchrun --nproc_per_node=8 run_train.py --config-file examples/llama/config_tiny_llama.yaml
# One process trains the same with parallelism.dp=1 parallelism.pp=1 parallelism.tp=1 and twice the accumulation.
"""

ONE = """\
# The tiny Llama of Nanotron's tutorial on one process.
#   pentode train examples/llama/one_process.yaml
"""

DATA = """\
# It reads the Python manual byte by byte, so that it runs without a network. The tutorial's own data is
#   tokenizer: {tokenizer_name_or_path: robot-test/dummy-tokenizer-wordlevel}
#   dataset: {hf_dataset_or_datasets: stas/openwebtext-10k, hf_dataset_splits: train, text_column_name: text}
# in each stage. Every key is explained in docs/config.md. Written by config_tiny_llama.py in examples/llama.
"""

MODEL = LlamaConfig(
    hidden_size=16,
    intermediate_size=64,
    max_position_embeddings=256,
    num_attention_heads=4,
    num_hidden_layers=2,
    num_key_value_heads=4,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    vocab_size=256,
)

OPTIMIZER = OptimizerArgs(
    optimizer_factory=AdamWOptimizerArgs(adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, torch_adam_is_fused=True),
    zero_stage=1,
    weight_decay=0.01,
    clip_grad=1.0,
    accumulate_grad_in_fp32=True,
    learning_rate_scheduler=LRSchedulerArgs(
        learning_rate=3e-4, lr_warmup_steps=2, lr_decay_style="cosine", lr_decay_steps=13, min_decay_lr=1e-5
    ),
)

TEXT = DataArgs(dataset=TextFileDatasetArgs(text_file="pydoc_data.topics", tokenization="byte"))

CONFIG = Config(
    general=GeneralArgs(project="debug", run="tiny_llama_%date_%jobid"),
    parallelism=ParallelismArgs(
        dp=2, pp=2, tp=2, pp_engine="1f1b", tp_mode="REDUCE_SCATTER", tp_linear_async_communication=True
    ),
    model=ModelArgs(model_config=MODEL, init_method=RandomInit(std=0.025)),
    checkpoints=CheckpointsArgs(checkpoints_path=Path("checkpoints"), checkpoint_interval=10),
    tokens=TokensArgs(sequence_length=256, train_steps=15, micro_batch_size=2, batch_accumulation_per_replica=2),
    optimizer=OPTIMIZER,
    data_stages=[
        DatasetStageArgs(name="Stable Training Stage", start_training_step=1, data=TEXT),
        DatasetStageArgs(name="Annealing Phase", start_training_step=10, data=TEXT),
    ],
)

ONE_PROCESS = replace(
    CONFIG,
    parallelism=replace(CONFIG.parallelism, dp=1, pp=1, tp=1),
    tokens=replace(CONFIG.tokens, batch_accumulation_per_replica=1),
    optimizer=replace(CONFIG.optimizer, zero_stage=0),
)


if __name__ == "__main__":
    here = Path(__file__).parent
    (here / "config_tiny_llama.yaml").write_text(EIGHT + DATA + to_yaml(CONFIG), encoding="utf-8")
    (here / "one_process.yaml").write_text(ONE + DATA + to_yaml(ONE_PROCESS), encoding="utf-8")
