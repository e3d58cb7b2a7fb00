"""Writes docs/settings.md, the reference of all recipe fields, from the config classes of the stages.

python docs/settings.py            # rewrites the tables
python docs/settings.py --check    # exit status 1 if the tables are not up to date
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

from generated import write_or_check
from pydantic import BaseModel
from pydantic.fields import FieldInfo

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from stages.config import OptimizerSettings, StepConfig, TrainingStepConfig  # noqa: E402
from stages.recipe.schema import STAGES, RecipeHeader, config_class  # noqa: E402

PAGE = Path(__file__).resolve().parent / "settings.md"
TABLES = re.compile(r"(<!-- settings -->\n\n)(.*?)(\n<!-- end -->)", re.DOTALL)

TITLES = {
    "ModelInput": "A model",
    "DataSource": "A data source",
    "DataInput": "Training and held-out data",
    "LoraSettings": "An adapter",
    "OptimizerSettings": "Training",
    "CheckpointSettings": "Checkpoints",
    "GenerationSettings": "Generation",
    "RewardInput": "A reward source",
    "PromptFit": "Long prompts",
    "Curation": "Curation of rows",
    "People": "People who rank",
    "EndpointJudge": "A language model as a judge",
    "JudgementsFile": "Judgements from a file",
    "PeopleJudge": "People as a judge",
}
"""Headings of the groups that have their own section, by class: those of several fields, and the kinds of judges."""
SYMBOLS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def blocks_of(annotation: object) -> Iterator[type[BaseModel]]:
    """The config classes in an annotation, e.g. those in ``list[A | B]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from blocks_of(part)


def choices_of(annotation: object) -> list[str]:
    """The fixed values in an annotation, as in a recipe, e.g. ``["auto"]`` for ``int | Literal["auto"]``."""
    if get_origin(annotation) is Literal:
        return [written(value) for value in get_args(annotation)]
    if get_origin(annotation) in (Union, UnionType, list, Annotated):
        return [value for part in get_args(annotation) for value in choices_of(part)]
    return []


def shared(block: type[BaseModel]) -> type[BaseModel]:
    """The class whose section has the fields of ``block``: optimizer settings of a stage differ from the shared ones in defaults only."""
    is_trainer = issubclass(block, OptimizerSettings) and set(block.model_fields) == set(OptimizerSettings.model_fields)
    return OptimizerSettings if is_trainer else block


def users(stages: list[type[BaseModel]]) -> Counter[type[BaseModel]]:
    """How many fields of other classes have a value of each class."""
    counts: Counter[type[BaseModel]] = Counter()
    waiting, seen = list(stages), set(stages)
    while waiting:
        owner = waiting.pop()
        for field in owner.model_fields.values():
            for block in dict.fromkeys(shared(block) for block in blocks_of(field.annotation)):
                counts[block] += 1
                if block not in seen:
                    seen.add(block)
                    waiting.append(block)
    return counts


def cell(text: str) -> str:
    linked = re.sub(r"\bdocs/([\w-]+\.md)", r"[\1](\1)", text)
    return " ".join(linked.replace("|", "\\|").replace("<", "&lt;").split())


def range_of(field: FieldInfo) -> str:
    """The allowed numbers of a field, e.g. ``0 to 1`` or ``> 0``; empty if any number or another type is allowed."""
    limits = {name: getattr(part, name) for part in field.metadata for name in SYMBOLS if getattr(part, name, None) is not None}
    if limits.keys() == {"ge", "le"}:
        return f"{limits['ge']:,} to {limits['le']:,}"
    return ", ".join(f"{SYMBOLS[name]} {value:,}" for name, value in limits.items())


def default_of(block: type[BaseModel], name: str) -> str:
    """The default as it appears in the table."""
    field = block.model_fields[name]
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, str) and len(value) > 40:
        return "a text"
    if (block.__name__, name) == ("GenerationSettings", "engine"):
        return "`local`"  # in memory it is None
    return f"`{cell(written(value))}`"


