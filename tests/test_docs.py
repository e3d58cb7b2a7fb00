"""The documentation is correct: its Python snippets run, its links have targets, and the files that it names exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
CODE = ("stages/**/*.py", "tests/benchmarks/**/*.py", "recipes/*.yaml", "launch.sh")
PAGES = sorted([*(REPOSITORY / "docs").glob("*.md"), *REPOSITORY.glob("*.md")])


def test_python_page_runs_from_top_to_bottom(tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"word {number}", "completion": "yes"} for number in range(32)]
    (tmp_path / "rows.jsonl").write_text("".join('{"prompt": "a", "completion": "b"}\n' for _ in range(20)))
    (tmp_path / "recipe.yaml").write_text(
        f"name: mine\nsteps:\n  - {{stage: sft, name: sft, model: {tiny_llama_folder}, data: {{train: rows.jsonl}}}}\n"
    )
    namespace: dict[str, Any] = {
        "model": AutoModelForCausalLM.from_pretrained(tiny_llama_folder),
        "tokenizer": AutoTokenizer.from_pretrained(tiny_llama_folder),
        "demonstrations": rows,
        "comparisons": [{"prompt": row["prompt"], "chosen": "yes", "rejected": "no"} for row in rows],
        "prompts": [{"prompt": row["prompt"]} for row in rows],
        "heldout": [{"prompt": f"other {number}"} for number in range(4)],
        "home": str(tmp_path / "home"),
    }
    snippets = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "python.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) == 6
    for snippet in snippets:
        exec(compile(snippet, "docs/python.md", "exec"), namespace)
    assert namespace["aligned"].ref == "python/ppo@1"
    assert sum(value is not None for value in namespace["losses"]) == 2
    assert namespace["page"].is_file()


def test_web_pages_are_built_without_a_warning(tmp_path: Path) -> None:
    """Each page is in the navigation, each link inside of the documentation leads to a heading, and the reference finds its classes."""
    from sphinx.cmd.build import build_main

    assert build_main(["-q", "-W", "--keep-going", str(REPOSITORY / "docs"), str(tmp_path / "html")]) == 0
    assert "PPO" in (tmp_path / "html" / "api.html").read_text()


def test_settings_page_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "docs"))
    import settings

    text = settings.PAGE.read_text(encoding="utf-8")
    assert settings.TABLES.search(text)[2] == settings.tables(), "run: python docs/settings.py"


def test_settings_page_names_the_values_of_a_field_with_fixed_values() -> None:
    rows = (REPOSITORY / "docs" / "settings.md").read_text(encoding="utf-8").splitlines()
    endings = {
        "| `missing_eos` |": "Values: `none`, `replace`, `subtract`. |",
        "| `trackers` |": "Values: `tensorboard`, `wandb`, `trackio`. |",  # a list
        "| `overlap` |": "Values: `0`, `1`. |",
    }
    for start, end in endings.items():
        assert any(row.startswith(start) and row.endswith(end) for row in rows), start


def test_settings_page_says_what_each_field_means_and_which_numbers_are_allowed() -> None:
    text = (REPOSITORY / "docs" / "settings.md").read_text(encoding="utf-8")
    rows = [re.split(r"(?<!\\)\|", row) for row in text.splitlines() if row.startswith("| `")]
    assert len(rows) > 250
    assert [row[1] for row in rows if re.match(r" (Fields: |Values: |Range: |Different defaults: |$)", row[3])] == []
    meanings = {(row[1].strip(), row[2].strip()): row[3] for row in rows}
    assert meanings["`kl.update_limit`", "`null`"].endswith("Range: > 0. ")
    assert meanings["`validation_fraction`", "`0.05`"].endswith("Range: > 0, < 1. ")
    assert meanings["`pass_mark`", "`0.75`"].endswith("Range: 0 to 1. ")


def test_settings_page_has_a_section_for_each_kind_of_judge() -> None:
    """The fields ``name`` and ``num_prompts`` of several kinds of judges have the same path in a recipe."""
    text = (REPOSITORY / "docs" / "settings.md").read_text(encoding="utf-8")
    stage = text.partition("## evaluation")[2].partition("\n## ")[0]
    assert re.findall(r"\(#([\w-]+)\)", next(row for row in stage.splitlines() if row.startswith("| `judges` |"))) == [
        "a-reward-source",
        "a-language-model-as-a-judge",
        "judgements-from-a-file",
        "people-as-a-judge",
    ]
    assert "`judges[]" not in stage


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    missing = [target for target in targets if target and not (page.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:tests|recipes|docs|data/(?:world|labelling))/[\w./-]+\.\w+)`", text))
    named |= {f"stages/{name}" for name in re.findall(r"`((?:rl|stats|kernels|sampling|models|corpora|ppo)/\w+\.py)`", text)}
    missing = sorted(name for name in named if not (REPOSITORY / name).exists())
    assert missing == []


def test_pages_and_sections_that_code_names_exist() -> None:
    """Code writes ``docs/page.md``, or ``docs/page.md, section "Heading"``. The text may be split over two lines or two strings."""
    named, missing = 0, []
    for file in sorted({file for pattern in CODE for file in REPOSITORY.glob(pattern)}):
        text = re.sub(r"[\s#]+", " ", re.sub(r'"\s*\n\s*f?"', "", file.read_text(encoding="utf-8")))
        for page, heading in re.findall(r'\bdocs/([\w-]+\.md)(?:, (?:section|paragraph) "([^"]+)")?', text):
            named += 1
            path = REPOSITORY / "docs" / page
            if not path.exists() or (heading and not re.search(rf"^(#+ |\*\*){re.escape(heading)}", path.read_text(), re.MULTILINE)):
                missing.append(f"{file.relative_to(REPOSITORY)}: docs/{page} {heading}")
    assert missing == []
    assert named > 30
