"""GAN-based detect and remove: small generators reverse a trigger for every class, and the model unlearns the outstanding one.

**Source.** Detection and removal of watermarks by a generative adversarial network, arXiv 2106.08104 (ISC 2021). The text was not at
hand: what is public says that a GAN takes the place of Neural Cleanse's optimisation, finds the watermarked class, reverses the
watermark, and that the model is then tuned on reversed images. Architectures, losses and the rule for anomalies below are a
reconstruction.

**Algorithm.** *Detection* (`reverse_triggers`). 1. Every class ``k`` has a generator ``G_k: z ↦ (mask m, pattern p)``, ``z`` normal
noise, and a discriminator ``D_k``. 2. Clean images ``x`` of other classes become ``x' = (1 − m)·x + m·p``. The generator minimises
``CE(f(x'), k) + weight · mean(m) + realism · softplus(−D_k(x'))``; the discriminator tells ``x`` from ``x'``. After each step a class's
``weight`` grows where at least a share ``success`` of recent images were turned, and shrinks elsewhere, so that all masks are as small as
the same success allows. 3. The score of a class is its mean mask, between 0 and 1, or 1 if less than half of its images are turned into
it; a class whose anomaly index (`anomaly_index`) is below −``threshold`` is called watermarked. *Removal.* 4. Tune the model with
``CE(f(x), y) + CE(f(x'), y)``, where ``x'`` carries a trigger drawn from those of the flagged classes: what the triggers showed is
unlearnt under correct labels. If no class is flagged, the one with the smallest score is unlearnt (a message says so): a thief would try.

**Cost.** ``steps`` passes of ``classes · images`` images through the model and small networks, for ``at_once`` classes together; then
``epochs`` of training on twice the thief's images.

**Defaults.** ``realism`` 0.1, noise of 16 numbers, 250 steps, 10 epochs with Adam at 2e-3, and a threshold of 2 as in Neural Cleanse.
With one fixed weight for all classes their masks are small where the generator gave up turning images, and the planted class stands out
less: on digits with a patch its index was −1.2 to −1.6, and is −2.1 to −2.7 with weights that follow the success.

**Pitfalls.** A generator that gives up has an empty mask, which is the smallest of all: scores count only where images are turned. With
ten classes the index rests on few numbers, and clean models reach −2 now and then. A watermark that is no patch (a combination of two
images, say) has no small mask; then the anomaly index finds another class or none, and what is unlearnt is an adversarial patch.
Fine-tuning alone, with the same images and epochs, is the control.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from typing_extensions import override

from meadef_lightning.data.thief import ThiefData
from meadef_lightning.detection.base import anomaly_index, without_training
from meadef_lightning.detection.neural_cleanse import OtherClasses, Triggers
from meadef_lightning.random_state import kept_random_state
from meadef_lightning.removal.base import Observe, Removal, device_of, train_path
from meadef_lightning.removal.finetuning import Tuner, check_training

GROWTH = 1.05
"""Factor by which a step changes the weight of a class's mask."""

LATENT, HIDDEN = 16, 64
"""Numbers of noise that a generator gets, and width of the hidden layer of generators and discriminators."""


class TriggerGenerator(nn.Sequential):
    """From noise ``(B, 16)`` to the values of mask and pattern before the sigmoid, ``(B, (1 + C) · H · W)``.

    Args:
        shape: Shape of an image, ``(C, H, W)``.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        channels, height, width = shape
        super().__init__(nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, (1 + channels) * height * width))


class Discriminator(nn.Sequential):
    """From images ``(B, C, H, W)`` to the logit of being real, ``(B, 1)``.

    Args:
        shape: Shape of an image, ``(C, H, W)``.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        channels, height, width = shape
        super().__init__(
            nn.Flatten(), nn.Linear(channels * height * width, HIDDEN), nn.LeakyReLU(0.2), nn.Linear(HIDDEN, 1)
        )


class _Ensemble:
    """As many networks of a kind as there are classes, run and trained as one.

    Args:
        networks: The networks, all alike.
        lr: Adam's learning rate.
    """

    def __init__(self, networks: Sequence[nn.Module], lr: float) -> None:
        self.skeleton = networks[0]
        self.parameters, _ = stack_module_state(list(networks))  # they have no buffers
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=lr, betas=(0.5, 0.999))

    def __call__(self, x: Tensor) -> Tensor:
        """Applies network ``m`` to ``x[m]``: ``(M, B, …)`` to ``(M, B, …)``."""
        answers: Tensor = vmap(lambda weights, part: functional_call(self.skeleton, weights, (part,)))(
            self.parameters, x
        )
        return answers

    def step(self, loss: Tensor) -> None:
        """Makes a step down a loss; a sum over networks trains each on its own part."""
        parameters = [*self.parameters.values()]
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        self.optimizer.step()


