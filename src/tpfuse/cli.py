"""The command line: `tpfuse info`, `check`, `tune`, `generate`, `bench ops`, `bench model`. It starts its own ranks, or
runs as one of them under torchrun. Bad input is one line on stderr and exit code 2; a failed check, or run of a
model, is exit code 1.

Modules that import torch are imported inside the commands, so that `--help` is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tpfuse import __version__
from tpfuse.errors import InvalidArgument, TpfuseError
from tpfuse.launch import default_device, resolve_world, run_ranks, speaks

if TYPE_CHECKING:
    from tpfuse.bench.model_records import ModelRecord
    from tpfuse.launch import Progress as OnProgress

_UsageError: Any = typer.BadParameter.__bases__[0]  # typer brings click along under another name from 0.26 on

INTERRUPTED = 130  # the exit code that newer typers make of a KeyboardInterrupt; older ones raise Abort

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
bench = typer.Typer()
app.add_typer(bench, name="bench")

World = Annotated[int | None, typer.Option(help="Ranks to start.", show_default="one a GPU, or 2 on a CPU")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="cuda where there is a GPU")]
Mode = Annotated[str, typer.Option(help="fused, control (separate all-reduce and norm) or off (whole rows gathered).")]
Backend = Annotated[str, typer.Option(help="auto, cuda or collective.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"tpfuse {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _tpfuse(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Tensor-parallel communication fused with the normalisation beside it.

    Start with `tpfuse info` (what this machine can do), then `tpfuse check` (does it compute the right thing here)
    and `tpfuse bench ops` (how fast, against what).
    """
    _help_alone(context)


@app.command()
def info(json: Annotated[bool, typer.Option("--json", help="Print JSON, e.g. for a bug report.")] = False) -> None:
    """Show GPUs, links, and what each backend can do here and why not."""
    from json import dumps

    from tpfuse.info import collect, show

    found = collect()
    if json:
        print(dumps(found.as_dict(), indent=2))
    else:
        show(Console(), found)


@app.command()
def check(world: World = None, device: Device = None, backend: Backend = "auto", mode: Mode = "fused") -> None:
    """Run every op against the reference, over dtypes, widths, row counts and awkward values."""
    from tpfuse import check as checks

    device = _device(device)
    world = resolve_world(world, device)
    with _progress("check") as progress:
        results = run_ranks(checks.job, mode, backend, world=world, device_type=device, progress=progress)
    outcomes = checks.merge([outcomes for outcomes, _ in results])
    if speaks():
        checks.show(Console(), outcomes, f"{world} {device} ranks: requested {mode}, effective {results[0][1]}")
    if not all(outcome.ok for outcome in outcomes):
        raise typer.Exit(1)


@app.command()
def tune(
    world: World = None,
    device: Annotated[str, typer.Option(help="cuda: there is nothing to tune on a CPU.")] = "cuda",
    output: Annotated[
        Path | None, typer.Option(help="Write to this file.", show_default="where communicators look")
    ] = None,
) -> None:
    """Measure up to which size each way of reducing is the fastest here, and keep that for communicators."""
    from tpfuse.backends.cuda import tuning
    from tpfuse.bench import tune as tuner

    device = _device(device)
    if output is not None:
        _check_writable(output)
    path = output or tuning.tuning_file()
    tuning.read(path)  # what is no such file stays as it is
    with _progress("tune") as progress:
        found = tuner.run(world, device, progress=progress)
    if speaks():
        Console().print(tuner.report(found))
        tuning.save(path, found.model, found.world, found.thresholds)
        print(f"written: {path}")


@bench.callback(invoke_without_command=True)
def _bench(context: typer.Context) -> None:
    """Measure, with baselines beside it."""
    _help_alone(context)


