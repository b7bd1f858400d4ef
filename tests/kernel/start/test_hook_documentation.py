"""docs/hooks.md says what the code says."""

from __future__ import annotations

from kernel_core.registry import HOOKS
from kernel_core.testing import hook_docs


def test_the_document_is_fresh():
    fresh = hook_docs.TARGET.read_text() == hook_docs.document()
    assert fresh, "docs/hooks.md is stale: python -m kernel_core.testing.hook_docs"


def test_every_hook_is_documented_with_home_composition_and_sentences():
    sections = dict(part.split("\n", 1) for part in hook_docs.document().split("\n## ")[1:])
    for name, hook in HOOKS.items():
        text = sections[name]
        assert f"Home: {', '.join(hook.parts)}. Composes: {hook.composes}." in text
        assert len(text.split("Composes:")[1].split(".\n\n", 1)[1].split()) >= 4, name


def test_there_are_not_too_many_hooks():
    print(f"hooks: {len(HOOKS)}")
    assert len(HOOKS) <= 26
