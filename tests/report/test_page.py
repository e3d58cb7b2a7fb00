"""The page of a run: model and data texts are escaped, nothing is loaded, and the values equal those in the files."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stages.cli import app
from stages.errors import DataError, StorageError
from stages.report import page
from stages.report.circumstances import command, compiled_layers
from stages.report.page import render_run, write_report
from stages.report.run_folder import find_run, read_lines, read_run, thinned

VOID = {"meta", "input", "link", "br", "img"}


class Page(HTMLParser):
    """Tags and texts of a page; fails if tags do not match."""

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
    return render_run(read_run(new_run(tmp_path_factory.mktemp("runs") / "toy" / "20261124T203818Z"))).html


def test_text_of_models_is_escaped(html: str) -> None:
    page = Page(html)
    assert [tag for tag, _ in page.tags].count("img") == 0
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert [attributes.get("type") for attributes in scripts] == ["application/json", None]
    # prompt, completion, few-shot text, alarm, recipe, description: each shown as it was written
    assert page.words.count("<script>window.evil = 1</script>") >= 6
    assert page.words.count("{{ 7 * 7 }}") >= 6 and "/p> 49 ]]" not in page.words


def test_page_loads_nothing(html: str) -> None:
    page = Page(html)
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "xlink:href", "srcset", "poster"):
            target = attributes.get(name)
            assert target is None or target.startswith("#") or target == "data:,", f"<{tag} {name}={target}>"
    assert "http" not in html.replace("http-equiv", "")
    assert "@import" not in html and not re.search(r"url\((?!#)", html)


def test_content_security_policy_allows_only_the_script_of_the_page(html: str) -> None:
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
    assert "By the same judge aligned also beats base and cannot be distinguished from best." in words


def test_remarks_name_alarms_exclusions_and_disagreement(html: str) -> None:
    words = Page(html).words
    assert "aligned: reward_hacking from iteration 9 on, in 3 iterations: the monitor fell" in words
    assert "1 of 8 prompts that base has no completion for." in words
    assert "gold read 3 of 40 texts without their beginning: they were too long." in words
    assert "8 prompts do not distinguish aligned from best (52 %; about 90 prompts would be needed)" in words
    assert "gold and llm agree on 52 % of the 25 comparisons without a tie: they judge different things." in words
    assert "llm was asked 12 times (3 replies from the cache, 1 retries, 1 refusals, 0 failures), for 0.02" in words
    assert "for 80 % its verdict was the same in both orders" in words


def test_chain_shows_steps_inputs_and_results(html: str) -> None:
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


def test_page_has_all_figures(html: str) -> None:
    page = Page(html)
    figure_ids = [attributes.get("id") for tag, attributes in page.tags if tag == "figure"]
    assert figure_ids == [
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
        assert not re.findall(r"(?:fill|stroke): #[0-9a-f]{3,6}", plot)  # every colour is defined by the page
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids)), sorted(name for name in set(ids) if ids.count(name) > 1)[:3]
    for said in ("accuracy by length", "the better completion is", "accuracy by annotator"):
        assert said in page.words
    # the KL of best of 4 is log 4 - 3/4, as text next to the drawing
    assert "best of 4 (best) 0.64" in page.words


def test_page_shows_command_and_resolved_recipe(html: str) -> None:
    from ruamel.yaml import YAML

    page = Page(html)
    assert "./launch.sh recipes/toy.yaml aligned.kl_coef=0.05" in page.words
    (recipe,) = [text for text in page.text if text.startswith("name: toy")]
    read = YAML(typ="safe").load(recipe)
    assert read["seed"] == 7 and [step["name"] for step in read["steps"]] == ["base", "sft", "taste", "preference", "aligned", "verdict"]
    assert command({"recipe_file": "a b.yaml", "overrides": ["x.y=1 2"]}) == "./launch.sh 'a b.yaml' 'x.y=1 2'"
    assert command({"command": "stages run toy --home elsewhere", "recipe_file": "toy"}) == "stages run toy --home elsewhere"


def test_page_shows_seeds_devices_and_versions(html: str) -> None:
    words = Page(html).words
    for said in (
        "seed 7 precision bf16 device 2 CPU cores (Some CPU) processes 1 peak memory 1.00 GiB of the process",
        "system Python 3.11, Linux packages torch 2.13",
        "base 7 bf16 no 1 min 15 s 900 MiB of the process 20261123T000000Z Some CPU",  # reused: the values of the run that computed it
        "sft 7 bf16 no 12.5 s 900 MiB of the process this run Some CPU",
        "aligned 7 bf16 4, 3 graphs compiled in 12 s 12.5 s",
        "verdict 7 bf16 – 12.5 s",  # an evaluation trains nothing
    ):
        assert said in words, said


def test_page_says_why_layers_were_not_compiled() -> None:
    reason = "LlamaForCausalLM: layers are not compiled: int8 products divide each layer into many small graphs"
    facts = {"compiled": False, "layers": 0, "graphs": 0, "seconds": 0.0, "reason": reason}
    assert compiled_layers(facts) == f"no: {reason}"
    one_of_two = {"compiled": True, "layers": 2, "graphs": 1, "seconds": 3.2, "reason": reason}
    assert compiled_layers(one_of_two) == f"2, 1 graph compiled in 3 s; {reason}"
    assert compiled_layers(None) == ""  # a run of an earlier version


# The size of a page


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the figures, because drawing takes a second."""
    monkeypatch.setattr(page, "_figure_groups", lambda run: [])


