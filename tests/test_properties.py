"""Any content of a recipe, a reference or a registry gives a result or one of our messages, and never damages the registry."""

from __future__ import annotations

import json
import string
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from stages.config import ModelInput
from stages.errors import RecipeError, RegistryError, StagesError
from stages.recipe.schema import find_model, load_recipe
from stages.recipe.source import parse_path, show
from stages.registry.contents import digest_folder
from stages.registry.ledger import Registry
from stages.registry.names import DIGEST, NAME, REFERENCE, check_name
from stages.registry.references import ResolvedModel

QUICK = settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# Recipes

BASE: dict[str, Any] = {
    "name": "some",
    "seed": 3,
    "steps": [
        {"stage": "pretraining", "name": "base", "architecture": {"type": "llama"}, "data": {"train": "world:raw"}},
        {"stage": "sft", "name": "sft", "model": "base", "data": {"train": "world:demonstrations"}, "training": {"epochs": 2}},
        {"stage": "reward_model", "name": "preference", "model": "sft", "data": {"train": "world:comparisons"}},
        {"stage": "ppo", "name": "aligned", "policy": "sft", "reward": [{"model": "preference"}], "data": "world:prompts"},
    ],
}
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["base", "sft", "aligned", "../x", "/etc", "world:raw", "sha256:00", "a@1", "a@0", "~", ".", ""])
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6
)
KEYS = st.sampled_from(
    ["name", "stage", "model", "data", "training", "lora", "seed", "reward", "template", "steps", "precision", "nothing"]
)


def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every path in a recipe."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(path_found for key, item in below for path_found in places(item, (*path, key)))]


def put(recipe: dict[str, Any], path: tuple[str | int, ...], value: Any) -> Any:
    copy = json.loads(json.dumps(recipe))
    if not path:
        return value
    node = copy
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return copy


@QUICK
@given(path=st.sampled_from(places(BASE)), key=st.none() | KEYS, value=VALUES)
def test_recipe_with_any_value_at_any_path_is_read_or_refused_in_one_line(tmp_path: Path, path: Any, key: str | None, value: Any) -> None:
    changed_path = path if key is None else (*path, key)
    try:
        changed = put(BASE, changed_path, value)
    except (TypeError, KeyError, IndexError):
        return  # no such path
    file = tmp_path / "some.yaml"
    file.write_text(json.dumps(changed, ensure_ascii=True), encoding="utf-8")  # JSON is YAML
    try:
        recipe = load_recipe(file, registry=Registry(tmp_path / "registry"))
    except RecipeError as error:
        assert str(error).startswith(str(file)) and len(str(error).splitlines()) == 1, str(error)
    else:
        assert [step.index for step in recipe.steps] == list(range(len(recipe.steps)))
        for step in recipe.steps:
            check_name(recipe.model_name(step))


@QUICK
@given(text=st.text(max_size=200))
def test_any_text_is_a_recipe_or_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "some.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(RecipeError):
        load_recipe(file)


@QUICK
@given(
    text=st.text(max_size=40)
    | st.builds("{}={}".format, st.text(max_size=20), st.text(max_size=20))
    | st.builds("{}.{}={}".format, st.sampled_from(["sft", "aligned", "seed", "steps[0]"]), KEYS, st.text(max_size=12))
)
def test_any_override_is_applied_or_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "some.yaml"
    file.write_text(json.dumps(BASE))
    try:
        load_recipe(file, [text], Registry(tmp_path / "registry"))
    except RecipeError as error:
        assert len(str(error).splitlines()) == 1, str(error)


NAMES = st.text(string.ascii_letters + "_", min_size=1, max_size=6)


@given(st.lists(NAMES | st.integers(0, 999), min_size=1, max_size=6))
def test_field_paths_are_printed_and_parsed_in_the_same_form(parts: list[str | int]) -> None:
    path = ("a", *parts)
    assert parse_path(show(path)) == path


# References


@QUICK
@given(ref=st.text(max_size=40) | st.from_regex(REFERENCE, fullmatch=True) | st.from_regex(DIGEST, fullmatch=True))
def test_any_reference_resolves_or_is_refused(tmp_path: Path, ref: str) -> None:
    registry = Registry(tmp_path / "registry")
    for look in (registry.get, lambda given: find_model(ModelInput(ref=given), registry, [tmp_path])):
        try:
            look(ref)
        except StagesError as error:
            assert str(error)


@QUICK
@given(name=st.text(max_size=30) | st.from_regex(NAME, fullmatch=True))
def test_valid_names_stay_inside_the_registry(tmp_path: Path, name: str) -> None:
    root = tmp_path / "models"
    try:
        check_name(name)
    except RegistryError:
        return
    folder = root / name
    assert folder.resolve().is_relative_to(root.resolve()) and folder.resolve() != root.resolve()
    assert all(not part.isdigit() for part in name.split("/"))  # otherwise it could be read as a version of another name


# Registry histories


