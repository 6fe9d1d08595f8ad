"""One HTML file that needs no other: pictures as data URIs, no scripts, nothing from the net."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem 1rem .2rem 0; border-bottom: 1px solid #8884; vertical-align: top; }
img { max-width: 100%; image-rendering: pixelated; } img.smooth { image-rendering: auto; background: white; }
figure { display: inline-block; margin: .3rem; text-align: center; } figcaption { font-size: .8rem; }
pre { overflow-x: auto; background: #8882; padding: .8rem; } .row { display: flex; align-items: center; gap: 1rem; }
.row span { flex: 0 0 6rem; font-size: .85rem; } .row img { min-width: 0; }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(title: str, body: Iterable[str]) -> str:
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{_STYLE}</style>\n</head>\n<body>\n'
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{html.escape(text)}</h{level}>"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def code(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def folded(summary: str, inner: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>{inner}</details>"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    def cells(tag: str, row: Sequence[object]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) + "</tr>"

    return "<table>\n" + "\n".join([cells("th", head), *(cells("td", row) for row in rows)]) + "\n</table>"


def picture(png: bytes, what: str, *, smooth: bool = False) -> str:
    """`what` is for those who cannot see it."""
    kind = ' class="smooth"' if smooth else ""
    return f'<img{kind} alt="{html.escape(what)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def figure(png: bytes, caption: str) -> str:
    return f"<figure>{picture(png, caption)}<figcaption>{html.escape(caption)}</figcaption></figure>"


def row(label: str, png: bytes) -> str:
    return f'<div class="row"><span>{html.escape(label)}</span>{picture(png, label)}</div>'
