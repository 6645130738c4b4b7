"""AnnData in, slides out; and what ``pp`` and ``tl`` share when they write back.

This is the only file below ``pp`` and ``tl`` that knows AnnData.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata
import h5py
import numpy as np
from anndata import AnnData

from stfm._errors import DataIntegrityError, InputError, MissingKeyError, StfmWarning, WrongTypeError
from stfm._keys import LIBRARY_COLUMNS, NICHE, PATIENT, SPATIAL, STUDY, TILES, UNNAMED, UNS
from stfm._validate import did_you_mean
from stfm.slide.counts import Counts
from stfm.slide.genes import Panel
from stfm.slide.niches import NicheTable
from stfm.slide.normalise import check_counts
from stfm.slide.platforms import get_platform
from stfm.slide.readers import open_image
from stfm.slide.slide import Slide
from stfm.slide.tiles import TileReader, check_on_image
from stfm.slide.units import Scale, resolve_mpp

if TYPE_CHECKING:
    from numpy.typing import NDArray

_RESOLUTIONS = ("hires", "lowres")
_OFF_IMAGE = 0.5  # share of the spots of a library beyond which its image is that of other tissue, or of another scale


@dataclass(frozen=True)
class Library:
    """Spots of an AnnData that were measured together."""

    name: str
    rows: NDArray[np.int64]


def is_table(data: Any) -> bool:
    """Whether something is an AnnData."""
    return isinstance(data, AnnData)


def check_table(adata: Any) -> AnnData:
    """Refuse what is not AnnData, and say where the table of a SpatialData is."""
    if isinstance(adata, AnnData):
        return adata
    advice = " Give its table: sdata.tables[...]." if type(adata).__name__ == "SpatialData" else ""
    msg = f"adata must be AnnData, got {type(adata).__name__}.{advice}"
    raise WrongTypeError(msg)


def read_file(path: Path, *, backed: bool = True) -> AnnData:
    """Open an ``.h5ad`` file, without reading its counts or as a whole."""
    if not path.exists():
        msg = f"{path} does not exist."
        raise MissingKeyError(msg)
    if path.suffix != ".h5ad":
        msg = f"{path} is not read here: give an .h5ad file, or an AnnData that you read yourself."
        raise InputError(msg)
    if not h5py.is_hdf5(path):
        msg = f"{path} is not an .h5ad file, whatever its name says, or it is damaged; get or write it again."
        raise DataIntegrityError(msg)
    try:
        return anndata.read_h5ad(path, backed="r" if backed else None)
    except (OSError, KeyError) as error:  # h5py: cut short; anndata: no AnnData in it
        msg = f"{path} cannot be read as .h5ad ({error}); get or write it again."
        raise DataIntegrityError(msg) from error


def target(adata: AnnData, *, copy: bool) -> AnnData:
    """Return the object that a function writes to: the copy, or the object itself made whole.

    A view is actualised with a warning, since writing to it would copy it behind the user's back; a view of a backed
    object cannot be, and is refused.
    """
    check_table(adata)
    if copy:
        return adata.to_memory() if adata.isbacked else adata.copy()
    if adata.is_view and adata.isbacked:
        msg = "adata is a view of a backed object, which cannot be written to; pass adata.to_memory()."
        raise InputError(msg)
    if adata.is_view:
        warnings.warn(
            "adata is a view of another object; it is made an object of its own before results are written. "
            "Pass adata.copy() to say so yourself.",
            StfmWarning,
            stacklevel=3,
        )
        adata._init_as_actual(adata.copy())
    return adata


def coordinates(adata: AnnData, spatial_key: str = SPATIAL) -> NDArray[np.float64]:
    """Return the coordinates, float64 ``(n, 2)`` or ``(n, 3)``; refuse what cannot be coordinates."""
    check_table(adata)
    if adata.n_obs == 0:
        msg = "adata has no spots; give an object with at least one."
        raise InputError(msg)
    if spatial_key not in adata.obsm:
        have = ", ".join(repr(k) for k in adata.obsm) or "nothing"
        msg = (
            f"adata.obsm has no {spatial_key!r} (it has {have}). Put the coordinates there, "
            "or name their entry with spatial_key=."
        )
        raise MissingKeyError(msg)
    try:
        coords = np.asarray(adata.obsm[spatial_key], dtype=np.float64)
    except (TypeError, ValueError) as error:
        msg = f"adata.obsm[{spatial_key!r}] does not hold numbers ({error})."
        raise InputError(msg) from error
    if coords.ndim != 2 or coords.shape[1] not in (2, 3):
        msg = f"adata.obsm[{spatial_key!r}] must be (spots, 2) or (spots, 3), got {coords.shape}."
        raise InputError(msg)
    if not np.isfinite(coords).all():
        bad = ~np.isfinite(coords).all(axis=1)
        msg = (
            f"adata.obsm[{spatial_key!r}] has {int(bad.sum())} spots with nan or infinite coordinates "
            f"({adata.obs_names[bad][0]!r} first); remove them, for example with "
            f"adata = adata[np.isfinite(adata.obsm[{spatial_key!r}]).all(axis=1)].copy()."
        )
        raise InputError(msg)
    return coords


def check_spread(coords: NDArray[np.float64], found: list[Library]) -> None:
    """Refuse a library whose spots all lie at one place: its coordinates were never filled in."""
    for library in found:
        if len(library.rows) > 1:
            own = coords[library.rows] if len(library.rows) < len(coords) else coords
            if (own[0] == own[-1]).all() and (own == own[0]).all():
                place = ", ".join(f"{value:g}" for value in own[0])
                msg = (
                    f"Library {library.name!r}: all {len(own)} spots lie at one place ({place}), so that none is near "
                    "and none is far; fill in their coordinates."
                )
                raise InputError(msg)


def libraries(adata: AnnData, library_key: str | None = None) -> list[Library]:
    """Return the libraries of an object, in the order of their first spots."""
    column = library_column(adata, library_key)
    in_uns = list(_spatial(adata))
    if column is None:
        if len(in_uns) > 1:
            msg = (
                f"adata.uns['spatial'] has {len(in_uns)} libraries but no column of obs says which spot is whose; "
                "name the column with library_key=."
            )
            raise MissingKeyError(msg)
        return [Library(in_uns[0] if in_uns else UNNAMED, np.arange(adata.n_obs))]
    values = adata.obs[column]
    if values.isna().any():
        msg = f"adata.obs[{column!r}] is empty for {int(values.isna().sum())} spots; every spot needs a library."
        raise InputError(msg)
    labels = values.astype(str).to_numpy()
    names = list(dict.fromkeys(labels))
    return [Library(name, np.flatnonzero(labels == name)) for name in names]


def library_entry(adata: AnnData, library: str) -> Mapping[str, Any]:
    """Return ``uns["spatial"][library]``, or nothing where there is none."""
    entry = _spatial(adata).get(library, {})
    return entry if isinstance(entry, Mapping) else {}


def scale_of(
    adata: AnnData,
    library: Library,
    coords: NDArray[np.float64],
    *,
    mpp: float | None = None,
    platform: str | None = None,
) -> Scale | None:
    """Return µm/px of a library by the order of evidence of ``slide.units``; None where there is no evidence.

    What :func:`stfm.pp.tile` recorded stands: the user was told of contradictions then.
    """
    record = tile_record(adata, library.name)
    if mpp is None and "mpp" in record:
        return Scale(float(record["mpp"]), "pp.tile", "none", None, None, record.get("platform"))
    entry = library_entry(adata, library.name)
    factors = entry.get("scalefactors", {})
    metadata = entry.get("metadata", {})
    try:
        return resolve_mpp(
            coords[library.rows, :2],
            mpp=mpp,
            metadata_mpp=_number(factors.get("microns_per_pixel", metadata.get("mpp")), None),
            spot_diameter_px=_number(factors.get("spot_diameter_fullres"), None),
            platform=platform or metadata.get("platform"),
            array_positions=array_positions(adata, library.rows),
        )
    except InputError:
        if mpp is not None:
            raise
        return None


def tile_record(adata: AnnData, library: str) -> Mapping[str, Any]:
    """Return what :func:`stfm.pp.tile` recorded for a library, or nothing."""
    record = adata.uns.get(UNS, {}).get(TILES, {}).get(library, {})
    return {k: v for k, v in record.items() if not (isinstance(v, str) and v == "none")}


def slides_from_anndata(
    adata: AnnData,
    *,
    library_key: str | None = None,
    spatial_key: str = SPATIAL,
    layer: str | None = None,
    image: Any = None,
    mpp: float | Mapping[str, float] | None = None,
    patient_key: str | None = None,
    modalities: tuple[str, ...] = ("image", "gene"),
) -> list[Slide]:
    """Read the libraries of an AnnData as slides (arguments as in :func:`stfm.slide.as_slides`)."""
    coords = coordinates(adata, spatial_key)
    found = libraries(adata, library_key)
    check_spread(coords, found)
    matrix, panel = _expression(adata, layer) if "gene" in modalities else (None, None)
    slides = []
    for library in found:
        scale = scale_of(adata, library, coords, mpp=_of_library(mpp, library.name))
        reader = None
        if "image" in modalities:
            reader = tile_reader(adata, library, coords, scale, image=_of_library(image, library.name))
        slides.append(_slide(adata, library, coords, scale, reader, matrix, panel, patient_key))
    return slides


def tile_reader(
    adata: AnnData,
    library: Library,
    coords: NDArray[np.float64],
    scale: Scale | None,
    *,
    image: Any = None,
    image_key: str | None = None,
) -> TileReader | None:
    """Return a reader of H&E tiles for a library, or None where it has no image.

    The image is, in this order: the argument, what :func:`stfm.pp.tile` recorded, the full-resolution file named in
    ``uns["spatial"]``, the ``hires`` and then the ``lowres`` picture there.
    """
    found = find_image(adata, library, image=image, image_key=image_key)
    if found is None:
        return None
    picture, image_scale = found
    if scale is None:
        msg = (
            f"library {library.name!r} has an image but µm/px is unknown (no scale factor, no regular lattice); "
            "give it with mpp=."
        )
        raise InputError(msg)
    reader = TileReader(open_image(picture), coords[library.rows, :2], scale.mpp, image_scale=image_scale)
    check_on_image(reader, library.name, allowed=_OFF_IMAGE)
    return reader


def find_image(
    adata: AnnData, library: Library, *, image: Any = None, image_key: str | None = None
) -> tuple[Any, float] | None:
    """Return the image of a library and its px per full-resolution px; None where there is none."""
    if image is not None:
        return image, 1.0
    record = tile_record(adata, library.name)
    if "path" in record and image_key is None:
        return Path(record["path"]), float(record.get("image_scale", 1.0))
    entry = library_entry(adata, library.name)
    source = entry.get("metadata", {}).get("source_image_path")
    if image_key is None and source is not None and Path(str(source)).exists():
        return Path(str(source)), 1.0
    image_key = image_key or record.get("image_key")
    images = entry.get("images", {})
    keys = [image_key] if image_key is not None else [k for k in _RESOLUTIONS if k in images]
    for key in keys:
        if key not in images:
            msg = f"uns['spatial'][{library.name!r}]['images'] has no {key!r}. {did_you_mean(key, images)}"
            raise MissingKeyError(msg)
        factor = entry.get("scalefactors", {}).get(f"tissue_{key}_scalef")
        if factor is None:
            msg = (
                f"uns['spatial'][{library.name!r}]['scalefactors'] has no 'tissue_{key}_scalef', so that the "
                f"{key} image cannot be laid under the spots; add it, or give the full-resolution image with image=."
            )
            raise MissingKeyError(msg)
        return images[key], float(factor)
    return None


def _slide(
    adata: AnnData,
    library: Library,
    coords: NDArray[np.float64],
    scale: Scale | None,
    reader: TileReader | None,
    matrix: Any,
    panel: Panel | None,
    patient_key: str | None,
) -> Slide:
    rows = library.rows
    whole = len(rows) == adata.n_obs
    record = tile_record(adata, library.name)
    platform = None if scale is None or scale.platform is None else get_platform(scale.platform)
    return Slide(
        name=library.name,
        coords=coords[rows] * (1.0 if scale is None else scale.mpp),
        obs_names=adata.obs_names[rows].to_numpy().astype(str),
        rows=rows,
        counts=None if matrix is None else Counts(matrix, None if whole else rows),
        panel=panel,
        tiles=reader,
        niches=_niche_table(adata, rows),
        mpp=None if scale is None else scale.mpp,
        spot_um=_number(record.get("spot_um"), None if platform is None else platform.spot_um),
        pitch_um=None if platform is None else platform.pitch_um,
        niche_um=_number(record.get("niche_um"), None if platform is None else platform.niche_um),
        patient=_one_value(adata, rows, patient_key or PATIENT, required=patient_key is not None),
        study=_one_value(adata, rows, STUDY, required=False),
        platform=None if platform is None else platform.name,
        species=None if panel is None else panel.species,
    )


def array_positions(adata: AnnData, rows: NDArray[np.int64]) -> NDArray[np.float64] | None:
    """Return column and row of the spots on their array, where the object has them."""
    if not {"array_col", "array_row"} <= set(adata.obs.columns):
        return None
    positions: NDArray[np.float64] = adata.obs[["array_col", "array_row"]].to_numpy(dtype=np.float64)[rows]
    return positions


def _expression(adata: AnnData, layer: str | None) -> tuple[Any, Panel | None]:
    if layer is not None and layer not in adata.layers:
        msg = f"adata.layers has no {layer!r}. {did_you_mean(layer, adata.layers)}"
        raise MissingKeyError(msg)
    matrix = adata.X if layer is None else adata.layers[layer]
    if matrix is None or adata.n_vars == 0:
        return None, None
    check_counts(matrix, where="X" if layer is None else f"layers[{layer!r}]", layers=list(adata.layers))
    return matrix, Panel.from_var(adata.var)


def _niche_table(adata: AnnData, rows: NDArray[np.int64]) -> NicheTable | None:
    """Return the table that :func:`stfm.pp.build_niches` wrote, in positions within the library."""
    keys = adata.uns.get(NICHE)
    if keys is None or keys["connectivities_key"] not in adata.obsp or keys["distances_key"] not in adata.obsp:
        return None
    connectivities = adata.obsp[keys["connectivities_key"]][rows][:, rows]
    return NicheTable.from_csr(connectivities, adata.obsp[keys["distances_key"]][rows][:, rows])


def library_column(adata: AnnData, library_key: str | None = None) -> str | None:
    """Return the column of ``obs`` that names the library of a spot: the one given, or the first of the usual ones."""
    if library_key is not None:
        if library_key not in adata.obs:
            msg = f"adata.obs has no column {library_key!r}. {did_you_mean(library_key, map(str, adata.obs.columns))}"
            raise MissingKeyError(msg)
        return library_key
    return next((c for c in LIBRARY_COLUMNS if c in adata.obs), None)


def _spatial(adata: AnnData) -> Mapping[str, Any]:
    spatial = adata.uns.get("spatial", {})
    return spatial if isinstance(spatial, Mapping) else {}


def _of_library(value: Any, library: str) -> Any:
    """Return what a mapping from library to value says of one library, or the value for all."""
    if isinstance(value, Mapping):
        return value.get(library)
    return value


def _one_value(adata: AnnData, rows: NDArray[np.int64], column: str, *, required: bool) -> str | None:
    if column not in adata.obs:
        if required:
            msg = f"adata.obs has no column {column!r}. {did_you_mean(column, map(str, adata.obs.columns))}"
            raise MissingKeyError(msg)
        return None
    values = adata.obs[column].iloc[rows].dropna().unique()
    if len(values) > 1:
        msg = f"adata.obs[{column!r}] has {len(values)} values within one library; a library is of one {column}."
        raise InputError(msg)
    return str(values[0]) if len(values) else None


def _number(value: Any, default: float | None) -> float | None:
    return default if value is None else float(value)
