"""Sphinx: `make docs` builds this folder with warnings as errors and without a network."""

from importlib.metadata import version as installed

project = "spd-calib"
author = "the spd-calib maintainers"
version = release = installed("spd-calib")

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 3
html_theme = "furo"
html_title = "spd-calib"
html_extra_path = ["schemas"]  # the JSON Schemas, as files to download
exclude_patterns = ["schemas", "figures"]
nitpicky = True
