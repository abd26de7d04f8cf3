"""Rows of a table: three perceptrons teach each other with pcl, on numbers and one category column."""

import torch
from sklearn.datasets import load_wine
from torch import nn

import codistill as cd
from codistill.evaluation import evaluate_peers
from codistill.training import PeerTraining

torch.manual_seed(0)
table = load_wine()
values, labels = torch.tensor(table.data, dtype=torch.float32), torch.tensor(table.target)
order = torch.randperm(len(labels))
train, test = order[:60], order[60:]
numbers = (values - values[train].mean(0)) / values[train].std(0)
strong = (values[:, 0] > 13).long()  # a category, for the example's sake


class Perceptron(nn.Module):
    """Two hidden layers on 13 numbers and the embedding of a category."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.strong = nn.Embedding(2, 4)
        self.body = nn.Sequential(nn.Linear(13 + 4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.head = nn.Linear(32, num_classes)

    def forward(self, numbers: torch.Tensor, strong: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        return self.head(self.body(torch.cat((numbers, self.strong(strong)), 1)))


peers = cd.NetworkPeers(Perceptron, num_peers=3, num_classes=3, example=(numbers[:1], strong[:1]))
method = cd.methods.PCL(3, peers.feature_dims, 3, own_views=False, ramp_epochs=10)
training = PeerTraining(peers, method)  # holds the mean teachers too
optimizer = torch.optim.AdamW(training.trained_parameters(), lr=0.01)

training.train()
for epoch in range(40):
    for rows in train[torch.randperm(60)].split(20):
        terms = training((numbers[rows], strong[rows]), labels[rows], weight=method.weight_at(epoch))
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        training.end_step()

figures = evaluate_peers(peers, method, [((numbers[test], strong[test]), labels[test])]).compute()
print("test accuracy of the peers:", ", ".join(f"{accuracy:.1f} %" for accuracy in figures["top1"]))
student = training.student()  # a plain Perceptron
torch.save(student.state_dict(), "student.pt")
