"""Optional packages, asked for by the extra that brings them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from stfm._errors import MissingDependencyError

#: extra of pyproject.toml -> what it is for, and modules that show that it is there
EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "spatial": ("SpatialData and squidpy", ("spatialdata", "squidpy")),
    "wsi": ("whole-slide images and compressed TIFF", ("tifffile", "imagecodecs", "openslide")),
    "encoders": ("image encoders timm:<any model>", ("timm", "transformers")),
    "hub": ("weights from and to the Hugging Face hub", ("huggingface_hub",)),
    "lora": ("low-rank fine-tuning", ("peft",)),
    "leiden": ("Leiden clustering", ("igraph", "leidenalg")),
    "outcome": ("survival and response", ("lifelines", "torchsurv")),
    "attribution": ("integrated gradients", ("captum",)),
    "integrate": ("batch integration", ("harmonypy", "scib_metrics")),
    "scale": ("clusters", ("distributed",)),
}


def require(module: str, *, extra: str) -> Any:
    """Import an optional module, or say in one line how to install it.

    A package that is installed but broken (another error than ``ImportError`` at import) is reported
    as such: telling the user to install it again would not help.
    """
    try:
        return import_module(module)
    except ImportError as error:
        msg = f"{module} is not installed; it is needed here. Install it with: pip install 'stfm[{extra}]'"
        raise MissingDependencyError(msg) from error
    except (RuntimeError, OSError, AttributeError) as error:
        msg = f"{module} is installed but cannot be imported ({error}). Reinstall it in a clean environment."
        raise MissingDependencyError(msg) from error
