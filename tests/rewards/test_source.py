"""Reward sources: separate tokenizers, labels, weights and parts, and refused settings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from stages.errors import ModelError, RecipeError, TrainingError
from stages.rewards.building import build_reward, build_source
from stages.rewards.config import RewardInput, reward_model_inputs
from stages.rewards.details import Judgement, checked
from stages.rewards.function import FunctionSource, load_function
from stages.rewards.source import CombinedReward, RewardSource

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory, tiny_tokenizer) -> Path:
    """A random two-class DistilBERT of 16 positions with the tiny tokenizer."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    torch.manual_seed(1)
    config = DistilBertConfig(
        vocab_size=len(tiny_tokenizer),
        dim=16,
        hidden_dim=32,
        n_layers=1,
        n_heads=2,
        max_position_embeddings=16,
        id2label={0: "NEGATIVE", 1: "POSITIVE"},
        label2id={"NEGATIVE": 0, "POSITIVE": 1},
        pad_token_id=tiny_tokenizer.pad_token_id,
        initializer_range=0.5,
    )
    folder = tmp_path_factory.mktemp("classifier")
    DistilBertForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def classifier(folder: Path, resolve: Any, **fields: Any) -> Any:
    return build_source(RewardInput.model_validate({"model": str(folder), **fields}), resolve(folder), **CPU)


def test_classifier_scores_are_logit_probability_or_logprob_of_the_label(classifier_folder, resolve_folder, tiny_tokenizer) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(classifier_folder).eval()
    texts = ["the film was a joy", "dull", "a fine story"]
    with torch.no_grad():
        logits = torch.cat([model(torch.tensor([tiny_tokenizer(f"about it {text}")["input_ids"][:16]])).logits for text in texts])
    prompts = ["about it"] * 3
    for output, expected in (("logit", logits[:, 1]), ("probability", logits.softmax(-1)[:, 1]), ("logprob", logits.log_softmax(-1)[:, 1])):
        for label in ("positive", "POSITIVE", 1):
            scores = classifier(classifier_folder, resolve_folder, label=label, output=output).score(prompts, texts)
            torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    alone = classifier(classifier_folder, resolve_folder, label=1, reads="completion").score(prompts, texts)
    assert not torch.allclose(alone, logits[:, 1], atol=1e-3)
    assert torch.isfinite(classifier(classifier_folder, resolve_folder, label=1, reads="completion").score(["p"], [""])).all()


def test_unknown_label_is_refused(classifier_folder, resolve_folder) -> None:
    with pytest.raises(ModelError, match=r"no label 'happy'; expected one of 0 \(NEGATIVE\), 1 \(POSITIVE\)"):
        classifier(classifier_folder, resolve_folder, label="happy")


def test_sources_are_weighted_and_logged_separately() -> None:
    class Constant(RewardSource):
        def __init__(self, name: str, value: float) -> None:
            self.name, self.value = name, value

        def judge(self, prompts: Any, completions: Any, details: Any = None) -> Judgement:
            return Judgement(torch.full((len(completions),), self.value))

    scores = CombinedReward([(Constant("a", 2.0), 0.5), (Constant("b", 3.0), -1.0)]).score(["p", "p"], ["x", "y"])
    assert scores.total.tolist() == [-2.0, -2.0]
    assert {name: part.tolist() for name, part in scores.parts.items()} == {"a": [2.0, 2.0], "b": [3.0, 3.0]}


def test_functions_score_completions() -> None:
    source = FunctionSource("gold", "stages.corpora.world.gold:score_batch")
    prompt = "Compose one sentence on the romance Bitter Morning. Talk about the acting and stay negative."
    assert source.score([prompt], ["nothing"]).tolist() == [0.0]
    with pytest.raises(RecipeError, match="cannot import no_such_module"):
        load_function("no_such_module:f")
    with pytest.raises(RecipeError, match="has no 'nothing'"):
        load_function("stages.corpora.world.gold:nothing")
    with pytest.raises(TrainingError, match="raised DataError"):
        source.score(["joke"], ["ha"])


