"""Peers in a Lightning Trainer: okddip on digits, with Lightning's checkpoints."""

import torch
from lightning import Trainer
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import codistill as cd
from codistill.integrations import PeerModule

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
train = DataLoader(TensorDataset(images[:1000], labels[:1000]), batch_size=50, shuffle=True)
test = DataLoader(TensorDataset(images[1000:], labels[1000:]), batch_size=200)

peers = cd.NetworkPeers("resnet8", num_peers=4, num_classes=10, in_channels=1, image_size=8)
method = cd.methods.OKDDip(num_peers=4, feature_dim=peers.feature_dims[0], ramp_epochs=1)
module = PeerModule(peers, method, lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9))
trainer = Trainer(max_epochs=4, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
trainer.fit(module, train, test)
print(f"deployed member {trainer.callback_metrics['val_top1']:.1f} %, ", end="")
print(f"ensemble {trainer.callback_metrics['val_ensemble_top1']:.1f} %")
student = module.student()  # a plain nn.Module
torch.save(student.state_dict(), "student.pt")
