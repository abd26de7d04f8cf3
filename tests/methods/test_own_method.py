"""Methods of users, named as package.module:Class: the example through the command line, and what is refused."""

import math
import shutil
import sys
from pathlib import Path

import pytest
import torch

import codistill as cd
from codistill.cli.main import main
from codistill.cli.options import parse
from codistill.methods import build_method
from helpers.command_line import one_sentence
from helpers.common import close, read_json

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_method.py"
SMALL = ["--model", "resnet8", "--data", "digits", "--train-per-class", "6", "--batch-size", "16"]
SMALL += ["--epochs", "2", "--peers", "2"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(EXAMPLE, tmp_path)
    yield tmp_path
    for name in ("own_method", "broken"):
        sys.modules.pop(name, None)


def train(*words: str) -> int:
    return main(["train", "own_method:MeanTarget", *SMALL, "--out", "run", *words])


def test_the_example_trains_from_the_command_line_and_its_run_folder_is_used_as_any_other(folder, capsys):
    assert train("--method.temperature", "2") == 0
    saved = read_json(folder / "run" / "config.json")["method"]
    assert saved == {"name": "own_method:MeanTarget", "temperature": 2.0, "weight": 1.0}
    assert train("--method.temperature", "2", "--resume", "auto") == 0
    said = one_sentence(capsys, ["train", "own_method:MeanTarget", *SMALL, "--out", "run", "--resume", "auto"])
    assert "--method.temperature was 2.0, now 3.0" in said
    assert main(["train", "own_method:MeanTarget", "--config", "run", "--out", "again"]) == 0
    assert read_json(folder / "again" / "result.json")["test"] == read_json(folder / "run" / "result.json")["test"]
    assert main(["export", "run", "--allow-import"]) == 0


def test_a_run_folder_that_names_a_method_runs_it_only_if_asked(folder, capsys):
    assert train() == 0
    sys.modules.pop("own_method")
    for words in (["evaluate", "run"], ["train", "--config", "run", "--out", "again"]):
        said = one_sentence(capsys, words)
        assert "names code to import and run, own_method:MeanTarget; if you trust it, add --allow-import" in said
    assert "own_method" not in sys.modules
    with pytest.raises(cd.InputError, match="names code"):
        cd.load_run("run")
    assert main(["evaluate", "run", "--allow-import"]) == 0
    assert type(cd.load_run("run", allow_import=True).method).__name__ == "MeanTarget"


def test_a_report_shows_the_run_without_its_code(folder):
    pytest.importorskip("plotly", reason="the extra report is not installed")
    assert train() == 0
    sys.modules.pop("own_method")
    assert main(["report", "run", "-o", "report.html"]) == 0
    assert "own_method" not in sys.modules


@pytest.mark.slow
def test_compare_has_a_row_for_it(folder):
    words = [*SMALL, "--seeds", "2", "--out", "grid"]
    assert main(["compare", "own_method:MeanTarget", *words]) == 0
    rows = [row["peers"] for row in read_json(folder / "grid" / "table.json")["rows"]]
    assert rows == ["one plain network", "independent networks", "mean_target networks"]


def test_its_loss_is_the_equation(folder):
    method_class = cd.Config("own_method:MeanTarget").method.method_class
    z_PBC = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4
    targets_B = torch.tensor([0, 4, 2, 2])
    terms = method_class(3, temperature=2.0, weight=0.5)(cd.PeerOutputs(z_PBC, []), targets_B, 0.6)
    total = 0.0
    for i in range(3):
        for b in range(4):
            soft = [(z_PBC[j, b] / 2).softmax(0) for j in range(3)]
            mean = sum(soft) / 3
            kl = sum(mean[c] * (mean[c].log() - soft[i][c].log()) for c in range(5))
            total += (-z_PBC[i, b].log_softmax(0)[targets_B[b]] + 0.5 * 0.6 * 4 * kl) / 4
    close(terms["loss"], total, 1e-12)
    assert math.isfinite(terms["loss"])


def test_its_options_are_checked_and_explained(folder, capsys):
    said = one_sentence(capsys, ["train", "own_method:MeanTarget", *SMALL, "--method.temperature", "0"])
    assert said.endswith("--method.temperature is 0.0; give a number above 0")
    said = one_sentence(capsys, ["train", "own_method:MeanTarget", "--method.temprature", "2"])
    assert 'unknown option "--method.temprature" (did you mean "--method.temperature"?)' in said
    with pytest.raises(SystemExit):
        parse("train", ["own_method:MeanTarget", "--help"])
    assert "T, which softens the predictions." in capsys.readouterr().out


START = """
from dataclasses import dataclass
import torch
from codistill.config import MethodConfig
from codistill.methods import Method, combine_terms

class Own(Method):
    name = "own"
    @dataclass(kw_only=True)
    class Config(MethodConfig):
        pass
    def forward(self, outputs, targets_B, weight=1.0):
        ce_P = outputs.logits_PBC.logsumexp(-1).mean(-1)
        return combine_terms(ce_P, 0 * ce_P, weight)
"""


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ('name = "own"', "pass", "method broken:Own has no name; set `name ="),
        ('name = "own"', "name = 3", "method broken:Own has no name"),
        ('name = "own"', 'name = "dml"', "method broken:Own: codistill has a method called dml; set another `name`"),
        ("def forward", "def other", "method broken:Own has no `forward`; write one"),
        ("class Config", "class Options", "method broken:Own has no options; add a dataclass `class Config(Method"),
        ("@dataclass(kw_only=True)", "# plain", "method broken:Own: decorate its Config with @dataclass(kw_only=True)"),
        ("        pass\n    def", "        size: int\n    def", "method broken:Own: give every option of its Config a"),
        ("class Own(Method)", "class Own", "method broken:Own is no method; derive the class from codistill.methods"),
        ("class Own", "class Other", 'method broken:Own: broken has no callable "Own"'),
        ("return combine", "return 1 or combine", "forward must return a dict of tensors, not int; combine_terms"),
        ("return combine", "return {'loss': 1} or combine", "a dict of tensors, not other values in it; combine_terms"),
        ("return combine", "return {'loss': ce_P.sum()} or combine", "loss_P, ce_P, distill_P is missing"),
        ("mean(-1)\n", "mean(-1)[:1]\n", "loss_P has the shape (1,); give one number a peer, 2"),
        ("outputs.logits_PBC.", "outputs.logits_PBC.detach().", "its loss has no gradient; compute it from logits_PBC"),
        (
            "    def forward",
            "    def __init__(self, num_peers):\n"
            "        super().__init__(num_peers)\n"
            "        self.needs = frozenset({'trunc'})\n"
            "    def forward",
            "method own needs trunc; it may need ema, exits, features, holdout, hybrid, ",
        ),
        (
            "    def forward",
            "    def __init__(self, num_peers):\n"
            "        super().__init__(num_peers)\n"
            "        self.needs = frozenset({'teacher'})\n"
            "    def forward",
            "own needs a teacher; derive its Config from codistill.config.TeacherConfig",
        ),
        (
            "def forward(self, outputs, targets_B, weight=1.0)",
            "def forward(self, outputs)",
            "`forward` must take (outp",
        ),
        (
            "        pass\n    def",
            "        size: int = 3\n    def",
            "method broken:Own: its `__init__` must take num_peers and every option of its Config (got an",
        ),
        (
            "    def forward",
            "    def __init__(self, num_peers):\n        pass\n    def forward",
            "method broken:Own: its `__init__` must begin with super().__init__(num_peers)",
        ),
        (
            "    def forward",
            "    @classmethod\n    def build(cls, config, info):\n        return 3\n    def forward",
            "method broken:Own: `build` must return the method, not int",
        ),
        *(
            (
                "    def forward",
                "    def __init__(self, num_peers):\n"
                "        super().__init__(num_peers)\n"
                f"        self.{field} = {value}\n"
                "    def forward",
                sentence,
            )
            for field, value, sentence in (
                (
                    "needs",
                    "{'exits'}",
                    "own needs exits; let `num_exits` of its Config return how many",
                ),
                ("needs", "['maps']", "own needs maps; let `num_maps` of its Config return how many of each network"),
                ("needs", "'features'", "own: self.needs is text; give a set, as in frozenset({'features'})"),
                (
                    "needs",
                    "{'holdout'}",
                    "own needs a holdout; let `needs_holdout` of its Config return True, and give",
                ),
                ("deployed", "2", "own: self.deployed is 2; give the number of a peer, 0 to 1"),
                ("group", "(0, 5)", "own: self.group is (0, 5); give numbers of peers, 0 to 1"),
                ("group", "()", "own: self.group is (); give numbers of peers, 0 to 1"),
                ("update_mode", "'alternate'", 'own: self.update_mode is "alternate"; give "joint" or "alternating"'),
                ("pauses_members", "True", "with active_P, as it sets pauses_members: who steps, one boolean a peer"),
            )
        ),
    ],
)
def test_an_incomplete_method_is_refused_in_one_sentence(before, after, sentence, folder, capsys):
    assert before in START
    (folder / "broken.py").write_text(START.replace(before, after))
    assert sentence in one_sentence(capsys, ["train", "broken:Own", *SMALL, "--out", "run"])


