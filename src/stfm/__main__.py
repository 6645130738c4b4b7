"""``python -m stfm`` and the ``stfm`` command."""

from __future__ import annotations


def main() -> None:
    """Run the command line; an error of stfm is one line on stderr and exit status 1."""
    import sys

    from stfm._errors import StfmError
    from stfm.cli import app

    try:
        app()
    except StfmError as error:
        from rich.console import Console
        from rich.text import Text

        Console(stderr=True, soft_wrap=True).print(Text.assemble(("stfm: ", "bold red"), str(error)))
        sys.exit(1)


if __name__ == "__main__":
    main()