def rewrite(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "verdict" / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def first_row(folder: Path, number: int = 4) -> dict[str, Any]:
    return dict(json.loads((folder / "verdict" / "completions.jsonl").read_text().splitlines()[number]))


def data_of(html: str) -> dict[str, Any]:
    """The JSON that the page's script reads."""
    (content,) = re.findall(r'<script type="application/json" data-role="data">(.*?)</script>', html, re.DOTALL)
    return dict(json.loads(content))


@pytest.mark.usefixtures("without_figures")
def test_page_has_room_for_five_thousand_short_completions(run_folder: Path) -> None:
    row = first_row(run_folder)
    rows = [
        {**row, "prompt": f"prompt {n}", "completions": {name: f"{name} {n} " * 12 for name in row["completions"]}} for n in range(1667)
    ]
    made = render_run(read_run(rewrite(run_folder, rows)))
    assert made.notes == [] and len(made.html.encode()) <= 2_000_000
    assert [row["p"] for row in data_of(made.html)["rows"]] == [f"prompt {n}" for n in range(1667)]


@pytest.mark.usefixtures("without_figures")
def test_completions_that_do_not_fit_are_sampled_evenly_and_counted(run_folder: Path) -> None:
    row = first_row(run_folder)
    texts = {name: "<&> \u00fcber. " * 500 for name in row["completions"]}  # 5,000 characters
    rows = [{**row, "prompt": f"prompt {n}", "completions": texts} for n in range(1667)]
    made = write_report(read_run(rewrite(run_folder, rows)), run_folder / "page.html")
    html = made.path.read_text()
    assert 1_900_000 < made.size == made.path.stat().st_size <= 2_000_000
    shown = data_of(html)["rows"]
    numbers = [int(row["p"].split()[1]) for row in shown]
    gaps = [after - before for before, after in zip(numbers, numbers[1:], strict=False)]
    assert numbers[0] == 0 and numbers[-1] == 1666 and max(gaps) - min(gaps) <= 1
    kept = [text for row in shown for text in row["c"] if text is not None]
    assert len(kept) == 3 * len(shown) and set(kept) == {texts["sft"][:4000]}
    assert shown[0]["m"] == {"0": 1000, "1": 1000, "3": 1000}
    said = (
        f"verdict: {len(shown)} of 1,667 prompts ({len(kept)} of 5,001 completions), evenly spread; {len(kept)} texts cut at 4,000 "
        "characters. Everything is in verdict/completions.jsonl of the run folder."
    )
    assert made.notes == [said] and said in Page(html).words
    assert "Scripts are off here: only the first 12 of" in html and "(4,000 more characters)" in Page(html).words


@pytest.mark.usefixtures("without_figures")
def test_texts_with_any_characters_are_shown_unchanged(run_folder: Path) -> None:
    texts = ["\u0645\u0631\u062d\u0628\u0627", "a\x00b\u2028c\u202ed", "\U0001f600 </script><!--", "\ud800"]
    row = first_row(run_folder)
    rows = [{**row, "prompt": text, "completions": {"sft": text}, "scores": {"gold": {"sft": float("nan")}}} for text in texts]
    made = write_report(read_run(rewrite(run_folder, rows)), run_folder / "page.html")
    shown = data_of(made.path.read_text())["rows"]
    assert [row["c"][1] for row in shown] == texts  # half of a surrogate pair is restored from its escape
    assert shown[0]["s"][0] == [None] * 4  # a value that is not a number gets no verdict


@pytest.mark.usefixtures("without_figures")
def test_very_long_text_is_cut(run_folder: Path) -> None:
    row = first_row(run_folder)
    rows = [row, {**row, "prompt": "x" * 3_000_000}]
    made = render_run(read_run(rewrite(run_folder, rows)))
    assert len(data_of(made.html)["rows"]) == 2 and "verdict: 1 texts cut at 4,000 characters" in made.notes[0]


def test_figures_are_left_out_to_make_room_for_completions(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "LIMIT", 160_000)
    made = render_run(read_run(run_folder))
    assert len(made.html.encode()) <= 160_000 and len(data_of(made.html)["rows"]) == 8
    (note,) = made.notes
    number = int(note.split()[0])
    assert note == f"{number} of 10 figures (the last ones) are left out: they do not fit on a page of 0.16 MB."
    assert note in Page(made.html).words and made.html.count("<figure") == 10 - number > 0


# The path of the page


def test_page_is_written_to_the_given_path(run_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "notes.html"
    other.write_text("mine")
    for path, message in (
        (tmp_path, "is a folder; expected a file for the page, for example"),
        (tmp_path / "no" / "page.html", "no is not there; expected a folder"),
        (other / "page.html", "notes.html is a file; expected a folder"),
        (other, "notes.html exists, but `stages report` did not write it. Choose another path"),
    ):
        result = CliRunner().invoke(app, ["report", str(run_folder), "--out", str(path)])
        assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1, result.output
    assert other.read_text() == "mine"
    result = CliRunner().invoke(app, ["report", "nothing", "--out", str(tmp_path / "page.html"), "--home", str(tmp_path)])
    assert result.exit_code == 2 and result.stderr.startswith("error: 'nothing' is not a run: expected a run folder")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.usefixtures("without_figures")
def test_earlier_report_is_replaced_atomically(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    arguments = ["report", str(run_folder), "--out", str(path)]
    assert CliRunner().invoke(app, arguments).stdout.startswith(f"The report: {path} (0.")
    before = path.read_text()
    assert CliRunner().invoke(app, arguments).exit_code == 0 and path.read_text() == before

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="page.html: No space left on device; free some space"):
        write_report(read_run(run_folder), path)
    assert path.read_text() == before and [file.name for file in tmp_path.iterdir() if file.is_file()] == ["page.html"]


def test_a_run_without_an_evaluation(run_folder: Path) -> None:
    summary = json.loads((run_folder / "summary.json").read_text())
    summary["steps"] = summary["steps"][:2]
    summary["finished"] = False
    (run_folder / "summary.json").write_text(json.dumps(summary))
    words = Page(render_run(read_run(run_folder)).html).words
    assert "toy: 2 steps, without an evaluation." in words
    assert "The run did not finish" in words


@pytest.mark.usefixtures("without_figures")
def test_missing_results_and_completions_of_an_evaluation_are_named(run_folder: Path) -> None:
    evaluation = run_folder / "verdict" / "evaluation.json"
    content = json.loads(evaluation.read_text())
    content["candidates"]["aligned"]["completions"] = 8
    evaluation.write_text(json.dumps(content))
    assert render_run(read_run(run_folder)).notes == []
    completions = run_folder / "verdict" / "completions.jsonl"
    completions.write_text("".join(completions.read_text().splitlines(keepends=True)[:3]))
    made = render_run(read_run(run_folder))
    assert any("verdict/completions.jsonl has 3 of 8 lines" in note for note in made.notes)
    assert "verdict/completions.jsonl has 3 of 8 lines" in Page(made.html).words
    completions.write_text('{"prompt": "x"}\n')
    with pytest.raises(DataError, match=r"completions\.jsonl:1: expected prompt, completions and scores"):
        render_run(read_run(run_folder))
    evaluation.unlink()
    assert any("has no verdict/evaluation.json" in note for note in render_run(read_run(run_folder)).notes)


def test_a_page_without_scores_shows_judges_that_compare(run_folder: Path) -> None:
    path = run_folder / "verdict" / "evaluation.json"
    evaluation = json.loads(path.read_text())
    evaluation["judges"] = evaluation["judges"][1:]
    evaluation["win_rates"] = [row for row in evaluation["win_rates"] if row["judge"] == "llm"]
    for row in evaluation["candidates"].values():
        row["scores"], row["score_intervals"] = {}, {}
    evaluation["best_of_n"], evaluation["agreement"] = {}, {}
    path.write_text(json.dumps(evaluation))
    words = Page(render_run(read_run(run_folder)).html).words
    assert "aligned loses: it wins 25 % of 8 prompts against sft, by llm" in words
    assert "By the same judge aligned also was not compared with base and best." in words


@pytest.mark.usefixtures("without_figures")
def test_reused_steps_without_logs_are_named(run_folder: Path) -> None:
    (run_folder / "sft" / "metrics.jsonl").unlink()
    words = Page(render_run(read_run(run_folder)).html).words
    assert "There is no training log of sft" in words


def test_old_summaries_are_read(run_folder: Path) -> None:
    """A run of an earlier version without inputs, config and description."""
    summary = json.loads((run_folder / "summary.json").read_text())
    for key in ("description", "environment"):
        del summary[key]
    for step in summary["steps"]:
        for key in ("inputs", "data", "config", "peak_memory_bytes", "seed", "circumstances"):
            del step[key]
    (run_folder / "summary.json").write_text(json.dumps(summary))
    assert "aligned wins 70 %" in Page(render_run(read_run(run_folder)).html).words


# Reading run folders


def test_a_run_is_found_by_its_folder_and_by_its_name(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (run_folder.parent / "latest").symlink_to(run_folder.name)
    for name in (str(run_folder), "toy", f"toy/{run_folder.name}", "runs/toy/latest"):
        assert find_run(name, tmp_path) == run_folder.resolve()
    with pytest.raises(DataError, match="'nothing' is not a run: .* runs in .*: toy/20261124T203818Z$"):
        find_run("nothing", tmp_path)
    with pytest.raises(DataError, match="not a run folder"):
        read_run(tmp_path)
    (run_folder / "verdict" / "evaluation.json").write_text('{"candidates": ')
    with pytest.raises(DataError, match="evaluation.json: not a valid evaluation .* Run the step again"):
        render_run(read_run(run_folder))


def test_incomplete_last_line_is_ignored_and_other_bad_lines_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == []
    path.write_text('{"a": 1}\n\n{"a": 2}\n{"a": ')
    assert read_lines(path) == [{"a": 1}, {"a": 2}]  # the last line was cut off
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n{"a": 4}\n')
    with pytest.raises(DataError, match="metrics.jsonl:2: bad JSON"):
        read_lines(path)


def test_thinned_keeps_evenly_spaced_items() -> None:
    assert thinned(range(10), 4) == [0, 3, 6, 9]
    assert thinned([1, 2], 4) == [1, 2]
    assert thinned([1, 2], 1) == [1] and thinned([1, 2], 0) == []


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize("gpu", [{"name": "NVIDIA H200", "memory_bytes": 2**37, "driver": "580.95"}, "NVIDIA H200"], ids=["now", "older"])
def test_gpu_run_shows_its_gpu_and_gpu_memory(new_run: Any, tmp_path: Path, gpu: Any) -> None:
    folder = new_run(tmp_path / "runs" / "toy" / "20261124T203818Z")
    summary = json.loads((folder / "summary.json").read_text())
    summary["environment"]["gpus"] = [gpu]
    summary["peak_gpu_memory_bytes"] = 77 * 2**30
    summary["steps"][1]["circumstances"]["peak_gpu_memory_bytes"] = 33 * 2**30
    (folder / "summary.json").write_text(json.dumps(summary))
    words = Page(render_run(read_run(folder)).html).words
    assert "1 x NVIDIA H200" in words
    assert "77.00 GiB at most" in words and "peak memory 77.00 GiB on the GPU, 1.00 GiB of the process" in words
    assert "sft 7 bf16 no 12.5 s 33.00 GiB on the GPU, 900 MiB of the process" in words
