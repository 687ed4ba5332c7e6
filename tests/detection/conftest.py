"""One model with a patch backdoor and one without, on digits, for all tests of detectors."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from silent import SILENT

from meadef_lightning.data import DigitsDataModule
from meadef_lightning.data.thief import ThiefData
from meadef_lightning.protection.patch import PatchVictim
from meadef_lightning.quiet import quiet
from meadef_lightning.victims import SupervisedVictim
from meadef_lightning.victims.networks import DigitsCNN


@pytest.fixture(scope="session")
def patch_case():
    """Models ``patched`` and ``clean``, the ``thief``'s data, and queries: ``natural`` ones and the same images ``marked``.

    Of the marked ones, those whose true class is the target are left out.
    """
    target = 3
    models = []
    for kind, arguments in ((PatchVictim, {"target_class": target}), (SupervisedVictim, {})):
        with torch.random.fork_rng(), quiet():
            seed_everything(0, verbose=False)
            data = DigitsDataModule(batch_size=64)
            model = kind(DigitsCNN(10, 1, width=8, hidden=32), **arguments)
            Trainer(max_epochs=10, num_sanity_val_steps=0, limit_val_batches=0, **SILENT).fit(model, datamodule=data)
        models.append(model.eval())
    patched, clean = models
    x, y = data.tensors("test")
    return SimpleNamespace(
        patched=patched,
        clean=clean,
        target=target,
        thief=ThiefData.of(data),
        natural=x,
        marked=patched.trigger(x[y != target]),
    )
