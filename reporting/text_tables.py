"""Text as Markdown and as LaTeX, with what they would read as markup made plain; numbers rounded for reading.

table = TextTable("Accuracy", ["model", "n"], [["my_model", "3"]], note="n = seeds")
markdown_table(table), latex_table(table)
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

NONE = "–"  # noqa: RUF001 (an en dash is how a table says "nothing")

LATEX_FIT = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}"  # shrinks what is too wide

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",  # \textquotedbl needs another font encoding
    "–": "--",  # noqa: RUF001
    **{letter: f"\\{letter}" for letter in "#$%&_{}"},
}


@dataclass(frozen=True)
class TextTable:
    """Entries by row, shown as str() gives them. The first `names` columns are left-aligned, the others,
    numbers, right-aligned."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""
    names: int = 1


def single_line(text: str) -> str:
    """The text with every run of white space and control characters as one space."""
    return re.sub(
        r"[\s\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]+", " ", text
    ).strip()


def markdown(text: str) -> str:
    """The text with what Markdown or HTML would read as markup made plain."""
    plain = re.sub(r"([\\`*_\[\]<>|#~$!{}])", r"\\\1", single_line(text))
    return plain.replace("&", "&amp;")


def latex(text: str) -> str:
    """The text with what LaTeX would read as a command made plain."""
    return "".join(_LATEX.get(letter, letter) for letter in single_line(text))


def code_block(text: str, language: str = "sh") -> str:
    """A fenced block that the text cannot end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def markdown_table(table: TextTable) -> str:
    lines = [[markdown(str(entry)) for entry in row] for row in (table.header, *table.rows)]
    lines.insert(1, ["---"] * table.names + ["---:"] * (len(table.header) - table.names))
    text = "\n".join("| " + " | ".join(row) + " |" for row in lines)
    note = f"\n\n{markdown(table.note)}" if table.note else ""
    return f"**{markdown(table.title)}**\n\n{text}{note}"


def latex_table(table: TextTable) -> str:
    """A table environment by pandas, shrunk to the width of the text where it is wider."""
    rows = [[latex(str(entry)) for entry in row] for row in table.rows]
    frame = pd.DataFrame(rows, columns=[latex(one) for one in table.header])
    caption = latex(table.title) + (". " + latex(table.note) if table.note else "")
    columns = "l" * table.names + "r" * (len(table.header) - table.names)
    text = frame.to_latex(index=False, column_format=columns, caption=caption, position="htbp")
    text = text.replace(r"\caption", "\\centering\n\\caption")
    text = text.replace(r"\begin{tabular}", LATEX_FIT + r"{\begin{tabular}")
    return text.replace(r"\end{tabular}", r"\end{tabular}}")


def short(value: float) -> str:
    """About three digits: 0.0123, 1.23, 12.3, 123, 12,345; whole numbers as they are. A dash for NaN."""
    if math.isnan(value):
        return NONE
    size = abs(value)
    if value == round(value) or size >= 99.95:
        return f"{value:,.0f}"
    if size >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.995 else f"{value:#.3g}"


def p_is(value: float) -> str:
    """A p value in a sentence: "p = 0.25", "p < 0.0001"."""
    shown = short_p(value)
    return f"p {shown}" if shown.startswith("<") else f"p = {shown}"


def short_p(value: float) -> str:
    """A p value: 0.25, 0.0625, 0.00195, < 0.0001."""
    if math.isnan(value):
        return NONE
    return f"{value:.3g}" if value >= 1e-4 else "< 0.0001"