@dataclass(frozen=True, eq=False)
class Reversal:
    """Triggers that generators found, several for every class.

    Args:
        masks: Where the triggers show, in ``[0, 1]``, shape ``(K, S, 1, H, W)``.
        patterns: What shows there, in the model's input space, shape ``(K, S, C, H, W)``.
        turned: Share of clean images of other classes that the triggers turn into the class, shape ``(K,)``.
    """

    masks: Tensor
    patterns: Tensor
    turned: Tensor

    @property
    def sizes(self) -> Tensor:
        """Score of every class: the mean of its masks, and 1 where less than half of the images are turned; shape ``(K,)``."""
        size = self.masks.flatten(1).mean(dim=1)
        return torch.where(self.turned < 0.5, torch.ones_like(size), size)

    @property
    def index(self) -> Tensor:
        """Anomaly index of every class's score, float64 ``(K,)``; far below 0 is suspicious."""
        return torch.from_numpy(anomaly_index(self.sizes.cpu().numpy()))

    @property
    def pictures(self) -> Tensor:
        """Mean trigger of every class on an image of zeros, ``m·p``, shape ``(K, C, H, W)``."""
        return (self.masks * self.patterns).mean(dim=1)


def reverse_triggers(
    model: nn.Module,
    data: ThiefData,
    seed: int = 0,
    *,
    steps: int = 250,
    images: int = 16,
    lr: float = 5e-3,
    weight: float = 5.0,
    success: float = 0.95,
    realism: float = 0.1,
    at_once: int = 16,
) -> Reversal:
    """Steps 1 to 3 of the module's algorithm: trains a generator of triggers for every class.

    Args:
        model: Maps ``(B, C, H, W)`` to logits ``(B, K)``; is left as it is.
        data: The thief's data, of at least two classes.
        seed: Seed of everything random; torch's global random state is left as it was.
        steps: Steps of generators and discriminators.
        images: Images of a step for every class, and triggers that are kept for it.
        lr: Learning rate of Adam.
        weight: First weight of the mean mask.
        success: Share of images below which a class's weight shrinks.
        realism: Weight of what the discriminator says.
        at_once: Classes that are searched together; fewer take less memory.

    Returns:
        The triggers, on the CPU.
    """
    frozen = without_training(model)
    parts = [
        _search(frozen, data, classes, seed + number, steps, images, lr, weight, success, realism)
        for number, classes in enumerate(torch.split(torch.arange(data.num_classes), at_once))
    ]
    return Reversal(*(torch.cat(values).cpu() for values in zip(*parts, strict=True)))


