"""The commands. Importing this file is fast: each command imports what it needs when it runs.

stages run RECIPE [step.field=value ...]      stages plan RECIPE
stages sweep RECIPE step.field=[value,value] [seeds=3]
stages models list | show | lineage | verify | export | import | push | pull | remove
stages generate REF --prompt TEXT [--against REF2]      stages chat REF
stages label STEP_OR_FILE [--annotator NAME] [--report]
stages report RUN [RUN2 ...]      stages serve REF      stages conformance
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, ParamSpec, TypeVar

import typer

from stages import __version__
from stages.errors import LaunchError, RegistryError, Stopped, Waiting, some_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.tree import Tree

    from stages.json_types import JsonObject
    from stages.memory.estimate import Machine
    from stages.process.runtime import Runtime
    from stages.registry.ledger import Registry
    from stages.registry.record import Lineage, Manifest, ModelRecord

app = typer.Typer(
    name="stages",
    help="Chains of training stages: from raw text to an aligned language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
models = typer.Typer(help="List, show, export, import, share and remove models.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(models, name="models")

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file (YAML), or the name of an included recipe, e.g. quickstart.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[STEP.FIELD=VALUE]...", help="Overrides, e.g. sft.training.epochs=2 seed=8.")
]
Home = Annotated[Path | None, typer.Option(help="Folder for all results (default: STAGES_HOME, else outputs).")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
All = Annotated[bool, typer.Option("--all", help="Show all details, including digests and defaults.")]
Ref = Annotated[
    str, typer.Argument(metavar="REF", help="A model of the registry: NAME (its newest version), NAME@3, or sha256:<first digits>.")
]

FORMATS = "argilla, label-studio, alpaca-eval, pandalm or csv"
LABEL_EXPORTS = f"Write tasks and answers as {FORMATS}, or as comparisons; do not serve the page."
LABEL_IMPORTS = f"Import answers from {FORMATS}; do not serve the page."

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def reports_errors(command: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Report an error as one message on stderr. Exit status: 2 if the user can fix it, 1 if it is unexpected.

    ``--debug`` shows the traceback instead. Ctrl-C ends a command with status 130.
    """

    name = command.__name__.removesuffix("_models").removesuffix("_command")

    @wraps(command)
    def wrapped(*arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
        from stages.process import ending, logs

        logs.silence()
        try:
            return command(*arguments, **options)
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise
        except KeyboardInterrupt as error:
            if not ending.was_in_step(error):  # in a step Ctrl-C raises Stopped, so a recipe function raised this
                _end(130, error)
            _report(error, name, options)
        except (Exception, SystemExit) as error:
            if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):
                raise  # rich ends the program if the reader of the output has ended, as in `stages plan RECIPE | head`
            if isinstance(error, Exception) and ending.lost_the_others(error):
                explained = LaunchError("another process of this run ended, and this one cannot continue alone; see its message above")
                _say(f"error: {explained}", is_echo=True)
                _end(explained.exit_status, error)
            _report(error, name, options)

    return wrapped


def _report(error: BaseException, command: str, options: Mapping[str, object]) -> NoReturn:
    """Print the error and end the command. With --debug raise ``error`` instead."""
    from stages.process.ending import explain

    if isinstance(error, Waiting):
        _say(f"waiting: {error}", is_echo=False)
        _end(error.exit_status, error)
    if options.get("debug"):
        if isinstance(error, SystemExit):  # it would end the program without a message
            raise RuntimeError(f"the program was ended by {error!r}") from error
        raise error
    home = options.get("home")
    explained = explain(error, f"stages {command}", _home_path(home if isinstance(home, Path) else None))
    _say(f"error: {explained}", is_echo=False)
    _end(explained.exit_status, error)


def _end(status: int, cause: BaseException) -> NoReturn:
    from stages.process import ending, environment

    if environment.launched_processes() > 1:
        ending.leave_at_once(status)
    raise typer.Exit(status) from cause


def _say(message: str, *, is_echo: bool) -> None:
    """Show a message. Processes with the same error show it only once: rank zero prints first, and its exit ends the waiting others."""
    from stages.process import ending, environment

    rank = environment.launched_rank()
    if is_echo or rank > 0:  # the other process prints its own message; rank zero may print the same error
        time.sleep(5 if is_echo else 2)
    ending.print_error(f"process {rank}: {message}" if rank > 0 else message)


