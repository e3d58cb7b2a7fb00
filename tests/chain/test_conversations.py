"""Conversations of several turns in SFT, reward model, PPO and evaluation: each stage reads the text that the chat template renders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stages.cli import app

TEMPLATE = (  # like Gemma's: the turn end is not the end token, and replies are trimmed
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
STEP = {"precision": "fp32", "training": {"max_steps": 1, "batch_size": 4, "microbatch_size": 4}}


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def opening(number: int) -> list[dict[str, str]]:
    answered = [turn("user", f"hello {number}"), turn("assistant", " the sun is warm ")]
    return [turn("system", "be kind"), *answered, turn("user", "how are you?")]


SHOWN = (
    "<s><start_of_turn>system\nbe kind<end_of_turn>\n<start_of_turn>user\nhello {}<end_of_turn>\n<start_of_turn>model\nthe sun is warm"
    "<end_of_turn>\n<start_of_turn>user\nhow are you?<end_of_turn>\n<start_of_turn>model\n"
)


@pytest.fixture
def folder(tmp_path: Path, tokenizer_of: Any) -> Path:
    """A recipe of the four stages, its data and a random model of 300 thousand weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer_of("byte_bpe")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
        )
    ).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = {
        "chats": [{"messages": [*opening(number), turn("assistant", "i am fine")]} for number in range(8)],
        "pairs": [
            {"chosen": [*opening(number), turn("assistant", "i am fine")], "rejected": [*opening(number), turn("assistant", "no")]}
            for number in range(8)
        ],
        "prompts": [{"prompt": opening(number)} for number in range(4)],
    }
    for name, table in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    generation = {"max_new_tokens": 4}
    steps = [
        {**STEP, "stage": "sft", "name": "sft", "model": "./model", "data": {"train": "chats.jsonl"}},
        {**STEP, "stage": "reward_model", "name": "preference", "model": "sft", "data": {"train": "pairs.jsonl"}},
        {
            "stage": "ppo",
            "name": "aligned",
            "precision": "fp32",
            "policy": "sft",
            "data": "prompts.jsonl",
            "reward": [{"model": "preference"}],
            "generation": generation,
            "total_episodes": 4,
            "rollout_batch_size": 4,
            "minibatch_size": 4,
            "microbatch_size": 4,
        },
        {
            "stage": "evaluation",
            "name": "verdict",
            "precision": "fp32",
            "candidates": {"aligned": "aligned"},
            "data": "prompts.jsonl",
            "judges": [{"model": "preference", "name": "preference"}],
            "generation": generation,
        },
    ]
    (tmp_path / "chain.yaml").write_text(json.dumps({"name": "chats", "steps": steps}))
    return tmp_path


