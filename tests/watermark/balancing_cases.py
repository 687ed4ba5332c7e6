"""Losses whose gradients are known, and what weighs two of them."""

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

SEEDS = st.integers(0, 2**32 - 1)


class Point(nn.Module):
    """A point in parameter space, split over two tensors, in which losses are quadratic bowls."""

    def __init__(self, dim, rng):
        super().__init__()
        self.left = nn.Parameter(torch.tensor(rng.standard_normal(dim // 2)))
        self.right = nn.Parameter(torch.tensor(rng.standard_normal(dim - dim // 2)))
        self.idle = nn.Parameter(torch.ones(3))  # no loss depends on it
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def position(self):
        return torch.cat([self.left, self.right])

    def bowls(self, count, rng):
        """Random quadratics ½(x - c)ᵀA(x - c), and their gradients A(x - c) at the point."""
        x, dim = self.position(), self.left.numel() + self.right.numel()
        losses, gradients = [], []
        for _ in range(count):
            root, centre = rng.standard_normal((dim, dim)) / dim**0.5, rng.standard_normal(dim)
            matrix = root @ root.T + np.eye(dim)
            offset = x - torch.tensor(centre)
            losses.append(offset @ torch.tensor(matrix) @ offset / 2)
            gradients.append(matrix @ offset.detach().numpy())
        return losses, np.array(gradients)


def terms(*losses):
    return dict(zip(("ver", "eva"), losses, strict=False))


def two_task_weight(g1, g2):
    """Share of the first gradient in the shortest convex combination (Sener & Koltun 2018, Eq. 6)."""
    return float(np.clip((g2 - g1) @ g2 / ((g2 - g1) @ (g2 - g1)), 0, 1))


def small_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 3))
    x, y = torch.randn(3, 10, 4), torch.randint(3, (3, 10))
    return net, [lambda n=net, i=i: F.cross_entropy(n(x[i]), y[i]) for i in range(3)]
