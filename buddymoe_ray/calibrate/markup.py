"""Markup that is well-formed whatever the text in it: elements, tables, and pictures of matrices.

Knows no profile. Invariant: text is escaped, characters that XML forbids are replaced, nothing refers to another file.
"""

from __future__ import annotations

import base64
import html
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Markup", "element", "escape", "picture", "table"]


class Markup(str):
    """Text that is markup already."""


def escape(text: str) -> str:
    """Text as markup shows it."""
    allowed = (
        ch if ch in "\t\n" or " " <= ch <= "\ud7ff" or "\ue000" <= ch <= "\ufffd" or ch > "\uffff" else "\ufffd"
        for ch in text
    )
    return html.escape("".join(allowed), quote=True)


def element(tag: str, /, *content: str, **attributes: object) -> Markup:
    """`<tag attributes>content</tag>`. Content that is not Markup is escaped; `stroke_width` becomes stroke-width."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items()
    )
    inner = "".join(part if isinstance(part, Markup) else escape(part) for part in content)
    return Markup(f"<{tag}{written}>{inner}</{tag}>" if content else f"<{tag}{written}/>")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, marked: int | None = None) -> Markup:
    """A table whose first column names the row; row `marked` stands out."""
    top = element("tr", *(element("th", name, scope="col") for name in head))
    body = []
    for at, row in enumerate(rows):
        cells = [element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])]
        body.append(element("tr", *cells, **({"class": "marked"} if at == marked else {})))
    whole = element("table", element("thead", top), element("tbody", *body))
    return element("div", whole, class_="wide")


def picture(levels: npt.NDArray[np.uint8], colours: Sequence[tuple[int, ...]], *, alt: str, size: int) -> Markup:
    """A matrix of levels (0 to 15) as an inline PNG with a palette of up to 16 colours, `size` pixels on screen."""
    rows, columns = levels.shape
    wide = np.zeros((rows, columns + columns % 2), dtype=np.uint8)
    wide[:, :columns] = levels
    packed = wide[:, ::2] << 4 | wide[:, 1::2]  # two pixels a byte
    raw = np.concatenate([np.zeros((rows, 1), np.uint8), packed], axis=1).tobytes()  # each row led by "no filter"
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", columns, rows, 4, 3, 0, 0, 0)),
        (b"PLTE", b"".join(bytes(colour) for colour in colours)),
        (b"IDAT", zlib.compress(raw, 9)),
        (b"IEND", b""),
    )
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data)) for tag, data in chunks
    )
    source: dict[str, Any] = {"src": "data:image/png;base64," + base64.b64encode(png).decode(), "alt": alt}
    return element("img", **source, width=size, height=size)
