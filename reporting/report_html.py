"""A report as one self-contained page: report.html, with its figures inside and nothing from the network.

    text = html_report(blocks, folder / "figures")

See report_blocks.py for the blocks. Everything a folder's files say is escaped, and the page forbids itself
(Content-Security-Policy) to load anything. Templates of the standard library: eight kinds of block do not
need a template engine. How the page looks and sorts is in report_page.py.
"""

import base64
import struct
from collections.abc import Sequence
from html import escape
from pathlib import Path

from reporting.report_blocks import Block, Bullets, Code, Facts, FigureNote, Heading, Notice, Paragraph
from reporting.report_page import page
from reporting.text_tables import TextTable, one_line

FIGURE_DPI = 150  # of the PNG files, figure_style.py
CSS_DPI = 96


def html_report(blocks: Sequence[Block], figures: Path) -> str:
    """`figures`: the folder of the PNG files that the blocks name."""
    title = next((block.text for block in blocks if isinstance(block, Heading)), "Report")
    sections = [block for block in blocks if isinstance(block, Heading) and block.level == 2]
    links = "\n".join(f'<a href="#{_anchor(block)}">{_text(block.text)}</a>' for block in sections)
    body = "\n".join(_html_block(block, figures) for block in blocks)
    return page(title=_text(title), links=links, body=body)


def _text(text: str) -> str:
    return escape(one_line(text))


def _anchor(heading: Heading) -> str:
    return "".join(
        letter if letter.isascii() and letter.isalnum() else "-" for letter in heading.text.lower()
    )


def _html_block(block: Block, figures: Path) -> str:
    match block:
        case Heading(level, text):
            anchor = f' id="{_anchor(block)}"' if level == 2 else ""
            return f"<h{level}{anchor}>{_text(text)}</h{level}>"
        case Paragraph(text, lead):
            return f"<p>{_led(lead, text)}</p>"
        case Notice(lead, text):
            return f'<p class="notice">{_led(lead, text)}</p>'
        case Bullets(entries):
            return "<ul>\n" + "\n".join(f"<li>{_text(entry)}</li>" for entry in entries) + "\n</ul>"
        case Facts(entries):
            pairs = (f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in entries)
            return "<dl>\n" + "\n".join(pairs) + "\n</dl>"
        case Code(text, _):
            return f"<pre><code>{escape(text)}</code></pre>"
        case FigureNote():
            return _html_figure(block, figures)
        case table:
            return _html_table(table)


def _led(lead: str, text: str) -> str:
    return " ".join(filter(None, [lead and f"<strong>{_text(lead)}</strong>", _text(text)]))


def _html_table(table: TextTable) -> str:
    """Each heading is a button that sorts by its column; numbers are aligned on the right."""
    kinds = ["name" if column < table.names else "number" for column in range(len(table.header))]
    head = "".join(
        f'<th scope="col" class="{kind}"><button type="button">{_text(entry)}</button></th>'
        for kind, entry in zip(kinds, table.header, strict=True)
    )
    rows = [
        "".join(f'<td class="{kind}">{_text(entry)}</td>' for kind, entry in zip(kinds, row, strict=True))
        for row in table.rows
    ]
    body, title = "\n".join(f"<tr>{row}</tr>" for row in rows), _text(table.title)
    note = f'\n<p class="note">{_text(table.note)}</p>' if table.note else ""
    return (
        f'<p class="title">{title}</p>\n<div class="table"><table aria-label="{title}">\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>{note}"
    )


def _html_figure(note: FigureNote, figures: Path) -> str:
    """The PNG as it is in figures/, shown at the size it was drawn for and never wider than the page."""
    data = (figures / f"{note.stem}.png").read_bytes()
    width, height = (round(size * CSS_DPI / FIGURE_DPI) for size in struct.unpack(">II", data[16:24]))
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    image = f'<img width="{width}" height="{height}" alt="{_text(note.title)}" src="{source}">'
    caption = f"<figcaption><strong>{_text(note.title)}.</strong> {_text(note.caption)}</figcaption>"
    return f'<figure>\n<div class="paper">{image}</div>\n{caption}\n</figure>'
