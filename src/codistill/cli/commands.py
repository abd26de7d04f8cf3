"""What each command does, once its options are parsed."""

from __future__ import annotations

import builtins
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codistill.cli.console import RichReporter, err, members_table, out, print_rows
from codistill.cli.options import DemoOptions, EvaluateOptions, ExportOptions, ListOptions, Parsed, PredictOptions
from codistill.config.config import Config
from codistill.config.methods import METHODS
from codistill.utils.errors import InputError, suggest

if TYPE_CHECKING:
    from codistill.data import Loader
    from codistill.training.run import Run


def train(parsed: Parsed) -> int:
    """Train one run, or one a seed."""
    from codistill.distributed.launch import shutdown
    from codistill.training.loop import train as run

    config: Config = parsed.options
    if parsed.seeds is None:
        configs = [config]
    else:
        base = config.resolved().out if config.out is None else config.out
        folder = str(base).removesuffix(f"-seed{config.seed}")
        configs = [dataclasses.replace(config, seed=s, out=f"{folder}/seed{s}") for s in range(parsed.seeds)]
    for one in configs:
        result = run(one, RichReporter())
        if result.training.mesh.rank:
            continue  # the main rank prints
        figures = result.figures
        title = f"test set, last epoch ({figures['epochs']} epochs, {figures['seconds']:.0f} s)"
        out.print(members_table(figures["test"], figures["deployed"], title, figures.get("test_ema")))
        if "best_test" in figures:
            best = figures["best_test"]
            line = f"best test epoch ({best['epoch']}, chosen on the test set): {best['top1']:.2f} %"
            out.print(line)
        out.print(f"run folder: {result.folder}")
    shutdown()
    return 0


def evaluate(parsed: Parsed) -> int:
    """Measure a run's members on one of its splits, or on another set."""
    from codistill.data.external_test_set import load_other
    from codistill.training.build import load_run, load_without_images
    from codistill.training.loaders import curve_loader, make_loader, test_loader
    from codistill.training.student import deployed_name
    from codistill.training.summary import evaluate_run
    from codistill.utils.cpu_memory import keep_freed_memory

    options: EvaluateOptions = parsed.options
    if options.data is not None and not options.calibrate:  # the run's own images need not be there
        run = load_without_images(parsed.words[0], options.device, checkpoint=options.checkpoint)
    else:
        run = load_run(parsed.words[0], options.data_dir, options.device, options.checkpoint)
    if run.device.type == "cpu":
        keep_freed_memory()
    if options.data is not None:
        images, labels, note = load_other(options.data, options.data_dir, run.data.about())
        if note:
            err.print(f"{options.data}: {note}", style="dim", markup=False)
        loader = make_loader(run.config, run.data, (images, labels), run.device)
    elif options.split == "val":
        if not len(run.splits.val):
            raise InputError("--split val: this run kept no validation part (--val-fraction 0 or --protocol paper)")
        loader = curve_loader(run)
    else:
        loader = test_loader(run)
    assert loader is not None
    measured = evaluate_run(run, loader)
    more = _judge(run, loader, options, Path(parsed.words[0]))
    if options.json:
        print(json.dumps(measured | {"deployed": deployed_name(run)} | more))
    else:
        title = f"{options.data or f'{run.config.data} {options.split}'}, {loader.num_samples:,} images"
        out.print(members_table(measured["members"], deployed_name(run), title, measured["ema"]))
        _print_judged(more, deployed_name(run))
    return 0


