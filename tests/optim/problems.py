"""Every optimizer as the contract suite makes it, and the small problems it meets; a new optimizer is one line here."""

import torch
from torch import nn

from nestling import optim
from nestling.memory.biases import DotProduct
from nestling.memory.features import Powers
from nestling.memory.networks import Matrix

MAKERS = {
    "dgd_normalized": lambda m, lr=0.3: optim.DGD(m, lr, coupling=0.2),
    "dgd_exact": lambda m, lr=0.3: optim.DGD(m, lr, form="exact"),
    "dgd_neurips": lambda m, lr=0.3: optim.DGD(m, lr, form="neurips", coupling=0.1),
    "dgd_momentum": lambda m, lr=0.1: optim.DGD(m, lr, momentum=0.8, coupling=0.1),
    "preconditioned": lambda m, lr=0.1: optim.PreconditionedMomentum(m.parameters(), lr, 0.8),
    "preconditioned_diagonal": lambda m, lr=0.01: optim.PreconditionedMomentum(
        m.parameters(), lr, 0.8, preconditioner=optim.Diagonal(0.9)
    ),
    "delta": lambda m, lr=0.2: optim.DeltaMomentum(m.parameters(), lr),
    "delta_proximal": lambda m, lr=0.2: optim.DeltaMomentum(m.parameters(), lr, erase=3.0, form="proximal"),
    "delta_tokens": lambda m, lr=0.2: optim.DeltaMomentum(m.parameters(), lr, form="tokens", module=m),
    "delta_diagonal": lambda m, lr=0.03: optim.DeltaMomentum(
        m.parameters(), lr, 0.8, 0.3, preconditioner=optim.Diagonal(0.9)
    ),
    "delta_elementwise": lambda m, lr=0.2: optim.DeltaMomentum(m.parameters(), lr, form="elementwise"),
    "deep": lambda m, lr=0.3: optim.DeepMomentum(m.parameters(), lr),
    "deep_position": lambda m, lr=0.1: optim.DeepMomentum(
        m.parameters(), lr, 0.8, 1.0, skip=0.0, network=Matrix(), bias=DotProduct(), keys="position"
    ),
    "deep_muon": lambda m, lr=0.05: optim.DeepMomentum(
        m.parameters(),
        lr,
        0.8,
        1.0,
        skip=0.0,
        network=Matrix(),
        bias=DotProduct(),
        keys="position",
        output="newton_schulz",
    ),
    "feature": lambda m, lr=0.1: optim.FeatureMomentum(m.parameters(), lr, 0.8),
    "feature_diagonal": lambda m, lr=0.01: optim.FeatureMomentum(
        m.parameters(), lr, 0.8, preconditioner=optim.Diagonal(0.9)
    ),
    "deep_diagonal": lambda m, lr=0.03: optim.DeepMomentum(m.parameters(), lr, preconditioner=optim.Diagonal(0.9)),
    "feature_powers": lambda m, lr=0.1: optim.FeatureMomentum(m.parameters(), lr, 0.8, features=Powers(3)),
    "muon": lambda m, lr=0.05: optim.Muon(m.parameters(), lr, 0.0),
    "m3": lambda m, lr=0.4: optim.M3(m.parameters(), lr, period=4),
    "m3_printed": lambda m, lr=0.01: optim.M3(m.parameters(), lr, period=4, second_moment="printed"),
    "m3_sum": lambda m, lr=0.5: optim.M3(
        m.parameters(), lr, period=4, second_moment="matched", accumulate="sum", orthogonalize=False
    ),
    "m3_none": lambda m, lr=0.05: optim.M3(m.parameters(), lr, period=4, second_moment="none"),
    "adam": lambda m, lr=0.1: optim.AdamMemory(m.parameters(), lr),
    "adam_square": lambda m, lr=0.3: optim.AdamMemory(m.parameters(), lr, target="square", bias_correction=False),
    "adam_ridge": lambda m, lr=0.1: optim.AdamMemory(m.parameters(), lr, ridge=1e-4),
    "adagrad_rows_ridge": lambda m, lr=0.5: optim.AdaGradMemory(m.parameters(), lr, form="rows", ridge=1e-3),
    "adagrad": lambda m, lr=0.3: optim.AdaGradMemory(m.parameters(), lr),
    "adagrad_rows": lambda m, lr=0.3: optim.AdaGradMemory(m.parameters(), lr, momentum=0.5, form="rows", eps=1e-6),
}
ERASES = {"dgd_normalized": 0.2, "dgd_exact": 1.0, "dgd_neurips": 0.1 / 0.3, "dgd_momentum": 0.1 * (1 - 0.8)}
"""κ of those that erase beside what a step writes: with a loss ½‖W x − y‖² they end at W*/(1 + κ) (see `DGD`)."""

RESTLESS = {"m3_sum"}
"""Those that never come to rest: as printed, in sums, the fast memory forgets nothing."""
WATCHES = {*ERASES, "delta_tokens"}
"""Those that see the tokens of a module's layers, and know nothing of gradients that come otherwise."""


def quadratic(dtype=torch.float64):
    """A linear layer, inputs of unit norm that span the space, and the W* they are to be mapped by."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(4, 3, bias=False, dtype=dtype)
    best = torch.randn(3, 4, generator=generator, dtype=dtype)
    x = torch.nn.functional.normalize(torch.randn(24, 4, generator=generator, dtype=dtype), dim=1)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(3, 4, generator=generator, dtype=dtype))
    return layer, x, best


class Net(nn.Module):
    """A little of everything: embedding, convolution, linear maps, a gain, a scalar, and a parameter that is never used."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.convolution = nn.Conv1d(6, 6, 3, padding=1, groups=2)
        self.norm = nn.LayerNorm(6)
        self.hidden = nn.Linear(6, 8)
        self.head = nn.Linear(8, 7)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.unused = nn.Parameter(torch.ones(2, 3))

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + self.convolution(x.mT).mT
        return self.head(torch.tanh(self.hidden(self.norm(x)))) * self.scale


def net(dtype=torch.float32):
    """The net, tokens `[lane, time]` and what is to be predicted of each: a fixed permutation."""
    torch.manual_seed(0)
    model = Net().to(dtype)
    tokens = torch.randint(7, (4, 8), generator=torch.Generator().manual_seed(1))
    return model, tokens, (3 * tokens + 1) % 7


def loss_of(model, tokens, targets):
    logits = model(tokens).flatten(0, 1)
    return torch.nn.functional.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), targets.flatten()
    )
