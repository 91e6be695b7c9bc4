"""A zoo of small models in plain torch: one for each shape that offloading must cope with.

Each is a few megabytes with seeded weights. A `Case` builds the same model every time and makes its inputs from a
seed; the inputs are on the CPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dlpoffload.errors import PlanError
from dlpoffload.torch import OffloadHandle, offload_

__all__ = [
    "CASES",
    "Block",
    "Case",
    "Decoder",
    "Step",
    "Tower",
    "assert_same",
    "case_of",
    "distinct_nbytes",
    "flat_outputs",
    "offload_at",
    "run",
    "same",
    "tensors_of",
]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


# ------------------------------------------------------------------------------------------ transformers


class Attention(nn.Module):
    def __init__(self, width: int, heads: int = 4, bias_buckets: int = 0) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)
        self.relative = nn.Embedding(bias_buckets, heads) if bias_buckets else None

    def bias(self, queries: int, keys: int) -> Tensor | None:
        if self.relative is None:
            return None
        distance = torch.arange(queries)[:, None] - torch.arange(keys)[None, :]
        buckets = distance.clamp(-4, 3) + 4
        return self.relative(buckets.to(self.relative.weight.device)).permute(2, 0, 1)[None]

    def forward(self, x: Tensor, memory: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        source = x if memory is None else memory

        def split(t: Tensor) -> Tensor:
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        scores = split(self.q(x)) @ split(self.k(source)).transpose(-1, -2)
        if bias is not None:
            scores = scores + bias
        mixed = scores.softmax(-1) @ split(self.v(source))
        return self.o(mixed.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.down(functional.gelu(self.up(x)))


class Decoder(nn.Module):
    """GPT-like: embeddings, a list of blocks, a head that may be tied to the embedding."""

    def __init__(self, *, tied: bool, width: int = 96, depth: int = 7, vocabulary: int = 500) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(32, width))
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position[: tokens.shape[-1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class CrossBlock(nn.Module):
    def __init__(self, width: int, *, cross: bool, bias_buckets: int) -> None:
        super().__init__()
        self.attention = Attention(width, bias_buckets=bias_buckets)
        self.cross = Attention(width) if cross else None
        self.ff = nn.Sequential(nn.Linear(width, 3 * width), nn.ReLU(), nn.Linear(3 * width, width))

    def forward(
        self, x: Tensor, bias: Tensor | None = None, memory: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if bias is None:
            bias = self.attention.bias(x.shape[1], x.shape[1])
        x = x + self.attention(x, bias=bias)
        if self.cross is not None:
            x = x + self.cross(x, memory=memory)
        return x + self.ff(x), bias


class Stack(nn.Module):
    def __init__(self, shared: nn.Embedding, depth: int, *, cross: bool) -> None:
        super().__init__()
        width = shared.embedding_dim
        self.embed = shared
        self.block = nn.ModuleList(
            CrossBlock(width, cross=cross, bias_buckets=8 if i == 0 else 0) for i in range(depth)
        )

    def forward(self, tokens: Tensor, memory: Tensor | None = None) -> Tensor:
        x, bias = self.embed(tokens), None
        for block in self.block:
            x, bias = block(x, bias=bias, memory=memory)
        return x


class EncoderDecoder(nn.Module):
    """T5-like: one embedding shared by three, relative bias in the first block only, cross attention."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.shared = nn.Embedding(300, width)
        self.encoder = Stack(self.shared, 4, cross=False)
        self.decoder = Stack(self.shared, 4, cross=True)
        self.head = nn.Linear(width, 300, bias=False)
        self.head.weight = self.shared.weight

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.decoder(target, memory=self.encoder(source)))


class Recurring(nn.Module):
    """ALBERT-like: one block object called many times, and one that stands at two places of a list."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.stem = nn.Linear(32, width)
        self.group = Block(width)
        first, second, third = (Block(width) for _ in range(3))
        self.layers = nn.ModuleList([first, second, first, third])
        self.head = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(5):
            x = self.group(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Expert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 2 * width, bias=False)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Mixture(nn.Module):
    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(Expert(width) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        weights, chosen = self.router(flat).softmax(-1).topk(2)
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            row, rank = (chosen == index).nonzero(as_tuple=True)
            if len(row):
                out.index_add_(0, row, expert(flat[row]) * weights[row, rank, None])
        return out.view_as(x)


class MixtureBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = Attention(width)
        self.norm = nn.LayerNorm(width)
        self.mixture = Mixture(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mixture(self.norm(x))


class MixtureModel(nn.Module):
    """Mixtral-like: eight experts a layer, the two best are called."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(200, width)
        self.layers = nn.ModuleList(MixtureBlock(width) for _ in range(3))
        self.head = nn.Linear(width, 200)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


