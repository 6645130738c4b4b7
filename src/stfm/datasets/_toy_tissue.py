"""Geometry of the toy tissue: outline, domains, glands, vessels and cells, all in µm."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from scipy.spatial import cKDTree

from stfm.datasets._toy_genes import MARKERS

Array = NDArray[np.float32]

#: side of a pixel of the maps, in µm
STEP = 8.0
CELL_TYPES = tuple(MARKERS)
DOMAINS = ("tumor", "tumor_hypoxic", "glands", "stroma", "sclerosis", "lymphoid", "adipose")
TUMOR, HYPOXIC, GLANDS, STROMA, SCLEROSIS, LYMPHOID, ADIPOSE = range(len(DOMAINS))

#: cells per mm²; those of glands (rings) and of adipose tissue (fat cells) come on top
DENSITY = (5600.0, 5400.0, 1700.0, 1900.0, 750.0, 11000.0, 260.0)

_MIX: dict[str, dict[str, float]] = {
    "nest": {"tumor": 0.86, "T cell": 0.05, "macrophage": 0.05, "endothelium": 0.02, "plasma cell": 0.02},
    "septum": {"fibroblast": 0.5, "endothelium": 0.16, "T cell": 0.12, "macrophage": 0.12, "smooth muscle": 0.1},
    "stroma": {
        "fibroblast": 0.6, "endothelium": 0.11, "smooth muscle": 0.09, "macrophage": 0.08, "T cell": 0.06,
        "plasma cell": 0.06,
    },
    "lymphoid": {
        "T cell": 0.47, "B cell": 0.36, "plasma cell": 0.06, "macrophage": 0.06, "endothelium": 0.03,
        "fibroblast": 0.02,
    },
    "adipose": {"adipocyte": 0.62, "endothelium": 0.15, "fibroblast": 0.13, "macrophage": 0.1},
}  # fmt: skip


def mixture(name: str) -> NDArray[np.float64]:
    """Shares of the cell types in one kind of tissue, ``(n_types,)``."""
    return np.array([_MIX[name].get(cell_type, 0.0) for cell_type in CELL_TYPES])


@dataclass(frozen=True)
class Tissue:
    """One section.

    Attributes
    ----------
    size_um
        Height and width of the picture.
    outline
        Map that is positive inside the tissue (in units of its radius).
    labels
        Map of the domains, int8; -1 outside.
    maps
        Latent maps: ``nest``, ``fibre``, ``infiltration``, and one a programme.
    glands
        ``(n, 5)``: y, x, radius, phase, thickness of the epithelium.
    vessels
        ``(n, 3)``: y, x, radius.
    follicles
        ``(n, 3)``: y, x, radius of the lymphoid aggregates.
    fat
        ``(n, 2)``: y, x of the middles of fat cells.
    """

    size_um: tuple[float, float]
    outline: Array
    labels: NDArray[np.int8]
    maps: dict[str, Array]
    glands: NDArray[np.float64]
    vessels: NDArray[np.float64]
    follicles: NDArray[np.float64]
    fat: NDArray[np.float64]

    def at(self, values: NDArray[Any], yx_um: NDArray[np.float64]) -> NDArray[Any]:
        """Values of a map at positions (y, x)."""
        index = np.floor(yx_um / STEP).astype(np.int64)
        rows = np.clip(index[..., 0], 0, values.shape[0] - 1)
        columns = np.clip(index[..., 1], 0, values.shape[1] - 1)
        return values[rows, columns]

    def cut(self, threshold: float, rows: slice, columns: slice) -> tuple[Tissue, NDArray[np.float64]]:
        """Shrink the outline and cut the maps to a window; also returns how far the corner moved (y, x in µm)."""
        outline = self.outline[rows, columns] - np.float32(threshold)
        labels = np.where(outline > 0, self.labels[rows, columns], np.int8(-1)).astype(np.int8)
        offset = np.array([rows.start, columns.start]) * STEP

        def moved(places: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.column_stack([places[:, :2] - offset, places[:, 2:]])

        tissue = Tissue(
            size_um=(outline.shape[0] * STEP, outline.shape[1] * STEP),
            outline=outline,
            labels=labels,
            maps={name: values[rows, columns] for name, values in self.maps.items()},
            glands=moved(self.glands),
            vessels=moved(self.vessels),
            follicles=moved(self.follicles),
            fat=moved(self.fat),
        )
        return tissue, offset


@dataclass(frozen=True)
class Cells:
    """Cells of a section: position (y, x in µm), type, RNA content and direction of the nucleus (radians)."""

    yx_um: NDArray[np.float64]
    kind: NDArray[np.int8]
    size: Array
    angle: Array

    def subset(self, keep: NDArray[Any]) -> Cells:
        """Return some of the cells."""
        return Cells(self.yx_um[keep], self.kind[keep], self.size[keep], self.angle[keep])


def smooth_map(rng: np.random.Generator, shape: tuple[int, int], length_um: float, step: float = STEP) -> Array:
    """Gaussian random field with unit variance and the given correlation length."""
    coarse = max(step, length_um / 4)
    small = [max(8, int(np.ceil(n * step / coarse)) + 16) for n in shape]
    noise = ndimage.gaussian_filter(rng.standard_normal(small, dtype=np.float32), length_um / coarse)
    noise /= max(float(noise.std()), 1e-6)
    box = (8, 8, 8 + shape[1] * step / coarse, 8 + shape[0] * step / coarse)
    box = (8, 8, min(box[2], small[1]), min(box[3], small[0]))
    picture = Image.fromarray(noise).resize((shape[1], shape[0]), Image.Resampling.BICUBIC, box=box)
    return np.asarray(picture, dtype=np.float32)


def hex_points(
    rng: np.random.Generator, size_um: tuple[float, float], density: float, jitter: float
) -> NDArray[np.float64]:
    """Jittered hexagonal points (y, x) over a rectangle; ``density`` per mm², ``jitter`` in units of the spacing."""
    pitch = 1000.0 * np.sqrt(2.0 / (np.sqrt(3.0) * density))
    rows = np.arange(0, size_um[0], pitch * np.sqrt(3) / 2)
    columns = np.arange(0, size_um[1], pitch)
    y, x = np.meshgrid(rows, columns, indexing="ij")
    x = x + pitch / 2 * (np.arange(len(rows))[:, None] % 2)
    points = np.stack([y.ravel(), x.ravel()], axis=1)
    points += rng.normal(0.0, jitter * pitch, points.shape)
    return points[((points >= 0) & (points < size_um)).all(axis=1)]


def outline_map(rng: np.random.Generator, size_um: tuple[float, float], radius_um: float) -> Array:
    """Map that falls from 1 in the middle through 0 near the border of a lobed, ragged section."""
    shape = (int(np.ceil(size_um[0] / STEP)), int(np.ceil(size_um[1] / STEP)))
    y = ((np.arange(shape[0]) + 0.5) * STEP - size_um[0] / 2)[:, None]
    x = ((np.arange(shape[1]) + 0.5) * STEP - size_um[1] / 2)[None, :]
    theta = np.arctan2(y, x)
    lobes = sum(rng.normal(0, 0.07 / k**0.5) * np.cos(k * theta + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4, 5))
    ragged = 0.05 * smooth_map(rng, shape, max(60.0, 0.06 * radius_um)) + 0.012 * smooth_map(rng, shape, 22.0)
    return np.asarray(1.0 - np.hypot(y, x) / (radius_um * (1.0 + lobes)) + ragged, dtype=np.float32)


def _top(values: Array, inside: NDArray[np.bool_], share: float) -> NDArray[np.bool_]:
    """Return the ``share`` of ``inside`` where ``values`` are largest."""
    if not inside.any():
        return inside
    return inside & (values > np.quantile(values[inside], 1.0 - share))


def lay_out(rng: np.random.Generator, size_um: tuple[float, float], outline: Array) -> Tissue:
    """Divide the inside of an outline into domains and place glands, vessels and follicles."""
    shape = (outline.shape[0], outline.shape[1])
    inside = outline > 0
    across = np.sqrt(max(inside.sum(), 1)) * STEP
    length = float(np.clip(0.13 * across, 110.0, 700.0))
    share = {name: float(rng.uniform(0.85, 1.15)) for name in ("tumor", "hypoxic", "adipose", "glands", "sclerosis")}
    labels = np.full(shape, -1, dtype=np.int8)
    labels[inside] = STROMA
    tumor_map = smooth_map(rng, shape, length) + 0.6 * outline
    tumor = _top(tumor_map, inside, 0.40 * share["tumor"])
    hypoxia = 0.7 * smooth_map(rng, shape, 0.8 * length) + tumor_map
    rest = inside & ~tumor
    adipose = _top(smooth_map(rng, shape, length) - 2.0 * outline, rest, 0.22 * share["adipose"])
    rest &= ~adipose
    glands = _top(smooth_map(rng, shape, 0.9 * length), rest, 0.34 * share["glands"])
    rest &= ~glands
    sclerosis = _top(smooth_map(rng, shape, 0.8 * length), rest, 0.45 * share["sclerosis"])
    labels[tumor] = TUMOR
    labels[_top(hypoxia, tumor, 0.42 * share["hypoxic"])] = HYPOXIC
    labels[adipose], labels[glands], labels[sclerosis] = ADIPOSE, GLANDS, SCLEROSIS
    follicles = _place_follicles(rng, labels, tumor)
    y = ((np.arange(shape[0]) + 0.5) * STEP)[:, None]
    x = ((np.arange(shape[1]) + 0.5) * STEP)[None, :]
    wobble = 1.0 + 0.18 * smooth_map(rng, shape, 90.0)
    for fy, fx, radius in follicles:
        labels[inside & (np.hypot(y - fy, x - fx) < radius * wobble)] = LYMPHOID
    maps = {
        "nest": smooth_map(rng, shape, 38.0),
        "fibre": smooth_map(rng, shape, 170.0) + 0.25 * smooth_map(rng, shape, 60.0),
        "infiltration": smooth_map(rng, shape, length),
        "hypoxia": np.where(labels == HYPOXIC, 1.3, -0.2).astype(np.float32),
        "interferon": smooth_map(rng, shape, 1.2 * length),
        "stress": smooth_map(rng, shape, 1.2 * length),
        "cycle": np.where(tumor, 0.8, -0.3).astype(np.float32) + 0.5 * smooth_map(rng, shape, 0.8 * length),
    }
    maps["hypoxia"] = ndimage.gaussian_filter(maps["hypoxia"], 30.0 / STEP) + 0.2 * smooth_map(rng, shape, length)
    fat = hex_points(rng, size_um, 260.0, 0.2)
    bare = Tissue(size_um, outline, labels, maps, np.zeros((0, 5)), np.zeros((0, 3)), follicles, fat)
    return replace(bare, glands=_place_glands(rng, bare), vessels=_place_vessels(rng, bare))


def _place_follicles(
    rng: np.random.Generator, labels: NDArray[np.int8], tumor: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Lymphoid aggregates at the border of the tumour, about a tenth of the tissue."""
    near = ndimage.binary_dilation(tumor, iterations=max(1, int(120 / STEP))) & (
        (labels == STROMA) | (labels == SCLEROSIS)
    )
    if not near.any():
        near = labels >= 0
    if not near.any():
        return np.zeros((0, 3))
    area = float((labels >= 0).sum()) * STEP**2
    radius = float(np.clip(0.085 * np.sqrt(area), 60.0, 300.0))
    count = max(1, round(0.10 * area / (np.pi * radius**2)))
    spots = np.argwhere(near) * STEP
    chosen: list[NDArray[Any]] = []
    for place in spots[rng.permutation(len(spots))[:500]]:
        if len(chosen) < count and all(np.hypot(*(place - other[:2])) > 2.4 * radius for other in chosen):
            chosen.append(np.array([*place, radius * rng.uniform(0.7, 1.25)]))
    return np.array(chosen)


