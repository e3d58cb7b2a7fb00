"""Model card in the Hub's format for an exported model: description, lineage, results, usage, unknowns."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.config import HUB
from stages.errors import RegistryError
from stages.hub.ids import is_hub_id
from stages.json_types import JsonObject, with_values
from stages.registry.inherited_licence import licence_of
from stages.registry.record import CardRow, StoredEvaluation, imported_from, written_once

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from stages.registry.ledger import Registry
    from stages.registry.record import Lineage, Manifest, ModelRecord

PIPELINES = {
    "language_model": "text-generation",
    "reward_model": "text-classification",
    "generative_reward_model": "text-generation",
    "classifier": "text-classification",
}
REWARDS = ("reward_model", "generative_reward_model")
WHAT = {
    "language_model": "A causal language model",
    "reward_model": "A reward model: a score for a prompt with its completion, higher if the annotators would prefer it",
    "generative_reward_model": "A generative reward model: a language model that is asked about a completion; the score is the log-odds of "
    "two answers",
    "classifier": "A text classifier",
    "value_model": "A value network: it predicts the return at every token of a completion; use it to continue PPO",
}
INTENDED = {
    "language_model": "Research on alignment, or a starting point for further training. It was not tested for safety, truthfulness or bias "
    "beyond the evaluations below; test it yourself before you give it to users.",
    "reward_model": "Scoring completions of prompts like those it was trained on: as a reward for PPO, to pick the best of several, to "
    "compare models. Its scores are not meaningful for other texts, and a policy trained against it for too long will exploit its errors.",
    "generative_reward_model": "Scoring completions of prompts: as a reward for PPO, to pick the best of several, to compare models. A "
    "policy trained against it for too long will exploit its errors.",
    "classifier": "Labelling texts like those it was trained on.",
    "value_model": "Continuing a PPO run, or inspecting the values of tokens.",
}
TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{{ what }}, {{ origin }}.

| | |
|---|---|
| version | `{{ ref }}` |
| digest | `{{ digest }}` |
| made | {{ created }} |
| weights | {{ weights }} |

## Use

{{ intended }}
{%- for title, code in usage %}
{%- if title %}

{{ title }}
{%- endif %}

```{{ "python" if "import" in code else "bash" }}
{{ code }}
```
{%- endfor %}

## Lineage

```text
{{ lineage }}
```
{%- if data %}

Data of the last step (with the first digits of its content fingerprint):
{% for line in data %}
- {{ line }}
{%- endfor %}
{%- endif %}

## Results
{% if metrics %}
| training metric | value |
|---|---|
{%- for name, value in metrics %}
| {{ name }} | {{ value }} |
{%- endfor %}
{%- else %}
Its step recorded no metrics.
{%- endif %}
{%- for evaluation in evaluations %}

### {{ evaluation.title }}

{{ evaluation.verdict }}

| against | judge | win rate | 95 % interval | prompts |
|---|---|---|---|---|
{%- for row in evaluation.rows %}
| {{ row.other }} | {{ row.judge }} | {{ row.rate }} | {{ row.interval }} | {{ row.n }} |
{%- endfor %}
{%- endfor %}

## Limits and licence

{{ licence }}

The step's resolved settings:

```json
{{ settings }}
```

Packages: {{ packages }}.
"""


def write_card(record: ModelRecord, registry: Registry, folder: Path, *, merged: bool) -> Path:
    """Write README.md into an exported model's ``folder``. ``merged``: an adapter was merged into its base."""
    path = folder / "README.md"
    path.write_text(model_card(record, registry, merged=merged), encoding="utf-8")
    return path