@bench.command("ops")
def bench_ops(
    preset: Annotated[str, typer.Option(help="Whose shapes: minimax-m2, minimax-m3 or nemotron-h.")] = "minimax-m2",
    world: World = None,
    device: Device = None,
    mode: Mode = "fused",
    tokens: Annotated[
        str | None, typer.Option(help="Row counts, e.g. 1,8,64.", show_default="1 to 16384, or to 256 on a CPU")
    ] = None,
    op: Annotated[
        list[str] | None,
        typer.Option(help="Op to time; may be given several times.", show_default="all, or no variants on a CPU"),
    ] = None,
    baseline: Annotated[
        list[str] | None, typer.Option(help="Baseline to run; may be given several times.", show_default="all")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file, a JSON line each.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a plot to this file: .png, .pdf or .svg.")] = None,
) -> None:
    """Time every op of a model's shapes against baselines."""
    from tpfuse.bench import ops
    from tpfuse.bench.plot import check_plot

    device = _device(device)
    if plot is not None:
        check_plot(plot)
    for path in (json, plot):
        if path is not None:
            _check_writable(path)
    with _progress(f"bench {preset}") as progress:
        records = ops.run(
            preset,
            world=world,
            device_type=device,
            mode=mode,
            tokens=None if tokens is None else ops.parse_tokens(tokens),
            ops=op,
            baselines=baseline,
            progress=progress,
        )
    if speaks():
        ops.finish(Console(), records, json, plot, preset)


@bench.command("model")
def bench_model(
    preset: Annotated[str, typer.Option(help="minimax-m2, minimax-m3, nemotron-h, or a tiny-... one for a CPU.")] = (
        "minimax-m2"
    ),
    layers: Annotated[int | None, typer.Option(help="The first so many layers.", show_default="all")] = None,
    tp: World = None,
    device: Device = None,
    concurrency: Annotated[str, typer.Option(help="Requests at once, e.g. 1,10,64.")] = "1,10,64",
    input_len: Annotated[int, typer.Option("--in", help="Tokens of a prompt.")] = 2048,
    output_len: Annotated[int, typer.Option("--out", help="Tokens that a request gets.")] = 256,
    modes: Annotated[
        str | None,
        typer.Option(
            help="Of stock (transformers' own plan), off, control, fused.", show_default="all; no stock in pieces"
        ),
    ] = None,
    graphs: Annotated[
        str, typer.Option(help="CUDA graphs: none, full (a decode step in one) or piecewise (prompt and decode).")
    ] = "full",
    chunks: Annotated[
        str, typer.Option(help="With piecewise: time prefill chunks of so many tokens, e.g. 64,128,256,512.")
    ] = "",
    compiler: Annotated[
        str, typer.Option(help="With full or piecewise graphs: inductor.", show_default="none: the model's own code")
    ] = "",
    experts: Annotated[str, typer.Option(help="transformers' implementation of the experts.", show_default="its")] = "",
    profile: Annotated[
        Path | None, typer.Option(help="Write where the time of a decode step goes to this file, a JSON line a kernel.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file, a JSON line each.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a plot to this file: .png, .pdf or .svg.")] = None,
    results: Annotated[
        Path | None, typer.Option(help="Write figures and plot to this folder, named after the EFFECTIVE mode.")
    ] = None,
) -> None:
    """Time a whole model with random weights: prompt and decode."""
    from tpfuse.bench import model, session
    from tpfuse.bench.ops import parse_tokens
    from tpfuse.bench.plot import check_plot

    device = _device(device)
    if plot is not None:
        check_plot(plot)
    if results is not None:
        check_plot("results.png")
        _check_writable(results / "results.jsonl")
    for path in (json, plot, profile):
        if path is not None:
            _check_writable(path)
    kept = "" if profile is None else str(profile.absolute())
    sizes = parse_tokens(chunks, "--chunks") if chunks else ()
    at_once = parse_tokens(concurrency, "--concurrency")
    workload = session.Workload(at_once, input_len, output_len, graphs, sizes, compiler, experts, kept)
    asked = None if modes is None else [mode.strip() for mode in modes.split(",")]
    with _progress(f"bench {preset}") as progress:
        records = model.run(
            preset, layers=layers, world=tp, device_type=device, modes=asked, workload=workload, progress=progress
        )
    if speaks():
        _finish_model(records, json, plot, results, profile)
    if not all(record.ok for record in records):
        raise typer.Exit(1)


def _finish_model(
    records: Sequence[ModelRecord], json: Path | None, plot: Path | None, results: Path | None, profile: Path | None
) -> None:
    """Save, print and draw a run of models. What failed is told on stderr as well: stdout may be going to a file."""
    from tpfuse.bench import model_records
    from tpfuse.bench.records import write

    figures, pictures = [path for path in (json,) if path], [path for path in (plot,) if path]
    if results is not None:
        name = results / model_records.result_name(records)
        figures, pictures = [*figures, name], [*pictures, name.with_suffix(".png")]
    if not any(record.ok for record in records):
        pictures, profile = [], None  # of nothing
    for path in figures:
        write(records, path)  # type: ignore[arg-type]
    Console().print(model_records.report(records))
    for path in pictures:
        model_records.plot(records, path)
    for path in (*figures, *pictures, *([profile] if profile else [])):
        print(f"written: {path}")
    for line in model_records.failures(records):
        print(f"tpfuse: failed: {line}", file=sys.stderr)


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="A folder with config.json and safetensors, or a preset.")],
    prompt: Annotated[str, typer.Option(help="Text; token numbers as in 1,5,7 where there is no tokenizer.")],
    tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    tp: World = None,
    device: Device = None,
    mode: Mode = "fused",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16.", show_default="the checkpoint's")
    ] = None,
) -> None:
    """Generate from a model of transformers, divided over ranks. Text on stdout, what ran on stderr."""
    from tpfuse.integrations.transformers import generate as generating

    def show(done: int, total: int, text: str) -> None:
        print(text, end="", flush=True)

    device = _device(device)
    settings: Any = {"tokens": tokens, "mode": mode, "world": tp, "device_type": device, "dtype": dtype}
    found = generating.run(model, prompt, **settings, progress=show)
    if speaks():
        print()
        why = f" ({'; '.join(found.reasons)})" if found.reasons else ""
        rate = len(found.tokens) / found.seconds
        modes = f"requested {found.requested_mode}, effective {found.effective_mode}{why}"
        print(f"{len(found.tokens)} tokens, {rate:.1f} a second; {modes}", file=sys.stderr)


