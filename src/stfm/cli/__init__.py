"""The ``stfm`` command: thin calls into the library, one function a command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stfm._version import __version__
from stfm.cli import _weights

app = typer.Typer(
    name="stfm",
    help="Multimodal foundation models of spatial transcriptomics.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(_weights.app, name="weights")

_Model = Annotated[str, typer.Option(help="Name of a model (st-align-small, ...).")]
_Trained = Annotated[str, typer.Option(help="Folder of a trained model, or name of weights.")]
_Library = Annotated[str | None, typer.Option(help="Column of obs that tells the libraries (sections) apart.")]
_Layer = Annotated[str | None, typer.Option(help="Layer with raw counts, if X does not hold them.")]
_Image = Annotated[Path | None, typer.Option(help="H&E image file, if the slide does not carry one.")]
_Mpp = Annotated[float | None, typer.Option(help="Micrometres per full-resolution pixel.")]
_Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn at random.")]
_Out = Annotated[Path, typer.Option(help="Where the result goes.")]
_Slides = Annotated[list[str], typer.Argument(help="Slides: .h5ad files or names such as toy, her2st:C2, mob:1.")]
_Slide = Annotated[str, typer.Argument(help="Slide: an .h5ad file or a name such as toy, her2st:C2, mob:1.")]


def _version(value: bool) -> None:  # noqa: FBT001 - typer hands the flag over by position
    if value:
        typer.echo(f"stfm {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    *,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Version.")] = False,
) -> None:
    """Multimodal foundation models of spatial transcriptomics."""


@app.command()
def demo(
    *,
    out: _Out = Path("stfm-demo"),
    dataset: Annotated[str, typer.Option(help="toy, or a real section such as her2st:C2 or mob:1.")] = "toy",
    seed: _Seed = 0,
) -> None:
    """Train, embed, find domains and predict genes on held-out tissue; save figures and a report."""
    from stfm.cli import _demo

    _demo.run(dataset, out=out, seed=seed)


@app.command()
def doctor(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for a bug report.")] = False,
) -> None:
    """Say what this machine has, what is missing, and what to do about it."""
    from stfm.cli import _doctor

    _doctor.show(as_json=as_json)


@app.command()
def train(
    slides: _Slides,
    *,
    out: _Out,
    model: _Model = "st-align-small",
    epochs: Annotated[int | None, typer.Option(help="Passes over the data; the recipe's own if not given.")] = None,
    library_key: _Library = None,
    layer: _Layer = None,
    seed: _Seed = 0,
) -> None:
    """Train a model on slides and save it as one folder."""
    from stfm.cli import _commands

    _commands.train(slides, out=out, model=model, epochs=epochs, library_key=library_key, layer=layer, seed=seed)


@app.command()
def embed(
    slide: _Slide,
    *,
    out: _Out,
    model: _Trained = "default",
    library_key: _Library = None,
    layer: _Layer = None,
    image: _Image = None,
    mpp: _Mpp = None,
) -> None:
    """Write the embedding of every spot and save the slide as .h5ad."""
    from stfm.cli import _commands

    _commands.embed(slide, model=model, out=out, library_key=library_key, layer=layer, image=image, mpp=mpp)


@app.command()
def predict(
    slide: _Slide,
    *,
    reference: Annotated[list[str], typer.Option(help="Slide with H&E and counts to learn from; may be repeated.")],
    out: _Out,
    features: Annotated[
        str, typer.Option(help="Image features: an encoder, the folder of a trained model, or weights.")
    ] = ("handcrafted"),
    gene: Annotated[list[str] | None, typer.Option(help="Gene to predict; may be repeated.")] = None,
    layer: _Layer = None,
    image: _Image = None,
    mpp: _Mpp = None,
) -> None:
    """Predict expression from the H&E image alone and save the slide as .h5ad."""
    from stfm.cli import _commands

    _commands.predict(
        slide, reference=reference, out=out, features=features, genes=gene, layer=layer, image=image, mpp=mpp
    )
