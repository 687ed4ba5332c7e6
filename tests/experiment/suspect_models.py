"""Models that stand for suspects, and what makes files of them."""

import json
import warnings

import pytest
import torch
import yaml
from torch import nn

from meadef_lightning.cli import main
from meadef_lightning.data import DigitsDataModule
from meadef_lightning.victims import SupervisedVictim
from meadef_lightning.victims.networks import DigitsCNN
from meadef_lightning.watermark import WatermarkKey

KEY = WatermarkKey.draw(10, "test")
DATA = DigitsDataModule()
DATA.prepare_data()
DATA.setup("predict")
SMALL = ["--data", "DigitsDataModule"]
for option, number in {"samples": 30, "decoys": 19, "decoy_samples": 2}.items():
    SMALL += [f"--verification.{option}", str(number)]


X = DATA.tensors("test")[0][:7]


class Theirs(nn.Module):
    """Colour images of 8x8 pixels in 0..255 to ten scores, and something else beside."""

    def __init__(self, several=False):
        super().__init__()
        self.linear, self.several = nn.Linear(192, 10), several

    def forward(self, x):
        scores = self.linear(x.flatten(1) / 255)
        return (scores.abs(), scores) if self.several else scores


def make_stage(folder):
    """A directory as a run leaves it, and the model in it."""
    (folder / "checkpoints").mkdir()
    init = {"network": {"class_path": "meadef_lightning.victims.networks.DigitsCNN"}}
    model_section = {"class_path": "meadef_lightning.victims.SupervisedVictim", "init_args": init}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": model_section}))
    model = SupervisedVictim(DigitsCNN, num_classes=10, in_channels=1)
    model.configure_model()
    torch.save({"state_dict": model.state_dict()}, folder / "checkpoints" / "model.ckpt")
    return folder, model.eval()


def export(model, path, shape=(1, 16, 16), batch=2, dynamic=True, outputs=("scores",)):
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package, reason="needs the extra onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter that needs no further package, and is deprecated
        torch.onnx.export(
            model.eval(), (torch.zeros(batch, *shape),), path, dynamo=False, input_names=["images"],
            output_names=list(outputs), dynamic_axes={"images": {0: "n"}} if dynamic else None,
        )  # fmt: skip
    return path


def verify(tmp_path, key_file, suspect, *more):
    (tmp_path / "verdict" / "evidence.json").unlink(missing_ok=True)  # of another command it is not overwritten
    main(["verify", "--key", key_file, "--suspect", str(suspect), *SMALL, "--output", str(tmp_path / "verdict"), *more])
    return json.loads((tmp_path / "verdict" / "verdict.json").read_text())


def described(tmp_path, **sections):
    path = tmp_path / "suspect.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path
