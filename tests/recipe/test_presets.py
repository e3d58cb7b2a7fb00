"""Presets: the published numbers, overridden by recipe and command line, scaled with batch sizes; and the origin of each value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stages.cli import app
from stages.errors import RecipeError
from stages.ppo.update.optimizers import learning_rate_factor
from stages.recipe.presets import PRESETS
from stages.recipe.schema import config_class, load_recipe
from stages.recipe.settings import preset_settings, settings_of_step
from stages.recipe.source import parse_path

FIELDS = {
    "sft": {"stage": "sft", "name": "sft", "model": "owner/model-1", "data": {"train": "world:demonstrations"}},
    "reward_model": {"stage": "reward_model", "name": "rm", "model": "owner/model-1", "data": {"train": "world:comparisons"}},
    "ppo": {"stage": "ppo", "name": "ppo", "policy": "owner/model-1", "reward": [{"function": "a:b"}], "data": "world:prompts"},
}
MIX = {"pretraining_mix": {"data": "world:raw"}}


def recipe(tmp_path: Path, *steps: dict[str, Any], overrides: tuple[str, ...] = ()) -> Any:
    path = tmp_path / "recipe.yaml"
    lines = ["name: test", "steps:"]
    for step in steps:
        lines += [f"{'  - ' if index == 0 else '    '}{key}: {json.dumps(value)}" for index, (key, value) in enumerate(step.items())]
    path.write_text("\n".join(lines) + "\n")
    return load_recipe(path, overrides)


def step(stage: str, preset: str, **fields: Any) -> dict[str, Any]:
    return {**FIELDS[stage], "preset": preset, **fields}


def configured(tmp_path: Path, stage: str, preset: str, *overrides: str, **fields: Any) -> Any:
    return recipe(tmp_path, step(stage, preset, **fields), overrides=overrides).steps[0].config


@pytest.mark.detail("P4", "P15", "P17", "S1", "S3", "S5")
def test_instructgpt(tmp_path: Path) -> None:
    ppo = configured(tmp_path, "ppo", "instructgpt2022", **MIX)
    assert (ppo.rollout_batch_size, ppo.minibatch_size, ppo.ppo_epochs, ppo.total_episodes) == (512, 64, 1, 256_000)
    assert ppo.num_iterations == 500 and ppo.num_iterations * ppo.ppo_epochs * 8 == 4000  # optimizer steps
    assert (ppo.kl.coef, ppo.clip.ratio, ppo.gae.gamma, ppo.ema.decay, ppo.generation.temperature) == (0.02, 0.2, 1.0, 0.992, 1.0)
    assert (ppo.pretraining_mix.coef, ppo.pretraining_mix.examples_per_episode) == (27.8, 8)
    assert (ppo.training.adam_beta1, ppo.training.adam_beta2, ppo.training.value_learning_rate) == (0.9, 0.95, 9e-6)
    assert ppo.training.max_grad_norm is None and ppo.kl.update_limit is None and ppo.clip.dual is None
    trace = [learning_rate_factor(ppo.training, iteration, ppo.num_iterations) for iteration in range(500)]
    assert trace[0] == pytest.approx(0.1) and trace[10:] == [1.0] * 490 and trace[:11] == sorted(trace[:11])
    sft = configured(tmp_path, "sft", "instructgpt2022/175b")
    assert (sft.training.epochs, sft.training.learning_rate, sft.training.batch_size, sft.residual_dropout) == (16.0, 5.03e-6, 8, 0.2)
    assert (sft.training.schedule, sft.training.final_learning_rate_fraction, sft.training.warmup_fraction) == ("cosine", 0.1, 0.0)
    init = configured(tmp_path, "sft", "instructgpt2022/6b-init", **MIX)
    assert (init.training.epochs, init.training.learning_rate, init.pretraining_mix.share) == (2.0, 1.04e-5, 0.1)
    reward = configured(tmp_path, "reward_model", "instructgpt2022")
    assert (reward.training.learning_rate, reward.training.batch_size, reward.training.epochs, reward.loss) == (9e-6, 64, 1.0, "pairs")
    assert (reward.normalization.to, reward.normalization.on) == ("center", "demonstrations")


@pytest.mark.detail("P32", "S6")
def test_stiennon(tmp_path: Path) -> None:
    small, large = (configured(tmp_path, "ppo", f"stiennon2020/{size}") for size in ("1.3b", "6.7b"))
    assert (small.training.learning_rate, large.training.learning_rate) == (1.5e-5, 7e-6)
    assert (small.rollout_batch_size, large.rollout_batch_size) == (512, 256) and small.total_episodes == 1_000_000
    assert (small.ppo_epochs, small.kl.coef, small.gae.gae_lambda, small.training.schedule) == (4, 0.05, 0.95, "linear")
    reward = configured(tmp_path, "reward_model", "stiennon2020/6.7b")
    assert (reward.training.learning_rate, reward.training.batch_size) == (5e-6, 64) and 3 <= reward.num_seeds <= 10
    sft = configured(tmp_path, "sft", "stiennon2020")
    assert (sft.training.learning_rate, sft.training.batch_size, sft.training.schedule) == (6.35e-5, 128, "cosine")


@pytest.mark.detail("P4", "P33")
def test_ziegler(tmp_path: Path) -> None:
    style, tldr, cnndm = (configured(tmp_path, "ppo", f"ziegler2019/{task}") for task in ("style", "tldr", "cnndm"))
    assert (style.kl.coef, style.kl.target, style.kl.horizon) == (0.15, 6.0, 10_000)
    assert [(one.kl.coef, one.kl.target) for one in (tldr, cnndm)] == [(0.03, None), (0.01, None)]
    assert [one.generation.temperature for one in (style, tldr, cnndm)] == [0.7, 0.7, 0.5]
    assert [(one.generation.max_new_tokens, one.generation.stop, one.generation.stop_after) for one in (style, tldr)] == [
        (24, ["."], 16),
        (75, ["\n"], 55),
    ]
    assert (style.whiten.rewards, tldr.whiten.rewards, style.whiten.scope) == (True, False, "minibatch")
    assert (style.missing_eos, style.missing_eos_penalty, style.value) == ("replace", 1.0, "shared")
    assert (style.training.adam_style, style.training.adam_epsilon, style.training.learning_rate) == ("tensorflow", 1e-5, 1e-5)
    assert (style.ppo_epochs, style.minibatch_size, style.rollout_batch_size, style.training.max_grad_norm) == (4, 512, 512, None)
    reward = configured(tmp_path, "reward_model", "ziegler2019")
    assert (reward.loss, reward.normalization.to, reward.normalization.num_samples) == ("best_of", "standardize", 256)
    assert reward.normalization.before_training and reward.training.schedule == "linear"
    with pytest.raises(RecipeError, match="'ziegler2019' has nothing for the stage sft: Ziegler et al. start from a pretrained model"):
        configured(tmp_path, "sft", "ziegler2019")


@pytest.mark.detail("D13", "P31", "S7")
def test_huang(tmp_path: Path) -> None:
    ppo = configured(tmp_path, "ppo", "huang2024")
    assert (ppo.rollout_batch_size, ppo.minibatch_size, ppo.ppo_epochs, ppo.training.learning_rate) == (512, 512, 4, 3e-6)
    assert (ppo.kl.coef, ppo.generation.temperature, ppo.clip.ratio, ppo.clip.value, ppo.value_coef) == (0.05, 0.7, 0.2, 0.2, 0.1)
    assert (ppo.score_placement, ppo.missing_eos, ppo.whiten.scope, ppo.whiten.rewards) == ("after", "replace", "process", False)
    sft, reward = configured(tmp_path, "sft", "huang2024"), configured(tmp_path, "reward_model", "huang2024")
    assert (sft.completion_only_loss, sft.training.batch_size, sft.max_length, sft.residual_dropout) == (False, 128, 562, 0.0)
    assert (reward.training.learning_rate, reward.training.adam_epsilon, reward.max_length) == (3e-6, 1e-5, 638)
    assert (sft.prompt_fit.max_tokens, sft.prompt_fit.before) == (512, "\n\nTL;DR:")


def test_every_value_is_a_field_with_a_source() -> None:
    for name, preset in PRESETS.items():
        stages = {"sft", "reward_model", "ppo"}
        assert set(preset.stages) <= stages and set(preset.stages) | set(preset.missing) == stages, name
        for stage, settings in preset.stages.items():
            schema = config_class(stage)
            for path, value in settings.items():
                assert len(value.source) >= 3 and value.origin
                block = schema
                *blocks, last = parse_path(path)
                for key in blocks:  # training.learning_rate: the block's own fields
                    kinds = [block.model_fields[key].annotation, *getattr(block.model_fields[key].annotation, "__args__", ())]
                    block = next(kind for kind in kinds if hasattr(kind, "model_fields"))
                assert last in block.model_fields, f"{name}: {stage} has no {path}"
            published = [path for path, value in settings.items() if value.published]
            assert len(published) >= 4, f"{name}: {stage}"


def test_recipe_and_command_line_override_a_preset(tmp_path: Path) -> None:
    config = configured(
        tmp_path, "ppo", "huang2024", "ppo.kl.coef=0.5", "ppo.training.learning_rate=1e-4", ppo_epochs=2, training={"adam_beta2": 0.9}
    )
    assert (config.kl.coef, config.training.learning_rate, config.ppo_epochs, config.training.adam_beta2) == (0.5, 1e-4, 2, 0.9)
    assert (config.training.adam_epsilon, config.rollout_batch_size) == (1e-5, 512)  # the other fields are unchanged
    assert configured(tmp_path, "ppo", "huang2024", "ppo.preset=null").rollout_batch_size == 64  # our default
    assert configured(tmp_path, "ppo", "stiennon2020", "ppo.prompt_fit=null").prompt_fit is None  # a block set to null overrides the preset


@pytest.mark.detail("P15")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"rollout_batch_size": 64}, (64, 8)),  # eight minibatches, as in the paper
        ({"rollout_batch_size": 12}, (12, 2)),  # six: eight do not divide twelve
        ({"minibatch_size": 32}, (256, 32)),
        ({"rollout_batch_size": 96, "minibatch_size": 48}, (96, 48)),
    ],
)
def test_batch_sizes_scale(tmp_path: Path, given: dict[str, int], expected: tuple[int, int]) -> None:
    config = configured(tmp_path, "ppo", "instructgpt2022", **MIX, **given)
    assert (config.rollout_batch_size, config.minibatch_size) == expected
    assert config.kl.coef == 0.02 and config.total_episodes == 256_000


def test_a_batch_that_is_overridden_need_not_be_a_multiple_of_a_microbatch(tmp_path: Path) -> None:
    sft = configured(tmp_path, "sft", "stiennon2020", "sft.training.batch_size=100")
    assert (sft.training.batch_size, sft.training.microbatch_size, sft.training.rows_per_pass) == (100, "auto", 32)
    reward = configured(tmp_path, "reward_model", "instructgpt2022", training={"batch_size": 12})
    assert (reward.training.batch_size, reward.training.rows_per_pass) == (12, 8)


def test_preset_without_required_fields_names_them(tmp_path: Path) -> None:
    message = r"recipe.yaml:3: steps\[0\]: the preset 'instructgpt2022' needs pretraining_mix.data: .*Or set pretraining_mix: null"
    with pytest.raises(RecipeError, match=message):
        configured(tmp_path, "ppo", "instructgpt2022")
    assert configured(tmp_path, "ppo", "instructgpt2022", pretraining_mix=None).pretraining_mix is None
    with pytest.raises(RecipeError, match=r"steps\[0\].preset: got 'instructgpt', which is not a preset; did you mean 'instructgpt2022'\?"):
        configured(tmp_path, "ppo", "instructgpt")


def test_settings_show_the_origin_of_every_value(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, step("ppo", "instructgpt2022", **MIX, kl_coef=0.1), overrides=("ppo.ppo_epochs=2",))
    settings = {setting.path: setting for setting in settings_of_step(loaded, loaded.steps[0])}
    assert (settings["kl.coef"].kind, settings["ppo_epochs"].kind, settings["clip.ratio"].kind) == ("recipe", "override", "preset")
    line = 1 + next(number for number, text in enumerate((tmp_path / "recipe.yaml").read_text().splitlines()) if "kl_coef" in text)
    assert settings["kl.coef"].origin == f"{tmp_path / 'recipe.yaml'}:{line}"
    assert settings["ppo_epochs"].origin == "override 'ppo.ppo_epochs=2'"
    assert settings["clip.ratio"].origin == "instructgpt2022: I C.4"
    assert settings["gae.gae_lambda"].origin.startswith("instructgpt2022: not published; ours: as Ziegler")
    assert (settings["entropy_coef"].kind, settings["health.kl_limit"].kind) == ("default", "default")
    assert (settings["policy.ref"].kind, settings["reward[0].function"].kind, settings["data[0].path"].kind) == (
        "recipe",
        "recipe",
        "recipe",
    )
    assert (settings["policy.quantization"].kind, settings["data[0].skip"].kind) == ("default", "default")
    assert (settings["reward[0].weight"].kind, settings["pretraining_mix.data[0].path"].kind) == ("default", "recipe")
    shown = {setting.path for setting in preset_settings(loaded, loaded.steps[0])}
    assert {"kl.coef", "ppo_epochs", "clip.ratio", "pretraining_mix.coef"} <= shown and "entropy_coef" not in shown


def test_plan_shows_the_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = {**FIELDS["reward_model"], "preset": "huang2024", "model": "sft"}
    recipe(tmp_path, FIELDS["sft"] | {"preset": "huang2024"}, reward, {**FIELDS["sft"], "name": "plain"})
    monkeypatch.setenv("COLUMNS", "200")
    command = ["plan", str(tmp_path / "recipe.yaml"), "--home", str(tmp_path / "home"), "sft.training.epochs=3"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert "sft (sft): preset huang2024" in shown.output and "N+ Args.eps" in shown.output
    assert "override 'sft.training.epochs=3'" in shown.output and "plain (sft)" not in shown.output
    every = CliRunner().invoke(app, [*command, "--settings"])
    assert "plain (sft)" in every.output and "checkpoints.seconds" in every.output
    as_json = json.loads(CliRunner().invoke(app, [*command, "--json"]).output)
    steps = {step["name"]: step for step in as_json["steps"]}
    rows = {row["setting"]: row for row in steps["sft"]["settings"]}
    assert rows["training.epochs"]["from"] == "override" and rows["training.batch_size"] == {
        "setting": "training.batch_size",
        "value": 128,
        "from": "preset",
        "origin": "huang2024: H, hyperparameters of SFT",
    }
    assert "settings" not in steps["plain"]


@pytest.mark.parametrize("preset", ["ziegler2019", "stiennon2020", "instructgpt2022", "huang2024"])
def test_every_preset_runs(tmp_path: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch, preset: str) -> None:
    """The chain of a preset on a tiny model, cut down by overrides alone: batches, lengths and numbers of steps."""
    from stages.chain import run as chain
    from stages.process.runtime import Runtime

    texts = {"completion": "a joy", "chosen": "a joy", "rejected": "dull"}
    rows = [{"prompt": f"SUBREDDIT: r/film\n\nTITLE: {n}\n\nPOST: the film\n\nTL;DR:", **texts} for n in range(16)]
    data, corpus = tmp_path / "rows.jsonl", tmp_path / "corpus.txt"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus.write_text("the acting was warm and the film was a joy\n" * 60)
    table = {"train": str(data), "validation_fraction": 0.25}
    mix = {"pretraining_mix": {"data": str(corpus), "block_size": 16}}
    tuned = {"model": str(tiny_llama_folder), "data": table, "preset": preset, "precision": "fp32"}
    steps = [
        {"stage": "reward_model", "name": "rm", **tuned},
        {
            "stage": "ppo",
            "name": "ppo",
            "policy": str(tiny_llama_folder),
            "reward": [{"model": "rm"}],
            "data": str(data),
            "preset": preset,
            "precision": "fp32",
            **(mix if preset == "instructgpt2022" else {}),
        },
    ]
    overrides = [
        "rm.training.max_steps=1",
        "rm.training.batch_size=8",
        "ppo.rollout_batch_size=16",
        "ppo.total_episodes=16",
        "ppo.generation.max_new_tokens=8",
        "ppo.generation.stop_after=2",
    ]
    if preset == "ziegler2019":
        overrides += ["rm.normalization.num_samples=8", "rm.normalization.generation.max_new_tokens=4", 'ppo.generation.stop=["a"]']
    else:
        steps.insert(0, {"stage": "sft", "name": "sft", **tuned})
        overrides += ["sft.training.max_steps=1", "sft.training.batch_size=8"]
    if preset == "instructgpt2022":
        steps.insert(1, {"stage": "sft", "name": "init", **tuned, "preset": "instructgpt2022/init", **mix})
        overrides += [
            "init.training.max_steps=1",
            "init.training.batch_size=4",
            "ppo.max_prompt_tokens=100",
            "ppo.pretraining_mix.examples_per_episode=1",
        ]
    summary = chain.run(recipe(tmp_path, *steps, overrides=tuple(overrides)), tmp_path / "home", Runtime(quiet=True))
    assert summary["finished"] and [step["name"] for step in summary["steps"]] == [step["name"] for step in steps]
    ppo = summary["steps"][-1]["metrics"]
    assert ppo["optimizer_steps"] == {"instructgpt2022": 8}.get(preset, 4)  # one epoch of eight minibatches, or four of one


def test_a_message_says_which_settings_come_from_the_preset(tmp_path: Path) -> None:
    preset = "ziegler2019/tldr"
    name = next((name for name in PRESETS if name == preset), next(name for name in PRESETS if name.startswith("ziegler2019")))
    with pytest.raises(RecipeError, match="value=shared.*requires? advantages: gae") as caught:
        configured(tmp_path, "ppo", name, advantages="rloo", samples_per_prompt=4)
    assert f"value comes from preset: {name}; to do without, write the default into the step (value: null)" in str(caught.value)
    with pytest.raises(RecipeError) as caught:  # the recipe itself sets the value
        configured(tmp_path, "ppo", name, advantages="rloo", samples_per_prompt=4, value="shared")
    assert "preset" not in str(caught.value).partition(": ")[2].replace(name, "")
