"""Imported once by the server from which workers are forked, so that no case waits for an import."""

import tests.helpers.warm  # noqa: F401
