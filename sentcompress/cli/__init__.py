"""The command line: one file a command, each of which parses, calls and prints.

Importing this package imports neither torch nor pydantic, so that ``--help`` and shell completion are quick:
commands import what they call when they are called.
"""

from sentcompress.cli.app import app, main

__all__ = ["app", "main"]
