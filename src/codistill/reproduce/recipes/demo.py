"""The demo: few labels per class, small networks, enough epochs to fit them; it takes minutes on two CPU cores."""

from codistill.config import CompareConfig
from codistill.utils import InputError, suggest

SHARED = {"model": ("resnet8",), "peers": 4, "topology": "networks", "workers": 2, "val_fraction": 0.1, "seeds": 3}
SETS = {
    # Epochs and number of seeds were chosen on validation images, with seeds 0 to 4; the seeds printed are others.
    "digits": {
        **{"train_per_class": 10, "epochs": 60, "batch_size": 25, "lr": 0.05, "execution": "stacked"},
        **{"seeds": 12, "first_seed": 100, "eval_every_epochs": 60, "checkpoint_every_epochs": 60},
    },
    "fashion-mnist": {"train_per_class": 50, "epochs": 40, "batch_size": 64, "lr": 0.05},
    "cifar100": {"train_per_class": 10, "epochs": 30, "batch_size": 64, "lr": 0.05},
}
METHODS = ["independent", "okddip", "pcl"]


def demo(data: str = "digits") -> CompareConfig:
    """Return the demo's comparison on a data set.

    Raises:
        InputError: the demo has no recipe for that data set.
    """
    if data not in SETS:
        raise InputError(f'--data: the demo has no recipe for "{data}"{suggest(data, SETS)}')
    return CompareConfig(method="independent", data=data, **(SHARED | SETS[data]))  # type: ignore[arg-type]
