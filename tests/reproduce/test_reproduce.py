"""Published tables: numbers, recipes, command lines, the grid and its tables."""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from codistill.cli.main import main
from codistill.cli.options import parse
from codistill.config.config import CompareConfig, Config, ReproduceConfig
from codistill.config.methods import OKDDipConfig
from codistill.reproduce.command_line import format_command
from codistill.reproduce.comparison import add_earlier_rows, plan_comparison, write_comparison
from codistill.reproduce.grid import Cell, GridStopped, run_grid
from codistill.reproduce.plan import make_plan
from codistill.reproduce.published_tables import load_published_tables
from codistill.reproduce.recipes import TABLES
from codistill.reproduce.recipes.table_recipe import scale_config
from codistill.reproduce.statistics import comparison_rows
from codistill.reproduce.table_figures import make_figures
from codistill.reproduce.table_folder import write_table
from codistill.reproduce.table_rows import make_table_rows, summarize_table
from codistill.utils.errors import InputError, StoppedEarly
from codistill.utils.files import write_json
from codistill.utils.tables import comma_separated, latex, markdown
from helpers.common import read_json
from helpers.tables import fake_plan, fake_result

TINY = {"model": "resnet8", "data": "digits", "train_per_class": 6, "batch_size": 16, "epochs": 2}


def every_cell():
    for name, recipe in TABLES.items():
        for network, method in recipe.select_cells((), (), name):
            yield name, network, method


def test_published_numbers_are_percentages_with_sources():
    for name, table in load_published_tables().items():
        assert table["source"], name
        assert table["measure"] in ("error", "accuracy")
        for row in table["rows"].values():
            for column, (mean, deviation) in row.items():
                assert 0 < mean < 100 or column == "gain", (name, column)
                assert deviation is None or 0 < deviation < 1


def test_every_published_table_has_a_recipe_and_numbers():
    assert load_published_tables().keys() == TABLES.keys()
    for name, table in load_published_tables().items():
        held = {(row, column) for row, columns in table["rows"].items() for column in columns}
        recipe = TABLES[name]
        cells = recipe.select_cells((), (), name)
        cells += [(n, teacher) for n in recipe.networks for teacher in recipe.teachers.values()]
        places = {(p.row, p.column) for n, m in cells for p in recipe.cell_refs(n, m)}
        assert {p for p in held - places if p[1] != "FFL-S" and p != ("Vanilla", "gain")} == set(), name


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["okddip_table5", "--scale", "smoke", "--device", "mps"], "this machine has none"),
        (["okddip_table2", "--network", "resnet32", "--data-dir", "/dev/null/none"], "can neither be read from"),
        (["kdcl_table6", "--data-dir", "none"], "there is no such folder"),
        (["okddip_table5", "--scale", "smoke", "--submit", "slurm"], "pip install"),
    ],
)
def test_a_table_that_no_run_could_fill_starts_none(words, sentence, tmp_path, monkeypatch, capsys):
    if "mps" in words and torch.backends.mps.is_available():
        pytest.skip("this machine has it")
    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *words, "--seeds", "1", "--out", "grid"]) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_vgg_has_dropout_in_branches_alone_as_in_okddips_scripts():
    for method in TABLES["okddip_table2"].methods:
        config = TABLES["okddip_table2"].config("vgg16", method)
        assert config.model == ("vgg16" if config.topology == "branches" else "vgg16_no_dropout",), method


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("okddip_table3", "ramps of 24 epochs"),
        ("okddip_table4", "the code averages logits"),
        ("okddip_table5", "without the second level 4 peers train"),
        ("pcl_cifar100", "peer 0 is judged"),
        ("pcl_imagenet", "a ramp of 24 epochs"),
        ("kdcl_table2", "lambda = 1 on ImageNet"),
        ("kdcl_table2", "slides weigh logits"),
        ("kdcl_table4", "200 epochs for MobileNets without"),
        ("kdcl_table5", "Table 2's schedule holds here"),
        ("kdcl_table7", "slides weigh logits"),
    ],
)
def test_what_no_source_states_is_named_below_the_table(table, words):
    assert words in "; ".join(TABLES[table].guesses)


