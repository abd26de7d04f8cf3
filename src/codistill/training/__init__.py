"""Building a run and training it."""

from typing import TYPE_CHECKING

from codistill.utils.lazy import lazy_names

if TYPE_CHECKING:
    from codistill.training.dry_run import describe_dry_run as describe_dry_run
    from codistill.training.load import load_run as load_run
    from codistill.training.load import load_without_images as load_without_images
    from codistill.training.loaders import curve_loader as curve_loader
    from codistill.training.loaders import load_images as load_images
    from codistill.training.loaders import make_loader as make_loader
    from codistill.training.loaders import test_loader as test_loader
    from codistill.training.loop import Result as Result
    from codistill.training.loop import train as train
    from codistill.training.mistakes import find_mistakes as find_mistakes
    from codistill.training.mistakes import find_test_mistakes as find_test_mistakes
    from codistill.training.peer_training import PeerTraining as PeerTraining
    from codistill.training.recipe import apply_recipe as apply_recipe
    from codistill.training.reporter import Reporter as Reporter
    from codistill.training.run import Run as Run
    from codistill.training.self_check import CheckRow as CheckRow
    from codistill.training.self_check import check_machine as check_machine
    from codistill.training.student import count_parameters as count_parameters
    from codistill.training.student import count_trained_and_deployed as count_trained_and_deployed
    from codistill.training.student import deployed_index as deployed_index
    from codistill.training.student import deployed_name as deployed_name
    from codistill.training.student import deployed_network as deployed_network
    from codistill.training.student import deployed_scores as deployed_scores
    from codistill.training.student import deploys_average as deploys_average
    from codistill.training.student import load_student as load_student
    from codistill.training.summary import evaluate_run as evaluate_run

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "load": "load_run load_without_images",
        "dry_run": "describe_dry_run",
        "loaders": "curve_loader load_images make_loader test_loader",
        "loop": "Result train",
        "peer_training": "PeerTraining",
        "mistakes": "find_mistakes find_test_mistakes",
        "recipe": "apply_recipe",
        "reporter": "Reporter",
        "run": "Run",
        "self_check": "CheckRow check_machine",
        "student": (
            "count_parameters count_trained_and_deployed deployed_index deployed_name deployed_network "
            "deployed_scores deploys_average load_student"
        ),
        "summary": "evaluate_run",
    },
)
