import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18, resnet50, vgg16

from meadef_lightning.victims.networks import (
    MLP,
    DigitsCNN,
    NineLayerCNN,
    SmallAlexNet,
    SmallResNet18,
    SmallResNet50,
    VGGFace,
    VGGLike,
    penultimate,
)

SMALL_FACE = {"width": 8, "hidden": 32}
ALL = [
    (VGGLike, {}),
    (VGGLike, {"batch_norm": True}),
    (NineLayerCNN, {}),
    (SmallAlexNet, {"hidden": 64}),
    (VGGFace, SMALL_FACE),
    (VGGFace, {**SMALL_FACE, "batch_norm": True}),
    (SmallResNet18, {}),
    (SmallResNet50, {}),
    (DigitsCNN, {}),
    (MLP, {}),
]
each = pytest.mark.parametrize(("network", "kwargs"), ALL, ids=lambda value: getattr(value, "__name__", str(value)))


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def convolutions(network):
    return [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)]


def linears(network):
    return [(m.in_features, m.out_features) for m in network.modules() if isinstance(m, nn.Linear)]


def conv(inputs, outputs, kernel=3):
    return inputs * outputs * kernel * kernel + outputs


def linear(inputs, outputs):
    return inputs * outputs + outputs


def test_vgg_like_is_the_papers():
    network = VGGLike(10)
    assert convolutions(network) == [64, 64, 128, 128]
    assert linears(network) == [(3200, 256), (256, 256), (256, 10)]
    assert [m.p for m in network.modules() if isinstance(m, nn.Dropout)] == [0.5]
    expected = conv(3, 64) + conv(64, 64) + conv(64, 128) + conv(128, 128)
    expected += linear(3200, 256) + linear(256, 256) + linear(256, 10)
    assert parameters(network) == expected
    # 32 → 30 → 28 → 14 → 12 → 10 → 5: the feature maps are 5×5 before they are pooled to 5×5.
    assert network.features(torch.zeros(1, 3, 32, 32)).shape == (1, 128, 5, 5)


def test_nine_layer_cnn_has_nine_layers_with_weights():
    network = NineLayerCNN(100, in_channels=1)
    assert len(convolutions(network)) + len(linears(network)) == 9
    assert linears(network)[-1] == (256, 100)
    assert network.features(torch.zeros(1, 1, 32, 32)).shape == (1, 256, 4, 4)


def test_small_alexnet_has_alexnets_layers():
    network = SmallAlexNet(10)
    assert convolutions(network) == [64, 192, 384, 256, 256]
    assert linears(network) == [(4096, 1024), (1024, 1024), (1024, 10)]


@pytest.mark.parametrize("batch_norm", [False, True])
def test_vgg_face_in_original_size_is_vgg16(batch_norm):
    with torch.device("meta"):
        ours, theirs = VGGFace(2622, grid=7, batch_norm=batch_norm), vgg16(num_classes=2622)
    assert convolutions(ours) == convolutions(theirs)
    assert linears(ours) == linears(theirs)
    if not batch_norm:
        assert parameters(ours) == parameters(theirs) == 145_002_878


@pytest.mark.parametrize(("ours", "theirs"), [(SmallResNet18, resnet18), (SmallResNet50, resnet50)])
def test_small_resnets_differ_from_torchvisions_in_the_stem_only(ours, theirs):
    with torch.device("meta"):
        small, original = ours(10), theirs(num_classes=10)
        shapes = {name: value.shape for name, value in small.network.state_dict().items()}
        expected = {name: value.shape for name, value in original.state_dict().items()}
        assert shapes.pop("conv1.weight") == (64, 3, 3, 3)
        assert expected.pop("conv1.weight") == (64, 3, 7, 7)
        assert shapes == expected
        sizes = []
        small.network.layer1.register_forward_pre_hook(lambda _, x: sizes.append(x[0].shape))
        small(torch.zeros(2, 3, 32, 32))
    assert sizes == [(2, 64, 32, 32)]


