"""Key files: private, atomic, refused if anything is wrong with them, and never shown, as nothing shows a key."""

import json
import logging
import os
import pprint
import stat
import traceback
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from key_samples import KEYS, SECRET, SECRETS
from rich.pretty import pretty_repr

from meadef_lightning.watermark import WatermarkKey


@settings(deadline=None, max_examples=20)
@given(key=KEYS)
def test_a_key_survives_its_file(tmp_path_factory, key):
    path = key.save(tmp_path_factory.mktemp("keys") / "deep" / "key.json")
    loaded = WatermarkKey.load(str(path))
    assert loaded == key
    assert loaded.commitment() == key.commitment()
    assert hash(loaded) == hash(key)


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_key_files_are_private_even_over_a_public_one(tmp_path):
    path = tmp_path / "key.json"
    path.write_text("{}")
    path.chmod(0o644)
    old = os.umask(0)
    try:
        SECRET.save(path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("where", ["json.dump", "os.fsync", "pathlib.Path.replace"])
def test_an_interrupted_write_leaves_the_old_key(tmp_path, monkeypatch, where):
    path = SECRET.save(tmp_path / "key.json")

    def interrupt(*args, **kwargs):
        if where == "json.dump":
            args[1].write('{"half": ')
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            WatermarkKey((0, 1), 2, 10).save(path)
    assert WatermarkKey.load(path) == SECRET
    assert list(tmp_path.iterdir()) == [path]


def without(name):
    return {field: value for field, value in SECRET.to_dict().items() if field != name}


WITH = SECRET.to_dict()
HOSTILE = {
    "empty": b"",
    "binary": bytes(range(256)) * 20,
    "truncated": json.dumps(WITH).encode()[:-20],
    "trailing": json.dumps(WITH).encode() + b"{",
    "latin-1": json.dumps(WITH).encode().replace(b"Diagonal", "Diägonal".encode("latin-1")),
    "oversized": json.dumps({**WITH, "padding": "x" * (1 << 20)}).encode(),
    "deep": b"[" * 200_000,
    "deep inside": json.dumps(WITH).encode().replace(b'{"anti": true}', b'{"anti": ' + b"[" * 980 + b"]" * 980 + b"}"),
    "long number": json.dumps(WITH).replace("55837", "55837" * 2000).encode(),
    "list": json.dumps([WITH]).encode(),
    "string": json.dumps("deadbeefcafe4711").encode(),
    "null": b"null",
    "newer": json.dumps({**WITH, "schema_version": 2}).encode(),
    "versionless": json.dumps(without("schema_version")).encode(),
    "unknown field": json.dumps({**WITH, "deadbeefcafe4711": 1}).encode(),
    "NaN class": json.dumps({**WITH, "target_class": float("nan")}).encode(),
    "float class": json.dumps({**WITH, "target_class": 6869.0}).encode(),
    "text class": json.dumps({**WITH, "target_class": "6869"}).encode(),
    "true seed": json.dumps({**WITH, "seed": True}).encode(),
    "huge seed": json.dumps({**WITH, "seed": 55837 * 10**30}).encode(),
    "unknown class": json.dumps({**WITH, "num_classes": 7000}).encode(),
    "same classes": json.dumps({**WITH, "source_classes": [8363, 8363]}).encode(),
    "target is source": json.dumps({**WITH, "target_class": 8363}).encode(),
    "three sources": json.dumps({**WITH, "source_classes": [8363, 7457, 5]}).encode(),
    "sources no list": json.dumps({**WITH, "source_classes": {"8363": 7457}}).encode(),
    "nested sources": json.dumps({**WITH, "source_classes": [[8363], [7457]]}).encode(),
    "salt list": json.dumps({**WITH, "salt": ["deadbeefcafe4711"]}).encode(),
    "salt short": json.dumps({**WITH, "salt": "deadbeefcafe4711"}).encode(),
    "drawn text": json.dumps({**WITH, "drawn_uniformly": "deadbeefcafe4711"}).encode(),
    "drawn outside": json.dumps({**WITH, "drawn_uniformly": True, "space": WITH["space"][:2]}).encode(),
    "space empty": json.dumps({**WITH, "space": []}).encode(),
    "space twice": json.dumps({**WITH, "space": WITH["space"] * 2}).encode(),
    "space number": json.dumps({**WITH, "space": 8363}).encode(),
    "combiner text": json.dumps({**WITH, "combiner": "x.Diagonal"}).encode(),
    "combiner class": json.dumps({**WITH, "combiner": {"class_path": ["Diagonal"]}}).encode(),
    "combiner args": json.dumps({**WITH, "combiner": {"class_path": "Diagonal", "init_args": "Diagonal"}}).encode(),
    "combiner NaN": json.dumps(
        {**WITH, "combiner": {"class_path": "Diagonal", "init_args": {"x": float("nan")}}}
    ).encode(),
    **{f"no {name}": json.dumps(without(name)).encode() for name in SECRET.__dataclass_fields__},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_unusable_files_are_refused_without_showing_their_content(tmp_path, name):
    path = tmp_path / "key.json"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(ValueError, match=r"key\.json is (not a watermark key|not a usable|larger)") as refused:
        WatermarkKey.load(path)
    shown = "".join(traceback.format_exception(refused.value))
    assert not any(secret in shown for secret in SECRETS)
    assert len(shown) < 5000


@settings(deadline=None, max_examples=60)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    ),
    st.sampled_from([*WITH]),
)
def test_any_json_in_any_field_gives_a_key_or_a_value_error(value, name):
    try:
        key = WatermarkKey.from_dict({**WITH, name: value})
    except ValueError:
        return
    assert len(key.commitment()) == 64
    assert key.to_dict()[name] == value or name == "combiner"


def test_missing_files_and_directories_say_so(tmp_path):
    with pytest.raises(ValueError, match=r"Cannot read the watermark key .*nowhere\.json.*No such file.*draw"):
        WatermarkKey.load(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match=r"Cannot read the watermark key"):
        WatermarkKey.load(tmp_path)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs a file without an end")
def test_a_file_without_an_end_is_refused():
    with pytest.raises(ValueError, match="larger than"):
        WatermarkKey.load("/dev/zero")


# ---- secrecy


def test_nothing_that_prints_a_key_shows_it(caplog):
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("training").info("key %s, %r, %s", SECRET, SECRET, {"config": [SECRET]})
    try:
        raise RuntimeError(SECRET)
    except RuntimeError as error:
        raised = "".join(traceback.format_exception(error))
    shown = [
        repr(SECRET),
        str(SECRET),
        f"{SECRET}",
        caplog.text,
        raised,
        pprint.pformat({"key": SECRET}, width=20),
        pretty_repr(SECRET),
        json.dumps({"key": SECRET}, default=str),
    ]
    for text in shown:
        assert "WatermarkKey(hand-picked, 9973 classes, commitment=" in text.replace("\n", "")
        assert SECRET.commitment()[:16] in text
        assert not any(secret in text for secret in SECRETS)
    assert repr(WatermarkKey.draw(10, "secret")).startswith("WatermarkKey(drawn, 10 classes")
