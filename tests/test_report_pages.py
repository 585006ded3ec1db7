"""The explorer's data are those of the patterns that fit; its page and the report's work in a browser."""

import base64
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import told_by
from results_fixture import EXAMPLES, LAYERS, TEXT, pattern_arrays

from reporting.attention_explorer import LARGEST, explorer_data, explorer_page
from reporting.run_results import TaskFacts
from results_folder import AttentionPatterns, Cell

BOTH = "gravitational_multi_timescale"
NAMES = {"conventional": "Conventional", BOTH: "Both <b>", "gravitational": "Gravity"}
HEADS, TOKENS = 4, 40
HOSTILE = "</script><img src=x onerror=alert(1)>"
FACTS = {
    name: TaskFacts(name, title, None, None, None, None, {}, class_names=("min", HOSTILE))
    for name, title in (("listops", f"ListOps {HOSTILE}"), ("recall", "Recall"))
}


def arrays_of(model: str, number: int = 0) -> dict[str, np.ndarray]:
    return pattern_arrays(model, np.random.default_rng(number), heads=HEADS, longest_first=(TOKENS, 28, 17))


def patterns_of(*cells: tuple[str, str, int], **changes: np.ndarray) -> dict[Cell, AttentionPatterns]:
    """Random patterns of (task, model, seed)."""
    return {
        Cell(*cell): AttentionPatterns(**arrays_of(cell[1], number) | changes)
        for number, cell in enumerate(cells)
    }


def data_of(patterns: dict[Cell, AttentionPatterns], largest: int = LARGEST) -> dict[str, Any]:
    data = explorer_data(patterns, NAMES, FACTS, largest)
    assert data is not None
    return data


def unpacked(text: str, *shape: int) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).reshape(shape).astype(float)


def test_weights_and_masses_come_back_within_the_rounding_of_a_byte() -> None:
    patterns = patterns_of(("listops", BOTH, 0))
    [one] = patterns.values()
    (task,) = data_of(patterns)["tasks"]
    (model,) = task["models"]
    assert (model["layers"], model["timescales"], model["heads"]) == (LAYERS, 3, HEADS)
    weights = (unpacked(model["weights"], EXAMPLES, LAYERS, 3, HEADS, TOKENS, TOKENS) / 255) ** 2
    np.testing.assert_allclose(weights.swapaxes(0, 1), one.maps, atol=0.004)
    masses = 2 ** ((unpacked(model["masses"], EXAMPLES, LAYERS, 3, HEADS, TOKENS) - 128) / 32)
    assert one.key_mass is not None
    for number, length in enumerate(one.lengths):
        mine = one.key_mass[:, number, ..., :length]
        relative = np.clip(mine / mine.mean(-1, keepdims=True), 2.0**-4, 2.0**4)
        np.testing.assert_allclose(masses[number, ..., :length], relative, rtol=0.015)


def test_the_reach_is_the_distance_below_which_half_of_the_weight_lies() -> None:
    edges = np.array([0, 1, 2, 4, 8, 16])
    shares = np.full((LAYERS, 1, HEADS, 5), 0.2)  # at 0, 1, 2 to 3, 4 to 7, 8 to 15: half is reached below 4
    patterns = patterns_of(("recall", "conventional", 0), distance_edges=edges, distance_share=shares)
    [model] = data_of(patterns)["tasks"][0]["models"]
    assert model["reach"] == [[[4] * HEADS]] * LAYERS


def test_models_are_of_the_seed_and_the_examples_that_most_have_and_in_the_order_of_their_names() -> None:
    cells = (("listops", "gravitational", 4), ("listops", "gravitational", 2), ("listops", "conventional", 2))
    data = data_of(patterns_of(*cells))
    assert [model["name"] for model in data["tasks"][0]["models"]] == ["Conventional", "Gravity"]
    assert data["left_out"][0].endswith(": 1 of 2 seeds (seed 2 is shown)")
    other = patterns_of(("listops", "gravitational", 2), labels=np.full(EXAMPLES, 7))
    data = data_of(patterns_of(("listops", "conventional", 2)) | other)
    assert [model["name"] for model in data["tasks"][0]["models"]] == ["Conventional"]
    assert "Gravity (no patterns of these examples with seed 2)" in data["left_out"][0]


