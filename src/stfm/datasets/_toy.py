"""A simulated tissue that looks and counts like one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from stfm._errors import InputError
from stfm._validate import check_choice, check_count, check_positive, check_range, resolve_rng

if TYPE_CHECKING:
    from anndata import AnnData

    from stfm.datasets._toy_counts import Batch
    from stfm.datasets._toy_genes import GenePlan
    from stfm.datasets._toy_image import Stain
    from stfm.datasets._toy_tissue import Cells, Tissue

Layout = Literal["visium", "st", "cells"]


@dataclass(frozen=True)
class _Lattice:
    """How spots lie: platform, pitch and diameter in µm, mean counts a spot, tissue a spot in µm²."""

    platform: str
    pitch_um: float
    diameter_um: float
    depth: float
    area_um2: float


_LAYOUTS = {
    "visium": _Lattice("Visium", 100.0, 55.0, 2500.0, 100.0 * 100.0 * np.sqrt(3) / 2),
    "st": _Lattice("ST", 200.0, 100.0, 4000.0, 200.0 * 200.0),
    "cells": _Lattice("Xenium", 0.0, 10.0, 250.0, 1e6 / 3300.0),
}
_MARGIN_UM = 120.0


def toy(
    *,
    n_spots: int = 500,
    layout: Layout = "visium",
    n_patients: int = 1,
    n_sections: int | None = None,
    n_genes: int = 600,
    depth: float | None = None,
    image: bool = True,
    mpp: float = 1.0,
    batch_effect: float = 1.0,
    stain_shift: float = 1.0,
    as_: Literal["anndata", "spatialdata"] = "anndata",
    rng: int | np.random.Generator | None = 0,
) -> Any:
    """Simulate sections of a tumour with its surroundings: H&E picture, counts, and the truth behind both.

    Seven domains are made of ten cell types. Cells are placed first; their nuclei make the picture and their
    programmes, summed under every spot, make the counts, so that picture and genes tell of the same cells. Two pairs of
    domains differ mainly in one modality: ``tumor`` and ``tumor_hypoxic`` by genes, ``stroma`` and ``sclerosis`` by the
    picture. Programmes that no picture shows (interferon, stress) vary over the tissue and disturb clusterings by
    genes.

    Parameters
    ----------
    n_spots
        Spots (or cells) of every section.
    layout
        ``"visium"`` (hexagonal, pitch 100 µm, 55-µm spots), ``"st"`` (square, pitch 200 µm, 100-µm spots) or
        ``"cells"`` (one observation a cell).
    n_patients
        Patients; each has its own batch effect and stain.
    n_sections
        Sections in all, dealt to the patients in turn; one a patient by default.
    n_genes
        Genes of the panel, with real human symbols; markers and programmes always belong to it.
    depth
        Mean counts a spot; by default 2500 (``"visium"``), 4000 (``"st"``) or 250 (``"cells"``).
    image
        Whether to render the picture.
    mpp
        µm per px of the picture.
    batch_effect, stain_shift
        Strength of the differences between patients and sections in counts and in colours; 0 for none.
    as_
        ``"anndata"`` or ``"spatialdata"`` (images, shapes and a table; needs ``stfm[spatial]``).
    rng
        Seed or generator; the same seed gives the same tissue.

    Returns
    -------
    One AnnData (or SpatialData) with all sections:

    X
        Raw counts, float32 CSR ``(n, n_genes)``.
    obs
        ``domain`` (the truth, categorical), ``library_id``, ``patient``, ``study``, ``array_row``, ``array_col``,
        ``in_tissue``, ``n_cells``; for ``layout="cells"`` also ``cell_type``.
    var
        ``driver`` (cell type or programme behind the gene) and ``image_linked`` (whether the picture shows it).
    varm
        ``cell_type_profiles``, DataFrame ``(n_genes, 10)``: expected share of each gene in the RNA of each cell type.
    obsm
        ``spatial``, float64 ``(n, 2)``, px (µm for ``layout="cells"``, as Xenium has it); the truth:
        ``cell_type_fractions``, DataFrame ``(n, 10)``, and ``programme_levels``, DataFrame ``(n, 4)``.
    uns
        ``spatial`` as Space Ranger and squidpy have it, one entry a library; ``stfm_toy``, how the tissue was made.

    Raises
    ------
    InputError
        A number that makes no tissue.

    Examples
    --------
    >>> import stfm as sf
    >>> adata = sf.datasets.toy(n_spots=60, image=False)
    >>> adata.n_obs
    60
    """
    check_choice("layout", layout, _LAYOUTS)
    check_choice("as_", as_, ("anndata", "spatialdata"))
    check_count("n_spots", n_spots)
    check_count("n_patients", n_patients)
    n_sections = n_patients if n_sections is None else n_sections
    check_count("n_sections", n_sections)
    check_positive("mpp", mpp)
    check_range("mpp", mpp, 0.1, 20.0)
    depth = _LAYOUTS[layout].depth if depth is None else depth
    check_positive("depth", depth)
    check_range("batch_effect", batch_effect, 0.0, 10.0)
    check_range("stain_shift", stain_shift, 0.0, 3.0)
    if n_sections < n_patients:
        raise InputError(f"n_sections={n_sections} is fewer than n_patients={n_patients}; every patient needs one")
    plan = _plan(n_genes)
    generator = resolve_rng(rng)
    seed = rng if isinstance(rng, int) else -1
    patients = [_Patient.draw(child, n_genes, batch_effect, stain_shift) for child in generator.spawn(n_patients)]
    sections = [
        _section(
            child, patients[number % n_patients], plan, f"section_{number + 1}", f"patient_{number % n_patients + 1}",
            layout=layout, n_spots=n_spots, depth=depth, mpp=mpp, image=image, effect=batch_effect, shift=stain_shift,
        )
        for number, child in enumerate(generator.spawn(n_sections))
    ]  # fmt: skip
    record = {
        "seed": seed, "layout": layout, "n_spots": n_spots, "n_patients": n_patients, "n_sections": n_sections,
        "depth": float(depth), "mpp": float(mpp), "batch_effect": float(batch_effect),
        "stain_shift": float(stain_shift),
    }  # fmt: skip
    adata = _join(sections, plan, record)
    if as_ == "spatialdata":
        from stfm.datasets._toy_spatialdata import to_spatialdata

        return to_spatialdata(adata)
    return adata


def _plan(n_genes: int) -> GenePlan:
    from stfm.datasets._toy_genes import all_genes, minimum_genes, plan_genes

    check_count("n_genes", n_genes)
    low, high = minimum_genes(), len(all_genes()[0])
    if not low <= n_genes <= high:
        raise InputError(
            f"n_genes must lie between {low} (markers, programmes, housekeepers) and {high}, got {n_genes}"
        )
    return plan_genes(n_genes)


@dataclass(frozen=True)
class _Patient:
    """What all sections of a patient share."""

    batch: Batch
    stain: Stain

    @classmethod
    def draw(cls, rng: np.random.Generator, n_genes: int, effect: float, shift: float) -> _Patient:
        from stfm.datasets._toy_counts import make_batch
        from stfm.datasets._toy_image import make_stain

        return cls(make_batch(rng, n_genes, effect), make_stain(rng, shift))


@dataclass(frozen=True)
class _Places:
    """Where the observations of a section lie."""

    yx_um: NDArray[np.float64]
    array: NDArray[np.int64]
    tissue: Tissue
    cells: Cells


def _section(
    rng: np.random.Generator, patient: _Patient, plan: GenePlan, library: str, patient_name: str, *, layout: Layout,
    n_spots: int, depth: float, mpp: float, image: bool, effect: float, shift: float,
) -> AnnData:  # fmt: skip
    """One section as AnnData."""
    import pandas as pd
    from anndata import AnnData

    from stfm.datasets import _toy_counts as counting
    from stfm.datasets._toy_genes import PROGRAMMES
    from stfm.datasets._toy_image import render, vary_stain
    from stfm.datasets._toy_tissue import CELL_TYPES, DOMAINS

    tissue_rng, count_rng, image_rng = rng.spawn(3)
    places = _place_cells(tissue_rng, n_spots) if layout == "cells" else _place_spots(tissue_rng, layout, n_spots)
    tissue, cells, yx = places.tissue, places.cells, places.yx_um
    kind = _LAYOUTS[layout]
    domain = _domain_of(tissue, yx, 0.0 if layout == "cells" else kind.diameter_um)
    if layout == "cells":
        number = np.eye(len(CELL_TYPES))[cells.kind]
        content = number * cells.size[:, None]
    else:
        content, number = counting.cells_under(cells, yx, kind.diameter_um / 2)
        per_spot = 0.15 * max(float(content.sum(axis=1).mean()), 1.0)
        content = content + per_spot * counting.surroundings(domain)
    section_batch = counting.make_batch(count_rng, len(plan.names), 0.35 * effect)
    levels = counting.programme_levels(tissue, yx)
    X = counting.draw_counts(count_rng, content * counting.RNA, levels, plan, [patient.batch, section_batch], depth)
    obs = pd.DataFrame(
        {
            "domain": pd.Categorical([DOMAINS[code] for code in domain], categories=list(DOMAINS)),
            "patient": patient_name,
            "study": "toy",
            "array_row": places.array[:, 0],
            "array_col": places.array[:, 1],
            "in_tissue": 1,
            "n_cells": number.sum(axis=1).astype(np.int64),
        },
        index=_names(library, layout, places.array),
    )
    if layout == "cells":
        obs["cell_type"] = pd.Categorical([CELL_TYPES[code] for code in cells.kind], categories=list(CELL_TYPES))
    adata = AnnData(X, obs=obs, var=pd.DataFrame(index=plan.names))
    fractions = content / np.maximum(content.sum(axis=1, keepdims=True), 1e-12)
    adata.obsm["cell_type_fractions"] = pd.DataFrame(fractions, index=obs.index, columns=list(CELL_TYPES))
    adata.obsm["programme_levels"] = pd.DataFrame(levels, index=obs.index, columns=list(PROGRAMMES))
    unit = 1.0 if layout == "cells" else mpp  # µm a unit of the coordinates: single-cell platforms write µm
    adata.obsm["spatial"] = yx[:, ::-1] / unit
    entry: dict[str, Any] = {
        "scalefactors": {
            "spot_diameter_fullres": kind.diameter_um / unit,
            "tissue_hires_scalef": unit / mpp,
            "microns_per_pixel": unit,
        },
        "metadata": {"platform": kind.platform, "species": "human", "study": "toy"},
    }
    if image:
        stain = vary_stain(image_rng, patient.stain, shift)
        entry["images"] = {"hires": render(image_rng, tissue, cells, stain, mpp)}
    adata.uns["spatial"] = {library: entry}
    return adata


def _names(library: str, layout: Layout, array: NDArray[np.int64]) -> list[str]:
    """Names of the spots by their place on the array, of cells by their number."""
    if layout == "cells":
        return [f"{library}_cell{number}" for number in range(len(array))]
    return [f"{library}_{row}x{column}" for row, column in array]


def _place_spots(rng: np.random.Generator, layout: Layout, n_spots: int) -> _Places:
    """Lay a lattice over an outline so that exactly ``n_spots`` lie inside, and fill the outline with cells."""
    from stfm.datasets._toy_tissue import STEP, lay_out, outline_map, place_cells

    kind = _LAYOUTS[layout]
    radius = float(np.sqrt(max(n_spots, 4) * kind.area_um2 / np.pi))
    side = 3.0 * radius + 4 * kind.pitch_um
    outline = outline_map(rng, (side, side), radius)
    step = kind.pitch_um * np.sqrt(3) / 2 if layout == "visium" else kind.pitch_um
    rows, columns = np.meshgrid(np.arange(int(side / step)), np.arange(int(side / kind.pitch_um)), indexing="ij")
    shift = 0.5 * (rows % 2) if layout == "visium" else 0.0
    yx = np.stack([(rows + 0.5) * step, (columns + 0.25 + shift) * kind.pitch_um], axis=-1).reshape(-1, 2)
    array = np.stack([rows, 2 * columns + rows % 2 if layout == "visium" else columns], axis=-1).reshape(-1, 2)
    level = outline[tuple(np.floor(yx / STEP).astype(int).clip(0, outline.shape[0] - 1).T)]
    order = np.argsort(-level, kind="stable")
    threshold = float(level[order[min(n_spots, len(order) - 1)]])
    keep = np.sort(order[:n_spots])
    outline, offset = _crop(outline - threshold - 1e-6)
    tissue = lay_out(rng, (outline.shape[0] * STEP, outline.shape[1] * STEP), outline)
    cells = place_cells(rng, tissue)
    cells = cells.subset(tissue.at(tissue.outline, cells.yx_um) > 0)
    return _Places(yx[keep] - offset, array[keep] - array[keep].min(axis=0) // 2 * 2, tissue, cells)


def _place_cells(rng: np.random.Generator, n_cells: int) -> _Places:
    """Fill an outline with cells, and shrink it until exactly ``n_cells`` lie inside."""
    from stfm.datasets._toy_tissue import STEP, lay_out, outline_map, place_cells

    radius = float(np.sqrt(max(n_cells, 60) * _LAYOUTS["cells"].area_um2 / np.pi))
    side = 3.0 * radius + 200.0
    outline, _ = _crop(outline_map(rng, (side, side), 1.25 * radius))
    tissue = lay_out(rng, (outline.shape[0] * STEP, outline.shape[1] * STEP), outline)
    cells = place_cells(rng, tissue)
    level = tissue.at(tissue.outline, cells.yx_um)
    order = np.argsort(-level, kind="stable")[:n_cells]
    if len(order) < n_cells or level[order[-1]] <= 0:
        raise InputError(f"could not place {n_cells} cells; choose another rng or more cells")
    threshold = float(level[order[-1]]) - 1e-6
    rows, columns = _inside(tissue.outline - threshold)
    tissue, offset = tissue.cut(threshold, rows, columns)
    cells = cells.subset(np.sort(order))
    cells = replace(cells, yx_um=cells.yx_um - offset)
    array = np.floor(cells.yx_um / STEP).astype(np.int64)
    return _Places(cells.yx_um, array, tissue, cells)


def _crop(outline: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Cut an outline to its inside and a margin; returns it and how far the corner moved (y, x in µm)."""
    from stfm.datasets._toy_tissue import STEP

    rows, columns = _inside(outline)
    return outline[rows, columns].copy(), np.array([rows.start, columns.start]) * STEP


