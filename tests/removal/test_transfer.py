"""Transfer: the other task is learnt in the model's own input space, and tasks of another form are refused."""

import pytest
import torch
from thief_models import Keep, changed, digits, patched_model, thief, weights

from meadef_lightning.data import DigitsDataModule
from meadef_lightning.data.images import TensorImages
from meadef_lightning.removal.layers import last_linear
from meadef_lightning.removal.transfer import Transfer, renormalise


class Negatives(DigitsDataModule):
    """Digits in negative that are called by the next number, normalised in another way: another task of the same form."""

    def load(self):
        images, _ = super().load()
        x, y = images.images, images.labels
        return TensorImages(255 - x, (y + 1) % 10), None


class Three(DigitsDataModule):
    @property
    def class_names(self):
        return ("zero", "one", "two")


def other(**options):
    return Negatives(mean=(0.7,), std=(0.2,), **options)


@pytest.fixture(scope="module")
def run():
    keep, before = Keep(), weights(patched_model())
    removal = Transfer(other(), epochs=12)
    removal.scrub(patched_model(), thief(), keep)
    assert not changed(before, weights(patched_model()))
    return removal, keep


def test_the_other_task_is_learnt(run):
    removal, keep = run
    name = "accuracy on the other task"
    assert removal.gains(patched_model(), thief())[name] < 0.3
    assert removal.gains(keep.last, thief())[name] > 0.85
    assert keep.strengths == list(range(1, 13))
    assert changed(weights(patched_model()), keep.models[0]) == set(keep.models[0])


def test_pictures_arrive_in_the_models_input_space():
    x, _ = other().tensors("attacker")
    pixels = x * 0.2 + 0.7
    torch.testing.assert_close(renormalise(x, other(), thief().low, thief().high), (pixels - 0.3053) / 0.3760)


def test_the_head_is_new_and_the_body_the_models():
    keep = Keep()
    Transfer(other(), epochs=1, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0)).scrub(
        patched_model(), thief(), keep
    )
    model = patched_model()
    head = last_linear(model, thief().x[:2])
    names = {name for name, value in model.named_parameters() if any(value is part for part in head.parameters())}
    assert len(names) == 2
    assert changed(weights(model), keep.models[0]) & {name for name, _ in model.named_parameters()} == names


@pytest.mark.parametrize(
    "data", [Three(), DigitsDataModule(image_size=20)], ids=["number of classes", "size of images"]
)
def test_a_task_of_another_form_is_refused(data):
    with pytest.raises(ValueError, match="Give a data module with as many classes and images of this shape"):
        Transfer(data).scrub(patched_model(), thief(), Keep())


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="batch_size=0"):
        Transfer(digits(), batch_size=0)
