"""Gene tables that published encoders bring along: symbols and their rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stfm._errors import DataIntegrityError, InputError, MissingKeyError
from stfm.weights._fetch import REMOTE, locate
from stfm.weights.registry import WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stfm.slide.genes import Vocabulary

__all__ = ["read_json", "read_table", "rows_of"]

_COLUMNS = ("gene_name", "gene", "symbol", "gene_symbol")


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the mapping that a JSON file holds."""
    file = _existing(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"{file} is no JSON file ({error})."
        raise DataIntegrityError(msg) from error
    if not isinstance(content, dict):
        msg = f"{file} must hold a mapping of names to values, found a {type(content).__name__}."
        raise DataIntegrityError(msg)
    return content


def read_table(path: str | Path) -> dict[str, int]:
    """Return symbol -> row of a gene table.

    Parameters
    ----------
    path
        JSON of symbols and numbers (scGPT's ``vocab.json``), JSON with a list ``var_names`` (Novae's ``config.json``),
        or a tab- or comma-separated table with a column of symbols in order (scFoundation's gene index).

    Raises
    ------
    MissingKeyError
        There is no such file.
    DataIntegrityError
        The file is no gene table.
    """
    file = _existing(path)
    if file.suffix == ".json":
        content = read_json(file)
        if isinstance(content.get("var_names"), list):
            return _numbered(file, content["var_names"])
        try:
            return {str(name): int(number) for name, number in content.items()}
        except (TypeError, ValueError) as error:
            msg = f"{file} is no table of gene symbols and ids ({error})."
            raise DataIntegrityError(msg) from error
    with file.open(encoding="utf-8", newline="") as lines:
        first = lines.readline()
        lines.seek(0)
        rows = csv.DictReader(lines, delimiter="\t" if "\t" in first else ",")
        column = next((name for name in _COLUMNS if name in (rows.fieldnames or ())), None)
        if column is None:
            msg = f"{file} has no column {' or '.join(_COLUMNS)}; its first line is {first.strip()[:60]!r}."
            raise DataIntegrityError(msg)
        return _numbered(file, [row[column] for row in rows])


def rows_of(
    vocabulary: Vocabulary,
    table: dict[str, int],
    *,
    source: str | Path,
    n_rows: int,
    option: str,
    lower: bool = False,
) -> list[int]:
    """Return the row of every gene of a model in a published table, -1 for those that are not in it.

    Parameters
    ----------
    vocabulary
        Genes of the model, matched by symbol whatever the case.
    table
        As :func:`read_table` gives it.
    source
        Where the table came from, for messages.
    n_rows, option
        Rows that the encoder has, and which of its options says so.
    lower
        Of entries that differ in case alone, prefer the lower-case one instead of the upper-case one.

    Raises
    ------
    InputError
        The table has more rows than the encoder, or not one gene is in it.
    """
    largest = max(table.values(), default=-1)
    if largest >= n_rows:
        msg = f"{source} has rows up to {largest}, the encoder {n_rows}; set option {option}, or give another file."
        raise InputError(msg)
    fold = str.lower if lower else str.upper
    folded: dict[str, int] = {}
    for name, number in table.items():
        if fold(name) not in folded or fold(name) == name:
            folded[fold(name)] = number
    found = [folded.get(fold(str(name)), -1) for name in vocabulary.names]
    if not any(number >= 0 for number in found):
        msg = f"none of the model's {len(found)} genes is in {source}; are its names symbols of this species?"
        raise InputError(msg)
    return found


def _existing(path: str | Path) -> Path:
    """Return where a table lies; one with a name of its own (``"scgpt-genes"``) or an address is fetched."""
    if isinstance(path, str) and (path in WEIGHTS or path.startswith(REMOTE)):
        return locate(path)
    file = Path(path).expanduser()
    if not file.is_file():
        msg = f"There is no gene table {file}."
        raise MissingKeyError(msg)
    return file


def _numbered(file: Path, names: Sequence[Any]) -> dict[str, int]:
    table = {str(name): i for i, name in enumerate(names)}
    if len(table) != len(names):
        msg = f"{file} names {len(names) - len(table)} genes twice, so rows cannot be told apart."
        raise DataIntegrityError(msg)
    return table
