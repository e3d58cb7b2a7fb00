"""The question of a generative reward model: a prompt text about a completion, and its two possible answers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.utils import cached_file

from stages.errors import ModelError

if TYPE_CHECKING:
    from stages.registry.references import ResolvedModel

QUESTION_FILE = "reward_question.json"


@dataclass(frozen=True)
class RewardQuestion:
    """The score of a completion is log P(first answer) - log P(second answer) after ``question``, with the model's chat template.

    ``question`` contains {prompt} and {completion}.
    """

    question: str
    answers: tuple[str, str]

    def filled(self, prompt: str, completion: str) -> str:
        """The question for one completion."""
        before, _, after = self.question.partition("{completion}")
        parts = [part.replace("{prompt}", prompt) for part in (before, *after.split("{completion}"))]
        return completion.join(parts)

    def write(self, folder: Path) -> None:
        """Save it in the model's folder."""
        content = {"score": "log P(answers[0]) - log P(answers[1])", **asdict(self)}
        (folder / QUESTION_FILE).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_question(model: ResolvedModel) -> RewardQuestion | None:
    """The question of a generative reward model; None for any other model. Raises ModelError if the file is invalid."""
    options = {"revision": model.input.revision, "_raise_exceptions_for_missing_entries": False}
    try:
        path = cached_file(model.path, QUESTION_FILE, **options)
    except (OSError, ValueError):  # loading the model reports the error
        return None
    if path is None:
        return None
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        first, second = (str(answer) for answer in content["answers"])
        return RewardQuestion(str(content["question"]), (first, second))
    except (OSError, ValueError, KeyError, TypeError) as error:
        expected = "expected an object with question (a text) and answers (two texts)"
        raise ModelError(f"{model.ref!r}: {QUESTION_FILE} cannot be read ({type(error).__name__}: {error}); {expected}") from error


def is_generative(model: ResolvedModel) -> bool:
    """Whether a model is a generative reward model: by its role in the registry, or by the question file in a folder or Hub repository."""
    if model.record is not None:
        return model.record.role == "generative_reward_model"
    return read_question(model) is not None
