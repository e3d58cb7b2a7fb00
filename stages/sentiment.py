"""The sentiment classifier: a sequence classifier trained on labelled reviews, judged on held-out ones before and after training.

Its classes' logits or probabilities are also reward sources of PPO and judges of an evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from stages.config import (
    DataField,
    DataInput,
    DataSource,
    ModelField,
    ModelInput,
    OptimizerSettings,
    Strict,
    TrainingStepConfig,
    check_architecture,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from stages.corpora.reviews import Review
    from stages.step import StepContext, StepResult


class WordPieceSettings(Strict):
    """An uncased WordPiece tokenizer trained on the step's texts."""

    vocab_size: int = Field(8192, ge=100, description="Number of tokens, the special ones among them.")
    max_chars: int = Field(100, ge=1, description="Longer words become the unknown token.")


class MaskedSettings(Strict):
    """Masked-language modelling of the step's texts before the labels are learned (Devlin et al. 2018)."""

    data: DataField | None = Field(None, description="More texts, without labels.")
    mask_probability: float = Field(0.15, gt=0, lt=1, description="Share of tokens to be guessed.")
    training: OptimizerSettings = OptimizerSettings(learning_rate=5e-4, warmup_fraction=0.05)


class SentimentOptimizer(OptimizerSettings):
    """As ``OptimizerSettings``, with the usual values for fine-tuning an encoder."""

    learning_rate: float = Field(2e-5, gt=0, description="Peak learning rate.")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="Shape after warmup.")
    epochs: float = Field(2.0, gt=0, description="Passes over the training data.")
    weight_decay: float = Field(0.01, ge=0)


class SentimentConfig(TrainingStepConfig):
    """Train a classifier, either from ``model`` or from an ``architecture`` of random weights."""

    stage: Literal["sentiment"] = "sentiment"
    model: ModelField | None = Field(None, description="Encoder or classifier to fine-tune, e.g. distilbert-base-uncased.")
    architecture: dict[str, Any] | None = Field(
        None, description="Random weights: {type: distilbert | bert | ..., and fields of that transformers config, e.g. dim: 128}."
    )
    tokenizer: WordPieceSettings | None = Field(None, description="With architecture: the tokenizer that is trained on the texts.")
    labels: list[str] = Field(["negative", "positive"], min_length=2, description="Names of the classes, by label number.")
    max_length: int = Field(512, ge=8, description="Tokens per text, or as many as the model reads; longer ones lose their end.")
    data: DataInput = Field(description="Columns text and label (a number, or one of labels).")
    masked: MaskedSettings | None = Field(None, description="Learn the texts themselves first; null: straight to the labels.")
    num_examples: int = Field(10, ge=0, description="Held-out reviews to show with truth and prediction, before and after.")
    training: SentimentOptimizer = SentimentOptimizer()

    @model_validator(mode="after")
    def _one_origin(self) -> SentimentConfig:
        if (self.model is None) == (self.architecture is None):
            raise ValueError("give either model (fine-tuning) or architecture (random weights), and not both")
        if self.model is not None and self.tokenizer is not None:
            raise ValueError("tokenizer goes with architecture; a model brings its own")
        if self.architecture is not None:
            check_architecture(self.architecture)
            if self.lora is not None:
                raise ValueError("lora needs a model to adapt; with architecture every weight is random and must be trained")
        if self.model is not None and self.masked is not None:
            raise ValueError("masked goes with architecture; a pretrained model knows its language")
        if self.model is not None and self.model.quantization != "none" and self.lora is None:
            raise ValueError(f"model.quantization={self.model.quantization!r} needs lora: quantized weights cannot be trained themselves")
        return self

    def model_inputs(self) -> dict[str, ModelInput]:
        return {} if self.model is None else {"model": self.model}

    def data_inputs(self) -> dict[str, list[DataSource]]:
        inputs = {"data.train": self.data.train}
        if self.data.validation is not None:
            inputs["data.validation"] = self.data.validation
        if self.masked is not None and self.masked.data is not None:
            inputs["masked.data"] = self.masked.data
        return inputs

    def check_data(self) -> None:
        """Raise DataError for data this stage cannot use; no model is loaded."""
        from stages.corpora.reviews import load_reviews
        from stages.corpora.text import check_texts

        load_reviews(self.data, self.labels)
        if self.masked is not None and self.masked.data is not None:
            check_texts(self.masked.data)


