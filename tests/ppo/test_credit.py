"""Token-level rewards: characters to tokens by hand, a complete rollout, and token scores that sum to a reward model's score."""

from __future__ import annotations

import pytest
import torch

from stages.errors import TrainingError
from stages.ppo.roles import load_roles
from stages.ppo.rollout.credit import token_scores
from stages.rewards.building import build_reward, build_source
from stages.rewards.config import RewardInput
from stages.rewards.function import SpanFunctionSource

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


def test_characters_to_tokens_by_hand(tiny_tokenizer) -> None:
    # the fixture's tokenizer has learned byte pairs of other sentences; here " film" and "joy" are several tokens
    ids = [tiny_tokenizer.convert_tokens_to_ids(token) for token in ("\u0120", "f", "i", "x", "\u00c3", "\u00a9", "<|endoftext|>")]
    assert tiny_tokenizer.decode(ids, skip_special_tokens=True) == " fix\u00e9"
    # positions count from the f: f 0, i 1, x 2, e-acute 3 (two tokens, the second completes it), end 4
    paid = token_scores(tiny_tokenizer, [[]], [ids], [[(0, 1.0), (2, 2.0), (4, 4.0), (2, 0.5)]], 8)
    assert paid.tolist() == [[0.0, 1.0, 0.0, 2.5, 0.0, 0.0, 4.0, 0.0]]
    accent = token_scores(tiny_tokenizer, [[]], [ids], [[(3, 1.0)]], 8)[0]
    assert accent[4] + accent[5] == 1.0
    assert token_scores(tiny_tokenizer, [[], []], [ids, ids], [[], [(1, 3.0)]], 7)[1].tolist() == [0, 0, 3.0, 0, 0, 0, 0]


def test_characters_are_those_of_the_text_after_the_prompt(tokenizer_of) -> None:
    # WordPiece writes "##" before a piece inside a word if the text begins with it: the response is "warmth", and "##warmth" alone.
    tokenizer = tokenizer_of("wordpiece")
    prompt, response = (tokenizer.convert_tokens_to_ids(pieces) for pieces in (["u", "##n"], ["##w", "##a", "##rm", "##t", "##h"]))
    assert tokenizer.decode(prompt + response) == "unwarmth"
    # w 0, a 1, rm 2 and 3, t 4, h 5
    paid = token_scores(tokenizer, [prompt], [response], [[(0, 1.0), (3, 2.0), (5, 4.0)]], 5)
    assert paid.tolist() == [[1.0, 0.0, 2.0, 0.0, 4.0]]


def test_token_level_function_in_a_complete_rollout(ppo_config, ppo_context) -> None:
    from stages.corpora.templates import encode_prompt
    from stages.ppo.rollout.collecting import collect
    from stages.ppo.rollout.episodes import Episodes
    from stages.ppo.update.targets import targets

    reward_input = {"function": "letters_reward:each_e", "level": "token", "weight": 2.0}
    config = ppo_config(reward=[reward_input], whiten_advantages=False, generation={"max_new_tokens": 30})
    roles = load_roles(config, ppo_context)
    reward = build_reward(config.reward, {}, "reward", **CPU)
    prompts = ["the film", "joy"] * 6
    ids = [encode_prompt(roles.tokenizer, prompt) for prompt in prompts]
    rollout = collect(roles, reward, build_reward([], {}, "monitors", **CPU), Episodes(prompts, ids, range(12)), config)
    target = targets(rollout, config, kl_coef=0.0)
    paid = 0
    for row, text in enumerate(rollout.completions):
        assert rollout.scores[row] == 2.0 * text.count("e") == rollout.token_scores[row].sum()
        for step, token in enumerate(rollout.response(row)):
            assert target.rewards[row, step] == 2.0 * roles.tokenizer.decode([token], skip_special_tokens=True).count("e")
            paid += int(target.rewards[row, step] > 0)
    assert paid > 3


def test_token_level_function_with_invalid_results_is_refused(tmp_path, monkeypatch) -> None:
    (tmp_path / "span_rewards.py").write_text(
        "def floats(p, c): return [1.0 for _ in c]\ndef short(p, c): return []\ndef outside(p, c): return [[(9, 1.0)] for _ in c]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, message in (
        ("floats", "expected one list of .character position, score. per completion"),
        ("short", "returned 0 lists; expected one per completion .1."),
        ("outside", "scored position 9, and 'joy' has 3 characters; expected 0 to 3"),
    ):
        with pytest.raises(TrainingError, match=message):
            SpanFunctionSource(name, f"span_rewards:{name}").judge(["p"], ["joy"])


def test_token_scores_of_a_reward_model_sum_to_its_score(tiny_llama_folder, resolve_folder, tmp_path) -> None:
    from stages.models.heads import RewardModel

    model = RewardModel.from_language_model(str(tiny_llama_folder), dtype=torch.float32, trainable=False)
    model.center(-0.7)
    model.save(tmp_path)
    source = {
        kind: build_source(RewardInput.model_validate({"model": "rm", "level": kind}), resolve_folder(tmp_path), **CPU)
        for kind in ("token", "completion")
    }
    prompts, texts = ["write a line", "the film ", "x"], ["the film was a joy", "caf\u00e9", ""]
    spans = source["token"].judge(prompts, texts).spans
    scores = source["completion"].score(prompts, texts)
    torch.testing.assert_close(torch.tensor([sum(score for _, score in row) for row in spans]), scores)
    # each part is the difference of the scores of two prefixes
    tokenizer = model.tokenizer
    ids = tokenizer("write a line")["input_ids"] + tokenizer(" the film was a joy")["input_ids"]
    assert spans[0][-2][1] == pytest.approx(_last_difference(model, ids), abs=1e-5)
    assert [position for position, _ in spans[0]][0] == 0 and spans[0][-1][0] == len(texts[0])
    assert spans[2] == [(0, pytest.approx(float(scores[2]), abs=1e-6))]


def _last_difference(model, ids: list[int]) -> float:
    """The score with the last token of the text minus the score without it."""
    with torch.no_grad():
        scores = [model.score(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long)).item() for row in (ids[:-1], ids)]
    return scores[1] - scores[0]
