"""Denoisers in one line: U-Nets with skip connections and lists of blocks that take keywords only, as in diffusers.

Models are made from configurations; nothing is downloaded. What is handmade runs without diffusers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

torch = pytest.importorskip("torch")

from models import same, tensors_of  # noqa: E402
from pairs import Pair  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.utils import parametrizations, parametrize  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def diffusers() -> Any:
    return pytest.importorskip("diffusers")


def floats(*shape: int, device: str, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


# --------------------------------------------------------------------------------------------- diffusers


def conditional_unet(diffusers: Any) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def flux(diffusers: Any) -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=3,
        num_single_layers=5,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )


def dit(diffusers: Any) -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        out_channels=8,
        num_layers=6,
        sample_size=8,
        num_embeds_ada_norm=10,
    )


def autoencoder(diffusers: Any) -> nn.Module:
    return diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )


Inputs = Callable[[str, int], dict[str, Any]]
MODELS: dict[str, tuple[Callable[[Any], nn.Module], Inputs]] = {
    "unet": (
        conditional_unet,
        lambda device, seed: {
            "sample": floats(1, 4, 16, 16, device=device, seed=seed),
            "timestep": torch.tensor([3 + seed], device=device),
            "encoder_hidden_states": floats(1, 5, 16, device=device),
        },
    ),
    "flux": (
        flux,
        lambda device, seed: {
            "hidden_states": floats(1, 16, 4, device=device, seed=seed),
            "encoder_hidden_states": floats(1, 5, 32, device=device),
            "pooled_projections": floats(1, 32, device=device),
            "timestep": torch.tensor([0.5], device=device),
            "img_ids": torch.zeros(16, 3, device=device),
            "txt_ids": torch.zeros(5, 3, device=device),
            "guidance": torch.tensor([3.5], device=device),
        },
    ),
    "dit": (
        dit,
        lambda device, seed: {
            "hidden_states": floats(1, 4, 8, 8, device=device, seed=seed),
            "timestep": torch.tensor([3], device=device),
            "class_labels": torch.tensor([1], device=device),
        },
    ),
    "autoencoder": (autoencoder, lambda device, seed: {"sample": floats(1, 3, 16, 16, device=device, seed=seed)}),
}


@pytest.mark.parametrize(
    ("name", "layout"),
    [*((name, torch.contiguous_format) for name in MODELS), ("unet", torch.channels_last)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_denoisers(name: str, layout: torch.memory_format, device: str, diffusers: Any) -> None:
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    pair = Pair.of(build(diffusers).eval().to(memory_format=layout), device)
    late = []
    with torch.no_grad():
        for seed in range(4):
            given = inputs(device, seed)
            output = pair.assert_same(lambda model, given=given: model(**given), "dataclass")
            assert isinstance(output, diffusers.utils.BaseOutput)
            pair.assert_same(lambda model, given=given: model(**given, return_dict=False), "tuple")
            late.append(pair.handle.report(link=False).stats.late_copies)
    pair.assert_as_planned()
    # its blocks run in another order than they are registered in; that is learned from the first call
    assert late[1:] == late[:1] * 3


def test_a_pipeline(device: str, diffusers: Any) -> None:
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
    ).eval()
    pair = Pair.of(unet, device)

    def images(model: nn.Module) -> Tensor:
        pipeline = diffusers.DDPMPipeline(model, diffusers.DDPMScheduler(num_train_timesteps=50)).to(device)
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline.device == torch.device(device)
        generator = torch.Generator("cpu").manual_seed(4)
        made = pipeline(batch_size=2, generator=generator, num_inference_steps=4, output_type="np").images
        return torch.from_numpy(made)

    pair.assert_same(images)
    pair.assert_as_planned()


def test_fused_projections_are_taken_in(device: str, diffusers: Any) -> None:
    build, inputs = MODELS["unet"]
    torch.manual_seed(0)
    pair = Pair.of(build(diffusers).eval(), device)
    given = inputs(device, 1)
    with torch.no_grad():
        pair.assert_same(lambda model: model(**given))
        for model in pair.each():
            model.fuse_qkv_projections()  # puts new layers in
        pair.handle.refresh_()
        pair.assert_same(lambda model: model(**given), "fused")
    assert any(".to_qkv." in name for name in pair.handle.plan.specs)
    stats = pair.handle.report(link=False).stats
    assert stats.copies > 0
    assert stats.mapped_runs == stats.host_waits == 0


# --------------------------------------------------------------------------------------------- handmade


@dataclass
class Sample:
    """What a denoiser gives."""

    sample: Tensor
    skips: tuple[Tensor, ...]
    info: dict[str, Tensor]


class Resnet(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, inside)
        self.conv = nn.Conv2d(inside, outside, 3, padding=1)
        self.time = nn.Linear(16, outside)
        self.shortcut = nn.Conv2d(inside, outside, 1)

    def forward(self, *, hidden: Tensor, time: Tensor) -> Tensor:
        inner = self.conv(torch.nn.functional.silu(self.norm(hidden)))
        return self.shortcut(hidden) + inner + self.time(time)[:, :, None, None]


class Blocks(nn.Module):
    """A stage: skips in by one keyword, and out in a dict."""

    def __init__(self, *widths: tuple[int, int]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(inside, outside) for inside, outside in widths)

    def forward(self, *, hidden: Tensor, time: Tensor, skips: list[Tensor] | None = None) -> dict[str, Any]:
        states = []
        for resnet in self.resnets:
            if skips is not None:
                hidden = torch.cat([hidden, skips.pop()], dim=1)
            hidden = resnet(hidden=hidden, time=time)
            states.append(hidden)
        return {"hidden": hidden, "states": states}


class Denoiser(nn.Module):
    """Registers its stages in the order of diffusers, and runs them in another; reads its own dtype and device."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 16, 3, padding=1)
        self.time_embedding = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, 16))
        self.down_blocks = nn.ModuleList([Blocks((16, 16), (16, 16)), Blocks((16, 32), (32, 32))])
        self.up_blocks = nn.ModuleList([Blocks((64, 32), (64, 32)), Blocks((48, 16), (32, 16))])
        self.mid_block = Blocks((32, 32))
        self.conv_out = nn.Conv2d(16, 4, 3, padding=1)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, *, sample: Tensor, timestep: int) -> Sample:
        hidden = self.conv_in(sample.to(self.dtype))
        time = self.time_embedding(torch.full((len(sample), 1), float(timestep), dtype=self.dtype, device=self.device))
        skips: list[Tensor] = []
        for block in self.down_blocks:
            output = block(hidden=hidden, time=time)
            hidden = output["hidden"]
            skips += output["states"]
        kept = tuple(skips)
        hidden = self.mid_block(hidden=hidden, time=time)["hidden"]
        for block in self.up_blocks:
            hidden = block(hidden=hidden, time=time, skips=skips)["hidden"]
        return Sample(self.conv_out(hidden), kept, {"time": time})


