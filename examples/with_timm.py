"""Peers as a task of timm: branches of a timm network learn with cl_ilr in timm's way of writing a loop."""

import torch
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2

import codistill as cd
from codistill.integrations import PeerTask

torch.manual_seed(0)
digits = load_digits()
images = (
    torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1).repeat_interleave(4, 2).repeat_interleave(4, 3) / 16
)
labels = torch.tensor(digits.target)
train = torch.utils.data.TensorDataset(images[:1000], labels[:1000])
loader = torch.utils.data.DataLoader(train, batch_size=50, shuffle=True)

peers = cd.BranchPeers("timm:test_resnet", num_peers=3, num_classes=10, in_channels=1, image_size=32)
task = PeerTask(peers, cd.methods.CLILR(3), steps_per_epoch=len(loader))
optimizer = create_optimizer_v2(task.trainable_module, opt="adamw", lr=0.005)
task.attach(optimizer)  # its steps end the method's

task.train()
for _ in range(4):
    for batch, targets in loader:
        result = task(batch, targets)
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()

student = task.student()  # a plain timm network
with torch.no_grad():
    accuracy = (student(images[1000:]).argmax(1) == labels[1000:]).float().mean()
print(f"accuracy on {len(labels) - 1000} other digits: {100 * accuracy:.1f} %")