class Histories(RuleBasedStateMachine):
    """Versions are published and removed. A second list in the test has the expected versions."""

    refs = Bundle("refs")
    names = st.sampled_from(["quick/base", "quick/sft", "other", "quick"])

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(prefix="histories-")
        self.registry = Registry(Path(self.folder.name, "registry"))
        self.ledger: dict[str, tuple[str, bytes]] = {}  # ref -> digest, weights
        self.last: dict[str, int] = {}  # name -> the highest version number so far
        self.bases: dict[str, str] = {}  # adapter's ref -> the digest of its base
        self.damaged: set[str] = set()

    def teardown(self) -> None:
        self.folder.cleanup()

    @initialize()
    def begin(self) -> None:
        assert self.registry.records() == []

    def _published(self, name: str, files: dict[str, bytes], base: str | None = None) -> str:
        def fill(folder: Path) -> None:
            for file, content in files.items():
                (folder / file).write_bytes(content)

        origin = None
        if base is not None:
            record = self.registry.get(base)
            origin = ResolvedModel(base, "registry", str(record.path), record.digest, ModelInput(ref=base), record)
        made = self.registry.publish(name, fill, role="language_model", base=origin, fingerprint=f"fingerprint of {name}")
        assert made.version == self.last.get(name, 0) + 1  # a version number is never used twice
        self.last[name] = made.version
        self.ledger[made.ref] = (made.digest, next(iter(files.values())))
        return made.ref

    @rule(target=refs, name=names, weights=st.binary(min_size=1, max_size=3))
    def publish(self, name: str, weights: bytes) -> str:
        return self._published(name, {"model.safetensors": weights, "config.json": b"{}"})

    @rule(target=refs, name=names, base=refs, weights=st.binary(min_size=1, max_size=2))
    def publish_an_adapter(self, name: str, base: str, weights: bytes) -> Any:
        if base not in self.ledger or base in self.damaged:
            return multiple()
        ref = self._published(name, {"adapter_model.safetensors": weights, "adapter_config.json": b"{}"}, base)
        self.bases[ref] = self.ledger[base][0]
        return ref

    @rule(name=names, error=st.sampled_from(["fill", "pickle", "empty", "role"]))
    def publish_what_is_refused(self, name: str, error: str) -> None:
        def fill(folder: Path) -> None:
            if error != "empty":
                (folder / ("weights.bin" if error == "pickle" else "model.safetensors")).write_bytes(b"x")
            if error == "fill":
                raise OSError(28, "No space left on device")

        with pytest.raises((OSError, RegistryError)):
            self.registry.publish(name, fill, role="nothing" if error == "role" else "language_model")

    @rule(ref=consumes(refs), force=st.booleans())
    def remove(self, ref: str, force: bool) -> None:
        if ref not in self.ledger:
            with pytest.raises(RegistryError):
                self.registry.remove(ref, force=force)
            return
        digest = self.ledger[ref][0]
        twins = [other for other, (known, _) in self.ledger.items() if known == digest and other != ref]
        standing = [other for other, base in self.bases.items() if base == digest and other in self.ledger]
        if standing and not twins and not force:
            with pytest.raises(RegistryError, match="is the base of"):
                self.registry.remove(ref)
            return
        self.registry.remove(ref, force=force)
        del self.ledger[ref]
        self.damaged.discard(ref)

    @rule(ref=refs)
    def damage(self, ref: str) -> None:
        if ref in self.ledger:
            record = self.registry.get(ref)
            (record.path / "config.json").write_text('{"changed": true}')
            self.damaged.add(ref)

    @rule(ref=refs)
    def export(self, ref: str) -> None:
        if ref not in self.ledger:
            return
        target = Path(self.folder.name, "out", ref.replace("/", "-"))
        if target.exists():
            with pytest.raises(RegistryError, match="exists and is not an empty folder"):
                self.registry.export(ref, target)
        elif ref in self.damaged:
            with pytest.raises(RegistryError, match="damaged"):
                self.registry.export(ref, target)
            assert not target.exists()
        else:
            self.registry.export(ref, target)
            assert self.ledger[ref][1] in [path.read_bytes() for path in target.glob("*.safetensors")]
            if ref not in self.bases:
                assert digest_folder(target) == self.ledger[ref][0]

    @invariant()
    def the_registry_holds_what_the_ledger_says(self) -> None:
        expected = {ref: digest for ref, (digest, _) in self.ledger.items()}
        assert {record.ref: record.digest for record in self.registry.records()} == expected
        for ref in self.ledger:
            assert bool(self.registry.verify(ref)) == (ref in self.damaged)
            assert self.registry.lineage(ref)["ref"] == ref
        for name, last in self.last.items():
            numbers = sorted(int(ref.rpartition("@")[2]) for ref in self.ledger if ref.rpartition("@")[0] == name)
            if numbers:
                newest = self.registry.get(name)
                assert newest.version == numbers[-1] <= last
                registered = self.registry.find_fingerprint(f"fingerprint of {name}", name)
                assert registered is not None and registered.version in numbers
            else:
                with pytest.raises(RegistryError):
                    self.registry.get(name)
        assert not list((self.registry.root / "tmp").glob("*")) if (self.registry.root / "tmp").exists() else True


Histories.TestCase.settings = settings(max_examples=25, derandomize=True, stateful_step_count=20, deadline=None)
TestHistories = Histories.TestCase