REWARDS = """
import sys, time
def hangs(p, c): time.sleep(60)
def raises(p, c): raise ZeroDivisionError("no")
def leaves(p, c): sys.exit(3)
def text(p, c): return "high"
def words(p, c): return ["high" for _ in c]
def nothing(p, c): return None
def table(p, c): return [[1.0] for _ in c]
def one(p, c): return 1.0
def few(p, c): return [1.0]
def huge(p, c): return [10**400 for _ in c]
def nan(p, c): return [float("nan") for _ in c]
def infinite(p, c): return [1e39 for _ in c]
def mapping(p, c): return {"a": 1.0}
def complex_(p, c): return [1j for _ in c]
def good(p, c): return (len(text) for text in c)
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hangs", "nonsense:hangs did not return within 0.2 s for 2 completions; make it faster, or raise timeout_seconds"),
        ("raises", "nonsense:raises raised ZeroDivisionError: no"),
        ("leaves", "nonsense:leaves raised SystemExit: 3"),
        ("text", "nonsense:text returned 'high'; expected one number, or None, per completion"),
        ("words", "nonsense:words returned"),
        ("nothing", "nonsense:nothing returned None"),
        ("table", r"'table' returned scores of shape \(2, 1\); expected one number per completion \(2\)"),
        ("one", r"'one' returned scores of shape \(\)"),
        ("few", r"'few' returned scores of shape \(1,\)"),
        ("huge", "nonsense:huge returned"),
        ("nan", "'nan' returned nan for the completion 'a'; expected a finite number"),
        ("infinite", "'infinite' returned inf"),
        ("mapping", "nonsense:mapping returned"),
        ("complex_", "nonsense:complex_ returned"),
        ("good", "nonsense:good returned <generator"),
    ],
)
def test_function_that_hangs_raises_or_returns_invalid_scores_is_an_error(tmp_path, monkeypatch, name: str, message: str) -> None:
    (tmp_path / "nonsense.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nonsense", raising=False)
    reward = CombinedReward([(FunctionSource(name, f"nonsense:{name}", timeout=0.2 if name == "hangs" else 20.0), 1.0)])
    with pytest.raises(TrainingError, match=message):
        reward.score(["p", "q"], ["a", "bb"])


def test_a_function_is_called_again_after_an_error(tmp_path, monkeypatch) -> None:
    (tmp_path / "moody.py").write_text("def moody(p, c):\n    return [1 / len(text) for text in c]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    source = FunctionSource("moody", "moody:moody", timeout=5.0)
    with pytest.raises(TrainingError, match="ZeroDivisionError"):
        source.score(["p"], [""])
    assert source.score(["p"], ["abcd"]).tolist() == [0.25]


def test_non_finite_scores_are_refused() -> None:
    with pytest.raises(TrainingError, match="returned inf for the completion 'b'"):
        checked(torch.tensor([0.0, torch.inf]), "x", ["a", "b"])


def test_models_of_a_reward_list_are_found_by_field_path(classifier_folder, resolve_folder) -> None:
    sources = [
        RewardInput.model_validate({"function": "stages.corpora.world.gold:score_batch", "weight": 2.0}),
        RewardInput.model_validate({"model": "m", "label": 0}),
    ]
    reward = build_reward(sources, {"reward[1].model": resolve_folder(classifier_folder)}, "reward", **CPU)
    assert [(source.name, weight) for source, weight in reward.sources] == [("score_batch", 2.0), ("m", 1.0)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [({}, "exactly one"), ({"model": "m", "function": "a:b"}, "exactly one"), ({"function": "a:b", "label": 1}, "label needs")],
)
def test_contradicting_reward_settings_are_refused(fields, message) -> None:
    with pytest.raises(ValidationError, match=message):
        RewardInput.model_validate(fields)


def test_ensemble_counts_as_one_source(tmp_path, monkeypatch, classifier_folder, resolve_folder) -> None:
    code = "def lengths(p, c): return [len(text) for text in c]\ndef ones(p, c): return [1.0 for _ in c]\n"
    (tmp_path / "ensemble_rewards.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    members = [{"function": "ensemble_rewards:lengths"}, {"function": "ensemble_rewards:ones", "weight": 3.0}]
    inputs = {
        how: RewardInput.model_validate({"name": "both", "ensemble": members, "combine": how, "weight": 2.0, "uncertainty_coef": 0.5})
        for how in ("mean", "min", "uncertainty")
    }
    # lengths 1 and 5, and the constant 3: means 2 and 4, minima 1 and 3, variances 1 and 1
    for how, expected in (("mean", [4.0, 8.0]), ("min", [2.0, 6.0]), ("uncertainty", [3.0, 7.0])):
        scores = build_reward([inputs[how]], {}, "reward", **CPU).score(["p", "p"], ["a", "abcde"])
        assert scores.total.tolist() == expected and scores.spans is None
        assert scores.parts["both.lengths"].tolist() == [1.0, 5.0] and scores.parts["both.ones"].tolist() == [3.0, 3.0]
        assert scores.parts["both.variance"].tolist() == [1.0, 1.0] and set(scores.parts) >= {"both"}
    with pytest.raises(ModelError, match="is an ensemble; only PPO can use one"):
        build_source(inputs["mean"], None, **CPU)
    two = [{"model": "x", "label": 1, "name": "one"}, {"model": "y", "label": 0, "name": "two"}]
    learned = [RewardInput.model_validate({"name": "both", "ensemble": two})]
    assert list(reward_model_inputs(learned, "reward")) == ["reward[0].ensemble[0].model", "reward[0].ensemble[1].model"]
    models = dict.fromkeys(reward_model_inputs(learned, "reward"), resolve_folder(classifier_folder))
    combined = build_reward(learned, models, "reward", **CPU).score(["p"], ["the film"])
    assert combined.total.item() == pytest.approx((combined.parts["both.one"].item() + combined.parts["both.two"].item()) / 2)
