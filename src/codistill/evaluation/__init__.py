"""Evaluation: metrics, calibration, costs, and BatchNorm folding."""

from typing import TYPE_CHECKING

from codistill.utils.lazy import lazy_names

if TYPE_CHECKING:
    from codistill.evaluation.calibration import calibration_figures as calibration_figures
    from codistill.evaluation.calibration import class_rows as class_rows
    from codistill.evaluation.calibration import confusion_matrix as confusion_matrix
    from codistill.evaluation.calibration import fit_temperature as fit_temperature
    from codistill.evaluation.calibration import write_confusion as write_confusion
    from codistill.evaluation.contact_sheet import SHOWN_MISTAKES as SHOWN_MISTAKES
    from codistill.evaluation.contact_sheet import Mistake as Mistake
    from codistill.evaluation.contact_sheet import check_sheet_path as check_sheet_path
    from codistill.evaluation.contact_sheet import collect_mistakes as collect_mistakes
    from codistill.evaluation.contact_sheet import draw_contact_sheet as draw_contact_sheet
    from codistill.evaluation.contact_sheet import png_bytes as png_bytes
    from codistill.evaluation.contact_sheet import write_contact_sheet as write_contact_sheet
    from codistill.evaluation.cost import forward_flops as forward_flops
    from codistill.evaluation.cost import inference_cost as inference_cost
    from codistill.evaluation.cost import inner_step_flops as inner_step_flops
    from codistill.evaluation.cost import plain_training_flops as plain_training_flops
    from codistill.evaluation.cost import training_flops as training_flops
    from codistill.evaluation.evaluate import evaluate_peers as evaluate_peers
    from codistill.evaluation.evaluate import score_network as score_network
    from codistill.evaluation.metrics import NUM_BINS as NUM_BINS
    from codistill.evaluation.metrics import PeerMetrics as PeerMetrics

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "calibration": "calibration_figures class_rows confusion_matrix fit_temperature write_confusion",
        "contact_sheet": (
            "SHOWN_MISTAKES Mistake check_sheet_path collect_mistakes draw_contact_sheet png_bytes write_contact_sheet"
        ),
        "cost": "forward_flops inference_cost inner_step_flops plain_training_flops training_flops",
        "evaluate": "evaluate_peers score_network",
        "metrics": "NUM_BINS PeerMetrics",
    },
)
