"""Details of the papers about models, tokens and reward models, as in the rows of stages/conformance.py."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.config import GenerationSettings, OptimizerSettings
from stages.corpora.comparisons import Comparison
from stages.corpora.templates import encode_pair, set_template
from stages.models.heads import RewardModel, ValueModel
from stages.models.loading import load_language_model
from stages.ppo.config import PPOOptimizer
from stages.ppo.update.optimizers import make_optimizer
from stages.recipe.presets import PRESETS
from stages.reward_model.config import RewardModelConfig
from stages.reward_model.rows import collate, encode
from stages.reward_model.run import run
from stages.rewards.building import build_source
from stages.rewards.config import RewardInput
from stages.sampling.generation import episode_seed, generate, left_pad
from stages.sampling.readers import position_ids
from stages.training.arguments import schedule_arguments

TEXT = [7, 42, 105, 9]
PAD = 1


def gpt2_folder(folder: Path, tokenizer: Any) -> Path:
    """A tiny GPT-2 with learned positions. Its config has dropout 0.1 everywhere."""
    import transformers

    torch.manual_seed(1)
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64)
    config.eos_token_id, config.bos_token_id, config.pad_token_id = tokenizer.eos_token_id, None, tokenizer.pad_token_id
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    return gpt2_folder(tmp_path_factory.mktemp("gpt2"), tiny_tokenizer)


@pytest.mark.detail("G1")
def test_scalar_head_replaces_the_unembedding(tiny_llama_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = RewardModel.from_language_model(str(tiny_llama_folder), dtype=torch.float32)
    assert not any("lm_head" in name for name, _ in model.named_parameters())
    assert (model.score_head.in_features, model.score_head.out_features) == (32, 1)
    ids = torch.tensor([TEXT, TEXT])
    assert model.score_tokens(ids, torch.ones_like(ids)).shape == (2, 4)
    assert model.score(ids, torch.ones_like(ids)).shape == (2,)
    model.save(tmp_path)
    assert ValueModel.from_pretrained(tmp_path, dtype=torch.float32)(ids, torch.ones_like(ids)).shape == (2, 4)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["score.weight"].shape == (1, 32) and not any("lm_head" in name for name in stored)


@pytest.mark.detail("G3", "G4")
def test_adam_of_the_presets() -> None:
    def defaults(name: str) -> tuple[tuple[float, float], float]:
        settings = PRESETS[name].stages["ppo"]
        fields = {path.partition(".")[2]: value.value for path, value in settings.items() if path.startswith("training.")}
        optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(1))], PPOOptimizer.model_validate(fields))
        return optimizer.defaults["betas"], optimizer.defaults["eps"]

    assert defaults("instructgpt2022")[0] == (0.9, 0.95)
    assert defaults("ziegler2019")[1] == defaults("huang2024")[1] == 1e-5


@pytest.mark.detail("G9")
def test_a_completion_begins_with_a_space_and_ends_with_the_end_token(tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    set_template(tokenizer, "tldr")
    ids, length = encode_pair(tokenizer, "POST: x", "foo")
    assert ids[length:] == tokenizer(" foo")["input_ids"] + [tokenizer.eos_token_id]
    assert ids[length:-1] != tokenizer("foo")["input_ids"]
    assert encode_pair(tokenizer, "POST: x", " foo")[0] == ids  # data that already has the space is not changed


@pytest.mark.detail("G10")
@pytest.mark.parametrize("pad", [0, 1, 250])
def test_logits_do_not_depend_on_padding(tiny_llama_folder: Path, pad: int) -> None:
    from stages.models.passes.responses import Policy, sequence_batch

    policy = Policy(load_language_model(str(tiny_llama_folder), dtype=torch.float32), temperature=1.0, autocast=None)
    prompts, responses = [[20, 21], [22, 23, 24, 25]], [[30, 31, 32], [33]]
    with torch.no_grad():
        padded = policy.logprobs(sequence_batch(prompts, responses, pad, policy.device))
        alone = torch.cat([policy.logprobs(sequence_batch([p], [r], 5, policy.device)) for p, r in zip(prompts, responses, strict=True)])
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)


@pytest.mark.detail("G10")
def test_the_pad_token_is_not_the_end_token(tiny_tokenizer: Any) -> None:
    from stages.models.loading import ensure_pad_token

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    ensure_pad_token(tokenizer, "test")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


@pytest.mark.detail("G11")
def test_positions_follow_the_mask(gpt2: Path) -> None:
    model = load_language_model(str(gpt2), dtype=torch.float32, trainable=False)
    short, long = [20, 21, 22], [23, 24, 25, 26, 27, 28]
    ids, mask = left_pad([short, long], PAD)
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask.long(), position_ids=position_ids(mask)).logits
        alone = model(input_ids=torch.tensor([short])).logits
        shifted = model(input_ids=ids, attention_mask=mask.long(), position_ids=torch.arange(6)[None].expand(2, 6)).logits
    torch.testing.assert_close(padded[0, 3:], alone[0], rtol=0, atol=1e-4)
    assert (shifted[0, 3:] - alone[0]).abs().max() > 1e-3  # without it they would differ


@pytest.mark.detail("G13")
def test_processes_sample_differently_from_one_order_of_prompts(tiny_llama_folder: Path) -> None:
    seeds = [episode_seed(7, iteration, row) for iteration in range(50) for row in range(64)]
    assert len(set(seeds)) == len(seeds)  # one random stream per episode, independent of the process that samples it
    model = load_language_model(str(tiny_llama_folder), dtype=torch.float32, trainable=False)
    settings = GenerationSettings(max_new_tokens=8)
    # process 0 takes the even episodes and process 1 the odd ones; here of the same prompt
    streams = [[episode_seed(7, 0, row) for row in range(rank, 8, 2)] for rank in range(2)]
    shares = [generate(model, [[20, 21]] * 4, settings, seeds=own, stop_ids=[0], pad_token_id=PAD) for own in streams]
    assert not torch.equal(shares[0].response_ids, shares[1].response_ids)
    assert len({tuple(row) for share in shares for row in share.response_ids.tolist()}) == 8


@pytest.mark.detail("G14", "S1")
def test_sixteen_epochs_of_cosine_to_a_tenth() -> None:
    from transformers import get_scheduler

    settings = PRESETS["instructgpt2022"].stages["sft"]
    fields = {path.partition(".")[2]: value.value for path, value in settings.items() if path.startswith("training.")}
    optimizer_settings = OptimizerSettings.model_validate(fields)
    assert optimizer_settings.epochs == 16.0
    arguments = schedule_arguments(optimizer_settings)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(
        arguments["lr_scheduler_type"],
        optimizer,
        num_warmup_steps=int(arguments["warmup_steps"] * 160),
        num_training_steps=160,
        scheduler_specific_kwargs=arguments["lr_scheduler_kwargs"],
    )
    trace = []
    for _ in range(161):
        trace.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert (trace[0], trace[80], trace[160]) == pytest.approx((1.0, 0.55, 0.10))
    assert trace == sorted(trace, reverse=True)  # no warmup


@pytest.mark.detail("S8")
def test_evaluation_at_temperature_0_01_samples_almost_greedily() -> None:
    from stages.sampling.choosing import sample_tokens

    noise = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    logits = torch.tensor([0.0, 0.02]).expand(1000, 2)
    tokens, _ = sample_tokens(logits, noise, temperature=GenerationSettings(temperature=0.01).temperature)
    share = tokens.float().mean().item()
    assert share == pytest.approx(1 / (1 + 2.718281828**-2), abs=2e-3)  # 0.88, not 1: T = 0.01 is not greedy decoding


# Reward models


@pytest.fixture
def reward_model(tiny_llama_folder: Path) -> RewardModel:
    return RewardModel.from_language_model(str(tiny_llama_folder), dtype=torch.float32, trainable=False)


@pytest.fixture
def saved_reward_model(reward_model: RewardModel, tmp_path: Path, resolve_folder: Any) -> Any:
    reward_model.save(tmp_path / "rm")
    return resolve_folder(tmp_path / "rm")


def scorer(resolved: Any) -> Any:
    return build_source(RewardInput.model_validate({"model": "rm"}), resolved, device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.detail("R3")
def test_a_prompt_is_one_element_of_a_batch(tiny_tokenizer: Any) -> None:
    rows = [encode(Comparison(f"p {k}", [f"t {n}" for n in range(k)], list(range(k))), tiny_tokenizer, 64) for k in (4, 9, 2)]
    batch = collate(rows, PAD)
    assert torch.bincount(batch["prompt_index"]).tolist() == [4, 9, 2]


@pytest.mark.detail("R7")
def test_more_than_one_epoch_gives_a_warning(tmp_path: Path, step_context: Any, resolve_folder: Any, tiny_llama_folder: Path) -> None:
    path = tmp_path / "comparisons.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p {n}", "chosen": "a joy", "rejected": "dull"}) + "\n" for n in range(8)))
    for epochs, warned in ((1.0, 0), (2.0, 1)):
        context = step_context(f"test/epochs{warned}", models={"model": resolve_folder(tiny_llama_folder)})
        said: list[str] = []
        context.runtime.console.print = lambda *parts, said=said, **_: said.append(str(parts[0]))
        training = {"epochs": epochs, "batch_size": 4, "microbatch_size": 4, "learning_rate": 1e-3}
        run(
            RewardModelConfig.model_validate(
                {
                    "name": "rm",
                    "model": "m",
                    "precision": "fp32",
                    "training": training,
                    "data": {"train": str(path), "validation_fraction": 0.25},
                }
            ),
            context,
        )
        assert sum("reward models overfit quickly" in text for text in said) == warned


@pytest.mark.detail("R13")
def test_tokens_after_the_end_do_not_change_the_score(reward_model: RewardModel) -> None:
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
    one, two = (reward_model.score(torch.tensor([[*TEXT, *tail]]), mask) for tail in ([PAD, PAD, PAD], [88, 200, 0]))
    assert torch.equal(one, two)  # to the bit
    # read at the last real token only
    tokens = reward_model.score_tokens(torch.tensor([[*TEXT, PAD, PAD, PAD]]), mask)
    torch.testing.assert_close(one, tokens[:, 3])
    assert (tokens[:, 2] - one).abs() > 1e-4


@pytest.mark.detail("R14")
def test_the_reward_model_reads_the_prompt(saved_reward_model: Any) -> None:
    source = scorer(saved_reward_model)
    prompts, texts = ["write a happy line", "the film", "plot"], ["a joy"] * 3
    scores = source.score(prompts, texts)
    permuted = source.score([prompts[1], prompts[2], prompts[0]], texts)
    torch.testing.assert_close(permuted, scores[[1, 2, 0]])
    assert len({round(score, 5) for score in scores.tolist()}) == 3


@pytest.mark.detail("R15")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_left_and_right_padding_agree_up_to_rounding(gpt2: Path, dtype: torch.dtype, bound: float) -> None:
    model = RewardModel.from_language_model(str(gpt2), dtype=dtype, trainable=False)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(2, 300, (32, 12), generator=generator)
    pads, ones = torch.full((32, 5), PAD), torch.ones(32, 12, dtype=torch.long)
    left = model.score(torch.cat([pads, rows], 1), torch.cat([torch.zeros_like(pads), ones], 1))
    right = model.score(torch.cat([rows, pads], 1), torch.cat([ones, torch.zeros_like(pads)], 1))
    assert (left - right).mean().abs() < bound * right.abs().mean()


@pytest.mark.detail("P36", "R20")
def test_a_reward_model_of_another_family_and_vocabulary_scores_texts(
    tmp_path: Path, resolve_folder: Any, ppo_policy: Any, step_context: Any
) -> None:
    """The policy is a Llama with 300 tokens. The reward model is a GPT-2 whose tokenizer has 270 tokens and splits texts differently."""
    from stages.ppo.config import PPOStepConfig
    from stages.ppo.roles import load_roles

    other = tmp_path / "other"
    RewardModel.from_language_model(str(gpt2_folder(tmp_path / "lm", _other_tokenizer())), dtype=torch.float32).save(other)
    context = step_context(models={"policy": ppo_policy, "reward[0].model": resolve_folder(other)})
    config = PPOStepConfig.model_validate({"name": "p", "policy": "x", "reward": [{"model": "other"}], "data": "u", "precision": "fp32"})
    roles = load_roles(config, context)
    assert roles.value is not None  # the value network is of the policy's family, because the reward model cannot read the policy's tokens
    assert roles.value.config.model_type == "llama"
    source = scorer(resolve_folder(other))
    before = source.score(["the film"], ["a joy"])
    assert len(source.tokenizer) != len(roles.tokenizer)
    with torch.no_grad():
        for network in roles.networks().values():
            for parameter in network.parameters():
                parameter.add_(1.0)
    assert torch.equal(source.score(["the film"], ["a joy"]), before)  # no weights are shared with trained models


@pytest.fixture
def ppo_policy(resolve_folder: Any, tiny_llama_folder: Path) -> Any:
    return resolve_folder(tiny_llama_folder)


def _other_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270, special_tokens=["<pad>", "</s>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(["another text altogether"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


@pytest.mark.detail("R10")
def test_the_head_of_a_wide_model_is_drawn_within_five_percent() -> None:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(vocab_size=8, hidden_size=4096, intermediate_size=8, num_hidden_layers=0, num_attention_heads=1)
    made = RewardModel(LlamaModel(config))
    made.draw_head(seed=0)
    # 4096 draws: the sample's standard deviation is off by about 1.1 %
    assert made.score_head.weight.std().item() == pytest.approx(4097**-0.5, rel=0.05) and made.reward_bias == 0.0
