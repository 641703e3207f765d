"""The ``mmkit`` command: parses, calls, prints. The only place that prints, and the only broad ``except``."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import mmkit
from mmkit import cli_data
from mmkit.bench import BENCHMARKS
from mmkit.config import EvalRecipe, FinetuneRecipe, ProbeRecipe, Recipe, dump_recipe, load_recipe
from mmkit.distributed.preemption import leave_on_signals
from mmkit.errors import EXIT_BUG, EXIT_DONE, EXIT_INPUT, EXIT_STOPPED, InputError, LostError, StoppedError
from mmkit.eval.names import BUILT_IN
from mmkit.files import disk_trouble
from mmkit.recipes import copy_recipe, describe, find_recipe, list_recipes, list_tasks
from mmkit.run import Run

EXIT_INTERRUPTED = 130  # the shell's own code for Ctrl-C

app = typer.Typer(
    name="mmkit",
    help="From raw image-text pairs to a table fit for a paper.",
    no_args_is_help=True,
    add_completion=False,
    # main() prints errors itself; Typer's framed tracebacks would bury the one line.
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Make the demo world; look into a data set; write shards.", no_args_is_help=True)
app.add_typer(data_app, name="data")

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or a shipped recipe's name (`mmkit ls`).")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. train.lr=1e-3.")]
Restart = Annotated[bool, typer.Option("--restart", help="Throw away what the run directory holds and start anew.")]


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code: 0 done, 2 wrong input, 75 stopped by a signal, 1 a bug."""
    # On the call, not on import: a notebook's logging is its own.
    _set_up_logging()
    try:
        words = sys.argv[1:] if arguments is None else arguments
        # DeepSpeed's launcher adds --local_rank; the environment says the same, and that is what is read.
        arguments = [w for w in words if not w.startswith("--local_rank=")]
        # Typer turns Ctrl-C into a return value of 130; commands themselves return nothing.
        # Not standalone: Typer would print errors in its own form and choose its own exit codes.
        code = int(app(args=arguments, standalone_mode=False) or EXIT_DONE)
        # Inside the try: a pipe that has been closed shows now, not while the interpreter ends.
        sys.stdout.flush()
        if code == EXIT_INTERRUPTED:
            _complain("interrupted")
    except InputError as error:
        _complain(str(error))
        code = EXIT_INPUT
    except typer.TyperException as error:
        # `mmkit` or `mmkit data` alone: typer's message is the whole help, a page that is no use on one line.
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)
        else:
            # Of the command that was given, where the parser came that far.
            context = getattr(error, "ctx", None)
            _complain(error.format_message(), hint=f"{context.command_path if context else 'mmkit'} --help")
        code = EXIT_INPUT
    except StoppedError as error:
        _complain(str(error))
        code = EXIT_STOPPED
    except (KeyboardInterrupt, typer.Abort):
        _complain("interrupted")
        code = EXIT_INTERRUPTED
    except LostError as error:
        # From whichever process is left: the main one may be the one that was lost.
        _complain(str(error), everywhere=True)
        code = EXIT_BUG
    # Those that come of a path the user chose.
    except (PermissionError, NotADirectoryError, IsADirectoryError) as error:
        _complain(f"{error.filename2 or error.filename}: {error.strerror}; choose another place, or mend its rights")
        code = EXIT_INPUT
    except (BrokenPipeError, SystemExit) as error:
        # `mmkit ls | head`: the reader has enough. Typer makes an exit with 1 of it.
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        # Without this Python complains once more when it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_DONE
    # The one broad except: a traceback to report, and an exit code that tells a bug from wrong input.
    except Exception as error:
        # Writes of mmkit's own say this themselves; a tracker's or another library's come here.
        trouble = disk_trouble(error, getattr(error, "filename", None))
        if trouble is None:
            traceback.print_exc()
        _complain(str(trouble or "this is a bug in mmkit; please report it with the lines above"))
        code = EXIT_BUG if trouble is None else EXIT_INPUT
    sys.exit(code)


def _complain(text: str, *, hint: str = "", everywhere: bool = False) -> None:
    """One line on standard error, from the main process only unless ``everywhere``."""
    if everywhere or int(os.environ.get("RANK", "0")) == 0:
        # Messages of libraries bring line breaks; whoever reads a log of many processes reads by line.
        line = " ".join(text.split())
        print(f"mmkit: {line}{f' (see {hint})' if hint else ''}", file=sys.stderr)


