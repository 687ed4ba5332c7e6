# %% [markdown]
# # Your trainer, one line more
# A module and a Trainer that know nothing of watermarks, the one line that adds it, and what becomes of it: run
# `python experiments/examples/your_own_trainer.py`, or open it as a notebook (jupytext).

# %%
from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meadef_lightning import WatermarkCallback, WatermarkKey
from meadef_lightning.data import DigitsDataModule
from meadef_lightning.verification import Verdict, verify


# %% [markdown]
# ## 1. What you have already: any LightningModule, here a plain one
# %%
class YourModel(pl.LightningModule):
    """A small network for grey 16x16 images, written without a thought of watermarks."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(24, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(48 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy with label smoothing, which leaves room for a watermark."""
        x, y = batch
        return F.cross_entropy(self(x), y, label_smoothing=0.1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=3e-3)


# %% [markdown]
# ## 2. One line more, and 3. the judgement
# A judge asks about composites of images that nobody trained on. A model of the same kind that was trained without the key shows what composites look
# like to anybody: above it every key is compared.
# %%
def main(folder: Path = Path("runs/your_own_trainer"), epochs: int = 20) -> dict[str, Verdict]:
    """Trains a model with and one without the watermark, saves the weights, and judges both.

    Args:
        folder: Where key, weights and figure go.
        epochs: Epochs of each training.

    Returns:
        The verdicts on the two models.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = DigitsDataModule(
        batch_size=64, victim_size=900, attacker_size=400, verification_size=150, validation_size=47
    )
    key = WatermarkKey.draw(num_classes=10, secret="an example, and so no secret", beacon="7")
    key.save(folder / "watermark.key.json")  # keep it; publish key.commitment()
    models: dict[str, YourModel] = {}
    for name, callbacks in {"reference": [], "innocent": [], "yours": [WatermarkCallback(key, samples=16)]}.items():
        pl.seed_everything(len(models), verbose=False)
        models[name] = YourModel()
        trainer = pl.Trainer(
            max_epochs=epochs,
            callbacks=list(callbacks),
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(models[name], data)
        torch.save(
            models[name].state_dict(), folder / f"{name}.pt"
        )  # weights only: a full checkpoint would show source samples
    reference = verify(models["reference"], key, data, samples=150)[1]
    verdicts = {
        name: verify(models[name], key, data, samples=150, reference=reference)[0] for name in ("innocent", "yours")
    }
    draw(verdicts, folder / "verdicts.png")
    return verdicts


# %% [markdown]
# ## 4. A figure
# How often each model answers with the secret target class: for watermark samples, and for the same images combined in another way.
# %%
def draw(verdicts: dict[str, Verdict], path: Path) -> None:
    """Draws the watermark success of each model, with its interval, beside that of the matched controls."""
    from meadef_lightning.experiment.figure_style import BLUE, VERMILION, house_style, new_figure, save

    with house_style():
        figure = new_figure(4.2, 2.4)
        axes = figure.subplots()
        for place, verdict in enumerate(verdicts.values()):
            axes.barh(place - 0.18, 100 * verdict.wsr, 0.34, color=VERMILION, label="watermark samples")
            axes.plot([100 * bound for bound in verdict.wsr_ci], [place - 0.18] * 2, color="black")
            axes.barh(place + 0.18, 100 * verdict.wfpr, 0.34, color=BLUE, label="matched controls")
        axes.set(xlabel="answered with the target (%)", xlim=(0, 102), yticks=range(len(verdicts)))
        axes.set_yticklabels([f"{name}\n{verdict.verdict}" for name, verdict in verdicts.items()])
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles[:2], labels[:2], loc="outside lower center", ncols=2)
    save(figure, path)


# %%
if __name__ == "__main__":
    for name, verdict in main().items():
        print(f"{name}: {verdict.verdict}. {verdict.reason}")
