"""`python -m favorsharp`: the command line."""

from favorsharp.cli import main

if __name__ == "__main__":
    main()
