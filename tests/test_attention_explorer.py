"""The explorer's data are those of the patterns that fit; its page shows them to eye, hand and ear."""

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

from reporting.attention_explorer import LARGEST, TEMPLATES, explorer_data, explorer_page
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


def test_tasks_share_the_room() -> None:
    tasks = data_of(patterns_of(*((task, "conventional", 0) for task in FACTS)), 42_000)["tasks"]
    assert [len(task["examples"]) for task in tasks] == [2, 2]
    assert len(json.dumps(tasks)) < 50_000


def test_without_patterns_there_is_nothing_to_explore() -> None:
    assert explorer_data({}, NAMES, FACTS) is None
    assert "attention-explorer" not in explorer_page("Nothing", {}, NAMES, FACTS)


CELLS = tuple(("listops", model, 0) for model in ("conventional", BOTH))
ACT = """<script>
addEventListener("load", async () => {
  const root = document.getElementById("attention-explorer"), steps = {};
  while (!("ready" in root.dataset)) await new Promise(done => setTimeout(done, 50));
  const all = name => Array.from(root.querySelectorAll(name));
  const tokens = number => Array.from(root.querySelectorAll(".tokens")[number].children);
  const style = (made, name) => Number(made.style.getPropertyValue(name));
  const texts = name => all(name).map(one => one.textContent);
  const note = what => steps[what] = { readouts: texts(".readout"), facts: texts(".facts"),
    strips: texts(".strips li"), hidden: all(".body").map(one => one.hidden),
    selected: [0, 1].map(number => tokens(number).findIndex(one => one.ariaSelected === "true")),
    focused: tokens(0).indexOf(document.activeElement) };
  const act = (target, event) => target.dispatchEvent(event);
  const choose = (name, value) => {
    const select = root.querySelector(`[name=${name}]`);
    select.value = value;
    act(select, new Event("change", { bubbles: true }));
  };
  const hover = number => act(tokens(0)[number], new PointerEvent("pointerover", { bubbles: true }));
  const click = number => act(tokens(0)[number], new MouseEvent("click", { bubbles: true }));
  const press = key => act(document.activeElement, new KeyboardEvent("keydown", { key, bubbles: true }));
  note("start");
  for (const wanted of [["example", 1], ["layer", 0], ["head", 2], ["timescale", 1]]) choose(...wanted);
  hover(5);
  note("hovered");
  const shades = tokens(0).map(one => [style(one, "--given"), style(one, "--received")]);
  const heavy = [0, 1].map(number => tokens(number).map(one => style(one, "--heavy")));
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
  const tabbable = tokens(0).filter(one => one.tabIndex === 0).length;
  const said = tokens(0)[1].ariaLabel, roles = tokens(0)[1].getAttribute("role");
  choose("model1", -1);
  note("alone");
  choose("model1", 0);
  choose("example", 0);
  note("same");
  const words = select => Array.from(select.options, one => one.textContent);
  const options = Object.fromEntries(all("select").map(one => [one.name, words(one)]));
  const names = all("select").map(one => one.labels.length);
  const map = root.querySelector(".map canvas"), size = map.width;
  const drawn = map.getContext("2d").getImageData(0, 0, size, size);
  const inked = Array.from(drawn.data).filter((value, place) => place % 4 === 3 && value > 0).length;
  const images = document.images.length, needed = document.documentElement.scrollWidth, width = innerWidth;
  const seen = { errors, steps, shades, heavy, tabbable, said, roles, options, names, inked, size };
  parent.postMessage(JSON.stringify({ ...seen, images, needed, width }), "*");
});
</script>"""


def hostile_patterns() -> dict[Cell, AttentionPatterns]:
    """Two models, one example of which has markup for a token."""
    symbols = arrays_of("conventional")["symbols"].astype("<U60")
    symbols[0, 1] = HOSTILE
    return patterns_of(*CELLS, symbols=symbols)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    page = explorer_page(f"One run {HOSTILE}", hostile_patterns(), NAMES, FACTS)
    return told_by(page, ACT, tmp_path_factory.mktemp("explorer"))


def test_nothing_goes_wrong_hostile_texts_stay_texts_and_a_phone_has_room(told: dict[str, Any]) -> None:
    assert (told["errors"], told["images"]) == ([], 0)
    assert told["needed"] <= told["width"] == 400
    page = explorer_page(f"One run {HOSTILE}", hostile_patterns(), NAMES, FACTS)
    assert "<img" not in page and page.count("</script>") == 2