def model_card(
    record: ModelRecord,
    registry: Registry,
    *,
    merged: bool,
    repository: str | None = None,
    evaluations: Sequence[StoredEvaluation] | None = None,
) -> str:
    """The card as text: the Hub's metadata, then Markdown. ``evaluations`` (None: those that the registry knows): newest first."""
    from huggingface_hub import ModelCard, ModelCardData

    manifest = record.manifest
    step = manifest["recipe_step"]
    evaluations = evaluations_of(record, registry) if evaluations is None else evaluations
    is_adapter = record.is_adapter and not merged
    lineage = written_once(registry.lineage(record.ref))
    licence, said = licence_of(record, registry)
    stated: dict[str, Any] = {**licence} if licence is not None else {}
    bases = [parent["ref"] for parent in _foreign(lineage) if parent["kind"] == "hub"]
    bases += _bases_of_imports(lineage, registry)
    data = ModelCardData(
        model_name=record.name,
        **stated,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=PIPELINES.get(record.role),
        tags=["tristage", *([str(step["stage"])] if "stage" in step else []), *(["reward-model"] if record.role in REWARDS else [])],
        base_model=list(dict.fromkeys(bases)) or None,
        datasets=_hub_data(step) or None,
        eval_results=_results(record, evaluations) or None,
    )
    size = sum(file["size"] for file in manifest["files"]) / 2**20
    weights = f"adapter on `{record.base['ref']}`" if record.base is not None and not merged else "full weights, safetensors"
    return str(
        ModelCard.from_template(
            data,
            template_str=TEMPLATE,
            name=record.name,
            what=WHAT[record.role],
            origin=_origin(manifest),
            ref=record.ref,
            digest=record.digest,
            created=manifest["created"],
            weights=f"{weights}; {size:.1f} MiB in the registry",
            intended=INTENDED[record.role],
            usage=_usage(record, registry, is_adapter=is_adapter) if repository is None else _usage_on_hub(record, registry, repository),
            licence=said,
            lineage="\n".join(_tree(lineage)),
            data=_data_lines(manifest),
            metrics=[(name, _number(value)) for name, value in manifest["metrics"].items() if isinstance(value, int | float)],
            evaluations=evaluations,
            settings=json.dumps(_without_folders(step), indent=1, ensure_ascii=False),
            packages=", ".join(f"{name} {version}" for name, version in manifest["packages"].items()),
        )
    )


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


# Origin


def _origin(manifest: Manifest) -> str:
    """How the version was made: by a step of a recipe, or by another library."""
    step, version = manifest["recipe_step"], manifest["packages"].get("tristage", "")
    if (imported := imported_from(manifest)) is not None:
        return f"imported into Tristage {version}; its files were written by {imported['library']}"
    name = step.get("name", manifest["name"].rpartition("/")[2])
    return f"made by Tristage {version} in the step `{name}` (stage `{step.get('stage', 'unknown')}`)"


def _bases_of_imports(lineage: Lineage, registry: Registry) -> list[str]:
    """The Hub ids of the models on which imported adapters were trained."""
    bases = []
    if lineage["kind"] == "registry" and not lineage.get("removed"):
        with suppress(RegistryError):  # a parent of a pulled version, which is not here
            imported = imported_from(registry.get(lineage["ref"]).manifest)
            base = imported.get("base") if imported is not None else None
            bases = [base] if isinstance(base, str) and is_hub_id(base) and not Path(base).exists() else []
    for parent in lineage["parents"]:
        bases += _bases_of_imports(parent, registry)
    return bases


def _tree(node: Lineage, depth: int = 0) -> Iterator[str]:
    note = node.get("role") or node["kind"]
    note += ", removed" if node.get("removed") else ", see above" if node.get("repeated") else ""
    yield f"{'  ' * depth}{node['ref']}  {node['digest'][:19]}  ({note})"
    for parent in node["parents"]:
        yield from _tree(parent, depth + 1)


def _foreign(node: Lineage) -> Iterator[Lineage]:
    """The leaves of a lineage that come from outside the registry."""
    if node["kind"] != "registry":
        yield node
    for parent in node["parents"]:
        yield from _foreign(parent)


def _sources(value: object) -> Iterator[JsonObject]:
    """Every data source in a step's settings."""
    if isinstance(value, dict):
        if "path" in value and "columns" in value:
            yield value
        else:
            for item in value.values():
                yield from _sources(item)
    elif isinstance(value, list):
        for item in value:
            yield from _sources(item)


def _without_folders(value: object) -> object:
    """Settings without local folders, which mean nothing to other users."""
    return with_values(value, lambda item: Path(item).name if isinstance(item, str) and item.startswith("/") else item)


def _hub_data(step: Mapping[str, object]) -> list[str]:
    """Hub ids among the data of a step."""
    paths = [str(source["path"]).removeprefix(HUB) for source in _sources(step)]
    return list(dict.fromkeys(path for path in paths if not path.startswith(("world:", "/", ".")) and not Path(path).suffix))


