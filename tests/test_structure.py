"""The structure of the code: allowed imports, allowed files, and a fast start."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

FOR_EVERYONE = {"config", "errors", "json_types", "metric_names", "model_types", "run_summary", "shipped"}
# Package or module -> those that it may import, in addition to itself and those of FOR_EVERYONE.
ALLOWED_IMPORTS: dict[str, set[str]] = {
    "errors": set(),
    "config": set(),
    "json_types": set(),
    "metric_names": set(),
    "model_types": set(),
    "run_summary": {"process"},
    "shipped": set(),
    "hub": set(),
    "kernels": set(),
    "rl": {"kernels"},
    "stats": set(),
    "process": set(),
    "registry": {"hub", "process"},
    "step": {"process", "registry"},
    "tokens": set(),
    "sampling": {"kernels", "tokens"},
    "models": {"hub", "kernels", "process", "registry", "rl", "sampling", "tokens"},
    "memory": {"corpora", "kernels", "models", "process", "sampling", "tokens"},
    "engines": {"models", "process", "registry", "sampling", "step"},
    "corpora": {"hub", "models", "process", "registry", "tokens"},
    "rewards": {"corpora", "kernels", "memory", "models", "process", "registry", "rl", "sampling", "tokens"},
    "labelling": {"corpora", "process", "stats", "step"},
    "judges": {"corpora", "labelling", "process", "rewards"},
    "training": {"corpora", "engines", "kernels", "models", "process", "registry", "rewards", "sampling", "step"},
    "report": {"corpora", "process", "stats"},
    "pretraining": {"corpora", "memory", "models", "step", "tokens", "training"},
    "sft": {"corpora", "memory", "models", "process", "rewards", "step", "tokens", "training"},
    "reward_model": {
        "corpora",
        "engines",
        "labelling",
        "memory",
        "models",
        "process",
        "rewards",
        "rl",
        "sampling",
        "stats",
        "step",
        "tokens",
        "training",
    },
    "sentiment": {"corpora", "kernels", "memory", "models", "process", "stats", "step", "tokens", "training"},
    "dpo": {"corpora", "memory", "models", "process", "stats", "step", "tokens", "training"},
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
        "rewards",
        "sampling",
        "stats",
        "step",
        "tokens",
    },
    "recipe": {"hub", "process", "registry"},
    "conformance": {"process"},
    "chain": {
        "corpora",
        "engines",
        "hub",
        "labelling",
        "memory_plan",
        "models",
        "process",
        "recipe",
        "registry",
        "report",
        "step",
        "tokens",
    },
    "sweep": {"chain", "process", "recipe", "registry", "stats"},
    "memory_plan": {"memory", "models", "process", "recipe", "registry"},
    "importing": {"hub", "models", "registry"},
    "sharing": {"hub", "registry"},
    "api": {"chain", "models", "process", "recipe", "registry"},
    "serving": {"corpora", "registry", "rewards", "tokens"},
    "terminal": {"chain", "corpora", "engines", "models", "process", "recipe", "registry", "rewards", "sampling", "serving", "tokens"},
    "cli": {"commands", "conformance", "process"},
    "commands": {
        "chain",
        "corpora",
        "importing",
        "labelling",
        "memory",
        "memory_plan",
        "models",
        "process",
        "recipe",
        "registry",
        "report",
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


def package_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def imports_of(text: str, known: set[str]) -> set[str]:
    """The modules of this package that a source text imports: at the top, in functions, and for a type checker only.

    ``known``: all modules. ``from package import name`` imports the module ``package.name`` if there is one, else ``package``.
    """
    modules: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; imports are checked by their full names"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            modules |= {name if name in known else str(node.module) for name in full}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return {name for name in modules if name.split(".")[0] == "stages"}


def graph() -> dict[str, set[str]]:
    """Module -> modules of this package that it imports in any way."""
    paths = {name_of(path): path for path in modules()}
    return {name: imports_of(path.read_text(encoding="utf-8"), set(paths)) & set(paths) - {name} for name, path in paths.items()}


def cycles(imports: dict[str, set[str]]) -> list[set[str]]:
    """Cycles of imports (strongly connected components of more than one module)."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for name in imports.get(todo.pop(), set()) - seen:
                seen.add(name)
                todo.append(name)
        return seen

    below = {name: reached(name) for name in imports}
    groups = {frozenset(other for other in below[name] if name in below[other]) for name in imports if name in below[name]}
    return sorted((set(group) for group in groups), key=sorted)


def modules() -> list[Path]:
    return sorted((REPOSITORY / "stages").rglob("*.py"))


