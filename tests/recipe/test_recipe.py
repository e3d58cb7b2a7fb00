"""Recipes: the meaning of valid ones, and one clear message for each kind of invalid one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, model_validator

from stages.config import DataInput, DataSource, ModelField, ModelInput, OptimizerSettings, StepConfig, Strict, TrainingStepConfig
from stages.errors import DataError, RecipeError
from stages.recipe.schema import STAGES, Recipe, Stage, load_recipe
from stages.recipe.source import parse_path, show
from stages.recipe.validation import PATTERNS
from stages.registry.ledger import Registry

REPOSITORY = Path(__file__).resolve().parents[2]


class TrainConfig(TrainingStepConfig):
    """A small training stage."""

    stage: Literal["train"] = "train"
    model: ModelField | None = None
    data: DataInput
    training: OptimizerSettings = OptimizerSettings(learning_rate=1e-3)
    packing: bool = False
    labels: list[str] = []

    def model_inputs(self) -> dict[str, ModelInput]:
        return {"model": self.model} if self.model is not None else {}

    def data_inputs(self) -> dict[str, list[DataSource]]:
        return {"data.train": self.data.train}

    def check_data(self) -> None:
        if self.data.train[0].path.endswith("empty.txt"):
            raise DataError(f"{self.data.train[0].path}: no rows")


class RewardBlock(Strict):
    model: ModelField | None = None
    weight: float = Field(1.0, description="Multiplies the score.")

    @model_validator(mode="after")
    def _has_a_source(self) -> RewardBlock:
        if self.model is None:
            raise ValueError("name a model to score with")
        return self


class SteerConfig(StepConfig):
    """A stage with a list of models."""

    stage: Literal["steer"] = "steer"
    policy: ModelField
    reward: list[RewardBlock] = Field(min_length=1)

    def model_inputs(self) -> dict[str, ModelInput]:
        rewards = {f"reward[{index}].model": block.model for index, block in enumerate(self.reward) if block.model is not None}
        return {"policy": self.policy, **rewards}


class JudgeConfig(StepConfig):
    """A stage that makes no model."""

    stage: Literal["judge"] = "judge"
    candidates: dict[str, ModelField]

    def model_inputs(self) -> dict[str, ModelInput]:
        return {f"candidates.{name}": model for name, model in self.candidates.items()}


GOOD = """\
name: quick
seed: 7
steps:
  - {stage: train, name: base, data: {train: "world:raw"}}
  - stage: train
    name: sft
    model: base
    data:
      train: texts.txt
    training:
      learning_rate: 1e-4
      epochs: 2
  - stage: steer
    name: aligned
    policy: sft
    reward:
      - {model: base, weight: 1.0}
      - model: sft
        weight: 0.3
  - stage: judge
    name: verdict
    candidates: {base: base, aligned: aligned}
