"""Models of transformers at tiny size, ours in a checkpoint's folder, and whether the two say the same."""

from pathlib import Path

import torch
import transformers

from pentode.checkpoint.folder import open_checkpoint
from pentode.checkpoint.layout import Saved
from pentode.checkpoint.load import read_tensors
from pentode.config.kinds.gpt2 import GPT2Config
from pentode.config.kinds.llama import LlamaConfig
from pentode.config.load import load_config
from pentode.dist.mesh import Mesh
from pentode.generate.engine import generate
from pentode.generate.sampling import Sampling
from pentode.models.registry import model_for
from pentode.nn.causal_lm import CausalLM, Part
from pentode.parallel.batch import batch_of


def reference(shape: LlamaConfig | GPT2Config) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    kind = transformers.AutoConfig.for_model(**shape.to_hf(), initializer_range=0.3)
    model = transformers.AutoModelForCausalLM.from_config(kind, dtype=torch.float32).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn_like(param))  # so that no bias is 0 and no norm 1
    model.generation_config.eos_token_id = None
    return model


def ours(folder: Path) -> CausalLM:
    """The model of a checkpoint's folder."""
    config = load_config(folder / "config.yaml")
    shape = config.model.model_config
    model = model_for(shape).build(
        shape,
        Mesh.single(),
        Part.whole(shape.num_layers),
        device=torch.device("cpu"),
        dtype=getattr(torch, config.model.dtype),
        vocab_size_padded=shape.vocab_size,
    )
    into = {name: Saved.whole(param.detach()) for name, param in model.named_parameters()}
    read_tensors(open_checkpoint(folder), "weights", into)
    return model.eval()


@torch.no_grad()
def assert_equal(model: CausalLM, theirs: transformers.PreTrainedModel) -> None:
    """The same logits and the same greedy texts."""
    drawn = torch.randint(model.vocab.size, (2, 13), generator=torch.Generator().manual_seed(1))
    want = theirs(drawn[:, :-1]).logits.flatten(0, 1)
    got = model.logits(None, batch_of(drawn, samples=torch.arange(2)))
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    short = drawn[:, :5]
    length = min(20, theirs.config.max_position_embeddings - short.shape[1])
    sampling = Sampling(max_new_tokens=length, temperature=0)
    text = theirs.generate(
        short, attention_mask=torch.ones_like(short), do_sample=False, max_new_tokens=length, eos_token_id=None
    )
    positions = theirs.config.max_position_embeddings
    assert torch.equal(generate(model, short, sampling=sampling, max_positions=positions), text)