def _search(
    model: nn.Module,
    data: ThiefData,
    classes: Tensor,
    seed: int,
    steps: int,
    count: int,
    lr: float,
    weight: float,
    success: float,
    realism: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reverse_triggers` for some classes: masks, patterns and shares of turned images."""
    device = device_of(model, data.x.device)
    x, low, high = (value.to(device) for value in (data.x, data.low, data.high))
    shape, labels = x.shape[1:], classes.to(device)[:, None].expand(-1, count)
    others, generator = OtherClasses(data.y.cpu(), data.num_classes), torch.Generator().manual_seed(seed)
    with kept_random_state(device):
        torch.manual_seed(seed)
        create = _Ensemble([TriggerGenerator(shape).to(device) for _ in classes], lr)
        judge = _Ensemble([Discriminator(shape).to(device) for _ in classes], lr)

    def triggers() -> tuple[Tensor, Tensor]:
        noise = torch.randn(len(classes), count, LATENT, generator=generator).to(device)
        values = create(noise).view(len(classes), count, 1 + shape[0], *shape[1:]).sigmoid()
        return values[:, :, :1], torch.lerp(low, high, values[:, :, 1:])

    def clean() -> Tensor:
        return x[others.draw(classes, count, generator).to(device)]

    weights, share = torch.full(classes.shape, weight, device=device), torch.zeros(classes.shape, device=device)
    with torch.enable_grad():
        for _ in range(steps):
            originals = clean()
            masks, patterns = triggers()
            stamped = torch.lerp(originals, patterns, masks)
            real, made = judge(originals), judge(stamped.detach())
            judge.step((F.softplus(-real) + F.softplus(made)).mean(dim=(1, 2)).sum())
            logits = model(stamped.flatten(0, 1))
            task = F.cross_entropy(logits, labels.flatten(), reduction="none").view(labels.shape).mean(dim=1)
            unlike = F.softplus(-judge(stamped)).mean(dim=(1, 2))
            create.step((task + weights * masks.flatten(1).mean(dim=1) + realism * unlike).sum())
            with torch.no_grad():
                hits = (logits.argmax(dim=-1).view(labels.shape) == labels).float().mean(dim=1)
                share = torch.lerp(share, hits, 0.2)  # over some five batches
                weights = torch.where(share >= success, weights * GROWTH, weights / GROWTH)
    with torch.no_grad():
        masks, patterns = triggers()
        stamped = torch.cat([torch.lerp(clean(), patterns, masks) for _ in range(4)], dim=1)
        answers = model(stamped.flatten(0, 1)).argmax(dim=-1).view(len(classes), -1)
    return masks, patterns, (answers == labels[:, :1]).float().mean(dim=1)


class _Unlearning(Tuner):
    """Cross-entropy with correct labels on images without and with a trigger drawn from several."""

    def __init__(self, model: nn.Module, triggers: Triggers, lr: float) -> None:
        super().__init__(model, lambda parameters: torch.optim.Adam(parameters, lr=lr))
        self.register_buffer("masks", triggers.mask)
        self.register_buffer("patterns", triggers.pattern)

    @override
    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of a batch: the sum of both means, in one forward."""
        x, y = batch
        masks, patterns = self.get_buffer("masks"), self.get_buffer("patterns")
        drawn = torch.randint(len(masks), (len(x),), device=x.device)
        both = torch.cat([x, torch.lerp(x, patterns[drawn], masks[drawn])])
        return 2 * F.cross_entropy(self(both), torch.cat([y, y]))


class GANUnlearning(Removal):
    """Reverses triggers with generators, and unlearns those of the flagged classes; see the module's description.

    Args:
        epochs: Epochs of unlearning; observed after each.
        lr: Learning rate of unlearning.
        threshold: Classes whose anomaly index is below its negative are flagged, above 0.
        batch_size: Images of a step of unlearning.
        steps: Steps of generators and discriminators.
        images: Images of every class in such a step.
        weight: First weight of the mean mask, above 0.
        success: Share of images below which a class's weight shrinks, in ``(0, 1]``.
        realism: Weight of what the discriminator says, 0 or more.
        at_once: Classes that are searched together; fewer take less memory.

    Raises:
        ValueError: If a number is out of range.
    """

    from_scratch = True  # accuracy falls in the first epoch, and comes back in the others

    def __init__(
        self,
        epochs: int = 10,
        lr: float = 2e-3,
        threshold: float = 2.0,
        batch_size: int = 32,
        steps: int = 250,
        images: int = 16,
        weight: float = 5.0,
        success: float = 0.95,
        realism: float = 0.1,
        at_once: int = 16,
    ) -> None:
        check_training(epochs, batch_size)
        if min(steps, images, at_once) < 1 or min(lr, threshold, weight) <= 0 or realism < 0 or not 0 < success <= 1:
            raise ValueError(
                f"{steps=}, {images=} and {at_once=} must be at least 1, {lr=}, {threshold=} and {weight=} above 0, {realism=} at "
                f"least 0, and {success=} in (0, 1]."
            )
        self.epochs, self.lr, self.threshold, self.batch_size = epochs, lr, threshold, batch_size
        self.steps, self.images, self.weight, self.success = steps, images, weight, success
        self.realism, self.at_once = realism, at_once

    def reverse(self, model: nn.Module, data: ThiefData, seed: int = 0) -> Reversal:
        """The first part alone; see `reverse_triggers`."""
        return reverse_triggers(
            model,
            data,
            seed,
            steps=self.steps,
            images=self.images,
            weight=self.weight,
            success=self.success,
            realism=self.realism,
            at_once=self.at_once,
        )

    def flagged(self, reversal: Reversal) -> list[int]:
        """The classes to unlearn: those that are called watermarked, or the one with the smallest score if none is."""
        classes: list[int] = (reversal.index < -self.threshold).nonzero().flatten().tolist()
        if classes:
            return classes
        smallest = int(reversal.sizes.argmin())
        rank_zero_info(f"No class is called watermarked. Unlearning the one with the smallest score, {smallest}.")
        return [smallest]

    @override
    def scrub(self, model: nn.Module, data: ThiefData, observe: Observe, seed: int = 0) -> None:
        found = self.reverse(model, data, seed)
        classes = self.flagged(found)
        triggers = Triggers(found.masks[classes].flatten(0, 1), found.patterns[classes].flatten(0, 1))
        scrubbed = copy.deepcopy(model).requires_grad_(True).train()
        module = _Unlearning(scrubbed, triggers, self.lr)
        images = data.x, data.y
        train_path(module, scrubbed, images, observe, epochs=self.epochs, batch_size=self.batch_size, seed=seed)
