# %% [markdown]
# # How to add an attack of your own
# An attack is a `LightningDataModule` that decides what to ask. Here: mixup queries, convex mixes of pairs of the thief's images. It asks through the
# oracle, which counts and caches, and everything else (student, pipeline, verdict) is there already:
# `python experiments/examples/own_attack.py`. In an experiment YAML the same class goes under `extraction:`:
#
#     - name: mixup
#       queries: {class_path: meadef_lightning.experiments.examples.own_attack.MixupDataModule, init_args: {queries: 2000}}
#       student: {class_path: meadef_lightning.extraction.Student, init_args: {network: ...}}

# %%
from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch

from meadef_lightning import WatermarkCallback, WatermarkKey
from meadef_lightning.data import DigitsDataModule, SplitDataModule
from meadef_lightning.extraction import DistillationDataModule, ExtractionDataModule, Student, TransferSet
from meadef_lightning.extraction.base import held_out_rows
from meadef_lightning.oracle import BlackBox, Oracle
from meadef_lightning.verification import Verdict, verify
from meadef_lightning.victims import SupervisedVictim
from meadef_lightning.victims.networks import DigitsCNN


# %% [markdown]
# ## 1. The attack: say what to ask
# `collect` is called once; `self.ask` goes through the oracle in batches, with a progress bar. Interrupted attacks ask nothing twice, since the
# ledger remembers the answers.
# %%
class MixupDataModule(ExtractionDataModule):
    """Queries ``λ a + (1 − λ) b`` of random pairs of the attacker's images, ``λ`` uniform.

    Args:
        oracle: The victim's only door.
        data: The data splits.
        queries: Number of mixes.
        batch_size: Queries in a training batch.
        seed: Seed of pairs and mixes.
    """

    def __init__(
        self, oracle: BlackBox, data: SplitDataModule, queries: int = 2000, batch_size: int = 64, seed: int = 0
    ) -> None:
        super().__init__(oracle, data, batch_size, seed=seed)
        self.queries = queries

    def collect(self) -> TransferSet:
        """Makes the mixes and asks about them."""
        images, _ = self.data.tensors("attacker")
        generator = torch.Generator().manual_seed(self.seed)
        first, second = torch.randint(len(images), (2, self.queries), generator=generator)
        share = torch.rand((self.queries, 1, 1, 1), generator=generator)
        x = share * images[first] + (1 - share) * images[second]
        return TransferSet(x, self.ask(x, "mixup"), held_out_rows(len(x), self.validation_fraction))


# %% [markdown]
# ## 2. Victim, two thieves, two verdicts
# %%
def main(folder: Path = Path("runs/own_attack"), epochs: int = 25, queries: int = 2000) -> dict[str, Verdict]:
    """Trains a watermarked victim and steals it twice: by plain distillation and by mixup.

    Args:
        folder: Where the figure goes.
        epochs: Epochs of every training.
        queries: Queries of the mixup attack.

    Returns:
        The verdicts by attack.
    """

    def trainer() -> pl.Trainer:
        return pl.Trainer(
            max_epochs=epochs, logger=False, enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False
        )  # fmt: skip

    data = DigitsDataModule(
        batch_size=64, victim_size=900, attacker_size=400, verification_size=150, validation_size=47
    )
    key = WatermarkKey.draw(num_classes=10, secret="an example, and so no secret")
    pl.seed_everything(0, verbose=False)
    reference = SupervisedVictim(DigitsCNN, label_smoothing=0.1)
    trainer().fit(reference, data)
    victim = SupervisedVictim(DigitsCNN, label_smoothing=0.1, watermark=WatermarkCallback(key, start=0.5, samples=16))
    trainer().fit(victim, data)
    known = verify(reference, key, data, samples=150)[1]
    verdicts = {}
    for name, attack in {
        "distillation": DistillationDataModule(Oracle(victim), data, batch_size=64),
        "mixup": MixupDataModule(Oracle(victim), data, queries),
    }.items():
        student = Student(DigitsCNN)
        trainer().fit(student, attack)
        verdicts[name] = verify(student, key, data, samples=150, reference=known)[0]
    draw(verdicts, folder / "own_attack.png")
    return verdicts


# %% [markdown]
# ## 3. A figure
# %%
def draw(verdicts: dict[str, Verdict], path: Path) -> None:
    """Draws the watermark success of each thief with its interval."""
    from meadef_lightning.experiment.figure_style import VERMILION, house_style, new_figure, save

    path.parent.mkdir(parents=True, exist_ok=True)
    with house_style():
        figure = new_figure(4.0, 2.4)
        axes = figure.subplots()
        for place, (name, verdict) in enumerate(verdicts.items()):
            axes.plot([100 * bound for bound in verdict.wsr_ci], [place, place], color=VERMILION)
            axes.plot(100 * verdict.wsr, place, "o", color=VERMILION)
            axes.annotate(
                verdict.verdict, (100 * verdict.wsr, place), xytext=(0, 6), textcoords="offset points", fontsize=7
            )
            axes.annotate(name, (0, place), xytext=(2, -10), textcoords="offset points", fontsize=7)
        axes.set(xlabel="watermark success rate (%)", xlim=(0, 102), ylim=(-0.6, len(verdicts) - 0.4), yticks=[])
    save(figure, path)


# %%
if __name__ == "__main__":
    for name, verdict in main().items():
        print(f"{name}: accuracy {verdict.natural_accuracy:.1%}, WSR {verdict.wsr:.1%}, {verdict.verdict}")