def run(config: SentimentConfig, context: StepContext) -> StepResult:
    """Train; publish the classifier with accuracy, F1, confusion matrix and calibration on held-out reviews, before and after."""
    from transformers import Trainer

    from stages.corpora.reviews import load_reviews
    from stages.models.loading import save_model
    from stages.step import StepResult
    from stages.training.trainer import counted_loss, exact, gathered_weights, publish_best, train, training_arguments

    reviews = load_reviews(config.data, config.labels)
    tokenizer, model = _tokenizer_and_model(config, context, [review.text for review in reviews.train])
    (rows, cut), (heldout, heldout_cut) = _encode(reviews.train, tokenizer), _encode(reviews.validation, tokenizer)
    if cut or heldout_cut:
        context.runtime.console.print(
            f"{context.name}: {cut} of {len(rows)} reviews and {heldout_cut} of {len(heldout)} held-out ones lose their end: they are "
            f"longer than the {tokenizer.model_max_length} tokens that max_length, the model and its tokenizer allow"
        )

    arguments = training_arguments(
        config.training, context, precision=config.precision, remove_unused_columns=False, train_sampling_strategy="group_by_length"
    )
    trainer = exact(Trainer)(
        model=model, args=arguments, train_dataset=rows, data_collator=_Collator(tokenizer.pad_token_id), compute_loss_func=counted_loss
    )
    truth = [row["labels"] for row in heldout]
    before = predict(model.to(context.runtime.device), heldout, tokenizer.pad_token_id)
    trained = train(
        trainer,
        context,
        f"{context.name}: sentiment",
        rule=config,
        measure=lambda: measure(predict(model, heldout, tokenizer.pad_token_id), truth)["loss"],
    )
    after = predict(model, heldout, tokenizer.pad_token_id)

    measured, measured_before = measure(after, truth), measure(before, truth)
    examples = _examples(reviews.validation, before, after, config)
    _show(examples, measured, measured_before, context)
    context.log(trainer.state.global_step, {"heldout/accuracy": measured["accuracy"], "heldout/loss": measured["loss"]})
    metrics = {
        **{f"heldout_{name}": value for name, value in measured.items()},
        **{f"heldout_{name}_before": measured_before[name] for name in ("accuracy", "f1", "loss")},
        **trained,
        "reviews": len(rows),
        "heldout_reviews": len(heldout),
        "cut_share": cut / len(rows),
        "heldout_cut_share": heldout_cut / len(heldout),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "examples": examples,
    }
    kind: dict[str, Any] = {
        "role": "classifier",
        "base": context.models["model"] if config.lora is not None else None,
        "extra": {"labels": config.labels},
    }
    shown = [row["input_ids"] for row in heldout]  # what was saved is compared with the model in memory on the first of them
    publish_best(trainer, context, lambda folder, weights: save_model(model, tokenizer, folder, state_dict=weights, rows=shown), **kind)
    weights = gathered_weights(trainer)
    record = context.publish(lambda folder: save_model(model, tokenizer, folder, state_dict=weights, rows=shown), metrics=metrics, **kind)
    return StepResult(model=record, metrics=metrics)


# Tokenizer and model


