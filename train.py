"""Train from a small config, under the name that the nanoGPT2 guide uses: train.py --config configs/nano.yaml."""

import argparse

from pentode.cli import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML config")
    parser.add_argument("overrides", nargs="*", help="a.b.c=value, applied after the file")
    found, others = parser.parse_known_args()
    main(["train", found.config, *found.overrides, *others])
