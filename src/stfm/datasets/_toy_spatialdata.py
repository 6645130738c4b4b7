"""The toy tissue as SpatialData: images, spots as circles, one table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from stfm._optional import require

if TYPE_CHECKING:
    from anndata import AnnData


def to_spatialdata(adata: AnnData) -> Any:
    """Return the sections as one SpatialData; a section is a coordinate system in px of its image.

    Elements are ``<library>_image`` and ``<library>_spots``; the table ``table`` annotates the spots.
    """
    spatialdata = require("spatialdata", extra="spatial")
    models = require("spatialdata.models", extra="spatial")
    transformations = require("spatialdata.transformations", extra="spatial")
    images, shapes = {}, {}
    adata = adata.copy()
    spatial = adata.uns.pop("spatial")
    library = adata.obs["library_id"].astype(str)
    adata.obs["region"] = (library + "_spots").astype("category")
    adata.obs["instance_id"] = 0
    for name, entry in spatial.items():
        rows = np.flatnonzero(library == name)
        adata.obs.iloc[rows, adata.obs.columns.get_loc("instance_id")] = np.arange(len(rows))
        where = {name: transformations.Identity()}
        factor = entry["scalefactors"]["tissue_hires_scalef"]
        to_picture = transformations.Scale([factor, factor], axes=("x", "y"))
        shapes[f"{name}_spots"] = models.ShapesModel.parse(
            adata.obsm["spatial"][rows],
            geometry=0,
            radius=entry["scalefactors"]["spot_diameter_fullres"] / 2,
            index=np.arange(len(rows)),
            transformations={name: to_picture},
        )
        if "images" in entry:
            images[f"{name}_image"] = models.Image2DModel.parse(
                entry["images"]["hires"], dims=("y", "x", "c"), c_coords=("r", "g", "b"), transformations=where
            )
    # what is neither pixels nor places travels with the table, as scale factors do
    adata.uns["spatial"] = {
        name: {key: value for key, value in entry.items() if key != "images"} for name, entry in spatial.items()
    }
    table = models.TableModel.parse(adata, region=list(shapes), region_key="region", instance_key="instance_id")
    return spatialdata.SpatialData(images=images, shapes=shapes, tables={"table": table})
