"""Networks whose channels can be removed, for the tests of removal."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """A stem, two blocks on a residual stream with batch norms, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.n0 = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        for block in (1, 2):
            self.add_module(f"a{block}", nn.Conv2d(12, 16, 3, padding=1, bias=False))
            self.add_module(f"m{block}", nn.BatchNorm2d(16))
            self.add_module(f"b{block}", nn.Conv2d(16, 12, 3, padding=1, bias=False))
            self.add_module(f"n{block}", nn.BatchNorm2d(12))
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.n0(self.stem(x)))
        h = F.relu(h + self.n1(self.b1(F.relu(self.m1(self.a1(h))))))
        h = F.relu(h + self.n2(self.b2(F.relu(self.m2(self.a2(h))))))
        y: Tensor = self.head(h.mean((2, 3)))
        return y


class Separable(nn.Module):
    """Pointwise, depthwise, pointwise, with concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.dw = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.left, self.right = nn.Conv2d(16, 12, 1), nn.Conv2d(16, 14, 1)
        self.head = nn.Linear(26 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self.dw(F.relu6(self.first(x))))
        h = torch.cat([self.left(h).relu(), self.right(h).relu()], 1)
        y: Tensor = self.head(F.adaptive_avg_pool2d(h, 2).flatten(1))
        return y


class Gated(nn.Module):
    """A transformer's gated MLP with a packed projection."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.both, self.down = nn.Linear(6, 16), nn.Linear(16, 48), nn.Linear(24, 16, bias=False)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.flatten(1)[:, :48].unflatten(1, (8, 6)))
        gate, up = self.both(h).chunk(2, -1)
        y: Tensor = self.head(F.layer_norm(h + self.down(F.silu(gate) * up), (16,)).mean(1))
        return y


class Attending(nn.Module):
    """Attention in which two heads share a key, and a head behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.q, self.k, self.v = nn.Linear(16, 48), nn.Linear(16, 24), nn.Linear(16, 24)
        self.o, self.head = nn.Linear(48, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.flatten(1)[:, :48].unflatten(1, (8, 6)))
        q, k, v = (layer(h).unflatten(-1, (-1, 6)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y: Tensor = self.head(F.layer_norm(h + self.o(attended), (16,)).mean(1))
        return y


class Packed(nn.Module):
    """Packed queries, keys and values, and numbers of heads that the module keeps, as in timm; group norms before."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = 4, 6, 24
        self.first, self.norm, self.embed = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(8, 16), nn.Conv2d(16, 12, 2, 2)
        self.qkv, self.proj, self.head = nn.Linear(12, 72), nn.Linear(24, 12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(F.relu(self.norm(self.first(x)))).flatten(2).transpose(1, 2)
        packed = self.qkv(h).reshape(len(h), 16, 3, self.num_heads, self.head_dim)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(h), 16, self.attn_dim)
        y: Tensor = self.head((h + self.proj(attended)).mean(1))
        return y


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual,
    "separable": Separable,
    "gated": Gated,
    "attending": Attending,
    "packed": Packed,
}


def images(samples: int = 80, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    waves = torch.randn(12, 3, 8, 8, generator=g)
    return list((torch.randn(samples, 12, generator=g) @ waves.flatten(1)).reshape(-1, 3, 8, 8).div(3).split(40))


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model.eval()


def error_of(model: nn.Module, other: nn.Module, data: list[Tensor]) -> float:
    with torch.no_grad():
        x = torch.cat(data)
        expected = model(x)
        return float((other(x) - expected).norm() / (expected - expected.mean(0)).norm())
