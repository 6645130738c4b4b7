"""What the parsers of the ST data sets share: spots with counts, scale and picture as one AnnData."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from stfm._errors import DataIntegrityError

if TYPE_CHECKING:
    from anndata import AnnData

    from stfm.datasets._fetch import Source

#: longest side of the picture kept in ``uns`` for plots, in px
_SHOWN_PX = 2000


def read_table(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    """Read a table of spots and check its columns."""
    table = pd.read_csv(path, sep="\t")
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise DataIntegrityError(f"{path} has no column {missing[0]!r}; delete it from the cache to fetch it again")
    return table


def read_counts(path: Path) -> pd.DataFrame:
    """Read a table of counts, spots x genes, float32."""
    table = pd.read_csv(path, sep="\t", index_col=0, low_memory=False)
    return table.astype(np.float32)


def assemble(
    source: Source,
    library: str,
    spots: pd.DataFrame,
    counts: pd.DataFrame,
    *,
    patient: str,
    picture: Path | None,
) -> AnnData:
    """Join spots and counts by name (``<x>x<y>``), in the order of the spots; spots without counts are left out.

    Parameters
    ----------
    source
        The data set.
    library
        Name of the section.
    spots
        Table with ``x``, ``y`` (array positions), ``new_x``, ``new_y`` (the same, measured), ``pixel_x``, ``pixel_y``.
    counts
        Spots x genes.
    patient
        Patient or animal.
    picture
        H&E of full resolution.
    """
    from anndata import AnnData

    from stfm.slide.platforms import get_platform
    from stfm.slide.units import resolve_mpp

    names = spots["x"].astype(str) + "x" + spots["y"].astype(str)
    spots = spots.set_axis(pd.Index(names.astype(object)), axis=0)
    spots = spots[spots.index.isin(counts.index)]
    obs = pd.DataFrame({"array_row": spots["y"].to_numpy(), "array_col": spots["x"].to_numpy()}, index=spots.index)
    for name, value in (("library_id", library), ("patient", patient), ("study", source.name)):
        obs[name] = pd.Categorical([value] * len(obs))
    X = sparse.csr_matrix(counts.loc[spots.index].to_numpy())
    adata = AnnData(X, obs=obs, var=pd.DataFrame(index=counts.columns.astype(object)))
    adata.obsm["spatial"] = spots[["pixel_x", "pixel_y"]].to_numpy(dtype=np.float64)
    adata.obsm["array"] = spots[["new_x", "new_y"]].to_numpy(dtype=np.float64)
    platform = get_platform(source.platform)
    mpp = resolve_mpp(adata.obsm["spatial"], platform=platform.name).mpp
    entry: dict[str, Any] = {
        "scalefactors": {"spot_diameter_fullres": platform.diameter_um / mpp, "microns_per_pixel": mpp},
        "metadata": {
            "platform": platform.name,
            "species": source.species,
            "source": f"{source.repository} @ {source.commit}",
            "licence": source.licence,
            "reference": source.reference,
        },
    }
    if picture is not None:
        shown, scale = small_picture(picture)
        entry["images"] = {"hires": shown}
        entry["scalefactors"]["tissue_hires_scalef"] = scale
        entry["metadata"]["source_image_path"] = str(picture)
    adata.uns["spatial"] = {library: entry}
    return adata


def small_picture(path: Path) -> tuple[NDArray[np.uint8], float]:
    """Return a picture for plots and its px per full-resolution px, without decoding the whole of a JPEG."""
    import warnings

    from PIL import Image

    with warnings.catch_warnings():
        # the file's sha256 was checked: its size is no attack
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        opened = Image.open(path)
    with opened as picture:
        width, height = picture.size
        scale = min(1.0, _SHOWN_PX / max(width, height))
        size = (round(width * scale), round(height * scale))
        if scale < 1.0:
            picture.draft("RGB", (size[0], size[1]))  # the decoder halves as often as it can
        shown = picture.convert("RGB")
        if shown.size != size:
            shown = shown.resize(size, Image.Resampling.BOX)
        return np.asarray(shown, dtype=np.uint8), size[0] / width