# ------------------------------------------------------------------------------------------------ images


class Resnet(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1)
        self.skip = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.conv2(functional.silu(self.conv1(functional.silu(self.norm(x)))))


class SpatialAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.inner = Attention(channels)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.norm(x).flatten(2).transpose(1, 2)
        return x + self.inner(flat).transpose(1, 2).unflatten(2, x.shape[2:])


class Stage(nn.Module):
    def __init__(self, inside: int, outside: int, *, skips: int = 0) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([Resnet(inside + skips, outside), Resnet(outside, outside)])
        self.attentions = nn.ModuleList([SpatialAttention(outside), SpatialAttention(outside)])

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(x))
        return x


class UNet(nn.Module):
    """down, mid and up, with skip connections from one to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.down = nn.ModuleList([Stage(16, 16), Stage(16, 32), Stage(32, 64)])
        self.mid = Stage(64, 64)
        self.up = nn.ModuleList([Stage(64, 32, skips=64), Stage(32, 16, skips=32), Stage(16, 16, skips=16)])
        self.out = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        skips = []
        for stage in self.down:
            x = stage(x)
            skips.append(x)
        x = self.mid(x)
        for stage in self.up:
            x = stage(x, skips.pop())
        return self.out(x)


class VisionLanguage(nn.Module):
    """LLaVA-like: a vision tower, a projector, a language model."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 48, 4, stride=4)
        self.cls = nn.Parameter(torch.randn(1, 1, 48))
        self.tower = nn.ModuleDict({"layers": nn.ModuleList(Block(48) for _ in range(4))})
        self.projector = nn.Sequential(nn.Linear(48, width), nn.GELU(), nn.Linear(width, width))
        self.language = Decoder(tied=False, width=width, depth=5, vocabulary=200)

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
        for layer in self.tower["layers"]:
            x = layer(x)
        text = self.language.embed(tokens)
        x = torch.cat([self.projector(x), text], dim=1)
        for layer in self.language.layers:
            x = layer(x)
        return self.language.head(self.language.norm(x))


class Normalised(nn.Module):
    """BatchNorm in training mode: its buffers are written in every forward."""

    def __init__(self, channels: int = 48) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
            for _ in range(6)
        )
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


# ------------------------------------------------------------------------------------------------ others


class Recurrent(nn.Module):
    """LSTM and GRU, which hold their weights in a list of their own too."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, num_layers=3, batch_first=True)
        self.gru = nn.GRU(width, width, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, 7)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, (hidden, _) = self.lstm(x)
        x, _ = self.gru(x)
        return self.head(x), hidden


class Packed(nn.Module):
    """MultiheadAttention reads the weights of its out_proj without calling it."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True) for _ in range(5)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@dataclass
class Answer:
    logits: Tensor
    states: dict[str, Tensor]
    rest: list[Any]


class Keyworded(nn.Module):
    """Keyword-only inputs, and outputs in dataclasses and dicts."""

    def __init__(self, width: int = 80) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({f"block_{i}": KeywordBlock(width) for i in range(6)})

    def forward(self, *, x: Tensor, scale: float = 1.0) -> Answer:
        states = {}
        for name, block in self.blocks.items():
            answer = block(x=x, options={"scale": scale})
            x, states[name] = answer.logits, answer.states["hidden"]
        return Answer(x, states, [x.mean(), None, "text"])


class KeywordBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)

    def forward(self, *, x: Tensor, options: dict[str, float]) -> Answer:
        hidden = torch.tanh(self.up(x)) * options["scale"]
        return Answer(self.down(hidden), {"hidden": hidden}, [])


