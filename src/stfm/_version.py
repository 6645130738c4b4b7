"""The version, once: read by the build, by provenance records and by ``stfm.__version__``."""

__version__ = "0.1.0"
