"""The page of a run: everything foreign is escaped, nothing is fetched, what is shown is what the files say."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from stages.errors import DataError
from stages.report.chain import command
from stages.report.page import render_run, write_report
from stages.report.run_folder import find_run, read_lines, read_run, thinned

VOID = {"meta", "input", "link", "br", "img"}


class Page(HTMLParser):
    """Tags and texts of a page; fails where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text.append(data)

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))


@pytest.fixture(scope="module")
def html(new_run: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return render_run(read_run(new_run(tmp_path_factory.mktemp("runs") / "toy" / "20261124T203818Z")))


def test_foreign_text_stays_text(html: str) -> None:
    page = Page(html)
    assert [tag for tag, _ in page.tags].count("img") == 0
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert [attributes.get("type") for attributes in scripts] == ["application/json", None]
    # prompt, completion, few-shot text, alarm, recipe, description: each shown as it was written
    assert page.words.count("<script>window.evil = 1</script>") >= 6
    assert page.words.count("{{ 7 * 7 }}") >= 6 and "/p> 49 ]]" not in page.words


def test_nothing_is_fetched(html: str) -> None:
    page = Page(html)
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "xlink:href", "srcset", "poster"):
            target = attributes.get(name)
            assert target is None or target.startswith("#") or target == "data:,", f"<{tag} {name}={target}>"
    assert "http" not in html.replace("http-equiv", "")
    assert "@import" not in html and not re.search(r"url\((?!#)", html)


def test_the_policy_allows_this_script_and_no_other(html: str) -> None:
    (meta,) = [attributes for tag, attributes in Page(html).tags if attributes.get("http-equiv") == "Content-Security-Policy"]
    policy = dict(part.strip().partition(" ")[::2] for part in str(meta["content"]).split(";"))
    (script,) = re.findall(r"<script>(.*?)</script>\s*</body>", html, re.DOTALL)
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    for directive, text in (("script-src", script), ("style-src-elem", style)):
        assert policy[directive] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert policy["default-src"] == "'none'"


def test_the_headline_and_its_uncertainty(html: str) -> None:
    words = Page(html).words
    assert "aligned wins 70 % of 8 prompts against sft, by gold (95 % interval 60 % to 80 %)." in words
    assert "By the same judge aligned also beats base and cannot be told from best." in words


def test_what_to_keep_in_mind(html: str) -> None:
    words = Page(html).words
    assert "aligned: reward_hacking from iteration 9 on, in 3 iterations: the monitor fell" in words
    assert "1 of 8 prompts that base has no completion for." in words
    assert "8 prompts do not tell aligned from best (52 %; about 90 prompts would be needed)" in words
    assert "gold and llm agree on 52 % of the 25 comparisons that neither ties: they judge different things." in words
    assert "llm was asked 12 times (3 replies from the cache, 1 retries, 1 refusals, 0 failures), for 0.02" in words
    assert "in both orders it said the same of 80 %" in words


def test_the_chain(html: str) -> None:
    page = Page(html)
    assert sum(tag == "path" and attributes.get("class") == "arrow" for tag, attributes in page.tags) >= 5
    for said in (
        "toy/aligned@1",
        "perplexity 3.10",
        "accuracy 0.700",
        "score -0.50 to 0.40",
        "reward[0].model: toy/preference@1",
        "data: world:raw (01234567)",
        "900 MiB",
        "12.5 s",
        "reused",
    ):
        assert said in page.words, said


def test_figures(html: str) -> None:
    page = Page(html)
    found = [attributes.get("id") for tag, attributes in page.tags if tag == "figure"]
    assert found == [
        "frontier",
        "distributions",
        "tax",
        "over-optimisation-aligned",
        "calibration-preference",
        "training-base",
        "training-sft",
        "training-taste",
        "training-preference",
        "training-aligned",
    ]
    plots = re.findall(r'<svg class="plot".*?</svg>', html, re.DOTALL)
    assert len(plots) > 10
    for plot in plots:
        assert "<style" not in plot and "var(--" in plot
        assert not re.findall(r"(?:fill|stroke): #[0-9a-f]{3,6}", plot)  # every colour is the page's
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids)), sorted(name for name in set(ids) if ids.count(name) > 1)[:3]
    for said in ("accuracy by length", "the better completion is", "accuracy by annotator"):
        assert said in page.words
    # best of 4 stands at the KL log 4 - 3/4, as text beside the drawing
    assert "best of 4 (best) 0.64" in page.words


def test_the_command_and_the_recipe(html: str) -> None:
    from ruamel.yaml import YAML

    page = Page(html)
    assert "./launch.sh recipes/toy.yaml aligned.kl_coef=0.05" in page.words
    (recipe,) = [text for text in page.text if text.startswith("name: toy")]
    read = YAML(typ="safe").load(recipe)
    assert read["seed"] == 7 and [step["name"] for step in read["steps"]] == ["base", "sft", "taste", "preference", "aligned", "verdict"]
    assert command({"recipe_file": "a b.yaml", "overrides": ["x.y=1 2"]}) == "./launch.sh 'a b.yaml' 'x.y=1 2'"


