"""The logger of stfm. Nothing is printed until the user asks for it through ``settings.verbosity``."""

from __future__ import annotations

import logging

logger = logging.getLogger("stfm")
logger.addHandler(logging.NullHandler())

#: verbosity (scanpy's numbers) -> level of the logging module
LEVELS = {0: logging.ERROR, 1: logging.WARNING, 2: logging.INFO, 3: logging.DEBUG}


def get_logger(name: str) -> logging.Logger:
    """Return a child of the logger of stfm."""
    return logger.getChild(name)


def show(verbosity: int) -> None:
    """Send the messages of stfm to stderr at a level, replacing an earlier handler of ours."""
    for handler in [h for h in logger.handlers if getattr(h, "of_stfm", False)]:
        logger.removeHandler(handler)
    handler = logging.StreamHandler()
    handler.of_stfm = True  # type: ignore[attr-defined]
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(LEVELS[verbosity])