@pytest.mark.parametrize(
    ("code", "function"),
    [
        ("    def forward", "forward"),
        ("    def after_step(self, peers, step):\n        {}['x']\n    def forward", "after_step"),
    ],
)
def test_its_exceptions_are_not_taken_for_bugs_of_codistill(code, function, folder, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    text = START.replace("    def forward", code)
    if function == "forward":
        text = text.replace("return combine", "ce_P = torch.ones(3) + torch.ones(2)\n        return combine")
    (folder / "broken.py").write_text(text)
    said = one_sentence(capsys, ["train", "broken:Own", *SMALL, "--out", "run"])
    assert f"your code fails at {folder / 'broken.py'}, line " in said
    assert f", in {function} ({'RuntimeError: The size' if function == 'forward' else 'KeyError'}" in said
    (file,) = folder.glob("codistill-error-*.txt")
    assert said.endswith(f"its traceback is in {file}")
    assert "Traceback (most recent call last)" in file.read_text()


def test_a_module_that_does_not_exist_is_named(folder, capsys):
    said = one_sentence(capsys, ["train", "no_such_module:Own", *SMALL])
    assert 'method no_such_module:Own: there is no module "no_such_module"' in said


def test_options_without_a_class_are_refused():
    from dataclasses import dataclass

    from codistill.config import MethodConfig

    @dataclass(kw_only=True)
    class Lonely(MethodConfig):
        name = "lonely"

    peers = cd.NetworkPeers("resnet8", num_peers=2, num_classes=10, in_channels=1, image_size=8)
    with pytest.raises(cd.InputError, match="Lonely belongs to no method; set it as `Config` on the method's class"):
        build_method(Lonely(), peers)