def _set_up_logging() -> None:
    """Plain lines on standard error; other libraries only when something is wrong."""
    # The same line from every rank would be noise; an error of one rank is not.
    level = logging.INFO if int(os.environ.get("RANK", "0")) == 0 else logging.ERROR
    # The root stays at WARNING, because other libraries' progress lines would bury the run's own.
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("mmkit").setLevel(level)
    # Through logging, so that they carry the time and go where the other lines go.
    logging.captureWarnings(True)
    # It says on import, at every start, that a CPU kernel of its own is not there.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # The tokenizers library warns in each forked loader worker otherwise. setdefault: the user's own choice stays.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # bars in a log file are noise


def _say(text: str) -> None:
    """A line of the command's result, from the main process only."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(text)


def _spoken(command: Callable[..., list[str]]) -> Callable[..., None]:
    """The command with its lines printed."""

    # With the signature of the command, from which its options are made.
    @functools.wraps(command)
    def run(**given: Any) -> None:
        for line in command(**given):
            _say(line)

    return run


for _command in cli_data.COMMANDS:
    data_app.command(_command.__name__)(_spoken(_command))


def _load(name: str, overrides: list[str] | None) -> Recipe:
    """A recipe with its overrides."""
    return load_recipe(find_recipe(name), overrides or [])


def _version(show: bool) -> None:
    """Print the version and leave."""
    if show:
        print(f"mmkit {mmkit.__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False) -> None:
    """From raw image-text pairs to a table fit for a paper."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the world, the runs and the report.")] = Path("runs/demo"),
    clip: Annotated[bool, typer.Option("--clip", help="Also train CLIP on the same samples, as a row to compare with.")] = False,
    restart: Restart = False,
) -> None:
    """The whole pipeline on the built-in demo world, on a CPU or GPU, to a report."""
    # Before the imports, which take seconds.
    with leave_on_signals():
        # Imported here, as in the commands below: --help and `mmkit ls` must not wait for torch (a test holds them to it).
        from mmkit.demo import run_demo

        report = run_demo(out, clip=clip, restart=restart)
        _say(f"report: {report}")


@app.command()
def train(recipe: RecipeName, overrides: Overrides = None, restart: Restart = False) -> None:
    """Train a stage: superclass, clip, lit, finetune, clipcap or llava, as the recipe says."""
    with leave_on_signals():
        from mmkit.commands import run_train

        _done(run_train(_load(recipe, overrides), restart=restart), "model")


@app.command()
def probe(recipe: RecipeName, overrides: Overrides = None, restart: Restart = False) -> None:
    """Linear probe, k-shot, k-NN and zero-shot on a frozen encoder, or full fine-tuning, with a score."""
    with leave_on_signals():
        from mmkit.commands import run_finetune
        from mmkit.encoders.probing import run_probe

        # Fine-tuning trains, but what comes out is a score on labelled pictures, so it shares this verb.
        loaded = _load(recipe, overrides)
        if isinstance(loaded, FinetuneRecipe):
            _done(run_finetune(loaded, restart=restart), "scores.json")
        else:
            _done(run_probe(_expect(loaded, ProbeRecipe), restart=restart), "scores.json")


@app.command("eval")
def evaluate(recipe: RecipeName, overrides: Overrides = None, restart: Restart = False) -> None:
    """Generate and score one or more tasks with one model."""
    with leave_on_signals():
        from mmkit.eval.run import run_eval

        _done(run_eval(_expect(_load(recipe, overrides), EvalRecipe), restart=restart), "scores.json")


def _expect(recipe: Recipe, kind: type[Any]) -> Any:
    """The recipe, if it is of the kind that the command takes."""
    # `mmkit eval` with a training recipe would otherwise fail somewhere inside, on a key that is not there.
    if not isinstance(recipe, kind):
        raise InputError(f"this is a recipe of stage {recipe.stage}", where="stage", mend="use the command for that stage")
    return recipe


