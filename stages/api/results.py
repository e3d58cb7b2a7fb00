"""The results of a run for Python programs: models, metrics, win rates, the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from stages.json_types import JsonObject
from stages.registry.ledger import Registry
from stages.registry.references import ResolvedModel
from stages.run_summary import Candidate, RunSummary, WinRate

if TYPE_CHECKING:
    import torch
    from IPython.display import HTML
    from transformers import PreTrainedTokenizerBase

    from stages.model_types import TransformersModel
    from stages.models.heads import ScalarModel


@dataclass(frozen=True)
class Model:
    """A published model. It can be an input of further steps. ``load`` returns the transformers model and its tokenizer."""

    ref: str  # name@version
    role: str  # language_model, reward_model, generative_reward_model, value_model, classifier
    path: Path
    metrics: JsonObject = field(repr=False)

    def load(self, *, dtype: torch.dtype | None = None) -> tuple[TransformersModel | ScalarModel, PreTrainedTokenizerBase]:
        """Return (model, tokenizer) in evaluation mode, with adapters merged; fp32 unless ``dtype`` is given.

        A reward model or value network is returned as ``stages.models.heads.RewardModel`` or ``ValueModel``.
        """
        import torch

        from stages.models.heads import RewardModel, ValueModel
        from stages.models.loading import load_classifier, load_language_model, load_tokenizer

        dtype = dtype or torch.float32
        # <root>/models/<name>/<version>/model, where the name may contain slashes. An adapter's base is in its record.
        record = Registry(self.path.parents[self.ref.count("/") + 3]).get(self.ref)
        source = ResolvedModel.of_record(record)
        tokenizer = load_tokenizer(source)
        if self.role in ("reward_model", "value_model"):
            return (RewardModel if self.role == "reward_model" else ValueModel).from_pretrained(source, dtype=dtype), tokenizer
        load = load_classifier if self.role == "classifier" else load_language_model
        return load(source, dtype=dtype, trainable=False, tokenizer=tokenizer), tokenizer


@dataclass(frozen=True)
class Results:
    """The results of a run. ``models`` and ``metrics`` are keyed by step; ``win_rates`` and ``candidates`` come from the evaluation."""

    name: str
    folder: Path
    models: dict[str, Model]
    metrics: dict[str, JsonObject]
    win_rates: list[WinRate]
    candidates: dict[str, Candidate]
    summary: RunSummary = field(repr=False)

    @property
    def report(self) -> Path | None:
        """The run's report page; None if it has no evaluation."""
        page = self.folder / "report.html"
        return page if page.is_file() else None

    def win_rate(self, a: str, b: str, judge: str | None = None) -> WinRate:
        """How often ``judge`` (default: the first one) prefers ``a`` to ``b``, with the confidence interval.

        Raises KeyError if no judge compared them.
        """
        for row in self.win_rates:
            if (row["a"], row["b"]) == (a, b) and judge in (None, row["judge"]):
                return row
        known = ", ".join(sorted({f"{row['a']} / {row['b']} by {row['judge']}" for row in self.win_rates})) or "none"
        raise KeyError(f"no win rate of {a!r} against {b!r} by {judge or 'any judge'}; known: {known}")

    def show(self) -> HTML:
        """Show the report in a notebook cell."""
        from IPython.display import HTML

        if self.report is None:
            return HTML(self._repr_html_())
        page = escape(self.report.read_text(encoding="utf-8"), quote=True)
        return HTML(f'<iframe srcdoc="{page}" style="width:100%;height:80vh;border:0" sandbox="allow-scripts"></iframe>')

    def _repr_html_(self) -> str:
        """Win rates and models as tables, for notebooks."""
        rates = "".join(
            f"<tr><td>{escape(row['a'])}</td><td>{escape(row['b'])}</td><td>{escape(row['judge'])}</td>"
            f"<td>{row['win_rate']:.2f} ({row['ci_low']:.2f} to {row['ci_high']:.2f})</td></tr>"
            for row in self.win_rates
        )
        models = "".join(
            f"<tr><td>{escape(step)}</td><td>{escape(one.ref)}</td><td>{one.role}</td></tr>" for step, one in self.models.items()
        )
        tables = f"<table><tr><th>step</th><th>model</th><th>role</th></tr>{models}</table>"
        if rates:
            tables += f"<table><tr><th>a</th><th>b</th><th>judge</th><th>a preferred (95 %)</th></tr>{rates}</table>"
        return f"<b>{escape(self.name)}</b> in {escape(str(self.folder))}{tables}"
