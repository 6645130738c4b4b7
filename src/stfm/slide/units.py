"""From pixels to µm: what is known about the scale of a slide, and which evidence wins."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stfm._errors import InputError, StfmWarning
from stfm._validate import check_positive
from stfm.slide.platforms import PLATFORMS, Platform, get_platform

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = [
    "PLATFORMS",
    "Lattice",
    "Platform",
    "Scale",
    "default_tile_um",
    "detect_lattice",
    "get_platform",
    "resolve_mpp",
]

_TOLERANCE = 0.05  # two values of µm/px that differ by less agree
_ORDER = 0.6  # bond order of a lattice: 1 when perfect, 0 for scattered points
_MIN_SPOTS = 12  # fewer cannot be told from scattered points
_WINDOW = 50_000  # a lattice of millions of bins is judged on so many around its middle


@dataclass(frozen=True)
class Lattice:
    """How spots are laid out: ``kind`` ``"hex"``, ``"square"`` or ``"none"``; ``pitch`` in units of the coordinates."""

    kind: str
    pitch: float | None
    order: float


@dataclass(frozen=True)
class Scale:
    """µm per full-resolution pixel, where it comes from, and what was noticed on the way.

    ``source`` is ``"argument"``, ``"pitch"``, ``"metadata"``, ``"spot diameter"`` or ``"unit"`` (coordinates are µm).
    """

    mpp: float
    source: str
    lattice: str
    pitch_px: float | None
    message: str | None
    platform: str | None = None


def detect_lattice(coords: ArrayLike) -> Lattice:
    r"""Find out if points lie on a hexagonal or a square lattice, and its pitch.

    Every point is joined to the neighbours that are about as near as the nearest ones. The directions :math:`\theta` of
    these bonds agree modulo 90° on a square and modulo 60° on a hexagonal lattice, so that
    :math:`\psi_m = |\langle e^{i m \theta} \rangle|` over all bonds is near 1 for m = 4 or m = 6 and near 0 for
    scattered points; missing points change neither. The pitch is the length of the mean bond of each direction, in
    which jitter cancels.

    Parameters
    ----------
    coords
        Points, ``(n, 2)`` (further columns are ignored); points that are not finite are left out.

    Returns
    -------
    The kind of lattice, its pitch in the unit of ``coords`` and the bond order.
    """
    from scipy.spatial import cKDTree

    xy = np.asarray(coords, dtype=np.float64)[:, :2]
    xy = np.unique(_window(xy[np.isfinite(xy).all(axis=1)]), axis=0)
    if len(xy) < _MIN_SPOTS:
        return Lattice("none", None, 0.0)
    tree = cKDTree(xy)
    distance, index = (np.asarray(part) for part in tree.query(xy, k=min(13, len(xy))))
    bonds = (xy[index[:, 1:]] - xy[:, None, :]).reshape(-1, 2)
    length = distance[:, 1:].reshape(-1)
    pitch = float(np.median(distance[:, 1]))
    best = Lattice("none", None, 0.0)
    for _ in range(3):  # jitter makes the first nearest distances short: the shell is moved once it is known better
        shell = bonds[(length > 0.7 * pitch) & (length < 1.25 * pitch)]
        best = _bond_order(shell)
        if best.pitch is None or abs(best.pitch - pitch) < 1e-3 * pitch:
            break
        pitch = best.pitch
    return best


def _window(xy: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the points around the middle where there are very many."""
    if len(xy) <= _WINDOW:
        return xy
    away = np.abs(xy - np.median(xy, axis=0)).max(axis=1)
    return xy[np.argpartition(away, _WINDOW)[:_WINDOW]]


def _bond_order(bonds: NDArray[np.float64]) -> Lattice:
    """Judge the directions of bonds, and average them direction by direction."""
    if len(bonds) == 0:
        return Lattice("none", None, 0.0)
    z = bonds[:, 0] + 1j * bonds[:, 1]
    angle = np.angle(z)
    moment = {m: complex(np.mean(np.exp(1j * m * angle))) for m in (4, 6)}
    m = max(moment, key=lambda k: abs(moment[k]))
    order, other = abs(moment[m]), abs(moment[10 - m])
    # Few bonds agree by chance (each is counted from both ends), and the bonds of a line agree modulo any angle.
    if order < max(_ORDER, 3.0 / np.sqrt(len(bonds) / 2)) or other > 0.5:
        return Lattice("none", None, order)
    first = np.angle(moment[m]) / m
    step = 2 * np.pi / m
    direction = np.round((angle - first) / step).astype(int) % m
    means = [abs(z[direction == k].mean()) for k in range(m) if (direction == k).any()]
    return Lattice("square" if m == 4 else "hex", float(np.mean(means)), order)


