"""Branches of a torchvision network: they share all layers before `layer4`, and each has its own from there on."""

import codistill as cd

config = cd.Config(
    method="one",
    model="torchvision:resnet18",
    data="digits",
    channels=3,  # torchvision's networks take color images; gray ones are repeated
    topology="branches",
    branch_at="layer4",
    peers=2,
    train_per_class=10,
    epochs=3,
    batch_size=25,
    lr=0.02,
    out="runs/torchvision-branches",
)
result = cd.train(config)
parameters = {name: result.figures[f"parameters_{name}"] for name in ("trained", "deployed")}
print(f"{parameters['trained']:,} parameters trained, {parameters['deployed']:,} deployed")
print(f"test accuracy of the deployed branch: {result.figures['student']['top1']:.1f} %")
