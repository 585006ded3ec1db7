"""A report as Markdown: report.md, whose figures are the files in figures/.

    text = markdown_report(blocks)

See report_blocks.py for the blocks. Everything a folder's files say is escaped.
"""

from collections.abc import Sequence

from reporting.report_blocks import Block, Bullets, Code, Facts, FigureNote, Heading, Notice, Paragraph
from reporting.text_tables import code_block, markdown, markdown_table


def markdown_report(blocks: Sequence[Block]) -> str:
    return "\n\n".join(map(_markdown_block, blocks)) + "\n"


def _markdown_block(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {markdown(text)}"
        case Paragraph(text, lead):
            return " ".join(filter(None, [lead and f"**{markdown(lead)}**", markdown(text)]))
        case Notice(lead, text):
            return f"> **{markdown(lead)}** {markdown(text)}"
        case Bullets(entries):
            return "\n".join(f"- {markdown(entry)}" for entry in entries)
        case Facts(entries):
            return "\n".join(f"- {markdown(name)}: {markdown(value)}" for name, value in entries)
        case Code(text, language):
            return code_block(text, language)
        case FigureNote(stem, title, caption):
            image = f"![{markdown(title)}](figures/{stem}.png)"
            return f"{image}\n\n**{markdown(title)}.** {markdown(caption)}"
        case table:
            return markdown_table(table)
