"""Compiled loops that cut tiles, each with a plain NumPy twin that says the same (tests compare them).

A tile is a square of an image, given by its upper left corner. Where it goes beyond the valid part of the image
(``bounds``: first row, last row + 1, first column, last column + 1, a row per tile) it is white.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

if TYPE_CHECKING:
    from numpy.typing import NDArray

WHITE = 255


@intrinsic
def _copy(typing, source, at, target, to, n):  # type: ignore[no-untyped-def]
    """Copy ``n`` bytes between flat arrays by memcpy, which a loop over short rows does not reach."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pointers = [
            builder.gep(context.make_array(signature.args[a])(context, builder, arguments[a]).data, [arguments[a + 1]])
            for a in (0, 2)
        ]
        cgutils.raw_memcpy(builder, pointers[1], pointers[0], arguments[4], 1)
        return context.get_dummy_value()

    return types.void(source, types.int64, target, types.int64, types.int64), generate


@njit(cache=True, nogil=True, inline="always")
def _fill(target, to, n, value):  # type: ignore[no-untyped-def]
    """Set ``n`` entries of a flat array."""
    for k in range(np.uint64(n)):
        target[np.uint64(to) + k] = value


@njit(cache=True, nogil=True)
def gather(image, y0, x0, out, lo, hi):  # type: ignore[no-untyped-def]
    """Copy tiles at whole pixels: ``image`` (h, w * 3) uint8, corners int64, ``out`` (m, size, size * 3) uint8."""
    size = out.shape[1]
    height, width = image.shape[0], image.shape[1] // 3
    source, target = image.reshape(-1), out.reshape(-1)
    for i in range(lo, hi):
        left = min(max(x0[i], 0), x0[i] + size)
        right = max(min(x0[i] + size, width), left)
        for r in range(size):
            y, to = y0[i] + r, (i * size + r) * size * 3
            if y < 0 or y >= height:
                _fill(target, to, size * 3, WHITE)
                continue
            _fill(target, to, (left - x0[i]) * 3, WHITE)
            _copy(source, (y * width + left) * 3, target, to + (left - x0[i]) * 3, (right - left) * 3)  # type: ignore[call-arg, unused-ignore]
            _fill(target, to + (right - x0[i]) * 3, (x0[i] + size - right) * 3, WHITE)


def gather_numpy(
    image: NDArray[np.uint8], y0: NDArray[np.int64], x0: NDArray[np.int64], size: int
) -> NDArray[np.uint8]:
    """Twin of :func:`gather` on ``(h, w, 3)``."""
    out = np.full((len(y0), size, size, 3), WHITE, np.uint8)
    height, width = image.shape[:2]
    for i, (y, x) in enumerate(zip(y0, x0, strict=True)):
        top, bottom, left, right = max(y, 0), min(y + size, height), max(x, 0), min(x + size, width)
        if top < bottom and left < right:
            out[i, top - y : bottom - y, left - x : right - x] = image[top:bottom, left:right]
    return out


@njit(cache=True, nogil=True)
def _split(source, target, plane, n, scale, shift):  # type: ignore[no-untyped-def]
    """Write the first ``n`` px of a flat image to three planes of a flat float array, normalised.

    Positions are unsigned and start at 0: without tests for negative ones the loop runs in vectors.
    """
    red, green, blue = scale[0], scale[1], scale[2]
    red_shift, green_shift, blue_shift = shift[0], shift[1], shift[2]
    p = np.uint64(plane)
    for k in range(np.uint64(n)):
        a = np.uint64(3) * k
        target[k] = np.float32(source[a]) * red + red_shift
        target[k + p] = np.float32(source[a + np.uint64(1)]) * green + green_shift
        target[k + p + p] = np.float32(source[a + np.uint64(2)]) * blue + blue_shift


@njit(cache=True, nogil=True)
def gather_float(image, y0, x0, scale, shift, out, lo, hi):  # type: ignore[no-untyped-def]
    """Copy and normalise in one pass: ``out`` (m, 3, size, size) float32 = value * scale[channel] + shift[channel]."""
    size = out.shape[2]
    plane = size * size
    tile = np.empty((1, size, size * 3), np.uint8)  # stays in the processor's cache
    source, target = tile.reshape(-1), out.reshape(-1)
    for i in range(lo, hi):
        gather(image, y0[i : i + 1], x0[i : i + 1], tile, 0, 1)
        _split(source, target[i * plane * 3 :], plane, plane, scale, shift)


@njit(cache=True, nogil=True)
def normalise(tiles, scale, shift, out, lo, hi):  # type: ignore[no-untyped-def]
    """Turn uint8 ``(m, size, size, 3)`` into float32 ``(m, 3, size, size)``: value * scale + shift, by channel."""
    plane = tiles.shape[1] * tiles.shape[2]
    source, target = tiles.reshape(-1), out.reshape(-1)
    for i in range(lo, hi):
        _split(source[i * plane * 3 :], target[i * plane * 3 :], plane, plane, scale, shift)


