"""``stfm weights``: list, fetch, verify, path, hash."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import pandas as pd

app = typer.Typer(help="Published weights on this machine.", no_args_is_help=True)

_Name = Annotated[str, typer.Argument(help="Name of weights, as `stfm weights list` shows it.")]
STATES = {"ok": "green", "absent": "dim", "unlisted": "yellow", "damaged": "bold red"}


@app.command("list")
def show() -> None:
    """List the weights that have a name, and say which are here."""
    from stfm import weights

    table = weights.list_weights()
    table["size"] = ["" if size != size else f"{size:.1f} MiB" for size in table["size"]]
    table["here"] = ["yes" if there else "no" for there in table["there"]]
    _print(table.reset_index(names="name")[["name", "version", "kind", "size", "licence", "here"]])
    for name, summary in table["summary"].items():  # below: beside the rest it would be a column of syllables
        typer.echo(f"{name}: {summary}")


@app.command()
def fetch(name: _Name) -> None:
    """Fetch weights into the cache, check them, and print where they are."""
    from stfm import weights

    typer.echo(weights.fetch(name))


@app.command()
def verify(
    name: Annotated[str | None, typer.Argument(help="Name of weights; all where it is left out.")] = None,
) -> None:
    """Compare the weights that are here with their sha256; exit status 1 if one is damaged, or NAME is not here."""
    from stfm import weights

    found = weights.verify(name)
    _print(found)
    if found["state"].isin(["damaged"] if name is None else ["damaged", "absent"]).any():
        raise typer.Exit(1)


@app.command()
def path(name: _Name) -> None:
    """Print where weights are; nothing is fetched."""
    from stfm import weights

    typer.echo(weights.path(name))


@app.command("hash")
def hashes(folder: Annotated[Path, typer.Argument(help="Folder or file that is to have a row.")]) -> None:
    """Print the lines of the table of weights (registry.toml) for a folder: size, and the sha256 of each file."""
    from stfm._download import sha256_of
    from stfm._errors import MissingKeyError

    if not folder.exists():
        msg = f"There is no folder or file {folder}."
        raise MissingKeyError(msg)
    files = sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else [folder]
    base = folder if folder.is_dir() else folder.parent
    typer.echo(f"size = {sum(file.stat().st_size for file in files)}")
    typer.echo(f"[{folder.stem}.files]")
    for file in files:
        typer.echo(f'"{file.relative_to(base).as_posix()}" = "{sha256_of(file)}"')


def _print(frame: pd.DataFrame) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for column in frame.columns:
        table.add_column(column, overflow="fold", no_wrap=column not in {"file", "path"})
    for row in frame.astype(str).itertuples(index=False):
        table.add_row(*(Text(value, style=STATES.get(value, "")) for value in row))
    Console().print(table)
