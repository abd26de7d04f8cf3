"""The study's page follows from its records, and its statistics from their definitions."""

import pytest

import study


def record(cell: str, row: str, seed: int, tops: list[float], deployed: int = 0) -> dict:
    test = {"top1": tops, "ece": [0.1] * len(tops), "ensemble_top1": max(tops), "diversity": 0.1}
    student = {"top1": tops[deployed], "ece": 0.1}
    cost = {"training_flops_a_sample": 1e6, "samples_seen": 1000}
    result = {"deployed": f"member {deployed}", "student": student, "test": test, "cost": cost}
    return {"cell": cell, "row": row, "seed": seed, "cpu_seconds": 1.0, "result": result}


def test_a_gain_is_against_the_independent_member_of_the_same_number():
    ours = record("digits-10", "okddip", 100, [80, 81, 82, 90], deployed=3)
    alone = record("digits-10", "independent", 100, [70, 70, 70, 88])
    assert study.gain(ours, alone) == 2


def test_holms_correction_counts_every_declared_comparison():
    cells = {"digits-10": [1.0, 2.0, 3.0, 2.0, 2.0], "fashion-10": [1.0, -1.0, 0.5, 0.0, -0.2]}
    records: study.Records = {}
    for name, gains in cells.items():
        for seed, gain in enumerate(gains):
            records.setdefault((name, "independent"), {})[seed] = record(name, "independent", seed, [50.0] * 4)
            records.setdefault((name, "pcl"), {})[seed] = record(name, "pcl", seed, [50.0 + gain] * 4)
    first, second = study.compare(records)
    # t = 2 / (sqrt(0.5) / sqrt(5)) = 6.3246 with 4 degrees of freedom: p = 0.003198
    assert first.p == pytest.approx(0.003198, abs=1e-6)
    assert first.corrected == pytest.approx(18 * first.p)
    assert first.half == pytest.approx(2.776445 * 0.5**0.5 / 5**0.5, rel=1e-6)
    assert first.answer == "undecided"  # 18 x 0.0032 = 0.058
    assert second.corrected == pytest.approx(min(1.0, 17 * second.p))


def test_a_narrow_interval_about_zero_is_an_answer():
    comparison = study.Comparison(study.CELLS["digits-10"], "pcl", [], 0.1, 0.3, 0.5)
    assert comparison.answer == "no difference worth having"


def test_the_page_follows_from_its_records(tmp_path, monkeypatch):
    files = {
        path: path.read_text() for path in (study.PAGE, study.RECORDS / "gain.svg", study.RECORDS / "diversity.svg")
    }
    page = tmp_path / "study.md"
    page.write_text(files[study.PAGE])
    monkeypatch.setattr(study, "PAGE", page)
    monkeypatch.setattr(study, "PLOTS", tmp_path)
    study.write_page()
    written = {study.PAGE.name: page.read_text(), **{p.name: p.read_text() for p in tmp_path.glob("*.svg")}}
    assert written == {path.name: text for path, text in files.items()}


def test_every_record_names_its_commit_and_stands_once():
    records = study.read_records()
    assert {r["git_commit"][:7] for r in records} == {"844e2fa"}
    assert len({(r["cell"], r["row"], r["seed"]) for r in records}) == len(records)
    declared = {(cell.name, row, seed) for cell, row, seed in study.jobs()}
    assert {(r["cell"], r["row"], r["seed"]) for r in records} <= declared