@pytest.mark.parametrize("scale", ["smoke", "short", "full"])
def test_every_recipe_resolves_at_every_scale(scale):
    for name, network, method in every_cell():
        recipe = TABLES[name]
        full = recipe.config(network, method).resolved()
        small = scale_config(recipe.config(network, method), scale).resolved()
        assert small.peers == full.peers, (name, method)
        assert small.topology == full.topology
        assert small.epochs == {"smoke": 4, "short": full.epochs // 10, "full": full.epochs}[scale]
        assert all(m < small.epochs for m in small.milestones)
        for partner in (recipe.equal_cost.get(method), recipe.teachers.get(method)):
            if partner is not None:
                scale_config(recipe.config(network, partner), scale).resolved()
        if recipe.equal_cost.get(method) and "distill" not in method and method != "KD":
            baseline = recipe.config(network, recipe.equal_cost[method]).resolved()
            assert baseline.method.name == "independent"
            assert (baseline.peers, baseline.topology) == (full.peers, full.topology), (name, method)


@pytest.mark.slow
def test_imagenet_cells_can_be_built_at_smoke_scale():
    from codistill.training.build import build_run

    seen = set()
    for name, network, method in every_cell():
        if load_published_tables()[name]["data"] != "ImageNet-2012":
            continue
        recipe = TABLES[name]
        for one in filter(None, (method, recipe.equal_cost.get(method), recipe.teachers.get(method))):
            config = scale_config(recipe.config(network, one), "smoke").resolved()
            key = json.dumps(config.to_dict() | {"out": None})
            if key not in seen and config.method.name != "kd":
                seen.add(key)
                build_run(config)
    assert len(seen) > 20


@pytest.mark.parametrize(
    ("table", "network", "schedule", "longer"),
    [
        ("hssakd_cifar100", "wrn40_2", (240, (150, 180, 210), 64, 0.05), (2160, (1350, 1620, 1890))),
        ("hssakd_imagenet", "resnet18", (100, (30, 60, 90), 256, 0.1), (950, (285, 570, 855))),
        ("mcl_cifar100", "resnet32", (300, (), 128, 0.1), (300, ())),
        ("l_mcl_cifar100", "wrn16_2", (300, (), 128, 0.1), (750, ())),
        ("okdph_cifar100", "resnet110", (300, (150, 225), 128, 0.1), (450, (225, 337))),
    ],
)
def test_the_schedules_of_contrib_are_the_released_codes(table, network, schedule, longer):
    recipe = TABLES[table]
    for method in recipe.methods:
        config = recipe.config(network, method).resolved()
        assert (config.epochs, config.milestones, config.batch_size, config.lr) == schedule
        if method in recipe.equal_cost:
            baseline = recipe.config(network, recipe.equal_cost[method]).resolved()
            assert (baseline.epochs, baseline.milestones) == longer
            assert baseline.sampler == config.sampler


def test_the_recipe_of_okddips_tables_is_its_codes():
    config = TABLES["okddip_table2"].config("resnet32", "OKDDip-branch").resolved()
    assert (config.epochs, config.batch_size, config.weight_decay, config.lr) == (300, 128, 5e-4, 0.1)
    assert config.milestones == (150, 225)
    assert isinstance(config.method, OKDDipConfig)
    assert (config.method.variant, config.method.temperature, config.method.ramp_epochs) == ("okddip_code", 3.0, 80.0)
    assert config.peers == 4


def test_a_command_line_parses_into_the_config_it_was_made_of():
    for name, network, method in list(every_cell())[::5]:
        config = TABLES[name].config(network, method)
        config = dataclasses.replace(config, protocol="paper", seed=3, out="some where/seed3", augment=False)
        words = shlex.split(format_command(config))
        assert parse(words[1], words[2:]).options.to_dict() == config.to_dict(), (name, method)


def test_printed_commands_stand_after_their_teachers(tmp_path, capsys):
    folder = str(tmp_path / "grid")
    words = ["reproduce", "kdcl_table7", "--scale", "smoke", "--seeds", "2", "--out", folder, "--print-commands"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    outs = [shlex.split(line)[shlex.split(line).index("--out") + 1] for line in lines]
    assert len(set(outs)) == len(outs) == 2 * 18
    for line, out in zip(lines, outs):
        words = shlex.split(line)
        if "--method.teacher" in words:
            assert outs.index(words[words.index("--method.teacher") + 1]) < outs.index(out)
    assert not (tmp_path / "grid").exists()


@pytest.mark.slow
def test_a_smoke_table_prints_no_published_number(tmp_path, capsys):
    folder = tmp_path / "grid"
    words = ["reproduce", "okddip_table2", "--scale", "smoke", "--method", "OKDDip-branch", "--seeds", "1"]
    assert main([*words, "--out", str(folder)]) == 0
    said = capsys.readouterr()
    assert "Ind" in said.out
    assert "resnet8 (for densenet40_12)" in said.out
    assert "paper" not in next(iter(read_json(folder / "table.json")["rows"]))
    assert "28.34" not in said.out + "".join(p.read_text() for p in folder.glob("table.*"))
    assert "digits instead of the paper's images" in (folder / "table.md").read_text()
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")}
    assert len(stamps) == 2
    assert main([*words, "--out", str(folder)]) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")}
    capsys.readouterr()
    assert main([*words, "--out", str(folder), "--protocol", "paper"]) == 2
    assert "was made with --protocol honest, not paper" in capsys.readouterr().err


def test_last_and_best_epoch_stand_in_their_own_columns(tmp_path):
    plan = fake_plan(tmp_path, "paper")
    row = next(r for r in make_table_rows(plan, make_figures(plan)) if r["method"] == "OKDDip-branch")
    assert row["paper, error %"] == "25.63 ± 0.14"
    assert row["test, last epoch, error %"] == "28.50 ± 1.00"
    assert row["best test epoch (chosen on the test set), error %"] == "27.00 ± 0.00"
    assert row["ours (best) - paper"] == "+1.37"
    assert row["n"] == "3"
    mean = next(r for r in make_table_rows(plan, make_figures(plan)) if r["method"] == "ONE")
    assert mean["evaluated"] == "mean of all members"
    assert mean["test, last epoch, error %"] == "30.00 ± 1.00"


def test_honest_tables_evaluate_the_declared_member(tmp_path):
    plan = fake_plan(tmp_path, "honest")
    rows = make_table_rows(plan, make_figures(plan))
    assert not any("best" in column for column in rows[0])
    one = next(r for r in rows if r["method"] == "ONE")
    assert one["evaluated"] == "deployed member"
    assert one["last vs equal cost"] == "+0.00 ± 0.00 (n.s.)"
    ours = next(r for r in rows if r["method"] == "OKDDip-branch")
    assert ours["last vs equal cost"] == "-0.50 ± 0.00"
    assert ours["its ensemble, error %"] == "27.50 ± 1.00"


def test_the_result_stands_in_words_above_the_table(tmp_path):
    plan = fake_plan(tmp_path, "honest")
    figures = make_figures(plan)
    verdict, power = summarize_table(plan, figures)
    better, _, rest = verdict.partition("; ")
    assert better.startswith("Against the baseline of equal training cost, in points over 3 seeds: better: ")
    assert "OKDDip-branch (-0.50 ± 0.00)" in better  # an error: lower is better
    assert "ONE (+0.00 ± 0.00)" in rest.removeprefix("not significantly different: ")
    assert power.startswith("With the largest deviation seen (0.00 points), an interval of ± 1 point needs")
    write_table(plan, make_table_rows(plan, figures), [verdict, power])
    text = (tmp_path / "table.md").read_text()
    assert text.index(verdict) < text.index(power) < text.index("| network")
    for cell in plan.cells:
        cell.results = {0: fake_result(70.0)}
    alone = summarize_table(plan, make_figures(plan))
    assert alone == ["No row has two seeds in common with a baseline of equal training cost, so none is compared."]


def test_short_results_stand_beside_the_papers_only_with_a_mark(tmp_path):
    plan = fake_plan(tmp_path, "honest", "short")
    row = make_table_rows(plan, make_figures(plan))[0]
    assert "paper at full scale, not comparable, error %" in row
    assert not any("ours" in column for column in row)


def test_numbers_that_are_only_published_are_shown_as_such(tmp_path):
    plan = fake_plan(tmp_path, "honest", table="pcl_cifar100")
    row = next(r for r in make_table_rows(plan, make_figures(plan)) if r["method"] == "FFL-S")
    assert row["paper, accuracy %"] == "72.18 ± 0.11"
    assert row["evaluated"] == "published only"


def test_one_run_is_marked_and_gains_add_up(tmp_path):
    plan = make_plan("kdcl_table7", ReproduceConfig(scale="full", out=str(tmp_path), seeds=1))
    for cell in plan.cells:
        cell.results[0] = fake_result(72.0 if cell.method == "DML" else 70.0, peers=2)
    rows = {r["method"]: r for r in make_table_rows(plan, make_figures(plan))}
    assert rows["DML, resnet32"]["test, last epoch, accuracy %"] == "72.00 (n=1)"
    assert rows["DML, gain"]["test, last epoch, accuracy %"] == "4.00 (n=1)"
    assert rows["DML, gain"]["paper, accuracy %"] == "6.00"


def test_tables_escape_everything():
    rows = [{"a|b_<i>": "=SUM(A1)", "c": "x & y_z ± 5 % \\ {#} $~^"}]
    assert "a\\|b\\_&lt;i&gt;" in markdown(rows)
    assert "'=SUM(A1)" in comma_separated(rows)
    text = latex(rows, "50 % of_it")
    assert r"x \& y\_z $\pm$ 5 \% \textbackslash{} \{\#\} \$\textasciitilde{}\textasciicircum{}" in text
    assert r"50 \% of\_it" in text


# ----------------------------------------------------------------------------------------------------------------------
# The grid


@pytest.mark.slow
def test_a_failed_run_stops_only_its_students(tmp_path):
    from codistill.config.methods import KDConfig
    from codistill.reproduce.workers import Processes

    class Killing(Processes):
        def start(self, config):
            worker = super().start(config)
            if "doomed" in config.out:
                os.kill(worker.process.pid, signal.SIGKILL)
            return worker

    cells = [
        Cell("doomed", Config("independent", peers=1, **TINY)),
        Cell("good", Config("independent", peers=1, **TINY)),
        Cell("broken", Config("independent", peers=1, **TINY | {"data": "npz:/nowhere.npz"})),
        Cell("student", Config(KDConfig(), peers=1, **TINY), teacher="good"),
        Cell("orphan", Config(KDConfig(), peers=1, **TINY), teacher="broken"),
    ]
    run_grid(cells, [0], tmp_path, executor=Killing(1, 5))
    failures = {cell.label: cell.failures.get(0, "") for cell in cells}
    assert [cell.label for cell in cells if cell.results] == ["good", "student"]
    assert "its process died (SIGKILL)" in failures["doomed"]
    assert "/nowhere.npz does not exist" in failures["broken"]
    assert "its teacher has no result (broken, seed 0)" in failures["orphan"]
    assert len(read_json(tmp_path / "failures.json")) == 3
    assert read_json(tmp_path / "student/seed0/config.json")["method"]["teacher"] == str(tmp_path / "good" / "seed0")


def wait_for_lines(path, count, seconds=120):
    """Wait until a file has so many lines: a process that is asked to stop before it trains ends otherwise."""
    deadline = time.monotonic() + seconds
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline, f"{path} has not {count} lines after {seconds} s"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_grid_goes_on_where_it_stood(tmp_path):
    folder = tmp_path / "grid"
    words = [sys.executable, "-m", "codistill", "compare", "independent", "--seeds", "1", "--peers", "2"]
    words += [
        "--topology",
        "branches",
        "--data",
        "digits",
        "--model",
        "resnet8",
        "--batch-size",
        "64",
        "--epochs",
        "400",
    ]
    grid = subprocess.Popen([*words, "--out", str(folder)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    lines = folder / "one-plain-network/seed0/metrics.jsonl"
    wait_for_lines(lines, 2)
    grid.kill()
    grid.wait()
    lock = Path(f"{lines.parent}.lock")
    import fcntl

    with open(lock) as stream:  # the worker notices that it is alone, and ends with a checkpoint
        fcntl.flock(stream, fcntl.LOCK_EX)
    kept = lines.read_text().splitlines()
    assert 2 <= len(kept) < 400
    grid = subprocess.Popen(
        [*words, "--out", str(folder)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    wait_for_lines(lines, len(kept) + 2)
    assert lines.read_text().splitlines()[: len(kept)] == kept  # nothing is trained twice
    grid.send_signal(signal.SIGTERM)
    _, said = grid.communicate(timeout=30)
    assert grid.returncode == 75
    assert "stopped by SIGTERM; the checkpoint is written, continue with the same command" in said


def test_every_gpu_gets_one_worker(monkeypatch):
    from codistill.reproduce import workers

    seen = []

    class Recorder:
        busy = False

        def __init__(self, gpu):
            seen.append(gpu)

        def begin(self, config):
            self.busy = True

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,7")
    monkeypatch.setattr(workers, "_Worker", Recorder)
    pool = workers.Processes(None, 9)
    while pool.has_capacity():
        pool.start(Config())
    assert seen == ["2", "5", "7"]


@pytest.mark.slow
def test_a_process_that_has_lost_its_gpu_is_replaced(tmp_path, monkeypatch):
    source = "def network(num_classes):\n    raise RuntimeError('CUDA error: an illegal memory access')\n"
    (tmp_path / "lost_gpu.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    options = {"peers": 1, "epochs": 1, "train_per_class": 4, "batch_size": 16, "device": "cpu"}
    names = ("lost_gpu:network", "resnet8", "resnet8")
    configs = [Config("independent", name, out=str(tmp_path / str(n)), **options) for n, name in enumerate(names)]
    from codistill.reproduce.workers import Processes

    pool, served = Processes(1, 9), []
    try:
        for config in configs:
            handle = pool.start(config.resolved())
            served.append(handle.process.pid)
            while (answer := pool.poll(handle)) is None:
                time.sleep(0.05)
            assert (answer[1] is None) == (config is not configs[0]), answer[1]
    finally:
        pool.close()
    assert served[0] != served[1] == served[2]


@pytest.mark.slow
def test_submitit_trains_on_this_machine(tmp_path):
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    words = ["reproduce", "okddip_table2", "--scale", "smoke", "--method", "Baseline", "--no-baselines"]
    words += ["--seeds", "1", "--submit", "local", "--submit-option", "timeout_min=5", "--out", str(tmp_path / "grid")]
    assert main(words) == 0
    assert (tmp_path / "grid/densenet40-12-baseline/seed0/result.json").exists()
    assert (tmp_path / "grid/submitit").is_dir()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("reproduce", "reproduce takes one TABLE"),
        ("reproduce okddip_tabel2", 'there is no table "okddip_tabel2" (did you mean "okddip_table2"?)'),
        ("reproduce okddip_table2 --network resnet23", '--network: okddip_table2 has no "resnet23" (did you mean'),
        ("reproduce okddip_table2 --method OKDDip", '--method: okddip_table2 has no "OKDDip"'),
        ("reproduce okddip_table2 --seeds 0", "--seeds is 0"),
        ("reproduce okddip_table2 --workers 0", "--workers is 0"),
        ("reproduce kdcl_table2", "--data-dir is needed"),
        ("reproduce okddip_table2 --scale smoke --submit-option a=b --out {tmp}/grid", "add --submit slurm"),
        ("reproduce okddip_table2 --scale smoke --out {tmp}", "is no grid of codistill"),
    ],
)
def test_mistakes_end_in_one_sentence(words, sentence, tmp_path, capsys):
    (tmp_path / "something").touch()
    assert main(words.format(tmp=tmp_path).split()) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert sentence in said


def test_a_grid_in_the_place_of_a_file_is_an_input_error(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "grid"):
        with pytest.raises(InputError, match=rf"--out {out} cannot be a folder .*name another one"):
            run_grid([Cell("a", Config("independent", peers=1, **TINY))], [0], out)


@pytest.mark.parametrize("begun", [False, True])
def test_a_grid_that_is_stopped_says_whether_there_is_anything_to_keep(tmp_path, begun):
    class Stopping:
        def has_capacity(self):
            return True

        def start(self, config):
            if begun:
                Path(config.out).mkdir(parents=True)
            os.kill(os.getpid(), signal.SIGTERM)

        def poll(self, handle):
            return None

        def close(self):
            pass

    cells = [Cell("a", Config("independent", peers=1, **TINY))]
    with pytest.raises(GridStopped if begun else StoppedEarly, match="SIGTERM"):
        run_grid(cells, [0], tmp_path / "grid", executor=Stopping())
    assert (tmp_path / "grid").exists() is begun


def test_two_rows_that_share_a_folder_are_an_input_error(tmp_path):
    cells = [Cell(name, Config("independent", peers=1, **TINY)) for name in ("a b", "a-b")]
    with pytest.raises(InputError, match="rename one"):
        run_grid(cells, [0], tmp_path)


def test_a_second_comparison_adds_its_rows_to_the_folder(tmp_path):
    def finish(methods):
        config = CompareConfig("independent", "resnet8", "digits", seeds=2)
        cells = plan_comparison(methods, config)
        for cell in cells:
            for seed in range(2):
                cell.results[seed] = fake_result(50.0 + seed)
                write_json(cell.run_path(tmp_path, seed) / "result.json", cell.results[seed])
        cells = add_earlier_rows(cells, config, tmp_path)
        write_comparison(cells, config, tmp_path, comparison_rows(cells))
        return [(row["peers"], row["n"]) for row in read_json(tmp_path / "table.json")["rows"]]

    base = [("one plain network", "2"), ("independent networks", "2")]
    assert finish(["dml"]) == [*base, ("dml networks", "2")]
    assert finish(["pcl"])[-1] == ("dml networks", "2")
    labels = [row["label"] for row in read_json(tmp_path / "grid.json")["cells"]]
    assert labels[-1] == "dml networks"
    assert any("pcl" in label for label in labels)
    write_json(tmp_path / "grid.json", {"kind": "reproduce", "table": "okddip_table2", "options": {}})
    with pytest.raises(InputError, match="holds okddip_table2"):
        finish(["dml"])