def _judge(run: Run, loader: Loader, options: EvaluateOptions, folder: Path) -> dict[str, Any]:
    """Return what --per-class, --confusion and --calibrate ask for, and write what they keep."""
    if not (options.per_class or options.confusion or options.calibrate):
        return {}
    from codistill.evaluation import calibration as judging
    from codistill.training.loaders import curve_loader
    from codistill.training.student import deployed_scores
    from codistill.utils.files import read_json, write_json

    scores_NC, labels_N = deployed_scores(run, loader)
    more: dict[str, Any] = {}
    if options.per_class or options.confusion:
        counts_CC = judging.confusion_matrix(scores_NC.argmax(-1), labels_N, len(run.data.classes))
        if options.per_class:
            more["classes"] = judging.class_rows(counts_CC, run.data.classes)
        if options.confusion:
            judging.write_confusion(Path(options.confusion), counts_CC, run.data.classes)
            more["confusion"] = options.confusion
    if options.calibrate:
        validation = curve_loader(run) if len(run.splits.val) else None
        if validation is None:
            raise InputError("--calibrate fits on validation images, and this run kept none (--val-fraction 0)")
        temperature = judging.fit_temperature(*deployed_scores(run, validation))
        name = "temperature" if options.checkpoint == "last" else f"temperature_{options.checkpoint}"
        write_json(folder / "data.json", (read_json(folder / "data.json") or run.data.about()) | {name: temperature})
        more["calibration"] = [judging.calibration(scores_NC, labels_N, value) for value in (1.0, temperature)]
    return more


def _print_judged(more: dict[str, Any], name: str) -> None:
    if "classes" in more:
        write = lambda v: "-" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v)  # noqa: E731
        print_rows([{k: write(v) for k, v in row.items()} for row in more["classes"]], f"{name}, class by class")
    if "calibration" in more:
        rows = [{"temperature": f"{c['temperature']:.4f}", "ECE": f"{c['ece']:.4f}", "NLL": f"{c['nll']:.4f}"}
                for c in more["calibration"]]  # fmt: skip
        print_rows(rows, f"{name}, without and with the temperature fitted on validation (kept for predict)")
    if "confusion" in more:
        out.print(f"confusion matrix: {more['confusion']}")


def predict(parsed: Parsed) -> int:
    """Print what the deployed student sees in image files; a file that cannot be read is said so in its row."""
    from codistill.deploy.predict import as_csv, image_files, load_predictor
    from codistill.deploy.predict import predict as guess

    options: PredictOptions = parsed.options
    for name, value in (("top", options.top), ("batch-size", options.batch_size)):
        if value < 1:
            raise InputError(f"--{name} is {value}; give at least 1")
    files = image_files(parsed.words[1:])
    predictor = load_predictor(parsed.words[0], options.device, options.checkpoint)
    top = min(options.top, len(predictor.about["classes"]))
    rows = [*guess(predictor, files, top, options.batch_size)]
    print(
        json.dumps(rows, indent=2, ensure_ascii=False) if options.json else as_csv(rows, top), end="\n" * options.json
    )
    bad = [row for row in rows if "error" in row]
    if len(bad) == len(rows):
        raise InputError(f"predict: none of the {len(rows)} files can be read ({bad[0]['error']})")
    return 0


def compare(parsed: Parsed) -> int:
    """Train methods side by side and print the table."""
    from codistill.cli.compare import compare as run

    return run(parsed.words, parsed.options)


def reproduce(parsed: Parsed) -> int:
    """Train a published table anew."""
    from codistill.cli.reproduce import reproduce as run

    return run(parsed.words[0], parsed.options)


def report(parsed: Parsed) -> int:
    """Write the page."""
    from codistill.reproduce.report.page import write_report

    path = Path(parsed.options.out)
    about = write_report([Path(word) for word in parsed.words], path, parsed.options.title)
    out.print(f"wrote {path}: {about}")
    return 0


def demo(parsed: Parsed) -> int:
    """Run the demo's comparison."""
    from codistill.cli.compare import compare as run
    from codistill.reproduce.recipes.demo import METHODS as DEMO_METHODS
    from codistill.reproduce.recipes.demo import demo as recipe

    options: DemoOptions = parsed.options
    config = recipe(options.data)
    config = dataclasses.replace(
        config,
        data_dir=options.data_dir,
        out=options.out or f"demo/{options.data}",
        seeds=options.seeds,
        workers=options.workers,
    )
    return run(DEMO_METHODS, config)


