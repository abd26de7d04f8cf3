"""Networks of different sizes teach each other with kdcl; the small one is deployed.

Member 0 is what kdcl deploys, so the network that is wanted comes first.
"""

import codistill as cd
from codistill.config import KDCLConfig

config = cd.Config(
    method=KDCLConfig(target="minlogit", temperature=2.0),
    model=("resnet8", "resnet20"),
    data="digits",
    train_per_class=50,
    epochs=4,
    batch_size=50,
    lr=0.05,
    out="runs/unequal-peers",
)
result = cd.train(config)
small, large = result.figures["test"]["top1"]
print(f"test accuracy: resnet8 {small:.1f} %, resnet20 {large:.1f} %; deployed: {result.figures['deployed']}")