def _hexagonal_array(coords: NDArray[np.floating], positions: NDArray[np.floating]) -> Lattice:
    """Return the hexagonal lattice that columns and rows of an array span, for spots too scattered to show it."""
    none = Lattice("none", None, 0.0)
    design = np.column_stack([positions[:, :2], np.ones(len(positions))])
    there = np.isfinite(coords[:, :2]).all(axis=1) & np.isfinite(design).all(axis=1)
    if there.sum() < _MIN_SPOTS:
        return none
    x, y = design[there], np.asarray(coords[there, :2], dtype=np.float64)
    step, _, rank, _ = np.linalg.lstsq(x, y, rcond=None)
    bonds = np.linalg.norm(np.array([[2, 0, 0], [1, 1, 0], [1, -1, 0]]) @ step, axis=1)
    pitch = float(bonds.mean())
    even = np.ptp((x[:, 0] + x[:, 1]) % 2) == 0
    if rank < 3 or not even or np.ptp(bonds) > _TOLERANCE * pitch or np.abs(x @ step - y).max() > pitch / 4:
        return none
    return Lattice("hex", pitch, 1.0)


def resolve_mpp(
    coords_px: ArrayLike,
    *,
    mpp: float | None = None,
    metadata_mpp: float | None = None,
    spot_diameter_px: float | None = None,
    platform: str | Platform | None = None,
    array_positions: ArrayLike | None = None,
) -> Scale:
    """Find µm per pixel: by the argument, a regular lattice, the metadata, the diameter of a spot, in this order.

    A hexagonal lattice is Visium's (100 µm); of spots that lie too far apart to show it, their places on the array do.
    Bins of Visium HD are told apart by their size where metadata give it. Any other square lattice is taken as ST
    (200 µm, or 141 µm where ``array_positions`` show the "2k" array) with a warning, unless ``platform`` names it.
    Contradictions of more than 5 % are told by a warning.

    Parameters
    ----------
    coords_px
        Centres of the spots in px of the full-resolution image, ``(n, 2)``.
    mpp
        µm/px, if the caller knows it.
    metadata_mpp
        µm/px of the slide file, OME metadata or Space Ranger's ``microns_per_pixel``.
    spot_diameter_px
        Space Ranger's ``spot_diameter_fullres``.
    platform
        Row or name of ``platforms.toml``.
    array_positions
        Integer column and row of every spot on its array, ``(n, 2)``.

    Returns
    -------
    The scale with its source.

    Raises
    ------
    InputError
        Nothing says how large a pixel is.

    Warns
    -----
    StfmWarning
        Two kinds of evidence contradict each other, or the platform of a square lattice had to be assumed.
    """
    for name, value in (("mpp", mpp), ("metadata_mpp", metadata_mpp), ("spot_diameter_px", spot_diameter_px)):
        if value is not None:
            check_positive(name, value)
    row = None if platform is None else get_platform(platform)
    lattice = detect_lattice(coords_px)
    if lattice.kind == "none" and array_positions is not None:
        lattice = _hexagonal_array(np.asarray(coords_px), np.asarray(array_positions))
    row = _bins(lattice, row, metadata_mpp, spot_diameter_px)
    row, assumed = _platform_of(lattice, row, array_positions, spot_diameter_px)
    found: dict[str, float] = {}
    if row is not None and row.unit == "um":
        found["unit"] = 1.0
    if row is not None and lattice.pitch is not None and lattice.kind == row.lattice:
        found["pitch"] = row.pitch_um / lattice.pitch
    if metadata_mpp is not None:
        found["metadata"] = float(metadata_mpp)
    if spot_diameter_px is not None and (row is not None or (lattice.kind != "square" and metadata_mpp is None)):
        found["spot diameter"] = (row or get_platform("Visium")).diameter_um / spot_diameter_px
    if mpp is not None:
        found = {"argument": float(mpp), **found}
    elif assumed and "metadata" in found:
        found.pop("pitch")  # a platform that is only assumed overrules nothing
    return _decide(found, lattice, row, assumed=assumed)


def _bins(
    lattice: Lattice, row: Platform | None, metadata_mpp: float | None, spot_diameter_px: float | None
) -> Platform | None:
    """Return the platform of touching bins where metadata give their size: one name covers bins of 2, 8 and 16 µm."""
    side = lattice.pitch if lattice.kind == "square" else spot_diameter_px
    if side is None or metadata_mpp is None or lattice.kind == "hex" or (row is not None and row.observation != "bin"):
        return row
    size = side * metadata_mpp
    fits = (p for p in PLATFORMS if p.observation == "bin" and abs(size / p.pitch_um - 1) < _TOLERANCE)
    return next(fits, row)


