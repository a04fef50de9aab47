"""The command line, with the commands `favorsharp compare`, `favorsharp info` and `favorsharp matrix`.

The console script `favorsharp` and `python -m favorsharp` call `main`.
"""

import os
import sys
from typing import Any

COMMANDS = ("compare", "info", "matrix")
TRACEBACK = "FAVORSHARP_TRACEBACK"
"""The environment variable that turns on tracebacks; without it, an error is one line."""
_INTERRUPTED = 130


def main() -> None:
    """Run the command line. Every error, also a missing package, prints one line and exits with code 2."""
    if sys.argv[1:] == ["--version"]:  # the option --version needs no other package
        _print_version(True)
    try:
        import matplotlib  # noqa: F401
        import rich  # noqa: F401
        import typer
    except ImportError as error:
        _stop(f"favorsharp's command line needs {error.name}: pip install 'favorsharp[cli]'")
    try:
        code = _app()(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        _stop(_line(error))
    if code == _INTERRUPTED:
        _stop("favorsharp: interrupted", code)
    raise SystemExit(code or 0)


def _app() -> Any:
    import typer

    from favorsharp.cli.compare import compare
    from favorsharp.cli.info import info
    from favorsharp.cli.matrix import matrix

    app = typer.Typer(
        name="favorsharp",
        help="Linear-time attention from positive random features: measure it on your own queries and keys.",
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    shown = typer.Option(False, "--version", is_eager=True, callback=_print_version, help="Print the version.")

    @app.callback(invoke_without_command=True)
    def start(context: typer.Context, version: bool = shown) -> None:
        if context.invoked_subcommand is None:
            typer.echo(context.get_help())

    for command in (compare, info, matrix):
        app.command()(command)
    return app


def _print_version(asked: bool) -> None:
    if asked:
        import favorsharp

        sys.stdout.write(f"favorsharp {favorsharp.__version__}\n")
        raise SystemExit(0)


def _line(error: Exception) -> str:
    """The line that is printed for an error."""
    command = " ".join(["favorsharp", *(word for word in sys.argv[1:2] if word in COMMANDS)])
    if hasattr(error, "format_message"):  # an option or argument that the parser refuses
        return f"{command}: {' '.join(error.format_message().split()).rstrip('.')}; see {command} --help"
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ValueError | TypeError | ImportError | OSError | MemoryError):
        return f"{command}: {text}"
    return f"{command}: {type(error).__name__}: {text} ({TRACEBACK}=1 shows where; please report it)"


def _stop(line: str, code: int = 2) -> Any:
    sys.stderr.write(f"{line}\n")
    raise SystemExit(code)
