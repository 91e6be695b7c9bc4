"""LoRA by peft on an offloaded transformer: whatever is done to adapters gives what a resident model gives."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
hotswap_adapter = pytest.importorskip("peft.utils.hotswap").hotswap_adapter

from models import distinct_nbytes, same  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from dlpoffload.errors import AliasError, GradientError  # noqa: E402
from dlpoffload.planning import Placement, all_mapped, all_staged  # noqa: E402
from dlpoffload.torch import OffloadHandle, offload_  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = {"gpt2": ["c_attn", "c_proj"], "llama": ["q_proj", "v_proj", "down_proj"]}
MODES: dict[str, Callable[[nn.Module, str], OffloadHandle]] = {
    "planned": lambda model, device: offload_(model, distinct_nbytes(model) * 6 // 10, device=device),
    "staged": lambda model, device: offload_(model, "16MiB", device=device, policy=all_staged, slots=3),
    "mapped": lambda model, device: offload_(model, 0, device=device, policy=all_mapped),
}


def transformer(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=64, n_layer=5, n_head=4, vocab_size=120, n_positions=32)
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=120,
    )
    return transformers.LlamaForCausalLM(config).eval()


def attached(model: nn.Module, kind: str, seed: int = 1, name: str = "default", rank: int = 4) -> Any:
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=rank, target_modules=TARGETS[kind], init_lora_weights=False, fan_in_fan_out=kind == "gpt2", lora_dropout=0.0
    )
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, config)
        return model
    return peft.get_peft_model(model, config, adapter_name=name)


def tokens(device: str) -> Tensor:
    return torch.randint(0, 120, (2, 7), generator=torch.Generator().manual_seed(0)).to(device)


def check(model: nn.Module, reference: nn.Module, device: str) -> Tensor:
    with torch.no_grad():
        for _ in range(2):
            found, wanted = model(tokens(device)).logits, reference(tokens(device)).logits
            assert same(found, wanted)
    return wanted


@pytest.fixture(params=["gpt2", "llama"], scope="module")
def kind(request: pytest.FixtureRequest) -> str:
    """A transformer's name."""
    return str(request.param)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("first", ["offloaded", "attached"])
def test_the_life_of_adapters(first: str, mode: str, kind: str, device: str, tmp_path: Path) -> None:
    model = transformer(kind)
    reference = copy.deepcopy(model).to(device)
    if first == "offloaded":
        handle = MODES[mode](model, device)
        model = attached(model, kind).to(device)
    else:
        model = attached(model, kind)
        handle = MODES[mode](model, device)
    reference = attached(reference, kind).to(device)
    both = (model, reference)
    plain = check(model, reference, device)

    # merged and unmerged, with and without the look for broken values, which copies weights
    for safe in (False, True):
        for each in both:
            each.merge_adapter(safe_merge=safe)
        check(model, reference, device)
        for each in both:
            each.unmerge_adapter()
        check(model, reference, device)

    # hot-swapped: a second one, and one from a file
    for each in both:
        attached(each, kind, seed=2, name="second").to(device)
        each.set_adapter("second")
    assert not same(check(model, reference, device), plain)
    reference.save_pretrained(tmp_path, selected_adapters=["second"])
    for each in both:
        each.load_adapter(tmp_path / "second", adapter_name="third")
        each.set_adapter("third")
    check(model, reference, device)
    with model.disable_adapter(), reference.disable_adapter():
        assert not same(check(model, reference, device), plain)
    for each in both:
        each.delete_adapter("second")
        each.set_adapter("default")
    check(model, reference, device)

    # trained, unless the adapters were there to be offloaded with the rest
    if first == "attached":
        with pytest.raises(GradientError, match="lora_"):
            model(tokens(device), labels=tokens(device)).loss.backward()
        assert all(parameter.grad is None for parameter in model.parameters())
    else:
        results = []
        for each in both:
            each.zero_grad()
            each(tokens(device), labels=tokens(device)).loss.backward()
            results.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
        assert results[0].keys() == results[1].keys()
        assert len(results[0]) > 10
        assert all("lora_" in name and same(results[0][name], gradient) for name, gradient in results[1].items())

    # merged for good
    found, wanted = (each.merge_and_unload() for each in both)
    check(found, wanted, device)
    state = found.state_dict()
    for name, tensor in wanted.state_dict().items():
        assert same(state[name], tensor), name
    report = handle.report(link=False)
    assert report.stats.mapped_runs == 0
    assert (report.stats.copies > 0) == (mode != "mapped")
    assert handle.plan.nbytes(Placement.HOST_STAGED) + handle.plan.nbytes(Placement.HOST_MAPPED) > 0
    handle.restore_()
    check(found.to(device), wanted, device)


def test_refreshed_after_attaching(kind: str, device: str) -> None:
    """So that the adapters themselves are offloaded; they cannot be trained then."""
    model = transformer(kind)
    reference = attached(copy.deepcopy(model), kind).to(device)
    handle = offload_(model, "16MiB", device=device, policy=all_staged, slots=3)
    before = handle.plan.total_nbytes
    model = attached(model, kind).to(device)
    handle.refresh_()
    assert handle.plan.total_nbytes > before
    assert any("lora_" in name for name in handle.plan.specs)
    check(model, reference, device)
    with pytest.raises(GradientError, match="lora_"):
        model(tokens(device), labels=tokens(device)).loss.backward()


@pytest.mark.parametrize("rank", [4, 8])
@pytest.mark.parametrize("mode", ["planned", "staged"])
@pytest.mark.parametrize("first", ["offloaded", "attached"])
def test_hot_swapped_in_place(first: str, mode: str, rank: int, kind: str, device: str, tmp_path: Path) -> None:
    """peft's own hot swap writes by ``.data``, and swaps tensors where the rank grows."""
    donor = attached(transformer(kind), kind, seed=3, rank=rank)
    donor.save_pretrained(tmp_path)
    model = transformer(kind)
    reference = attached(copy.deepcopy(model), kind).to(device)
    if first == "offloaded":
        handle = MODES[mode](model, device)
        model = attached(model, kind).to(device)
    else:
        model = attached(model, kind)
        handle = MODES[mode](model, device)
    plain = check(model, reference, device)
    for each in (model, reference):
        hotswap_adapter(each, tmp_path, "default", torch_device=device)
    if rank == 8 and first == "attached":
        with contextlib.suppress(AliasError):  # where it was staged
            check(model, reference, device)
        handle.refresh_()
    assert not same(check(model, reference, device), plain)
    for write in (2.0, -0.25):
        for each in (model, reference):
            for name, parameter in each.named_parameters():
                if "lora_" in name:
                    parameter.data.mul_(write)
        check(model, reference, device)
    found, wanted = (each.merge_and_unload() for each in (model, reference))
    check(found, wanted, device)


def test_a_training_loop_with_checkpoints(kind: str, device: str) -> None:
    model = transformer(kind)
    reference = attached(copy.deepcopy(model), kind).to(device).train()
    handle = MODES["planned"](model, device)
    model = attached(model, kind).to(device).train()
    both = (model, reference)
    for each in both:
        each.base_model.model.gradient_checkpointing_enable()
        each.enable_input_require_grads()
    optimisers = [torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-2) for each in both]
    for step in range(3):
        losses = []
        for each, optimiser in zip(both, optimisers, strict=True):
            torch.manual_seed(step)
            optimiser.zero_grad()
            loss = each(tokens(device), labels=tokens(device)).loss
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        assert same(*losses)
    check(model.eval(), reference.eval(), device)
    stats = handle.report(link=False).stats
    assert stats.copies > 0
    assert stats.mapped_runs == 0
