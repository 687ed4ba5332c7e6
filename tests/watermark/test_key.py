"""Keys against brute force, a hand-written HKDF (RFC 5869), and hostile files; what a key must never show."""

import copy
import hashlib
import hmac
import itertools
import json

import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from key_samples import KEYS, SECRET, SECRETS

from meadef_lightning.watermark import DEFAULT_COMBINERS, CombinerSpec, KeySpace, WatermarkKey

OWN = "meadef_lightning.watermark.combiners."
TWO = (CombinerSpec(OWN + "CropPaste"), CombinerSpec(OWN + "PixelBlend"))
SALT = "0123456789abcdef" * 2


# ---- the space


@pytest.mark.parametrize(("classes", "ways"), [*itertools.product([3, 4, 7], [1, 2, 8])])
def test_key_at_reaches_every_valid_key_once(classes, ways):
    space = KeySpace(classes, DEFAULT_COMBINERS[:ways])
    valid = {(a, b, t, c) for a, b, t in itertools.permutations(range(classes), 3) for c in range(ways)}
    reached = [space.key_at(index) for index in range(space.size)]
    assert len(reached) == len(valid)
    assert set(reached) == valid


def test_key_at_refuses_indices_outside():
    space = KeySpace(3, TWO)
    for index in (-1, 12, 10**9):
        with pytest.raises(IndexError, match="not in a space of 12 keys"):
            space.key_at(index)


def test_space_refuses_too_few_classes_and_repeated_ways():
    with pytest.raises(ValueError, match=r"num_classes=2.*at least 3"):
        KeySpace(2)
    with pytest.raises(ValueError, match="only once"):
        KeySpace(3, (*TWO, CombinerSpec(OWN + "CropPaste", {})))
    with pytest.raises(ValueError, match="at least one combining way"):
        KeySpace(3, ())


# ---- drawing


def rfc5869(material, salt, info, length):
    """HKDF-SHA256 as RFC 5869 §2 writes it."""
    prk = hmac.digest(salt or bytes(32), material, "sha256")
    okm, block, counter = b"", b"", 0
    while len(okm) < length:
        counter += 1
        block = hmac.digest(prk, block + info + bytes([counter]), "sha256")
        okm += block
    return okm[:length]


def test_the_hand_written_hkdf_meets_the_rfcs_first_test_case():
    okm = rfc5869(b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)), 42)
    assert okm.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"


@settings(deadline=None, max_examples=50)
@given(st.binary(min_size=1, max_size=80), st.text(st.characters(codec="utf-8"), max_size=40), st.integers(3, 1000))
def test_draw_is_hkdf_of_secret_beacon_and_space(secret, beacon, classes):
    key = WatermarkKey.draw(classes, secret, beacon)
    space = KeySpace(classes)
    public = {
        "num_classes": classes,
        "space": [c.to_dict() for c in DEFAULT_COMBINERS],
        "what": "meadef_lightning key 1",
    }
    info = json.dumps(public, sort_keys=True, separators=(",", ":")).encode()
    stream = rfc5869(secret, beacon.encode(), info, 52)
    a, b, target, way = space.key_at(int.from_bytes(stream[:32], "big") % space.size)
    assert (key.source_classes, key.target_class, key.combiner) == ((a, b), target, DEFAULT_COMBINERS[way])
    assert key.seed == int.from_bytes(stream[32:36], "big") // 2
    assert key.salt == stream[36:].hex()
    assert key.drawn_uniformly
    assert key == WatermarkKey.draw(classes, secret, beacon)


def test_draw_takes_text_and_bytes_alike():
    assert WatermarkKey.draw(10, "geheim ✓") == WatermarkKey.draw(10, "geheim ✓".encode())


def test_draw_depends_on_secret_beacon_and_space():
    keys = {
        WatermarkKey.draw(10, "secret"),
        WatermarkKey.draw(10, "Secret"),
        WatermarkKey.draw(10, "secret", beacon="drand round 1"),
        WatermarkKey.draw(10, "secret", beacon="drand round 2"),
        WatermarkKey.draw(11, "secret"),
        WatermarkKey.draw(10, "secret", combiners=TWO),
        WatermarkKey.draw(10, "secret", combiners=TWO[::-1]),
    }
    assert len(keys) == len({key.salt for key in keys}) == len({key.seed for key in keys}) == 7


