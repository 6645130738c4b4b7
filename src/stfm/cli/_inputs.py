"""Slides by the words of a command line: ``toy``, ``her2st:C2``, ``mob:1`` or a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stfm._errors import InputError

if TYPE_CHECKING:
    from anndata import AnnData

REMOTE = ("her2st", "mob")


def open_slide(name: str) -> AnnData:
    """Read an ``.h5ad`` file, or load a data set by its name.

    Parameters
    ----------
    name
        Path of an ``.h5ad`` file, ``"toy"``, or ``"<data set>:<section>"``.
    """
    from stfm import datasets

    path = Path(name)
    if path.suffix == ".h5ad":
        if not path.is_file():
            raise InputError(f"There is no file {path}; check the path.")
        import anndata

        return anndata.read_h5ad(path)
    kind, _, section = name.partition(":")
    if kind == "toy" and not section:
        return datasets.toy()
    if kind in REMOTE and section:
        return datasets.her2st(section) if kind == "her2st" else datasets.mob(int_section(section))
    raise InputError(
        f"{name!r} is no slide; give an .h5ad file, toy, her2st:<section> (such as her2st:C2) or mob:<1-3>."
    )


def int_section(section: str) -> int:
    """Return the number of a section that the command line gave as text."""
    if not section.isdigit():
        raise InputError(f"Sections of mob are numbers (mob:1), got {section!r}.")
    return int(section)


def check_output(path: Path, *, suffix: str) -> Path:
    """Refuse an output file of another kind before any work is done."""
    if path.suffix != suffix:
        raise InputError(f"--out must name a {suffix} file, got {path}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
