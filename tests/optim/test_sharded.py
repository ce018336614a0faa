"""Sharded parameters (DTensor): element-wise parts act on shards, Newton–Schulz on the whole matrix, others refuse in words.

One process is the whole mesh here. What it cannot show is that shards are gathered; it shows that no operation mixes shards with
plain tensors or lacks a rule for them.
"""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from .problems import MAKERS, WATCHES

WHOLE_ROWS = tuple(name for name in MAKERS if name.startswith(("deep", "feature")))


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    place = tmp_path_factory.mktemp("mesh") / "store"
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class Bag(nn.Module):
    def __init__(self, tensors):
        super().__init__()
        self.tensors = nn.ParameterList(tensors)


@pytest.mark.parametrize("name", sorted(WATCHES))
def test_what_watches_layers_needs_whole_ones(name, mesh):
    layer = nn.Linear(4, 6)
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(TypeError, match=r"(DGD|DeltaMomentum): a parameter is sharded"):
        MAKERS[name](layer)
    assert not layer._forward_hooks


@pytest.mark.parametrize("name", [n for n in MAKERS if n not in WATCHES])
def test_shards_move_as_the_whole_does(name, mesh):
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 4), (4,), (3, 5)]

    def normal():
        return [torch.randn(shape, generator=generator) for shape in shapes]

    start = normal()
    plain = Bag([nn.Parameter(w.clone()) for w in start])
    sharded = Bag([nn.Parameter(distribute_tensor(w.clone(), mesh, [Shard(0)])) for w in start])
    one = MAKERS[name](plain)
    if name in WHOLE_ROWS:
        with pytest.raises(TypeError, match="a parameter is sharded, but its memory reads whole rows"):
            MAKERS[name](sharded)
        return
    other = MAKERS[name](sharded)
    for _ in range(6):
        for p, q, g in zip(plain.tensors, sharded.tensors, normal(), strict=True):
            p.grad, q.grad = g, distribute_tensor(g.clone(), mesh, [Shard(0)])
        one.step()
        other.step()
    for p, q in zip(plain.tensors, sharded.tensors, strict=True):
        assert isinstance(q.data, DTensor)
        torch.testing.assert_close(p.detach(), q.full_tensor().detach(), rtol=1e-3, atol=1e-4)
