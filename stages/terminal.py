"""Models in the terminal: completions of one or several models side by side, optionally scored, and a small chat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue, TypeAdapter, ValidationError

from stages.chain.pins import apart_from_folders, pinned_model
from stages.chain.resolving import resolve
from stages.config import DataSource, Engine, GenerationSettings, ModelInput
from stages.corpora.prompts import load_prompts
from stages.corpora.templates import encode_prompt
from stages.errors import DataError, RecipeError
from stages.models.precision import auto_precision, width_of
from stages.recipe.schema import find_model
from stages.rewards.config import RewardInput
from stages.tokens.positions import readable_length

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from stages.corpora.conversations.messages import Message, Prompt
    from stages.model_types import TransformersModel
    from stages.process.runtime import Runtime
    from stages.registry.ledger import Registry
    from stages.registry.references import ResolvedModel
    from stages.sampling.sampler import Sampler
    from stages.serving import Scorer

TemplateArguments = dict[str, JsonValue]
HELP = "/again: another reply   /forget: start again   /system TEXT: set the system message   /quit, or Ctrl-D"


def resolve_model(ref: str, registry: Registry, arguments: TemplateArguments | None = None) -> ResolvedModel:
    """The model that a registry reference, folder or Hub id names. Raises RecipeError that lists what was searched.

    ``arguments``: the ``template_arguments`` of the model.
    """
    reference = pinned_model(find_model(ModelInput(ref=ref, template_arguments=arguments or {}), registry, [Path.cwd()]))
    return apart_from_folders(resolve(reference, registry))


@dataclass
class Speaker:
    """A language model that answers in the terminal."""

    name: str
    model: TransformersModel
    tokenizer: PreTrainedTokenizerBase
    sampler: Sampler

    @classmethod
    @contextmanager
    def load(
        cls, ref: str, registry: Registry, runtime: Runtime, engine: str = "local", arguments: TemplateArguments | None = None
    ) -> Iterator[Speaker]:
        """Context manager that loads the model ``ref`` with the template arguments. ``engine``: what samples, as read by ``engine_of``."""
        from stages.engines.opening import Workplace, check_reachable, open_sampler
        from stages.models.loaded import LoadedModel

        settings = GenerationSettings(engine=engine_of(engine))
        check_reachable(settings)
        source = resolve_model(ref, registry, arguments)
        dtype = _dtype(source, registry, runtime)
        loaded = LoadedModel.frozen(source, dtype, runtime.device)
        cache = registry.root.parent / "cache"
        with open_sampler(settings, loaded, Workplace(runtime, cache / "vllm.log", cache / "served")) as sampler:
            yield cls(ref, loaded.model, loaded.tokenizer, sampler)

    @property
    def converses(self) -> bool:
        """Whether it has a chat template. Without one it can only continue a text."""
        return bool(self.tokenizer.chat_template)

    def complete(self, prompts: Sequence[Prompt], settings: GenerationSettings, seeds: Sequence[int]) -> list[str]:
        """One completion per prompt. Equal seeds give equal completions."""
        from stages.sampling.generation import decode_completions

        generated = self.sampler.sample([encode_prompt(self.tokenizer, prompt) for prompt in prompts], settings, seeds)
        return decode_completions(self.tokenizer, generated)

    def fits(self, prompt: Prompt, room: int) -> bool:
        """Whether ``room`` tokens remain after the prompt, within the limits of model and tokenizer."""
        positions = readable_length(self.model.config, self.tokenizer)
        return positions is None or len(encode_prompt(self.tokenizer, prompt)) + room <= positions


def read_arguments(text: str | None) -> TemplateArguments:
    """The template arguments in a JSON object; none for None. Raises RecipeError for other texts."""
    try:
        return TypeAdapter(TemplateArguments).validate_json(text) if text is not None else {}
    except ValidationError as error:
        raise RecipeError(f"--template-arguments {text}: expected a JSON object, e.g. '{{\"enable_thinking\": false}}'") from error


def engine_of(text: str) -> Engine | None:
    """The engine for ``vllm`` (a server is started) or the address of a vLLM server; None for ``local``. Raises RecipeError for others."""
    if text == "local":
        return None
    try:
        return Engine.model_validate({"vllm": {"start": {}} if text == "vllm" else {"url": text}})
    except ValidationError as error:
        expected = "expected local, vllm, or the address of a vLLM server (http://HOST:PORT)"
        raise RecipeError(f"engine {text!r} is unknown; {expected}") from error


def read_prompts(texts: Sequence[str], file: Path | None, piped: Callable[[], str] | None) -> list[Prompt]:
    """Prompts from the command line, from a data file, or else one per line from standard input. Raises DataError if there is no prompt."""
    prompts: list[Prompt] = list(texts)
    if file is not None:
        prompts += load_prompts([DataSource(path=str(file))], split="test")
    if not prompts and piped is not None:
        prompts = [line for line in piped().split("\n") if line.strip()]
    if not prompts:
        raise DataError("no prompt: give --prompt TEXT or --prompts FILE, or pipe in one prompt per line")
    return prompts


def score(ref: str, registry: Registry, runtime: Runtime, prompts: Sequence[Prompt], columns: Sequence[Sequence[str]]) -> list[list[float]]:
    """A reward model's score of every completion, by column."""
    from stages.rewards.building import build_source
    from stages.rewards.details import checked

    model = resolve_model(ref, registry)
    source = build_source(RewardInput(model=ModelInput(ref=ref)), model, device=runtime.device, dtype=_dtype(model, registry, runtime))
    return [checked(source.score(prompts, column), ref, column).tolist() for column in columns]