def test_every_stage_reads_what_the_template_writes(folder, monkeypatch) -> None:
    import stages.reward_model.training as reward_model
    import stages.rewards.learned as learned
    import stages.sampling.sampler as sampler
    import stages.sft.run as sft
    from stages.models.loading import load_tokenizer

    seen: dict[str, list[Any]] = {"sft": [], "reward_model": [], "sampled": [], "scored": [], "stop": []}

    def spy(module: Any, name: str, note: Any) -> None:
        real = getattr(module, name)

        def called(*arguments: Any, **named: Any) -> Any:
            note(*arguments, **named)
            return real(*arguments, **named)

        monkeypatch.setattr(module, name, called)

    def note_sample(model: Any, prompts: Any, settings: Any, **named: Any) -> None:
        seen["sampled"] += prompts
        seen["stop"].append(named["stop_ids"])

    spy(sft, "make_trainer", lambda config, context, model, tokenizer, rows, max_length: seen["sft"].extend(rows))
    spy(reward_model, "make_trainer", lambda model, arguments, rows, *rest: seen["reward_model"].extend(rows))
    spy(sampler, "generate", note_sample)
    spy(learned, "score_rows", lambda rows, *rest, **named: seen["scored"].extend(rows))
    done = CliRunner().invoke(app, ["run", str(folder / "chain.yaml"), "--home", str(folder / "home")])
    assert done.exit_code == 0, done.output
    tokenizer = load_tokenizer(str(folder / "model"))
    text = tokenizer.decode

    # SFT: both replies train, each with its turn end; the rest of the row is read and does not train.
    rows = seen["sft"]
    assert {text(row.ids) for row in rows} <= {SHOWN.format(number) + "i am fine<end_of_turn>\n" for number in range(8)}
    for row in rows:
        trained = text([token for token, counts in zip(row.ids, row.counted(True), strict=True) if counts])
        assert trained == "the sun is warm<end_of_turn>\ni am fine<end_of_turn>\n"

    # Reward model: both complete conversations.
    sides = {tuple(text(ids) for ids in row.rows) for row in seen["reward_model"]}
    endings = [tuple(SHOWN.format(number) + f"{reply}<end_of_turn>\n" for reply in ("i am fine", "no")) for number in range(8)]
    assert sides and sides <= set(endings)

    # PPO and evaluation: the policy is shown the conversation up to its turn, and stops at the turn end; the judge reads both.
    shown = {SHOWN.format(number) for number in range(4)}
    assert {text(ids) for ids in seen["sampled"]} == shown and len(seen["sampled"]) == 8
    ends = {tokenizer.convert_tokens_to_ids("<end_of_turn>"), tokenizer.eos_token_id}
    assert all(ends <= set(stop) for stop in seen["stop"])
    assert done.output.count("LlamaForCausalLM: replaced layers: ") == 1  # although four steps load this model
    completions = [json.loads(line) for path in folder.rglob("completions.jsonl") for line in path.read_text().splitlines()]
    replies = {reply for line in completions for reply in line["completions"].values()}
    scored = [text(ids) for ids in seen["scored"]]
    judged = {SHOWN.format(number) + f"{reply}<end_of_turn>\n" for number in range(4) for reply in replies}
    assert len([row for row in scored if row in judged]) >= 4
    assert all(row.startswith(tuple(SHOWN.format(number) for number in range(8))) and row.endswith("<end_of_turn>\n") for row in scored)
    assert completions[0]["prompt"] == opening(0)