def _platform_of(
    lattice: Lattice, row: Platform | None, array_positions: ArrayLike | None, spot_diameter_px: float | None
) -> tuple[Platform | None, bool]:
    """Return the platform that a lattice belongs to, and whether it had to be assumed."""
    if row is not None or lattice.kind == "none" or lattice.pitch is None:
        return row, False
    if lattice.kind == "hex":
        return get_platform("Visium"), False  # the only hexagonal one
    if spot_diameter_px is not None and lattice.pitch < 1.2 * spot_diameter_px:
        return None, False  # bins that touch: their size in µm cannot be seen
    if array_positions is not None and detect_lattice(array_positions).pitch is not None:
        position = np.asarray(array_positions)
        parity = np.unique(np.rint(position[:, 0] + position[:, 1]).astype(np.int64) % 2)
        return get_platform("ST 2k" if len(parity) == 1 else "ST"), True
    return get_platform("ST"), True


def _decide(found: dict[str, float], lattice: Lattice, row: Platform | None, *, assumed: bool) -> Scale:
    """Pick the evidence that wins and tell what contradicts it."""
    name = row.name if row is not None else None
    if not found:
        layout = "no lattice" if lattice.pitch is None else f"a {lattice.kind} lattice of pitch {lattice.pitch:.4g} px"
        msg = (
            f"µm/px is not known: no metadata, no spot diameter, and {layout} of {name or 'an unknown platform'}. "
            'Pass mpp= (µm per full-resolution px), or platform= (such as "Visium" or "ST").'
        )
        raise InputError(msg)
    order = ("argument", "unit", "pitch", "metadata", "spot diameter")
    source = next(s for s in order if s in found)
    if source == "spot diameter":
        name = name or "Visium"  # what has spot_diameter_fullres
    value = found[source]
    notes = [
        f"by {_told(other, lattice, row)} it would be {found[other]:.3f}"
        for other in order
        if other in found and other != source and other != "unit" and abs(found[other] / value - 1) > _TOLERANCE
    ]
    message = None
    if notes:
        message = f"µm/px is {value:.3f} by {_told(source, lattice, row)}, which is used; {' and '.join(notes)}."
        if source == "pitch":
            message += " The lattice decides (Space Ranger writes another diameter); pass mpp= to overrule it."
    elif source == "pitch" and assumed and row is not None:
        message = (
            f"The spots lie on a square lattice and no platform is given: taken as {row.name} with a pitch of "
            f"{row.pitch_um:.4g} µm, µm/px is {value:.3f}. Pass platform= or mpp= to say so or to change it."
        )
    if message is not None:
        warnings.warn(message, StfmWarning, stacklevel=3)
    return Scale(value, source, lattice.kind, lattice.pitch, message, name)


def _told(source: str, lattice: Lattice, row: Platform | None) -> str:
    """Return one kind of evidence in words."""
    if source == "pitch" and row is not None:
        return f"the {row.pitch_um:.4g}-µm {lattice.kind} lattice ({lattice.pitch:.1f} px)"
    if source == "spot diameter":
        return f"the spot diameter of {row.diameter_um if row is not None else 55:.4g} µm"
    return {"argument": "mpp=", "metadata": "the metadata", "unit": "the platform's unit (µm)"}[source]


def default_tile_um(scale: Scale, platform: str | Platform | None = None) -> tuple[float, float]:
    """Return the sides of the spot tile and of the niche tile in µm.

    The spot tile is the spot's diameter. The niche tile is the square that holds the spot and its niche whichever way
    the lattice is turned: one pitch to either side and half a spot beyond, ``2 * pitch + diameter`` (Visium 255 µm, ST
    500 µm).

    Parameters
    ----------
    scale
        What :func:`resolve_mpp` found.
    platform
        Row or name of the table; by default that of ``scale``.

    Returns
    -------
    Sides of the spot and the niche tile, µm.

    Raises
    ------
    InputError
        No platform is known.
    """
    row = platform if platform is not None else scale.platform
    if row is None:
        msg = (
            'Tile sizes are not known without a platform: pass spot_um= and niche_um=, or platform= (such as "Visium").'
        )
        raise InputError(msg)
    found = get_platform(row)
    return found.spot_um, found.niche_um
