"""Light and dark: textual's themes, with colours of text that can be read on them."""

from __future__ import annotations

from dataclasses import replace

from textual.theme import BUILTIN_THEMES, Theme

DARK, LIGHT = "ksmtrace-dark", "ksmtrace-light"

# textual's own $text-muted is as bright as other text, its $text-warning and $accent are pale on
# the light theme. These have a contrast of 4.5 or more to every background here (tested).
_SAID = {
    DARK: {
        **{"said-muted": "#9e9e9e", "said-bar": "#ffa62b"},
        **{"said-good": "#8ad4a1", "said-warn": "#ffc473", "said-bad": "#e08fa3"},
        **{"block-cursor-background": "#00528f", "scrollbar": "#4f7391"},
    },
    LIGHT: {
        **{"said-muted": "#565656", "said-bar": "#004578"},
        **{"said-good": "#14602c", "said-warn": "#7a4600", "said-bad": "#7a273c"},
        **{"scrollbar": "#4f7391"},
    },
}


def themes() -> list[Theme]:
    """Return the two themes."""
    return [
        replace(
            BUILTIN_THEMES[of],
            name=name,
            variables={**BUILTIN_THEMES[of].variables, **_SAID[name]},
        )
        for name, of in ((DARK, "textual-dark"), (LIGHT, "textual-light"))
    ]