def test_what_does_not_fit_is_left_out_from_examples_over_tokens_to_models_and_said() -> None:
    patterns = patterns_of(("recall", "conventional", 0), ("recall", "gravitational", 0))
    seen = []
    for largest in (LARGEST, 45_000, 30_000, 20_000, 3_000, 100):
        data = data_of(patterns, largest)
        for task in data["tasks"]:
            assert sum(len(model["weights"] + model["masses"]) for model in task["models"]) <= largest
        shape = [(len(task["models"]), len(task["examples"]), task["tokens"]) for task in data["tasks"]]
        seen.append((shape, data["left_out"]))
    cut = "2 of 3 examples; the tokens after the first"
    assert seen == [
        ([(2, 3, 40)], []),
        ([(2, 2, 40)], ["Recall: 1 of 3 examples"]),
        ([(2, 1, 40)], ["Recall: 2 of 3 examples"]),
        ([(2, 1, 32)], [f"Recall: {cut} 32"]),
        ([(1, 1, 16)], [f"Recall: {cut} 16; Gravity (too large)"]),
        ([], [f"Recall: {cut} 16; Conventional, Gravity (too large)"]),
    ]


def test_tasks_share_the_room_and_without_patterns_there_is_nothing_to_explore() -> None:
    tasks = data_of(patterns_of(*((task, "conventional", 0) for task in FACTS)), 42_000)["tasks"]
    assert [len(task["examples"]) for task in tasks] == [2, 2]
    assert "attention-explorer" not in explorer_page("Nothing", {}, NAMES, FACTS)


ACT = """
addEventListener("load", async () => {
  const root = document.getElementById("attention-explorer"), steps = {};
  while (!("ready" in root.dataset)) await new Promise(done => setTimeout(done, 50));
  const all = name => Array.from(root.querySelectorAll(name));
  const texts = name => all(name).map(one => one.textContent);
  const tokens = number => Array.from(all(".tokens")[number].children);
  const shade = (number, name) => tokens(number).map(one => Number(one.style.getPropertyValue(name)));
  const note = what => steps[what] = { readouts: texts(".readout"), facts: texts(".facts"),
    strips: texts(".strips li"), hidden: all(".body").map(one => one.hidden),
    selected: [0, 1].map(number => tokens(number).findIndex(one => one.ariaSelected === "true")) };
  const act = (target, Kind, name, more) => target.dispatchEvent(new Kind(name, { bubbles: true, ...more }));
  const choose = (name, value) => {
    const select = root.querySelector(`[name=${name}]`);
    select.value = value;
    act(select, Event, "change");
  };
  const hover = number => act(tokens(0)[number], PointerEvent, "pointerover");
  const click = number => act(tokens(0)[number], MouseEvent, "click");
  const press = key => act(document.activeElement, KeyboardEvent, "keydown", { key });
  note("start");
  for (const wanted of [["example", 1], ["layer", 0], ["head", 2], ["timescale", 1]]) choose(...wanted);
  hover(5);
  note("hovered");
  const given = shade(0, "--given"), received = shade(0, "--received");
  const heavy = [0, 1].map(number => shade(number, "--heavy"));
  click(5);
  hover(9);
  note("held");
  click(5);
  hover(9);
  note("let go");
  tokens(0)[9].focus();
  press("ArrowRight");
  note("right");
  press("Home");
  press("ArrowLeft");
  note("home");
  const tabbable = tokens(0).filter(one => one.tabIndex === 0).length, said = tokens(0)[1].ariaLabel;
  choose("model1", -1);
  note("alone");
  choose("model1", 0);
  choose("example", 0);
  note("same");
  const options = all("select").map(select => Array.from(select.options, one => one.textContent));
  const map = root.querySelector(".map canvas"), size = map.width;
  const { data } = map.getContext("2d").getImageData(0, 0, size, size);
  const inked = data.filter((value, place) => place % 4 === 3 && value > 0).length;
  tell({ steps, given, received, heavy, tabbable, said, options, inked, size });
});
"""
SORT = """
addEventListener("load", () => {
  const column = (table, place) => Array.from(table.tBodies[0].rows, row => row.cells[place].textContent);
  const sorted = [];
  for (const table of document.querySelectorAll("table:has(th button)"))
    for (const heading of table.tHead.rows[0].cells) {
      const button = heading.querySelector("button"), seen = { numeric: heading.className === "number" };
      for (const order of ["ascending", "descending"]) {
        button.click();
        if (heading.ariaSort !== order) errors.push(`${heading.textContent} is not ${order}`);
        seen[order] = column(table, heading.cellIndex);
      }
      sorted.push(seen);
    }
  tell({ sorted });
});
"""