def train_wordpiece(texts: Sequence[str], settings: WordPieceSettings, max_length: int) -> PreTrainedTokenizerBase:
    """An uncased WordPiece tokenizer that reads past HTML tags; equal texts make equal tokenizers."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    # In the tokenizer and not in the stage: whoever loads the exported model gives it raw reviews.
    tags = normalizers.Replace(Regex("<[^<>]{1,40}>"), " ")
    normalizer = normalizers.Sequence([tags, normalizers.BertNormalizer(lowercase=True)])
    # The trainer numbers word pieces in the order of a hash table, which differs from run to run and decides ties between merges. Given
    # the whole alphabet as special tokens it has nothing left to order; the tokenizer itself is then built from the vocabulary.
    letters = sorted(set("".join(normalizer.normalize_str(text) for text in texts)) - set(" \t\n\r"))
    alphabet = [*letters, *(f"##{letter}" for letter in letters)]

    def blank(vocabulary: dict[str, int] | None = None) -> Tokenizer:
        made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=settings.max_chars))
        made.normalizer, made.pre_tokenizer, made.decoder = normalizer, pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        return made

    trained = blank()
    trainer = trainers.WordPieceTrainer(vocab_size=settings.vocab_size, special_tokens=[*special, *alphabet], show_progress=False)
    trained.train_from_iterator(texts, trainer, length=len(texts))
    tokenizer = blank(trained.get_vocab())
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **names)


def _tokenizer_and_model(config: SentimentConfig, context: StepContext, texts: list[str]) -> tuple[PreTrainedTokenizerBase, Any]:
    from transformers import AutoModelForSequenceClassification

    from stages.models.architectures import random_model
    from stages.models.loading import load_classifier, load_tokenizer
    from stages.training.trainer import weights_dtype

    if config.model is not None:
        tokenizer = load_tokenizer(context.models["model"])
        tokenizer.model_max_length = min(config.max_length, tokenizer.model_max_length)
        context.runtime.seed_everything(context.seed)  # a new head is drawn
        model = load_classifier(
            context.models["model"],
            dtype=weights_dtype(config, context),
            labels=config.labels,
            require_head=False,
            lora=config.lora,
            tokenizer=tokenizer,
            dropout=True,
        )
        _limit_length(tokenizer, model)
        # The labels exclude each other here; a checkpoint that was trained otherwise must not say so to whoever loads what is published.
        model.config.problem_type = "single_label_classification"
        return tokenizer, model
    assert config.architecture is not None
    if config.masked is not None and config.masked.data is not None:
        from stages.corpora.files import read_rows, text_of

        texts = [*texts, *(text_of(row, "text") for row in read_rows(config.masked.data))]
    tokenizer = train_wordpiece(texts, config.tokenizer or WordPieceSettings(), config.max_length)
    architecture = {"max_position_embeddings": config.max_length, **config.architecture}
    body = _masked_body(config, context, architecture, tokenizer, texts) if config.masked is not None else None
    context.runtime.seed_everything(context.seed)
    labels = {"id2label": dict(enumerate(config.labels)), "label2id": {label: index for index, label in enumerate(config.labels)}}
    model = random_model(AutoModelForSequenceClassification, architecture, tokenizer, num_labels=len(config.labels), **labels)
    model.config.problem_type = "single_label_classification"
    _limit_length(tokenizer, model)
    if body is not None:
        getattr(model, model.base_model_prefix).load_state_dict(body, strict=False)
    return tokenizer, model


def _limit_length(tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    """Have the tokenizer cut texts where the model's positions end, if that comes before the tokenizer's own limit."""
    from stages.tokens.positions import readable_length

    if (length := readable_length(model.config, tokenizer)) is not None:
        tokenizer.model_max_length = length


def _masked_body(
    config: SentimentConfig, context: StepContext, architecture: dict[str, Any], tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> dict[str, torch.Tensor]:
    """The encoder's weights after masked-language modelling; kept in the checkpoint folder for a run that is cut off later."""
    from safetensors.torch import load_file
    from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling, Trainer

    from stages.models.architectures import random_model
    from stages.training.checkpoints import Checkpoints, save_tensors
    from stages.training.trainer import counted_loss, exact, gathered_weights, train, training_arguments

    assert config.masked is not None
    runtime = context.runtime
    finished = Checkpoints(context.checkpoint_folder / "encoder", runtime, keep_last=1)
    if finished.newest() is None:
        runtime.seed_everything(context.seed)
        model = random_model(AutoModelForMaskedLM, architecture, tokenizer)
        _limit_length(tokenizer, model)
        rows = [{"input_ids": ids} for ids in tokenizer(texts, truncation=True)["input_ids"]]
        arguments = training_arguments(
            config.masked.training,
            context,
            precision=config.precision,
            output_dir=str(context.checkpoint_folder / "masked"),
            remove_unused_columns=False,
            train_sampling_strategy="group_by_length",
        )
        collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=config.masked.mask_probability)
        trainer = exact(Trainer)(model=model, args=arguments, train_dataset=rows, data_collator=collator, compute_loss_func=counted_loss)
        rule = config.model_copy(update={"keep_best": 0})
        train(trainer, context, f"{context.name}: masked language modelling", room="masked", rule=rule)
        state = gathered_weights(trainer) or model.state_dict()
        prefix = f"{model.base_model_prefix}."
        body = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        finished.write(lambda folder: save_tensors(body, folder / "encoder.safetensors", write=runtime.is_main))
    whole = finished.newest()
    assert whole is not None
    return load_file(whole.path / "encoder.safetensors")


# Data


