"""What the site makes of the docstrings' own notation."""

import importlib.util
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

pytest.importorskip("pdoc", reason='needs the extra docs: pip install -e ".[docs]"')
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def docs():
    loader = SourceFileLoader("site_of_docs", str(ROOT / ".ci" / "docs"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


def test_cross_references_become_names_that_can_be_linked(docs):
    text = "See :class:`~meadef_lightning.removal.NAD`, :meth:`~.DecoyTable.statistics` and ``x``.\n\nArgs:\n    a: :func:`f`."
    made = docs.google(text)
    assert "`meadef_lightning.removal.NAD`, `DecoyTable.statistics` and ``x``" in made
    assert "`f`" in made
    assert ":class:" not in made
    assert ":func:" not in made


def test_tables_keep_their_columns(docs):
    table = "====  ====\na     b\n====  ====\n1     2\n====  ===="
    assert docs.google(f"Text.\n\n{table}\n\nMore.") == f"Text.\n\n```text\n{table}\n```\n\nMore."
