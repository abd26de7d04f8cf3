"""A loop of one's own with okddip: three peers and a leader learn the digits, the leader is deployed."""

import numpy as np
import torch
from sklearn.datasets import load_digits

import codistill as cd

torch.manual_seed(0)
digits = load_digits()
images = torch.from_numpy(digits.images.astype(np.float32)).unsqueeze(1) / 16
labels = torch.from_numpy(digits.target)
train = torch.utils.data.TensorDataset(images[:1000], labels[:1000])
loader = torch.utils.data.DataLoader(train, batch_size=50, shuffle=True)
epochs = 4

peers = cd.NetworkPeers("resnet8", num_peers=4, num_classes=10, in_channels=1, image_size=8)
method = cd.methods.OKDDip(num_peers=4, feature_dim=peers.feature_dims[0], ramp_epochs=1)
optimizer = torch.optim.SGD([*peers.parameters(), *method.parameters()], lr=0.05, momentum=0.9)

for epoch in range(epochs):
    for batch, targets in loader:
        terms = method(peers(batch), targets, weight=method.weight_at(epoch))
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()

student = method.deploy(peers).eval()  # a plain nn.Module
with torch.no_grad():
    accuracy = (student(images[1000:]).argmax(1) == labels[1000:]).float().mean()
print(f"accuracy on {len(labels) - 1000} other digits: {100 * accuracy:.1f} %")