def _encode(reviews: Sequence[Review], tokenizer: PreTrainedTokenizerBase) -> tuple[list[dict[str, Any]], int]:
    """(rows of input_ids and label, how many of them lost their end)."""
    texts = [review.text for review in reviews]
    whole = tokenizer(texts, verbose=False)["input_ids"]
    encoded = tokenizer(texts, truncation=True)["input_ids"]
    rows = [{"input_ids": ids, "labels": review.label} for ids, review in zip(encoded, reviews, strict=True)]
    return rows, sum(len(ids) > len(kept) for ids, kept in zip(whole, encoded, strict=True))


class _Collator:
    """Rows as input_ids and attention_mask [B, T], padded on the right, and labels [B]."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        import torch

        width = max(len(row["input_ids"]) for row in rows)
        ids = [row["input_ids"] + [self.pad_token_id] * (width - len(row["input_ids"])) for row in rows]
        mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.tensor(mask),
            "labels": torch.tensor([row["labels"] for row in rows]),
        }


# Measuring


def predict(model: Any, rows: Sequence[dict[str, Any]], pad_token_id: int, batch_size: int = 64) -> torch.Tensor:
    """Class probabilities [N, C], on the CPU; the model's mode is left as it was."""
    import torch

    from stages.models.sharding import whole

    collate = _Collator(pad_token_id)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    probabilities: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    training = model.training
    model.eval()
    with whole(model), torch.inference_mode():
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            batch = {name: value.to(model.device) for name, value in collate([rows[place] for place in places]).items() if name != "labels"}
            for place, row in zip(places, model(**batch).logits.float().softmax(dim=-1).cpu(), strict=True):
                probabilities[place] = row
    model.train(training)
    return torch.stack(probabilities)


def measure(probabilities: torch.Tensor, truth: Sequence[int]) -> dict[str, Any]:
    """Accuracy with its 95 % interval, F1 (of the last class; all classes averaged), confusion matrix (row: truth), calibration, loss."""
    import torch

    from stages.stats.classification import calibration_bins, confusion_matrix, expected_calibration_error, f1_scores
    from stages.stats.intervals import wilson_interval

    labels = torch.tensor(list(truth))
    confidence, predicted = probabilities.max(dim=1)
    correct = predicted == labels
    confusion = confusion_matrix(labels, predicted, probabilities.shape[1])
    f1 = f1_scores(confusion)
    low, high = wilson_interval(int(correct.sum()), len(labels))
    return {
        "accuracy": float(correct.double().mean()),
        "accuracy_ci_low": low,
        "accuracy_ci_high": high,
        "f1": f1[-1],
        "f1_macro": sum(f1) / len(f1),
        "confusion_matrix": confusion,
        "calibration_error": expected_calibration_error(confidence, correct),
        "calibration": calibration_bins(confidence, correct),
        "loss": float(-probabilities[torch.arange(len(labels)), labels].clamp(min=1e-12).log().double().mean()),
    }


def _examples(reviews: Sequence[Review], before: torch.Tensor, after: torch.Tensor, config: SentimentConfig) -> list[dict[str, Any]]:
    """Evenly spread held-out reviews with truth and prediction."""
    step = max(1, len(reviews) // max(1, config.num_examples))
    shown = []
    for index in range(0, len(reviews), step)[: config.num_examples]:
        row = {"text": reviews[index].text[:200], "truth": config.labels[reviews[index].label]}
        for when, probabilities in (("before", before[index]), ("after", after[index])):
            row[when] = config.labels[int(probabilities.argmax())]
            row[f"{when}_probability"] = f"{float(probabilities.max()):.3f}"
        shown.append(row)
    return shown


def _show(examples: list[dict[str, Any]], after: dict[str, Any], before: dict[str, Any], context: StepContext) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table("review", "truth", "before", "after", title=f"{context.name}: held-out reviews", title_justify="left")
    for row in examples:
        right = "green" if row["after"] == row["truth"] else "red"
        cells = [f"{row[when]} {float(row[f'{when}_probability']):.2f}" for when in ("before", "after")]
        table.add_row(escape(row["text"][:80].replace("\n", " ")), row["truth"], cells[0], f"[{right}]{cells[1]}[/]")
    console = context.runtime.console
    if examples:
        console.print(table)
    console.print(
        f"{context.name}: held-out accuracy {before['accuracy']:.3f} -> {after['accuracy']:.3f} "
        f"(95 % {after['accuracy_ci_low']:.3f} to {after['accuracy_ci_high']:.3f}), F1 {after['f1']:.3f}, "
        f"calibration error {after['calibration_error']:.3f}, confusion {after['confusion_matrix']}"
    )
