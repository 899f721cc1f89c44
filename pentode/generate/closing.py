"""What a finished run says: a sample of text, printed and kept beside its checkpoints."""

from pathlib import Path

import numpy as np

from pentode import log
from pentode.generate.sampling import Sampling
from pentode.generate.text import continue_text
from pentode.run.build import Run

SAMPLE = Sampling(max_new_tokens=400, temperature=0.8, top_k=40)
PROMPT_TOKENS = 16  # of the data's own beginning: every vocabulary can say it


def closing_sample(run: Run, root: Path) -> None:
    """Print a sample and keep it as `sample.txt` in the run's folder; nothing where the data has no tokenizer."""
    tokenizer = run.feed.tokenizer
    if tokenizer is None or run.world.rank != 0:
        return
    prompt = tokenizer.decode(run.feed.data.train.samples(np.zeros(1, dtype=np.int64))[0, :PROMPT_TOKENS].tolist())
    text = continue_text(run.stages[0], tokenizer, prompt, config=run.config, sampling=SAMPLE, device=run.device)
    log.info(f"Sample, going on from {prompt!r}:\n{text}")
    (root / "sample.txt").write_text(text, encoding="utf-8")
