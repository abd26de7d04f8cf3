"""Plain networks put together by hand, the slow way, and peers to hold against them."""

import torch
import torch.nn.functional as F
from torch import nn

from codistill.models import resolve
from codistill.peers.branches import BranchPeers
from codistill.peers.members import member_seed
from codistill.peers.networks import NetworkPeers

CLASSES, SIZE = 5, 8
TREE = {"branch_at": ("layer2", "layer3"), "fan_out": (2, 2)}


def plain_network(member, seed=0, name="resnet8"):
    """Build one network as member `member` of peers with `seed` must be built."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(member_seed(seed, member))
        return resolve(name)(CLASSES).double()


def plain_branches(owners, seed=0, name="resnet8"):
    """Build networks in which layer `l` of network p is the very module of network `owners[l][p]`."""
    count = len(next(iter(owners.values())))
    networks = [plain_network(p, seed, name) for p in range(count)]
    for layer, owner in owners.items():
        parts = [getattr(networks[q], layer) for q in owner]
        for network, part in zip(networks, parts):
            setattr(network, layer, part)
    return networks


def fork_owners(count):
    return {layer: [0] * count for layer in ("conv1", "bn1", "layer1", "layer2")}


TREE_OWNERS = {"conv1": [0] * 4, "bn1": [0] * 4, "layer1": [0] * 4, "layer2": [0, 0, 2, 2]}


def slow_block(block, x):
    y = F.relu(block.bn1(block.conv1(x)))
    y = block.bn2(block.conv2(y))
    if isinstance(block.shortcut, nn.Sequential):
        x = block.shortcut[1](block.shortcut[0](x))
    return F.relu(y + x)


def slow_stem(network, x):
    return F.relu(network.bn1(network.conv1(x)))


def slow_head(network, x):
    features = x.sum((2, 3)) / (x.shape[2] * x.shape[3])
    return features @ network.fc.weight.T + network.fc.bias, features


def slow_fork(networks, images):
    """Run the shared layers once, and every branch on what they give -> logits, features, trunk."""
    first = networks[0]
    trunk = slow_block(first.layer2[0], slow_block(first.layer1[0], slow_stem(first, images)))
    ends = [slow_head(network, slow_block(network.layer3[0], trunk)) for network in networks]
    return [z for z, _ in ends], [f for _, f in ends], trunk.sum((2, 3)) / (trunk.shape[2] * trunk.shape[3])


def slow_tree(networks, images):
    """Run the stem and layer1 once, layer2 of networks 0 and 2, and every layer3."""
    low = slow_block(networks[0].layer1[0], slow_stem(networks[0], images))
    limbs = {p: slow_block(networks[p].layer2[0], low) for p in (0, 2)}
    ends = [slow_head(n, slow_block(n.layer3[0], limbs[p - p % 2])) for p, n in enumerate(networks)]
    return [z for z, _ in ends], [f for _, f in ends], low.sum((2, 3)) / (low.shape[2] * low.shape[3])


def branches(count=3, seed=0, spec="resnet8", **options):
    return BranchPeers(spec, count, CLASSES, seed=seed, image_size=SIZE, **options).double()


def networks(count=3, seed=0, spec="resnet8", **options):
    return NetworkPeers(spec, count, CLASSES, seed=seed, image_size=SIZE, **options).double()


def some_images(count=6, views=None):
    shape = (count, 3, SIZE, SIZE) if views is None else (views, count, 3, SIZE, SIZE)
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(11))


def loss_of(logits, features):
    """Return a loss that treats every member otherwise and couples them."""
    targets = torch.arange(logits[0].shape[0]) % CLASSES
    mean = sum(z.softmax(-1) for z in logits) / len(logits)
    loss = (mean**2).sum()
    for p, (z, f) in enumerate(zip(logits, features)):
        loss = loss + (p + 1) * F.cross_entropy(z, targets) + 0.1 * p * (f**2).mean()
    return loss


def named(peers, index):
    """Return the parameters and buffers of a member under the names that they have in the plain network."""
    member = peers.members[index]
    found = {
        name.replace("inner.", ""): tensor
        for part in (member.body.named_parameters, member.body.named_buffers)
        for name, tensor in part(remove_duplicate=False)
    }
    found |= {f"{member.head_path}.{name}": tensor for name, tensor in member.head.named_parameters()}
    return found


def assert_same_state(peers, plains, tolerance=1e-12):
    """Check every parameter, gradient and running statistic of every member."""
    for index, plain in enumerate(plains):
        mine = named(peers, index)
        theirs = dict(plain.named_parameters()) | dict(plain.named_buffers())
        assert set(mine) == set(theirs)
        for name, tensor in theirs.items():
            close = {"rtol": tolerance, "atol": tolerance, "msg": lambda text, name=name: f"{name}: {text}"}
            torch.testing.assert_close(mine[name], tensor, **close)
            if isinstance(tensor, nn.Parameter):
                torch.testing.assert_close(mine[name].grad, tensor.grad, **close)


def count_parameters(module):
    return sum({id(p): p.numel() for p in module.parameters()}.values())


def owners_of(peers, layer):
    """Return, for every member, the first member that holds the same first parameter of `layer`."""
    firsts = [id(next(member.body.get_submodule(layer).parameters())) for member in peers.members]
    return [firsts.index(first) for first in firsts]


def gradients(peers, images):
    """Return the gradients of a member-wise loss by plain name, one dict a member."""
    outputs = peers(images)
    peers.zero_grad()
    loss_of(outputs.logits_PBC, outputs.features).backward()
    return [
        {name: t.grad.clone() for name, t in named(peers, p).items() if isinstance(t, nn.Parameter)}
        for p in range(peers.num_peers)
    ]


class SmallNet(nn.Module):
    """Two convolutions, with the activation where the test wants it."""

    def __init__(self, num_classes=CLASSES, width=6, inplace=False, activation="module"):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=inplace)
        self.conv2 = nn.Conv2d(4, width, 3, padding=1)
        self.fc = nn.Linear(width, num_classes)
        self.activation = activation

    def forward(self, x):
        x = self.norm(self.conv1(x))
        if self.activation == "function":
            x = F.relu(x, inplace=True)
        else:
            x = self.relu(x)
        x = self.conv2(x)
        if self.activation == "both sides":
            x = self.relu(x)
        return self.fc(x.mean((2, 3)))


class TinyViT(nn.Module):
    """A class token and positions that hang on the root, and blocks in an nn.ModuleList."""

    def __init__(self, num_classes=CLASSES, width=8, depth=3):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 5, width))
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def tokens(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        return torch.cat((self.token.expand(len(x), -1, -1), x), 1) + self.position

    def forward(self, x):
        x = self.tokens(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x)[:, 0])