def test_imports_follow_the_table() -> None:
    used: dict[str, set[str]] = {name: set() for name in ALLOWED_IMPORTS}
    for module, imported in graph().items():
        here = package_of(module)
        used[here] |= {package_of(name) for name in imported} - {here, "__init__"} - FOR_EVERYONE
    assert used == ALLOWED_IMPORTS  # every import is in the table, and every entry of the table is needed


def test_the_levels_in_the_docs_allow_the_imports() -> None:
    rows = re.findall(r"^\| [^|]+ \| (`[^|]+`) \|$", (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8"), re.MULTILINE)
    level_of = {name: -number for number, row in enumerate(rows) for name in re.findall(r"`(\w+)`", row)}
    assert level_of.keys() == ALLOWED_IMPORTS.keys() - {"__init__", "__main__"}
    for name, imported in ALLOWED_IMPORTS.items():
        if name in level_of:
            assert all(level_of[other] <= level_of[name] for other in imported), name


def test_imports_in_functions_and_for_type_checkers_are_seen() -> None:
    text = "import torch\nif TYPE_CHECKING:\n    from stages.a.b import C\ndef f():\n    from stages.a import d\n    import stages.e\n"
    assert imports_of(text, {"stages.a", "stages.a.b", "stages.a.d", "stages.e"}) == {"stages.a.b", "stages.a.d", "stages.e"}


def test_cycles_are_found() -> None:
    imports = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a"}, "f": {"g"}, "g": {"h"}, "h": {"f"}}
    assert cycles(imports) == [{"b", "c"}, {"f", "g", "h"}]


def test_no_cycles_between_modules() -> None:
    assert cycles(graph()) == []


def test_no_cycles_between_packages() -> None:
    assert cycles(ALLOWED_IMPORTS) == []


def test_no_stage_imports_another() -> None:
    for stage in STAGES:
        assert not ALLOWED_IMPORTS[stage] & set(STAGES)


@pytest.mark.parametrize("folder", MATHEMATICS)
def test_mathematics_imports_only_torch(folder) -> None:
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


def test_top_level_has_only_the_listed_files() -> None:
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


def test_every_module_has_a_test_file_or_is_tested_by_its_package() -> None:
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


# Imports inside functions

COMMANDS = {
    *("stages", "stages.__main__", "stages.cli"),
    *(f"stages.commands.{path.stem}" for path in (REPOSITORY / "stages" / "commands").glob("*.py")),
}
"""Modules behind ``import stages`` and ``stages --help``. A command imports what it needs when it runs."""

STARTS_FAST = {
    *COMMANDS,
    "stages.api.functions",
    "stages.api.inputs",
    "stages.api.results",
    "stages.api.running",
    "stages.api.steps",
    "stages.chain.planning",
    "stages.chain.run",
    "stages.labelling.command",
    "stages.memory_plan.plan",
    "stages.process.launching",
    "stages.recipe.settings",
    "stages.sharing.pull",
    "stages.sharing.push",
    "stages.stats.intervals",  # a report and the labelling page need only its closed formulas; the bootstrap needs torch
    "stages.sweep.run",
    "stages.terminal",
}
"""Modules that start, without torch: ``stages plan``, the checks before a run, and commands whose arguments are checked first.

Added to these: each ``config.py``, and the modules of ``corpora`` that read data.
"""

LIGHT = {"httpx2", "pydantic", "pydantic_core", "rich", "ruamel", "typer"}
"""Packages that a module that starts fast may import at its top."""

DEFERRED = {
    "IPython": "only in a notebook",
    "bitsandbytes": "optional",
    "flash_attn": "optional",
    "gguf": "optional",
    "peft": "loads bitsandbytes, which takes a second; models without adapters need neither",
    "psutil": "optional",
    "stages.models.adapters.attaching": "loads modules for half a second; a plan of steps without adapters does not need them",
    "torch._dynamo": "takes seconds, and only compiled layers need it",
    "torch._functorch": "loads torch._dynamo",
    "torch.nn.attention.varlen": "its arguments differ between versions of torch",
}
"""Packages that any function may import, with the reason."""


def top_imports(statements: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when a module is imported: not those in functions or for type checkers."""
    for node in statements:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
            is_for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            blocks = [] if is_for_types else [node.body, *(handler.body for handler in getattr(node, "handlers", []))]
            for block in [*blocks, getattr(node, "orelse", []), getattr(node, "finalbody", [])]:
                yield from top_imports(block)


def function_imports(tree: ast.Module) -> list[ast.Import | ast.ImportFrom]:
    at_top = {id(node) for node in top_imports(tree.body)}
    inside = (part for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for part in ast.walk(node))
    return list({id(node): node for node in inside if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in at_top}.values())


def imported(node: ast.Import | ast.ImportFrom, known: Iterable[str]) -> set[str]:
    """The modules that an import statement names. ``from package import name`` is ``package.name`` if that is in ``known``."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    return {full if (full := f"{node.module}.{alias.name}") in known else str(node.module) for alias in node.names}


def loads(imports: dict[str, set[str]], starts: Iterable[str]) -> set[str]:
    """All modules that importing ``starts`` imports, with their packages."""
    seen: set[str] = set()
    todo = list(starts)
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += [*imports.get(name, ()), *([name.rpartition(".")[0]] if name.startswith("stages.") else [])]
    return seen


def packages_of(names: Iterable[str]) -> set[str]:
    """The third-party packages among modules."""
    return {name.split(".")[0] for name in names} - {"stages", *sys.stdlib_module_names}


def misplaced(trees: dict[str, ast.Module], fast: Iterable[str]) -> list[str]:
    """The imports in functions that belong at the top of their module, and the heavy packages at the top of modules that start fast."""
    imports = {name: {one for node in top_imports(tree.body) for one in imported(node, trees)} for name, tree in trees.items()}
    light = loads(imports, fast) & set(trees)
    wrong = [f"{name} imports {package} at its top" for name in light for package in packages_of(imports[name]) - LIGHT]
    for name, tree in trees.items():
        for node in function_imports(tree):
            targets = imported(node, trees)
            is_deferred = any(f"{target}.".startswith(f"{package}.") for package in DEFERRED for target in targets)
            is_heavy = bool(packages_of(loads(imports, targets)) - LIGHT)
            if is_deferred or (name in light and is_heavy) or (name in COMMANDS and not targets <= imports[name]):
                continue
            wrong.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
    return sorted(wrong)


def test_functions_import_only_what_would_slow_down_the_start() -> None:
    trees = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in modules()}
    configs = {name for name in trees if name.endswith(("config", "_config"))}
    readers = {name for name in trees if package_of(name) == "corpora" and name != "stages.corpora.encoding.blocks"}
    assert misplaced(trees, STARTS_FAST | configs | readers) == []


def test_misplaced_imports_are_found() -> None:
    sources = {
        "stages.fast": "import pydantic\ndef f():\n    import torch\n    import stages.heavy\n    import stages.plain\n    import json\n",
        "stages.heavy": "import torch\ndef f():\n    import transformers\n    import peft.utils\n",
        "stages.plain": "import numpy\nif TYPE_CHECKING:\n    import torch\n",
        "stages.config": "import stages.plain\n",
    }
    trees = {name: ast.parse(text) for name, text in sources.items()}
    assert misplaced(trees, {"stages.fast"}) == [
        "stages.fast:6: import json",
        "stages.heavy:3: import transformers",
    ]
    assert misplaced(trees, {"stages.config"})[-1] == "stages.plain imports numpy at its top"


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


MOST_ANY = 2
"""Maximum number of uses of ``Any``, without imports, per thousand lines."""


def test_the_type_any_is_rare() -> None:
    texts = [path.read_text(encoding="utf-8") for path in modules()]
    names = [node.id for text in texts for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)]
    per_thousand_lines = 1000 * names.count("Any") / sum(text.count("\n") for text in texts)
    assert per_thousand_lines <= MOST_ANY, f"{per_thousand_lines:.1f} per thousand lines; give the new code real types"


MOST_LINES = 60
"""The most lines of a function, with its signature and docstring. A longer one is split by concept, so that it reads like its contents."""
LONGER: dict[str, str] = {}
"""Functions that may be longer: address -> reason."""


def test_functions_are_short() -> None:
    long = {
        f"{path.relative_to(REPOSITORY)}:{node.name}"
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (node.end_lineno or 0) - node.lineno >= MOST_LINES
    }
    assert long == set(LONGER)


def test_changelog_has_each_entry_once_under_its_subject() -> None:
    """A merge of two versions of the list can bring back entries, or the headings Added, Changed and Fixed."""
    unreleased = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8").partition("\n## Unreleased\n")[2].partition("\n## ")[0]
    headings = re.findall(r"^### (.+)$", unreleased, re.MULTILINE)
    assert len(headings) == len(set(headings)) > 5
    assert not {"Added", "Changed", "Fixed", "Removed"} & set(headings)
    starts = re.findall(r"^- (?:New: |Fixed: )?(.{50})", unreleased, re.MULTILINE)
    assert sorted(start for start in set(starts) if starts.count(start) > 1) == []