@njit(cache=True, nogil=True, inline="always")
def _overlap(start, stop, cell):  # type: ignore[no-untyped-def]
    """Return how much of [cell, cell + 1) lies in [start, stop)."""
    return min(stop, cell + 1.0) - max(start, float(cell))


@njit(cache=True, nogil=True)
def shrink(image, y0, x0, side, bounds, out, begin_at, end_at):  # type: ignore[no-untyped-def]
    """Average by area: each output px is the mean of the part of the image under it, split pixels by their share.

    ``image`` (h, w * 3) uint8; corners float64; ``side`` of the tiles in image px; ``out`` (m, size, size, 3) uint8.
    Rows are summed first (long contiguous runs), columns after.
    """
    size = out.shape[1]
    step = side / size
    for i in range(begin_at, end_at):
        top, bottom, left, right = bounds[i, 0], bounds[i, 1], bounds[i, 2], bounds[i, 3]
        first = int(np.floor(x0[i]))
        last = int(np.ceil(x0[i] + side))
        lo, hi = min(max(first, left), last), max(min(last, right), first)
        total = np.empty((last - first) * 3, np.float32)
        for r in range(size):
            begin, end = y0[i] + r * step, y0[i] + (r + 1) * step
            total[:] = 0.0
            white = np.float32(0.0)
            for y in range(int(np.floor(begin)), int(np.ceil(end))):
                weight = np.float32(_overlap(begin, end, y))
                if y < top or y >= bottom or hi <= lo:
                    white += weight
                    continue
                run, pixels = total[(lo - first) * 3 : (hi - first) * 3], image[y, lo * 3 : hi * 3]
                for k in range(np.uint64(len(run))):
                    run[k] += weight * np.float32(pixels[k])
            rows = np.float32(step) - white  # weight of the rows that lie in the image
            if hi > lo:
                for k in range((lo - first) * 3):
                    total[k] = WHITE * rows
                for k in range((hi - first) * 3, len(total)):
                    total[k] = WHITE * rows
                for k in range(len(total)):
                    total[k] += WHITE * white
            else:
                total[:] = WHITE * np.float32(step)
            for c in range(size):
                start, stop = x0[i] + c * step, x0[i] + (c + 1) * step
                red = green = blue = np.float32(0.0)
                for x in range(int(np.floor(start)), min(int(np.ceil(stop)), last)):
                    weight = np.float32(_overlap(start, stop, x))
                    k = (x - first) * 3
                    red += weight * total[k]
                    green += weight * total[k + 1]
                    blue += weight * total[k + 2]
                area = np.float32(step * step)
                out[i, r, c, 0] = np.uint8(min(red / area + np.float32(0.5), np.float32(255.0)))
                out[i, r, c, 1] = np.uint8(min(green / area + np.float32(0.5), np.float32(255.0)))
                out[i, r, c, 2] = np.uint8(min(blue / area + np.float32(0.5), np.float32(255.0)))


def shrink_numpy(
    image: NDArray[np.uint8], y0: NDArray[np.float64], x0: NDArray[np.float64], side: float, size: int
) -> NDArray[np.uint8]:
    """Twin of :func:`shrink` on ``(h, w, 3)``, by two weight matrices a tile."""
    out = np.empty((len(y0), size, size, 3), np.uint8)
    for i, (top, left) in enumerate(zip(y0, x0, strict=True)):
        rows, row_weights = _area_weights(top, side, size)
        cols, col_weights = _area_weights(left, side, size)
        patch = _patch(image, rows, cols)
        mean = np.einsum("ry,yxk,cx->rck", row_weights, patch, col_weights) / (side / size) ** 2
        out[i] = np.minimum(mean + 0.5, 255.0).astype(np.uint8)
    return out


