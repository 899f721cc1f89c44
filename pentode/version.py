"""The version, in one place: the wheel, `pentode --version` and checkpoints read it here."""

VERSION = "0.1.0"
