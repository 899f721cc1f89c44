"""What a finished run says: a sample of text, printed and kept beside its checkpoints."""

from pathlib import Path

import numpy as np

from pentode import log
from pentode.generate.engine import Speaker
from pentode.generate.sampling import Sampling
from pentode.generate.text import continue_text
from pentode.run.build import Run

SAMPLE = Sampling(max_new_tokens=400, temperature=0.8, top_k=40)
PROMPT_TOKENS = 16  # of the data's own beginning: every vocabulary can say it


def closing_sample(run: Run, root: Path) -> None:
    """Print a sample and keep it as `sample.txt` in the run's folder; nothing where the data has no tokenizer.

    The ranks of the first data-parallel replica speak, the others go home.
    """
    run.master.wait_for()  # on every rank: none may leave while its weights are on their way to others
    tokenizer = run.feed.tokenizer
    if tokenizer is None or run.mesh.data.rank != 0:
        return
    prompt = tokenizer.decode(run.feed.data.train.samples(np.zeros(1, dtype=np.int64))[0, :PROMPT_TOKENS].tolist())
    speaker = Speaker(run.stages, run.mesh, run.pipeline.channels, run.pipeline.schedule.placement)
    text = continue_text(speaker, tokenizer, prompt, config=run.config, sampling=SAMPLE, device=run.device)
    if run.world.rank != 0:
        return
    log.info(f"Sample, going on from {prompt!r}:\n{text}")
    (root / "sample.txt").write_text(text, encoding="utf-8")