def _data_lines(manifest: Manifest) -> list[str]:
    lines = []
    for field_path, mark in manifest["data"].items():
        value: object = manifest["recipe_step"]
        for key in field_path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        paths = [str(source["path"]).rpartition("/")[2] or str(source["path"]) for source in _sources(value)] if value is not None else []
        lines.append(f"`{field_path}`: {', '.join(paths) or 'not recorded'} (`{mark[:12]}`)")
    return lines


# Results


def evaluations_of(record: ModelRecord, registry: Registry) -> list[StoredEvaluation]:
    """The evaluations of this very model: those stored here, newest first, then those that a pulled version brought along."""
    here = list(_evaluations(record, registry))
    brought = record.manifest["pulled"].get("evaluations", []) if "pulled" in record.manifest else []
    return joined(here, brought)


def joined(first: Sequence[StoredEvaluation], second: Sequence[StoredEvaluation]) -> list[StoredEvaluation]:
    """``first``, then the evaluations of ``second`` that are not among them."""
    return [*first, *(evaluation for evaluation in second if evaluation not in first)]


def _evaluations(record: ModelRecord, registry: Registry) -> Iterator[StoredEvaluation]:
    """Stored evaluations with exactly this model as a candidate, newest first, with their win rates."""
    matches = []
    for path in (registry.root.parent / "results").glob("*/result.json"):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            evaluation = json.loads((path.parent / "files" / "evaluation.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        names = [name for name, row in evaluation["candidates"].items() if row.get("digest") == record.digest and not row.get("best_of")]
        if names:
            matches.append((result["created"], result["name"], names[-1], evaluation))
    for created, name, candidate, evaluation in sorted(matches, key=lambda item: item[:3], reverse=True):
        rows: list[CardRow] = [
            {
                "other": row["b"],
                "judge": row["judge"],
                "rate": f"{row['win_rate']:.3f}",
                "interval": f"{row['ci_low']:.3f} to {row['ci_high']:.3f}",
                "n": row["n"],
            }
            for row in evaluation["win_rates"]
            if row["a"] == candidate
        ]
        yield {"title": f"{name}, {created[:10]}, as `{candidate}`", "verdict": evaluation["verdict"], "rows": rows, "name": name}


def _results(record: ModelRecord, evaluations: Sequence[StoredEvaluation]) -> list[EvalResult]:
    """The win rates of the newest evaluation by its first judge, as Hub metadata."""
    from huggingface_hub import EvalResult

    if not evaluations:
        return []
    newest = evaluations[0]
    return [
        EvalResult(
            task_type=PIPELINES.get(record.role, "text-generation"),
            dataset_type=newest["name"],
            dataset_name=f"held-out prompts of {newest['name']}",
            metric_type="win_rate",
            metric_value=float(row["rate"]),
            metric_name=f"win rate against {row['other']} by {row['judge']} (95 %: {row['interval']}, {row['n']} prompts)",
        )
        for row in newest["rows"]
        if row["judge"] == newest["rows"][0]["judge"]
    ]


# Usage


def _usage_on_hub(record: ModelRecord, registry: Registry, repository: str) -> list[tuple[str, str]]:
    """How to load a pushed version. The base of an adapter is in ``bases/``, unless it is on the Hub."""
    pull = ("Into a registry, with its lineage, under the name that a recipe uses:", f"stages models pull {repository}")
    base = record.base
    if base is None:
        return [*((title, code.replace("FOLDER", repository)) for title, code in _usage(record, registry, is_adapter=False)), pull]
    if record.role != "language_model" or _is_on_adapter(record, registry):
        return [pull]
    where = f'"{repository}", subfolder="bases/1"' if base["kind"] == "registry" else f'"{base["path"]}"'
    if revision := base.get("revision"):
        where += f', revision="{revision}"'
    if base.get("trust_remote_code"):
        where += ", trust_remote_code=True"
    return [(f"The adapter belongs to `{base['ref']}`.", _adapter_code(record, registry, where, repository)), pull]


def _is_on_adapter(record: ModelRecord, registry: Registry) -> bool:
    """Whether the base of an adapter is another adapter of the registry."""
    with suppress(RegistryError):  # a base that was removed
        return record.base is not None and record.base["kind"] == "registry" and registry.get(record.base["digest"]).is_adapter
    return False


QUANTIZED = {"int8": "load_in_8bit=True", "nf4": 'load_in_4bit=True, bnb_4bit_quant_type="nf4"'}
"""Arguments of BitsAndBytesConfig."""


def _adapter_code(record: ModelRecord, registry: Registry, where: str, adapter: str) -> str:
    """Python code that loads an adapter on its base, as it was trained. ``where``: the arguments of from_pretrained that name the base.

    An adapter above another one on quantized weights belongs to their merge, which is not quantized.
    """
    base, classes, lines = record.base, ["AutoModelForCausalLM"], []
    assert base is not None
    if (quantization := QUANTIZED.get(base.get("quantization", ""))) is not None and not _is_on_adapter(record, registry):
        classes.append("BitsAndBytesConfig")
        double = ", bnb_4bit_use_double_quant=True" if base.get("double_quantization") else ""
        where += f", quantization_config=BitsAndBytesConfig({quantization}{double})"
    config = json.loads((record.path / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("trainable_token_indices") or config.get("modules_to_save"):
        classes.append("AutoTokenizer")
        lines = [
            f'rows = len(AutoTokenizer.from_pretrained("{adapter}"))',
            "base.resize_token_embeddings(max(rows, base.get_input_embeddings().num_embeddings))",
        ]
    return "\n".join(
        [
            "from peft import PeftModel",
            f"from transformers import {', '.join(sorted(classes))}",
            "",
            f"base = AutoModelForCausalLM.from_pretrained({where})",
            *lines,
            f'model = PeftModel.from_pretrained(base, "{adapter}")',
        ]
    )


def _usage(record: ModelRecord, registry: Registry, *, is_adapter: bool) -> list[tuple[str, str]]:
    base, where = record.base if is_adapter else None, ""
    if base is not None:
        where = f"`stages models export {base['ref']} BASE` exports it" if base["kind"] == "registry" else "replace BASE by its path"
    if record.role == "language_model" and base is not None:
        return [
            (
                f"The adapter belongs to `{base['ref']}`; {where}.",
                _adapter_code(record, registry, '"BASE"', "FOLDER"),
            ),
            ("", "lm_eval --model hf --model_args pretrained=BASE,peft=FOLDER --tasks ..."),
            ("", "vllm serve BASE --enable-lora --lora-modules aligned=FOLDER"),
        ]
    if record.role == "language_model":
        load = 'model = AutoModelForCausalLM.from_pretrained("FOLDER")\ntokenizer = AutoTokenizer.from_pretrained("FOLDER")'
        return [
            ("", f"from transformers import AutoModelForCausalLM, AutoTokenizer\n\n{load}"),
            ("", "lm_eval --model hf --model_args pretrained=FOLDER --tasks ..."),
            ("", "vllm serve FOLDER"),
            ("", "transformers serve FOLDER"),
        ]
    if record.role == "reward_model":
        bias = record.manifest["metrics"].get("reward_bias")
        text = "The score of a text is the single logit"
        text += f" plus the bias {bias:.4g}, which the class does not add (`config.reward_bias`)." if bias is not None else "."
        if base is not None:
            load = 'RewardModel.from_pretrained("FOLDER", dtype=torch.float32)'
            text = f"The head is saved with the adapter, which belongs to `{base['ref']}`; {where}. "
            text += "Write BASE into base_model_name_or_path of its adapter_config.json."
            return [(text, f"import torch\nfrom stages.models.heads import RewardModel\n\nmodel = {load}")]
        load = 'model = AutoModelForSequenceClassification.from_pretrained("FOLDER")'
        load += "\nscore = model(**inputs).logits[:, 0] + model.config.reward_bias"
        return [(text, f"from transformers import AutoModelForSequenceClassification\n\n{load}")]
    if record.role == "generative_reward_model":
        return [
            (
                "`reward_question.json` has the question and the two answers. The score is the log-probability of the first answer minus "
                "that of the second, after the question in the chat template.",
                f"stages serve {record.ref}",
            )
        ]
    if record.role == "classifier":
        return [("", 'from transformers import pipeline\n\nclassify = pipeline("text-classification", "FOLDER")')]
    return []
