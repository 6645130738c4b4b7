"""``pl.tiles``: what a model will see of some spots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from stfm._errors import InputError, MissingKeyError
from stfm._keys import SPATIAL
from stfm._validate import check_count, did_you_mean, resolve_rng
from stfm.slide.from_anndata import coordinates, libraries, scale_of, tile_reader, tile_record

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from stfm.slide.tiles import TileReader


def tiles(
    adata: AnnData,
    spots: Sequence[str] | int = 6,
    *,
    library: str | None = None,
    library_key: str | None = None,
    spatial_key: str = SPATIAL,
    rng: int | np.random.Generator | None = 0,
    ax: Axes | Sequence[Axes] | NDArray[Any] | None = None,
) -> Axes | NDArray[Any]:
    """Show the spot tile and the niche tile of some spots, as a model reads them.

    The frame drawn in a niche tile is its spot tile.

    Parameters
    ----------
    adata
        Object that :func:`stfm.pp.tile` was run on.
    spots
        Names of spots, or how many to draw at random.
    library
        Library to draw from; by default the first.
    library_key
        Column of ``obs`` that names the library of a spot.
    spatial_key
        Entry of ``obsm`` with the coordinates.
    rng
        Seed or generator of the draw.
    ax
        Axes to draw into: ``2 * n`` of them (the spot tiles first), or one, which shows all tiles as one picture.

    Returns
    -------
    The Axes: an array ``(2, n)`` with spot tiles above niche tiles, or the single one given.

    Raises
    ------
    MissingKeyError
        No tiles were recorded, or a spot or library does not exist.
    InputError
        The number of Axes does not fit.

    Examples
    --------
    >>> import stfm as sf
    >>> adata = sf.datasets.toy(n_spots=60)
    >>> sf.pp.tile(adata)
    >>> sf.pl.tiles(adata, 4).shape
    (2, 4)
    """
    reader, names, record = _open(adata, library, library_key, spatial_key)
    index = _choose(names, spots, rng)
    sizes = {kind: (float(record[f"{kind}_um"]), int(record[f"{kind}_px"])) for kind in ("spot", "niche")}
    pictures = [reader.read(index, size_um=um, size_px=px) for um, px in sizes.values()]
    titles = [f"{kind} {um:.4g} µm, {px} px" for kind, (um, px) in sizes.items()]
    grid = _axes(len(index), ax)
    share = record["spot_um"] / record["niche_um"]
    if not isinstance(grid, np.ndarray):
        return _montage(grid, pictures, titles)
    for column, i in enumerate(index):
        for row, kind in enumerate(titles):
            axes = grid[row, column]
            axes.imshow(pictures[row][column], interpolation="nearest", extent=(0, 1, 1, 0))
            axes.set(xticks=[], yticks=[])
            axes.set_title(f"{names[i]}\n{kind}" if row == 0 else kind, fontsize=7)
        if share < 1:
            _frame(grid[1, column], 0.5 - share / 2, share)
    return grid


def _open(
    adata: AnnData, library: str | None, library_key: str | None, spatial_key: str
) -> tuple[TileReader, NDArray[np.str_], dict[str, Any]]:
    """Return the reader, the names of the spots and the record of one library."""
    found = {lib.name: lib for lib in libraries(adata, library_key)}
    name = next(iter(found)) if library is None else library
    if name not in found:
        msg = f"adata has no library {name!r}. {did_you_mean(name, found)}"
        raise MissingKeyError(msg)
    record = dict(tile_record(adata, name))
    if not record:
        msg = f"No tiles are recorded for library {name!r}; run sf.pp.tile(adata) first."
        raise MissingKeyError(msg)
    coords = coordinates(adata, spatial_key)
    reader = tile_reader(adata, found[name], coords, scale_of(adata, found[name], coords))
    if reader is None:
        msg = f"The image of library {name!r} is gone; run sf.pp.tile(adata) again."
        raise MissingKeyError(msg)
    return reader, adata.obs_names[found[name].rows].to_numpy().astype(str), record


def _choose(
    names: NDArray[np.str_], spots: Sequence[str] | int, rng: int | np.random.Generator | None
) -> NDArray[np.int64]:
    """Return positions of the spots asked for."""
    if isinstance(spots, (int, np.integer)):
        check_count("spots", int(spots))
        n = min(int(spots), len(names))
        return np.sort(resolve_rng(rng).choice(len(names), n, replace=False))
    wanted = [spots] if isinstance(spots, str) else list(spots)
    where = {name: i for i, name in enumerate(names.tolist())}
    for name in wanted:
        if name not in where:
            msg = f"There is no spot {name!r} in this library. {did_you_mean(str(name), list(where)[:2000])}"
            raise MissingKeyError(msg)
    if not wanted:
        msg = "spots is empty; name at least one."
        raise InputError(msg)
    return np.array([where[name] for name in wanted], dtype=np.int64)


def _axes(n: int, ax: Any) -> Any:
    """Return Axes ``(2, n)``, or the single one given."""
    if ax is None:
        import matplotlib.pyplot as plt

        _, grid = plt.subplots(2, n, figsize=(1.7 * n, 4.2), squeeze=False, layout="constrained")
        return grid
    given = np.asarray(ax, dtype=object)
    if given.size == 1:
        return given.reshape(-1)[0]
    if given.size != 2 * n:
        msg = f"{n} spots need {2 * n} Axes (or one), got {given.size}."
        raise InputError(msg)
    return given.reshape(2, n)


def _frame(axes: Axes, corner: float, side: float) -> None:
    """Draw a light frame with a dark edge, which shows on any tissue."""
    from matplotlib.patches import Rectangle

    for colour, width in (("black", 2.2), ("white", 1.0)):
        axes.add_patch(Rectangle((corner, corner), side, side, fill=False, edgecolor=colour, linewidth=width))


def _montage(axes: Axes, pictures: list[NDArray[np.uint8]], titles: list[str]) -> Axes:
    """Draw all tiles into one Axes, spot tiles above niche tiles, at the same size."""
    px = max(p.shape[1] for p in pictures)
    gap = max(2, px // 24)
    n = len(pictures[0])
    sheet = np.full((2 * px + gap, n * px + (n - 1) * gap, 3), 255, np.uint8)
    for row, tiles_of_kind in enumerate(pictures):
        near = np.arange(px) * tiles_of_kind.shape[1] // px  # nearest px, so that a coarse tile looks coarse
        for column, picture in enumerate(tiles_of_kind):
            top, left = row * (px + gap), column * (px + gap)
            sheet[top : top + px, left : left + px] = picture[np.ix_(near, near)]
    axes.imshow(sheet, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_title(f"above: {titles[0]}; below: {titles[1]}", fontsize=8)
    return axes
