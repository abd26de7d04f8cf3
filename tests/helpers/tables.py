"""Tables filled with made-up results."""

import json

from codistill.config.config import ReproduceConfig
from codistill.reproduce.plan import make_plan


def fake_result(top1, peers=4):
    return {
        "deployed": "member 0",
        "protocol": "paper",
        "epochs": 2,
        "student": {"top1": top1, "nll": 1.0, "ece": 0.1},
        "test": {
            "samples": 100,
            **{"top1": [top1] * (peers - 1) + [top1 - 4], "nll": [1.0] * peers, "ece": [0.1] * peers},
            **{"ensemble_top1": top1 + 1, "ensemble_nll": 1.0, "ensemble_ece": 0.1},
            **{"diversity": 0.1, "disagreement": 0.1, "both_wrong": 0.1},
        },
        "parameters_trained": 2_000_000,
        "parameters_deployed": 500_000,
        "seconds": 12.0,
    }


def fake_plan(tmp_path, protocol, scale="full", table="okddip_table2"):
    options = ReproduceConfig(network=("resnet32",), protocol=protocol, scale=scale, out=str(tmp_path))
    plan = make_plan(table, options)
    for cell in plan.cells:
        for seed in range(3):
            bonus = 0.5 if cell.method == "OKDDip-branch" else 0.0
            cell.results[seed] = fake_result(70.0 + seed + bonus)
            lines = [
                {
                    **{"epoch": e, "lr": 0.1, "weight": 1.0, "train": {"loss": 1.0, "top1": [50.0] * 4, "distill": []}},
                    **{"test": fake_result(v)["test"], "test_student": fake_result(v)["student"]},
                }
                for e, v in ((0, 73.0), (1, 70.0))
            ]
            path = cell.run_path(tmp_path, seed) / "metrics.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return plan
