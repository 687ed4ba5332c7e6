"""Latent blending with an autoencoder trained on real images (scikit-learn's digits)."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

from meadef_lightning.watermark import AutoencoderBlend, CombinerSpec, WatermarkKey


@pytest.fixture(scope="module")
def digits():
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None]
    return (images - images.mean()) / images.std()


@pytest.fixture(scope="module")
def fitted(digits, tmp_path_factory):
    """The module, its spec, and the held-out images."""
    autoencoder = AutoencoderBlend(1, width=16)
    path = tmp_path_factory.mktemp("ae") / "deep" / "weights.pt"
    spec = autoencoder.fit(digits[:1200], path, steps=300, batch_size=32, seed=1)
    return autoencoder, spec, digits[1200:]


def test_fit_learns_to_reconstruct_unseen_digits(fitted):
    autoencoder, _, unseen = fitted
    error = (autoencoder.reconstruct(unseen) - unseen).square().mean()
    assert error < 0.15 * unseen.var()


def test_blending_a_sample_with_itself_reconstructs_it(fitted):
    autoencoder, _, x = fitted
    torch.testing.assert_close(autoencoder(x, x), autoencoder.reconstruct(x), atol=1e-5, rtol=1e-5)


def test_the_blend_is_the_decoded_mean_of_the_codes(fitted):
    autoencoder, spec, x = fitted
    a, b = x[:20], x[20:40]
    mean = 0.5 * autoencoder.encoder(a) + 0.5 * autoencoder.encoder(b)
    torch.testing.assert_close(autoencoder(a, b), autoencoder.decoder(mean), atol=1e-5, rtol=1e-5)
    lopsided = CombinerSpec(spec.class_path, {**spec.init_args, "alpha": 0.9}).build()
    code = 0.9 * autoencoder.encoder(a) + 0.1 * autoencoder.encoder(b)
    torch.testing.assert_close(lopsided(a, b), autoencoder.decoder(code), atol=1e-5, rtol=1e-5)
    # the larger share shows: nearer to a than to b
    assert (lopsided(a, b) - a).square().mean() < 0.5 * (lopsided(a, b) - b).square().mean()


def test_the_spec_goes_through_a_key_file(fitted, tmp_path):
    autoencoder, spec, x = fitted
    key = WatermarkKey((0, 1), 2, 10, combiner=spec)
    loaded = WatermarkKey.load(key.save(tmp_path / "key.json"))
    assert loaded == key
    built = loaded.combiner.build()
    assert torch.equal(built(x[:9], x[9:18]), autoencoder(x[:9], x[9:18]))
    assert not any(parameter.requires_grad for parameter in built.parameters())
    digest = hashlib.sha256(Path(spec.init_args["weights"]).read_bytes()).hexdigest()
    assert json.loads((tmp_path / "key.json").read_text())["combiner"]["init_args"]["sha256"] == digest


@pytest.mark.parametrize("size", [(8, 8), (7, 13), (28, 28), (5, 32), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_any_size_and_precision(fitted, size, dtype):
    autoencoder = fitted[0]
    a, b = (x.to(dtype) for x in torch.randn(2, 3, 1, *size))
    before = a.clone(), b.clone()
    combined = autoencoder(a, b)
    assert combined.shape == a.shape
    assert combined.dtype == dtype
    assert torch.isfinite(combined).all()
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


def test_autocast_changes_nothing(fitted):
    autoencoder, _, x = fitted
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = autoencoder(x[:8], x[8:16])
    assert torch.equal(inside, autoencoder(x[:8], x[8:16]))


def test_fit_is_reproducible_and_leaves_global_randomness_alone(digits, tmp_path):
    specs = [
        AutoencoderBlend(1, width=4).fit(digits[:100], tmp_path / f"{i}.pt", steps=3, batch_size=8, seed=seed)
        for i, seed in enumerate((5, 5, 6))
    ]
    # constructing modules does draw, so only fit is under test
    module = AutoencoderBlend(1, width=4)
    state = torch.get_rng_state()
    module.fit(digits[:100], tmp_path / "3.pt", steps=3, batch_size=8, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    weights = [torch.load(spec.init_args["weights"], weights_only=True) for spec in specs]
    weights.append(module.state_dict())
    for other, same in ((1, True), (2, False), (3, True)):
        assert all(torch.equal(weights[0][name], weights[other][name]) for name in weights[0]) is same
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.pt", "1.pt", "2.pt", "3.pt"]


def test_fit_works_inside_no_grad(digits, tmp_path):
    module = AutoencoderBlend(1, width=4)
    before = module.encoder[0].weight.clone()
    with torch.no_grad():
        module.fit(digits[:50], tmp_path / "w.pt", steps=2, batch_size=8)
    assert not torch.equal(before, module.encoder[0].weight)


def test_changed_weights_are_named(fitted, tmp_path):
    _, spec, _ = fitted
    content = bytearray(Path(spec.init_args["weights"]).read_bytes())
    content[len(content) // 2] ^= 1
    changed = tmp_path / "changed.pt"
    changed.write_bytes(content)
    with pytest.raises(ValueError, match=r"changed\.pt are not the ones the key was made with \(SHA-256 differs\)"):
        CombinerSpec(spec.class_path, {**spec.init_args, "weights": str(changed)}).build()


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path(self.marker),))


def test_hostile_weights_run_no_code(tmp_path):
    evil, path = Evil(), tmp_path / "evil.pt"
    evil.marker = str(tmp_path / "marker")
    torch.save(evil, path)
    with pytest.raises(ValueError, match=r"evil\.pt does not hold weights of AutoencoderBlend\(1, 16\)"):
        AutoencoderBlend(1, 16, weights=str(path))
    assert not (tmp_path / "marker").exists()


def test_other_errors_name_what_is_wrong(fitted, digits, tmp_path):
    autoencoder, spec, x = fitted
    with pytest.raises(ValueError, match=r"Cannot read the autoencoder weights .*nowhere\.pt.*AutoencoderBlend\.fit"):
        AutoencoderBlend(1, weights=str(tmp_path / "nowhere.pt"))
    with pytest.raises(ValueError, match=r"does not hold weights of AutoencoderBlend\(1, 32\)"):
        AutoencoderBlend(1, weights=spec.init_args["weights"])
    with pytest.raises(ValueError, match=r"not trained"):
        AutoencoderBlend(1)(x[:1], x[:1])
    with pytest.raises(ValueError, match=r"takes \(B, 1, H, W\) images, got \(1, 3, 8, 8\)"):
        autoencoder(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"takes \(B, 1, H, W\) images, got \(1, 1, 8\)"):
        autoencoder(torch.zeros(1, 1, 8), torch.zeros(1, 1, 8))
    for alpha in (0, 1, -0.5, float("nan")):
        with pytest.raises(ValueError, match=r"alpha=.* must lie strictly between"):
            AutoencoderBlend(1, alpha=alpha)
    for images in (digits[:0], digits[:, 0], digits.expand(-1, 3, -1, -1)):
        with pytest.raises(ValueError, match=r"fit needs \(N, 1, H, W\) images with N > 0"):
            AutoencoderBlend(1).fit(images, tmp_path / "w.pt")
    assert not (tmp_path / "w.pt").exists()
