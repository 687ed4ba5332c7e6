"""Ten samples, and a victim that answers them and remembers what it was asked."""

import torch

from meadef_lightning.oracle import row_digests

POOL = torch.arange(40, dtype=torch.float32).reshape(10, 1, 2, 2)


def truth(rows):
    return torch.stack([rows.flatten(1).sum(dim=1), rows.flatten(1).prod(dim=1)], dim=1)


class Victim:
    """Answers rows of a batch and remembers what it was asked."""

    def __init__(self):
        self.seen = []

    def ask(self, ledger, rows):
        x = POOL[rows]

        def forward(indices):
            self.seen += [rows[i] for i in indices]
            return truth(x[indices])

        return ledger.settle(row_digests(x), forward)