def _area_weights(start: float, side: float, size: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    cells = np.arange(int(np.floor(start)), int(np.ceil(start + side)))
    edges = start + np.arange(size + 1) * (side / size)
    overlap = np.minimum(edges[1:, None], cells + 1.0) - np.maximum(edges[:-1, None], cells)
    return cells, np.clip(overlap, 0.0, None)


def _patch(image: NDArray[np.uint8], rows: NDArray[np.int64], cols: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return some rows and columns of an image, white where there are none."""
    patch = np.full((len(rows), len(cols), 3), float(WHITE))
    inside_y, inside_x = (rows >= 0) & (rows < image.shape[0]), (cols >= 0) & (cols < image.shape[1])
    patch[np.ix_(inside_y, inside_x)] = image[np.ix_(rows[inside_y], cols[inside_x])]
    return patch


@njit(cache=True, nogil=True)
def enlarge(image, y0, x0, side, bounds, out, begin_at, end_at):  # type: ignore[no-untyped-def]
    """Interpolate bilinearly between the centres of pixels; arguments as of :func:`shrink`.

    Output px whose centre lies off the image are white; up to its edge the outermost pixels are continued.
    """
    size = out.shape[1]
    step = side / size
    one = np.float32(1.0)
    column = np.empty((2, size), np.int64)  # the two columns between which a px lies; -1 off the image
    share = np.empty(size, np.float32)
    between = np.empty(image.shape[1], np.float32)  # a row of the image, interpolated between two
    for i in range(begin_at, end_at):
        top, bottom, left, right = bounds[i, 0], bounds[i, 1], bounds[i, 2], bounds[i, 3]
        begin, end = image.shape[1], 0  # columns that are looked at; none where the tile lies off the image
        for c in range(size):
            x = x0[i] + (c + 0.5) * step
            xa = int(np.floor(x - 0.5))
            share[c] = x - 0.5 - xa
            column[0, c], column[1, c] = max(xa, left), min(xa + 1, right - 1)
            if x < left or x >= right:
                column[0, c] = -1
            else:
                begin, end = min(begin, column[0, c]), max(end, column[1, c] + 1)
        for r in range(size):
            y = y0[i] + (r + 0.5) * step
            if y < top or y >= bottom:
                out[i, r] = WHITE
                continue
            ya = int(np.floor(y - 0.5))
            wy = np.float32(y - 0.5 - ya)
            upper, lower = image[max(ya, top)], image[min(ya + 1, bottom - 1)]
            for k in range(np.uint64(begin * 3), np.uint64(end * 3)):
                between[k] = upper[k] * (one - wy) + lower[k] * wy
            for c in range(size):
                a, b, wx = column[0, c] * 3, column[1, c] * 3, share[c]
                if a < 0:
                    out[i, r, c] = WHITE
                    continue
                out[i, r, c, 0] = np.uint8(between[a] * (one - wx) + between[b] * wx + np.float32(0.5))
                out[i, r, c, 1] = np.uint8(between[a + 1] * (one - wx) + between[b + 1] * wx + np.float32(0.5))
                out[i, r, c, 2] = np.uint8(between[a + 2] * (one - wx) + between[b + 2] * wx + np.float32(0.5))


def enlarge_numpy(
    image: NDArray[np.uint8], y0: NDArray[np.float64], x0: NDArray[np.float64], side: float, size: int
) -> NDArray[np.uint8]:
    """Twin of :func:`enlarge` on ``(h, w, 3)``."""
    out = np.full((len(y0), size, size, 3), WHITE, np.uint8)
    for i, (top, left) in enumerate(zip(y0, x0, strict=True)):
        y, x = (start + (np.arange(size) + 0.5) * (side / size) for start in (top, left))
        inside_y, inside_x = (y >= 0) & (y < image.shape[0]), (x >= 0) & (x < image.shape[1])
        y, x = y[inside_y] - 0.5, x[inside_x] - 0.5
        ya, xa = np.floor(y).astype(int), np.floor(x).astype(int)
        wy, wx = (y - ya)[:, None, None], (x - xa)[None, :, None]
        upper, lower = np.maximum(ya, 0), np.minimum(ya + 1, image.shape[0] - 1)
        a, b = np.maximum(xa, 0), np.minimum(xa + 1, image.shape[1] - 1)
        above = image[np.ix_(upper, a)] * (1 - wx) + image[np.ix_(upper, b)] * wx
        below = image[np.ix_(lower, a)] * (1 - wx) + image[np.ix_(lower, b)] * wx
        out[np.ix_([i], inside_y, inside_x)] = (above * (1 - wy) + below * wy + 0.5).astype(np.uint8)
    return out


@njit(cache=True, nogil=True)
def scatter(block, block_y, block_x, tiles, y0, x0, out, lo, hi):  # type: ignore[no-untyped-def]
    """Copy from one decoded block what each of some tiles wants of it.

    ``block`` (h, w * 3) lies at (block_y, block_x) of its level; ``tiles`` are positions in ``y0``, ``x0`` (corners,
    int64) and ``out`` (m, size, size * 3).
    """
    size = out.shape[1]
    height, width = block.shape[0], block.shape[1] // 3
    source, target = block.reshape(-1), out.reshape(-1)
    for j in range(lo, hi):
        i = tiles[j]
        left, right = max(x0[i], block_x), min(x0[i] + size, block_x + width)
        if right <= left:
            continue
        for y in range(max(y0[i], block_y), min(y0[i] + size, block_y + height)):
            at, to = (y - block_y) * width + left - block_x, (i * size + y - y0[i]) * size + left - x0[i]
            _copy(source, at * 3, target, to * 3, (right - left) * 3)  # type: ignore[call-arg, unused-ignore]
