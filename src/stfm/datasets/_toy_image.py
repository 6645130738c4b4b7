"""Picture of a toy tissue: optical densities of haematoxylin and eosin, mixed into RGB as light passes through them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from scipy.spatial import cKDTree

from stfm.datasets._toy_tissue import (
    ADIPOSE,
    CELL_TYPES,
    GLANDS,
    HYPOXIC,
    LYMPHOID,
    SCLEROSIS,
    STEP,
    STROMA,
    TUMOR,
    Array,
    Cells,
    Tissue,
    gland_radius,
    smooth_map,
)

#: side of a pixel of the maps of lumens, fat cells and vessels, in µm
FINE = 2.0
_STRIP = 128
#: the grain of cytoplasm is kept in bytes, this many steps a standard deviation
_GRAIN = 36.0
_ANGLES = 16
_VARIANTS = 3

#: cell type -> half axes of the nucleus (µm), optical density, share of chromatin at the rim, nucleoli
NUCLEI: dict[str, tuple[float, float, float, float, int]] = {
    "tumor": (5.6, 4.4, 0.78, 0.35, 2),
    "epithelium": (5.0, 3.0, 0.95, 0.15, 0),
    "fibroblast": (7.2, 1.7, 0.90, 0.05, 0),
    "endothelium": (5.2, 1.6, 0.95, 0.05, 0),
    "smooth muscle": (8.2, 1.9, 0.80, 0.05, 0),
    "T cell": (3.1, 2.9, 1.30, 0.10, 0),
    "B cell": (3.5, 3.3, 1.22, 0.15, 0),
    "plasma cell": (3.8, 3.4, 1.15, 0.30, 0),
    "macrophage": (4.6, 3.2, 0.72, 0.15, 1),
    "adipocyte": (4.6, 1.3, 1.05, 0.00, 0),
}


@dataclass(frozen=True)
class Stain:
    """Colours of one slide: optical density (RGB) of a unit of each stain, strengths, and the lamp."""

    haematoxylin: NDArray[np.float32]
    eosin: NDArray[np.float32]
    blood: NDArray[np.float32]
    strength: tuple[float, float]
    lamp: NDArray[np.float32]


def make_stain(rng: np.random.Generator, shift: float) -> Stain:
    """Colours of a laboratory; ``shift`` scales how far from the usual ones."""

    def around(vector: list[float]) -> NDArray[np.float32]:
        return (np.array(vector) * np.exp(shift * rng.normal(0, 0.10, 3))).astype(np.float32)

    return Stain(
        haematoxylin=around([0.66, 0.76, 0.33]),
        eosin=around([0.10, 0.58, 0.26]),
        blood=around([0.12, 0.72, 0.62]),
        strength=(float(np.exp(shift * rng.normal(0, 0.14))), float(np.exp(shift * rng.normal(0, 0.14)))),
        lamp=(np.array([244, 241, 245]) + shift * rng.normal(0, 2.0, 3)).clip(225, 252).astype(np.float32),
    )


def vary_stain(rng: np.random.Generator, stain: Stain, shift: float) -> Stain:
    """Return the same laboratory on another day: strengths a little off."""
    haematoxylin, eosin = (s * float(np.exp(shift * rng.normal(0, 0.05))) for s in stain.strength)
    return Stain(stain.haematoxylin, stain.eosin, stain.blood, (haematoxylin, eosin), stain.lamp)


def _smoothstep(values: NDArray[Any], low: float, high: float) -> Array:
    t: Array = np.clip((values - low) / (high - low), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


# ------------------------------------------------------------------------------------------------ nuclei


def _stamp(rng: np.random.Generator, kind: str, angle: float, scale: float, mpp: float) -> Array:
    """Optical density of one nucleus seen from above."""
    major, minor, density, rim, nucleoli = NUCLEI[kind]
    major, minor = major * scale / mpp, minor * scale / mpp
    half = int(np.ceil(max(major, minor) * 1.25 + 1.5))
    y, x = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32)
    y += np.float32(rng.uniform(-0.4, 0.4))
    x += np.float32(rng.uniform(-0.4, 0.4))
    u = x * np.cos(angle) + y * np.sin(angle)
    v = -x * np.sin(angle) + y * np.cos(angle)
    theta = np.arctan2(v, u)
    bumps = 1.0 + 0.07 * np.cos(2 * theta + rng.uniform(0, 6.3)) + 0.06 * np.cos(3 * theta + rng.uniform(0, 6.3))
    rho = np.hypot(u / major, v / minor) / bumps
    edge = 0.9 / max(minor, 1.0)
    body = 1.0 - _smoothstep(rho.astype(np.float32), 1.0 - 0.5 * edge, 1.0 + 0.6 * edge)
    speckle = ndimage.gaussian_filter(rng.standard_normal(rho.shape).astype(np.float32), 0.9 / mpp)
    speckle /= max(float(speckle.std()), 1e-6)
    chromatin = 1.0 - rim + 1.3 * rim * np.clip(rho, 0, 1) ** 4 + 0.13 * speckle
    for _ in range(nucleoli):
        cu, cv = rng.uniform(-0.45, 0.45, 2)
        spot = np.exp(-((u / major - cu) ** 2 * major**2 + (v / minor - cv) ** 2 * minor**2) / (1.0 / mpp) ** 2)
        chromatin = chromatin + 0.5 * spot
    return np.asarray(density * body * np.clip(chromatin, 0.2, 2.0), dtype=np.float32)


class _Nuclei:
    """Haematoxylin of all nuclei; overlapping ones add up, as light absorption does. Drawn some rows at a time."""

    def __init__(self, rng: np.random.Generator, cells: Cells, shape: tuple[int, int], mpp: float) -> None:
        self._pad = int(np.ceil(18 / mpp)) + 3
        self._width = shape[1] + 2 * self._pad
        centre = np.rint(cells.yx_um / mpp).astype(np.int64) + self._pad
        turn = np.floor((cells.angle % np.pi) / np.pi * _ANGLES).astype(np.int64) % _ANGLES
        variant = rng.integers(0, _VARIANTS, len(turn))
        group = (cells.kind.astype(np.int64) * _ANGLES + turn) * _VARIANTS + variant
        depth = rng.uniform(0.72, 1.12, len(turn)).astype(np.float32)  # how deep in the section a nucleus lies
        inside = ((centre >= self._pad) & (centre < np.array(shape) + self._pad)).all(axis=1)
        order = np.flatnonzero(inside)[np.lexsort((centre[inside, 0], group[inside]))]
        self._centre, self._group, self._depth = centre[order], group[order], depth[order]
        self._stamps = {int(index): self._draw(rng, int(index), mpp) for index in np.unique(self._group)}

    @staticmethod
    def _draw(rng: np.random.Generator, index: int, mpp: float) -> Array:
        kind = CELL_TYPES[index // (_ANGLES * _VARIANTS)]
        angle = (index // _VARIANTS) % _ANGLES * np.pi / _ANGLES
        return _stamp(rng, kind, angle, float(np.exp(rng.normal(0, 0.17 if kind == "tumor" else 0.09))), mpp)

    def rows(self, top: int, bottom: int) -> Array:
        """Return rows ``top`` to ``bottom`` of the picture."""
        plane = np.zeros((bottom - top + 2 * self._pad, self._width), dtype=np.float32)
        flat = plane.reshape(-1)
        near = np.flatnonzero((self._centre[:, 0] >= top) & (self._centre[:, 0] < bottom + 2 * self._pad))
        for members in np.split(near, np.flatnonzero(np.diff(self._group[near])) + 1):
            if len(members) == 0:
                continue
            stamp = self._stamps[int(self._group[members[0]])]
            half = stamp.shape[0] // 2
            row = self._centre[members, 0] - top
            members = members[(row >= half) & (row < plane.shape[0] - half)]
            window = (np.arange(-half, half + 1)[:, None] * self._width + np.arange(-half, half + 1)).ravel()
            base = (self._centre[members, 0] - top) * self._width + self._centre[members, 1]
            np.add.at(flat, (base[:, None] + window).ravel(), (self._depth[members, None] * stamp.ravel()).ravel())
        return plane[self._pad : -self._pad, self._pad : -self._pad]


# ------------------------------------------------------------------------------- lumens, fat cells and vessels


def _patch(maps: dict[str, Array], y: float, x: float, reach: float) -> tuple[tuple[slice, slice], Array, Array]:
    """Window of the fine maps around a centre, with offsets in µm."""
    height, width = maps["clear"].shape
    rows = slice(max(0, int((y - reach) / FINE)), min(height, int((y + reach) / FINE) + 1))
    columns = slice(max(0, int((x - reach) / FINE)), min(width, int((x + reach) / FINE) + 1))
    dy = ((np.arange(rows.start, rows.stop) + 0.5) * FINE - y)[:, None].astype(np.float32)
    dx = ((np.arange(columns.start, columns.stop) + 0.5) * FINE - x)[None, :].astype(np.float32)
    return (rows, columns), dy, dx


def _draw_glands(rng: np.random.Generator, tissue: Tissue, maps: dict[str, Array]) -> None:
    for y, x, radius, phase, thick in tissue.glands:
        window, dy, dx = _patch(maps, y, x, 1.4 * radius)
        distance = np.hypot(dy, dx)
        reach = radius * gland_radius(phase, np.arctan2(dy, dx))
        body = 1.0 - _smoothstep(distance - reach, -1.5, 1.5)
        brush = 2.5 * rng.standard_normal(distance.shape).astype(np.float32)
        lumen = 1.0 - _smoothstep(distance - (reach - thick) + ndimage.gaussian_filter(brush, 1.2), -2.0, 2.0)
        maps["epithelium"][window] = np.maximum(maps["epithelium"][window], body * (1 - lumen))
        secretion = rng.choice([0.0, 0.0, 0.25, 0.6])
        maps["clear"][window] = np.maximum(maps["clear"][window], lumen * (1.0 - secretion))
        halo = _smoothstep(distance - reach, -1.0, 1.0) * (1 - _smoothstep(distance - reach, 3.0, 7.0))
        maps["wall"][window] = np.maximum(maps["wall"][window], 0.5 * halo)


def _draw_vessels(rng: np.random.Generator, tissue: Tissue, maps: dict[str, Array]) -> None:
    for y, x, radius in tissue.vessels:
        window, dy, dx = _patch(maps, y, x, 2.2 * radius + 8)
        angle, stretch = rng.uniform(0, np.pi), rng.uniform(1.0, 1.9)
        u = (dx * np.cos(angle) + dy * np.sin(angle)) / stretch
        v = -dx * np.sin(angle) + dy * np.cos(angle)
        distance = np.hypot(u, v)
        lumen = 1.0 - _smoothstep(distance, radius - 1.5, radius + 1.0)
        wall = _smoothstep(distance, radius - 1.0, radius + 1.0)
        wall = wall * (1.0 - _smoothstep(distance, 1.3 * radius + 2, 1.3 * radius + 6))
        red = ndimage.gaussian_filter(rng.standard_normal(distance.shape).astype(np.float32), 1.6)
        red = _smoothstep(red / max(float(red.std()), 1e-6), rng.uniform(-0.5, 1.0), 1.4) * lumen
        maps["clear"][window] = np.maximum(maps["clear"][window], lumen * (1.0 - red))
        maps["blood"][window] = np.maximum(maps["blood"][window], red)
        maps["wall"][window] = np.maximum(maps["wall"][window], wall)


def _draw_fat(tissue: Tissue, maps: dict[str, Array]) -> None:
    """Fat cells: Voronoi cells with rounded corners and thin membranes."""
    rows, columns = np.nonzero(ndimage.binary_dilation(tissue.labels == ADIPOSE, iterations=2))
    if len(rows) == 0 or len(tissue.fat) < 3:
        return
    per = int(STEP / FINE)
    sub = np.arange(per)
    fine_rows = (rows[:, None, None] * per + sub[None, :, None]).repeat(per, axis=2).ravel()
    fine_columns = (columns[:, None, None] * per + sub[None, None, :]).repeat(per, axis=1).ravel()
    keep = (fine_rows < maps["fat"].shape[0]) & (fine_columns < maps["fat"].shape[1])
    fine_rows, fine_columns = fine_rows[keep], fine_columns[keep]
    places = (np.column_stack([fine_rows, fine_columns]) + 0.5) * FINE
    distance = np.asarray(cKDTree(tissue.fat).query(places, k=3)[0])
    to_edge = (distance[:, 1] - distance[:, 0]) / 2 - np.exp(-(distance[:, 2] - distance[:, 1]) / 5.0) * 3.0
    maps["fat"][fine_rows, fine_columns] = _smoothstep(to_edge.astype(np.float32), 0.6, 2.2)


def fine_maps(rng: np.random.Generator, tissue: Tissue) -> dict[str, NDArray[np.uint8]]:
    """Draw lumens (``clear``), fat, gland cytoplasm, vessel walls and blood on the 2-µm grid, as bytes."""
    shape = (int(np.ceil(tissue.size_um[0] / FINE)), int(np.ceil(tissue.size_um[1] / FINE)))
    maps = {name: np.zeros(shape, dtype=np.float32) for name in ("clear", "epithelium", "wall", "blood")}
    _draw_vessels(rng, tissue, maps)
    _draw_glands(rng, tissue, maps)
    bytes_ = {name: np.rint(255 * maps.pop(name)).astype(np.uint8) for name in tuple(maps)}
    maps["fat"] = np.zeros(shape, dtype=np.float32)
    _draw_fat(tissue, maps)
    bytes_["fat"] = np.rint(255 * maps.pop("fat")).astype(np.uint8)
    grain = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), 0.9)
    grain *= _GRAIN / max(float(grain.std()), 1e-6)
    bytes_["grain"] = np.rint(grain + 128.0).clip(0, 255).astype(np.uint8)
    return bytes_


# ------------------------------------------------------------------------------------------------ the picture


def _coarse_maps(rng: np.random.Generator, tissue: Tissue) -> dict[str, Array]:
    labels = ndimage.grey_dilation(tissue.labels, size=(5, 5))  # carry the domains over the border of the tissue
    labels = np.where(tissue.labels >= 0, tissue.labels, labels)
    groups = {
        "tumor": [TUMOR, HYPOXIC], "hypoxic": [HYPOXIC], "stroma": [STROMA, GLANDS], "sclerosis": [SCLEROSIS],
        "lymphoid": [LYMPHOID], "adipose": [ADIPOSE],
    }  # fmt: skip
    maps = {
        name: ndimage.gaussian_filter(np.isin(labels, members).astype(np.float32), 1.1)
        for name, members in groups.items()
    }
    maps["loose"] = ndimage.gaussian_filter((labels == GLANDS).astype(np.float32), 1.5)
    maps["outline"] = tissue.outline
    maps["nest"], maps["fibre"] = tissue.maps["nest"], tissue.maps["fibre"]
    maps["thickness"] = 1.0 + 0.07 * smooth_map(rng, tissue.outline.shape, 700.0)
    maps["mottle"] = smooth_map(rng, tissue.outline.shape, 28.0)
    return maps


def render(rng: np.random.Generator, tissue: Tissue, cells: Cells, stain: Stain, mpp: float) -> NDArray[np.uint8]:
    """Picture of a section, uint8 ``(height, width, 3)`` at ``mpp`` µm/px, a strip at a time."""
    shape = (round(tissue.size_um[0] / mpp), round(tissue.size_um[1] / mpp))
    nuclei = _Nuclei(rng, cells, shape, mpp)
    coarse = {name: Image.fromarray(values) for name, values in _coarse_maps(rng, tissue).items()}
    fine = {name: Image.fromarray(values) for name, values in fine_maps(rng, tissue).items()}
    radius = float(np.sqrt(max((tissue.labels >= 0).sum(), 1) / np.pi)) * STEP
    image = np.empty((*shape, 3), dtype=np.uint8)
    for top in range(0, shape[0], _STRIP):
        bottom = min(shape[0], top + _STRIP)
        maps = {name: _enlarge(picture, STEP, mpp, top, bottom, shape[1]) for name, picture in coarse.items()}
        for name, picture in fine.items():
            values = _enlarge(picture, FINE, mpp, top, bottom, shape[1]).astype(np.float32)
            maps[name] = (values - 128.0) / np.float32(_GRAIN) if name == "grain" else values / np.float32(255.0)
        noise = rng.standard_normal((bottom - top, shape[1]), dtype=np.float32)
        image[top:bottom] = _strip(maps, nuclei.rows(top, bottom), noise, stain, radius)
    return image


def _enlarge(picture: Image.Image, step: float, mpp: float, top: int, bottom: int, width: int) -> NDArray[Any]:
    scale = mpp / step
    box = (0.0, top * scale, min(width * scale, picture.width), min(bottom * scale, picture.height))
    return np.asarray(picture.resize((width, bottom - top), Image.Resampling.BILINEAR, box=box))


def _strip(maps: dict[str, Array], nuclei: Array, noise: Array, stain: Stain, radius: float) -> NDArray[np.uint8]:
    """Mix the optical densities of some rows of the picture."""
    haematoxylin, eosin, clear = _densities(maps)
    inside = _smoothstep(maps["outline"] * radius + 2.0 * maps["grain"], -3.0, 3.0)
    present = inside * (1.0 - clear)
    nuclear = nuclei * inside
    covered = np.exp(-1.2 * nuclear)  # little eosin shows through a nucleus
    eosin *= present * covered * maps["thickness"] * stain.strength[1]
    haematoxylin = (haematoxylin * present + nuclear) * maps["thickness"] * stain.strength[0]
    haematoxylin = 1.9 * np.tanh(haematoxylin / 1.9)
    blood = maps["blood"] * inside
    rgb = np.empty((*noise.shape, 3), dtype=np.uint8)
    for channel in range(3):
        depth = haematoxylin * stain.haematoxylin[channel]
        depth += eosin * stain.eosin[channel]
        depth += blood * stain.blood[channel]
        light = stain.lamp[channel] * np.exp(-depth) + 1.3 * noise
        rgb[..., channel] = np.clip(light, 0, 255)
    return rgb


def _densities(maps: dict[str, Array]) -> tuple[Array, Array, Array]:
    """Haematoxylin, eosin and clearness of everything but nuclei."""
    grain, mottle = maps["grain"], maps["mottle"]
    waves = np.sin(15.0 * maps["fibre"] + 0.5 * grain + 0.6 * mottle)
    fine_waves = np.sin(41.0 * maps["fibre"] + 0.7 * grain)
    septum = 1.0 - _smoothstep(maps["nest"], -1.15, -0.85)
    nest = maps["tumor"] * (1.0 - septum)
    fibrous = maps["stroma"] + maps["tumor"] * septum
    eosin = fibrous * (0.62 + 0.20 * waves + 0.14 * fine_waves - 0.16 * maps["loose"])
    eosin += maps["sclerosis"] * (0.98 + 0.09 * np.sin(6.0 * maps["fibre"] + 0.4 * mottle) + 0.04 * grain)
    eosin += nest * (0.50 + 0.09 * grain + 0.06 * mottle) + 0.10 * nest * maps["hypoxic"]
    eosin += maps["lymphoid"] * (0.34 + 0.08 * grain)
    eosin += maps["adipose"] * 0.62
    haematoxylin = nest * (0.20 + 0.05 * grain) + maps["lymphoid"] * (0.25 + 0.06 * grain) + 0.05 * fibrous
    haematoxylin += 0.03 * maps["sclerosis"]
    epithelium = maps["epithelium"]
    eosin = eosin * (1.0 - epithelium) + epithelium * (0.66 + 0.08 * grain)
    haematoxylin = haematoxylin * (1.0 - epithelium) + epithelium * (0.17 + 0.04 * grain)
    eosin = eosin + 0.35 * maps["wall"]
    crack = _smoothstep(-(0.72 * waves + 0.28 * fine_waves) + 0.22 * mottle, 0.86, 1.12) * fibrous
    fat = maps["fat"] * _smoothstep(maps["adipose"], 0.35, 0.6)
    clear = np.maximum(
        np.maximum(maps["clear"], fat), 0.85 * crack * (1.0 - epithelium) * (1.0 - np.clip(maps["wall"], 0, 1))
    )
    return haematoxylin, np.maximum(eosin, 0.0), clear
