"""Hugging Face transformers in one line: `generate` gives the tokens and the logits of the resident model, bit for bit.

Models are made from configurations; nothing is downloaded.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="4.56")

from models import same, tensors_of  # noqa: E402
from pairs import Pair, added_peak  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM  # noqa: E402
from transformers.utils import ModelOutput  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

_TOKENS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
_SMALL = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 8, "vocab_size": 128, **_TOKENS}

MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_SMALL, **_ATTENTION),
    "gpt2_tied": lambda: transformers.GPT2Config(
        n_embd=48, n_layer=8, n_head=4, vocab_size=128, n_positions=64, **_TOKENS
    ),
    "gemma2_tied_sliding": lambda: transformers.Gemma2Config(**_SMALL, **_ATTENTION, head_dim=8, sliding_window=8),
    "mixtral": lambda: transformers.MixtralConfig(**_SMALL, **_ATTENTION, num_local_experts=4),
    "mamba": lambda: transformers.MambaConfig(
        hidden_size=32, num_hidden_layers=8, vocab_size=128, state_size=4, **_TOKENS
    ),
    "t5": lambda: transformers.T5Config(
        d_model=32,
        d_kv=8,
        d_ff=96,
        num_layers=4,
        num_heads=4,
        vocab_size=128,
        decoder_start_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    ),
}
NO_KV_CACHE = {"mamba"}
"""Its state is of a fixed size, and cannot be taken back."""

_AS_DICT = {"return_dict_in_generate": True}
GREEDY: dict[str, Any] = {"do_sample": False}
GENERATIONS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "sampled": {"do_sample": True, "top_k": 20, "temperature": 0.9},
    "beams": {**GREEDY, "num_beams": 3, "num_return_sequences": 2},
    "without a cache": {**GREEDY, "use_cache": False},
    # generate compiles the steps of a static cache on a GPU: that is not one computation any more, bit for bit
    "static cache": {**GREEDY, "cache_implementation": "static", "disable_compile": True},
}


def made(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A model of `MODELS` with weights that depend on the seed only; `changes` go into its configuration."""
    config = MODELS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_config(config, dtype=dtype).eval()


