"""Write text with a model that train.py made, under the names that the nanoGPT2 guide uses.

usage: python sample.py [--config configs/nano.yaml] [--start TEXT] [--num_samples 1] [--max_new_tokens 500]
"""

import argparse
from pathlib import Path

from pentode.cli import main
from pentode.config.load import load_config
from pentode.errors import ConfigError


def folder_of(config: str) -> Path:
    """The folder that a config's run was saved to."""
    try:
        return load_config(Path(config)).checkpoints.checkpoints_path
    except ConfigError as error:
        raise SystemExit("\n".join(error.problems)) from None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/nano.yaml", help="the config that was trained")
    parser.add_argument("--checkpoint_dir", help="another folder with checkpoints")
    parser.add_argument("--start", default="", help="text to go on from")
    parser.add_argument("--num_samples", type=int, default=1)
    parser.add_argument("--max_new_tokens", type=int, default=500)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top_k", type=int, default=40)
    parser.add_argument("--seed", type=int, default=42)
    asked = parser.parse_args()
    folder = asked.checkpoint_dir or str(folder_of(asked.config))
    options = [
        f"--max-new-tokens={asked.max_new_tokens}",
        f"--temperature={asked.temperature}",
        f"--top-k={asked.top_k}",
    ]
    prompts = [f"--prompt={asked.start}"] * asked.num_samples
    main(["generate", folder, *prompts, *options, f"--seed={asked.seed}"])
