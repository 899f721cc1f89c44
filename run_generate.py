"""Write text with a checkpoint, under the name that Nanotron's users type: run_generate.py --ckpt-path FOLDER."""

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
    for axis, name in AXES.items():
        if (size := getattr(found, axis)) not in (0, 1):
            parser.error(f"--{axis} {size}: {name} in generation is not built yet; use --{axis} 1")
    prompts = [f"--prompt={text}" for text in found.prompt]
    return ["generate", found.ckpt_path, f"--max-new-tokens={found.max_new_tokens}", "--temperature=0", *prompts]


if __name__ == "__main__":
    main(arguments())
