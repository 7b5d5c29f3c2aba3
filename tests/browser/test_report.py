"""The page of a run in a browser: what a person does with it."""

import json

import pytest

from jaxlm.pages.page import render
from jaxlm.pages.run import read_run
from tests.pages.made_run import metrics, session, with_settings, write_hostile, write_rows, write_run

pytestmark = pytest.mark.browser
# the least contrast of a text with what is behind it, over all texts that are shown
CONTRAST = """
const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
  .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (node) => {
  for (; node; node = node.parentElement) {
    const colour = parse(getComputedStyle(node).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
};
let least = [99, ""];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !node.checkVisibility() || /SCRIPT|NOSCRIPT/.test(node.tagName)) continue;
  const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < least[0]) least = [ratio, node.textContent.slice(0, 40)];
}
return least;
"""


def write_page(path, *workdirs, refresh_seconds=None):
    path.write_bytes(render([read_run(workdir, len(workdirs)) for workdir in workdirs], "today", refresh_seconds))
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a run of 400 steps, resumed at step 150, with an evaluation every 10."""
    place = tmp_path_factory.mktemp("page")
    run = write_run(place / "mine", steps=400, max_steps=500)
    write_rows(run / "sessions.jsonl", [session(0), session(150)])
    return write_page(place / "page.html", run)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    place = tmp_path_factory.mktemp("two")
    first, second = (write_run(place / name, steps=200, max_steps=200) for name in ("first", "second"))
    with_settings(second, seed=7)
    return write_page(place / "page.html", first, second)


def range_of(browser):
    return browser.run("return Object.values(SCREEN).map(({plot}) => [plot.scales.x.min, plot.scales.x.max])")


def colours_of(browser, key):
    """How many pixels of a plot have each colour of its lines: a line that is not drawn has none."""
    return browser.run(f"return SCREEN.{key}.lines.map((line) => line.label)")


def test_a_slider_moves_through_the_samples_of_its_prompt(browser, page):
    browser.open(page)
    slider, card = browser.find("#sample-0-0"), browser.find(".card")
    assert "step 400" in card.text and "Once went home at 400 again" in card.text
    assert [mark.text for mark in browser.find_all(".card:first-child mark")] == ["400"]
    slider.send_keys("\ue012")  # the left arrow
    assert "Once went home at 390 again" in card.text
    assert slider.get_attribute("aria-valuetext") == "step 390, after 16.2 min"
    slider.send_keys("\ue011")  # home: the first sample has none before it
    assert "Once went home at 10 again" in card.text
    assert not browser.find_all(".card:first-child mark")
    assert "The king went home at 400" in browser.find_all(".card")[1].text
    browser.find("#all").send_keys("\ue012")
    assert all("went home at 390" in each.text for each in browser.find_all(".card"))
    browser.find("#beside").click()
    assert all("went home at 380" in each.text for each in browser.find_all(".card"))


def test_changed_words_are_those_outside_the_longest_common_subsequence(browser, page):
    browser.open(page)
    changed = "return changedParts(arguments[0], arguments[1]).filter((part) => part[1]).map((part) => part[0])"
    for before, after, words in (
        ("a b c d", "a c d e", ["e"]),
        ("", "one two", ["one", "two"]),
        ("the cat sat", "the  dog sat", ["dog"]),
        ("x y", "y x", ["x"]),
        ("same", "same", []),
    ):
        assert browser.run(changed, before, after) == words, (before, after)
    assert browser.run(changed, "a " * 5000, "b " * 5000) == []  # too long to compare


def test_the_axes_switch(browser, page):
    browser.open(page)
    assert range_of(browser)[0] == [0, 400]
    for axis, last in (("tokens", 400 * 65_536), ("seconds", (800 + 39 * 5) / 3600)):
        browser.find(f"label:has(#axis-{axis})").click()
        assert range_of(browser) == [[0, pytest.approx(last)]] * 5
    browser.find("label:has(#axis-step)").click()
    scales = "return ['x', 'y'].map((name) => SCREEN.loss.plot.scales[name].distr)"
    assert browser.run(scales) == [1, 1]
    for name in ("x", "y"):
        browser.find(f"label:has(#log-{name})").click()
    assert browser.run(scales) == [3, 3]
    assert range_of(browser)[0] == [1, 400]
    assert "Loss against steps. training: from 10.00 to" in browser.find("#plot-loss").get_attribute("aria-label")


def test_the_first_hundredth_leaves_the_height_to_the_rest(browser, tmp_path):
    """The loss falls from 10 to 4 in the first four steps of 400, and from 4 to 2.4 in the rest."""
    heights = "return [SCREEN.loss.plot.scales.y.min, SCREEN.loss.plot.scales.y.max]"
    browser.open(write_page(tmp_path / "page.html", write_run(tmp_path / "run", steps=400, max_steps=400)))
    low, high = browser.run(heights)
    assert low >= 2 and high < 8
    browser.find("label:has(#log-x)").click()
    assert browser.run(heights)[1] > 10


def test_zoom_by_mouse_buttons_and_keyboard(browser, page):
    from selenium.webdriver import ActionChains

    browser.open(page)
    over = browser.find("#plot-loss .u-over")
    width = over.size["width"]
    ActionChains(browser.driver).move_to_element_with_offset(over, -width // 4, 0).click_and_hold().move_by_offset(
        width // 2, 0
    ).release().perform()
    assert all(each == pytest.approx([100, 300], abs=3) for each in range_of(browser))
    ActionChains(browser.driver).double_click(over).perform()
    assert range_of(browser)[0] == [0, 400]
    browser.find("#zoom-in").click()
    assert range_of(browser)[0] == [100, 300]
    browser.find("#zoom-out").click()
    assert range_of(browser)[0] == [0, 400]
    plot = browser.find("#plot-grad_norm")
    plot.send_keys("++")
    assert range_of(browser)[0] == [150, 250]
    plot.send_keys("0")
    assert range_of(browser)[0] == [0, 400]
    plot.send_keys("\ue014")  # the right arrow
    assert browser.find("#reading").get_attribute("textContent").startswith("steps 8: gradient norm ")


def test_the_table_of_a_plot_has_its_numbers(browser, page):
    browser.open(page)
    browser.find("#values-val_bits_per_byte summary").click()
    browser.wait("return document.querySelector('#values-val_bits_per_byte tbody')")
    rows = [row.text.split() for row in browser.find_all("#values-val_bits_per_byte tbody tr")]
    expected = {row["step"]: row["val_bits_per_byte"] for row in metrics(400) if "val_loss" in row}
    assert len(rows) == 12
    assert {int(step): float(value) for step, value in rows} == pytest.approx(
        {int(s): expected[int(s)] for s, _ in rows}, rel=1e-3
    )


def test_small_numbers_have_a_log_axis(browser, tmp_path):
    run = write_run(tmp_path / "run", steps=40, max_steps=40)
    write_rows(run / "metrics.jsonl", [row | {"lr": 0.001 + row["step"] / 1e3} for row in metrics(40)])
    browser.open(write_page(tmp_path / "page.html", run))
    browser.run("Object.assign(STATE, {axis: 'seconds', logX: true, logY: true, zoom: [0.00097, 0.02]}); drawAll()")
    assert browser.run("return logTicks(null, 1, 0.00095, 0.003)") == [0.001, 0.002, 0.003]
    assert browser.run("return SCREEN.lr.plot.scales.y.min") < 0.002


def test_a_short_run_beside_a_long_one_is_in_view(browser, tmp_path):
    runs = [write_run(tmp_path / str(steps), steps=steps, max_steps=steps) for steps in (10, 2000)]
    browser.open(write_page(tmp_path / "page.html", *runs))
    assert browser.run("return SCREEN.loss.plot.scales.y.max") > 10


def test_kinds_of_parameters_share_a_plot_and_a_plan_reads_where_the_run_is(browser, tmp_path):
    run = write_run(tmp_path / "run", steps=40, max_steps=400)
    kinds = {f"update_ratio_{kind}": 0.01 for kind in ("matrix", "embedding", "norm_scale")}
    write_rows(run / "metrics.jsonl", [row | kinds for row in metrics(40)])
    browser.open(write_page(tmp_path / "page.html", run))
    assert colours_of(browser, "update_ratio") == ["matrices", "embedding", "norm scales"]
    assert browser.run("return new Set(SCREEN.update_ratio.lines.map((line) => line.stroke)).size") == 3
    assert browser.run("const plan = SCREEN.lr.lines[1]; return lastShown(plan) > 2 * plan.y.at(-1)")


def test_a_run_is_hidden_and_shown(browser, two):
    browser.open(two)
    assert colours_of(browser, "grad_norm") == ["first", "second"]
    browser.find("#run-0").click()
    assert colours_of(browser, "grad_norm") == ["second"]
    browser.find("#run-1").click()
    assert colours_of(browser, "grad_norm") == []
    browser.find("#run-0").click()
    assert colours_of(browser, "grad_norm") == ["first"]
    different = browser.find_all("#settings > .table tbody tr")
    assert [row.text for row in different] == ["seed 0 7"]


def test_restarts_and_pauses_are_drawn_and_named(browser, page):
    browser.open(page)
    text = browser.find("figure:has(#plot-tokens_per_second) .hint").text
    assert text.startswith("39 pauses, 3.3 min in all (19.6% of the time), the longest 5 s before step ")
    assert text.endswith("1 restart (dashed).")
    reds = """
    const {plot} = SCREEN.tokens_per_second, {left, top, width, height} = plot.bbox;
    const {data} = plot.ctx.getImageData(left, top, width, height);
    const columns = new Set();
    for (let i = 0; i < data.length; i += 4) if (data[i] > 150 && data[i + 2] < 60) columns.add((i / 4) % width);
    return [columns.size, plot.valToPos(150, 'x', true) - left, [...columns]];
    """
    count, restart, columns = browser.run(reds)
    assert 38 <= count <= 90
    assert any(abs(column - restart) <= 2 for column in columns)


def test_no_width_scrolls_sideways_and_texts_have_contrast(browser, page, two, tmp_path):
    hostile = write_page(tmp_path / "hostile.html", write_hostile(tmp_path / "hostile"))
    for path in (page, two, hostile):
        for dark in (False, True):
            browser.open(path, dark=dark)
            ratio, text = browser.run(CONTRAST)
            assert ratio >= 4.5, text
        browser.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        for width in (360, 480, 768, 1024, 1920):
            browser.resize(width)
            browser.run("return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
            inside = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
            whole, shown = browser.run(inside)
            assert whole <= shown, (path, width)


def test_everything_has_a_name(browser, two):
    browser.open(two)
    nodes = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    shown = [(each["role"]["value"], each.get("name", {}).get("value", "")) for each in nodes if not each["ignored"]]
    named = {"slider", "switch", "checkbox", "radio", "button", "image", "table", "heading", "DisclosureTriangle"}
    assert {role for role, _ in shown} >= named - {"DisclosureTriangle", "table"}
    assert [role for role, name in shown if role in named and not name] == []


def test_a_hostile_run_shows_its_texts(browser, tmp_path):
    browser.open(write_page(tmp_path / "page.html", write_hostile(tmp_path / "run")))
    assert "</script><script>alert(1)</script><!-- 30" in browser.find(".card").text
    assert "4 values of loss are not finite" in browser.find("#notes").text
    assert len(browser.find_all("figure")) == 9  # five, and __proto__, constructor, the tag and huge
    assert browser.run("return document.scripts.length") == 2


def test_short_runs_have_a_page(browser, tmp_path):
    one = write_run(tmp_path / "one", steps=1)
    browser.open(write_page(tmp_path / "page.html", one))
    assert browser.find("#summary dd").text.startswith("-")
    (one / "metrics.jsonl").write_text("")
    (one / "config.json").write_text("{")
    browser.open(write_page(tmp_path / "page.html", one))
    assert "no step is done yet" in browser.find("#notes").text
    assert not browser.find_all("figure")


def test_an_open_page_follows_and_keeps_what_was_chosen(browser, page, tmp_path):
    run = write_run(tmp_path / "run", steps=200, max_steps=400)
    path = write_page(tmp_path / "page.html", run, refresh_seconds=3600.0)
    browser.open(path, height=400)
    browser.find("label:has(#log-y)").click()
    browser.find("#zoom-in").click()
    browser.find("#sample-0-1").send_keys("\ue012")
    scroll = browser.run("return scrollY")
    assert scroll > 0
    write_run(run, steps=300, max_steps=400)
    write_page(path, run, refresh_seconds=3600.0)
    browser.run("follow()")
    browser.wait("return DATA.runs[0].step === 300")
    assert range_of(browser)[0] == [50, 150]
    assert browser.run("return SCREEN.loss.plot.scales.y.distr") == 3
    assert ["at 300" in each.text for each in browser.find_all(".card")] == [True, False]
    assert browser.run("return scrollY") == pytest.approx(scroll, abs=2)
    assert browser.run("return document.activeElement.id") == "sample-0-1"
    write_page(path, run, refresh_seconds=0.2)
    browser.run("follow()")
    write_run(run, steps=400, max_steps=400)
    write_page(path, run)
    browser.wait("return DATA.runs[0].state === 'finished'")


def test_paper_is_light(browser, page):
    browser.open(page, dark=True)
    pdf = browser.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})["data"]
    assert len(json.dumps(pdf)) > 20_000
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run("return getComputedStyle(document.body).color") == "rgb(31, 36, 48)"
    browser.run("dispatchEvent(new Event('afterprint'))")
    assert browser.run("return getComputedStyle(document.body).color") == "rgb(230, 232, 238)"
