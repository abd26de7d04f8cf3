"""pcl: peers learn from their ensemble and from each other's mean teachers, moving averages of the weights.

`deploy="ema"` deploys the mean teacher of peer 0 instead of the peer; it costs the same.
"""

import codistill as cd
from codistill.config import PCLConfig

config = cd.Config(
    method=PCLConfig(ema_decay=0.9),  # 0.999 is the paper's, for over a hundred thousand steps
    model="resnet8",
    data="digits",
    peers=3,
    train_per_class=50,
    epochs=6,
    batch_size=50,
    lr=0.05,
    deploy="ema",
    out="runs/mean-teachers",
)
result = cd.train(config)
peer, teacher = result.figures["test"]["top1"][0], result.figures["test_ema"]["top1"][0]
print(f"test accuracy: peer 0 {peer:.1f} %, its mean teacher {teacher:.1f} %; deployed: {result.figures['deployed']}")
