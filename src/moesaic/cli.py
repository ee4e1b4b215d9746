"""The `moesaic` command. A command here only names its options; the work is in its room.

Exit codes: 0 done, 1 a defect of moesaic, 2 input or machine not as needed (one line on stderr
says what and the remedy), 130 interrupted. `MOESAIC_DEBUG=1` shows the traceback instead.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Mixture-of-Experts layers, fast, exact and observable.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

STYLES = {"ok": "green", "note": "yellow", "missing": "red"}


def one_line(error: BaseException) -> str:
    """The message of `error` without line breaks; its type when it has none."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def edge() -> Iterator[None]:
    """Turn what a command raises into one line and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        print("moesaic: interrupted", file=sys.stderr)
        raise typer.Exit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except (typer.Exit, typer.Abort):
        raise
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        if os.environ.get("MOESAIC_DEBUG") == "1":
            raise
        print(f"moesaic: {one_line(error)}", file=sys.stderr)
        raise typer.Exit(2) from None
    except Exception as error:
        if os.environ.get("MOESAIC_DEBUG") == "1":
            raise
        print(
            f"moesaic: a defect, {type(error).__name__}: {one_line(error)}; "
            "please report what MOESAIC_DEBUG=1 shows",
            file=sys.stderr,
        )
        raise typer.Exit(1) from None


def _version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        print(f"moesaic {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show it and exit."),
    ] = False,
) -> None:
    """Mixture-of-Experts layers, fast, exact and observable."""


@app.command()
def run(
    model: Annotated[
        Path | None,
        typer.Argument(
            help="A byte-level MoE model in one .safetensors file, or the directory of "
            "a transformers model; default: embedded."
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Any UTF-8 file; default: held-out text of the package.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the report's directory appears.")] = Path("runs"),
    limit: Annotated[int | None, typer.Option("--bytes", help="Score at most so many.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    trace_ids: Annotated[
        bool, typer.Option("--trace-ids", help="Record every token's experts in the trace.")
    ] = False,
    generate: Annotated[
        int | None, typer.Option("--generate", help="Generate so many tokens instead.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What --generate continues.")] = None,
) -> None:
    """A language model over a text, through moesaic and through the sequential loop."""
    with edge():
        from .run import command

        if generate is not None or prompt is not None:
            from .run import generate as room

            raise typer.Exit(
                room.main(
                    model, tokens=generate, text=text, prompt=prompt, device=device, dtype=dtype
                )
            )
        if model is not None and model.is_dir():
            from .run import pretrained

            raise typer.Exit(
                pretrained.main(
                    model,
                    text=text,
                    out=out,
                    limit=limit,
                    device=device,
                    dtype=dtype,
                    trace_ids=trace_ids,
                )
            )
        code = command.main(
            model,
            text=text,
            out=out,
            limit=limit,
            device=device,
            dtype=dtype,
            trace_ids=trace_ids,
        )
        raise typer.Exit(code)


@app.command()
def bench(
    suite: Annotated[str | None, typer.Option(help="Measure this suite; none: list them.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Recompute the summaries of --out; 1 if one differs.")
    ] = False,
    list_suites: Annotated[bool, typer.Option("--list", help="Show the suites.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Cells of this model only.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Cells of so many tokens only.")] = None,
    routing: Annotated[list[str] | None, typer.Option(help="Cells of this routing only.")] = None,
    clock: Annotated[list[str] | None, typer.Option(help="Cells of this clock only.")] = None,
    out: Annotated[Path, typer.Option(help="Where results are kept.")] = Path("benchmarks/results"),
    budget: Annotated[
        float | None, typer.Option("--budget-s", "--budget", help="Seconds to spend.")
    ] = None,
    missing: Annotated[bool, typer.Option("--missing", help="Unmeasured cells only.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random inputs.")] = 0,
    gpus: Annotated[int | None, typer.Option(help="One process a GPU, by torchrun.")] = None,
) -> None:
    """Measurements, with the best of other implementations beside ours."""
    with edge():
        from .bench import command

        code = command.main(
            suite=suite,
            check_only=check,
            list_only=list_suites,
            only=only or (),
            tokens=tokens or (),
            routing=routing or (),
            clock=clock or (),
            out=out,
            budget_s=budget,
            missing=missing,
            device=device,
            seed=seed,
            gpus=gpus,
        )
        raise typer.Exit(code)


@app.command()
def report(
    page: Annotated[Path | None, typer.Option(help="The page to fill; none: all.")] = None,
    results: Annotated[Path, typer.Option(help="Folder of results.")] = Path("benchmarks/results"),
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; 1 if the page is stale.")
    ] = False,
) -> None:
    """Fill the tables and plots of the documentation from the committed lines."""
    with edge():
        from .bench import report as room

        raise typer.Exit(room.main(page=page, root=results, check=check))


@app.command()
def profile(
    trace: Annotated[
        Path, typer.Argument(help="A routing trace, such as `run` writes, or a model's directory.")
    ],
    every: Annotated[int, typer.Option(help="Steps of one profile, of a trace.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="JSON lines, a new file; of a model: folder of reports.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="What a model reads; UTF-8.")] = None,
    limit: Annotated[int | None, typer.Option("--bytes", help="Of the text, at most.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """What a recorded trace, or a model on a text, says of experts: loads, hot and cold, drift."""
    with edge():
        if trace.is_dir():
            from .run import profiling

            raise typer.Exit(
                profiling.main(
                    trace,
                    text=text,
                    out=out or Path("runs"),
                    limit=limit,
                    device=device,
                    dtype=dtype,
                )
            )
        from .integrations import top as room

        raise typer.Exit(room.show_trace(trace, every=every, out=out))


@app.command()
def top(
    source: Annotated[
        str, typer.Argument(help="A Prometheus endpoint (http://...) or a file of JSON lines.")
    ] = "http://127.0.0.1:9464/metrics",
    interval: Annotated[float, typer.Option("--interval-s", help="Seconds between looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Show it once.")] = False,
) -> None:
    """A live view of the experts of a job that is being profiled."""
    with edge():
        from .integrations import top as room

        raise typer.Exit(room.main(source, interval_s=interval, once=once))


@app.command()
def plan(
    model: Annotated[Path, typer.Option(help="A Hugging Face config.json, or YAML of ours.")],
    cluster: Annotated[str, typer.Option(help="A YAML file, or a preset: H200x4 is 4 nodes.")],
    workload: Annotated[
        Path | None, typer.Option(help="A YAML file; none: decode, 64 sequences a GPU.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for report, JSON, placement.")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say what binds and what would change the verdict.")
    ] = False,
    results: Annotated[Path, typer.Option(help="Measured lines.")] = Path("benchmarks/results"),
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; none: every core.")] = None,
    layers: Annotated[int, typer.Option(min=1, help="Layers whose routing is sampled.")] = 4,
) -> None:
    """What a deployment will do, before the cluster is rented; the advice may be "don't"."""
    with edge():
        from .planner import command

        code = command.main(
            model=model,
            cluster=cluster,
            workload=workload,
            out=out,
            explained=explain,
            results=results,
            workers=workers,
            layers=layers,
        )
        raise typer.Exit(code)


@app.command()
def tune(
    model: Annotated[
        str | None,
        typer.Argument(help="A known name, a transformers directory, or its config.json."),
    ] = None,
    experts: Annotated[int | None, typer.Option(help="E, instead of a model.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="K.")] = None,
    hidden: Annotated[int | None, typer.Option(help="H.")] = None,
    intermediate: Annotated[int | None, typer.Option(help="I.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Token counts; none: 1 to 8192.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    impl: Annotated[str, typer.Option(help="triton, hopper or all.")] = "all",
    budget: Annotated[float, typer.Option("--budget-s", help="Seconds to spend.")] = 600.0,
    out: Annotated[Path | None, typer.Option(help="A table; none: the user's cache.")] = None,
) -> None:
    """The fastest tiles of a layer on this GPU, measured and kept for later runs."""
    with edge():
        from .bench.tuning import command

        code = command.main(
            model,
            experts=experts,
            top_k=top_k,
            hidden=hidden,
            intermediate=intermediate,
            tokens=tokens or (),
            dtype=dtype,
            impl=impl,
            budget_s=budget,
            out=out,
        )
        raise typer.Exit(code)


@app.command()
def slices(
    explain: Annotated[
        bool, typer.Option("--explain", help="What each policy would do, and why.")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure time over SMs now, and keep it.")
    ] = False,
    curves: Annotated[Path | None, typer.Option(help="Lines of suite colocation.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1.")] = None,
) -> None:
    """How this GPU can be shared: SMs, memory, MIG, green contexts, measured time over SMs."""
    with edge():
        from .bench import slices_command

        code = slices_command.main(
            explain_plans=explain, measure_now=measure, given=curves, device=device
        )
        raise typer.Exit(code)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """What was found on this machine, what is missing, and the remedy."""
    with edge():
        from .hardware.doctor import examine

        findings = examine()
        if as_json:
            print(json.dumps([asdict(finding) for finding in findings]))
            return
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table("", "what", "found", "remedy", box=None)
        for f in findings:
            cells = (Text(cell, overflow="fold") for cell in (f.name, f.found, f.remedy))
            table.add_row(Text(f.status, STYLES[f.status]), *cells)
        Console().print(table)


def main() -> None:
    """Run the command line."""
    app()