def export(parsed: Parsed) -> int:
    """Write the deployed student, check it against the run, write its model card, and say so."""
    from codistill.deploy.export import SUFFIXES, export_student
    from codistill.deploy.model_card import model_card
    from codistill.training.build import load_run, load_without_images
    from codistill.training.student import deployed_name as deployed
    from codistill.utils.files import write_atomically

    options: ExportOptions = parsed.options
    folder = Path(parsed.words[0])
    path = Path(options.out) if options.out else folder / f"student{SUFFIXES[options.format]}"
    try:
        run = load_run(folder, options.data_dir, "cpu", options.checkpoint)
    except InputError as error:  # perhaps its images alone are missing, and noise does to compare outputs
        run = load_without_images(folder, "cpu", why=str(error), checkpoint=options.checkpoint)
        err.print(f"the file is checked on noise, for the run's own images are not there ({error})", markup=False)
    difference = export_student(run, path, options.format)
    card = path.with_suffix(".md")
    text = model_card(run, folder, path, difference, options.license, options.checkpoint)
    write_atomically(card, lambda stream: stream.write(text.encode()))
    beside = [card.name] + ["student.py"] * path.with_name("student.py").exists()
    out.print(f"wrote {path}, and {' and '.join(beside)} beside it")
    out.print(
        f"largest difference of its outputs, in its own runtime, from the trained {deployed(run)}'s: {difference:.3g}"
    )
    return 0


def list(parsed: Parsed) -> int:
    """Show the methods, the models or the data sets."""
    what = parsed.words[0]
    if what == "methods":
        rows = [
            {
                "method": name,
                "what it is": " ".join((c.__doc__ or "").split()),
                "topologies": ", ".join(c.topologies),
                "peers": f"{c.default_peers} ({c.min_peers} at least)",
            }
            for name, c in METHODS.items()
        ]
    elif what == "models":
        from codistill.models import MODELS
        from codistill.models.external import EXTERNAL_MODELS
        from codistill.utils.parameters import count_parameters

        rows = [
            {
                "model": n,
                "parameters at 100 classes": f"{count_parameters(f()):,}",
                "what it is": (f.__doc__ or "").strip(),
            }
            for n, f in MODELS.items()
        ]
        rows += [
            {"model": say, "parameters at 100 classes": "-", "what it is": about}
            for say, about in EXTERNAL_MODELS.items()
        ]
    elif what == "data":
        from codistill.data.datasets import SETS

        rows = [{"data": name, "what it is": about} for name, about in SETS.items()]
    elif what == "tables":
        from codistill.reproduce.published_tables import published_tables
        from codistill.reproduce.recipes import TABLES

        rows = [
            {
                "table": name,
                "data": published["data"],
                "paper": f"{published['paper'].rpartition('. ')[2]}, {published['place']}",
                "networks": ", ".join(TABLES[name].networks),
                "methods": ", ".join(TABLES[name].methods),
            }
            for name, published in published_tables().items()
        ]
    elif what == "branch-points":
        rows, what = branch_point_rows(parsed.options), f"where {parsed.options.model} may fork (--branch-at)"
    else:
        raise InputError(
            f'list: unknown "{what}"{suggest(what, ("methods", "models", "data", "tables", "branch-points"))}'
        )
    print_rows(rows, what)
    return 0


def branch_point_rows(options: ListOptions) -> builtins.list[dict[str, str]]:
    """Return the places where a network may fork, in the order in which they run."""
    from codistill.models import build, resolve
    from codistill.models.external import Source
    from codistill.peers.branch_points import branch_points, default_fork
    from codistill.peers.split_head import dummy_input, split_head

    factory = resolve(options.model)
    if options.image_size is not None and options.image_size < 8:
        raise InputError(f"--image-size is {options.image_size}; give 8 or more")
    size = options.image_size or (factory.native_size if isinstance(factory, Source) else None)
    size = size or (224 if isinstance(factory, Source) and factory.is_library else 32)
    model = build(factory, num_classes=100, in_channels=3, image_size=options.image_size)
    example = dummy_input(model, 3, size)
    member = split_head(model, example)
    points = branch_points(member.body, member.head_path, example)
    try:
        chosen = default_fork(options.model, member, 3, size)
    except InputError:  # a network of one's own has no default
        chosen = None
    whole = sum(p.numel() for p in member.parameters())
    return [
        {
            "module": point.path + (" (default)" if point.path == chosen else ""),
            "entering": " x ".join(map(str, point.entering)),
            "in every branch": f"{100 * (point.after + member.head_parameters) / whole:.0f} %",
            "parameters a branch": f"{point.after + member.head_parameters:,}",
        }
        for point in points
    ]