def _place_glands(rng: np.random.Generator, tissue: Tissue) -> NDArray[np.float64]:
    points = hex_points(rng, tissue.size_um, 78.0, 0.06)
    points = points[tissue.at(ndimage.binary_erosion(tissue.labels == GLANDS, iterations=3), points)]
    n = len(points)
    return np.column_stack(
        [points, rng.uniform(32.0, 54.0, n), rng.uniform(0, 2 * np.pi, n), rng.uniform(15.0, 21.0, n)]
    )


def _place_vessels(rng: np.random.Generator, tissue: Tissue) -> NDArray[np.float64]:
    points = hex_points(rng, tissue.size_um, 14.0, 0.3)
    points = points[np.isin(tissue.at(tissue.labels, points), [STROMA, SCLEROSIS])]
    return np.column_stack([points, rng.gamma(4.0, 4.0, len(points)).clip(7.0, 34.0)])


def gland_radius(phase: NDArray[Any] | float, theta: NDArray[Any]) -> NDArray[Any]:
    """Shape of a gland: relative radius in every direction."""
    lobes = 0.14 * np.cos(2 * theta + phase) + 0.07 * np.cos(3 * theta + 2 * phase) + 0.03 * np.cos(5 * theta)
    return np.asarray(1.0 + lobes)


