"""The commands that use a model: generate, chat, serve."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stages.commands.errors import reports_errors
from stages.commands.options import AnyModel, Debug, Home, Json, make_runtime, print_json, registry_in

if TYPE_CHECKING:
    from stages.json_types import JsonObject

MaxNewTokens = Annotated[int, typer.Option(min=1, help="Maximum tokens per completion.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="Lower: less variety; 0: always the most likely token.")]
TopP = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Sample from the most likely tokens with this total probability; 1: all tokens.")
]
Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same completions.")]
SamplingEngine = Annotated[
    str, typer.Option(metavar="ENGINE", help="What samples: local, vllm (a server is started), or the address of a vLLM server.")
]
TemplateArguments = Annotated[
    str | None, typer.Option(metavar="JSON", help="Arguments of REF's chat template, e.g. '{\"enable_thinking\": false}'.")
]


@reports_errors
def generate(
    ref: AnyModel,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; repeatable. Default: one per line of standard input.")] = None,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="A data file with prompts.")] = None,
    against: Annotated[str | None, typer.Option(metavar="REF2", help="A second model, shown next to the first.")] = None,
    score: Annotated[str | None, typer.Option(metavar="REWARD", help="A reward model that scores the completions.")] = None,
    max_new_tokens: MaxNewTokens = 48,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    num_samples: Annotated[int, typer.Option(min=1, help="Completions per prompt.")] = 1,
    engine: SamplingEngine = "local",
    template_arguments: TemplateArguments = None,
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Complete prompts with one model, or two side by side."""
    from rich.text import Text

    from stages import terminal
    from stages.config import GenerationSettings
    from stages.corpora.prompts import plain_text
    from stages.process.tables import Table

    refs = list(dict.fromkeys([ref] if against is None else [ref, against]))
    runtime, registry = make_runtime(), registry_in(home)
    arguments = terminal.read_arguments(template_arguments)
    given = terminal.read_prompts(prompt or [], prompts, None if sys.stdin.isatty() else sys.stdin.read)
    asked = [one for one in given for _ in range(num_samples)]
    settings = GenerationSettings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p or 1e-6)
    seeds = [seed + index for index in range(len(asked))]
    columns = []
    for name in refs:
        with terminal.Speaker.load(name, registry, runtime, engine, arguments if name == ref else None) as speaker:
            columns.append(speaker.complete(asked, settings, seeds))
    scores = terminal.score(score, registry, runtime, asked, columns) if score is not None else []
    if as_json:
        rows: list[JsonObject] = []
        for index, one in enumerate(asked):
            row: JsonObject = {"prompt": one, **{name: column[index] for name, column in zip(refs, columns, strict=True)}}
            if scores:
                row["scores"] = {name: column[index] for name, column in zip(refs, scores, strict=True)}
            rows.append(row)
        print_json(rows)
        return
    table = Table("prompt", *refs, show_lines=True)
    for index, one in enumerate(asked):
        marks = [f"\n[{column[index]:.3f}]" for column in scores] or [""] * len(columns)
        cells = [column[index] + mark for column, mark in zip(columns, marks, strict=True)]
        table.add_row(Text(plain_text(one)), *(Text(cell) for cell in cells))  # Text: a model's brackets are not markup
    runtime.console.print(table)


@reports_errors
def serve(
    ref: AnyModel,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any free one.")] = 8000,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Another one lets other machines connect, and needs a key.")
    ] = "127.0.0.1",
    label: Annotated[str | None, typer.Option(help="Classifier: the class to score, by name or index.")] = None,
    output: Annotated[str, typer.Option(help="Classifier: which output is the score: logit, probability or logprob.")] = "logit",
    api_key_variable: Annotated[str | None, typer.Option(metavar="NAME", help="Environment variable with the API key.")] = None,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Serve the scores of a reward model or classifier over HTTP.

    The protocols are those of OpenRLHF and vLLM.
    """
    from stages import serving, terminal
    from stages.process.environment import secret

    runtime, registry = make_runtime(), registry_in(home)
    key = secret(api_key_variable) if api_key_variable is not None else None
    scorer = terminal.scorer(ref, registry, runtime, label=label, output=output)
    serving.serve(scorer, host=host, port=port, key=key, say=lambda line: runtime.console.print(line))


@reports_errors
def chat(
    ref: AnyModel,
    against: Annotated[str | None, typer.Option(metavar="REF2", help="A second model that also answers; its replies are not kept.")] = None,
    system: Annotated[str | None, typer.Option(help="System message to begin with.")] = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    engine: SamplingEngine = "local",
    template_arguments: TemplateArguments = None,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Chat with a model. A model without a chat template continues each line separately."""
    from rich.text import Text

    from stages import terminal
    from stages.config import GenerationSettings

    runtime, registry = make_runtime(), registry_in(home)
    console = runtime.console
    with ExitStack() as stack:
        arguments = terminal.read_arguments(template_arguments)
        refs = [ref] if against is None else [ref, against]
        speakers = [
            stack.enter_context(terminal.Speaker.load(name, registry, runtime, engine, arguments if index == 0 else None))
            for index, name in enumerate(refs)
        ]
        for speaker in speakers:
            if not speaker.converses:
                console.print(f"{speaker.name} has no chat template: it continues each line separately.", style="yellow")
        console.print(terminal.HELP, style="dim")

        def say(who: str, text: str) -> None:
            console.print(Text.assemble((f"{who}  " if who else "", "bold"), text))

        settings = GenerationSettings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p or 1e-6)
        talk = terminal.Chat(speakers, settings, seed, say)
        if system is not None:
            talk.history.append({"role": "system", "content": system})
        while True:
            try:
                if not talk.hear(input("> ")):
                    return
            except (EOFError, KeyboardInterrupt):
                typer.echo()
                return
