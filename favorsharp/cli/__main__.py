"""Runs the command line for `python -m favorsharp.cli`."""

from favorsharp.cli import main

main()