def in_glands(tissue: Tissue, yx_um: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether positions lie inside a gland."""
    if len(tissue.glands) == 0 or len(yx_um) == 0:
        return np.zeros(len(yx_um), dtype=bool)
    distance, nearest = cKDTree(tissue.glands[:, :2]).query(yx_um, distance_upper_bound=90.0)
    found = np.isfinite(distance)
    gland = tissue.glands[np.where(found, nearest, 0)]
    offset = yx_um - gland[:, :2]
    radius = gland[:, 2] * gland_radius(gland[:, 3], np.arctan2(offset[:, 0], offset[:, 1]))
    return np.asarray(found & (distance < radius + 3.0))


def place_cells(rng: np.random.Generator, tissue: Tissue) -> Cells:
    """Fill every domain with cells of its kinds: packed in nests, along fibres, in rings around lumens."""
    parts = [_gland_cells(rng, tissue)]
    gy, gx = np.gradient(ndimage.gaussian_filter(tissue.maps["fibre"], 1.0))
    along = np.arctan2(-gx, gy).astype(np.float32)  # along the fibres: across the gradient of their phase
    for domain, density in enumerate(DENSITY):
        points = hex_points(rng, tissue.size_um, density / 0.82, 0.17)
        points = points[tissue.at(tissue.labels, points) == domain]
        points = points[rng.random(len(points)) < 0.82]
        if domain == GLANDS:
            points = points[~in_glands(tissue, points)]
        kind = _kinds(rng, tissue, domain, points)
        spindle = np.isin(kind, [CELL_TYPES.index(name) for name in ("fibroblast", "smooth muscle", "endothelium")])
        angle = np.where(
            spindle, tissue.at(along, points) + rng.normal(0, 0.25, len(points)), rng.uniform(0, np.pi, len(points))
        )
        if domain == ADIPOSE:
            points, angle = _to_membranes(tissue, points)
        parts.append((points, kind, angle))
    points, kind, angle = (np.concatenate([part[i] for part in parts]) for i in range(3))
    size = rng.lognormal(0.0, 0.35, len(points)).astype(np.float32)
    return Cells(points, kind.astype(np.int8), size, angle.astype(np.float32))


def _to_membranes(tissue: Tissue, points: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Move nuclei to the membrane between the two nearest fat cells, and lay them along it."""
    if len(points) == 0 or len(tissue.fat) < 2:
        return points, np.zeros(len(points))
    distance, nearest = (np.asarray(part) for part in cKDTree(tissue.fat).query(points, k=2))
    across = tissue.fat[nearest[:, 1]] - tissue.fat[nearest[:, 0]]
    length = np.maximum(np.hypot(across[:, 0], across[:, 1]), 1e-9)
    step = (distance[:, 1] ** 2 - distance[:, 0] ** 2) / (2 * length**2)
    return points + step[:, None] * across, np.arctan2(-across[:, 1], across[:, 0])


def _kinds(rng: np.random.Generator, tissue: Tissue, domain: int, points: NDArray[np.float64]) -> NDArray[np.int64]:
    """Draw a cell type for every position of a domain."""
    if domain in (TUMOR, HYPOXIC):
        nest = tissue.at(tissue.maps["nest"], points)
        shares = np.where((nest > -1.0)[:, None], mixture("nest"), mixture("septum"))
    else:
        names = {LYMPHOID: "lymphoid", ADIPOSE: "adipose"}
        shares = np.tile(mixture(names.get(domain, "stroma")), (len(points), 1))
    immune = [CELL_TYPES.index(name) for name in ("T cell", "B cell", "macrophage")]
    shares[:, immune] *= np.exp(0.8 * tissue.at(tissue.maps["infiltration"], points))[:, None]
    if domain == LYMPHOID and len(tissue.follicles):
        away = np.hypot(*(points[:, None] - tissue.follicles[None, :, :2]).transpose(2, 0, 1)) / tissue.follicles[:, 2]
        deep = away.min(axis=1) < 0.55  # B cells in the middle of a follicle, T cells around them
        shares[deep, CELL_TYPES.index("B cell")] *= 4.0
        shares[~deep, CELL_TYPES.index("B cell")] *= 0.35
    total = shares.cumsum(axis=1)
    return np.asarray((rng.random(len(points))[:, None] * total[:, -1:] > total).sum(axis=1), dtype=np.int64)


def _gland_cells(rng: np.random.Generator, tissue: Tissue) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Columnar cells around the lumens, nuclei at their base and pointing to the middle."""
    places, angles = [], []
    for y, x, radius, phase, thick in tissue.glands:
        for depth, gap in ((7.0, 6.6), (7.0 + 0.5 * thick, 11.0)):
            ring = radius - depth
            n = max(5, int(2 * np.pi * ring / gap))
            theta = np.linspace(0, 2 * np.pi, n, endpoint=False) + rng.normal(0, 0.12 * gap / radius, n)
            reach = radius * gland_radius(phase, theta) - depth + rng.normal(0, 1.3, n)
            places.append(np.column_stack([y + reach * np.sin(theta), x + reach * np.cos(theta)]))
            angles.append(theta + rng.normal(0, 0.2, n))
    if not places:
        return np.zeros((0, 2)), np.zeros(0, dtype=np.int64), np.zeros(0)
    points, angle = np.concatenate(places), np.concatenate(angles)
    keep = tissue.at(tissue.outline, points) > 0
    kind = np.full(int(keep.sum()), CELL_TYPES.index("epithelium"))
    return points[keep], kind, angle[keep]
