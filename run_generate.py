"""Write text with a checkpoint, under the name that Nanotron's users type: run_generate.py --ckpt-path FOLDER."""

from pathlib import Path

import yaml

from pentode.cli import main
from run_train import Parser

AXES = {"dp": "data parallelism", "pp": "pipeline parallelism", "tp": "tensor parallelism"}


def arguments() -> list[str]:
    """Nanotron's flags as `pentode generate` spells them; a parallel size of 0 means the checkpoint's own."""
    parser = Parser(description=__doc__)
    parser.add_argument("--ckpt-path", required=True, help="a checkpoint's folder")
    for axis, name in AXES.items():
        parser.add_argument(f"--{axis}", type=int, default=int(axis == "dp"), help=f"{name}; 0: the checkpoint's own")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times; none: a new text")
    parser.add_argument("--use-cache", action="store_true", help="keys and values are always kept")
    found = parser.parse_args()
    if found.dp not in (0, 1):
        parser.error(f"--dp {found.dp}: replicas would write the same text; use --dp 1")
    layout = [f"--{axis}={getattr(found, axis) or trained_size(found.ckpt_path, axis)}" for axis in ("tp", "pp")]
    prompts = [f"--prompt={text}" for text in found.prompt]
    words = [f"--max-new-tokens={found.max_new_tokens}", "--temperature=0", *layout, *prompts]
    return ["generate", found.ckpt_path, *words]


def trained_size(checkpoint: str, axis: str) -> int:
    """How many ranks of an axis trained the checkpoint; 1 where it does not say, and `generate` will tell why."""
    path = Path(checkpoint) / "config.yaml"
    found = yaml.safe_load(path.read_text()) if path.is_file() else None
    return found["parallelism"][axis] if isinstance(found, dict) else 1


if __name__ == "__main__":
    main(arguments())
