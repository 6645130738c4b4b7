"""SpatialData in: its table read as an AnnData with coordinates and image, and results written back to that table.

One table annotates spots that are shapes, one element a section; each section has one image in a common coordinate
system. This is what ``spatialdata-io`` makes of Visium and what :func:`stfm.datasets.toy` makes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from anndata import AnnData

from stfm._errors import InputError, MissingKeyError
from stfm._keys import LIBRARY_COLUMNS, SPATIAL
from stfm.slide.from_anndata import library_column
from stfm.slide.readers import keep_array

if TYPE_CHECKING:
    from numpy.typing import NDArray

T = TypeVar("T")

_SIZES = ("full", "hires", "lowres")  # of several images of a section, as their names tell
_SIMILAR = 0.01  # part by which the two axes of a map may differ in scale
_AXES = ("x", "y")
_SLOTS = ("obsm", "obsp", "layers", "uns")


def is_spatialdata(data: Any) -> bool:
    """Whether something is a SpatialData; the package is not imported to tell."""
    module = sys.modules.get("spatialdata")
    return module is not None and isinstance(data, module.SpatialData)


def table_key(sdata: Any) -> str:
    """Return the name of the only table."""
    names = list(sdata.tables)
    if len(names) != 1:
        have = ", ".join(map(repr, names)) or "none"
        msg = f"SpatialData must have one table to be read, this one has {have}; give one: sdata.tables[...]."
        raise InputError(msg)
    return str(names[0])


def as_table(sdata: Any, *, library_key: str | None = None, spatial_key: str = SPATIAL, images: bool = True) -> AnnData:
    """Return the table as a new AnnData that shares its matrices and has coordinates and images as scanpy has them.

    Coordinates are the centres of the shapes, in their own unit (px of the full-resolution image), turned and moved so
    that the image lies under them; the image is named by its file, or kept in the cache folder.

    Parameters
    ----------
    sdata
        SpatialData with one table.
    library_key
        Column of ``obs`` that names the library of a spot; by default found, else each region is one.
    spatial_key
        Entry of ``obsm`` that the coordinates go to.
    images
        Whether images are looked for.

    Raises
    ------
    InputError
        Several tables, spots that are no shapes, several images that could be meant, or an image that is stretched.
    MissingKeyError
        The table annotates nothing, or shapes that are not there.
    """
    table = sdata.tables[table_key(sdata)]
    regions, instances = _annotation(table)
    column = library_column(table, library_key)
    obs = table.obs.copy()
    if column is None and len(set(regions)) > 1:
        column = LIBRARY_COLUMNS[0]
        obs[column] = regions
    known = table.uns.get("spatial", {})
    labels = np.full(table.n_obs, _only_name(known, regions)) if column is None else obs[column].astype(str).to_numpy()
    coords = np.empty((table.n_obs, 2))
    spatial: dict[str, Any] = {}
    for name in dict.fromkeys(labels.tolist()):
        rows = np.flatnonzero(labels == name)
        region = _one_region(regions[rows], name)
        centres = _centres(sdata, region, instances[rows])
        entry = dict(known.get(name, {}))
        if images and (key := _image_of(sdata, region, name)) is not None:
            centres, scale = _under_image(sdata, region, key, centres)
            entry["images"] = {"hires": _picture(sdata, key)}
            entry["scalefactors"] = {**entry.get("scalefactors", {}), "tissue_hires_scalef": scale}
        coords[rows], spatial[name] = centres, entry
    return AnnData(
        X=table.X, obs=obs, var=table.var, obsm={**table.obsm, spatial_key: coords}, obsp=dict(table.obsp),
        layers=dict(table.layers), uns={**table.uns, "spatial": spatial},
    )  # fmt: skip


def on_spatialdata(function: Callable[..., T], arguments: Mapping[str, Any], *, images: bool = True) -> T:
    """Call a function of ``pp`` or ``tl`` on the table of a SpatialData and move what it wrote to that table.

    Parameters
    ----------
    function
        Takes an AnnData as ``adata``, writes to it, and with ``copy=True`` returns another one.
    arguments
        Its arguments by name, ``adata`` being the SpatialData.
    images
        Whether the function looks at images.

    Returns
    -------
    None, or with ``copy=True`` a SpatialData that shares all but the table.
    """
    given = dict(arguments)
    sdata, copy = given.pop("adata"), given.pop("copy", False)
    key, spatial_key = table_key(sdata), given.get("spatial_key", SPATIAL)
    made = as_table(sdata, library_key=given.get("library_key"), spatial_key=spatial_key, images=images)
    if made.obs.shape[1] > sdata.tables[key].obs.shape[1]:
        given["library_key"] = LIBRARY_COLUMNS[0]
    before = {slot: dict(getattr(made, slot)) for slot in _SLOTS}
    columns = made.obs.copy()
    function(made, **given)
    if copy:
        elements = {name: element for _, name, element in sdata.gen_elements() if name != key}
        sdata = type(sdata).init_from_elements({**elements, key: sdata.tables[key].copy()}, attrs=sdata.attrs)
    table = sdata.tables[key]
    for slot in _SLOTS:
        after, target = dict(getattr(made, slot)), getattr(table, slot)
        for name in before[slot].keys() - after.keys():
            target.pop(name, None)
        for name, value in after.items():
            if before[slot].get(name) is not value:
                target[name] = value
    for name in made.obs.columns:
        if name not in columns or not made.obs[name].equals(columns[name]):
            table.obs[name] = made.obs[name]
    return cast("T", sdata if copy else None)


def _annotation(table: AnnData) -> tuple[NDArray[np.str_], NDArray[Any]]:
    """Return the element that each row of the table belongs to, and its place there."""
    attributes = table.uns.get("spatialdata_attrs")
    if not attributes:
        msg = "The table of the SpatialData annotates no element (no uns['spatialdata_attrs']); give the table itself."
        raise MissingKeyError(msg)
    regions = table.obs[attributes["region_key"]].astype(str).to_numpy()
    return regions, table.obs[attributes["instance_key"]].to_numpy()


def _only_name(known: Mapping[str, Any], regions: NDArray[np.str_]) -> str:
    return str(next(iter(known))) if len(known) == 1 else str(regions[0]) if len(regions) else ""


def _one_region(regions: NDArray[np.str_], library: str) -> str:
    names = sorted(set(regions.tolist()))
    if len(names) > 1:
        msg = f"Library {library!r} has spots of {len(names)} elements ({', '.join(names[:3])}); name one a library."
        raise InputError(msg)
    return str(names[0])


def _centres(sdata: Any, region: str, instances: NDArray[Any]) -> NDArray[np.float64]:
    """Return the centres of the shapes that the rows of a table belong to, in their own unit."""
    if region not in sdata.shapes:
        if region in sdata:
            msg = (
                f"{region!r} holds no shapes; spots must be circles or polygons, or give the table: sdata.tables[...]."
            )
            raise InputError(msg)
        msg = f"The table annotates {region!r}, which the SpatialData does not have."
        raise MissingKeyError(msg)
    shapes = sdata.shapes[region]
    place = shapes.index.get_indexer(instances)
    if (place < 0).any():
        first, n = instances[place < 0][0], int((place < 0).sum())
        msg = f"{n} rows of the table have no shape in {region!r} (instance {first} first)."
        raise MissingKeyError(msg)
    points = shapes.geometry.centroid
    centres: NDArray[np.float64] = np.column_stack([points.x, points.y]).astype(np.float64)[place]
    return centres


def _image_of(sdata: Any, region: str, library: str) -> str | None:
    """Return the image of a region: of those that share a coordinate system the only one, or the one of its name."""
    from spatialdata.transformations import get_transformation

    systems = set(get_transformation(sdata.shapes[region], get_all=True))
    keys = [k for k, image in sdata.images.items() if systems & set(get_transformation(image, get_all=True))]
    named = [key for key in keys if library in key or region in key]
    keys = named or keys
    for size in _SIZES:
        sized = [key for key in keys if size in key]
        if len(keys) > 1 and len(sized) == 1:
            return str(sized[0])
    if len(keys) > 1:
        msg = (
            f"Library {library!r} has {len(keys)} images ({', '.join(map(repr, keys[:4]))}); keep one of them: "
            "sdata.subset([...])."
        )
        raise InputError(msg)
    return str(keys[0]) if keys else None


def _under_image(sdata: Any, region: str, key: str, centres: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Return centres whose multiples by a scale are px of the image, and that scale."""
    from spatialdata.transformations import get_transformation

    spots, image = (get_transformation(e, get_all=True) for e in (sdata.shapes[region], sdata.images[key]))
    system = next(name for name in spots if name in image)
    there = spots[system].to_affine_matrix(_AXES, _AXES)
    back = np.linalg.inv(image[system].to_affine_matrix(_AXES, _AXES))
    matrix = back @ there
    square = matrix[:2, :2] @ matrix[:2, :2].T
    scale = float(abs(np.linalg.det(matrix[:2, :2])) ** 0.5)
    if not np.allclose(square, scale**2 * np.eye(2), rtol=0, atol=2 * _SIMILAR * scale**2):
        msg = (
            f"Image {key!r} is stretched or sheared against {region!r}; spots can only be turned, mirrored and scaled."
        )
        raise InputError(msg)
    return (centres @ matrix[:2, :2].T + matrix[:2, 2]) / scale, scale


def _picture(sdata: Any, key: str) -> Path:
    """Return where the pixels are on disk; pixels that are only in memory are kept in the cache folder."""
    if sdata.is_backed():
        stored = Path(str(sdata.path)) / "images" / key
        if stored.is_dir():
            return stored
    image = sdata.images[key]
    finest = image if hasattr(image, "dims") and "x" in image.dims and not hasattr(image, "children") else None
    if finest is None:
        finest = next(iter(image["scale0"].ds.values()))
    return keep_array(np.asarray(finest.transpose("y", "x", "c").data))
