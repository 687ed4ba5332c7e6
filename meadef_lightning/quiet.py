"""Keeping Lightning's advice out of the terminal where it does not apply."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps out of the terminal what Lightning says at every start of a Trainer, and advice that does not apply to short runs."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in (
            "The '.*_dataloader' does not have many workers",
            "The number of training batches .* is smaller than the logging interval",
            "Checkpoint directory .* exists and is not empty",
            "Experiment logs directory .* exists and is not empty",
            r".*isinstance\(treespec, LeafSpec\)",
            "Trainer already configured with model summary callbacks",
            "Total length of `list` across ranks is zero",
            # said of every module that trains in one of several processes
            "It is recommended to use `self.log",
            # a test with FSDP2 cannot do without
            "Using `DistributedSampler` with the dataloaders",
        ):
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
