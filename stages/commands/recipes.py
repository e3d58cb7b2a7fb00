"""The commands for recipes and their runs: run, plan, sweep, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stages.commands.errors import reports_errors, stoppable
from stages.commands.options import Debug, Home, Json, Overrides, Recipe, home_folder, make_runtime, print_json, registry_in

if TYPE_CHECKING:
    from stages.memory.estimate import Machine


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
    runtime = make_runtime()
    runtime.waits_for_people = wait
    with stoppable(runtime):
        loaded = load_recipe(recipe, overrides or [], registry_in(home))
        for notice in loaded.notices():
            runtime.console.print(notice, soft_wrap=True)
        chain.run(loaded, home_folder(home), runtime, command=continue_command())
    runtime.leave()


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
    from stages.memory_plan.plan import plan_memory
    from stages.memory_plan.table import advice_lines, memory_table
    from stages.recipe.schema import load_recipe
    from stages.recipe.settings import preset_settings, settings_of_step, settings_table

    loaded = load_recipe(recipe, overrides or [], registry_in(home))
    commits = resolve_commits(loaded, needs_hub=False)
    loaded = pinned(loaded, commits)
    plans = planning.plan(loaded, home_folder(home), download=False)
    machine = _machine(device_memory)
    reused = {step.name: step.record.path for step in plans if step.action == "reuse" and step.record is not None}
    memory = plan_memory(loaded, registry_in(home), machine, reused=reused, processes=_processes())
    shown = {step.name: (settings_of_step if all_settings else preset_settings)(loaded, step) for step in loaded.steps}
    if as_json:
        settings = {name: [setting.as_json() for setting in values] for name, values in shown.items() if values}
        content = json.loads(planning.plans_json(loaded, plans, settings))
        print_json(
            {
                **content,
                "machine": {"name": machine.name, "bytes": machine.bytes},
                "memory": [step.as_json() for step in memory],
                "not_checked": commits.unreached,
            }
        )
        return
    console = make_runtime().console
    console.print(planning.plan_table(plans, loaded.name))
    for notice in loaded.notices():
        console.print(notice, soft_wrap=True)
    for message in commits.unreached:
        console.print(f"Not checked: {message}", soft_wrap=True)
    unseen = [step.name for step in loaded.steps if planning.on_hub(step)]
    if unseen:
        console.print(f"Not checked, because the data is on the Hub: the rows of {', '.join(unseen)}.")
    if memory:
        console.print(memory_table(memory, machine))
        for line in advice_lines(memory):
            console.print(line, soft_wrap=True)
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

    loaded = load_sweep(recipe, varied or [], home_folder(home), name, until, metric or [])
    runtime = make_runtime()
    if only_plan:
        runtime.console.print(plan_table(loaded, home_folder(home)))
        return
    if as_json:
        runtime.console.quiet = True
    with stoppable(runtime):
        result = run_sweep(loaded, home_folder(home), runtime, metric or [])
    if runtime.is_main and result.metrics:
        write_plot(result, result.folder / "plot.png", x)
    if as_json:
        print_json(result.as_json())
    else:
        runtime.console.print(result_table(result))
        runtime.console.print(f"Results and plot: {result.folder}", soft_wrap=True)
    if result.exit_status:
        raise typer.Exit(result.exit_status)


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
    folders = [read_run(path) for path in dict.fromkeys(find_run(name, home_folder(home)) for name in runs)]
    if len(folders) == 1:
        written = write_report(folders[0], output)
    else:
        check_output(output := output or Path("comparison.html"))
        written = write_comparison(folders, output)
    if as_json:
        runs_shown = [str(run.path) for run in folders]
        print_json({"path": str(written.path.absolute()), "bytes": written.size, "left_out": written.notes, "runs": runs_shown})
    else:
        typer.echo("\n".join([f"The report: {written.path} ({megabytes(written.size)})", *written.notes]))