class Rotary(nn.Module):
    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(length), 1.0 / 10000 ** (torch.arange(0, width, 2) / width))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = self.cos[: x.shape[1]], self.sin[: x.shape[1]]
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Rotated(nn.Module):
    """Buffers that state_dict leaves out, inside units and in a module of their own."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.rotary = Rotary(width, 64)
        self.layers = nn.ModuleList(
            nn.Sequential(Rotary(width, 64), nn.Linear(width, width), nn.Linear(width, width)) for _ in range(5)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.rotary(x)
        for layer in self.layers:
            x = layer(x)
        return x


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class OddBlock(nn.Module):
    """Parameters and buffers of every dtype and layout."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)

        def bytes_(*shape: int) -> Tensor:
            return torch.randint(-128, 128, shape, generator=g, dtype=torch.int8)

        self.int8 = _frozen(bytes_(width, width))
        self.register_buffer("uint8", bytes_(width, width).view(torch.uint8))
        self.register_buffer("mask", bytes_(width) > 0)
        self.bf16 = _frozen(torch.randn(width, width, generator=g).bfloat16())
        self.fp16 = _frozen(torch.randn(width, generator=g).half())
        self.fp8 = _frozen(torch.randn(width, width, generator=g).to(torch.float8_e4m3fn))
        self.register_buffer("fp8_scale", torch.rand(1, generator=g).to(torch.float8_e5m2))
        self.spectrum = _frozen(torch.randn(width, dtype=torch.complex64, generator=g))
        self.register_buffer("wide", torch.randn(width, dtype=torch.float64, generator=g))
        self.register_buffer("count", torch.randint(0, 1 << 40, (3,), generator=g))
        self.gain = nn.Parameter(torch.randn((), generator=g))
        self.empty = nn.Parameter(torch.empty(0, width))
        self.register_buffer("nothing", torch.empty(3, 0, 2, dtype=torch.bfloat16))
        self.transposed = nn.Parameter(torch.randn(width, 2 * width, generator=g).t())
        self.register_buffer("expanded", torch.randn(1, width, generator=g).expand(5, width))
        self.register_buffer("sliced", torch.randn(width, 3 * width, generator=g)[:, ::3])

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.int8.float() / 1000 + (x @ self.uint8.float()) / 1000
        x = torch.where(self.mask, x, x * self.fp16.float())
        x = x @ self.bf16.float() @ self.fp8.float() / 100 * self.fp8_scale.float()
        x = torch.fft.ifft(torch.fft.fft(x) * self.spectrum).real
        x = (x.double() * self.wide).float() + self.count.sum() % 7
        x = x * self.gain + functional.linear(x, self.empty).sum() + self.nothing.sum()
        return (functional.linear(x, self.transposed).chunk(2, -1)[0] @ self.sliced + self.expanded.sum(0)).tanh()


