"""A grid takes runs of which only the records are left, without weights, as finished."""

from codistill.cli import main
from codistill.config import ReproduceConfig
from codistill.data import load_set, make_splits
from codistill.reproduce import make_figures, make_plan, make_table_rows
from codistill.reproduce.recipes import TABLES
from codistill.reproduce.recipes.table_recipe import scale_config
from codistill.reproduce.table_folder import prepare_table_folder, read_whole_plan
from codistill.utils.files import write_json
from helpers.tables import fake_result

RECORDS = {"config.json", "data.json", "metrics.jsonl", "result.json"}


def test_runs_without_weights_are_finished(tmp_path, capsys):
    out = tmp_path / "grid"
    words = [
        "compare",
        "independent",
        "--data",
        "digits",
        "--model",
        "resnet8",
        "--train-per-class",
        "4",
        "--epochs",
        "1",
    ]
    words += ["--batch-size", "20", "--peers", "2", "--seeds", "1", "--device", "cpu", "--out", str(out)]
    assert main(words) == 0
    for path in out.rglob("*"):
        if path.is_file() and path.parent.name == "seed0" and path.name not in RECORDS:
            path.unlink()
    kept = {path: path.read_bytes() for path in out.rglob("result.json")}
    times = {path: path.stat().st_mtime_ns for path in kept}
    table = (out / "table.md").read_text()
    assert len(kept) == 2
    assert main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("result.json")} == times
    assert not [*out.rglob("*.pt")]
    assert (out / "table.md").read_text() == table


def test_a_table_keeps_the_rows_of_earlier_calls(tmp_path):
    """A call that selects other methods or fewer seeds adds to the table; what was never trained is no row."""
    shown = []
    for methods, seeds in ((("DML",), 2), (("ONE", "CL-ILR"), 1)):
        options = ReproduceConfig(
            network=("resnet32",), method=methods, baselines=False, seeds=seeds, scale="smoke", out=str(tmp_path)
        )
        plan = make_plan("okddip_table2", options)
        prepare_table_folder(plan)
        for cell in plan.cells:
            for seed in range(seeds):
                if cell.method == "CL-ILR":
                    cell.failures[seed] = "it failed"
                else:
                    write_json(cell.run_path(tmp_path, seed) / "result.json", fake_result(70.0 + 2 * seed))
        whole = read_whole_plan(plan)
        rows = make_table_rows(whole, make_figures(whole))
        shown.append([(row["method"], row["n"], row["test, last epoch, error %"]) for row in rows])
        failed = [cell.label for cell in whole.cells if cell.failures]
    assert shown[0] == [("DML", "2", "29.00 ± 1.41")]
    assert shown[1] == [("DML", "2", "29.00 ± 1.41"), ("CL-ILR", "0", "failed"), ("ONE", "1", "30.00 (n=1)")]
    assert failed == ["resnet32: CL-ILR"]


def test_no_epoch_of_a_smoke_table_ends_with_a_small_batch():
    """BatchNorm's statistics after a batch of three images made a row 12 points worse."""
    digits, rests = load_set("digits"), {}
    for name, recipe in TABLES.items():
        for network, method in recipe.select_cells((), (), name):
            config = scale_config(recipe.config(network, method), "smoke").resolved()
            holdout = config.method.holdout_fraction if config.method.needs_holdout() else 0.0
            key = config.val_fraction, holdout, config.train_per_class, config.batch_size
            if key not in rests:
                rests[key] = len(make_splits(digits, *key[:3]).train) % config.batch_size
    assert sorted({*rests.values()}) == [35, 40]  # of 48
