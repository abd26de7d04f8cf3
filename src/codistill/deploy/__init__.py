"""The deployed student: exported files that need no codistill, predictions, calibration, model card."""

from typing import TYPE_CHECKING

from codistill.utils.lazy import lazy_names

if TYPE_CHECKING:
    from codistill.deploy.calibrate import calibrate_student as calibrate_student
    from codistill.deploy.calibrate import read_temperature as read_temperature
    from codistill.deploy.export import SUFFIXES as SUFFIXES
    from codistill.deploy.export import check_targets as check_targets
    from codistill.deploy.export import export_student as export_student
    from codistill.deploy.model_card import make_model_card as make_model_card
    from codistill.deploy.model_card import read_card_records as read_card_records
    from codistill.deploy.predict import find_images as find_images
    from codistill.deploy.predict import format_csv as format_csv
    from codistill.deploy.predict import load_predictor as load_predictor
    from codistill.deploy.predict import predict_images as predict_images

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "calibrate": "calibrate_student read_temperature",
        "export": "SUFFIXES check_targets export_student",
        "model_card": "make_model_card read_card_records",
        "predict": "find_images format_csv load_predictor predict_images",
    },
)