def test_a_large_run_stays_below_three_megabytes(run_folder: Path) -> None:
    path = run_folder / "verdict" / "completions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    long = [{**rows[4], "completions": dict.fromkeys(rows[4]["completions"], "<&> long " * 300)} for _ in range(2000)]
    path.write_text("".join(json.dumps(row) + "\n" for row in long))
    page = write_report(read_run(run_folder))
    assert page == run_folder / "report.html" and page.stat().st_size < 3_000_000
    words = Page(page.read_text()).words
    assert re.search(r"The first [\d,]+ of 2,000; all are in verdict/completions.jsonl", words)


def test_a_run_without_an_evaluation(run_folder: Path) -> None:
    summary = json.loads((run_folder / "summary.json").read_text())
    summary["steps"] = summary["steps"][:2]
    summary["finished"] = False
    (run_folder / "summary.json").write_text(json.dumps(summary))
    words = Page(render_run(read_run(run_folder))).words
    assert "toy: 2 steps, and no evaluation among them." in words
    assert "The run did not come to its end" in words


def test_judges_that_only_compare(run_folder: Path) -> None:
    path = run_folder / "verdict" / "evaluation.json"
    evaluation = json.loads(path.read_text())
    evaluation["judges"] = evaluation["judges"][1:]
    evaluation["win_rates"] = [row for row in evaluation["win_rates"] if row["judge"] == "llm"]
    for row in evaluation["candidates"].values():
        row["scores"], row["score_intervals"] = {}, {}
    evaluation["best_of_n"], evaluation["agreement"] = {}, {}
    path.write_text(json.dumps(evaluation))
    words = Page(render_run(read_run(run_folder))).words
    assert "aligned loses: it wins 25 % of 8 prompts against sft, by llm" in words
    assert "By the same judge aligned also was not compared with base and best." in words


def test_reused_steps_without_logs_are_said(run_folder: Path) -> None:
    (run_folder / "sft" / "metrics.jsonl").unlink()
    words = Page(render_run(read_run(run_folder))).words
    assert "No training log was kept of sft" in words


def test_old_summaries_are_read(run_folder: Path) -> None:
    """A run of a version that kept less: no inputs, no config, no description."""
    summary = json.loads((run_folder / "summary.json").read_text())
    for key in ("description", "environment"):
        del summary[key]
    for step in summary["steps"]:
        for key in ("inputs", "data", "config", "peak_memory_bytes"):
            del step[key]
    (run_folder / "summary.json").write_text(json.dumps(summary))
    assert "aligned wins 70 %" in Page(render_run(read_run(run_folder))).words


# Finding and reading


def test_finding_a_run(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (run_folder.parent / "latest").symlink_to(run_folder.name)
    for name in (str(run_folder), "toy", f"toy/{run_folder.name}", "runs/toy/latest"):
        assert find_run(name, tmp_path) == run_folder.resolve()
    with pytest.raises(DataError, match="'nothing' is no run: .* runs in .*: toy/20261124T203818Z$"):
        find_run("nothing", tmp_path)
    with pytest.raises(DataError, match="no run folder"):
        read_run(tmp_path)


def test_reading_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == []
    path.write_text('{"a": 1}\n\n{"a": 2}\n{"a": ')
    assert read_lines(path) == [{"a": 1}, {"a": 2}]  # the last line was cut off
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n{"a": 4}\n')
    with pytest.raises(DataError, match="metrics.jsonl:2: bad JSON"):
        read_lines(path)


def test_thinned() -> None:
    assert thinned(range(10), 4) == [0, 3, 6, 9]
    assert thinned([1, 2], 4) == [1, 2]


@pytest.mark.parametrize("gpu", [{"name": "NVIDIA H200", "memory_bytes": 2**37, "driver": "580.95"}, "NVIDIA H200"], ids=["now", "older"])
def test_a_gpu_run_shows_its_gpu_and_the_memory_of_it(new_run: Any, tmp_path: Path, gpu: Any) -> None:
    folder = new_run(tmp_path / "runs" / "toy" / "20261124T203818Z")
    summary = json.loads((folder / "summary.json").read_text())
    summary["environment"]["gpus"] = [gpu]
    summary["peak_gpu_memory_bytes"] = 77 * 2**30
    summary["steps"][0]["peak_gpu_memory_bytes"] = 33 * 2**30
    (folder / "summary.json").write_text(json.dumps(summary))
    words = Page(render_run(read_run(folder))).words
    assert "1 x NVIDIA H200" in words
    assert "77.00 GiB at most" in words and "33.00 GiB" in words
