"""What a finished run says: a sample of text, printed and kept beside its checkpoints."""

from pathlib import Path

import numpy as np

from pentode import log
from pentode.generate.engine import Sampling
from pentode.generate.text import continue_text
from pentode.run.build import Run

SAMPLE = Sampling(max_new_tokens=400, temperature=0.8, top_k=40)
PROMPT_TOKENS = 16  # of the data's own beginning: every vocabulary can say it


def closing_sample(run: Run, root: Path) -> None:
    """Write `sample.txt` into the run's folder and print it; nothing where the data has no tokenizer, and so no text."""
    tokenizer = run.feed.tokenizer
    if tokenizer is None or run.world.rank != 0:
        return
    source = run.feed.data.validation or run.feed.data.train
    prompt = tokenizer.decode(source.samples(np.zeros(1, dtype=np.int64))[0, :PROMPT_TOKENS].tolist())
    text = continue_text(
        run.stages[0],
        tokenizer,
        prompt,
        sampling=SAMPLE,
        max_positions=run.config.model.model_config.max_positions,
        device=run.device,
    )
    (root / "sample.txt").write_text(text, encoding="utf-8")
    log.info(f"Sample, going on from {prompt!r}:\n{text}")