def _inside(outline: NDArray[np.float32]) -> tuple[slice, slice]:
    """Rows and columns of a map that hold the tissue and a margin."""
    from stfm.datasets._toy_tissue import STEP

    rows, columns = np.nonzero(outline > 0)
    margin = int(_MARGIN_UM / STEP)
    low = np.maximum([rows.min() - margin, columns.min() - margin], 0)
    return slice(int(low[0]), int(rows.max()) + margin + 1), slice(int(low[1]), int(columns.max()) + margin + 1)


def _domain_of(tissue: Tissue, yx_um: NDArray[np.float64], diameter_um: float) -> NDArray[np.int8]:
    """Domain that covers most of a spot, from its middle and six places around it."""
    from stfm.datasets._toy_tissue import DOMAINS

    turns = np.arange(6) * np.pi / 3
    around = np.vstack([[0.0, 0.0], 0.3 * diameter_um * np.column_stack([np.sin(turns), np.cos(turns)])])
    seen = tissue.at(tissue.labels, yx_um[:, None, :] + around)
    votes = (seen[:, :, None] == np.arange(len(DOMAINS))).sum(axis=1)
    return np.asarray(votes.argmax(axis=1), dtype=np.int8)


def _join(sections: list[AnnData], plan: GenePlan, record: dict[str, Any]) -> AnnData:
    """Put the sections into one object and add what they share."""
    import anndata as ad
    import pandas as pd

    from stfm._provenance import record as provenance
    from stfm.datasets._toy_genes import PROGRAMMES
    from stfm.datasets._toy_tissue import CELL_TYPES

    names = [next(iter(section.uns["spatial"])) for section in sections]
    joined = ad.concat(sections, label="library_id", keys=names, merge="same", uns_merge=None)
    joined.uns["spatial"] = {name: section.uns["spatial"][name] for name, section in zip(names, sections, strict=True)}
    for column in ("patient", "study"):
        joined.obs[column] = pd.Categorical(joined.obs[column])
    joined.varm["cell_type_profiles"] = pd.DataFrame(plan.profiles.T, index=joined.var_names, columns=list(CELL_TYPES))
    joined.var["driver"] = pd.Categorical(plan.driver)
    joined.var["image_linked"] = np.isin(plan.driver, CELL_TYPES)
    joined.uns["stfm_toy"] = provenance(
        record | {"cell_types": list(CELL_TYPES), "programmes": list(PROGRAMMES), "image_linked": "cell types only"}
    )
    return joined