def _home_path(home: Path | None) -> Path:
    from stages.process.environment import default_home

    return (home or default_home()).absolute()


def _home(home: Path | None) -> Path:
    """The folder for all results. Raises StorageError if it cannot be a folder."""
    from stages.process.storage import check_home

    path = _home_path(home)
    check_home(path)
    return path


def _registry(home: Path | None) -> Registry:
    from stages.registry.ledger import Registry

    return Registry(_home(home) / "registry")


def _runtime() -> Runtime:
    from stages.process.runtime import Runtime

    return Runtime()


def _print_json(content: object) -> None:
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False))


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tristage {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Chains of training stages: from raw text to an aligned language model."""
    from stages.process.environment import protect_secrets
    from stages.process.threads import set_up_threads

    protect_secrets()
    set_up_threads()  # before torch is imported
    # A recipe may name functions (package.module:function) in the current folder. Unlike `python -m`, the `stages` script does not search
    # it. It is added last, so that a local file cannot replace an installed package.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


@app.command()
@reports_errors
def run(
    recipe: Recipe,
    overrides: Overrides = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="If people must rank completions, wait for them instead of ending with status 75.")
    ] = False,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Run the new and changed steps of a recipe.

    The results of the other steps are reused.
    """
    from stages.chain import run as chain
    from stages.process.environment import continue_command, has_launcher
    from stages.process.launching import start_missing_processes
    from stages.process.stopping import end_with_launcher
    from stages.recipe.schema import load_recipe

    start_missing_processes()
    if has_launcher():
        end_with_launcher()
    runtime = _runtime()
    runtime.waits_for_people = wait
    with _stoppable(runtime):
        loaded = load_recipe(recipe, overrides or [], _registry(home))
        for notice in loaded.notices():
            runtime.console.print(notice, markup=False, soft_wrap=True)
        chain.run(loaded, _home(home), runtime, command=continue_command())
    runtime.leave()


@contextmanager
def _stoppable(runtime: Runtime) -> Iterator[None]:
    """Context in which SIGTERM and Ctrl-C stop in an orderly way: print the command to continue, and exit with the signal's status."""
    from stages.process.ending import print_error
    from stages.process.environment import continue_command

    try:
        with runtime.stop.installed():
            yield
    except Stopped as stop:
        if runtime.is_main:
            print_error(f"stopped by {stop.name}; completed work is kept. To continue: {continue_command()}")
        _end(stop.exit_status, stop)


@app.command()
@reports_errors
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    all_settings: Annotated[bool, typer.Option("--settings", help="Show every setting of every step and its origin.")] = False,
    device_memory: Annotated[float | None, typer.Option(min=0.1, help="Plan for a GPU with this many GiB instead of this machine.")] = None,
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a run would do, why, and how much memory it needs. Loads no model.

    For steps with a preset, it also shows the source of each value.
    """
    from stages.chain import planning
    from stages.chain.pins import pinned, resolve_commits
    from stages.memory_plan.plan import advice_lines, memory_table, plan_memory
    from stages.recipe.schema import load_recipe
    from stages.recipe.settings import preset_settings, settings_of_step, settings_table

    loaded = load_recipe(recipe, overrides or [], _registry(home))
    commits = resolve_commits(loaded, needs_hub=False)
    loaded = pinned(loaded, commits)
    plans = planning.plan(loaded, _home(home), download=False)
    machine = _machine(device_memory)
    reused = {step.name: step.record.path for step in plans if step.action == "reuse" and step.record is not None}
    memory = plan_memory(loaded, _registry(home), machine, reused=reused, processes=_processes())
    shown = {step.name: (settings_of_step if all_settings else preset_settings)(loaded, step) for step in loaded.steps}
    if as_json:
        settings = {name: [setting.as_json() for setting in values] for name, values in shown.items() if values}
        content = json.loads(planning.plans_json(loaded, plans, settings))
        _print_json(
            {
                **content,
                "machine": {"name": machine.name, "bytes": machine.bytes},
                "memory": [step.as_json() for step in memory],
                "not_checked": commits.unreached,
            }
        )
        return
    console = _runtime().console
    console.print(planning.plan_table(plans, loaded.name))
    for notice in loaded.notices():
        console.print(notice, markup=False, soft_wrap=True)
    for message in commits.unreached:
        console.print(f"Not checked: {message}", markup=False, soft_wrap=True)
    unseen = [step.name for step in loaded.steps if planning.on_hub(step)]
    if unseen:
        console.print(f"Not checked, because the data is on the Hub: the rows of {', '.join(unseen)}.", markup=False)
    if memory:
        console.print(memory_table(memory, machine))
        for line in advice_lines(memory):
            console.print(line, soft_wrap=True, markup=False)
    for step in loaded.steps:
        if shown[step.name]:
            console.print(settings_table(step, shown[step.name]))


def _machine(device_memory: float | None) -> Machine:
    """The machine to plan for: a GPU of the given size, the smallest of the GPUs that the processes use, or this machine's memory."""
    from stages.memory.estimate import Machine
    from stages.process.environment import wants_cpu
    from stages.process.gpus import visible_gpus
    from stages.process.hardware import cpu_memory

    if device_memory is not None:
        return Machine("cuda", int(device_memory * 2**30), 2, f"a GPU of {device_memory:g} GiB")
    if not wants_cpu() and (gpus := visible_gpus()[: _processes()]):
        smallest = min(gpus, key=lambda gpu: gpu["memory_bytes"])  # each process uses one of them
        return Machine("cuda", smallest["memory_bytes"], 2, smallest["name"])
    return Machine("cpu", cpu_memory(), 4, "this machine's memory")  # fp32, which needs more memory than the bf16 that a step may choose


def _processes() -> int:
    from stages.process.environment import launched_processes

    return launched_processes()


@app.command()
@reports_errors
def conformance(as_json: Json = False, debug: Debug = False) -> None:
    """List the details of the papers with their code and tests."""
    from dataclasses import asdict

    from stages.conformance import DETAILS, conformance_table

    if as_json:
        _print_json([asdict(detail) for detail in DETAILS])
    else:
        _runtime().console.print(conformance_table())


@app.command()
@reports_errors
def sweep(
    recipe: Recipe,
    varied: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[STEP.FIELD=[VALUE,...]]...",
            help="Axes: aligned.kl.coef=[0.01,0.1], a.field+b.field=[1,2] together, seeds=3 or aligned.seeds=3; "
            "a single value is an override for every run.",
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="Dotted path into summary.json, e.g. candidates.aligned.kl; * is any part. Repeatable. Default: each candidate's score by "
            "the first judge; without an evaluation, the held-out metrics of the steps."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the sweep (default: the varied fields).")] = None,
    until: Annotated[str | None, typer.Option(metavar="STEP", help="Skip the steps after this one.")] = None,
    x: Annotated[str | None, typer.Option("--x", help="Axis or metric for the x axis of the plot.")] = None,
    only_plan: Annotated[bool, typer.Option("--plan", help="Show what each run would make, without running it.")] = False,
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a recipe for every combination of values and seeds.

    Equal steps run once. The same command continues an interrupted sweep.
    """
    from stages.sweep.plot import write_plot
    from stages.sweep.run import load_sweep, plan_table, result_table, run_sweep

    loaded = load_sweep(recipe, varied or [], _home(home), name, until, metric or [])
    runtime = _runtime()
    if only_plan:
        runtime.console.print(plan_table(loaded, _home(home)))
        return
    if as_json:
        runtime.console.quiet = True
    with _stoppable(runtime):
        result = run_sweep(loaded, _home(home), runtime, metric or [])
    if runtime.is_main and result.metrics:
        write_plot(result, result.folder / "plot.png", x)
    if as_json:
        _print_json(result.as_json())
    else:
        runtime.console.print(result_table(result))
        runtime.console.print(f"Results and plot: {result.folder}", soft_wrap=True)
    if result.exit_status:
        raise typer.Exit(result.exit_status)


# The registry


@models.command("list")
@reports_errors
def list_models(home: Home = None, as_json: Json = False, debug: Debug = False) -> None:
    """List every version of every model."""
    from stages.process.tables import Table

    records = _registry(home).records()
    if as_json:
        _print_json([_row(record) for record in records])
        return
    console = _runtime().console
    if not records:
        console.print(f"No models in {_home(home) / 'registry'}; run a recipe first: `stages run RECIPE`.")
        return
    table = Table("model", "role", "digest", "MiB", "made (UTC)", "kind")
    for record in records:
        size = sum(file["size"] for file in record.manifest["files"]) / 2**20
        kind = f"adapter on {record.base['ref']}" if record.base is not None else "full weights"
        table.add_row(record.ref, record.role, record.digest[:19], f"{size:.1f}", record.manifest["created"][:19], kind)
    console.print(table)


def _row(record: ModelRecord) -> JsonObject:
    manifest = record.manifest
    identity = {"ref": record.ref, "name": record.name, "version": record.version, "role": record.role, "digest": record.digest}
    return {**identity, "path": str(record.path), "created": manifest["created"], "base": manifest["base"], "metrics": manifest["metrics"]}


@models.command()
@reports_errors
def show(ref: Ref, everything: All = False, home: Home = None, as_json: Json = False, debug: Debug = False) -> None:
    """Show a version: origin, data, changed settings, metrics."""
    from stages.process.tables import Table

    record = _registry(home).get(ref)
    if as_json:
        _print_json({**record.manifest, "path": str(record.path)})
        return
    table = Table(title=record.ref, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for label, value in _all_rows(record) if everything else _chosen_rows(record):
        table.add_row(label, value)
    console = _runtime().console
    console.print(table, markup=False)
    if not everything:
        console.print("Use --all or --json for hashes, all settings, files and packages.", style="dim")


def _chosen_rows(record: ModelRecord) -> list[tuple[str, str]]:
    """The most important facts."""
    from stages.chain.description import describe

    manifest = record.manifest
    stage = manifest["recipe_step"].get("stage")
    size = sum(file["size"] for file in manifest["files"]) / 2**20
    rows = [
        ("role", record.role + (f", made by a step of stage {stage}" if stage else "")),
        ("made (UTC)", manifest["created"][:19]),
        ("folder", f"{record.path} ({size:.1f} MiB)"),
        *([("pulled from", manifest["pulled"]["from"])] if "pulled" in manifest else []),
        ("base", f"adapter on {record.base['ref']}" if record.base is not None else "none: full weights"),
        ("made from", _origin(manifest)),
    ]
    return rows + [(heading, "\n".join(lines) or "none") for heading, lines in describe(record).items()]


def _origin(manifest: Manifest) -> str:
    """The origin of a model: its parents, the library whose file was imported, or random weights."""
    if manifest["parents"]:
        return "\n".join(parent["ref"] for parent in manifest["parents"])
    imported = manifest["extra"].get("imported")
    return f"imported from {imported['library']}" if isinstance(imported, dict) else "none: random weights"


def _all_rows(record: ModelRecord) -> list[tuple[str, str]]:
    """Everything in the manifest."""
    manifest = record.manifest
    return [
        ("role", record.role),
        ("digest", record.digest),
        ("made (UTC)", manifest["created"]),
        ("folder", str(record.path)),
        ("base", record.base["ref"] if record.base is not None else "none: full weights"),
        ("parents", "\n".join(f"{parent['ref']}  {parent['digest']}" for parent in manifest["parents"]) or "none"),
        ("data", "\n".join(f"{field_path}  {mark}" for field_path, mark in manifest["data"].items()) or "none"),
        ("metrics", "\n".join(f"{name}  {value}" for name, value in manifest["metrics"].items()) or "none"),
        ("step", json.dumps(manifest["recipe_step"], ensure_ascii=False)),
        ("extra", json.dumps(manifest["extra"], ensure_ascii=False)),
        ("packages", ", ".join(f"{name} {version}" for name, version in manifest["packages"].items())),
        ("files", "\n".join(f"{file['path']}  {file['size']} bytes  {file['sha256']}" for file in manifest["files"])),
    ]


@models.command()
@reports_errors
def lineage(ref: Ref, everything: All = False, home: Home = None, as_json: Json = False, debug: Debug = False) -> None:
    """Show the models and data from which a version was made."""
    from stages.registry.record import written_once

    registry = _registry(home)
    tree = written_once(registry.lineage(ref))
    if as_json:
        _print_json(tree)
    else:
        _runtime().console.print(_tree(tree, registry, everything), soft_wrap=True)


def _tree(node: Lineage, registry: Registry, everything: bool, branch: Tree | None = None) -> Tree:
    from rich.markup import escape
    from rich.tree import Tree

    from stages.chain.description import data_lines

    note = node.get("role") or node["kind"]
    if node.get("removed"):
        note = "removed from the registry, or changed"
    elif (base := node.get("base")) is not None:
        note += f", adapter on {base['ref']}"
    if node.get("trust_remote_code"):
        note += ", with code from the Hub"
    if node.get("repeated"):
        note += ", see above"
    if node.get("recorded"):
        note += f", as described by {node['recorded']}"
    digest = f" {node['digest']}" if everything else ""
    label = f"[bold]{escape(node['ref'])}[/]{escape(digest)} ({escape(note)})"
    here = Tree(label) if branch is None else branch.add(label)
    if node.get("repeated"):
        return here
    if everything or (node.get("role") and not _is_in_registry(node, registry)):
        lines = [f"{field_path}: data {mark}" for field_path, mark in node.get("data", {}).items()]
    else:
        lines = data_lines(registry.get(node["ref"]).manifest) if node.get("data") else []
    for line in lines:
        here.add(escape(line))
    for parent in node["parents"]:
        _tree(parent, registry, everything, here)
    return here


def _is_in_registry(node: Lineage, registry: Registry) -> bool:
    """Whether a version of a lineage is in the registry; those above a pulled one may not be."""
    try:
        return registry.get(node["ref"]).digest == node["digest"]
    except RegistryError:
        return False


@models.command()
@reports_errors
def verify(
    ref: Annotated[str | None, typer.Argument(metavar="[REF]", help="A version (default: all).")] = None,
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check the files of a version against its manifest.

    Exit status 2 if there is a problem.
    """
    registry = _registry(home)
    refs = [registry.get(ref).ref] if ref is not None else [record.ref for record in registry.records()]
    problems_by_ref = {name: registry.verify(name) for name in refs}
    if as_json:
        _print_json(problems_by_ref)
    for name, problems in problems_by_ref.items():
        if not as_json:
            typer.echo(f"{name}: {'; '.join(problems) or 'intact'}")
    if any(problems_by_ref.values()):
        raise typer.Exit(2)


@models.command()
@reports_errors
def export(
    ref: Ref,
    destination: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    adapter: Annotated[bool, typer.Option("--adapter", help="Export an adapter without merging it into its base.")] = False,
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Export a full model to a folder for from_pretrained.

    The folder has a model card, and also works with vLLM, lm-eval, transformers serve and the Hub.
    """
    from stages.models.adapters.exporting import export_merged
    from stages.registry.card import write_card

    registry = _registry(home)
    with _stoppable(_runtime()):
        path = registry.export(ref, destination, merge=None if adapter else export_merged)
        write_card(registry.get(ref), registry, path, merged=not adapter)
    if as_json:
        _print_json({"path": str(path)})
    else:
        typer.echo(f"exported {ref} to {path}")


@models.command("import")
@reports_errors
def import_command(
    source: Annotated[str, typer.Argument(metavar="FOLDER|FILE.gguf", help="A model saved by another library.")],
    name: Annotated[str, typer.Option("--as", metavar="NAME", help="Name in the registry, e.g. imported/reward.")],
    role: Annotated[str | None, typer.Option(help="reward_model or value_model, if the files do not say what the head is.")] = None,
    pickle: Annotated[bool, typer.Option("--pickle", help="Also read pickle files (pytorch_model.bin), with weights_only=True.")] = False,
    base: Annotated[str | None, typer.Option(help="The base model of an adapter, if its config names a different path.")] = None,
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Import a model that another library saved.

    Libraries: TRL, OpenRLHF, DeepSpeed-Chat, trlX, LLaMA-Factory, ms-swift, transformers, peft, and llama.cpp (GGUF).
    """
    from stages.importing.run import import_model

    if role not in (None, "language_model", "reward_model", "value_model", "classifier"):
        raise typer.BadParameter(f"{role!r}: expected language_model, reward_model, value_model or classifier", param_hint="--role")
    with _stoppable(_runtime()):
        imported = import_model(source, _registry(home), name, role=role, allow_pickle=pickle, base=base)  # type: ignore[arg-type]
    if as_json:
        _print_json(
            {
                "library": imported.library,
                "head": imported.head,
                "models": [_row(record) for record in imported.records],
                "already_present": imported.present,
                "notes": imported.notes,
            }
        )
        return
    typer.echo(f"{source} was saved by {imported.library}")
    if imported.head:
        typer.echo(f"head: {imported.head}")
    for record in imported.records:
        typer.echo(f"{'already present:' if record.ref in imported.present else 'published'} {record.ref} ({record.role})")
    for note in imported.notes:
        typer.echo(f"note: {note}")


Repository = Annotated[str, typer.Argument(metavar="OWNER/NAME", help="A model repository of the Hugging Face Hub.")]


@models.command()
@reports_errors
def push(
    ref: Ref,
    repository: Repository,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Commit message (default: the version).")] = None,
    public: Annotated[bool, typer.Option("--public", help="Create a public repository (default: private).")] = False,
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Push a version to the Hub, with a model card and its lineage.

    The results of evaluations, and the base of an adapter, are pushed, too.
    """
    from stages.sharing.push import push as push_model

    with _stoppable(_runtime()):
        pushed = push_model(ref, repository, _registry(home), message=message, private=not public, say=_progress(as_json))
    if as_json:
        _print_json({"repository": pushed.repository, "commit": pushed.commit, "created": pushed.is_new})


@models.command()
@reports_errors
def pull(
    repository: Repository,
    name: Annotated[str | None, typer.Option("--as", metavar="NAME", help="Name in this registry (default: the name it had).")] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, a tag or a commit (default: main).")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Allow a base that runs its own code.")] = False,
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Download a pushed version into the registry.

    Settings, metrics and lineage come with it. Every file is verified.
    """
    from stages.sharing.pull import pull as pull_model

    with _stoppable(_runtime()):
        pulled = pull_model(
            repository, _registry(home), revision=revision, name=name, trust_remote_code=trust_remote_code, say=_progress(as_json)
        )
    record = pulled.record
    if as_json:
        _print_json({"model": _row(record), "bases": [_row(base) for base in pulled.bases], "was_here": pulled.was_here})
    else:
        typer.echo(f"{'already present' if pulled.was_here else 'pulled'}: {record.ref} ({record.role}, {record.digest[:19]})")


def _progress(as_json: bool) -> Callable[[str], None]:
    """The function that prints the messages of a command: on stdout, and on stderr where stdout is for a program."""
    return lambda line: typer.echo(line, err=as_json)


@models.command()
@reports_errors
def remove(
    ref: Ref,
    force: Annotated[bool, typer.Option("--force", help="Remove it even if adapters depend on it.")] = False,
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Remove a version from the registry."""
    registry = _registry(home)
    record = registry.remove(ref, force=force)
    children, left = registry.made_from(record), [other.ref for other in registry.versions(record.name)]
    if as_json:
        _print_json({"removed": record.ref, "digest": record.digest, "made_from_it": children, "other_versions": left})
        return
    typer.echo(f"removed {record.ref} {record.digest[:19]}")
    if children:
        typer.echo(f"Made from it, and unchanged: {some_of(children, 5)}.")
    if left:
        typer.echo(f"{record.name} now means {left[-1]}. Recipes that name {record.ref} need another version.")
    else:
        typer.echo(
            f"No version of {record.name} is left. The recipe that made it makes it again; elsewhere the name means a folder or the Hub."
        )


# Using models

MaxNewTokens = Annotated[int, typer.Option(min=1, help="Maximum tokens per completion.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="Lower: less variety; 0: always the most likely token.")]
TopP = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Sample from the most likely tokens with this total probability; 1: all tokens.")
]
Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same completions.")]
SamplingEngine = Annotated[
    str, typer.Option(metavar="ENGINE", help="What samples: local, vllm (a server is started), or the address of a vLLM server.")
]
AnyModel = Annotated[str, typer.Argument(metavar="REF", help="A model: registry reference, folder or Hub id.")]
TemplateArguments = Annotated[
    str | None, typer.Option(metavar="JSON", help="Arguments of REF's chat template, e.g. '{\"enable_thinking\": false}'.")
]


@app.command()
@reports_errors
def generate(
    ref: AnyModel,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; repeatable. Default: one per line of standard input.")] = None,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="A data file with prompts.")] = None,
    against: Annotated[str | None, typer.Option(metavar="REF2", help="A second model, shown next to the first.")] = None,
    score: Annotated[str | None, typer.Option(metavar="REWARD", help="A reward model that scores the completions.")] = None,
    max_new_tokens: MaxNewTokens = 48,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    num_samples: Annotated[int, typer.Option(min=1, help="Completions per prompt.")] = 1,
    engine: SamplingEngine = "local",
    template_arguments: TemplateArguments = None,
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Complete prompts with one model, or two side by side."""
    from rich.text import Text

    from stages import terminal
    from stages.config import GenerationSettings
    from stages.corpora.prompts import plain_text
    from stages.process.tables import Table

    refs = list(dict.fromkeys([ref] if against is None else [ref, against]))
    runtime, registry = _runtime(), _registry(home)
    arguments = terminal.read_arguments(template_arguments)
    given = terminal.read_prompts(prompt or [], prompts, None if sys.stdin.isatty() else sys.stdin.read)
    asked = [one for one in given for _ in range(num_samples)]
    settings = GenerationSettings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p or 1e-6)
    seeds = [seed + index for index in range(len(asked))]
    columns = []
    for name in refs:
        with terminal.Speaker.load(name, registry, runtime, engine, arguments if name == ref else None) as speaker:
            columns.append(speaker.complete(asked, settings, seeds))
    scores = terminal.score(score, registry, runtime, asked, columns) if score is not None else []
    if as_json:
        rows: list[JsonObject] = []
        for index, one in enumerate(asked):
            row: JsonObject = {"prompt": one, **{name: column[index] for name, column in zip(refs, columns, strict=True)}}
            if scores:
                row["scores"] = {name: column[index] for name, column in zip(refs, scores, strict=True)}
            rows.append(row)
        _print_json(rows)
        return
    table = Table("prompt", *refs, show_lines=True)
    for index, one in enumerate(asked):
        marks = [f"\n[{column[index]:.3f}]" for column in scores] or [""] * len(columns)
        cells = [column[index] + mark for column, mark in zip(columns, marks, strict=True)]
        table.add_row(Text(plain_text(one)), *(Text(cell) for cell in cells))  # Text: a model's brackets are not markup
    runtime.console.print(table)


@app.command()
@reports_errors
def serve(
    ref: AnyModel,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any free one.")] = 8000,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Another one lets other machines connect, and needs a key.")
    ] = "127.0.0.1",
    label: Annotated[str | None, typer.Option(help="Classifier: the class to score, by name or index.")] = None,
    output: Annotated[str, typer.Option(help="Classifier: which output is the score: logit, probability or logprob.")] = "logit",
    api_key_variable: Annotated[str | None, typer.Option(metavar="NAME", help="Environment variable with the API key.")] = None,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Serve the scores of a reward model or classifier over HTTP.

    The protocols are those of OpenRLHF and vLLM.
    """
    from stages import serving, terminal
    from stages.process.environment import secret

    runtime, registry = _runtime(), _registry(home)
    key = secret(api_key_variable) if api_key_variable is not None else None
    scorer = terminal.scorer(ref, registry, runtime, label=label, output=output)
    serving.serve(scorer, host=host, port=port, key=key, say=lambda line: runtime.console.print(line, markup=False))


@app.command()
@reports_errors
def chat(
    ref: AnyModel,
    against: Annotated[str | None, typer.Option(metavar="REF2", help="A second model that also answers; its replies are not kept.")] = None,
    system: Annotated[str | None, typer.Option(help="System message to begin with.")] = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    engine: SamplingEngine = "local",
    template_arguments: TemplateArguments = None,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Chat with a model. A model without a chat template continues each line separately."""
    from rich.text import Text

    from stages import terminal
    from stages.config import GenerationSettings

    runtime, registry = _runtime(), _registry(home)
    console = runtime.console
    with ExitStack() as stack:
        arguments = terminal.read_arguments(template_arguments)
        refs = [ref] if against is None else [ref, against]
        speakers = [
            stack.enter_context(terminal.Speaker.load(name, registry, runtime, engine, arguments if index == 0 else None))
            for index, name in enumerate(refs)
        ]
        for speaker in speakers:
            if not speaker.converses:
                console.print(f"{speaker.name} has no chat template: it continues each line separately.", style="yellow", markup=False)
        console.print(terminal.HELP, style="dim", markup=False)

        def say(who: str, text: str) -> None:
            console.print(Text.assemble((f"{who}  " if who else "", "bold"), text))

        settings = GenerationSettings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p or 1e-6)
        talk = terminal.Chat(speakers, settings, seed, say)
        if system is not None:
            talk.history.append({"role": "system", "content": system})
        while True:
            try:
                if not talk.hear(input("> ")):
                    return
            except (EOFError, KeyboardInterrupt):
                typer.echo()
                return


# Annotation


@app.command()
@reports_errors
def label(
    what: Annotated[str, typer.Argument(metavar="STEP_OR_FILE", help="RECIPE/STEP that waits for annotators, or a file of completions.")],
    annotator: Annotated[list[str] | None, typer.Option(help="Name of an annotator who gets a link; repeatable (default: you).")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port (default: the first free one from 8770).")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Another one lets other machines connect, and needs a password.")
    ] = "127.0.0.1",
    show_report: Annotated[bool, typer.Option("--report", help="Print agreement, rate and bias; do not serve the page.")] = False,
    export: Annotated[tuple[str, Path] | None, typer.Option(metavar="FORMAT FILE", help=LABEL_EXPORTS)] = None,
    import_from: Annotated[tuple[str, Path] | None, typer.Option("--import", metavar="FORMAT FILE", help=LABEL_IMPORTS)] = None,
    questions: Annotated[Path | None, typer.Option(metavar="FILE", help="With a file: YAML with the questions.")] = None,
    instructions: Annotated[Path | None, typer.Option(metavar="FILE", help="With a file: Markdown for the annotators.")] = None,
    annotators: Annotated[int | None, typer.Option(min=1, help="With a file: people who rank each overlap task (default 2).")] = None,
    overlap: Annotated[
        float | None, typer.Option(min=0, max=1, help="With a file: share of overlap tasks, which several people rank (default 0.2).")
    ] = None,
    target: Annotated[int | None, typer.Option(min=1, help="With a file: number of tasks to rank (default: all).")] = None,
    gold: Annotated[Path | None, typer.Option(metavar="FILE", help="With a file: tasks with known ranks, to screen annotators.")] = None,
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Serve the page where people rank completions. Loads no model."""
    from stages.labelling import command

    if as_json and not show_report:
        raise typer.BadParameter("only the report is printed as JSON; add --report", param_hint="--json")
    given = {
        "questions": questions and str(questions),
        "instructions": instructions and str(instructions),
        "annotators": annotators,
        "overlap": overlap,
        "target": target,
        "gold": gold and str(gold),
    }
    settings: JsonObject = {name: value for name, value in given.items() if value is not None}
    folder = command.open_folder(what, _home(home), settings)
    if import_from is not None:
        from stages.labelling.exchange import import_answers

        typer.echo(import_answers(folder, *import_from))
    if export is not None:
        from stages.labelling.exchange import export_labels

        typer.echo(export_labels(folder, *export))
    if show_report:
        from stages.labelling.report import quality
        from stages.labelling.store import read_labels
        from stages.labelling.tables import report_tables

        content = quality(read_labels(folder))
        if as_json:
            _print_json(content)
        else:
            _console().print(report_tables(content))
    if import_from or export or show_report:
        return
    password = None if command.is_loopback(host) else _password(command.PASSWORD_VARIABLE)
    names = command.annotator_names(annotator or [])
    command.serve(folder, names, host=host, port=port, password=password, console=_console())


def _console() -> Console:
    """A console for commands that load no model. Wide enough for tables if the output is a file."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140, highlight=False)


def _password(variable: str) -> str | None:
    """The password of a page that other machines can reach: from the environment, else prompted; None without a terminal."""
    from stages.process.environment import secret_if_set

    if given := secret_if_set(variable):
        return given
    return typer.prompt("Password for the page", hide_input=True, confirmation_prompt=True) if sys.stdin.isatty() else None


# Reports


@app.command()
@reports_errors
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders, recipe names (newest run) or <recipe>/<time>.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--out", "--output", metavar="FILE", help="Output file (default: report.html in the run; for several runs comparison.html)."
        ),
    ] = None,
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the report page of a run, or of several. Loads no model.

    A page is one HTML file of at most 2 MB.
    """
    from stages.report.comparison import write_comparison
    from stages.report.output import check_output
    from stages.report.page import megabytes, write_report
    from stages.report.run_folder import find_run, read_run

    if output is not None:
        check_output(output)
    folders = [read_run(path) for path in dict.fromkeys(find_run(name, _home(home)) for name in runs)]
    if len(folders) == 1:
        written = write_report(folders[0], output)
    else:
        check_output(output := output or Path("comparison.html"))
        written = write_comparison(folders, output)
    if as_json:
        runs_shown = [str(run.path) for run in folders]
        _print_json({"path": str(written.path.absolute()), "bytes": written.size, "left_out": written.notes, "runs": runs_shown})
    else:
        typer.echo("\n".join([f"The report: {written.path} ({megabytes(written.size)})", *written.notes]))


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a locale without UTF-8: \u2603 is shown instead of an error for a character it lacks
            stream.reconfigure(errors="backslashreplace")
    app()
