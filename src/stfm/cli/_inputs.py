"""Slides by the words of a command line: the name of a data set or a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stfm._errors import InputError

if TYPE_CHECKING:
    from anndata import AnnData


def open_slide(name: str) -> AnnData:
    """Read an ``.h5ad`` file, or load a data set by its name (``toy``, ``her2st:C2``, ``mob:1``)."""
    from stfm import datasets

    path = Path(name)
    if path.suffix != ".h5ad":
        return datasets.load(name)
    if not path.is_file():
        raise InputError(f"There is no file {path}; check the path.")
    import anndata

    return anndata.read_h5ad(path)


def check_output(path: Path, *, suffix: str) -> Path:
    """Refuse an output file of another kind before any work is done."""
    if path.suffix != suffix:
        raise InputError(f"--out must name a {suffix} file, got {path}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