def denoiser() -> nn.Module:
    torch.manual_seed(0)
    return Denoiser().eval()


class Scaled(nn.Module):
    """A parametrization with a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.tensor(0.5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.gain


def parametrized(model: nn.Module) -> nn.Module:
    for index, module in enumerate(list(model.modules())):
        if isinstance(module, nn.Conv2d):
            wrap = [parametrizations.weight_norm, parametrizations.spectral_norm, None][index % 3]
            if wrap is None:
                parametrize.register_parametrization(module, "weight", Scaled())
            else:
                wrap(module)
    return model.eval()


def run(model: nn.Module, device: str, step: int = 3) -> Sample:
    return model(sample=floats(2, 4, 8, 8, device=device, seed=step), timestep=step)


@pytest.mark.parametrize("wrap", [lambda model: model, parametrized], ids=["plain", "parametrized"])
@pytest.mark.parametrize("percent", [30, 60])
def test_a_unet_of_keywords_dicts_and_dataclasses(percent: int, wrap: Any, device: str) -> None:
    pair = Pair.of(wrap(denoiser()), device, percent)
    assert pair.offloaded.device == torch.device(device)
    assert pair.offloaded.dtype == torch.float32
    with torch.no_grad():
        for step in range(4):
            output = pair.assert_same(lambda model, step=step: run(model, device, step), f"step {step}")
    assert [field.name for field in fields(output)] == ["sample", "skips", "info"]
    assert len(output.skips) == 4
    pair.assert_as_planned()
    # two calls of a parametrized layer under one cache see one weight
    with torch.no_grad(), parametrize.cached():
        pair.assert_same(lambda model: run(model, device), "cached")


def test_hooks_of_users(device: str) -> None:
    pair = Pair.of(denoiser(), device)
    seen: list[list[Any]] = []

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        seen[-1].append(next(module.parameters()).detach().clone())
        return args, {**kwargs, "time": kwargs["time"] * 2}

    def after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        seen[-1].append(module.resnets[0].conv.weight.detach().clone())
        return {**output, "hidden": output["hidden"] + module.resnets[0].conv.bias.sum()}

    handles = []
    for model in pair.each():
        for block in (*model.down_blocks, model.mid_block, *model.up_blocks):
            handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(block.register_forward_hook(after, with_kwargs=True))
    with torch.no_grad():
        for step in range(3):

            def one(model: nn.Module, step: int = step) -> Sample:
                seen.append([])
                return run(model, device, step)

            hooked = pair.assert_same(one, f"step {step}")
            for found, wanted in zip(seen[-1], seen[-2], strict=True):
                assert same(found, wanted)
            assert len(seen[-1]) == 2 * 5
        for handle in handles:
            handle.remove()
        assert not same(pair.assert_same(lambda model: run(model, device, 2)).sample, hooked.sample)
    seen.clear()
    pair.assert_as_planned()
    pair.handle.restore_()
    for found, wanted in zip(tensors_of(pair.offloaded).values(), tensors_of(pair.resident).values(), strict=True):
        assert same(found, wanted)