def test_role_that_the_template_refuses_gives_one_message_before_a_model_is_loaded(folder, monkeypatch) -> None:
    import stages.models.loading as loading

    tokenizer_file = next(path for path in (folder / "model").iterdir() if path.name == "chat_template.jinja")
    tokenizer_file.write_text("{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + TEMPLATE)
    loaded: list[str] = []
    monkeypatch.setattr(loading, "_from_pretrained", lambda *arguments, **named: loaded.append("a model"))
    chain = json.loads((folder / "chain.yaml").read_text())
    alone = [{**step, **{key: "./model" for key in ("model", "policy") if key in step}} for step in chain["steps"]]
    alone[2]["reward"] = [{"function": "stages.corpora.world.gold:score_batch", "name": "gold"}]
    alone[2]["value"] = "policy"
    alone[3] |= {"candidates": {"aligned": "./model"}, "judges": alone[2]["reward"]}
    alone.append({**STEP, "stage": "dpo", "name": "direct", "model": "./model", "data": {"train": "pairs.jsonl"}})
    for step in alone:
        (folder / "one.yaml").write_text(json.dumps({"name": "one", "steps": [step]}))
        done = CliRunner().invoke(app, ["run", str(folder / "one.yaml"), "--home", str(folder / "home")])
        assert done.exit_code == 2 and not loaded, (step["stage"], done.output)
        message = " ".join(done.stderr.split())
        assert "jsonl:1: the model's chat template rejects the conversation (system, user" in message and "no system turns" in message


def test_plan_refuses_a_role_that_the_template_of_a_later_step_refuses(folder) -> None:
    """The prompts of the last step are refused before the first one trains."""
    from stages.chain.planning import plan
    from stages.errors import DataError
    from stages.recipe.schema import load_recipe

    (folder / "model" / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + TEMPLATE
    )
    chain = json.loads((folder / "chain.yaml").read_text())
    for name in ("chats", "pairs"):  # rows that this template accepts: one turn each
        row = json.dumps({"prompt": "hello", "completion": "fine", "chosen": "fine", "rejected": "no"}) + "\n"
        (folder / f"{name}.jsonl").write_text(row * 8)
    evaluated = [*chain["steps"][:2], chain["steps"][3] | {"candidates": {"a": "sft"}}]
    for steps, step in ((chain["steps"][:3], "aligned"), (evaluated, "verdict")):
        (folder / "chain.yaml").write_text(json.dumps({"name": "chats", "steps": steps}))
        with pytest.raises(
            DataError, match=rf"\({step}\): (policy|candidates.a): this model cannot read .*prompts.jsonl:1: .*no system turns"
        ):
            plan(load_recipe(folder / "chain.yaml"), folder / "home")


def test_the_plan_checks_the_data_again_after_the_template_of_a_local_model_changed(folder) -> None:
    from stages.chain.planning import plan
    from stages.errors import DataError
    from stages.recipe.schema import load_recipe

    chain = json.loads((folder / "chain.yaml").read_text())
    (folder / "chats.jsonl").write_text((json.dumps({"prompt": "hello", "completion": "fine"}) + "\n") * 8)  # every template accepts these
    (folder / "chain.yaml").write_text(json.dumps({"name": "chats", "steps": chain["steps"][:2]}))
    (folder / "home").mkdir()
    plan(load_recipe(folder / "chain.yaml"), folder / "home")
    (folder / "model" / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + TEMPLATE
    )
    with pytest.raises(DataError, match=r"\(preference\): model: this model cannot read .*pairs.jsonl:1: .*no system turns"):
        plan(load_recipe(folder / "chain.yaml"), folder / "home")


THOUGHTFUL = "{{ '[think]' if thinking else '[answer]' }}" + TEMPLATE


def test_template_arguments_are_kept_by_every_model_that_is_made_from_theirs(folder, caplog) -> None:
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(folder / "model")
    plain.chat_template = THOUGHTFUL
    plain.save_pretrained(folder / "model")
    recipe = json.loads((folder / "chain.yaml").read_text())
    sft, preference, ppo, verdict = recipe["steps"]
    sft["model"] = {"ref": "./model", "template_arguments": {"thinking": True}}
    verdict["candidates"] = {"base": "./model", "aligned": "aligned"}
    (folder / "chain.yaml").write_text(json.dumps(recipe))
    command = ["run", str(folder / "chain.yaml"), "--home", str(folder / "home")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    expected = plain.apply_chat_template(opening(1), tokenize=False, add_generation_prompt=True, thinking=True)
    assert expected == "[think]" + SHOWN.format(1)
    models = folder / "home" / "registry" / "models" / "chats"
    for name in ("sft", "preference", "aligned"):
        published = AutoTokenizer.from_pretrained(models / name / "1" / "model")
        assert published.apply_chat_template(opening(1), tokenize=False, add_generation_prompt=True) == expected
    (parent,) = json.loads((models / "sft" / "1" / "manifest.json").read_text())["parents"]
    assert parent["template_arguments"] == {"thinking": True}
    different = "{} reads conversations with template_arguments {}, and {} with {}: they read different texts"
    assert different.format("./model", "none", "aligned", "{'thinking': True}") in caplog.text  # the base candidate has no arguments
    assert "sft reads" not in caplog.text  # policy and reward model have the same

    preference["model"] = "./model"  # a reward model that reads other texts than the policy
    recipe["steps"] = [sft, preference, ppo]
    (folder / "chain.yaml").write_text(json.dumps(recipe))
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert different.format("sft", "{'thinking': True}", "preference", "none") in caplog.text

    sft["model"]["template_arguments"] = {"thinkin": True}
    (folder / "chain.yaml").write_text(json.dumps(recipe))
    done = CliRunner().invoke(app, ["plan", *command[1:]])
    assert done.exit_code == 2
    assert "(sft): model: template_arguments of ./model: the chat template does not use thinkin; it uses thinking" in " ".join(
        done.output.split()
    )
