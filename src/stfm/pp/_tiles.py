"""``pp.tile``: which image and which tile sizes belong to the spots of a slide."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from anndata import AnnData

from stfm._errors import InputError, MissingKeyError, StfmWarning, WrongTypeError
from stfm._keys import SPATIAL, TILES, UNS
from stfm._logging import get_logger
from stfm._provenance import record
from stfm._validate import check_count, check_positive, did_you_mean
from stfm.pp._tissue import exchanged_on_array, on_tissue, tissue_mask
from stfm.slide.from_anndata import (
    Library,
    array_positions,
    coordinates,
    find_image,
    libraries,
    scale_of,
    target,
    tile_record,
)
from stfm.slide.from_spatialdata import is_spatialdata, on_spatialdata
from stfm.slide.readers import keep_array, open_image, thumbnail
from stfm.slide.tiles import TileReader, check_on_image
from stfm.slide.units import Scale, default_tile_um

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SWAP_GAIN = 0.05  # so many more of the spots lie on tissue with x and y exchanged
_SWAP_SIGMA = 3.0  # and more than chance would move
_SWAP_MIN_SPOTS = 10
_COARSE = 0.5  # an image with less than half of the px that a spot tile is shown at holds no cells


def tile(
    adata: AnnData,
    image: Any = None,
    *,
    library_key: str | None = None,
    spatial_key: str = SPATIAL,
    image_key: str | None = None,
    image_scale: float = 1.0,
    mpp: float | Mapping[str, float] | None = None,
    platform: str | None = None,
    spot_um: float | None = None,
    spot_px: int = 28,
    niche_um: float | None = None,
    niche_px: int = 224,
    copy: bool = False,
) -> AnnData | None:
    """Lay a spot tile and a niche tile around every spot, by physical size.

    Nothing is cut: what is recorded says where the image is, how large a px is and how large the tiles are, and tiles
    are read from it batch by batch when a model asks. Tiles that go over the border of the image are padded with white
    and counted.

    Parameters
    ----------
    adata
        Spots with coordinates. Views are made objects of their own, backed objects stay on disk. Or a SpatialData with
        one table of spots, which is then written to, and an image a section.
    image
        H&E: array ``(h, w, 3)``, zarr, path of a zarr, TIFF, PNG or JPEG, or a mapping from library to one of these.
        By default the image in ``uns["spatial"][library]["images"]``, ``hires`` before ``lowres``.
    library_key
        Column of ``obs`` that names the library of a spot.
    spatial_key
        Entry of ``obsm`` with the coordinates, x and y in px of the full-resolution image.
    image_key
        Which image of ``uns["spatial"]`` to take, such as ``"lowres"``.
    image_scale
        px of ``image`` per px of the full-resolution image that the coordinates are given in.
    mpp
        µm per px of the full-resolution image, or a mapping from library to it. By default it is found
        (:func:`stfm.slide.units.resolve_mpp`): where the spots lie on a regular lattice its pitch decides.
    platform
        Row of the platform table, such as ``"Visium"`` or ``"ST"``; by default from the metadata or the lattice.
    spot_um, niche_um
        Sides of the tiles in µm. By default the diameter of a spot, and the square that holds the spot and its niche:
        twice the pitch and one diameter (Visium 55 and 255 µm, ST 100 and 500 µm).
    spot_px, niche_px
        Sides in px of what a model sees.
    copy
        Return a new object instead of writing to ``adata``.

    Returns
    -------
    None, or the new object when ``copy=True``. Written is ``uns["stfm"]["tiles"][library]``, a dict of plain values:

    ``image``, ``path``, ``image_key``, ``image_scale``, ``image_shape``, ``fingerprint``
        Where the image is (``"file"`` or ``"uns"``), its px per full-resolution px, height and width, and a hash of it.
    ``mpp``, ``mpp_source``, ``native_mpp``, ``platform``
        µm per px of the full-resolution image and what says so; µm per px of the image that is read.
    ``spot_um``, ``spot_px``, ``niche_um``, ``niche_px``
        The sides of the tiles.
    ``n_tiles``, ``n_spot_padded``, ``n_niche_padded``
        Number of spots, and of tiles over the border.

    Raises
    ------
    MissingKeyError
        No coordinates; no image for a library.
    InputError
        No spots, coordinates off the image, µm/px not known (names ``mpp=``), an argument out of range.
    DataIntegrityError
        The image file is damaged or cut short.

    Warns
    -----
    StfmWarning
        Lattice and ``spot_diameter_fullres`` contradict each other; x and y seem to be exchanged: more spots lie on
        tissue the other way round, or x runs along ``obs["array_row"]`` and y along ``obs["array_col"]``.

    Examples
    --------
    >>> import stfm as sf
    >>> adata = sf.datasets.toy(n_spots=60)
    >>> sf.pp.tile(adata)
    >>> record = adata.uns["stfm"]["tiles"]["section_1"]
    >>> record["platform"], record["spot_um"], record["niche_um"]
    ('Visium', 55.0, 255.0)
    """
    if is_spatialdata(adata):
        return on_spatialdata(tile, locals())
    if not isinstance(adata, AnnData):
        msg = f"adata must be AnnData, got {type(adata).__name__}."
        raise WrongTypeError(msg)
    sizes = {"spot_um": spot_um, "spot_px": spot_px, "niche_um": niche_um, "niche_px": niche_px}
    _check_arguments(sizes, image_scale)
    coords = coordinates(adata, spatial_key)
    found = libraries(adata, library_key)
    _check_names(found, image=image, mpp=mpp)
    plain = AnnData(obs=adata.obs, uns={"spatial": adata.uns.get("spatial", {})})  # without earlier records of tiles
    records = {}
    for library in found:
        own_image, own_mpp = _of(image, library.name), _of(mpp, library.name)
        earlier = tile_record(adata, library.name)
        own_scale = image_scale
        if own_image is None and image_key is None and "path" in earlier:
            own_image, own_scale = Path(earlier["path"]), float(earlier.get("image_scale", 1.0))
        if own_mpp is None and earlier.get("mpp_source") == "argument" and platform is None:
            own_mpp = float(earlier["mpp"])
        picture, picture_scale = _picture(plain, library, own_image, image_key, own_scale)
        reader, scale = _reader(plain, library, coords, picture, picture_scale, own_mpp, platform)
        _check_position(reader, library.name, array_positions(adata, library.rows))
        records[library.name] = _describe(library, reader, scale, sizes, picture, own_image, image_key, plain)
    written = target(adata, copy=copy)
    own = dict(written.uns.get(UNS, {}))
    written.uns[UNS] = {**own, TILES: {**own.get(TILES, {}), **records}}
    return written if copy else None


def _check_arguments(sizes: Mapping[str, float | None], image_scale: float) -> None:
    for name, value in sizes.items():
        if name.endswith("_px"):
            check_count(name, value)  # type: ignore[arg-type]
        elif value is not None:
            check_positive(name, value)
    check_positive("image_scale", image_scale)


def _check_names(found: list[Library], **arguments: Any) -> None:
    names = [library.name for library in found]
    for argument, value in arguments.items():
        for name in value if isinstance(value, Mapping) else ():
            if name not in names:
                msg = f"{argument}= names a library {name!r} that adata does not have. {did_you_mean(str(name), names)}"
                raise MissingKeyError(msg)


def _of(value: Any, library: str) -> Any:
    return value.get(library) if isinstance(value, Mapping) else value


def _picture(
    plain: AnnData, library: Library, image: Any, image_key: str | None, image_scale: float
) -> tuple[Any, float]:
    """Return the image of a library and its px per full-resolution px."""
    if image is not None:
        return image, image_scale
    found = find_image(plain, library, image_key=image_key)
    if found is None:
        msg = (
            f"Library {library.name!r} has no image: uns['spatial'][{library.name!r}]['images'] is missing or empty. "
            f"Give one with image= (a path or an array; for several libraries image={{{library.name!r}: ...}})."
        )
        raise MissingKeyError(msg)
    return found


def _reader(
    plain: AnnData,
    library: Library,
    coords: NDArray[np.float64],
    picture: Any,
    image_scale: float,
    mpp: float | None,
    platform: str | None,
) -> tuple[TileReader, Scale]:
    """Open the image and find µm/px."""
    source = open_image(picture)
    scale = scale_of(plain, library, coords, mpp=mpp, platform=platform)
    if scale is None and source.mpp is not None:
        scale = Scale(source.mpp * image_scale, "metadata", "none", None, None, platform)
    if scale is None:
        msg = (
            f"Library {library.name!r}: µm/px is not known (no metadata, no spot_diameter_fullres, no regular lattice "
            'of a known platform). Pass mpp= (µm per full-resolution px), or platform= (such as "Visium" or "ST").'
        )
        raise InputError(msg)
    return TileReader(source, coords[library.rows, :2], scale.mpp, image_scale=image_scale), scale


def _check_position(reader: TileReader, library: str, positions: NDArray[np.float64] | None) -> None:
    """Refuse spots off the image; warn where x and y seem to be exchanged."""
    check_on_image(reader, library)
    if reader.n_obs >= _SWAP_MIN_SPOTS:
        signs = [_by_tissue(reader), _by_array(reader, positions)]
        if told := " and ".join(sign for sign in signs if sign):
            msg = (
                f"Library {library!r}: {told}; adata.obsm['spatial'] must be (x, y), not (row, column). If so: "
                "adata.obsm['spatial'] = adata.obsm['spatial'][:, ::-1]."
            )
            warnings.warn(msg, StfmWarning, stacklevel=3)


def _by_tissue(reader: TileReader) -> str:
    """Say that more spots lie on tissue with x and y exchanged, if they do."""
    picture, factor = thumbnail(reader.source)
    mask = tissue_mask(picture)
    if mask is None:
        return ""
    given, other = (on_tissue(mask, xy * factor) for xy in (reader.centers, reader.centers[:, ::-1]))
    gained, lost = int((other & ~given).sum()), int((given & ~other).sum())
    # a sign test on the spots that change sides, so that an outline that looks the same both ways stays silent
    if gained - lost <= max(_SWAP_GAIN * reader.n_obs, _SWAP_SIGMA * (gained + lost) ** 0.5):
        return ""
    return f"{given.mean():.0%} of the spots lie on tissue, {other.mean():.0%} with x and y exchanged"


def _by_array(reader: TileReader, positions: NDArray[np.float64] | None) -> str:
    """Say that x runs along array_row and y along array_col, if they do; an outline may look the same both ways."""
    if positions is None or not exchanged_on_array(reader.centers, positions):
        return ""
    return "x grows with obs['array_row'] and y with obs['array_col'], as if x and y were exchanged"


def _describe(
    library: Library,
    reader: TileReader,
    scale: Scale,
    sizes: Mapping[str, Any],
    picture: Any,
    image: Any,
    image_key: str | None,
    plain: AnnData,
) -> dict[str, Any]:
    """Return the record of one library, plain values only."""
    spot_um, niche_um = sizes["spot_um"], sizes["niche_um"]
    if spot_um is None or niche_um is None:
        default = default_tile_um(scale)
        spot_um, niche_um = spot_um or default[0], niche_um or default[1]
    path, key = _where(library, picture, image, image_key, plain)
    shown = spot_um / reader.native_mpp
    if shown < _COARSE * sizes["spot_px"]:
        get_logger("pp").warning(
            "library %s: a spot tile of %.4g µm is %.1f px of the image, shown at %d px; to see cells, give the "
            "full-resolution image with image=",
            library.name,
            spot_um,
            shown,
            sizes["spot_px"],
        )
    n_spot, n_niche = int(reader.padded(spot_um).sum()), int(reader.padded(niche_um).sum())
    get_logger("pp").info(
        "library %s: %.3f µm/px by %s; %d spot and %d niche tiles of %d go over the border and are padded with white",
        library.name,
        scale.mpp,
        scale.source,
        n_spot,
        n_niche,
        reader.n_obs,
    )
    return record(
        {
            "image": "uns" if path is None else "file",
            "path": path,
            "image_key": key,
            "image_scale": reader.image_scale,
            "image_shape": np.array(reader.source.shape),
            "fingerprint": reader.source.fingerprint(),
            "mpp": scale.mpp,
            "mpp_source": scale.source,
            "native_mpp": reader.native_mpp,
            "platform": scale.platform,
            "spot_um": float(spot_um),
            "spot_px": sizes["spot_px"],
            "niche_um": float(niche_um),
            "niche_px": sizes["niche_px"],
            "n_tiles": reader.n_obs,
            "n_spot_padded": n_spot,
            "n_niche_padded": n_niche,
        }
    )


def _where(
    library: Library, picture: Any, image: Any, image_key: str | None, plain: AnnData
) -> tuple[Path | None, str | None]:
    """Return the file of an image, or its key in ``uns``; an array that is only in memory is kept on disk first."""
    if isinstance(picture, (str, Path)):
        return Path(picture).expanduser().resolve(), None
    if image is None:
        images = plain.uns["spatial"][library.name]["images"]
        return None, image_key or next(k for k in ("hires", "lowres") if k in images)
    if type(picture).__module__.partition(".")[0] == "zarr":
        folder = Path(str(picture.store_path).removeprefix("file://"))
        if not folder.exists():
            msg = f"The zarr image of library {library.name!r} is not in a local folder; give the path of one."
            raise InputError(msg)
        return folder.resolve(), None
    if not (hasattr(picture, "__array__") or hasattr(picture, "__array_interface__")):
        msg = f"image= of type {type(picture).__name__} cannot be found again later; give an array or a path."
        raise WrongTypeError(msg)
    return keep_array(picture), None
