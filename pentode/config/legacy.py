"""Former spellings into today's: older Nanotron files, the nanoGPT2 guide's flat keys, keys that never acted."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from pentode.config.tree import Items, Place, Problem, Section, assign, get, lay_under, path_of, place_of, tree_of
from pentode.config.validate import shown

ADAM = ("adam_eps", "adam_beta1", "adam_beta2", "torch_adam_is_fused")  # once beside zero_stage
ANYTHING = object()


class Inert(NamedTuple):
    """A key without effect: the values at which it changes nothing, and why, or what its other values would need."""

    values: tuple[Any, ...]
    why: str


SWITCH = (True, False, None)
KERNEL = "kernels are chosen by the device and give the same numbers"
QWEN = "part of Qwen2 shapes, which are not built yet"

# The keys that never acted in Nanotron, or that act only in what is not built yet.
INERT: dict[str, Inert] = {
    "checkpoints.checkpoints_path_is_shared_file_system": Inert(SWITCH, "a folder is made by whoever finds it missing"),
    "checkpoints.datastates.parser_threads": Inert((ANYTHING,), "a checkpoint is written without parsing anything"),
    "doremi": Inert((None,), "DoReMi is not built yet"),
    "general.kill_switch_path": Inert((None,), "stop a run with SIGTERM; it saves first"),
    "model.model_config.initializer_range": Inert((ANYTHING,), "model.init_method decides"),
    "model.model_config.pretraining_tp": Inert((1, None), "tensor parallelism is parallelism.tp"),
    "model.model_config.use_cache": Inert(SWITCH, "generation always keeps keys and values, training never"),
    "model.model_config.attention_bias": Inert((False, None), "biases in Llama's attention are not built yet"),
    "model.model_config.mlp_bias": Inert((False, None), "biases in Llama's MLP are not built yet"),
    "model.model_config._attn_implementation": Inert(
        ("flash_attention_2", "flex_attention", "sdpa", "eager", None), "context parallelism is not built yet"
    ),
    "model.model_config._fused_rotary_emb": Inert(SWITCH, KERNEL),
    "model.model_config._fused_rms_norm": Inert(SWITCH, KERNEL),
    "model.model_config._use_qkv_packed": Inert(SWITCH, KERNEL),
    "model.model_config._use_doc_masking": Inert((False, None), QWEN),
    "model.model_config.log_attn_probs": Inert((False, None), QWEN),
    "model.model_config.moe_config": Inert((None,), "mixtures of experts are not built yet"),
    "model.model_config.sliding_window_size": Inert((None,), QWEN),
    "model.model_config.flex_attention_mask": Inert((None,), QWEN),
    "model.model_config.no_rope_layer": Inert((None,), QWEN),
    "model.model_config.rope_seq_len_interpolation_factor": Inert((None,), QWEN),
    "model.model_config.ring_attn_heads_k_stride": Inert((None,), "context parallelism is not built yet"),
    "model.model_config.scale_attn_weights": Inert((True, None), "scores are always divided by sqrt(head size)"),
    "model.model_config.attention_softmax_in_fp32": Inert(SWITCH, "softmax is always in float32 or better"),
    "model.model_config.scale_attention_softmax_in_fp32": Inert(SWITCH, "softmax is always in float32 or better"),
    "parallelism.moe_layer_recompute": Inert((False, None), "mixtures of experts are not built yet"),
    "parallelism.recompute_granularity": Inert(("SELECTIVE", "selective", None), "use parallelism.recompute_layer"),
    "s3_upload.s5cmd_path": Inert((ANYTHING,), "uploads need no program of their own"),
    "tokenizer.tokenizer_max_length": Inert((None,), "texts are never cut"),
    "tokenizer.tokenizer_revision": Inert((None,), "give a local tokenizer, which has one"),
    "tokens.limit_test_batches": Inert((0, None), "there is no test loop"),
}

# The nanoGPT2 guide's flat keys, and where their values go.
FLAT: dict[str, tuple[str, ...]] = {
    "vocab_size": ("model.model_config.vocab_size",),
    "block_size": ("model.model_config.n_positions", "tokens.sequence_length"),
    "n_layer": ("model.model_config.n_layer",),
    "n_head": ("model.model_config.n_head",),
    "n_embd": ("model.model_config.n_embd",),
    "dropout": tuple(f"model.model_config.{place}_pdrop" for place in ("embd", "resid", "attn")),
    "batch_size": ("tokens.micro_batch_size",),
    "learning_rate": ("optimizer.learning_rate_scheduler.learning_rate",),
    "max_iters": ("tokens.train_steps",),
    "eval_iters": ("tokens.limit_val_batches",),
    "eval_interval": ("tokens.val_check_interval",),
    "device": ("general.device",),
    "mixed_precision": ("model.dtype",),
    "save_checkpoint": ("checkpoints.save_final_state",),
    "checkpoint_interval": ("checkpoints.checkpoint_interval",),
    "checkpoint_dir": ("checkpoints.checkpoints_path",),
    "data_path": ("data_stages.0.data.dataset.text_file",),
}
NEVER = 10**9  # a checkpoint interval that no run reaches

# The rest of such a run, and the guide's values for keys left out.
FLAT_BASE: dict[str, Any] = {
    "general": {"project": "nanogpt2", "run": "%date_%jobid"},
    "parallelism": {"dp": 1, "pp": 1, "tp": 1},
    "model": {
        "model_config": {
            "type": "gpt2",
            "vocab_size": -1,
            "n_positions": 128,
            "n_layer": 4,
            "n_head": 4,
            "n_embd": 64,
            "embd_pdrop": 0.1,
            "resid_pdrop": 0.1,
            "attn_pdrop": 0.1,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        "init_method": {"std": 0.02},
        "dtype": "float32",
    },
    "checkpoints": {"checkpoints_path": "checkpoints", "checkpoint_interval": 1000},
    "logging": {"iteration_step_info_interval": 100},
    "tokens": {
        "sequence_length": 128,
        "train_steps": 5000,
        "micro_batch_size": 64,
        "batch_accumulation_per_replica": 1,
        "val_check_interval": 500,
        "limit_val_batches": 100,
    },
    "optimizer": {
        "optimizer_factory": {
            "name": "adamW",
            "adam_eps": 1e-8,
            "adam_beta1": 0.9,
            "adam_beta2": 0.95,
            "torch_adam_is_fused": True,
        },
        "zero_stage": 0,
        "weight_decay": 0.1,
        "clip_grad": 1.0,
        "accumulate_grad_in_fp32": True,
        "learning_rate_scheduler": {"learning_rate": 1e-3},
    },
    "data_stages": [
        {
            "name": "text",
            "start_training_step": 1,
            "data": {"dataset": {"text_file": "pydoc_data.topics"}, "validation_fraction": 0.1},
        }
    ],
}


class Former(NamedTuple):
    """What a translation found: problems, lines worth telling, and keys worth suggesting for unknown ones."""

    problems: list[Problem]
    notes: list[str]
    words: tuple[str, ...]


def translate(tree: Section) -> Former:
    """Rewrite former spellings in place, each value keeping the place where it was written."""
    if is_flat(tree):
        return Former(list(_unflatten(tree)), [], tuple(FLAT))
    notes = list(_respell(tree))
    problems, unheard = [], []
    for dotted, inert in INERT.items():
        *parents, key = dotted.split(".")
        section = get(tree, ".".join(parents)) if parents else tree
        if isinstance(section, Section) and key in section:
            value = section.pop(key)  # its place stays, for the problem's line
            if ANYTHING not in inert.values and value not in inert.values:
                problems.append(Problem(path_of(dotted), f"{shown(value)}; {inert.why}; use {shown(inert.values[0])}"))
            elif value is not None:
                unheard.append(dotted)
    if unheard:
        notes.append(f"no effect here: {', '.join(unheard)}")
    return Former(problems, notes, ())


def is_flat(tree: Section) -> bool:
    """Whether a file is written in the guide's flat keys."""
    return any(key in FLAT for key in tree) and not any(isinstance(tree.get(key), Section) for key in FLAT_BASE)


