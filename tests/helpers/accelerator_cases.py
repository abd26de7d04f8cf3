"""What is trained on the CPU and on a simulated device, side by side: options of `Config`, by name."""

from codistill.config.methods import DMLConfig, KDCLConfig, KDConfig, OKDDipConfig

NAMED = ("independent", "dml", "cl_ilr", "okddip", "pcl", "kdcl", "mcl")
BRANCHES = ("independent", "cl_ilr", "one", "okddip", "pcl", "kdcl")
CASES = {
    **{name: {"method": name} for name in NAMED},
    **{f"{name}, branches": {"method": name, "topology": "branches"} for name in BRANCHES},
    "kd": {"method": KDConfig(), "peers": None},
    "dml, joint": {"method": DMLConfig(update="joint")},
    "kdcl, naive": {"method": KDCLConfig(target="naive")},
    "kdcl, linear": {"method": KDCLConfig(target="linear")},
    "kdcl, linear a batch": {"method": KDCLConfig(target="linear", granularity="batch")},
    "kdcl, general": {"method": KDCLConfig(target="general", holdout_fraction=0.2)},
    "okddip, random": {"method": OKDDipConfig(ablation="random")},
    "pcl, mean teacher deployed": {"method": "pcl", "deploy": "ema"},
    "stacked": {"execution": "stacked"},
    "stacked branches": {"execution": "stacked", "topology": "branches"},
    "parts": {"accumulate": 2},
    "recomputed": {"checkpoint_activations": True},
    "mixup": {"mixup": 0.2},
    "cutmix and mixup": {"cutmix": 1.0, "mixup": 0.2},
    "cutout": {"cutout": 3},
    "bad steps skipped": {"skip_nonfinite": 2},
    "adamw": {"optimizer": "adamw", "warmup_epochs": 1.0},
    "frozen, a rate for heads": {"freeze": ("conv1",), "head_lr_scale": 2.0},
    "files": {"data_pipeline": "files", "data_workers": 0, "cutout": 3},
    "resumed, stacked": {"checkpoint_every_steps": 1, "execution": "stacked"},
    "no float64": {"dtype": "float32"},
    "no float64, kdcl linear": {"method": KDCLConfig(target="linear"), "dtype": "float32"},
    "no float64, kdcl general": {"method": KDCLConfig(target="general", holdout_fraction=0.2), "dtype": "float32"},
}
