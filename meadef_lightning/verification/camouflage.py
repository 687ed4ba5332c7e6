"""Asking a black box in an order from which its owner cannot tell what is asked.

A suspect's owner who sees all triggers in one batch, and all controls in the next, knows the key's sources after two requests, and
may answer those as an innocent model would. So everything is asked in one secret random order, in batches of one size.

**Algorithm**

1. A trigger or control that is also a decoy sample (the first ``decoy_samples`` pairs of the key's cells are) is asked once, as the
   decoy, and answered twice: a repeated row would be suspicious, and a ledger would shorten its batch.
2. Natural samples of the verification split fill the batches up to one size, and make up the share ``filler`` if one is wanted.
   Their answers are not used.
3. All of it is put into the order of a permutation that depends on the key's salt, the verifier's seed and the number of samples
   only: not on the key's classes, and not predictable without the key.
4. A sample is made when its batch is; the answers are put back into their places at the end.

**Cost**: less than one sample a batch more than in plain order, plus the share ``filler``; memory for one batch and 8 bytes a sample.

**Defaults**: no filler beyond the batch size: the decoys and the test split outnumber the triggers already.

**Pitfalls**: the order hides which batch is which, not how often something is asked. Someone who recognises composites can count
that one pair of classes occurs more often than others. With ``samples`` at most ``decoy_samples``, and all keys compared, even that is
gone: by step 1 the set of samples asked is then the same for every key. A combining way that draws random numbers gets other ones in
another order, so only ways that draw none (all of ours) give bit-for-bit the answers of the plain order. The batches have one
size if the black box sends them as they are; one that splits them, or answers from an earlier run's ledger, sends others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from meadef_lightning.verification.datamodule import Batch, SourceData, VerificationDataModule
from meadef_lightning.verification.decoys import seeded_permutation
from meadef_lightning.verification.responses import Responses
from meadef_lightning.watermark.key import WatermarkKey


def uniform_batches(samples: int, batch_size: int, spare: int) -> tuple[int, int]:
    """Returns the size of equally large batches, at most ``batch_size``, and the filler samples that they need.

    Where fewer than that are spare, all of them are taken and the last batch is smaller.

    Args:
        samples: Samples that must be asked, at least 1.
        batch_size: Most samples in a batch, at least 1.
        spare: Filler samples that there are.
    """
    batches = math.ceil(samples / batch_size)
    size = math.ceil(samples / batches)
    return size, min(batches * size - samples, spare)


class Interleaved(Dataset[Batch]):
    """Samples of several data sets in one order, each made when its batch is.

    Args:
        parts: Map-style data sets whose ``__getitems__`` returns a whole batch ``(x, positions)``.
        order: Codes to ask, int64 ``(N,)``: code ``c`` is item ``c - (items of the parts before)`` of its part.
    """

    def __init__(self, parts: Sequence[Any], order: Tensor) -> None:
        self.parts, self.order = parts, order
        self.ends = torch.tensor([len(part) for part in parts]).cumsum(0)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Batch:
        x, positions = self.__getitems__([index])
        return x[0], positions[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        positions = torch.as_tensor(indices, dtype=torch.int64)
        codes = self.order[positions]
        owners = torch.searchsorted(self.ends, codes, right=True)
        x: Tensor | None = None
        for owner in sorted(set(owners.tolist())):
            chosen = owners == owner
            start = 0 if owner == 0 else int(self.ends[owner - 1])
            made, _ = self.parts[owner].__getitems__((codes[chosen] - start).tolist())
            x = made.new_empty(len(codes), *made.shape[1:]) if x is None else x
            x[chosen] = made
        if x is None:
            raise IndexError("An empty batch was asked for.")
        return x, positions


class CamouflagedDataModule(VerificationDataModule):
    """The questions of :class:`VerificationDataModule` as one predict loader in a secret order.

    Args:
        key: As there, like all but the last.
        data: Data module of the task.
        samples: Triggers, and controls, at most.
        decoys: Keys to compare with.
        decoy_samples: Composites of each cell.
        seed: The verifier's seed.
        batch_size: Most samples in a batch.
        filler: Share of natural filler samples among everything that is asked, in ``[0, 0.9]``; less where the verification split
            does not have so many.

    Attributes:
        order: What is asked, after ``setup``, int64: places in plain order, all kinds one after the other; filler lies beyond.

    Raises:
        ValueError: As there, or if ``filler`` is out of range.
    """

    order: Tensor

    loaders = ("question",)

    def __init__(
        self,
        key: WatermarkKey,
        data: SourceData,
        samples: int = 512,
        decoys: int = 9999,
        decoy_samples: int = 32,
        seed: int = 0,
        batch_size: int = 512,
        filler: float = 0.0,
    ) -> None:
        super().__init__(key, data, samples, decoys, decoy_samples, seed, batch_size)
        if not 0 <= filler <= 0.9:
            raise ValueError(f"filler={filler} must be a share from 0 to 0.9 of the samples asked.")
        self.filler = filler
        self._loader: DataLoader[Batch] | None = None

    def setup(self, stage: str) -> None:
        """Plans the questions and their order.

        Args:
            stage: Given by Lightning; verification is prediction.
        """
        super().setup(stage)
        if self._loader is not None:
            return
        plain = super().predict_dataloader()
        parts: list[Any] = [loader.dataset for loader in plain]
        self._twice, self._once = self._repeated()
        total, spare = sum(self.sizes), len(self.sources[0])
        asked = torch.ones(total, dtype=torch.bool)
        asked[self._twice] = False
        needed = int(asked.sum())
        filler = min(math.ceil(needed * self.filler / (1 - self.filler)), spare)
        size, padding = uniform_batches(needed + filler, self.batch_size, spare - filler)
        drawn = seeded_permutation(spare, "filler", self.key.salt, self.table.seed)[: filler + padding]
        codes = torch.cat([asked.nonzero().flatten(), total + drawn])
        order = codes[seeded_permutation(len(codes), "camouflage", self.key.salt, self.table.seed)]
        # the sources as they are, behind the four parts; a data set like that of the natural samples
        parts.append(type(parts[-1])(self.sources[0]))
        self._loader = DataLoader(
            Interleaved(parts, order), batch_size=size, shuffle=False, collate_fn=plain[0].collate_fn
        )
        self.order = order

    def _repeated(self) -> tuple[Tensor, Tensor]:
        """Returns the codes of triggers and controls that are decoy samples, too, and the codes of these."""
        triggers, controls, decoys, _ = self.sizes
        ways = len(self.table.space.combiners)
        pair = int((self.table.pairs == torch.tensor(self.key.source_classes)).all(1).nonzero()[0])
        item = torch.arange(min(triggers, self.decoy_samples))
        others = torch.tensor([way for way in range(ways) if way != self.table.way])
        start = triggers + controls + pair * self.decoy_samples
        each = decoys // ways
        twice = torch.cat([item, triggers + item])
        once = torch.cat(
            [start + self.table.way * each + item, start + others[item % len(others)] * each + item],
        )
        return twice, once

    def predict_dataloader(self) -> list[DataLoader[Batch]]:
        """Returns the one loader; its batches are ``(x, position in the secret order)``."""
        return [] if self._loader is None else [self._loader]

    def places(self, positions: Tensor, dataloader_idx: int) -> Tensor:
        """Returns where each question stands in plain order; filler stands beyond.

        Args:
            positions: Places in the secret order, int64 ``(B,)``.
            dataloader_idx: 0, as there is one loader.
        """
        return self.order.to(positions.device)[positions]

    def responses(self, answers: Sequence[Tensor], soft: tuple[Tensor, Tensor] | None = None) -> Responses:
        """Puts the answers back into their places.

        Args:
            answers: The answers to the one loader in its order, int64.
            soft: As there.

        Raises:
            ValueError: If there is not one list of answers, or it is incomplete.
        """
        if [len(answer) for answer in answers] != [len(self.order)]:
            raise ValueError(
                f"The loader asks {len(self.order)} samples, got {[len(answer) for answer in answers]} answers."
            )
        answered = answers[0].cpu()
        placed = answered.new_empty(sum(self.sizes) + len(self.sources[0]))
        placed[self.order] = answered
        if soft is not None:
            soft = self.repeat(soft[0].cpu()), soft[1]
        return super().responses(torch.split(self.repeat(placed[: sum(self.sizes)]), self.sizes), soft)

    def repeat(self, values: Tensor) -> Tensor:
        """Gives triggers and controls that were asked as decoys the values of these, in place.

        Args:
            values: What was found of each sample in plain order, all kinds one after the other, shape ``(sum(sizes), …)``.
        """
        values[self._twice] = values[self._once]
        return values
