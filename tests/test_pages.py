"""The page of an attack, a removal, a search or a scheme is its module's docstring: each says the same five things."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "meadef_lightning"
SHARED = {
    "extraction": {"bandit", "base", "datafree", "datafree_student", "pools", "rounds", "student"},
    "removal": {"base", "layers", "transforms"},
    "detection": {"base", "inputs"},
    "protection": set(),
}
"""Modules that are parts of several methods."""
MODULES = [path for room in SHARED for path in sorted((PACKAGE / room).glob("*.py")) if path.stem != "__init__"]
SECTIONS = (
    r"\*\*Source\.\*\*",
    r"\*\*Algorithm[.,]",
    r"\*\*(Cost|Budget)\.\*\*",
    r"\*\*Defaults\.\*\*",
    r"\*\*Pitfalls\.\*\*",
)


def docstring(path):
    return ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_every_page_says_where_from_how_at_what_cost_and_what_goes_wrong(path):
    text = docstring(path)
    if path.stem in SHARED[path.parent.name]:
        assert len(text) > 40
        return
    places = [re.search(section, text) for section in SECTIONS]
    assert all(places), [section for section, place in zip(SECTIONS, places, strict=True) if place is None]
    assert text.index("**Source") < text.index("**Algorithm") < text.index("**Pitfalls")
    assert not re.search(r"\bTODO\b|\bTBD\b", text)


def test_shared_modules_exist():
    assert all((PACKAGE / room / f"{name}.py").exists() for room, names in SHARED.items() for name in names)
