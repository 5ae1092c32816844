"""A survey to look at: one self-contained HTML file, and its plots as PNG and SVG files."""

from .html import write_plots, write_report

__all__ = ["write_plots", "write_report"]
