"""Train from a YAML, under the name that Nanotron's users type: torchrun ... run_train.py --config-file FILE."""

import argparse
from typing import NoReturn

from pentode.cli import main
from pentode.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Ends as `pentode` does where the command line is wrong: one line, and 64."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and leave."""
        self.exit(ConfigError.exit_code, f"{self.prog}: {message}\n")


def train_from(flag: str, *, description: str) -> None:
    """Run `pentode train` on the file that `flag` names; all else on the command line is the same."""
    usage = f"%(prog)s {flag} FILE [a.b.c=value ...] [options of pentode train]"
    parser = Parser(description=description, usage=usage)
    parser.add_argument(flag, dest="config", metavar="FILE", required=True, help="a YAML config")
    found, others = parser.parse_known_args()
    main(["train", found.config, *others])


if __name__ == "__main__":
    train_from("--config-file", description=__doc__)
