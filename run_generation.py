"""The older name of run_generate.py."""

from pentode.cli import main
from run_generate import arguments

if __name__ == "__main__":
    main(arguments())
