"""A figure to bytes: PNG, or SVG to stand within a page. The same figure gives the same bytes."""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.figure import Figure

from .figures import COLOURS, PLAN, QUIET

SVG = "http://www.w3.org/2000/svg"
XLINK = "{http://www.w3.org/1999/xlink}href"
STYLES: Any = {  # keys are literals to matplotlib's types
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "spd-calib",
    "text.parse_math": False,  # a name with dollars is no formula
    "font.size": 10,
    "axes.prop_cycle": "cycler(color=['black'])",  # no colour but those asked for
}
REFERENCE = re.compile(r"#([\w-]+)(?=\)|$)")
IN_PAGE = {colour.lower(): f"var(--{name})" for name, colour in [*COLOURS.items(), ("plan", PLAN), ("quiet", QUIET)]}
IN_PAGE["#000000"] = "currentColor"  # the page knows whether it is dark


def png(build: Callable[[], Figure]) -> bytes:
    """Return the figure that `build` makes as a PNG, 150 dots an inch."""
    image = io.BytesIO()
    with _styled():
        build().savefig(image, format="png", dpi=150, metadata={"Software": None})
    return image.getvalue()


def svg(build: Callable[[], Figure], name: str, *, title: str, description: str) -> str:
    """Return an <svg> element with text as text and the page's colours; `name` begins its ids, which must be unique."""
    drawn = io.BytesIO()
    with _styled():
        figure = build()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(drawn, format="svg", transparent=True, metadata=nothing)
    root = ElementTree.fromstring(drawn.getvalue())
    _keep_referenced_ids(root, name)
    for parent in root.iter():
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):  # a style here would be the whole page's
                parent.remove(child)
    for i, (tag, text) in enumerate({"title": title, "desc": description}.items()):
        element = ElementTree.Element(f"{{{SVG}}}{tag}", {"id": f"{name}-{tag}"})
        element.text = text
        root.insert(i, element)
    width = round(96 * figure.get_figwidth())
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-desc")
    root.set("style", f"max-width: {1.2 * width:.0f}px; min-width: {0.8 * width:.0f}px")
    ElementTree.register_namespace("", SVG)
    text = ElementTree.tostring(root, encoding="unicode")
    return re.sub("#[0-9a-f]{6}", lambda found: IN_PAGE.get(found[0], found[0]), text)


@contextmanager
def _styled() -> Iterator[None]:
    """Use our styles while this lasts: for building a figure and for drawing it, which makes the ticks' texts."""
    with rc_context(STYLES), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a browser has others
        yield


def _keep_referenced_ids(root: ElementTree.Element, name: str) -> None:
    """Remove ids that nothing refers to and let the others begin with `name`: matplotlib's repeat in every figure."""
    referenced = set()
    for element in root.iter():
        if XLINK in element.attrib:
            element.set("href", element.attrib.pop(XLINK))
        for key, value in element.attrib.items():
            if key == "href" or "url(#" in value:
                referenced.update(REFERENCE.findall(value))
                element.set(key, REFERENCE.sub(rf"#{name}-\1", value))
    for element in root.iter():
        if "id" in element.attrib:
            old = element.attrib.pop("id")
            if old in referenced:
                element.set("id", f"{name}-{old}")
