"""Every command and every YAML example of the documentation is accepted by the program that it is written for."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import pytest
import typer
from ruamel.yaml import YAML

from stages.cli import app
from stages.recipe.schema import load_recipe
from stages.sweep.grid import read_grid

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = sorted([*(REPOSITORY / "docs").glob("*.md"), *REPOSITORY.glob("*.md")])
OVERRIDE = re.compile(r"[\w.\-\[\]]+=")

RECIPE = textwrap.dedent("""\
    name: page
    steps:
      - {stage: ppo, name: aligned, policy: sft, reward: [{function: "mymodule:score"}], data: prompts.jsonl, total_episodes: 64}
""")


def _blocks(language: str) -> list[Any]:
    blocks = []
    for page in PAGES:
        texts = re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        blocks += [pytest.param(text, id=f"{page.name}-{index}") for index, text in enumerate(texts)]
    return blocks


def _commands() -> list[str]:
    """The lines of the blocks of bash."""
    return sorted({line for block in _blocks("bash") for line in str(block.values[0]).splitlines()})


def _mentions() -> list[str]:
    """Commands between backticks in a sentence. They may have no arguments: `stages models show`."""
    texts = [re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL) for page in PAGES]
    return sorted({line for text in texts for line in re.findall(r"`((?:stages|\./launch\.sh|accelerate launch|python) [^`]+)`", text)})


def _parse(arguments: list[str]) -> None:
    """Give ``arguments`` to the parser of ``stages``. Nothing runs. A wrong command or option raises a usage error.

    Typer has its own copy of click, so a group is known by its method and not by its class.
    """
    command: Any = typer.main.get_command(app)
    context = command.make_context("stages", list(arguments[:1]))
    while hasattr(command, "resolve_command"):
        name, command, arguments = command.resolve_command(context, arguments)
    command.make_context(name, list(arguments), parent=context)


@pytest.mark.parametrize("arguments", [["runn", "RECIPE"], ["run", "RECIPE", "--hom", "x"], ["models", "shows", "REF"]])
def test_the_parser_refuses_a_wrong_command(arguments: list[str]) -> None:
    with pytest.raises(Exception, match="No such (command|option)"):
        _parse(arguments)


def _recipe_words(words: list[str]) -> None:
    """Check that a shipped recipe in a command exists and accepts the overrides after it."""
    recipes = [word for word in words if word.startswith("recipes/") and word.endswith(".yaml") and "/accelerate/" not in word]
    overrides = [word for word in words if OVERRIDE.match(word)]
    for recipe in recipes:
        if words[1] == "sweep":
            read_grid(str(REPOSITORY / recipe), overrides)
        else:
            load_recipe(REPOSITORY / recipe, overrides)


@pytest.mark.parametrize("line", _commands())
def test_command_is_accepted(line: str) -> None:
    _check(line)


@pytest.mark.parametrize("line", _mentions())
def test_mentioned_command_is_accepted(line: str) -> None:
    try:
        _check(line)
    except Exception as error:
        if type(error).__name__ != "MissingParameter" and not (line.endswith(" --help") and type(error).__name__ == "Exit"):
            raise


def _check(line: str) -> None:
    """Give a command to the parser of the program that it starts."""
    words = shlex.split(re.split(r"\s\.\.\.(?:\s|$)", line)[0], comments=True)  # an unquoted ... means further words
    if not words or words[:1] == ["git"] or "pip" in words[0] or "pre-commit" in words[0] or words[0] == "export":
        return
    if words[0] == "stages":
        _parse(words[1:])
    elif words[0] == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        parsed = launch_command_parser().parse_args(words[2:] or ["-m", "stages"])
        assert parsed.training_script == "stages" and parsed.module
        _parse(parsed.training_script_args or ["run", "RECIPE"])
    elif words[0] == "./launch.sh":
        _launch(words[1:])
    elif "python" in words[0]:
        _python(words[1:])
    else:
        pytest.fail(f"the documentation has a command that this test does not know: {line}")
    _recipe_words(words)


def _launch(words: list[str]) -> None:
    """``launch.sh`` takes a recipe, ``test`` with pytest's options, or a command of ``stages``."""
    if words == ["--with-vllm"]:  # only makes the environments
        assert f"./launch.sh {words[0]} " in (REPOSITORY / "launch.sh").read_text()
    elif words[0] == "test":
        assert all((REPOSITORY / word).exists() for word in words[1:] if word.startswith("tests/"))
    elif words[0].endswith(".yaml") or words[0] == "RECIPE":
        _parse(["run", *(word for word in words if not word.startswith("--") and not word.isdigit() and "/accelerate/" not in word)])
    else:
        _parse(words)


def _python(words: list[str]) -> None:
    if words[0] == "-m":
        assert words[1] in ("stages", "ruff", "mypy", "pytest", "sphinx", "pip"), words
    else:
        assert (REPOSITORY / words[0]).is_file(), f"{words[0]} does not exist"


@pytest.mark.parametrize("block", _blocks("yaml"))
def test_yaml_example_is_accepted(block: str, tmp_path: Path) -> None:
    content = YAML(typ="safe").load(block)
    if "ranking" in content:
        from stages.config import DataSource
        from stages.labelling.config import load_questions

        (tmp_path / "questions.yaml").write_text(block)
        assert load_questions(DataSource(path=str(tmp_path / "questions.yaml"))).title == content["title"]
        return
    for name in re.findall(r"[\w-]+\.(?:jsonl|csv|md|yaml)\b", RECIPE + block):
        (tmp_path / name).touch()
    for name in ("base", "sft", "dpo", "aligned", "aligned-1", "preference", "preference-1", "taste", "rm-1", "rm-2"):
        (tmp_path / name).mkdir()  # models that earlier steps would have made
        (tmp_path / name / "config.json").touch()
    recipe = YAML(typ="safe").load(RECIPE)
    if isinstance(content, list):  # steps
        recipe["steps"] = content
    elif "steps" in content:  # a complete recipe
        recipe = content
    elif "validation" in content.get("data", {}):  # the data of a sentiment classifier
        recipe["steps"] = [{"stage": "sentiment", "name": "sentiment", "model": "distilbert-base-uncased", **content}]
    elif "train" in content.get("data", {}):  # the data of a reward model
        recipe["steps"] = [{"stage": "reward_model", "name": "preference", "model": "sft", **content}]
    else:  # fields of PPO
        recipe["steps"][0] |= content
    file = tmp_path / "page.yaml"
    with file.open("w") as stream:
        YAML().dump(recipe, stream)
    assert load_recipe(file).steps