def _help_alone(context: typer.Context) -> None:
    """A command group called without a command shows its help."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def _device(device: str | None) -> str:
    if device not in (None, "cpu", "cuda"):
        raise InvalidArgument(f"--device {device}: supported: cpu, cuda.")
    return device or default_device()


def _check_writable(path: Path) -> None:
    """Before a long run: this file can be written after it. Changes nothing."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise InvalidArgument(f"{path}: the folder {folder} does not exist.")
    if path.is_dir():
        raise InvalidArgument(f"{path}: this is a folder; needed: the name of a file.")
    try:
        if path.is_file():
            path.open("ab").close()
        elif not path.exists():  # what is neither, a pipe or a device, is left alone
            TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InvalidArgument(f"{path}: can't be written: {error.strerror}.") from error


@contextmanager
def _progress(title: str) -> Iterator[OnProgress]:
    """A progress bar on stderr while the ranks work; nothing where stderr is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(title, total=None)

        def update(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=f"{title}: {what}")

        yield update


def main() -> None:
    """Entry point. Turns errors into one line and an exit code."""
    try:
        code = app(standalone_mode=False) or 0
    except _UsageError as error:
        message = error.format_message().strip()
        _stop(f"{message}{'' if message.endswith(('.', '?', '!')) else '.'} See `tpfuse --help`.")
    except TpfuseError as error:
        _stop(str(error))
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        print("tpfuse: interrupted", file=sys.stderr)
    sys.exit(code)


def _stop(message: str) -> NoReturn:
    print(f"tpfuse: error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