class Odd(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.layers = nn.ModuleList(OddBlock(width, seed) for seed in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x * self.temperature


class Tied(nn.Module):
    """Weights tied inside a unit, across units, and as two parameters over the same bytes."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TiedBlock(width) for _ in range(5))
        self.layers[3].up.weight = self.layers[1].up.weight
        self.tail = nn.Linear(width, width)
        self.tail.weight = nn.Parameter(self.layers[4].mix.weight.data)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.tail(x)


class TiedBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(width, 2 * width)
        self.down.weight = self.up.weight
        self.mix = nn.Linear(2 * width, width)
        self.mix.weight = nn.Parameter(torch.randn(width, width) / 8)
        self.again = nn.Parameter(self.mix.weight.data[:4])

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.up(x) + self.down(x)).chunk(2, -1)[0]
        return self.mix(x) + self.again.sum()


def _nested() -> nn.Module:
    def inner(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, 2 * width), nn.Sequential(nn.ReLU(), nn.Linear(2 * width, width)))

    return nn.Sequential(nn.Linear(64, 64), nn.Sequential(*(inner(64) for _ in range(5))), nn.Linear(64, 3))


def _parametrized() -> nn.Module:
    layers = []
    for _ in range(3):
        layers.append(nn.utils.parametrizations.weight_norm(nn.Linear(96, 96)))
        layers.append(nn.utils.parametrizations.spectral_norm(nn.Linear(96, 96)))
    return nn.Sequential(*layers)


class Step(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Linear(width, 2 * width)
        self.b = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(functional.relu(self.a(x)))


class Tower(nn.Module):
    """The simplest thing that streams; `order` says which layers run, and in which order."""

    def __init__(self, depth: int = 6, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Step(width) for _ in range(depth))

    def forward(self, x: Tensor, order: Iterable[int] | None = None) -> Tensor:
        for index in range(len(self.layers)) if order is None else order:
            x = self.layers[index](x)
        return x


# ----------------------------------------------------------------------------------------------- the zoo


@dataclass(frozen=True)
class Case:
    """How to build a model and its inputs. `training` leaves it in training mode."""

    name: str
    build: Callable[[], nn.Module]
    make_inputs: Callable[[], Inputs]
    training: bool = False
    all_used: bool = True
    """A call uses every unit, so that backward reaches every parameter that requires a gradient."""

    def model(self) -> nn.Module:
        """The model, always with the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1234)
            return self.build().train(self.training)

    def inputs(self, seed: int, device: str = "cpu") -> Inputs:
        """Positional and keyword inputs that depend on the seed only."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            args, kwargs = self.make_inputs()

        def moved(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        return tuple(map(moved, args)), {name: moved(value) for name, value in kwargs.items()}


def _tokens(vocabulary: int, length: int = 9) -> Tensor:
    return torch.randint(0, vocabulary, (2, length))


def _floats(*shape: int) -> Callable[[], Inputs]:
    return lambda: ((torch.randn(*shape),), {})


CASES = [
    Case("decoder", lambda: Decoder(tied=False), lambda: ((_tokens(500),), {})),
    Case("decoder_tied", lambda: Decoder(tied=True), lambda: ((_tokens(500),), {})),
    Case("encoder_decoder", EncoderDecoder, lambda: ((_tokens(300), _tokens(300, 5)), {})),
    Case("unet", UNet, _floats(2, 3, 16, 16)),
    Case("unet_channels_last", lambda: UNet().to(memory_format=torch.channels_last), _floats(2, 3, 16, 16)),
    Case("vision_language", VisionLanguage, lambda: ((torch.randn(2, 3, 16, 16), _tokens(200)), {})),
    Case("mixture", MixtureModel, lambda: ((_tokens(200, 3),), {}), all_used=False),
    Case("recurring", Recurring, _floats(2, 6, 32)),
    Case("recurrent", Recurrent, _floats(2, 6, 96)),
    Case("packed", Packed, _floats(2, 6, 64)),
    Case("batch_norm", Normalised, _floats(4, 3, 8, 8), training=True),
    Case("huge_linear", lambda: nn.Linear(1024, 512), _floats(3, 1024)),
    Case("nested_sequential", _nested, _floats(3, 64)),
    Case("keyworded", Keyworded, lambda: ((), {"x": torch.randn(3, 80), "scale": 0.5})),
    Case("rotated", Rotated, _floats(2, 8, 96)),
    Case("odd_tensors", Odd, _floats(3, 64)),
    Case("tied_everywhere", Tied, _floats(3, 96)),
    Case("parametrized", _parametrized, _floats(3, 96), training=True),
]


def flat_outputs(output: Any) -> list[Tensor]:
    """Every tensor of an output, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        return [tensor for value in output.values() for tensor in flat_outputs(value)]
    if isinstance(output, list | tuple):
        return [tensor for value in output for tensor in flat_outputs(value)]
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return [t for field in dataclasses.fields(output) for t in flat_outputs(getattr(output, field.name))]
    return []


def case_of(name: str) -> Case:
    """The case of a name."""
    return next(case for case in CASES if case.name == name)


# -------------------------------------------------------------------------------------------- comparison


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have equal shape, dtype and bits."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def assert_same(found: Any, wanted: Any, where: str = "") -> None:
    """Compare every tensor of two outputs bit by bit."""
    left, right = flat_outputs(found), flat_outputs(wanted)
    assert len(left) == len(right), where
    assert right, where
    wrong = [index for index, (a, b) in enumerate(zip(left, right, strict=True)) if not same(a, b)]
    assert not wrong, f"{where}: outputs {wrong} of {len(right)} differ"


def run(module: nn.Module, inputs: Inputs) -> Any:
    """Call a module."""
    args, kwargs = inputs
    return module(*args, **kwargs)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under every name, those that state_dict leaves out too."""
    found: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    found.update(module.named_buffers(remove_duplicate=False))
    return found


def distinct_nbytes(module: nn.Module) -> int:
    """Bytes that a module's tensors span, those that several share counted once."""
    spans = []
    for tensor in {id(t): t for t in tensors_of(module).values() if t.numel()}.values():
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        spans.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()))
    total = reach = 0
    for start, end in sorted(spans):
        total += max(end - max(start, reach), 0)
        reach = max(reach, end)
    return total


def offload_at(module: nn.Module, budget: int, device: str) -> OffloadHandle:
    """Offload at a budget, or at the smallest that the error names; one byte less must not do."""
    try:
        return offload_(module, budget, device=device)
    except PlanError as error:
        smallest = error.smallest_budget
    assert smallest is not None
    assert smallest > budget
    with pytest.raises(PlanError, match=str(smallest)):
        offload_(module, smallest - 1, device=device)
    return offload_(module, smallest, device=device)
