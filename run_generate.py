"""Write text with a checkpoint, under the name that Nanotron's users type: run_generate.py --ckpt-path checkpoints/10/."""

import argparse

from pentode.cli import main


def arguments() -> list[str]:
    """Nanotron's flags as `pentode generate` spells them; a parallel size of 0 means the checkpoint's own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt-path", required=True, help="a checkpoint's folder")
    for axis in ("dp", "pp", "tp"):
        parser.add_argument(
            f"--{axis}", type=int, default=1, choices=(0, 1), help="parallel size; more than 1 comes later"
        )
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    found = parser.parse_args()
    prompts = [word for text in found.prompt for word in ("--prompt", text)]
    return ["generate", found.ckpt_path, "--max-new-tokens", str(found.max_new_tokens), "--temperature", "0", *prompts]


if __name__ == "__main__":
    main(arguments())
