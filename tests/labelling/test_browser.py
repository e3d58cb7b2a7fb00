"""The page in a real browser: keys, drag, phone, themes, screen readers, killed servers, a reward model."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.config import DataSource
from stages.corpora.comparisons import comparison
from stages.corpora.files import read_rows
from stages.corpora.labels import read_answers, read_tasks
from stages.labelling.access import link
from stages.labelling.config import People
from stages.labelling.publishing import publish_settings
from stages.labelling.server import Served
from tests.browser import chromium, luminance, needs_browser

pytestmark = needs_browser
NUM_TASKS = int(os.environ.get("LABEL_BROWSER_TASKS", "12"))  # 40 in the long version: LABEL_BROWSER_TASKS=40 pytest ...


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("browser"), window="1400,900") as driver:
        yield driver


def wait(check: Callable[[], Any], seconds: float = 30.0) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if result := check():
                return result
        except Exception:  # the page is changing
            pass
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s")


def one(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def texts(browser: Any) -> list[str]:
    """The completions as they are shown."""
    return browser.execute_script("return [...document.querySelectorAll('.card .text')].map(e => e.textContent)")


def press(browser: Any, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    chain = ActionChains(browser)
    for key in keys:
        chain.send_keys(key)
    chain.perform()


def drag(browser: Any, index: int, rank: int) -> None:
    from selenium.webdriver import ActionChains

    chip, row = one(browser, f'[data-chip="{index}"]'), one(browser, f'#board .row[data-rank="{rank}"] .zone')
    ActionChains(browser, duration=20).click_and_hold(chip).move_by_offset(0, 8).move_to_element(row).release().perform()


def open_page(browser: Any, address: str) -> None:
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    browser.get(address)
    wait(lambda: one(browser, ".card, #message:not([hidden])"))


@pytest.fixture
def served(make_folder: Any, browser: Any) -> Iterator[Callable[..., Any]]:
    """served(annotator=..., **make_folder's fields) -> the browser with the page open; ``browser.served`` is the server."""
    running: list[Served] = []

    def serve(annotator: str = "anna", **fields: Any) -> Any:
        running.append(Served(make_folder(**fields)).__enter__())
        browser.served = running[-1]
        browser.get_log("browser")
        open_page(browser, link(running[-1].base, running[-1].access, annotator))
        return browser

    yield serve
    for server in running:
        server.__exit__()


# Two annotators, two kills, one reward model

BETTER, WORSE = ("warm", "bright", "honest", "fine"), ("dull", "weak", "flat", "grey")


def review(number: int, quality: int) -> str:
    """Quality 2: two good words; 1: one of each; 0: two bad ones."""
    good, bad = BETTER[number % 4], WORSE[number // 4 % 4]
    return {2: f"a {good} and {good} film", 1: f"a {good} and {bad} film", 0: f"a {bad} and {bad} film"}[quality] + f" number {number}"


def wanted_ranks(shown: list[str]) -> list[int]:
    """Ranks from 1 of the completions as shown, by their words."""
    scores = [sum(word in BETTER for word in text.split()) for text in shown]
    return [1 + sum(other > own for other in scores) for own in scores]


def rank_by_keys(browser: Any) -> None:
    from selenium.webdriver import Keys

    for position, rank in enumerate(wanted_ranks(texts(browser))):
        press(browser, "abc"[position], str(rank))
    press(browser, Keys.ENTER)


def rank_by_drag(browser: Any) -> None:
    for position, rank in enumerate(wanted_ranks(texts(browser))):
        drag(browser, position, rank)
    one(browser, "#submit").click()


def test_two_annotators_rank_through_two_kills_and_a_reward_model_learns_from_them(
    browser, make_folder, start_server, step_context, resolve_folder, tiny_llama_folder, tmp_path
) -> None:
    folder = make_folder(texts=[[review(number, quality) for quality in (1, 0, 2)] for number in range(NUM_TASKS)], overlap=0.25)
    server = start_server(folder, "anna", "ben")
    tabs = {}
    for name in ("anna", "ben"):
        browser.switch_to.new_window("tab")
        open_page(browser, server.links[name])
        tabs[name] = browser.current_window_handle
    by = {"anna": rank_by_keys, "ben": rank_by_drag}
    open_names, answered, kills = ["anna", "ben"], 0, 0
    while open_names:
        name = open_names.pop(0)
        browser.switch_to.window(tabs[name])
        before = texts(browser)
        if kills < 2 and answered >= (kills + 1) * NUM_TASKS // 3:
            server.kill()  # the answer is sent while no server runs
            by[name](browser)
            wait(lambda: "cannot be reached" in one(browser, "#banner").text)
            server.__init__(server.folder, server.port, server.annotators)
            kills += 1
        else:
            by[name](browser)
        wait(lambda shown=before: one(browser, "#message").is_displayed() or (texts(browser) != shown and texts(browser)))
        answered += 1
        if one(browser, "#form").is_displayed():
            open_names.append(name)
        assert not one(browser, "#banner").is_displayed()
    for tab in tabs.values():
        browser.switch_to.window(tab)
        browser.close()
    browser.switch_to.window(browser.window_handles[0])
    server.kill()
    kept = read_answers(folder / "answers.jsonl")
    assert kills == 2 and len(kept) == answered == NUM_TASKS + round(0.25 * NUM_TASKS)
    assert {item.annotator for _, item in kept} == {"anna", "ben"} and all(item.seconds > 0 for _, item in kept)
    tasks = read_tasks(folder / "tasks.jsonl")
    for _, item in kept:
        assert [1 + rank for rank in item.ranks] == wanted_ranks(tasks[item.task].completions)
        assert sorted(item.order) == [0, 1, 2]
    _reward_model_ranks_heldout(folder, step_context, resolve_folder(tiny_llama_folder), tmp_path)


def _reward_model_ranks_heldout(folder: Path, step_context: Any, model: Any, tmp_path: Path) -> None:
    """The step reads the labelling folder directly. Chance would get half of the 16 unseen tasks (48 pairs) right."""
    import json

    from stages.reward_model.config import RewardModelConfig
    from stages.reward_model.run import run

    heldout = [
        {"prompt": f"unseen {n}", "completions": [review(n + 5, quality) for quality in (0, 2, 1)], "ranks": [2, 0, 1]} for n in range(16)
    ]
    path = tmp_path / "heldout.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in heldout))
    step = RewardModelConfig.model_validate(
        {
            "name": "preference",
            "stage": "reward_model",
            "model": "base",
            "data": {"train": str(folder), "validation": str(path)},
            "training": {"learning_rate": 5e-3, "epochs": 8, "batch_size": 5, "microbatch_size": 5},
        }
    )
    assert all(comparison(row).annotator in ("anna", "ben") for row in read_rows([DataSource(path=str(folder))]))
    result = run(step, step_context(models={"model": model}))
    assert result.metrics["heldout_ci_low"] > 0.5, result.metrics["heldout_accuracy"]


# What the page must never do, and what it must always do

EVIL = '<img src=x onerror="window.evil=1"><script>window.evil=1</script>**not bold** [x](javascript:window.evil=1) & \u2028 end'


def test_text_of_models_is_escaped(served) -> None:
    browser = served(texts=[[EVIL, "</div><h1>big</h1>"], ["a", "b"]])
    assert sorted(texts(browser)) == sorted([EVIL, "</div><h1>big</h1>"])
    assert browser.execute_script("return window.evil") is None
    assert browser.execute_script("return document.querySelectorAll('main img, main script, .card h1').length") == 0
    hosts = browser.execute_script("return [...new Set(performance.getEntriesByType('resource').map(e => new URL(e.name).host))]")
    assert hosts == [browser.served.base.removeprefix("http://")]
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def test_draft_is_restored_when_the_browser_reopens(served) -> None:
    browser = served(number=3, k=3, questions="notes: true\nchecks: [{name: untrue, text: Untrue}]\n")
    shown = texts(browser)
    press(browser, "b", "1")
    one(browser, "#check-untrue-2").click()
    one(browser, "#notes").send_keys("half a thought")
    browser.get("about:blank")
    open_page(browser, link(browser.served.base, browser.served.access, "anna"))
    assert texts(browser) == shown
    assert one(browser, "#card-1 input[type=radio][value='1']").is_selected() and one(browser, "#check-untrue-2").is_selected()
    assert one(browser, "#notes").get_attribute("value") == "half a thought"


def test_page_reloads_with_its_draft_when_the_questions_change(served) -> None:
    from selenium.webdriver import Keys

    browser = served(texts=[["a", "b"], ["c", "d"]])
    press(browser, "a", "2", "b", "1")
    folder = browser.served.store.folder
    questions = folder.parent / "rated.yaml"
    questions.write_text("ratings: [{name: quality, text: Quality, lowest: 1, highest: 7}]")
    publish_settings(folder, "recipe/step", 0, People.model_validate({"questions": str(questions)}))
    press(browser, Keys.ENTER)
    wait(lambda: one(browser, '[name="rating-quality-0"]'))
    assert [browser.execute_script(f"return document.querySelector('[name=rank-{position}]:checked').value") for position in (0, 1)] == [
        "2",
        "1",
    ]
    for position, rating in ((0, 3), (1, 5)):
        browser.execute_script(f"document.querySelectorAll('[name=rating-quality-{position}]')[{rating - 1}].click()")
    one(browser, "#submit").click()
    wait(lambda: browser.served.store.num_ranked() == 1)
    (kept,) = browser.served.store.answers["anna"].values()
    assert sorted(kept.ratings["quality"]) == [3, 5]


def test_keys_rank_tie_rate_skip_flag_and_correct(served) -> None:
    from selenium.webdriver import Keys

    browser = served(number=3, k=3, overlap=0.0, questions="ratings: [{name: quality, text: Quality, low: bad, high: good}]\n")
    status = lambda: one(browser, "#status").get_attribute("textContent")  # noqa: E731
    press(browser, Keys.ENTER)
    assert "Answer A has no rank yet" in one(browser, "#banner").text
    press(browser, "a", "2", "b", "2", "c", "1")
    assert status() == "Answer C: rank 1."
    press(browser, Keys.ARROW_DOWN)
    assert status() == "Answer C: rank 2, tied with A and B."
    press(browser, Keys.ARROW_UP, Keys.BACKSPACE)
    assert status() == "Answer C has no rank."
    press(browser, "1", Keys.ENTER)
    assert "has no rating yet" in one(browser, "#banner").text
    for position, letter in enumerate("abc"):
        press(browser, letter)
        from selenium.webdriver import ActionChains

        ActionChains(browser).key_down(Keys.SHIFT).send_keys(str(position + 3)).key_up(Keys.SHIFT).perform()
    first = texts(browser)
    press(browser, Keys.ENTER)
    wait(lambda: texts(browser) != first)
    store = browser.served.store
    (kept,) = store.history("anna")
    by_place = [kept.ranks[index] for index in kept.order], [kept.ratings["quality"][index] for index in kept.order]
    assert by_place == ([1, 1, 0], [3, 4, 5])
    second = texts(browser)
    press(browser, "s")
    wait(lambda: one(browser, "#reason").is_displayed())
    press(browser, "too hard", Keys.ENTER)
    one(browser, "#reason-save").click()
    wait(lambda: texts(browser) != second)
    assert store.history("anna")[0].skipped == "too hard"
    press(browser, "x")
    one(browser, ".suggestion").click()
    one(browser, "#reason-save").click()
    assert "Personal data" in one(browser, "#flag-line").text
    press(browser, "u")
    wait(lambda: len(browser.find_elements("css selector", "#history-list button")) == 2)
    browser.find_elements("css selector", "#history-list button")[1].click()
    wait(lambda: texts(browser) == first)
    assert one(browser, "#mode").is_displayed() and one(browser, "#card-2 input[type=radio][value='1']").is_selected()
    press(browser, "c", "3", Keys.ENTER)
    wait(lambda: texts(browser) != first)
    corrected = store.answer_of("anna", kept.task)
    assert [corrected.ranks[index] for index in corrected.order] == [0, 0, 2] and corrected.replaces == kept.id
    assert "Personal data" in one(browser, "#flag-line").text  # the open task is unchanged


def test_screening_that_is_not_passed_ends_the_tasks(served) -> None:
    from selenium.webdriver import Keys

    browser = served(gold=[{"prompt": "g", "completions": ["good", "bad"], "ranks": [0, 1]}])
    assert "Trial task 1 of 1" in one(browser, "#counts").text
    for position, text in enumerate(texts(browser)):
        press(browser, "ab"[position], "1" if text == "bad" else "2")
    press(browser, Keys.ENTER)
    wait(lambda: "trial tasks are done" in one(browser, "#message").text)


def test_every_control_has_a_name_and_the_keyboard_reaches_all(served) -> None:
    from selenium.webdriver import Keys

    questions = "ratings: [{name: quality, text: Quality}]\nchecks: [{name: untrue, text: Untrue}]\nnotes: true\n"
    browser = served(number=2, k=2, questions=questions, instructions="# How\nRead first.")
    wait(lambda: one(browser, "#help").is_displayed())  # instructions open by themselves once
    press(browser, Keys.ESCAPE)
    names = """return [...document.querySelectorAll('input, button, textarea, select')].filter(e => !e.hidden)
        .map(e => e.ariaLabel || e.textContent.trim() || e.labels?.[0]?.textContent.trim())"""
    assert all(browser.execute_script(names))
    groups = browser.execute_script("return [...document.querySelectorAll('fieldset')].map(e => e.querySelector('legend')?.textContent)")
    assert "Rank of answer A; 1 is best" in groups and any(name.startswith("Quality, answer B") for name in groups)
    assert browser.execute_script("return document.documentElement.lang") == "en"
    assert one(browser, "#status").get_attribute("aria-live") == "polite"
    browser.execute_script("document.body.focus(); document.activeElement.blur()")
    reached = []
    for _ in range(40):
        press(browser, Keys.TAB)
        reached.append(browser.execute_script("const e = document.activeElement; return e.id || e.name || e.dataset.chip || e.className"))
        if reached[-1] == "flag":
            break
    order = [
        name
        for name in ("rank-0", "rating-quality-0", "check-untrue-0", "rank-1", "0", "1", "notes", "submit", "skip", "flag")
        if name in reached
    ]
    assert len(order) == 10 and [reached.index(name) for name in order] == sorted(reached.index(name) for name in order), reached


def contrast(browser: Any, selector: str) -> float:
    """WCAG contrast of an element's text with the nearest background behind it."""
    script = """let e = arguments[0], style = getComputedStyle(e), back = style.backgroundColor, node = e;
        while (back.endsWith(', 0)') && node.parentElement) { node = node.parentElement; back = getComputedStyle(node).backgroundColor; }
        return [style.color, back];"""
    text, behind = (luminance(color) for color in browser.execute_script(script, one(browser, selector)))
    return (max(text, behind) + 0.05) / (min(text, behind) + 0.05)


@pytest.mark.parametrize(("width", "number"), [(390, 3), (390, 9), (1400, 3), (1400, 9)])
def test_page_fits_phone_and_desktop_in_both_themes(served, width: int, number: int) -> None:
    completions = ["a very " + "long" * 60, *(f"{index} " * 40 * index for index in range(1, number))]
    browser = served(texts=[completions], questions="ratings: [{name: quality, text: Quality, low: bad, high: good}]\n")
    screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    for scheme in ("light", "dark"):
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert browser.execute_script(wide) <= 0
        for selector in (".counts", "h1", ".card .text", ".radios-name", ".ends span", ".hint", "#submit", ".chip-text", ".row-name"):
            if one(browser, selector).is_displayed():
                assert contrast(browser, selector) > 4.5, (scheme, selector)
    small = """return [...document.querySelectorAll('.segments label, .chip, .actions button, .top button')]
        .map(e => e.getBoundingClientRect()).filter(box => box.width && (box.width < 24 || box.height < 24)).length"""
    assert browser.execute_script(small) == 0
    outside = """const box = document.querySelector('#submit').getBoundingClientRect();
        return box.right > innerWidth || box.bottom > innerHeight"""
    assert browser.execute_script(outside) is False  # visible without scrolling
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_finger_drags_an_answer_to_its_rank(served) -> None:
    browser = served(number=1, k=3)
    screen = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        browser.execute_script("document.getElementById('board').scrollIntoView({block: 'center'})")
        middle = """const box = document.querySelector(arguments[0]).getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2]"""
        start = browser.execute_script(middle, '[data-chip="1"]')
        end = browser.execute_script(middle, '#board .row[data-rank="2"] .zone')
        touch = [("touchStart", start), ("touchMove", [start[0], start[1] + 12]), ("touchMove", end), ("touchEnd", None)]
        for kind, point in touch:
            points = [{"x": point[0], "y": point[1]}] if point else []
            browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        wait(lambda: one(browser, "#status").get_attribute("textContent") == "Answer B: rank 2.", seconds=5)
        assert one(browser, "#card-1 input[type=radio][value='2']").is_selected()
    finally:
        browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_leader_sees_the_numbers_and_makes_links(served, answer) -> None:
    browser = served(number=2, k=2, overlap=1.0)
    store, access = browser.served.store, browser.served.access
    for name in ("ben", "carol"):
        store.record(name, answer(store, name, next(iter(store.tasks)), [0, 1]))
    browser.get(link(browser.served.base, access, None))
    wait(lambda: "1 of 2 tasks are ranked" in one(browser, "#headline").text)
    tiles = one(browser, "#tiles").text
    assert "100.0 %" in tiles and "72.6 %" in tiles and "77.3 %" in tiles
    one(browser, "#invite-name").send_keys("dave\n")
    wait(lambda: access.token("dave") in one(browser, "#invite-link").text)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_page_asks_for_the_password_and_continues(make_folder, browser) -> None:
    with Served(make_folder()) as server:
        server.access.password = "correct horse"
        browser.get(link(server.base, server.access, "anna"))
        wait(lambda: one(browser, "#login").is_displayed())
        for text in ("wrong", "correct horse"):
            one(browser, "#password").send_keys(text + "\n")
            wait(lambda: not one(browser, "#password").get_attribute("value") or texts(browser))
        wait(lambda: texts(browser))