def test_a_hovered_token_says_and_shades_where_it_looks_and_who_looks_at_it(told: dict[str, Any]) -> None:
    readouts, letters = told["steps"]["hovered"]["readouts"], TEXT.replace(" ", "␣")
    conventional, both = hostile_patterns().values()
    # example 2, layer 1, head 3, token 6; the first model has one timescale, the other's second is chosen
    maps = {"Conventional": conventional.maps[0, 1, 0, 2], "Both <b>": both.maps[0, 1, 1, 2]}
    for (name, weights), said in zip(maps.items(), readouts, strict=True):
        most, least = (int(line.argmax()) for line in (weights[5], weights[:, 5]))
        assert said.startswith(f"{name}: “{letters[5]}” (6) looks at “{letters[most]}” ({most + 1}) ")
        assert f"It is looked at by “{letters[least]}” ({least + 1}) " in said
        shown = re.findall(r"\) ([\d.]+)\xa0%", said)
        for found, share in ((shown[0], weights[5, most]), (shown[3], weights[least, 5])):
            assert float(found) == pytest.approx(100 * share, abs=1.5)
    lines = np.array(told["shades"]) ** 2
    weights = maps["Conventional"][: len(lines), : len(lines)]
    np.testing.assert_allclose(lines, np.stack([weights[5], weights[:, 5]], 1), atol=0.005)


def test_masses_shade_the_tokens_of_the_model_that_has_them(told: dict[str, Any]) -> None:
    plain, heavy = told["heavy"]
    assert set(plain) == {0} and len(set(heavy)) > 5
    plain_text, heavy_text = told["steps"]["hovered"]["readouts"]
    assert "mass" not in plain_text and re.search(r"Its mass is \d\.\d\d times the mean", heavy_text)


def test_choices_say_what_is_shown_and_timescales_how_far_they_reach(told: dict[str, Any]) -> None:
    start, seen = told["steps"]["start"], told["steps"]["hovered"]
    assert start["facts"][1].startswith("Layer 2 of 2, mean of 4 heads, mean of 3 timescales. ")
    assert seen["facts"][0].startswith("Layer 1 of 2, head 3 of 4. ")
    assert seen["facts"][1].startswith("Layer 1 of 2, head 3 of 4, timescale 2 of 3. ")
    assert seen["facts"][1].endswith(f"Its answer: min, wrong: it is {HOSTILE}.")
    strips = [f"head {number}" for number in (1, 2, 3, 4)] + [f"timescale {number}" for number in (1, 2, 3)]
    for name, text in zip(strips, seen["strips"], strict=True):
        assert re.fullmatch(rf"{name}: \d+ \([\d.]+\)", text)
    assert told["options"]["timescale"] == ["mean of 1"]  # beside itself, the first model has one
    assert told["options"]["model1"] == ["nothing", "Conventional", "Both <b>"]
    assert told["inked"] > 100 and told["size"] == TOKENS


def test_a_click_holds_a_token_and_another_lets_go(told: dict[str, Any]) -> None:
    assert [told["steps"][what]["selected"] for what in ("held", "let go")] == [[5, 5], [9, 9]]


def test_arrow_keys_move_through_the_tokens_and_stop_at_the_ends(told: dict[str, Any]) -> None:
    for what, token in (("right", 10), ("home", 0)):
        seen = told["steps"][what]
        assert (seen["focused"], seen["selected"]) == (token, [token, token])
    assert told["tabbable"] == 1 and told["roles"] == "option"
    assert told["said"] == f"{TEXT[1]}, token 2 of 28"
    assert set(told["names"]) == {1}  # each choice has its label


def test_two_models_stand_side_by_side_or_one_alone(told: dict[str, Any]) -> None:
    assert [told["steps"][what]["hidden"] for what in ("start", "alone")] == [[False, False], [False, True]]
    first, second = told["steps"]["same"]["readouts"]
    assert first == second and first.startswith("Conventional")


def test_the_script_is_short_and_nothing_is_loaded() -> None:
    script = (TEMPLATES / "explorer.js.jinja").read_text(encoding="utf-8")
    assert len(script.splitlines()) <= 250
    plain = TaskFacts("listops", "ListOps", None, None, None, None, {}, class_names=("min", "max"))
    page = explorer_page("One run", patterns_of(*CELLS), NAMES, {"listops": plain})
    assert not re.search(r"https?:|fetch\(|import\(|\bsrc=|innerHTML|url\(", page)


def test_a_report_has_the_explorer_of_its_tasks_and_models(holed: Path) -> None:
    page = (holed / "analysis" / "report.html").read_text(encoding="utf-8")
    found = re.search(r'id="attention-explorer-data">(.+?)</script>', page)
    assert found
    (task,) = json.loads(found[1])
    names = [model["name"] for model in task["models"]]
    assert names == ["Conventional", "Multi-timescale", "Gravitational multi-timescale"]