def test_digits_networks_are_small():
    assert 30_000 <= parameters(DigitsCNN(10)) <= 60_000
    assert linears(MLP(10, hidden=(50, 20))) == [(256, 50), (50, 20), (20, 10)]


@each
@pytest.mark.parametrize(("channels", "size"), [(1, (8, 8)), (3, (9, 31)), (1, (16, 16)), (1, (28, 28)), (3, (33, 8))])
def test_any_size_gives_logits_and_features(network, kwargs, channels, size):
    with torch.device("meta"):  # shapes only
        built = network(7, channels, **kwargs).eval()
        x = torch.zeros(2, channels, *size)
        assert built(x).shape == (2, 7)
        assert penultimate(built, x).shape == (2, linears(built)[-1][0])


def test_small_images_are_padded_evenly_with_the_mean():
    torch.manual_seed(0)
    network = VGGLike(4).eval()
    x = torch.rand(2, 3, 9, 16)
    padded = torch.zeros(2, 3, 16, 16)
    padded[:, :, 3:12] = x
    torch.testing.assert_close(network(x), network(padded))


@each
def test_it_overfits_a_tiny_batch(network, kwargs):
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, 16, 16), torch.arange(8) % 4
    built = network(4, 3, **kwargs)
    for module in built.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.Adam(built.parameters(), lr=1e-3)
    for _ in range(60):
        loss = F.cross_entropy(built(x), y)
        if loss < 0.1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


@each
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 16, 16), r"got shape \(3, 16, 16\).*unsqueeze\(0\)"),
        ((2, 768), r"got shape \(2, 768\)"),
        ((2, 1, 16, 16), r"Expected a batch of images \(B, 3, H, W\).*in_channels=1"),
        ((2, 3, 7, 16), r"8 or more, got shape \(2, 3, 7, 16\).*Enlarge"),
    ],
)
def test_other_shapes_are_refused(network, kwargs, shape, message):
    with torch.device("meta"):
        built = network(4, **{"in_channels": 3, **kwargs})
        with pytest.raises(ValueError, match=message):
            built(torch.zeros(shape))


@each
def test_features_give_the_logits(network, kwargs):
    torch.manual_seed(0)
    built = network(5, 3, **kwargs).eval()
    x = torch.rand(2, 3, 16, 16)
    head = [m for m in built.modules() if isinstance(m, nn.Linear)][-1]
    torch.testing.assert_close(head(penultimate(built, x)), built(x))


def test_penultimate_takes_the_layer_that_runs_last_and_leaves_no_trace():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)
            self.body = nn.Linear(4, 3)
            self.unused = nn.Linear(9, 9)

        def forward(self, x):
            return self.head(self.body(x).tanh())

    network = Backwards()
    x = torch.rand(5, 4, requires_grad=True)
    features = penultimate(network, x)
    assert torch.equal(features, network.body(x).tanh())
    features.sum().backward()
    assert x.grad.abs().sum() > 0
    assert network.training
    assert not any(m._forward_pre_hooks for m in network.modules())


def test_penultimate_removes_its_hooks_after_an_error():
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    with pytest.raises(RuntimeError):
        penultimate(network, torch.rand(2, 5))
    assert not network[0]._forward_pre_hooks


def test_penultimate_needs_a_linear_layer():
    with pytest.raises(ValueError, match=r"Sequential ran no nn\.Linear.*Let it end in an nn\.Linear"):
        penultimate(nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten()), torch.rand(1, 1, 8, 8))


def test_networks_can_be_copied_and_loaded_safely(tmp_path):
    network = DigitsCNN(10)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    twin = DigitsCNN(10)
    twin.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    x = torch.rand(3, 1, 16, 16)
    assert torch.equal(network.eval()(x), twin.eval()(x))
    assert torch.equal(copy.deepcopy(network)(x), twin(x))
