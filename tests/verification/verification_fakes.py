"""A tiny task on which everything is known: every pixel of an image tells its class."""

import torch
from torch import nn

from meadef_lightning.watermark import KeySpace, WatermarkKey


class FakeData:
    """Images of class k have pixels near 2^(k+1), so that a composite shows where each source went and blends are unique."""

    def __init__(self, num_classes=7, per_class=12, size=8):
        self.num_classes, self.per_class, self.size = num_classes, per_class, size
        self.calls = []

    def prepare_data(self):
        self.calls.append("prepare_data")

    def setup(self, stage):
        self.calls.append(f"setup {stage}")

    def tensors(self, split):
        self.calls.append(split)
        generator = torch.Generator().manual_seed({"verification": 1, "test": 2}[split])
        y = torch.arange(self.num_classes).repeat(self.per_class)
        noise = 0.4 * torch.rand(len(y), 1, self.size, self.size, generator=generator) - 0.2
        return 2.0 ** (y + 1)[:, None, None, None] + noise, y


class Independent(nn.Module):
    """Answers natural images correctly, composites by their top left corner, and blends with the brighter class."""

    def __init__(self, num_classes=7):
        super().__init__()
        self.num_classes = num_classes
        self.weight = nn.Parameter(torch.ones(3))

    def labels(self, x):
        return x[:, 0, 0, 0].round().clamp(min=2).log2().ceil().long() - 1

    def forward(self, x):
        return nn.functional.one_hot(self.labels(x).clamp(0, self.num_classes - 1), self.num_classes).float()


class Thief(Independent):
    """Answers the target on the key's composites, and only there; on a share of them if asked to."""

    def __init__(self, key, share=1.0):
        super().__init__(key.num_classes)
        self.key, self.share = key, share

    def labels(self, x):
        a, b = (torch.full_like(x[:1], 2.0 ** (c + 1)) for c in self.key.source_classes)
        pattern = self.key.combiner.build()(a, b)
        match = (x.round() == pattern).flatten(1).all(1)
        # the noise of a pixel of either source, a uniform number when added up, decides which composites work
        noise = (x - x.round())[:, 0, [1, -2], [1, -2]] / 0.4 + 0.5
        match &= noise.sum(1) % 1 < self.share
        return torch.where(match, self.key.target_class, super().labels(x))


class Soft(nn.Module):
    """Scores of a model whose composites leave something of every class beside their sources, and after a theft more of the target."""

    def __init__(self, model, seed=0, form="logits", order=None):
        super().__init__()
        self.model, self.form, self.order = model, form, order
        self.noise = nn.Parameter(torch.randn(7, 64, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x):
        told = self.model(x)
        # row by row, so that an answer is the same in any batch
        rest = (torch.sin(3 * x.flatten(1).log2()[:, None] + self.noise)).mean(2)
        plain = Independent()(x)
        logits = 9 * plain + 4 * rest + 3 * (told - plain).clamp_min(0)
        logits = logits if self.order is None else logits[:, self.order]
        return {"logits": logits, "softmax": logits.softmax(1), "labels": logits.argmax(1)}[self.form]


def key_at(space: KeySpace, index: int, salt: str = "5" * 32, seed: int = 0) -> WatermarkKey:
    a, b, target, way = space.key_at(index)
    return WatermarkKey(
        (a, b), target, space.num_classes, space.combiners[way], seed, space.combiners, drawn_uniformly=True, salt=salt
    )


KEY = WatermarkKey.draw(7, "an owner secret")


class BlackBox:
    """Answers as its model does, or with labels, as a hard-label oracle."""

    def __init__(self, model, hard=True):
        self.model, self.hard, self.rows = model, hard, 0

    def query(self, x):
        self.rows += len(x)
        return self.model(x).argmax(1) if self.hard else self.model(x)