def _done(run: Run, product: str) -> None:
    """Say where the result lies, and the scores of an evaluation."""
    from mmkit.commands import score_lines

    # Read back from the file: a run that was done before prints the same as a fresh one.
    for line in score_lines(run.path / "scores.json") if product == "scores.json" else []:
        _say(line)
    _say(f"done: {run.path / product}")


@app.command()
def score(
    task: Annotated[str, typer.Argument(metavar="TASK", help=f"{', '.join(BUILT_IN)}, or a plug-in's.")],
    predictions: Annotated[Path, typer.Option(help="Result file, as the task's evaluator takes it.")],
    annotations: Annotated[Path, typer.Option(help="Official annotation file or folder; of generic, your questions.")],
    questions: Annotated[Path | None, typer.Option(help="Question file, where the task has one apart.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the scores as JSON.")] = None,
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. rule=2017 metric=anls")] = None,
) -> None:
    """Official scoring of a result file, without a model; docs/suites.md has every suite's files and settings."""
    from mmkit.eval.score import parse_settings
    from mmkit.eval.score import score as run
    from mmkit.files import check_target, write_json

    if out is not None:
        # Before minutes of scoring.
        check_target(out)
    # Text becomes numbers here; the Python function takes them as they are and is as strict.
    chosen = parse_settings(task, _settings(settings))
    found = run(task, predictions, annotations, questions, **chosen)
    for metric, value in found["metrics"].items():
        low, high = found["ci95"].get(metric, (None, None))  # none with bootstrap=0, or where no resample gave a value
        _say(f"{metric:16} {value:.6f}" + (f"  [{low:.4f}, {high:.4f}]" if low is not None else ""))
    # Conditions on the same screen as the numbers; lists and counters are in the file.
    _say(f"n {found['n']}  " + "  ".join(f"{k}={v}" for k, v in found["settings"].items() if not isinstance(v, dict | list)))
    if out is not None:
        write_json(out, found)
        _say(f"written: {out}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Finished runs; results of lmms-eval, files or folders.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html, .md, .tex, .csv and .json.")],
    title: Annotated[str, typer.Option(help="Title of the report.")] = "mmkit report",
    gallery: Annotated[int, typer.Option(min=0, help="Pictures in the gallery, with all that was asked about them.")] = 1000,
    thumbnail: Annotated[int, typer.Option(min=32, max=512, help="Longest side of a gallery picture, px.")] = 128,
) -> None:
    """One self-contained HTML report (and Markdown, LaTeX, CSV, JSON) over any set of runs."""
    from mmkit.eval.report import build_report

    _say(f"report: {build_report(runs, out, title=title, gallery=gallery, thumbnail=thumbnail)}")


@app.command()
def predict(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run, a model folder, or timm:NAME.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Picture files.")],
    prompt: Annotated[str | None, typer.Option(help="Question to an MLLM.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Length limit; number of tags for an encoder.")] = None,
    decoding: Annotated[str | None, typer.Option(help="search, sample, or paper (ClipCap's beams).")] = None,
    num_beams: Annotated[int | None, typer.Option(min=1, help="Beams; 1 is greedy.")] = None,
    length_penalty: Annotated[float | None, typer.Option(help="Beams: exponent of the length that divides a score.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of sampling.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sampling: the likeliest tokens of this mass.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sampling: the likeliest tokens of this number.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of sampling; a text depends on it and on the picture alone.")] = None,
) -> None:
    """Tags (encoder), a caption (captioner) or an answer (MLLM) for pictures; what is not given is the model's own."""
    from mmkit.commands import predict_files

    # What of the settings is None is the model's own.
    how = {"decoding": decoding, "num_beams": num_beams, "length_penalty": length_penalty, "temperature": temperature}
    how |= {"max_new_tokens": max_new_tokens, "top_p": top_p, "top_k": top_k, "seed": seed}
    for path, text in zip(images, predict_files(model, images, prompt, how), strict=True):
        # A single text stands alone, fit for a shell variable.
        _say(f"{path}: {text}" if len(images) > 1 else text)


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run, or another encoder a recipe could name.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist or be empty.")],
    format_: Annotated[
        str | None, typer.Option("--format", help="Of an encoder: timm (the default), siglip or open_clip; of an MLLM: llava.")
    ] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Write the product as of this step (or newest) instead.")] = None,
) -> None:
    """Convert a run's model for other people's software and check it there; or make the product of a checkpoint."""
    if checkpoint is not None:
        from mmkit.training.export import export_checkpoint

        # A checkpoint gives the run's own kind of product, which can be converted after.
        if format_ is not None:
            raise InputError("--format and --checkpoint do not go together", mend="export the checkpoint, then its folder")
        written = export_checkpoint(run, out, checkpoint=checkpoint)
    elif format_ == "llava":
        from mmkit.models.export import export_llava

        written = export_llava(run, out)
    else:
        from mmkit.encoders.export import export_model

        written = export_model(run, out, format=format_ or "timm")
    _say(f"done: {written}")