@pytest.fixture(scope="module")
def explored() -> dict[Cell, AttentionPatterns]:
    """Two models, one example of which has markup for a token."""
    symbols = arrays_of("conventional")["symbols"].astype("<U60")
    symbols[0, 1] = HOSTILE
    return patterns_of(("listops", "conventional", 0), ("listops", BOTH, 0), symbols=symbols)


@pytest.fixture(scope="module")
def explorer(explored: dict[Cell, AttentionPatterns]) -> str:
    return explorer_page(f"One run {HOSTILE}", explored, NAMES, FACTS)


@pytest.fixture(scope="module")
def report(holed: Path) -> str:
    return (holed / "analysis" / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def told(explorer: str, report: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the scripts told, by page."""
    pages = {"explorer.html": (explorer, ACT), "report.html": (report, SORT)}
    return told_by(pages, tmp_path_factory.mktemp("browser"))


@pytest.fixture(scope="module")
def seen(told: dict[str, Any]) -> Any:
    """What the explorer's script saw."""
    return told["explorer.html"]


def test_nothing_goes_wrong_and_a_phone_of_400_pixels_has_room(told: dict[str, Any]) -> None:
    for page in told.values():
        assert page["errors"] == []
        assert page["needed"] <= page["width"] == 400


def test_hostile_texts_stay_texts_and_nothing_is_loaded(explorer: str) -> None:
    assert "<img" not in explorer and explorer.count("</script>") == 2
    assert not re.search(r"https?:|fetch\(|import\(|\bsrc=|innerHTML|url\(", explorer.replace("src=x", ""))


def test_a_hovered_token_says_and_shades_where_it_looks_and_who_looks_at_it(
    seen: Any, explored: dict[Cell, AttentionPatterns]
) -> None:
    readouts, letters = seen["steps"]["hovered"]["readouts"], TEXT.replace(" ", "␣")
    conventional, both = explored.values()
    # example 2, layer 1, head 3, token 6; the first model has one timescale, the other's second is chosen
    maps = {"Conventional": conventional.maps[0, 1, 0, 2], "Both <b>": both.maps[0, 1, 1, 2]}
    for (name, weights), said in zip(maps.items(), readouts, strict=True):
        most, least = (int(line.argmax()) for line in (weights[5], weights[:, 5]))
        assert said.startswith(f"{name}: “{letters[5]}” (6) looks at “{letters[most]}” ({most + 1}) ")
        assert f"It is looked at by “{letters[least]}” ({least + 1}) " in said
        shown = re.findall(r"\) ([\d.]+)\xa0%", said)
        for found, share in ((shown[0], weights[5, most]), (shown[3], weights[least, 5])):
            assert float(found) == pytest.approx(100 * share, abs=1.5)
    weights = maps["Conventional"][: len(seen["given"]), : len(seen["given"])]
    np.testing.assert_allclose(np.array(seen["given"]) ** 2, weights[5], atol=0.005)
    np.testing.assert_allclose(np.array(seen["received"]) ** 2, weights[:, 5], atol=0.005)
    plain, heavy = seen["heavy"]  # the first model has no masses
    assert set(plain) == {0} and len(set(heavy)) > 5
    assert "mass" not in readouts[0] and re.search(r"Its mass is \d\.\d\d times the mean", readouts[1])


def test_choices_say_what_is_shown_and_timescales_how_far_they_reach(seen: Any) -> None:
    start, chosen = seen["steps"]["start"], seen["steps"]["hovered"]
    assert start["facts"][1].startswith("Layer 2 of 2, mean of 4 heads, mean of 3 timescales. ")
    assert chosen["facts"][0].startswith("Layer 1 of 2, head 3 of 4. ")
    wrong = f"Its answer: min, wrong: it is {HOSTILE}."
    assert chosen["facts"][1] == f"Layer 1 of 2, head 3 of 4, timescale 2 of 3. {wrong}"
    strips = [f"head {number}" for number in (1, 2, 3, 4)] + [f"timescale {number}" for number in (1, 2, 3)]
    for name, text in zip(strips, chosen["strips"], strict=True):
        assert re.fullmatch(rf"{name}: \d+ \([\d.]+\)", text)
    *_, of_timescale, _, of_other_model = seen["options"]
    assert of_timescale == ["mean of 1"]  # beside itself, the first model has one
    assert of_other_model == ["nothing", "Conventional", "Both <b>"]
    assert seen["inked"] > 100 and seen["size"] == TOKENS
    assert [seen["steps"][what]["hidden"] for what in ("start", "alone")] == [[False, False], [False, True]]
    first, second = seen["steps"]["same"]["readouts"]
    assert first == second and first.startswith("Conventional")


def test_a_click_holds_a_token_another_lets_go_and_arrow_keys_stop_at_the_ends(seen: Any) -> None:
    for what, token in (("held", 5), ("let go", 9), ("right", 10), ("home", 0)):
        assert seen["steps"][what]["selected"] == [token, token]
    assert seen["tabbable"] == 1 and seen["said"] == f"{TEXT[1]}, token 2 of 28"


def test_every_figure_of_a_report_loads_or_is_led_to(told: dict[str, Any], report: str, holed: Path) -> None:
    led_to = re.findall(r'<a href="(figures/[^"]+)">', report)
    figures = {f"figures/{path.name}" for path in (holed / "analysis" / "figures").glob("*.png")}
    assert {*led_to} < figures and len(led_to) == 4
    images = told["report.html"]["images"]
    assert len(images) == len(figures) - len(led_to) and all(images)


def test_each_column_of_numbers_sorts_both_ways_with_what_is_missing_last(told: dict[str, Any]) -> None:
    columns = told["report.html"]["sorted"]
    numeric = [column for column in columns if column["numeric"]]
    assert len(numeric) > 20
    for column in numeric:
        for order in ("ascending", "descending"):
            found = [re.search(r"[-+]?\d+(\.\d+)?", text.replace(",", "")) for text in column[order]]
            numbers = [float(one[0]) for one in found if one]
            assert numbers == sorted(numbers, reverse=order == "descending")
            assert all(found[: len(numbers)])
    names = next(column for column in columns if not column["numeric"])
    assert names["ascending"] == sorted(names["ascending"]) == names["descending"][::-1]


def test_a_report_has_the_explorer_of_its_tasks_and_models(report: str) -> None:
    found = re.search(r'id="attention-explorer-data">(.+?)</script>', report)
    assert found
    (task,) = json.loads(found[1])
    names = [model["name"] for model in task["models"]]
    assert names == ["Conventional", "Multi-timescale", "Gravitational multi-timescale"]
