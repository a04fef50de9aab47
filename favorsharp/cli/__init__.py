"""The command line: `favorsharp compare`, `favorsharp info`, `favorsharp matrix`."""

import sys


def main() -> None:
    """Run the command line, or say what to install for it."""
    try:
        import matplotlib  # noqa: F401
        import rich  # noqa: F401
        import typer
    except ImportError as error:
        sys.stderr.write(f"favorsharp's command line needs {error.name}: pip install 'favorsharp[cli]'\n")
        raise SystemExit(2) from None
    from favorsharp.cli.compare import compare
    from favorsharp.cli.info import info
    from favorsharp.cli.matrix import matrix

    app = typer.Typer(
        name="favorsharp",
        help="Linear-time attention from positive random features: measure it on your own queries and keys.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for command in (compare, info, matrix):
        app.command()(command)
    app()
