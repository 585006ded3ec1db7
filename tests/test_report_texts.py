"""Each folder's report reads right, and the page and the Markdown say the same."""

import html
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from results_fixture import MODELS, make_results, put, report_of, rewrite, rows_of, write_rows

import data_pipeline
from analyze_results import analyze
from experiment import models
from reporting import glossary
from reporting.lra_literature import comparable
from reporting.text_tables import short
from results_folder import Cell, read_results

pytestmark = pytest.mark.usefixtures("texts_alone")


def analysed(root: Path) -> str:
    analyze(root)
    return report_of(root)


def page_of(root: Path) -> str:
    return (root / "analysis" / "report.html").read_text(encoding="utf-8")


def main_of(root: Path) -> str:
    """What is between <main> and </main>."""
    return page_of(root).split("<main>")[1].split("</main>")[0]


def words(text: str) -> list[str]:
    """What a reader sees, without markup and case of white space."""
    return re.findall(r"[\w.%+]+", text)


def test_the_page_and_the_markdown_say_the_same(tmp_path: Path) -> None:
    states = {Cell("listops", "gravitational", 1): "failed", Cell("listops", "conventional", 2): "missing"}
    text = analysed(make_results(tmp_path, tasks=("listops", "imdb"), states=states, patterns=False))
    main = re.sub(r"<[^>]+>", " ", main_of(tmp_path))
    plain = re.sub(r"^```(sh)?$|^\| [-:| ]+\|$|</?(details|summary)>", " ", text, flags=re.MULTILINE)
    plain = plain.replace("\\", "")
    assert words(html.unescape(main)) == words(html.unescape(plain))


def test_what_a_folder_says_is_escaped_wherever_it_stands_and_the_page_is_whole_in_itself(
    tmp_path: Path,
) -> None:
    mark = "<script>'</script>&amp;*b*|c\\d`e`$f_g$"
    shown = r"\<script\>'\</script\>&amp;amp;\*b\*\|c\\d\`e\`\$f\_g\$"
    states = {Cell("listops", mark, 1): "failed"}
    models, gone = ("conventional", mark), {mark: mark}
    root = make_results(tmp_path, models=models, states=states, epochs=1, unavailable=gone, patterns=False)
    for name in ("config.json", "environment.json"):
        rewrite(root / name, created=mark, device_name=mark, command="python x")
    text, page = analysed(root), page_of(root)
    assert text.count(shown) >= 10 and mark not in text.replace(shown, "")
    assert page.count(html.escape(mark).replace("&#x27;", "&#39;")) >= 10
    assert page.count("<script>") == page.count("</script>") == 1
    assert "<img" not in page and set(re.findall(r'(?:src|href)="(.)', page)) == {"#"}
    assert "default-src 'none'" in page and "http" not in re.sub("http-equiv", "", page)
    assert "attention-explorer" not in page  # without patterns there is nothing to explore
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):  # no name adds a column
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


def test_every_model_and_task_is_explained_in_a_line_but_those_of_somebody_s_own(tmp_path: Path) -> None:
    assert (set(glossary.MODELS), set(glossary.TASKS)) == (set(models.MODELS), set(data_pipeline.TASKS))
    own = "my_module:MyAttention"
    root = make_results(tmp_path, models=("gravitational,softening=0.01", own), patterns=False)
    for text in (analysed(root), main_of(root)):
        assert glossary.MODELS["gravitational"] in text and text.count(glossary.TASKS["listops"]) == 2
    assert f"MyAttention: {glossary.MODELS['conventional']}" not in report_of(root)


def test_predictions_of_a_token_task_are_counted_as_such(tmp_path: Path) -> None:
    root = make_results(tmp_path, tasks=("hold",), models=MODELS[:2], seeds=(4,), patterns=False, epochs=1)
    text = analysed(root)
    assert "The 2,000 test examples alone leave each accuracy a standard error of about 1.1 points." in text
    assert "- seeds: 4 (n = 1)" in text
    put(root / "config.json", "task_info hold test_predictions", 250_000)
    text = analysed(root)
    assert "2,000 test examples; 250,000 predictions in them" in text
    assert "The 250,000 test predictions alone leave each accuracy a standard error of at least 0.1" in text


def test_cells_without_patterns_are_named_once_for_each_reason(tmp_path: Path) -> None:
    root = make_results(tmp_path, models=MODELS[:3], seeds=(0,), epochs=1)
    for model in MODELS[:2]:
        (Cell("listops", model, 0).folder(root) / "attention_patterns.npz").unlink()
    said = re.findall("^Without attention patterns: (.*)$", analysed(root).replace("\\", ""), re.MULTILINE)
    cells = "listops/conventional/seed0, listops/gravitational/seed0"
    assert said == [f"{cells} (there is no attention_patterns.npz)."]


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        *[({}, True), ({"preset": "quick"}, False), ({"data": {"max_length": 1000}}, False)],
        *[({"data": {"train_size": 600}}, False), ({"data": {"tokenizer": "word"}}, False)],
    ],
)
def test_published_figures_are_beside_full_runs(options: dict[str, Any], shown: bool, tmp_path: Path) -> None:
    small: dict[str, Any] = {"models": MODELS[:1], "seeds": (0,), "patterns": False, "epochs": 1}
    root = make_results(tmp_path, tasks=("listops", "imdb"), **small, **options)
    for task, percent in (("listops", 36.37), ("imdb", 64.27)):
        found = [round(100 * one.accuracy, 2) for one in comparable(read_results(root), task)]
        assert (percent in found) == shown
    if shown:
        text = analysed(root)
        assert "google-research/long-range-arena" in text and "36.37" in text
        assert "Published Transformers of the Long Range Arena reach 36.4 to 38.4 %" in text


def test_three_seeds_have_the_means_of_the_tidy_table_their_number_and_a_caution(tmp_path: Path) -> None:
    root = make_results(tmp_path, models=MODELS[:2], patterns=False)
    rewrite(Cell("listops", "conventional", 1).folder(root) / "result.json", best_epoch=None)
    for seed in range(3):
        folder = Cell("listops", "gravitational", seed).folder(root)
        write_rows(folder, [row | {"val_accuracy": 0.1} for row in rows_of(folder)])
    text = analysed(root)
    assert "Sign flips, which assume nothing, do not show it with 3 seeds." in text
    assert re.search(r"^\| Conventional \| 3 \|.*\| 6 \(n = 2\) \|", text, re.MULTILINE)
    table = pd.read_csv(root / "analysis" / "summary.csv")
    spent = table[(table["model"] == "conventional") & (table["metric"] == "seconds_to_target")]["value"]
    [row] = [line for line in text.splitlines() if line.startswith("| Conventional | 3 | 3 of 3 |")]
    assert len(spent) == 3 and re.search(rf"\| {re.escape(short(spent.mean()))} (\||\\\[)", row)
    who = r"Conventional \d epochs; Gravitational never in 6 epochs\."
    assert re.search(rf"- To a validation accuracy of \d\d\.\d %, median over seeds: {who}", text)
    assert "| Gravitational | 3 | 0 of 3 | more than 6 | 0, 3, 0 | 0.25 | 0.25 | – | – |" in text  # noqa: RUF001
