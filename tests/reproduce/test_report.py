"""The page: one file, nothing loaded, names escaped, drawn in a real browser where there is one."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from codistill.cli.main import main
from codistill.config.config import Config
from codistill.reproduce.report.collect import Section, collect_sections
from codistill.reproduce.report.page import _section_html, difference_class
from codistill.training.loop import train
from codistill.utils.files import write_json
from helpers.tables import fake_plan

EVIL = "<img src=x onerror=alert(1)> & <b>%{y}"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

pytest.importorskip("plotly", reason="the extra report is not installed")


def test_seeds_are_one_group_however_many_processes_decoded(tmp_path):
    for seed in range(2):
        config = Config("dml", data="digits", seed=seed, data_workers=seed)
        write_json(tmp_path / f"run-seed{seed}" / "config.json", config.resolved().to_dict())
    (section,) = collect_sections([tmp_path])
    assert [len(group.runs) for group in section.groups] == [2]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report of two groups, one with two seeds, whose names try to be HTML."""
    folder = tmp_path_factory.mktemp("report")
    shared = {"model": "resnet8", "data": "digits", "train_per_class": 6, "batch_size": 16, "epochs": 2}
    for seed in (0, 1):
        train(Config("okddip", peers=3, seed=seed, out=str(folder / EVIL / f"seed{seed}"), **shared))
    train(Config("pcl", peers=2, out=str(folder / "pcl-seed0"), protocol="paper", **shared))
    out = folder / "report.html"
    assert main(["report", str(folder / EVIL), str(folder / "pcl-seed0"), "-o", str(out)]) == 0
    return out


def own_text(page) -> str:
    """The page without the chart library."""
    from plotly.offline import get_plotlyjs

    return page.read_text().replace(get_plotlyjs(), "")


def test_the_page_stands_alone_and_escapes_every_name(page):
    text = own_text(page)
    assert not re.findall(r"""(?:src|href)=["']?(?!data:)[^\s"'>]+["']""", text)
    assert "default-src 'none'" in text
    assert "<img" not in text
    assert "&lt;img src=x onerror=alert(1)&gt; &amp; &lt;b&gt;%{y}" in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert data[0]["groups"] == [EVIL, "pcl"]
    names = {
        trace["name"] for chart in data[0]["charts"] for v in chart["views"] for trace in v["traces"] if "name" in trace
    }
    assert "&lt;img src=x onerror=alert(1)&gt; &amp; &lt;b&gt;%{y}" in names
    assert EVIL not in names


def test_the_page_holds_every_chart_and_the_commands(page):
    text = own_text(page)
    charts = {
        c["title"]: c for c in json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])[0]["charts"]
    }
    assert list(charts) == [
        "Learning curves",
        "Diversity and ensemble",
        "Accuracy against cost",
        "Every member",
        "Weights of the members",
        "Reliability",
        "Confusion",
    ]
    curve = charts["Learning curves"]["views"][0]["traces"]
    assert [bool(t.get("band")) for t in curve] == [True, False, False]  # a band for two seeds, none for one
    attention = charts["Weights of the members"]["views"][0]["traces"][0]
    assert attention["y"] == ["peer 0 to 0", "peer 0 to 1", "peer 1 to 0", "peer 1 to 1"]
    assert sum(column[-1] for column in attention["z"]) == pytest.approx(2, abs=1e-3)
    confusion = charts["Confusion"]["views"][0]["traces"][0]["z"]
    assert all(sum(row) == pytest.approx(100, abs=1) for row in confusion)
    assert "mean teacher 0" in {t["name"] for v in charts["Every member"]["views"] for t in v["traces"]}
    assert "codistill train okddip --model resnet8" in text
    assert "best test epoch" in text


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")
def test_a_browser_draws_it_without_errors_and_toggles_a_group(page, tmp_path):
    probe = """<script>
      const wait = setInterval(() => {
        const root = document.documentElement;
        if (!root.dataset.drawn) return;
        clearInterval(wait);
        const lines = () => document.querySelector(".plot").querySelectorAll(".scatterlayer .trace").length;
        root.dataset.before = lines();
        document.querySelector(".chip").click();
        setTimeout(() => { root.dataset.after = lines(); document.getElementById("theme").click(); }, 300);
      }, 50);
    </script></body>"""
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("</body>", probe))
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    words += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000", "--enable-logging=stderr"]
    done = subprocess.run(
        [*words, "--dump-dom", probed.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    assert not console, console
    root = re.search(r"<html[^>]*>", done.stdout)[0]
    assert 'data-drawn="7"' in root
    assert int(re.search(r'data-before="(\d+)"', root)[1]) == 3
    assert int(re.search(r'data-after="(\d+)"', root)[1]) == 1
    assert 'data-theme="dark"' in root
    assert "<img" not in done.stdout


def test_a_table_colors_its_differences_to_the_paper(tmp_path):
    folder = tmp_path / "grid"
    plan = fake_plan(folder, "paper")
    for cell in plan.cells:
        for seed, result in cell.results.items():
            run = cell.run_path(folder, seed)
            write_json(run / "result.json", result)
            write_json(run / "config.json", cell.run_config(folder, seed).to_dict())
    options = {"network": ["resnet32"], "protocol": "paper", "seeds": 3, "scale": "full"}
    write_json(folder / "grid.json", {"kind": "reproduce", "table": "okddip_table2", "options": options})
    out = tmp_path / "table.html"
    assert main(["report", str(folder), "--out", str(out), "--title", "Mine & <yours>"]) == 0
    text = own_text(out)
    assert "<h1>Mine &amp; &lt;yours&gt;</h1>" in text
    assert "25.63 ± 0.14" in text
    assert '<td class="bad">+1.37</td>' in text
    assert '<td class="good">-1.50 ± 0.00</td>' in text


@pytest.mark.parametrize(
    ("column", "text", "lower", "tone"),
    [
        ("ours - paper", "+0.50", True, "bad"),
        ("ours - paper", "+0.50", False, "good"),
        ("ours - paper", "-0.05", True, ""),
        ("last vs equal cost", "-0.50 ± 0.20", True, "good"),
        ("last vs equal cost", "-0.50 ± 0.90 (n.s.)", True, ""),
        ("vs equal cost", "-", True, ""),
        ("n", "+3", True, ""),
    ],
)
def test_only_significant_differences_are_colored(column, text, lower, tone):
    assert difference_class(column, text, lower) == tone


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("report", "report takes at least one RUN"),
        ("report {tmp}/nowhere", "nowhere is no folder"),
        ("report {tmp}", "holds no runs of codistill"),
        ("report {page} -o {tmp}", "is a folder; name a file"),
    ],
)
def test_mistakes_end_in_one_sentence(words, sentence, tmp_path, page, capsys):
    assert main([w.format(tmp=tmp_path, page=page.parent / "pcl-seed0") for w in words.split()]) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_a_missing_library_is_named(page, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert main(["report", str(page.parent / "pcl-seed0"), "-o", str(tmp_path / "r.html")]) == 2
    assert "pip install plotly" in capsys.readouterr().err


def test_the_result_in_words_stands_above_the_table():
    section = Section("Comparison", "title", [{"peers": "okddip", "n": "3"}], False, ["a note"], [], summary=["1 < 2."])
    text = _section_html(section, 0, "")
    assert text.index("<p>1 &lt; 2.</p>") < text.index("<table>") < text.index("a note")
