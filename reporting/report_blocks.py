"""What a report is made of, whatever it is written as: headings, paragraphs, lists, tables, figures, code.

    blocks = [Heading(1, "Comparison"), Paragraph("n = 3 throughout."), Bullets(["preset: full"])]

`analysis_report.py` makes the blocks, `report_markdown.py` and `report_html.py` write them, so that each
sentence and each number is made once. Every text is plain: whoever writes a block escapes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from reporting.text_tables import TextTable


@dataclass(frozen=True)
class Heading:
    """level: 1 for the title, 2 for a section, 3 within one."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """lead: its first words, in bold."""

    text: str
    lead: str = ""


@dataclass(frozen=True)
class Notice:
    """A warning that must not be overlooked; lead: its first words, in bold."""

    lead: str
    text: str


@dataclass(frozen=True)
class Bullets:
    entries: Sequence[str]


@dataclass(frozen=True)
class Facts:
    """What is known, by name."""

    entries: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Code:
    text: str
    language: str = "sh"


@dataclass(frozen=True)
class FigureNote:
    """A figure in figures/, by the stem of its two files, and how to read it."""

    stem: str
    title: str
    caption: str


Block = Heading | Paragraph | Notice | Bullets | Facts | Code | TextTable | FigureNote
