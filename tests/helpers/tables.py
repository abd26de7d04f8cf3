"""Tables filled with made-up results."""

import json

from codistill.config.config import ReproduceConfig
from codistill.reproduce.plan import make_plan


def fake_result(top1, peers=4):
    return {
        "student": {"top1": top1},
        "test": {"top1": [top1] * (peers - 1) + [top1 - 4], "ensemble_top1": top1 + 1},
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
                {"epoch": e, "test": fake_result(v)["test"], "test_student": {"top1": v}}
                for e, v in ((0, 73.0), (1, 70.0))
            ]
            path = cell.run_path(tmp_path, seed) / "metrics.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return plan
