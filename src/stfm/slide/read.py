"""The one way in: whatever the user has becomes a list of slides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stfm._errors import InputError, WrongTypeError
from stfm._keys import UNNAMED
from stfm.slide.slide import Slide

if TYPE_CHECKING:
    from collections.abc import Mapping


def as_slides(
    data: Any,
    *,
    library_key: str | None = None,
    spatial_key: str = "spatial",
    layer: str | None = None,
    image: Any = None,
    mpp: float | Mapping[str, float] | None = None,
    patient_key: str | None = None,
    modalities: tuple[str, ...] = ("image", "gene"),
) -> list[Slide]:
    """Turn what the user has into slides.

    Parameters
    ----------
    data
        AnnData (one library or many), SpatialData with one table of spots, a path of an ``.h5ad`` file, a
        :class:`~stfm.slide.Slide`, or a list of these.
    library_key
        Column of ``obs`` that names the library of a spot; found when there is only one candidate.
    spatial_key
        Entry of ``obsm`` with the coordinates.
    layer
        Layer with raw counts; None takes ``X``.
    image
        H&E, where it is neither in ``uns["spatial"]`` nor recorded by :func:`stfm.pp.tile`: an array, a path, or a
        mapping from library to either.
    mpp
        µm per px of the full-resolution image, where it is not to be found; or a mapping from library to it.
    patient_key
        Column of ``obs`` that names the patient; ``"patient"`` when it is there.
    modalities
        What to read: ``"image"``, ``"gene"`` or both.

    Returns
    -------
    A slide a library, in the order of their first spots.

    Raises
    ------
    WrongTypeError
        ``data`` is none of the above.
    MissingKeyError
        There are no coordinates, or a named column, layer or library does not exist.
    InputError
        Coordinates or counts cannot be used; the message names the argument that mends it. All spots of a library lie
        at one place, or more than half of them off its image.

    Examples
    --------
    >>> import stfm as sf
    >>> (slide,) = sf.slide.as_slides(sf.datasets.toy(n_spots=60))
    >>> slide.name, slide.platform, slide.n_obs
    ('section_1', 'Visium', 60)
    """
    if isinstance(data, Slide):
        return [data]
    options: dict[str, Any] = {
        "library_key": library_key,
        "spatial_key": spatial_key,
        "layer": layer,
        "image": image,
        "mpp": mpp,
        "patient_key": patient_key,
        "modalities": modalities,
    }
    if isinstance(data, (list, tuple)):
        if not data:
            msg = "The list of slides is empty; give at least one AnnData, Slide or path."
            raise InputError(msg)
        return _unique([_numbered(slide, i) for i, item in enumerate(data) for slide in as_slides(item, **options)])
    from stfm.slide import from_anndata
    from stfm.slide.from_spatialdata import as_table, is_spatialdata

    if isinstance(data, (str, Path)):
        data = from_anndata.read_file(Path(data))
    if is_spatialdata(data):
        key, place, wanted = library_key, spatial_key, "image" in modalities
        data = as_table(data, library_key=key, spatial_key=place, images=wanted)
    if from_anndata.is_table(data):
        return from_anndata.slides_from_anndata(data, **options)
    kinds = "AnnData, SpatialData, a path of an .h5ad file, a Slide or a list of these"
    msg = f"data must be {kinds}, got {type(data).__name__}."
    raise WrongTypeError(msg)


def _numbered(slide: Slide, position: int) -> Slide:
    """Give a slide whose object names no library the name of its position in the list."""
    return replace(slide, name=f"{UNNAMED}_{position}") if slide.name == UNNAMED else slide


def _unique(slides: list[Slide]) -> list[Slide]:
    """Refuse two slides of one name, since results are told apart by it."""
    seen: set[str] = set()
    for slide in slides:
        if slide.name in seen:
            msg = f"Two slides are named {slide.name!r}; give each library a name of its own (library_key=)."
            raise InputError(msg)
        seen.add(slide.name)
    return slides
