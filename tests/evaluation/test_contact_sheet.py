"""The contact sheet of the worst mistakes: which images, which names, and both commands that make one."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from codistill.cli.main import main
from codistill.evaluation.contact_sheet import Mistake, collect_mistakes, draw_contact_sheet, worst_mistakes

TRAIN = ["--model", "resnet8", "--epochs", "1", "--batch-size", "16", "--lr", "0.05", "--device", "cpu"]


def test_the_most_confident_mistakes_come_first():
    rng = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(40, 5, generator=rng) * 3, torch.randint(5, (40,), generator=rng)
    probabilities = logits.double().softmax(-1)
    expected = sorted(
        ((float(p.max()), n, int(p.argmax())) for n, p in enumerate(probabilities) if int(p.argmax()) != labels[n]),
        reverse=True,
    )
    assert [(p, n, guess) for n, guess, p in worst_mistakes(logits, labels, 7)] == expected[:7]
    found = collect_mistakes(logits, labels, "abcde", lambda n: np.full((2, 2, 1), n, np.uint8), "image {}".format, 1)
    assert (found[0].name, int(found[0].pixels_HWC[0, 0, 0])) == (f"image {expected[0][1]}", expected[0][1])


def test_any_image_and_name_can_be_drawn():
    names = ["a.png", "kl\u00e4ffer \u732b \x1b[31m" + "x" * 90]
    shapes = [(8, 8, 1), (3, 300, 3), (5, 5, 4)]
    mistakes = [Mistake(name, "cat", name, 0.5, np.zeros(shape, np.uint8)) for name in names for shape in shapes]
    assert draw_contact_sheet(mistakes).width == draw_contact_sheet(mistakes * 3).width
    assert draw_contact_sheet([]).width > 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of images, and a run on it that has learned next to nothing."""
    base = tmp_path_factory.mktemp("mistakes")
    rng = np.random.default_rng(0)
    for part, count in (("train", 24), ("test", 12)):
        for n in range(count):
            path = base / "images" / part / "ab"[n % 2] / f"{part}{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    data = ["--data", f"folder:{base / 'images'}", "--image-size", "8"]
    assert main(["train", "independent", "--peers", "1", *data, *TRAIN, "--out", str(base / "run")]) == 0
    return base


@pytest.mark.parametrize("split", ["test", "val"])
def test_evaluate_draws_them_with_their_files(folder, split, tmp_path, capsys):
    sheet = tmp_path / "worst.png"
    wanted = ["--split", split, "--contact-sheet", str(sheet), "--json"]
    assert main(["evaluate", str(folder / "run"), *wanted]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert Image.open(sheet).format == "PNG"
    assert figures["mistakes"]
    part = "test" if split == "test" else "train"
    for mistake in figures["mistakes"]:
        path = Path(mistake["image"])
        assert path.is_file()
        assert path.parts[-3:-1] == (part, mistake["true"])
        assert mistake["predicted"] != mistake["true"]
    wrong = (1 - figures["student"]["top1"] / 100) * figures["members"]["samples"]
    assert len(figures["mistakes"]) == round(wrong)


def test_evaluate_refuses_another_kind_of_file_before_it_loads(folder, capsys):
    assert main(["evaluate", str(folder / "run"), "--contact-sheet", "worst.jpg"]) == 2
    assert "--contact-sheet worst.jpg: give a name of a file that ends in .png" in capsys.readouterr().err


def test_the_report_holds_a_sheet_on_request(folder, tmp_path):
    plain, page = tmp_path / "plain.html", tmp_path / "page.html"
    assert main(["report", str(folder / "run"), "-o", str(plain)]) == 0
    assert main(["report", str(folder / "run"), "-o", str(page), "--contact-sheets"]) == 0
    assert 'class="sheet"' not in plain.read_text()
    encoded = re.search(r'class="sheet"[^>]*base64,([^"]+)"', page.read_text())[1]
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).format == "PNG"
    assert "Most confident mistakes on test images" in page.read_text()


def test_the_report_says_why_there_is_no_sheet(folder, tmp_path):
    (folder / "images").rename(folder / "moved")
    try:
        page = tmp_path / "page.html"
        assert main(["report", str(folder / "run"), "-o", str(page), "--contact-sheets"]) == 0
    finally:
        (folder / "moved").rename(folder / "images")
    assert "Not shown: " in page.read_text()
