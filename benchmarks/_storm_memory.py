"""Peak memory of the attention of STORM: forward + backward of an encoder over windows of random tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _steps import clock, wait

from stfm.inference.device import autocast
from stfm.models._storm_spatial import Shown, SpatialEncoder
from stfm.models.registry import MODELS, create
from stfm.nn.multibranch import Stack
from stfm.nn.positions import grid_centres
from stfm.slide.genes import Vocabulary

_PITCH_UM = 100.0

Forward = Callable[[], torch.Tensor]


def encoder(name: str) -> SpatialEncoder | Stack:
    """Return the encoder of a model, in training mode; what stands before and behind it is not made."""
    with torch.device("meta"):
        model = create(name, Vocabulary(np.array(["A", "B"])), pretrained=False)
    part = model.spatial if model.family == "storm" else model.encoder
    part = part.to_empty(device="cpu")
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in part.parameters():
            p.normal_(0.0, 0.02, generator=rng)
    return part.train()


def n_parameters(name: str) -> int:
    """Return the number of parameters of a model's encoder."""
    with torch.device("meta"):
        model = create(name, Vocabulary(np.array(["A", "B"])), pretrained=False)
    part = model.spatial if model.family == "storm" else model.encoder
    return sum(p.numel() for p in part.parameters())


def lattice(sites: int) -> torch.Tensor:
    """Return places of spots on a square lattice in µm, ``(1, sites, 2)``."""
    side = math.ceil(math.sqrt(sites))
    return grid_centres(side, _PITCH_UM * side)[None, :sites]


def windows(part: SpatialEncoder, config: Any, n: int, sites: int | None, device: str) -> Forward:
    """Return the forward pass over ``n`` windows of spots with a token of each modality, the bias included."""
    sites = sites or config.window_size
    rng = torch.Generator().manual_seed(0)
    xy = lattice(sites).repeat(n, 1, 1).to(device)
    tokens = {m: torch.randn(n, sites, config.width, generator=rng).to(device) for m in ("image", "gene")}
    there = torch.ones(n, sites, dtype=torch.bool, device=device)
    shown = Shown(there, there, there)
    return lambda: torch.stack(list(part(tokens, shown, part.bias(xy)).values())).square().mean()


def tiles(part: Stack, config: Any, n: int, sites: int | None, device: str) -> Forward:
    """Return the forward pass over ``n`` tiles with image patches and sites, half of them hidden, biases included."""
    rng = torch.Generator().manual_seed(0)
    centres = grid_centres(config.side, config.extent_um)[None].to(device)
    n_image, place, padding = config.side**2, None, None
    if config.expression == "bins":  # a place shows one modality
        order = torch.rand(n, n_image, generator=rng).argsort(dim=1)
        place, xy, sizes = order.to(device), centres, (n_image // 2, n_image - n_image // 2)
    else:
        sites = sites or config.n_sites
        inside = lattice(sites) * config.extent_um / (_PITCH_UM * math.ceil(math.sqrt(sites)))
        xy = torch.cat([centres, inside.to(device)], dim=1).repeat(n, 1, 1)
        sizes = (n_image, sites)
        padding = (torch.rand(n, sum(sizes), generator=rng) < config.mask_ratio).to(device)
    x = torch.randn(n, sum(sizes), config.width, generator=rng).to(device)
    return lambda: part(x, xy, experts=(0, 1), sizes=sizes, place=place, padding=padding).square().mean()


def memory(name: str, n: int, sites: int | None, device: str) -> dict[str, float]:
    """Return the MB that forward + backward over ``n`` windows adds at its peak, and its seconds.

    Weights and their gradients are there before.
    """
    spec = MODELS.get(name)
    part = encoder(name).to(device)
    made = windows if spec.family == "storm" else tiles
    once, run = (made(part, spec.config(), k, sites, device) for k in (1, n))

    def step(forward: Forward) -> None:
        with autocast(torch.device(device), "bf16" if device == "cuda" else "fp32"):
            loss = forward()
        loss.backward()

    for _ in range(2):  # kernels are loaded, gradients are there
        step(once)
    before = reset_peak(device)
    seconds = clock(lambda: step(run), device)[0]
    return {"mb": peak(device) - before, "seconds": float(seconds)}


def reset_peak(device: str) -> float:
    """Let the peak begin anew; return the MB in use."""
    if device == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5", "utf-8")
    return _status("VmRSS")


def peak(device: str) -> float:
    """Return the MB at the peak since then."""
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else _status("VmHWM")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))
