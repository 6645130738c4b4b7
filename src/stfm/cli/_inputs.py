"""Slides by the words of a command line: the name of a data set or a file; and where results go."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from stfm._errors import InputError

if TYPE_CHECKING:
    from anndata import AnnData

PICTURES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".svs", ".ndpi"}


def open_slide(name: str) -> AnnData:
    """Read an ``.h5ad`` file, or load a data set by its name (``toy``, ``her2st:C2``, ``mob:1``)."""
    from stfm import datasets
    from stfm.slide.from_anndata import read_file

    path = Path(name)
    if path.suffix == ".h5ad":
        if not path.is_file():
            raise InputError(f"There is no file {path}; check the path.")
        return read_file(path, backed=False)
    if name not in datasets.list_datasets().index and (path.suffix or path.exists() or len(path.parts) > 1):
        advice = (
            "a picture has no counts; it is given with --image" if path.suffix.lower() in PICTURES else "convert it"
        )
        kind = "a folder" if path.is_dir() else "no .h5ad file" if path.exists() else "neither there nor an .h5ad file"
        raise InputError(
            f"{name} is {kind}. A slide is an .h5ad file or a data set such as toy, her2st:C2 or mob:1; {advice}."
        )
    return datasets.load(name)


def check_output(path: Path, *, suffix: str) -> Path:
    """Refuse an output file of another kind, or where none can be written, before any work is done."""
    if path.suffix != suffix:
        raise InputError(f"--out must name a {suffix} file, got {path}.")
    if path.is_dir():
        raise InputError(f"--out {path} is a folder; name the {suffix} file in it.")
    _check_writable(path.parent, path)
    return path


def check_folder(path: Path) -> Path:
    """Refuse an output folder that cannot be made, before any work is done."""
    if path.exists() and not path.is_dir():
        raise InputError(f"--out {path} is a file; name a folder.")
    _check_writable(path, path)
    return path


def make_folder(path: Path) -> str:
    """Make the folder of an output file; say so if it was not there."""
    if path.is_dir():
        return ""
    path.mkdir(parents=True)
    return f"made the folder {path}"


def _check_writable(folder: Path, out: Path) -> None:
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise InputError(f"--out {out} cannot be written: {there} is a file.")
    if not os.access(there, os.W_OK):
        raise InputError(f"--out {out} cannot be written: no right to write in {there}.")