@pytest.mark.parametrize("source", ["secret", "beacon"])
def test_draw_is_uniform(source):
    space, n = KeySpace(3, TWO), 3000
    counts = dict.fromkeys(map(space.key_at, range(space.size)), 0)
    for i in range(n):
        secret, beacon = (f"owner {i}", "") if source == "secret" else ("owner", f"round {i}")
        key = WatermarkKey.draw(3, secret, beacon, TWO)
        counts[(*key.source_classes, key.target_class, TWO.index(key.combiner))] += 1
    # the draws are fixed numbers: either this always holds or never; a biased draw gives p far below
    assert scipy.stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_draw_refuses_an_empty_secret():
    for empty in ("", b""):
        with pytest.raises(ValueError, match="secret is empty"):
            WatermarkKey.draw(10, empty)


def test_controls_are_the_other_ways_of_the_space():
    key = WatermarkKey.draw(10, "secret")
    assert len(DEFAULT_COMBINERS) == len(key.control_combiners()) + 1
    assert {*key.control_combiners(), key.combiner} == set(DEFAULT_COMBINERS)
    picked = WatermarkKey((0, 1), 2, 10, combiner=CombinerSpec(OWN + "Band"))
    assert picked.control_combiners() == DEFAULT_COMBINERS
    assert not picked.drawn_uniformly


# ---- validation


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source_classes": (8363, 9973)}, "unknown source class; this task has classes 0 to 9972"),
        ({"source_classes": (-1, 7457)}, "unknown source class"),
        ({"target_class": 9973}, "unknown target class"),
        ({"source_classes": (7457, 7457)}, "two source classes must differ"),
        ({"target_class": 8363}, "target class is one of its source classes"),
        ({"source_classes": (8363, 7457, 1)}, "two source classes.*all integers"),
        ({"source_classes": (8363, True)}, "all integers"),
        ({"target_class": 6869.0}, "all integers"),
        ({"seed": None}, "all integers"),
        ({"seed": -1}, "seed must be an integer from 0"),
        ({"seed": 2**63}, "seed must be an integer from 0"),
        ({"num_classes": 2}, "at least 3"),
        ({"salt": "deadbeefcafe4711"}, "at least 32 hexadecimal digits"),
        ({"salt": "x" * 32}, "at least 32 hexadecimal digits"),
        ({"space": TWO, "drawn_uniformly": True}, "claims to be drawn"),
    ],
)
def test_invalid_keys_are_refused_without_naming_their_secrets(change, message):
    fields = {name: getattr(SECRET, name) for name in SECRET.__dataclass_fields__}
    with pytest.raises(ValueError, match=message) as refused:
        WatermarkKey(**{**fields, **change})
    assert not any(secret in str(refused.value) for secret in SECRETS)


def test_a_key_cannot_be_changed():
    with pytest.raises(AttributeError):
        SECRET.target_class = 0
    described = SECRET.to_dict()
    described["space"][1]["init_args"]["position"][0] = 9
    assert DEFAULT_COMBINERS[1].init_args["position"] == [0.5, 0.0]


# ---- commitment


@settings(deadline=None, max_examples=50)
@given(KEYS, KEYS)
def test_commitment_binds_every_field(one, other):
    canonical = json.dumps(one.to_dict(), sort_keys=True, separators=(",", ":")).encode()
    assert one.commitment() == hashlib.sha256(canonical).hexdigest()
    for name in one.__dataclass_fields__:
        changed = copy.copy(one)  # one field after the other, past the validation
        object.__setattr__(changed, name, getattr(other, name))
        assert (changed.commitment() == one.commitment()) == (getattr(one, name) == getattr(other, name))


def test_commitment_binds_number_of_classes_and_space():
    base = WatermarkKey((0, 1), 2, 10, salt=SALT)
    others = [
        WatermarkKey((0, 1), 2, 11, salt=SALT),
        WatermarkKey((0, 1), 2, 10, salt=SALT, space=DEFAULT_COMBINERS[:-1]),
        WatermarkKey((0, 1), 2, 10, salt=SALT, space=DEFAULT_COMBINERS[::-1]),
        WatermarkKey((1, 0), 2, 10, salt=SALT),
        WatermarkKey((0, 1), 2, 10, salt=SALT, drawn_uniformly=True),
    ]
    assert len({key.commitment() for key in (base, *others)}) == 6


def test_hand_picked_keys_have_fresh_salts():
    assert WatermarkKey((0, 1), 2, 10).commitment() != WatermarkKey((0, 1), 2, 10).commitment()


@pytest.mark.parametrize("place", ["file/k.json", "/proc/none/k.json"])
def test_a_key_that_cannot_be_written_names_its_path(place, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Cannot write the watermark key .*k\.json: .*Choose a path"):
        WatermarkKey.draw(4, "a").save(tmp_path / place)