def written(value: object) -> str:
    """A value as in a recipe."""
    if isinstance(value, str):
        return repr(value).strip("'") or '""'
    if isinstance(value, list):
        return f"[{', '.join(written(item) for item in value)}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def different_defaults(settings: OptimizerSettings) -> str:
    """The defaults in which ``settings`` differ from the shared optimizer settings, as a sentence."""
    changed = [
        f"`{name}: {written(getattr(settings, name))}`"
        for name, field in OptimizerSettings.model_fields.items()
        if getattr(settings, name) != field.default
    ]
    return f"Different defaults: {', '.join(changed)}." if changed else ""


def sentence(block: type[BaseModel]) -> str:
    """The first sentence of a class's docstring."""
    return cell((block.__doc__ or "").strip().split("\n\n")[0].replace("``", "`"))


def rows(block: type[BaseModel], *, prefix: str = "", without: frozenset[str] = frozenset()) -> list[str]:
    """Table rows of the fields of ``block``. Groups without their own section are included, by dotted paths.

    The fields that all stages have come after those of a stage.
    """
    made = []
    common = TrainingStepConfig.model_fields if issubclass(block, StepConfig) else {}
    for name, field in sorted(block.model_fields.items(), key=lambda item: item[0] in common):
        if name in without or name == "stage":
            continue
        inner = list(blocks_of(field.annotation))
        meaning = cell(field.description or "")
        linked = [f"[{title(shared(part)).lower()}](#{anchor(shared(part))})" for part in dict.fromkeys(inner) if has_section(part)]
        single = [part for part in dict.fromkeys(inner) if not has_section(part)]
        choices = list(dict.fromkeys(choices_of(field.annotation)))
        if len(choices) > 1 and not inner:
            meaning = f"{meaning} Values: {', '.join(f'`{value}`' for value in choices)}.".strip()
        if limits := range_of(field):
            meaning = f"{meaning} Range: {limits}."
        if isinstance(default := field.get_default(call_default_factory=True), OptimizerSettings):
            meaning = f"{meaning} {different_defaults(default)}".strip()
        if linked:
            meaning = f"{meaning} Fields: {', '.join(linked)}.".strip()
        elif not meaning and single:
            meaning = sentence(single[0])
        path = f"{prefix}{name}"
        made.append(f"| `{path}` | {default_of(block, name)} | {meaning} |")
        many = "[]" if "list[" in str(field.annotation) else ".NAME" if "dict[" in str(field.annotation) else ""
        for part in single:
            made += rows(part, prefix=f"{path}{many}.")
    return made


def has_section(block: type[BaseModel]) -> bool:
    return shared(block).__name__ in TITLES


def title(block: type[BaseModel]) -> str:
    return TITLES[block.__name__]


def anchor(block: type[BaseModel]) -> str:
    return title(block).lower().replace(" ", "-")


def table(made: list[str]) -> list[str]:
    return ["| field | default | meaning |", "|---|---|---|", *made, ""]


def tables() -> str:
    """All tables as Markdown."""
    stages = {name: config_class(name) for name in STAGES}
    counts = users(list(stages.values()))
    lines = ["## The recipe", "", *table(rows(RecipeHeader)), "## Every step", ""]
    kinds = ", ".join(f"`{name}`" for name in stages)
    lines += table([f"| `stage` | required | The kind of work: {kinds}. |", *rows(StepConfig)])
    for name, config in stages.items():
        lines += [f"## {name}", "", *table(rows(config, without=frozenset(StepConfig.model_fields)))]
    untitled = [block.__name__ for block, count in counts.items() if count > 1 and not has_section(block)]
    assert not untitled, f"several fields have these groups, so each needs a section in TITLES: {untitled}"
    for block in sorted(filter(has_section, counts), key=lambda block: list(TITLES).index(block.__name__)):
        lines += [f"## {title(block)}", "", sentence(block), "", *table(rows(block))]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, TABLES, tables()))
