"""A folder of images, one subfolder per class, to an ONNX file that needs no codistill.

The photographs here are digits, written as PNG files first; name your own folder instead.
"""

from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image
from sklearn.datasets import load_digits

import codistill as cd
from codistill.deploy import export_student

photos = Path("photos")
digits = load_digits()
for number, (pixels, label) in enumerate(zip(digits.images[:300], digits.target[:300], strict=True)):
    path = photos / f"class-{label}" / f"{number}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((pixels * 255 / 16).astype(np.uint8)).resize((16, 16)).save(path)

options = {"image_size": 16, "epochs": 3, "batch_size": 32, "lr": 0.05, "out": "runs/photos"}
cd.train(cd.Config("dml", "resnet8", f"folder:{photos}", peers=2, **options))

difference = export_student(cd.load_run("runs/photos"), Path("student.onnx"), "onnx")
session = onnxruntime.InferenceSession("student.onnx")
print(f"written: student.onnx; its outputs differ from the trained network's by {difference:.1e} at most")
print({value.name: value.shape for value in (*session.get_inputs(), *session.get_outputs())})
