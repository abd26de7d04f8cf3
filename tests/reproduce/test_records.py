"""A grid takes runs of which only the records are left, without weights, as finished."""

from codistill.cli import main

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
