"""Classifiers as rewards: scores equal those of transformers' pipeline; texts that are too long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stages.errors import ModelError
from stages.rewards.classifier import ClassifierSource, label_output
from stages.rewards.config import RewardInput

WORDS = """the acting was warm and film a joy plot dull ending weak write happy line about music fine with bright honest story""".split()  # noqa: SIM905
TEXTS = ["the film was a joy", "dull", "a fine story about the music and the warm acting"]
SMALL = {
    "bert": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    "roberta": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "type_vocab_size": 1},
    "distilbert": {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32},
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
    "xlnet": {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32},
    "convbert": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "embedding_size": 16},
    "llama": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
    },
}


def word_tokenizer(*, special: bool, pad: bool = True) -> Any:
    """A tokenizer with one token per word. ``special``: add [CLS] before and [SEP] after a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["[CLS]", "[PAD]", "[SEP]", "[UNK]"]  # the pad id is 1, as in RoBERTa
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate([*names, *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 2)])
    options = {"cls_token": "[CLS]", "sep_token": "[SEP]"} if special else {"eos_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **(options | ({"pad_token": "[PAD]"} if pad else {})))


@pytest.fixture(scope="module")
def make_classifier(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """make_classifier(kind, tokenizer, positions=64, **config) -> folder of a random classifier with large weights."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    def make(kind: str, tokenizer: Any, positions: int = 64, **fields: Any) -> Path:
        torch.manual_seed(3)
        config = AutoConfig.for_model(
            kind,
            **{
                "vocab_size": len(tokenizer),
                **({} if kind == "xlnet" else {"max_position_embeddings": positions}),
                "initializer_range": 0.5,
                "pad_token_id": 1,
                **SMALL[kind],
                **fields,
            },
        )
        folder = tmp_path_factory.mktemp(kind)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def source(folder: Path, resolve: Any, **fields: Any) -> ClassifierSource:
    given = RewardInput.model_validate({"model": str(folder), "label": 0, "reads": "completion", **fields})
    return ClassifierSource(given, resolve(folder), device=torch.device("cpu"), dtype=torch.float32)


def by_pipeline(folder: Path, label: str, **options: Any) -> torch.Tensor:
    """The pipeline on one text at a time."""
    from transformers import pipeline

    classify = pipeline("text-classification", str(folder), top_k=None, device="cpu", **options)
    return torch.tensor([next(one["score"] for one in classify([text])[0] if one["label"] == label) for text in TEXTS])


MULTI = {"problem_type": "multi_label_classification"}


@pytest.mark.parametrize(
    ("kind", "special", "fields", "label"),
    [
        ("bert", True, {"num_labels": 3}, "LABEL_2"),
        ("bert", True, {"num_labels": 3, **MULTI}, "LABEL_1"),
        ("bert", True, {"num_labels": 1}, "LABEL_0"),
        ("roberta", True, {"num_labels": 1, **MULTI}, "LABEL_0"),
        ("distilbert", False, {"num_labels": 2, "problem_type": "single_label_classification"}, "LABEL_1"),
        ("gpt2", False, {"num_labels": 2}, "LABEL_1"),
        ("gpt2", False, {"num_labels": 1}, "LABEL_0"),
        ("llama", False, {"num_labels": 2, **MULTI}, "LABEL_0"),
    ],
)
def test_probabilities_are_the_pipelines(make_classifier, resolve_folder, kind, special, fields, label) -> None:
    folder = make_classifier(kind, word_tokenizer(special=special), **fields)
    expected = by_pipeline(folder, label)
    scores = source(folder, resolve_folder, label=label, output="probability").score(["p"] * 3, TEXTS)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    assert len(set(scores.tolist())) == 3  # the scores differ
    logprob = source(folder, resolve_folder, label=label, output="logprob").score(["p"] * 3, TEXTS)
    torch.testing.assert_close(logprob, expected.log(), rtol=1e-3, atol=1e-4)
    logit = source(folder, resolve_folder, label=label, output="logit").score(["p"] * 3, TEXTS)
    torch.testing.assert_close(logit, by_pipeline(folder, label, function_to_apply="none"), rtol=1e-4, atol=1e-4)


def test_regression_score_is_its_raw_value(make_classifier, resolve_folder) -> None:
    folder = make_classifier("bert", word_tokenizer(special=True), num_labels=1, problem_type="regression")
    scores = source(folder, resolve_folder).score(["p"] * 3, TEXTS)
    torch.testing.assert_close(scores, by_pipeline(folder, "LABEL_0"), rtol=1e-4, atol=1e-5)
    for output in ("probability", "logprob"):
        with pytest.raises(ModelError, match=rf"is a regression .* and has no {output}. Set output: logit"):
            source(folder, resolve_folder, output=output)


def test_log_probability_of_a_saturated_sigmoid_is_finite() -> None:
    logits = torch.tensor([[-200.0], [0.0]])
    assert label_output(logits, 0, "sigmoid", "logprob").tolist() == [-200.0, pytest.approx(-0.6931472)]


# RoBERTa has two position embeddings that no token uses.
@pytest.mark.parametrize(("kind", "special", "positions"), [("bert", True, 12), ("roberta", True, 14), ("gpt2", False, 12)])
def test_long_text_is_cut_at_the_beginning_of_its_prompt(make_classifier, resolve_folder, kind, special, positions) -> None:
    tokenizer = word_tokenizer(special=special)
    folder = make_classifier(kind, tokenizer, positions=positions, num_labels=2)
    classifier = source(folder, resolve_folder, reads="prompt_and_completion")
    prompts = ["the plot " * 20, "the plot", "the plot " * 20]
    completions = ["a happy line", "a happy line", "dull and weak " * 10]
    judged = classifier.judge(prompts, completions)
    assert judged.cut.tolist() == [True, False, True] and judged.completion_cut.tolist() == [False, False, True]
    # By hand: [CLS] and [SEP] where there are any, and between them the last words of prompt and completion.
    room = 12 - 2 * special
    kept = [" ".join(f"{prompt} {text}".split()[-room:]) for prompt, text in zip(prompts, completions, strict=True)]
    assert kept[0].endswith("plot a happy line") and kept[2].endswith("dull and weak")
    completion_only = source(folder, resolve_folder, reads="completion")
    torch.testing.assert_close(judged.scores, completion_only.score(["p"] * 3, kept))
    assert not completion_only.judge(["p"] * 3, kept).cut.any()
    assert len(set(judged.scores.tolist())) == 3
    alone = completion_only.judge(["p"], [completions[2]])  # reads: completion is cut in the same way
    torch.testing.assert_close(alone.scores, judged.scores[2:])
    assert alone.cut.item() and alone.completion_cut.item()


def test_padding_does_not_change_scores(make_classifier, resolve_folder) -> None:
    for kind, special in (("gpt2", False), ("llama", False), ("roberta", True)):
        folder = make_classifier(kind, word_tokenizer(special=special), num_labels=2)
        texts = [*TEXTS, "the story ends [PAD]", "[PAD]"]  # a decoder must not treat an end token that equals the pad token as padding
        together = source(folder, resolve_folder).score(["p"] * 5, texts)
        alone = torch.cat([source(folder, resolve_folder, batch_size=1).score(["p"], [text]) for text in texts])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_a_decoder_without_a_pad_token(make_classifier, resolve_folder) -> None:
    folder = make_classifier("gpt2", word_tokenizer(special=False, pad=False), num_labels=2, pad_token_id=None)
    scores = source(folder, resolve_folder, output="probability", label=1).score(["p"] * 3, TEXTS)
    torch.testing.assert_close(scores, by_pipeline(folder, "LABEL_1"), rtol=1e-4, atol=1e-5)


def test_a_conversation_keeps_its_roles(make_classifier, resolve_folder) -> None:
    folder = make_classifier("bert", word_tokenizer(special=True), num_labels=2)
    classifier = source(folder, resolve_folder, reads="prompt_and_completion")
    turns = [{"role": "user", "content": "happy"}, {"role": "assistant", "content": "dull"}, {"role": "user", "content": "line"}]
    shown = []
    classifier._tokenize, plain = (lambda text, **options: shown.append(text) or plain(text, **options)), classifier._tokenize
    classifier.score([turns], ["a joy"])
    assert shown == ["user: happy\n\nassistant: dull\n\nuser: line\n\nassistant: a joy"]


@pytest.mark.parametrize(("kind", "padding"), [("xlnet", "left"), ("convbert", "none")])
def test_families_that_padding_on_the_right_would_change(make_classifier, resolve_folder, kind, padding) -> None:
    """XLNet reads its class from the last column. ConvBERT's convolutions mix padding into the text."""
    folder = make_classifier(kind, word_tokenizer(special=kind != "xlnet"), num_labels=3)
    classifier = source(folder, resolve_folder, label="LABEL_2")
    assert classifier._padding == padding
    torch.testing.assert_close(
        classifier.score(["p"] * 3, TEXTS), by_pipeline(folder, "LABEL_2", function_to_apply="none"), rtol=1e-4, atol=1e-4
    )


def test_a_label_is_an_exact_name_before_one_without_regard_to_case(make_classifier, resolve_folder) -> None:
    folder = make_classifier("bert", word_tokenizer(special=True), id2label={0: "Fine", 1: "fine", 2: "1"})
    labels = [source(folder, resolve_folder, label=label).label for label in ("fine", "Fine", "1", 0)]
    assert labels == [1, 0, 2, 0]
    with pytest.raises(ModelError, match="label: 1 is the index of one class and the name of another.*label: '1'"):
        source(folder, resolve_folder, label=1)


def test_a_name_of_several_classes_is_refused(make_classifier, resolve_folder) -> None:
    folder = make_classifier("bert", word_tokenizer(special=True), id2label={0: "other", 1: "fine", 2: "other"})
    with pytest.raises(
        ModelError, match=r"several classes with the name 'other' \(0 \(other\), 1 \(fine\), 2 \(other\)\); set label to the"
    ):
        source(folder, resolve_folder, label="other")
    assert source(folder, resolve_folder, label=2).label == 2
