"""Write text with a model that train.py made, under the name that the nanoGPT2 guide uses: sample.py --start "The "."""

from pathlib import Path

from pentode.cli import main
from pentode.config.load import load_config
from pentode.errors import ConfigError
from run_train import Parser

NANO = Path(__file__).parent / "configs" / "nano.yaml"


def arguments() -> list[str]:
    """nanoGPT's flags as `pentode generate` spells them."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--config", type=Path, default=NANO, help="the config that was trained; default configs/nano.yaml"
    )
    parser.add_argument("--checkpoint_dir", help="another folder with checkpoints")
    parser.add_argument("--start", default="", help="text to go on from")
    parser.add_argument("--num_samples", type=int, default=1)
    parser.add_argument("--max_new_tokens", type=int, default=500)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top_k", type=int, default=40)
    parser.add_argument("--seed", type=int, default=42)
    asked = parser.parse_args()
    if asked.num_samples < 1:
        parser.error(f"--num_samples {asked.num_samples}: give 1 or more")
    try:
        folder = asked.checkpoint_dir or str(load_config(asked.config).checkpoints.folder)
    except ConfigError as error:
        parser.error("\n".join(error.problems))
    options = [
        f"--{name.replace('_', '-')}={getattr(asked, name)}" for name in ("max_new_tokens", "temperature", "top_k")
    ]
    return ["generate", folder, *options, f"--seed={asked.seed}", *[f"--prompt={asked.start}"] * asked.num_samples]


if __name__ == "__main__":
    main(arguments())