def scorer(ref: str, registry: Registry, runtime: Runtime, *, label: str | None, output: str) -> Scorer:
    """The scorer behind `stages serve`. Raises RecipeError for invalid options, and ModelError for a model that cannot score."""
    from stages.rewards.learned import load_source
    from stages.serving import Scorer

    label_or_index = int(label) if label is not None and label.isdigit() else label
    try:
        given = RewardInput.model_validate({"model": ref, "label": label_or_index, "output": output, "reads": "prompt_and_completion"})
    except ValidationError as error:
        raise RecipeError(f"serve {ref}: {error.errors()[0]['msg']}") from error
    model = resolve_model(ref, registry)
    return Scorer(load_source(given, model, device=runtime.device, dtype=_dtype(model, registry, runtime)), model)  # type: ignore[arg-type]


def _dtype(model: ResolvedModel, registry: Registry, runtime: Runtime) -> torch.dtype:
    """The dtype of ``precision: auto`` for a model that is used outside of a step."""
    if runtime.device.type == "cpu":
        runtime.auto = auto_precision(lambda: width_of([model]), registry.root.parent / "cache")
    return runtime.dtype("auto")


class Chat:
    """A conversation with one model, or with two models of which only the first one's replies are kept.

    ``say`` shows a line: the speaker's name and the text.
    """

    def __init__(self, speakers: Sequence[Speaker], settings: GenerationSettings, seed: int, say: Callable[[str, str], None]) -> None:
        self.speakers, self.settings, self.say = speakers, settings, say
        self.seed = seed
        self.history: list[Message] = []

    def hear(self, line: str) -> bool:
        """Process one line of user input. Returns False if it ends the conversation."""
        line = line.strip()
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return False
        if command == "/forget":
            self.history = [message for message in self.history if message["role"] == "system"]
            self.say("", "forgotten")
        elif command == "/system":
            self.history = [{"role": "system", "content": rest}, *(message for message in self.history if message["role"] != "system")]
            self.say("", "the system message is set")
        elif command == "/again" and self.history and self.history[-1]["role"] == "assistant":
            self.history.pop()
            self._reply()
        elif command.startswith("/"):
            self.say("", HELP)
        elif line:
            self.history.append({"role": "user", "content": line})
            self._reply()
        return True

    def _reply(self) -> None:
        self.seed += 1
        replies = []
        for speaker in self.speakers:
            prompt: Prompt = list(self.history) if speaker.converses else self.history[-1]["content"]
            while isinstance(prompt, list) and len(prompt) > 1 and not speaker.fits(prompt, self.settings.max_new_tokens):
                dropped = next(index for index, message in enumerate(prompt) if message["role"] != "system")
                prompt = prompt[:dropped] + prompt[dropped + 1 :]
                while len(prompt) > dropped and prompt[dropped]["role"] == "assistant":
                    prompt = prompt[:dropped] + prompt[dropped + 1 :]
            if not prompt or not speaker.fits(prompt, self.settings.max_new_tokens):
                self.say(speaker.name, "(your message is longer than its context)")
                replies.append("")
                continue
            if isinstance(prompt, list) and len(prompt) < len(self.history):
                self.say(speaker.name, f"(the first {len(self.history) - len(prompt)} messages were dropped: its context is full)")
            replies += speaker.complete([prompt], self.settings, [self.seed])
            self.say(speaker.name, replies[-1])
        self.history.append({"role": "assistant", "content": replies[0]})