@app.command()
def plan(
    recipe: RecipeName,
    gpus: Annotated[int, typer.Option(min=1, help="Processes, one a GPU.")],
    gpu: Annotated[str, typer.Option(help="a100, a100-40g, h100, h200, b200, l40s, rtx4090 or rtx3090.")] = "h100",
    gpu_memory: Annotated[float | None, typer.Option(min=0.1, help="GiB of one GPU; else that of the kind.")] = None,
    tflops: Annotated[float | None, typer.Option(min=0.001, help="Peak of one; else that of its data sheet.")] = None,
    mfu: Annotated[float, typer.Option(min=0.001, max=1, help="Share of the peak that is reached: an assumption.")] = 0.4,
    samples: Annotated[int | None, typer.Option(min=1, help="In the data, where steps depend on it and it is not here.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Mean length of a padded sequence; else the longest.")] = None,
    longest: Annotated[int | None, typer.Option(min=1, help="Longest sequence; else the recipe's max_length.")] = None,
    encoder: Annotated[str | None, typer.Option(help="In place of an encoder that is not here: run, timm:NAME, recipe.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the table.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="One row of a Markdown table instead.")] = False,
    overrides: Overrides = None,
) -> None:
    """Memory of one GPU by part, steps, GPU-hours and the largest micro-batch of a training recipe, before GPUs are spent."""
    from mmkit.plan import make_plan
    from mmkit.plan.render import markdown_table, text

    how = {"gpu": gpu, "gpu_memory": gpu_memory, "tflops": tflops, "mfu": mfu, "samples": samples, "tokens": tokens}
    found = make_plan(_load(recipe, overrides), recipe, gpus=gpus, longest=longest, encoder=encoder, **how)  # type: ignore[arg-type]
    # JSON wins where both are asked for: whoever reads it is a program.
    shown = markdown_table([found]) if markdown else text(found)
    _say(json.dumps(found.as_json(), indent=2) if as_json else shown)


@app.command()
def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"{', '.join(BENCHMARKS)}.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. batch=256 threads=1")] = None,
) -> None:
    """A benchmark against its peer, both in this one run; ratios are what counts."""
    from mmkit.bench import run_bench

    found = run_bench(name, _settings(settings))
    width = max(map(len, found))
    for key, value in found.items():
        _say(f"{key:{width}}  {value}")


def _settings(items: list[str] | None) -> dict[str, str]:
    """``key=value`` words as a dictionary."""
    words = {}
    for item in items or []:
        # At the first sign only: a value may hold more.
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise InputError(f"setting {item!r} is not of the form key=value", mend="write e.g. threads=1")
        words[key] = value
    return words


@app.command("ls")
def list_() -> None:
    """List the shipped recipes, then the tasks of evaluations."""
    shipped = list_recipes() | list_tasks()
    width = max(map(len, shipped), default=0)
    for name, path in shipped.items():
        _say(f"{name:{width}}  {describe(path)}")


@app.command()
def copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe.")],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="File or folder.")],
) -> None:
    """Copy a shipped recipe, to be edited."""
    _say(f"written: {copy_recipe(name, dest)}")


@app.command()
def validate(
    recipe: RecipeName,
    overrides: Overrides = None,
    show: Annotated[bool, typer.Option("--show", help="Print the resolved recipe.")] = False,
) -> None:
    """Check a recipe and its overrides without starting anything."""
    from mmkit.validate import check_parts

    checked = _load(recipe, overrides)
    # What the schema cannot see: names and arguments of models, vocabularies.
    check_parts(checked)
    if show:
        _say(dump_recipe(checked))
    _say(f"valid: {recipe} (stage {checked.stage})")
