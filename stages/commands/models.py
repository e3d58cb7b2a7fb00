"""The commands for models of the registry: stages models list, show, lineage, verify, export, import, push, pull, remove."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stages.commands.errors import reports_errors, stoppable
from stages.commands.options import All, Debug, Home, Json, Ref, home_folder, make_runtime, print_json, registry_in
from stages.errors import RegistryError, some_of

if TYPE_CHECKING:
    from rich.tree import Tree

    from stages.json_types import JsonObject
    from stages.registry.ledger import Registry
    from stages.registry.record import Lineage, Manifest, ModelRecord


@reports_errors
def list_models(home: Home = None, as_json: Json = False, debug: Debug = False) -> None:
    """List every version of every model."""
    from stages.process.tables import Table

    records = registry_in(home).records()
    if as_json:
        print_json([_row(record) for record in records])
        return
    console = make_runtime().console
    if not records:
        console.print(f"No models in {home_folder(home) / 'registry'}; run a recipe first: `stages run RECIPE`.")
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


@reports_errors
def show(ref: Ref, everything: All = False, home: Home = None, as_json: Json = False, debug: Debug = False) -> None:
    """Show a version: origin, data, changed settings, metrics."""
    from stages.process.tables import Table

    record = registry_in(home).get(ref)
    if as_json:
        print_json({**record.manifest, "path": str(record.path)})
        return
    table = Table(title=record.ref, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for label, value in _all_rows(record) if everything else _chosen_rows(record):
        table.add_row(label, value)
    console = make_runtime().console
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


@reports_errors
def lineage(ref: Ref, everything: All = False, home: Home = None, as_json: Json = False, debug: Debug = False) -> None:
    """Show the models and data from which a version was made."""
    from stages.registry.record import written_once

    registry = registry_in(home)
    tree = written_once(registry.lineage(ref))
    if as_json:
        print_json(tree)
    else:
        make_runtime().console.print(_tree(tree, registry, everything), soft_wrap=True)


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
    registry = registry_in(home)
    refs = [registry.get(ref).ref] if ref is not None else [record.ref for record in registry.records()]
    problems_by_ref = {name: registry.verify(name) for name in refs}
    if as_json:
        print_json(problems_by_ref)
    for name, problems in problems_by_ref.items():
        if not as_json:
            typer.echo(f"{name}: {'; '.join(problems) or 'intact'}")
    if any(problems_by_ref.values()):
        raise typer.Exit(2)


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

    registry = registry_in(home)
    with stoppable(make_runtime()):
        path = registry.export(ref, destination, merge=None if adapter else export_merged)
        write_card(registry.get(ref), registry, path, merged=not adapter)
    if as_json:
        print_json({"path": str(path)})
    else:
        typer.echo(f"exported {ref} to {path}")


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
    with stoppable(make_runtime()):
        imported = import_model(source, registry_in(home), name, role=role, allow_pickle=pickle, base=base)  # type: ignore[arg-type]
    if as_json:
        print_json(
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

    with stoppable(make_runtime()):
        pushed = push_model(ref, repository, registry_in(home), message=message, private=not public, say=_progress(as_json))
    if as_json:
        print_json({"repository": pushed.repository, "commit": pushed.commit, "created": pushed.is_new})


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

    with stoppable(make_runtime()):
        pulled = pull_model(
            repository, registry_in(home), revision=revision, name=name, trust_remote_code=trust_remote_code, say=_progress(as_json)
        )
    record = pulled.record
    if as_json:
        print_json({"model": _row(record), "bases": [_row(base) for base in pulled.bases], "was_here": pulled.was_here})
    else:
        typer.echo(f"{'already present' if pulled.was_here else 'pulled'}: {record.ref} ({record.role}, {record.digest[:19]})")


def _progress(as_json: bool) -> Callable[[str], None]:
    """The function that prints the messages of a command: on stdout, and on stderr where stdout is for a program."""
    return lambda line: typer.echo(line, err=as_json)


@reports_errors
def remove(
    ref: Ref,
    force: Annotated[bool, typer.Option("--force", help="Remove it even if adapters depend on it.")] = False,
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Remove a version from the registry."""
    registry = registry_in(home)
    record = registry.remove(ref, force=force)
    children, left = registry.made_from(record), [other.ref for other in registry.versions(record.name)]
    if as_json:
        print_json({"removed": record.ref, "digest": record.digest, "made_from_it": children, "other_versions": left})
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
