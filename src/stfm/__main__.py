"""``python -m stfm`` and the ``stfm`` command."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def main() -> None:
    """Run the command line; an error of stfm is one line on stderr and exit status 1, a warning is one line."""
    import sys

    from stfm._errors import StfmError
    from stfm.cli import app

    try:
        with _warnings_in_one_line():
            app()
    except StfmError as error:
        _say(str(error), "bold red")
        sys.exit(1)


def _say(text: str, style: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text.assemble(("stfm: ", style), text))


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Show a warning of stfm once, without the line of code that nobody typed."""
    import warnings

    from stfm._errors import StfmWarning

    told: set[str] = set()
    with warnings.catch_warnings():
        plain = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *rest: object, **more: object) -> None:
            if not issubclass(category, StfmWarning):
                plain(message, category, *rest, **more)  # type: ignore[arg-type]
            elif str(message) not in told:
                told.add(str(message))
                _say(f"warning: {message}", "bold yellow")

        warnings.showwarning = show
        yield


if __name__ == "__main__":
    main()
