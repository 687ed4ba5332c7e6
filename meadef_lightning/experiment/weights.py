"""A stage's weights: where they lie, and how they come back into a model without unpickling anything but tensors."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.experiment.spec import Model
from meadef_lightning.victims.classifier import Classifier
from meadef_lightning.victims.encoder import Encoder

MODEL = Path("checkpoints") / "model.ckpt"
"""Where the weights are in a stage's directory."""
AnyModel = TypeVar("AnyModel", Classifier, Encoder, Model)
AnyModule = TypeVar("AnyModule", bound=nn.Module)


def read_weights(model: AnyModule, checkpoint: Path) -> AnyModule:
    """Loads a checkpoint's weights into a built module, without unpickling anything but tensors.

    Args:
        model: The module.
        checkpoint: A Lightning checkpoint, or a bare state dict.

    Returns:
        The module in eval mode.

    Raises:
        MisconfigurationException: If the file is missing, damaged, unsafe, or of another architecture.
    """
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise MisconfigurationException(
            f"There is no checkpoint {checkpoint}; check the path, or delete its stage's directory to run it again."
        ) from error
    except Exception as error:  # torch raises many types for a broken or unsafe file
        raise MisconfigurationException(
            f"{checkpoint} is not a checkpoint that can be read safely ({type(error).__name__}): it is damaged, or holds more than "
            "weights. Delete its stage's directory to run it again, or ask for the state_dict alone."
        ) from error
    weights = content.get("state_dict", content) if isinstance(content, dict) else content
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise MisconfigurationException(
            f"The weights in {checkpoint} do not fit the model of its configuration: {str(error)[:500]}"
        ) from error
    return model.eval()


def build_network(model: Model, data: SplitDataModule) -> None:
    """Builds the network of a classifier or an encoder for the data."""
    if isinstance(model, Encoder):
        model.build_network(data.image_shape[0])
    else:
        model.build_network(data.num_classes, data.image_shape[0])


def load_weights(model: AnyModel, data: SplitDataModule, checkpoint: Path) -> AnyModel:
    """Builds a model's network for the data and loads its weights; see :func:`read_weights`."""
    build_network(model, data)
    read_weights(model, checkpoint)
    return model