"""


@pytest.fixture(autouse=True)
def stages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, config in (("train", "TrainConfig"), ("steer", "SteerConfig"), ("judge", "JudgeConfig")):
        monkeypatch.setitem(STAGES, name, Stage(f"{__name__}:{config}", "", makes_model=name != "judge"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "texts.txt").write_text("some text\n")


def load(text: str, *overrides: str, registry: Registry | None = None) -> Recipe:
    Path("recipes/x.yaml").write_text(text)
    return load_recipe("recipes/x.yaml", overrides, registry)


def changed(old: str, new: str) -> str:
    assert old in GOOD, old
    return GOOD.replace(old, new, 1)


def test_good_recipe_is_read_completely(tmp_path: Path) -> None:
    recipe = load(GOOD)
    assert (recipe.name, recipe.seed, [step.name for step in recipe.steps]) == ("quick", 7, ["base", "sft", "aligned", "verdict"])
    sft, aligned = recipe.steps[1], recipe.steps[2]
    assert sft.config.training.learning_rate == 1e-4  # YAML 1.2 reads 1e-4 as a number
    assert sft.seed == 7
    assert sft.config.data.train[0].path == str(tmp_path / "recipes" / "texts.txt")
    assert recipe.steps[0].config.data.train[0].path == "world:raw"
    kinds = {field_path: (model.kind, model.target) for field_path, model in aligned.models.items()}
    assert kinds == {"policy": ("step", "sft"), "reward[0].model": ("step", "base"), "reward[1].model": ("step", "sft")}
    assert recipe.model_name(sft) == "quick/sft"


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("seed=8", lambda recipe: recipe.steps[1].seed, 8),
        ("name=other", lambda recipe: recipe.name, "other"),
        ("sft.seed=3", lambda recipe: recipe.steps[1].seed, 3),
        ("sft.training.learning_rate=1e-2", lambda recipe: recipe.steps[1].config.training.learning_rate, 0.01),
        ("base.training.epochs=3", lambda recipe: recipe.steps[0].config.training.epochs, 3),
        ("aligned.reward[1].weight=0.5", lambda recipe: recipe.steps[2].config.reward[1].weight, 0.5),
        ("steps[2].reward[1].weight=0.5", lambda recipe: recipe.steps[2].config.reward[1].weight, 0.5),
        ("sft.labels=[a, b]", lambda recipe: recipe.steps[1].config.labels, ["a", "b"]),
        ("sft.lora={r: 4}", lambda recipe: recipe.steps[1].config.lora.r, 4),
        ("sft.lora.r=4", lambda recipe: recipe.steps[1].config.lora.r, 4),
        ("sft.packing=true", lambda recipe: recipe.steps[1].config.packing, True),
        ("sft.training.max_grad_norm=null", lambda recipe: recipe.steps[1].config.training.max_grad_norm, None),
        ("aligned.policy=base", lambda recipe: recipe.steps[2].models["policy"].target, "base"),
        ("aligned.policy.quantization=nf4", lambda recipe: recipe.steps[2].config.policy.quantization, "nf4"),
        ("sft.data.train.limit=10", lambda recipe: recipe.steps[1].config.data.train[0].limit, 10),
        ("sft.data.train.revision=v1", lambda recipe: recipe.steps[1].config.data.train[0].revision, "v1"),
        ("sft.data.train[0].revision=v1", lambda recipe: recipe.steps[1].config.data.train[0].revision, "v1"),
        ("aligned.policy.revision=v1", lambda recipe: recipe.steps[2].config.policy.revision, "v1"),
        ("sft.data.train[0].limit=10", lambda recipe: recipe.steps[1].config.data.train[0].limit, 10),
        (
            "aligned.reward+={model: sft, weight: 2}",
            lambda recipe: [item.weight for item in recipe.steps[2].config.reward],
            [1.0, 0.3, 2.0],
        ),
        ("aligned.reward += [{model: sft}]", lambda recipe: [item.weight for item in recipe.steps[2].config.reward], [1.0, 0.3, 1.0]),
        (
            "base.data.train+=world:more",
            lambda recipe: [item.path for item in recipe.steps[0].config.data.train],
            ["world:raw", "world:more"],
        ),
    ],
)
def test_an_override_sets_one_field(override: str, read: object, expected: object) -> None:
    assert callable(read)
    assert read(load(GOOD, override)) == expected


def test_later_overrides_win() -> None:
    recipe = load(GOOD, "sft.training={epochs: 5}", "sft.training.epochs=6")
    assert recipe.steps[1].config.training.epochs == 6


WRONG = [
    ("nome: quick\n" + GOOD, "recipes/x.yaml:1: nome: unknown field 'nome'; did you mean 'name'?"),
    (changed("model: base", "modell: base"), "recipes/x.yaml:7: steps[1].modell: unknown field 'modell'; did you mean 'model'?"),
    (changed("epochs: 2", "epoch: 2"), "recipes/x.yaml:12: steps[1].training.epoch: unknown field 'epoch'; did you mean 'epochs'?"),
    (changed("weight: 0.3", "wait: 0.3"), "recipes/x.yaml:19: steps[2].reward[1].wait: unknown field 'wait'; did you mean 'weight'?"),
    (
        changed("model: sft", "model: {reff: sft}"),
        "recipes/x.yaml:18: steps[2].reward[1].model.ref: this field is missing. ref: Step name, registry reference",
    ),
    (
        changed("1e-4", "abc"),
        "recipes/x.yaml:11: steps[1].training.learning_rate: got 'abc', expected a number. learning_rate: Peak learning rate.",
    ),
    (changed("1e-4", "'1e-4'"), "recipes/x.yaml:11: steps[1].training.learning_rate: got '1e-4', expected a number."),
    (changed("1e-4", "-1.0"), "recipes/x.yaml:11: steps[1].training.learning_rate: got -1.0, expected a number above 0"),
    (changed("1e-4", ".nan"), "recipes/x.yaml:11: steps[1].training.learning_rate: got nan, expected a finite number"),
    (changed("epochs: 2", "batch_size: 2.5"), "recipes/x.yaml:12: steps[1].training.batch_size: got 2.5, expected a whole number"),
    (
        changed("epochs: 2", "schedule: cosinus"),
        "recipes/x.yaml:12: steps[1].training.schedule: got 'cosinus', expected one of 'constant', 'linear' or 'cosine'",
    ),
    (
        changed("learning_rate: 1e-4\n      epochs: 2", "batch_size: 9\n      microbatch_size: 4"),
        "recipes/x.yaml:10: steps[1].training: batch_size=9 must be a multiple of microbatch_size=4",
    ),
    (
        changed("learning_rate: 1e-4\n      epochs: 2", "microbatch_size: 5"),
        "recipes/x.yaml:10: steps[1].training: batch_size=32 (the default) must be a multiple of microbatch_size=5",
    ),
    (changed("model: base", "packing: 1"), "recipes/x.yaml:7: steps[1].packing: got 1, expected true or false"),
    (changed("seed: 7", "seed: seven"), "recipes/x.yaml:2: seed: got 'seven', expected a whole number"),
    (changed("seed: 7", "seed: true"), "recipes/x.yaml:2: seed: got True, expected a whole number"),
    (changed("name: quick", "name: ../quick"), "recipes/x.yaml:1: name: got '../quick', expected letters, digits"),
    (changed("name: sft", "name: base"), "recipes/x.yaml:6: steps[1].name: got 'base', which is already the name of steps[0]"),
    (changed("name: sft", "name: seed"), "recipes/x.yaml:6: steps[1].name: got 'seed', a field of the recipe itself"),
    (changed("name: sft", "name: '7'"), "recipes/x.yaml:6: steps[1].name: 'quick/7' is not a model name"),
    (changed("stage: steer", "stage: ster"), "recipes/x.yaml:13: steps[2].stage: got 'ster', which is not a stage; did you mean 'steer'?"),
    (changed("  - stage: steer\n    name", "  - name"), "recipes/x.yaml:13: steps[2]: the field stage is missing"),
    (changed("policy: sft", "policy: stf"), "recipes/x.yaml:15: steps[2].policy: got 'stf', which is not an earlier step"),
    (changed("policy: sft", "policy: bases"), "recipes/x.yaml:15: steps[2].policy: got 'bases', which is not an earlier step, folder"),
    (
        changed("model: base\n", "model: aligned\n"),
        "recipes/x.yaml:7: steps[1].model: got 'aligned', a cycle: sft -> aligned -> sft",
    ),
    (
        changed('data: {train: "world:raw"}', 'model: sft, data: {train: "world:raw"}').replace("    model: base\n", ""),
        "recipes/x.yaml:4: steps[0].model: got 'sft', a later step (steps[1]); move it before 'base'",
    ),
    (changed("model: base\n", "model: sft\n"), "recipes/x.yaml:7: steps[1].model: got 'sft', a cycle: the step 'sft' refers to itself"),
    (
        GOOD + "  - {stage: judge, name: again, candidates: {a: verdict}}\n",
        "recipes/x.yaml:23: steps[4].candidates.a: got 'verdict', a step of stage 'judge', which makes no model",
    ),
    (changed("policy: sft", "policy: ./nowhere"), "recipes/x.yaml:15: steps[2].policy: got './nowhere', a folder that does not exist"),
    (changed("policy: sft", "policy: ./recipes"), "recipes/x.yaml:15: steps[2].policy: got './recipes', a folder without config.json"),
    (changed("texts.txt", "text.txt"), "recipes/x.yaml:9: steps[1].data.train[0]: got 'text.txt', a file that does not exist"),
    (changed("texts.txt", "recipes/reviews.csv"), "steps[1].data.train[0]: got 'recipes/reviews.csv', a file that does not exist"),
    (changed("texts.txt", "hub:a b"), "recipes/x.yaml:9: steps[1].data.train[0]: got 'hub:a b', expected hub:owner/name"),
    (changed("policy: sft", "policy: hub:a b"), "recipes/x.yaml:15: steps[2].policy: got 'hub:a b', expected hub:owner/name"),
    (changed("{model: base, weight: 1.0}", "{weight: 1.0}"), "recipes/x.yaml:17: steps[2].reward[0]: name a model to score with"),
    (changed("{base: base, aligned: aligned}", "base"), "steps[3].candidates: got 'base', expected a block of fields"),
    (changed("name: quick\n", "name: quick\nname: again\n"), "recipes/x.yaml:2: column 1: not readable as YAML: found duplicate key"),
    (changed("seed: 7", "seed: [7"), "not readable as YAML"),
    (changed("seed: 7", "seed: !!python/object/apply:os.system [id]"), "the tag tag:yaml.org,2002:python/object/apply:os.system"),
    (changed("seed: 7", "7: seed"), "the key 7 is not text"),
    ("- just\n- a list\n", "recipes/x.yaml: expected a block with the fields name and steps"),
    ("name: quick\n", "recipes/x.yaml:1: the field steps is missing"),
    ("name: quick\nsteps: []\n", "recipes/x.yaml:2: steps: got [], expected a list of at least one step"),
    ("steps:\n  - {stage: judge, name: a, candidates: {}}\n", "name: this field is missing. name: Name of the recipe"),
]


@pytest.mark.parametrize(("text", "message"), WRONG, ids=[message[-60:] for _, message in WRONG])
def test_a_wrong_recipe_gets_one_clear_message(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(text)
    assert message in str(caught.value)
    assert str(caught.value).startswith("recipes/x.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sft.training.learning_rate=abc", "=abc': steps[1].training.learning_rate: got 'abc', expected"),
        ("sft.training.epoch=2", "epoch=2': steps[1].training.epoch: unknown field 'epoch'; did you mean 'epochs'?"),
        ("stf.training.epochs=2", "override 'stf.training.epochs=2': the recipe has no step 'stf'; did you mean 'sft'?"),
        ("sft=2", "'sft' is a step; add the field to set"),
        ("sft.training.epochs", "expected step.field=value"),
        ("aligned.reward[2].weight=1", "steps[2].reward has 2 items; there is no item [2]"),
        ("aligned.reward[2].weight=1", "Count from [0]; += adds an item"),
        ("sft.training.epochs+=1", "steps[1].training.epochs is 2, not a list; += adds to a list, and = replaces a value"),
        ("sft.training+=1", "not a list; += adds to a list"),
        ("sft.labels+=a", "the recipe does not write steps[1].labels, so += has no list to add to; write the complete list with ="),
        ("sft.training[0]=1", "steps[1].training is not a list"),
        ("sft.training.epochs.more=1", "steps[1].training.epochs is 2, not a block of fields"),
        ("sft.training=[1", "override 'sft.training=[1': value:1"),
        ("aligned.policy=stf", "override 'aligned.policy=stf': steps[2].policy: got 'stf', which is not an earlier step"),
        ("sft.data.train=nowhere.jsonl", "override 'sft.data.train=nowhere.jsonl': steps[1].data.train[0]: got 'nowhere.jsonl', a file"),
        ("..=1", "is not a field path"),
        ("seed=!!python/name:os.system", "is not allowed"),
    ],
)
def test_an_override_that_is_wrong_is_named(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(GOOD, override)
    assert str(caught.value).startswith(f"override {override!r}")
    assert message in str(caught.value)


def test_missing_recipe_lists_recipes_nearby() -> None:
    load(GOOD)
    with pytest.raises(RecipeError, match=re.escape("did you mean 'recipes/x.yaml'?")):
        load_recipe("recipes/y.yaml")


def test_an_included_recipe_is_suggested_next_to_those_of_the_folder() -> None:
    for number in range(12):
        Path(f"mine{number:02}.yaml").write_text(GOOD)
    with pytest.raises(RecipeError, match=re.escape("quikstart: no such recipe; did you mean 'quickstart'?")):
        load_recipe("quikstart")
    with pytest.raises(RecipeError, match=r"known: mine00.yaml, .*, mine07.yaml and 4 more; included: assistant, "):
        load_recipe("zzz")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("text.txt", "(looked for {cwd}/text.txt and {cwd}/recipes/text.txt); did you mean 'texts.txt'?"),
        ("{cwd}/recipes/text.txt", "(looked for {cwd}/recipes/text.txt); did you mean '{cwd}/recipes/texts.txt'?"),
        ("$DATA/x.txt", "; a recipe does not replace environment variables"),
        ("far.jsonl", "; expected a file, a folder, a Hub id or world:PART"),
    ],
)
def test_a_missing_data_file_is_named_with_the_next_move(written: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load(changed("texts.txt", written.format(cwd=tmp_path)))
    assert message.format(cwd=tmp_path) in str(caught.value)


def test_a_stage_in_upper_case_is_suggested() -> None:
    with pytest.raises(RecipeError, match=re.escape("got 'STEER', which is not a stage; did you mean 'steer'?")):
        load(changed("stage: steer", "stage: STEER"))


def test_every_pattern_of_a_field_has_its_own_expectation() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "stages").rglob("*config.py"))
    used = set(re.findall(r'pattern=r"([^"]+)"', sources))
    assert len(used) > 4 and used <= set(PATTERNS)


def test_references_resolve_in_the_documented_order(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    record = registry.publish("other/model", lambda folder: (folder / "config.json").write_text("{}") and None, role="language_model")
    (tmp_path / "recipes" / "mine").mkdir()
    (tmp_path / "recipes" / "mine" / "config.json").write_text("{}")
    for ref, kind, target in (
        ("base", "step", "base"),
        ("quick/base", "step", "base"),
        ("mine", "folder", str(tmp_path / "recipes" / "mine")),
        ("other/model", "registry", "other/model@1"),
        ("other/model@1", "registry", "other/model@1"),
        (record.digest[:20], "registry", "other/model@1"),
        ("gpt2", "hub", "gpt2"),
        ("distilbert/distilbert-base-uncased", "hub", "distilbert/distilbert-base-uncased"),
    ):
        model = load(GOOD, f"aligned.policy={ref}", registry=registry).steps[2].models["policy"]
        assert (model.kind, model.target) == (kind, target), ref
    with pytest.raises(RecipeError, match="has no version 2"):
        load(GOOD, "aligned.policy=other/model@2", registry=registry)


def test_a_name_that_is_only_similar_to_a_local_one_is_a_hub_id(tmp_path: Path) -> None:
    """A name that is only similar to a step, version or folder is a Hub id. If the Hub lacks it, the advice names the similar one."""
    registry = Registry(tmp_path / "registry")
    registry.publish("other/model", lambda folder: (folder / "config.json").write_text("{}") and None, role="language_model")
    (tmp_path / "recipes" / "texts" / "mine").mkdir(parents=True)
    for ref, target, advice in (
        ("quick/sff", "quick/sff", "did you mean 'quick/sft'?"),
        ("quick/other", "quick/other", None),
        ("other/modle", "other/modle", "did you mean 'other/model'?"),
        ("texts/mine", "texts/mine", f"the folder {tmp_path / 'recipes' / 'texts' / 'mine'} has that name but no config.json"),
        ("sft-1", "sft-1", "did you mean 'sft'?"),
        ("hub:quick/sft", "quick/sft", None),
        ("hub:other/model", "other/model", None),
    ):
        model = load(GOOD, f"aligned.policy={ref}", registry=registry).steps[2].models["policy"]
        assert (model.kind, model.target, model.advice) == ("hub", target, advice), ref
    for path in ("texts/tldr", "hub:texts/mine", "hub:recipes"):
        assert load(GOOD, f"sft.data.train={path}").steps[1].config.data.train[0].path == path
    assert load(GOOD, "sft.data.train=texts/mine").steps[1].config.data.train[0].path == str(tmp_path / "recipes" / "texts" / "mine")


def test_data_is_searched_first_in_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("nearer\n")
    assert load(GOOD).steps[1].config.data.train[0].path == str(tmp_path / "texts.txt")
    assert load(GOOD, "sft.data.train=stanfordnlp/imdb").steps[1].config.data.train[0].path == "stanfordnlp/imdb"


def test_data_error_names_the_field_path() -> None:
    Path("empty.txt").write_text("")
    recipe = load(GOOD, "sft.data.train=empty.txt")
    with pytest.raises(DataError, match=r"^override 'sft.data.train=empty.txt': steps\[1\] \(sft\): .*empty.txt: no rows"):
        recipe.check_data(recipe.steps[1])
    recipe = load(changed("texts.txt", "empty.txt"), "sft.seed=1")
    with pytest.raises(DataError, match=r"^recipes/x.yaml:5: steps\[1\] \(sft\): .*empty.txt: no rows"):
        recipe.check_data(recipe.steps[1])


def test_nested_yaml_aliases_are_refused() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 9))
    with pytest.raises(RecipeError, match="more than 100000 values"):
        load(bomb + GOOD)


@pytest.mark.parametrize("path", [("a",), ("steps", 1, "training", "learning_rate"), ("reward", 0, "model"), ("a", 0, 1)])
def test_field_paths_are_printed_and_parsed_in_the_same_form(path: tuple[str | int, ...]) -> None:
    assert parse_path(show(path)) == path


def test_reading_recipes_does_not_import_torch() -> None:
    code = "import sys, stages.chain.run, stages.cli; print([name for name in ('torch', 'trl', 'datasets') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert run.stdout == "[]\n"


def test_field_path_can_name_a_key_with_dots() -> None:
    from stages.recipe.source import value_at

    value = {"candidates": {"a-2.8b": {"model": "m"}, "a-2": {"8b": "other"}}, "judges": [{"label": 1}]}
    assert value_at(value, "candidates.a-2.8b.model") == "m"
    assert value_at(value, "candidates.a-2") == {"8b": "other"}
    assert value_at(value, "judges[0].label") == 1
    assert [value_at(value, path) for path in ("judges[1].label", "candidates.b.model", "data.train")] == [None, None, None]
