"""``python -m stfm`` and the ``stfm`` command."""

from __future__ import annotations


def main() -> None:
    """Run the command line (``stfm --help`` lists the commands)."""
    from stfm.cli import app

    app()


if __name__ == "__main__":
    main()
