"""The structure of the code: who may import whom, what lies where, and that starting is quick."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# Room -> rooms it may import, beside itself. `config`, `errors` and `shipped` are for everyone.
ARROWS = {
    "errors": set(),
    "config": set(),
    "shipped": set(),
    "hub": set(),
    "kernels": set(),
    "rl": set(),
    "stats": set(),
    "process": set(),
    "registry": {"process"},
    "step": {"process", "registry"},
    "tokens": set(),
    "sampling": {"kernels", "tokens"},
    "models": {"kernels", "process", "registry", "rl", "sampling", "tokens"},
    "memory": {"corpora", "kernels", "tokens"},
    "engines": {"models", "process", "registry", "sampling", "step"},
    "corpora": {"hub", "models", "registry", "tokens"},
    "rewards": {"corpora", "models", "process", "registry", "rl", "sampling", "tokens"},
    "labelling": {"corpora", "process", "registry", "stats", "step"},
    "judges": {"corpora", "labelling", "process", "rewards"},
    "training": {"corpora", "engines", "models", "process", "registry", "rewards", "sampling", "step"},
    "report": {"corpora", "evaluation", "process", "stats"},
    "pretraining": {"corpora", "memory", "models", "step", "tokens", "training"},
    "sft": {"corpora", "memory", "models", "rewards", "step", "tokens", "training"},
    "reward_model": {
        "corpora",
        "engines",
        "labelling",
        "memory",
        "models",
        "rewards",
        "rl",
        "sampling",
        "stats",
        "step",
        "tokens",
        "training",
    },
    "sentiment": {"corpora", "memory", "models", "stats", "step", "tokens", "training"},
    "dpo": {"corpora", "memory", "models", "stats", "step", "tokens", "training"},
    "ppo": {
        "corpora",
        "engines",
        "kernels",
        "memory",
        "models",
        "process",
        "registry",
        "rewards",
        "rl",
        "sampling",
        "stats",
        "step",
        "tokens",
        "training",
    },
    "evaluation": {
        "corpora",
        "engines",
        "judges",
        "labelling",
        "memory",
        "models",
        "process",
        "registry",
        "report",
        "rewards",
        "sampling",
        "stats",
        "step",
        "tokens",
    },
    "recipe": {"process", "registry"},
    "conformance": set(),
    "chain": {"corpora", "engines", "hub", "labelling", "models", "process", "recipe", "registry", "report", "step"},
    "sweep": {"chain", "process", "recipe", "registry", "stats"},
    "planning": {"memory", "models", "recipe", "registry"},
    "importing": {"models", "registry"},
    "sharing": {"hub", "registry"},
    "api": {"chain", "models", "process", "recipe", "registry"},
    "serving": {"rewards"},
    "terminal": {"chain", "corpora", "engines", "models", "recipe", "rewards", "sampling", "serving", "tokens"},
    "cli": {
        "chain",
        "conformance",
        "corpora",
        "importing",
        "labelling",
        "memory",
        "models",
        "planning",
        "process",
        "recipe",
        "registry",
        "report",
        "sampling",
        "serving",
        "sharing",
        "sweep",
        "terminal",
    },
    "__main__": {"cli"},
    "__init__": {"api", "registry"},
}
MATHEMATICS = ("rl", "stats", "kernels")
STAGES = ("pretraining", "sft", "reward_model", "sentiment", "dpo", "ppo", "evaluation")


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imports_of(path: Path) -> set[str]:
    """Modules of this package that ``path`` imports at run time; what only a type checker reads is left out."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "stages":
            found.add(node.module)
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.split(".")[0] == "stages")
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def modules() -> list[Path]:
    return sorted((REPOSITORY / "stages").rglob("*.py"))


def test_arrows() -> None:
    wrong = []
    for path in modules():
        here = path.relative_to(REPOSITORY / "stages").parts[0].removesuffix(".py")
        for module in imports_of(path):
            there = room(module)
            if there not in {here, "config", "errors", "shipped", "__init__"} | ARROWS[here]:
                wrong.append(f"{path.relative_to(REPOSITORY)} imports {module}")
    assert wrong == []


def test_no_stage_imports_another() -> None:
    for stage in STAGES:
        assert not ARROWS[stage] & set(STAGES)


@pytest.mark.parametrize("folder", MATHEMATICS)
def test_mathematics_needs_torch_alone(folder) -> None:
    for path in (REPOSITORY / "stages" / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for name in names:
                assert name.split(".")[0] in {"torch", "stages", *sys.stdlib_module_names}, f"{path.name} imports {name}"


def test_no_code_among_data_and_recipes() -> None:
    assert not list((REPOSITORY / "data").rglob("*.py")) and not list((REPOSITORY / "recipes").rglob("*.py"))


def test_top_level_is_the_card() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout.split()
    if not files:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in files if not name.startswith(".")}
    required = {"README.md", "data", "launch.sh", "pyproject.toml", "recipes", "stages", "tests"}
    allowed = {"LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff", "docs"}
    assert required <= top
    assert top <= required | allowed


def test_the_tree_in_the_docs_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, "docs/tree.py", "--check"], cwd=REPOSITORY, check=False)
    assert done.returncode == 0, "run: python docs/tree.py"


def test_every_module_says_what_it_is() -> None:
    silent = [str(path.relative_to(REPOSITORY)) for path in modules() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []


def test_the_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_every_module_has_a_test_file_or_is_tested_by_its_room() -> None:
    tested = {path.stem.removeprefix("test_") for path in (REPOSITORY / "tests").rglob("test_*.py")}
    for stage in (
        "pretraining",
        "sft",
        "reward_model",
        "sentiment",
        "evaluation",
        "chain",
        "recipe",
        "registry",
        "cli",
        "generation",
        "training",
    ):
        assert stage in tested
    for folder in MATHEMATICS:
        for path in (REPOSITORY / "stages" / folder).glob("[a-z]*.py"):
            assert (REPOSITORY / "tests" / folder / f"test_{path.stem}.py").exists()


@pytest.mark.parametrize("command", [["--help"], ["run", "--help"], ["models", "--help"]])
def test_help_imports_nothing_heavy(command) -> None:
    code = (
        "import sys; from stages.cli import app\n"
        f"try: app({command!r})\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'trl') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "Usage" in done.stdout


def test_mathematics_imports_without_transformers() -> None:
    code = "import sys, stages.rl.gae, stages.stats.comparing, stages.kernels.lean; print('transformers' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip() == "False"
    )
