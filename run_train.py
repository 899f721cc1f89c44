"""Train from a YAML, under the name that Nanotron's users type: torchrun ... run_train.py --config-file FILE."""

import argparse

from pentode.cli import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True, help="a YAML config")
    parser.add_argument("overrides", nargs="*", help="a.b.c=value, applied after the file")
    found, others = parser.parse_known_args()
    main(["train", found.config_file, *found.overrides, *others])
