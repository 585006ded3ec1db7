"""The page around a report: its look on a screen, on a phone, in the dark and on paper, and its one script.

    text = page(title="Comparison", links='<a href="#tables">Tables</a>', body="<p>...</p>")

The arguments are HTML already. Figures keep a white ground in the dark: their colours are made for it.
"""

from string import Template

STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1b1b1b; --faint: #5a5a5a; --line: #d5d5d5;
  --shade: #f4f4f2; --link: #0057a8; --warn: #fff3d6; --warn-line: #c98a00; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #16181b; --ink: #e6e6e3; --faint: #a5a8ab; --line: #3a3e43; --shade: #1f2226;
    --link: #7db8f0; --warn: #3a2f12; --warn-line: #e0aa3a; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1rem 1rem 4rem; max-width: 62rem; background: var(--ground);
  color: var(--ink); font: 1rem/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; font-size: 1.3rem; }
h3 { margin-top: 1.8rem; font-size: 1.08rem; }
a { color: var(--link); }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; }
nav a { padding: .3rem 0; }
ul { padding-left: 1.2rem; }
li { margin: .25rem 0; }
dl { display: grid; grid-template-columns: minmax(6rem, 11rem) 1fr; gap: .3rem 1rem; margin: 1rem 0; }
dt { color: var(--faint); }
dd { margin: 0; min-width: 0; }
.notice { background: var(--warn); border-left: 4px solid var(--warn-line); padding: .6rem .8rem; }
.note, figcaption { color: var(--faint); font-size: .88rem; }
.note { margin: .3rem 0 0; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; min-width: 60%; }
.title { font-weight: 600; margin: 1.4rem 0 .3rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: bottom; }
th.number, td.number { text-align: right; }
th.name, td.name { text-align: left; }
td.name { overflow-wrap: break-word; min-width: 6rem; max-width: 22rem; }
td.number { white-space: nowrap; }
thead th { border-bottom: 2px solid var(--ink); background: var(--shade); }
th button { all: unset; cursor: pointer; font-weight: 600; width: 100%; min-height: 1.8rem; }
th button:focus-visible { outline: 2px solid var(--link); }
th[aria-sort=ascending] button::after { content: " \\25b2"; }
th[aria-sort=descending] button::after { content: " \\25bc"; }
pre { overflow-x: auto; background: var(--shade); padding: .8rem; overflow-wrap: normal; }
figure { margin: 1.8rem 0; }
.paper { overflow-x: auto; background: #fff; border: 1px solid var(--line); padding: .4rem; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { margin-top: .5rem; }
/* On a phone a figure keeps a legible size and is pushed aside with a finger. */
@media (max-width: 640px) {
  img { max-width: none; width: max(100%, 34rem); }
  dl { display: block; }
  dd { margin: 0 0 .5rem; }
}
@media print {
  :root { --ground: #fff; --ink: #000; --faint: #333; --line: #999; --shade: #fff; --link: #000;
    --warn: #fff; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  h2, h3, .title { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  img { max-width: 100%; max-height: 20cm; width: auto; }
  .table, .paper, pre { overflow: visible; }
  table { font-size: 8pt; }
  td.number { white-space: normal; }
  pre { white-space: pre-wrap; }
}
"""

# A cell sorts by its first number where the column is one of numbers; what is none comes last either way.
SCRIPT = """
"use strict";
function keyOf(row, column, numeric) {
  const text = row.cells[column].textContent.trim();
  if (!numeric) return text;
  const found = text.replace(/,/g, "").match(/[-+]?\\d+(\\.\\d+)?(e[-+]?\\d+)?/i);
  return found ? Number(found[0]) : NaN;
}
function sortBy(heading) {
  const table = heading.closest("table"), column = heading.cellIndex;
  const numeric = heading.classList.contains("number");
  const down = heading.getAttribute("aria-sort") === "ascending";
  const rows = Array.from(table.tBodies[0].rows, row => [keyOf(row, column, numeric), row]);
  rows.sort(([a], [b]) => {
    if (!numeric) return (down ? -1 : 1) * a.localeCompare(b, "en", { numeric: true });
    if (isNaN(a) || isNaN(b)) return isNaN(a) - isNaN(b);
    return down ? b - a : a - b;
  });
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  table.tBodies[0].append(...rows.map(([, row]) => row));
}
for (const button of document.querySelectorAll("th button"))
  button.addEventListener("click", () => sortBy(button.parentElement));
"""

PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<title>$title</title>
<style>$style</style>
</head>
<body>
<nav aria-label="Sections">
$links
</nav>
<main>
$body
</main>
<script>$script</script>
</body>
</html>
""")


def page(*, title: str, links: str, body: str) -> str:
    return PAGE.substitute(title=title, links=links, body=body, style=STYLE, script=SCRIPT)