def _unflatten(tree: Section) -> Iterator[Problem]:
    for key in [key for key in tree if key in FLAT]:
        value, place = tree.take(key)
        if key in ("mixed_precision", "save_checkpoint") and not isinstance(value, bool):
            yield Problem((key,), f"{shown(value)} is not true or false")
            continue
        if key == "mixed_precision":
            value = "bfloat16" if value else "float32"
        for dotted in FLAT[key]:
            _write(tree, dotted, value, place)
    if get(tree, "checkpoints.save_final_state") is False:
        _write(tree, "checkpoints.checkpoint_interval", NEVER, place_of(tree, ("checkpoints", "save_final_state")))
    lay_under(tree, tree_of(FLAT_BASE))
    if get(tree, "model.model_config.vocab_size") == 256:  # "for byte-level tokenization", says the guide
        _write(tree, "data_stages.0.data.dataset.tokenization", "byte", None)


def _write(tree: Section, dotted: str, value: Any, place: Place | None) -> None:
    if dotted.startswith("data_stages.0") and "data_stages" not in tree:
        tree.put("data_stages", tree_of(FLAT_BASE["data_stages"]), place)
    assign(tree, path_of(dotted), value, place=place)


def _respell(tree: Section) -> Iterator[str]:
    """Older spellings of Nanotron's and Kenotron's; a line for each found."""
    data = tree.get("data")
    if isinstance(data, Section) and tree.get("data_stages") is None:
        stage = Section()
        stage.put("name", "Training Stage", None)
        stage.put("start_training_step", 1, None)
        stage.put("data", *tree.take("data"))
        tree.put("data_stages", Items([stage]), stage.places.get("data"))
        yield "data: is now data_stages.0.data"
    optimizer = tree.get("optimizer")
    if isinstance(optimizer, Section) and "optimizer_factory" not in optimizer:
        flat = [key for key in (*ADAM, "name") if key in optimizer]
        if flat:
            factory = Section()
            for key in flat:
                factory.put(key, *optimizer.take(key))
            optimizer.put("optimizer_factory", factory, next(iter(factory.places.values()), None))
            yield f"optimizer: {', '.join(flat)} are now in optimizer.optimizer_factory"
    checkpoints = tree.get("checkpoints")
    if isinstance(tree.get("datastates"), Section) and isinstance(checkpoints, Section):
        checkpoints.put("datastates", *tree.take("datastates"))
        yield "datastates: is now checkpoints.datastates"
    if isinstance(dtype := get(tree, "model.dtype"), str) and dtype.startswith("torch."):
        tree["model"]["dtype"] = dtype.removeprefix("torch.")
    scaling = get(tree, "model.model_config.rope_scaling")
    if isinstance(scaling, Section) and "type" in scaling and "rope_type" not in scaling:
        scaling.put("rope_type", *scaling.take("type"))
    stages = tree.get("data_stages")
    for stage in stages if isinstance(stages, Items) else ():
        dataset = get(stage, "data.dataset")
        if isinstance(dataset, Section):
            yield from _respell_dataset(dataset)


def _respell_dataset(dataset: Section) -> Iterator[str]:
    if "dataset_path" in dataset and "dataset_folder" not in dataset:
        dataset.put("dataset_folder", *dataset.take("dataset_path"))
        yield "data_stages: dataset_path is now dataset_folder"
    folders = dataset.get("dataset_folder")
    if isinstance(folders, Section) and "dataset_weights" not in dataset:
        _, place = dataset.take("dataset_folder")
        dataset.put("dataset_folder", Items(folders), place)
        dataset.put("dataset_weights", Items(folders.values()), place)
