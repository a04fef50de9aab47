"""Runs the command line for `python -m favorsharp`."""

from favorsharp.cli import main

if __name__ == "__main__":
    main()
