"""What of a step is one kernel of ours, and what torch compiles: blocks, one graph for all of a kind; loss; optimizer.

On a GPU the operators of a Llama's blocks, the loss and AdamW are Triton kernels. Where they do all of a block
(`has_all_kernels`) nothing is compiled, and a run begins without torch's compiler, whose import and tracing take longer
than all else (docs/performance.md).
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, ParamSpec

import torch
from torch import Tensor

from pentode import device as devices
from pentode.config.kinds.llama import LlamaConfig
from pentode.config.schema import Config
from pentode.errors import ConfigError
from pentode.nn.causal_lm import CausalLM, run_block
from pentode.ops import flash
from pentode.ops.cross_entropy import PLAIN, TO_COMPILE, Passes
from pentode.ops.fused_products import left_out
from pentode.optim.adamw import Update, update_
from pentode.parallel.recompute import recomputing

# torch keeps a compiled graph with an autograd Function in its cache only if told that this is safe. It is here: both
# directions are in the traced graph, by which an entry is found, and groups, sizes and ranks are literals in it.
CACHED: dict[str, Any] = {
    "unsafe_marked_cacheable_functions": {"torch.ops.higher_order.autograd_function_apply": torch.__version__}
}

P = ParamSpec("P")


class Kernels(NamedTuple):
    """What a step computes outside of its blocks: in plain form, compiled, or by kernels of ours.

    loss    the passes over logits
    update  AdamW's update in one pass, for buffers of all lengths; None: torch's operators
    """

    loss: Passes = PLAIN
    update: Update | None = None


def is_wanted(config: Config, device: torch.device) -> bool:
    """Whether to compile, as the config says; by itself, on a GPU, where kernels do not do all of a block."""
    mode = config.model.compile
    return mode == "on" or (mode == "auto" and devices.is_gpu(device) and not has_all_kernels(config))


def has_all_kernels(config: Config) -> bool:
    """Whether there is a kernel for everything in a block that is neither a product nor attention."""
    model, p = config.model, config.parallelism
    shape = model.model_config
    return (
        isinstance(shape, LlamaConfig)
        and shape.hidden_act == "silu"
        and model.dtype != "float64"
        and model.float8 is None
        and model.activation_budget == 1
        and p.recompute_layer != "selective"
        and p.tp == 1
    )


def kernels(config: Config, device: torch.device) -> Kernels:
    """Of loss and optimizer: on a GPU kernels of ours, but for float64; on a CPU compiled, where that is wanted."""
    if devices.is_gpu(device):
        if config.model.dtype == "float64" or config.model.compile == "off":
            return Kernels()
        from pentode.ops.cross_entropy_kernel import PASSES
        from pentode.optim.adamw_kernel import update_ as by_kernel

        return Kernels(PASSES, by_kernel)
    if not is_wanted(config, device):
        return Kernels()
    loss = (one and torch.compile(one, fullgraph=True) for one in TO_COMPILE)
    return Kernels(Passes(*loss), update=torch.compile(update_, fullgraph=True, dynamic=True))


def prepare_blocks(models: Iterable[CausalLM], config: Config, *, device: torch.device) -> bool:
    """Set how the models run their blocks, as the config says. Returns whether they are compiled."""
    plain = config.model.compile == "off" and devices.is_gpu(device)
    wanted, budget = is_wanted(config, device), config.model.activation_budget
    mode = config.parallelism.recompute_layer
    block = devices.without_kernels()(run_block) if plain else run_block
    if mode is True and devices.is_gpu(device) and not wanted:
        block = left_out()(block)  # torch's products keep their operands before they multiply: the last is not repeated
    block = recomputing(block, mode)
    if wanted:
        _load_attention(config, device)
        torch.compiler.reset()  # the limit of graphs is shared by all models that a process ever compiled
        block = torch.compile(block, fullgraph=True, options=CACHED)
        block = block if budget == 1 else _keeping(budget, block)
    elif budget < 1:
        raise ConfigError(
            [f"model.activation_budget: {budget}, but blocks are not compiled here; set model.compile to on"]
        )
    for model in models:
        model.run_block = block
        if plain:
            model.forward = devices.without_kernels()(model.forward)  # embedding and loss, too
    return wanted


def _load_attention(config: Config, device: torch.device) -> None:
    """Have the kernels at hand that attention of this size is done by: what is being compiled cannot import them."""
    if devices.is_gpu(device) and attends_long(config):
        flash.PACKAGE.is_usable(device)


def attends_long(config: Config) -> bool:
    """Whether the model's attention is large enough for FlashAttention-4."""
    shape, tokens = config.model.model_config, config.tokens
    longest = max([tokens.sequence_length, *(stage.sequence_length or 0 for stage in config.data_stages)])
    scores = tokens.micro_batch_size * shape.heads // config.parallelism.tp * longest**2
    return scores * shape.head_dim >= flash.LARGE


def _keeping(budget: float, block: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """The compiled block, of whose activations this share is kept; inductor chooses what is cheapest to have again."""
    from torch._functorch import config as partitioner

    def run(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        with partitioner.patch(activation_memory_budget=budget):  # read when it is compiled
            return block(*args, **kwargs)

    return run
