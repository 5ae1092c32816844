"""A survey to look at: one self-contained HTML file, and its plots as PNG and SVG files; and a verdict in tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .html import write_plots, write_report

__all__ = ["write_plots", "write_report"]


def __getattr__(name: str):
    # The tables of a verdict are shown by commands that draw nothing, and matplotlib takes a second to import.
    if name in __all__:
        from . import html

        return getattr(html, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
