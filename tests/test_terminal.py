"""The terminal: prompts from three sources, completions side by side, scores, and a conversation with a limited context."""

from __future__ import annotations

import copy
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stages.cli import app
from stages.config import GenerationSettings
from stages.corpora.templates import render_prompt
from stages.errors import DataError
from stages.terminal import Chat, Speaker, read_prompts


class Parrot:
    """A speaker that answers with the number of messages that it got. ``room`` messages fit into its context."""

    def __init__(self, name: str, converses: bool = True, room: int = 100) -> None:
        self.name, self.converses, self.room = name, converses, room
        self.asked: list[Any] = []

    def complete(self, prompts: Any, settings: Any, seeds: Any) -> list[str]:
        self.asked.append(prompts[0])
        return [f"{self.name} {len(self.asked)} {seeds[0]}"]

    def fits(self, prompt: Any, room: int) -> bool:
        return len(prompt) <= self.room if isinstance(prompt, list) else True


def talk(*speakers: Parrot) -> tuple[Chat, list[tuple[str, str]]]:
    said: list[tuple[str, str]] = []
    return Chat(speakers, GenerationSettings(), 5, lambda who, text: said.append((who, text))), said  # type: ignore[arg-type]


def test_a_conversation_is_remembered() -> None:
    parrot = Parrot("polly")
    chat, said = talk(parrot)
    assert chat.hear("hello") and chat.hear("and?")
    assert said == [("polly", "polly 1 6"), ("polly", "polly 2 7")]
    assert [message["role"] for message in parrot.asked[1]] == ["user", "assistant", "user"]
    chat.hear("/again")
    assert [message["content"] for message in chat.history] == ["hello", "polly 1 6", "and?", "polly 3 8"]
    chat.hear("/system be brief")
    chat.hear("/forget")
    assert [message["content"] for message in chat.history] == ["be brief"]
    chat.hear("/nonsense")
    assert said[-1][1].startswith("/again")
    assert chat.hear("   ") and not chat.hear("/quit")


def test_models_with_and_without_a_template_chat() -> None:
    polly, base = Parrot("polly"), Parrot("base", converses=False)
    chat, said = talk(polly, base)
    chat.hear("one")
    chat.hear("two")
    assert [who for who, _ in said] == ["polly", "base"] * 2
    assert base.asked == ["one", "two"] and chat.history[-1]["content"] == "polly 2 7"


def test_full_context_drops_the_oldest_turns() -> None:
    parrot = Parrot("polly", room=3)
    chat, said = talk(parrot)
    chat.hear("/system be brief")
    for line in ("one", "two", "three"):
        chat.hear(line)
    assert [message["content"] for message in parrot.asked[-1]] == ["be brief", "three"]
    assert ("polly", "(the first 4 messages were dropped: its context is full)") in said
    parrot.room = 0
    chat.hear("four")
    assert said[-1] == ("polly", "(your message is longer than its context)")


def test_prompts_from_the_line_a_file_or_a_pipe(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "from a file"}\n')
    assert read_prompts(["typed"], path, lambda: "piped") == ["typed", "from a file"]
    assert read_prompts([], None, lambda: "first\n\nsecond\n") == ["first", "second"]
    with pytest.raises(DataError, match="no prompt: give --prompt TEXT"):
        read_prompts([], None, None)


@pytest.fixture
def reward_folder(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    import torch

    from stages.models.heads import RewardModel

    RewardModel.from_language_model(tiny_llama_folder, dtype=torch.float32).save(tmp_path / "reward")
    return tmp_path / "reward"


def test_generate_shows_scores_of_a_reward_model(
    tiny_llama_folder: Path, reward_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["generate", str(tiny_llama_folder), "--score", str(reward_folder), "--max-new-tokens", "4"]
    result = CliRunner().invoke(app, [*arguments, "--json"], input="the film\na fine plot\n")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["prompt"] for row in rows] == ["the film", "a fine plot"]
    assert all(isinstance(row["scores"][str(tiny_llama_folder)], float) for row in rows)
    table = CliRunner().invoke(app, [*arguments, "--prompt", "the film"])
    assert f"[{rows[0]['scores'][str(tiny_llama_folder)]:.3f}]" in table.stdout


def test_template_arguments_change_the_text_of_generate_and_chat(
    tiny_llama_folder: Path, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama_folder, "polite")
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.content }}{% endfor %}{% if add_generation_prompt %}{{ ' please' if polite }}:{% endif %}"
    )
    tokenizer.save_pretrained("polite")
    shutil.copytree("polite", "other")

    def shown(self: Speaker, prompts: Any, *_: Any) -> list[str]:
        return [render_prompt(self.tokenizer, prompt) for prompt in prompts]

    monkeypatch.setattr(Speaker, "complete", shown)
    generate = ["generate", "./polite", "--against", "./other", "--prompt", "write a longer line", "--json", "--template-arguments"]
    (row,) = json.loads(CliRunner().invoke(app, [*generate, '{"polite": true}']).stdout)
    assert row == {"prompt": "write a longer line", "./polite": "write a longer line please:", "./other": "write a longer line:"}
    chat = CliRunner().invoke(
        app, ["chat", "./polite", "--max-new-tokens", "4", "--template-arguments", '{"polite": true}'], input="write a longer line\n"
    )
    assert "write a longer line please:" in chat.stdout
    assert "does not use polit; it uses polite" in CliRunner().invoke(app, [*generate, '{"polit": true}']).stderr
    assert "--template-arguments polite=true: expected a JSON object" in CliRunner().invoke(app, [*generate, "polite=true"]).stderr


def test_chat_answers_and_takes_commands(tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    arguments = ["chat", str(tiny_llama_folder), "--max-new-tokens", "3"]
    result = CliRunner().invoke(app, arguments, input="the film\n/again\n/quit\n")
    assert result.exit_code == 0, result.output
    assert "has no chat template" in result.stdout and result.stdout.count(f"{tiny_llama_folder}  ") >= 1
    assert CliRunner().invoke(app, arguments, input="the film\n").exit_code == 0  # the end of the input ends it