def prompts(device: str, rows: int = 2, length: int = 7) -> dict[str, Tensor]:
    """A batch; all rows but the last are padded on the left."""
    tokens = torch.randint(2, 128, (rows, length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(tokens)
    for row in range(rows - 1):
        mask[row, : 2 + row] = 0
    return {"input_ids": (tokens * mask).to(device), "attention_mask": mask.to(device)}


def generated(model: Any, inputs: dict[str, Tensor], count: int, **kind: Any) -> Any:
    """Tokens and everything beside them, the logits of every step among it."""
    return model.generate(**inputs, max_new_tokens=count, output_logits=True, output_scores=True, **_AS_DICT, **kind)


# ---------------------------------------------------------------------------------------- 100 M parameters


@pytest.mark.timeout(300)
def test_a_hundred_million_parameters(device: str) -> None:
    config = transformers.LlamaConfig(
        hidden_size=640,
        intermediate_size=1760,
        num_hidden_layers=13,
        num_attention_heads=10,
        num_key_value_heads=5,
        vocab_size=30_000,
        **_TOKENS,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert 95_000_000 < sum(p.numel() for p in model.parameters()) < 105_000_000
    pair = Pair.of(model, device)
    inputs = prompts(device, rows=1)
    sampled = {"do_sample": True, "top_k": 50}
    for kind in (GREEDY, sampled):
        peaks, outputs = [], []
        for each in pair.each():
            torch.manual_seed(3)
            with added_peak(device) as peak:
                outputs.append(each.generate(**inputs, max_new_tokens=200, output_logits=True, **_AS_DICT, **kind))
            peaks += peak
        resident, offloaded = outputs
        assert offloaded.sequences.shape == (1, inputs["input_ids"].shape[1] + 200)
        assert torch.equal(offloaded.sequences, resident.sequences)
        assert len(offloaded.logits) == 200
        assert all(same(a, b) for a, b in zip(offloaded.logits, resident.logits, strict=True))
        # streaming takes nothing but the plan's bytes, which were there before: activations and the cache are the same
        assert peaks[1] <= peaks[0] + (8 << 20)
        del resident, offloaded, outputs
    pair.assert_as_planned()
    stats, streamed = pair.handle.report(link=False).stats, len(pair.handle.plan.streamed_units)
    assert stats.copies >= 400 * streamed
    assert stats.late_copies <= 2
    pair.handle.restore_()


# ------------------------------------------------------------------------------------------ every kind of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_generation(name: str, dtype: torch.dtype, device: str) -> None:
    pair = Pair.of(made(name, dtype), device)
    inputs = prompts(device)
    kinds = GENERATIONS if dtype is torch.float32 else {"greedy": GREEDY}
    for what, kind in kinds.items():
        if name in NO_KV_CACHE and "cache_implementation" in kind:
            continue
        pair.assert_same(lambda model, kind=kind: generated(model, inputs, 8, **kind), what)
    pair.assert_as_planned()
    assert pair.handle.report(link=False).aliased_outputs == 0
    pair.handle.restore_()
    for found, wanted in zip(tensors_of(pair.offloaded).values(), tensors_of(pair.resident).values(), strict=True):
        assert same(found, wanted)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_as_a_dict_and_as_a_tuple(name: str, device: str) -> None:
    pair = Pair.of(made(name), device)
    inputs = prompts(device)
    if pair.resident.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :3]
    with torch.no_grad():
        step = pair.assert_same(lambda model: model(**inputs, output_hidden_states=True))
        assert isinstance(step, ModelOutput)
        assert step.logits is step["logits"]
        pair.assert_same(lambda model: tuple(t for t in model(**inputs, return_dict=False) if isinstance(t, Tensor)))
    pair.assert_as_planned()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generation_on_an_adversarial_device(name: str, seed: int, cpu_driver: Callable[..., Any]) -> None:
    cpu_driver(adversary=seed)
    pair = Pair.of(made(name), "cpu")
    pair.assert_same(lambda model: generated(model, prompts("cpu"), 5, **GREEDY))
    assert pair.handle.report(link=False).stats.copies > 0


# ----------------------------------------------------------------------------------- around the one line


def test_assisted_generation(device: str) -> None:
    pair = Pair.of(made("llama"), device)
    helper = Pair.of(made("llama", seed=1, num_hidden_layers=4), device, percent=50)  # two rings in one process
    inputs = prompts(device, rows=1)
    helpers = dict(zip(pair.each(), helper.each(), strict=True))
    pair.assert_same(lambda m: generated(m, inputs, 12, **GREEDY, assistant_model=helpers[m]), "by a model")
    pair.assert_same(lambda m: generated(m, inputs, 12, **GREEDY, prompt_lookup_num_tokens=3), "by looking up")
    pair.assert_as_planned()
    helper.assert_as_planned()


def test_inference_mode(device: str) -> None:
    pair = Pair.of(made("llama"), device)
    inputs = prompts(device)
    for context in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with context():
            pair.assert_same(lambda model: generated(model, inputs, 6, **GREEDY), context.__name__)
    pair.assert_as_planned()
    assert pair.handle.report(link=False).stats.invalidations == 0


def test_lora_on_top_and_below(device: str) -> None:
    peft = pytest.importorskip("peft")

    def adapted(model: nn.Module) -> Any:
        torch.manual_seed(7)
        targets = ["q_proj", "v_proj", "down_proj"]
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()

    inputs = prompts(device)

    def tokens_of(model: Any) -> Any:
        return generated(model, inputs, 6, **GREEDY)

    plain = Pair.of(made("llama"), device)
    without = plain.assert_same(tokens_of, "before").sequences
    on_top = Pair(adapted(plain.resident), adapted(plain.offloaded), plain.handle, plain.allocated, plain.ring)
    assert not torch.equal(on_top.assert_same(tokens_of, "adapted").sequences, without)
    for model in on_top.each():
        model.merge_adapter()
    on_top.assert_same(tokens_of, "merged")
    for model in on_top.each():
        model.unmerge_adapter()
    on_top.assert_same(tokens_of, "unmerged")
    stats = plain.handle.report(link=False).stats
    assert stats.copies > 0
    assert stats.mapped_runs == stats.host_waits == 0

    below = Pair.of(adapted(made("llama")), device, percent=40)
    below.assert_same(tokens_of, "adapted before")
    below.assert_as_planned()


def test_what_generate_reads_of_an_offloaded_model(device: str) -> None:
    pair = Pair.of(made("llama", torch.bfloat16), device)
    where = torch.device(device)
    seen: list[tuple[Any, ...]] = []

    def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        weight = next(module.parameters())
        seen.append((weight.device, weight.dtype, weight.detach().clone()))

    for model in pair.each():
        assert model.device == where
        assert next(model.parameters()).device == where
        assert {tensor.device for tensor in tensors_of(model).values()} == {where}
        assert model.dtype == torch.bfloat16
        for layer in model.model.layers:
            layer.register_forward_hook(look, with_kwargs=True)
            layer.register_forward_pre_hook(lambda module, args: (args[0] * 1.0, *args[1:]))
    assert pair.offloaded.num_parameters() == pair.resident.num_parameters()
    assert pair.offloaded.get_memory_footprint() == pair.resident.get_memory_footprint()
    inputs = prompts(device)
    pair.assert_same(lambda model: generated(model.to(device), inputs, 4, **GREEDY))
    half = len(seen) // 2
    assert half == 4 * len(pair.resident.model.layers)
    for found, wanted in zip(seen[half:], seen[:half], strict=True):
        assert found[:2] == wanted[:2] == (where, torch.bfloat16)
        assert same(found[2], wanted[2])
    del seen[:]
    pair.assert_as_planned()


@pytest.mark.parametrize("name", ["llama", "gpt2_tied", "t5"])
def test_saved_and_loaded(name: str, device: str, tmp_path: Path) -> None:
    pair = Pair.of(made(name), device)
    inputs = prompts(device)
    pair.offloaded.save_pretrained(tmp_path)
    loaded = type(pair.offloaded).from_pretrained(tmp_path).eval()
    for found, wanted in zip(tensors_of(loaded).values(), tensors_of(pair.resident).values(), strict=True):
        assert same(found, wanted)
    again = Pair.of(loaded, device)
    again.assert_same(lambda model: generated(model, inputs, 4, **GREEDY), "loaded")
    again.assert_as_planned()
    # and weights that come later are used from the next token on
    other = made(name, seed=9)
    before = generated(again.offloaded, inputs, 4, **GREEDY).logits
    for model in again.each():
        model.load_state_dict(other.state_dict())
    after = again.assert_same(lambda model: generated(model, inputs, 4, **GREEDY), "other weights").logits
    assert not same(before[0], after[0])


@pytest.mark.parametrize("name", ["llama", "gpt2_tied"])
def test_resized_embeddings_are_reported_and_taken_in(name: str, device: str) -> None:
    pair = Pair.of(made(name), device)
    inputs = prompts(device)
    for model in pair.each():
        torch.manual_seed(2)
        model.resize_token_embeddings(150)
    table = pair.offloaded.get_input_embeddings().weight
    names = {name for name, tensor in tensors_of(pair.offloaded).items() if tensor is table}
    pair.assert_same(lambda model: generated(model, inputs, 4, **GREEDY), "resized")
    assert names <= set(pair.handle.report(link=False).replaced)
    copied = Pair(pair.resident, copy.deepcopy(pair.offloaded), pair.handle, pair.allocated, pair.ring)
    copied.assert_same(lambda model: generated(model, inputs, 4, **GREEDY), "copied")
    pair.handle.refresh_()
    assert pair.handle.report(link=False).replaced == ()
    specs = pair.handle.plan.specs
    assert [specs[name].shape[0] for name in names if name in specs] == [150]
    pair.assert_same(lambda model: generated(model, inputs, 4, **GREEDY), "refreshed")


# ------------------------------------------------------------------------------------ outputs of one's own


@dataclass
class Kept(ModelOutput):
    """What a block gives: a dict and a dataclass at once."""

    hidden: Tensor | None = None
    scale: Tensor | None = None
    parts: tuple[dict[str, Tensor], ...] | None = None


class KeptBlock(nn.Module):
    """Hands its own weights out beside what it computes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, *, hidden: Tensor) -> Kept:
        out = hidden + self.linear(hidden).tanh() * self.scale
        return Kept(hidden=out, scale=self.scale[2:], parts=({"bias": self.linear.bias[:3], "mean": out.mean(-1)},))


class KeptBlocks(nn.Module):
    def __init__(self, width: int = 64, depth: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(KeptBlock(width) for _ in range(depth))

    def forward(self, *, hidden: Tensor) -> list[Kept]:
        outputs = []
        for block in self.blocks:
            outputs.append(block(hidden=hidden))
            hidden = outputs[-1].hidden
        return outputs


def test_model_outputs_that_alias_weights_stay_true(device: str) -> None:
    torch.manual_seed(0)
    pair = Pair.of(KeptBlocks().eval(), device, percent=50)
    hidden = torch.randn(2, 64, device=device)
    with torch.no_grad():
        kept = pair.assert_same(lambda model: model(hidden=hidden))
        for _ in range(2):
            pair.assert_same(lambda model: model(hidden=hidden))
    for output, block in zip(kept, pair.resident.blocks, strict=True):
        assert isinstance(output, Kept)
        assert output.scale is output["scale"]
        assert same(output.scale, block.scale[2:])
        assert same(output.parts[0]["bias"], block.linear.bias[:3])
    # unit by unit, each handed out two views of its slot in each of three calls
    streamed = len(pair.handle.plan.streamed_units)
    assert pair.handle.report(link=False).aliased_outputs == 2 * 3 * streamed
    pair.assert_as_planned()
