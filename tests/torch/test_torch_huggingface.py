"""Hugging Face models in one line: the tokens, and the logits, of the resident model, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from models import assert_same, distinct_nbytes, same  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from dlpoffload.planning import Placement  # noqa: E402
from dlpoffload.torch import OffloadHandle, offload_  # noqa: E402


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(before)


def llama(**options: Any) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 6, "vocab_size": 300}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    return transformers.LlamaConfig(**{**sizes, **heads, "pad_token_id": 0, "eos_token_id": 299, **options})


def gpt2() -> Any:
    return transformers.GPT2Config(
        n_embd=64,
        n_layer=6,
        n_head=4,
        vocab_size=300,
        n_positions=256,
        bos_token_id=1,
        eos_token_id=299,
        pad_token_id=0,
    )


def mixtral() -> Any:
    return transformers.MixtralConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=300,
        pad_token_id=0,
        eos_token_id=299,
    )


def t5() -> Any:
    return transformers.T5Config(
        d_model=64, d_kv=16, d_ff=160, num_layers=4, num_heads=4, vocab_size=300, decoder_start_token_id=0
    )


CAUSAL: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama_tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
    "mixtral": mixtral,
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "static": {"do_sample": False, "cache_implementation": "static"},
}


def made(config: Any, kind: Any = None) -> nn.Module:
    torch.manual_seed(11)
    model = (kind or transformers.AutoModelForCausalLM).from_config(config)
    with torch.no_grad():  # as made, such models say the same token for ever
        for name, parameter in model.named_parameters():
            if "embed" in name or "wte" in name or "shared" in name:
                parameter.mul_(3.0 if config.tie_word_embeddings else 12.0)
    return model.eval()


@dataclass
class Pair:
    model: Any
    reference: Any
    handle: OffloadHandle

    def check(self) -> None:
        report = self.handle.report(link=False)
        assert report.stats.copies > 0
        assert report.stats.mapped_runs == report.stats.host_waits == 0
        assert report.plan.nbytes(Placement.HOST_STAGED) > 0
        assert report.device_nbytes <= report.plan.device_budget


def pair(config: Any, device: str, part: float = 0.5, kind: Any = None) -> Pair:
    model = made(config, kind)
    reference = copy.deepcopy(model).to(device)
    return Pair(model, reference, offload_(model, int(part * distinct_nbytes(model)), device=device))


def prompt(device: str, rows: int = 1, length: int = 7) -> Tensor:
    ids = torch.randint(3, 290, (rows, length), generator=torch.Generator().manual_seed(4))
    return ids.to(device)


def generated(model: Any, **options: Any) -> Tensor:
    torch.manual_seed(23)
    return model.generate(**{"max_new_tokens": 24, **options})


def test_two_hundred_tokens_of_a_hundred_million_parameters(device: str) -> None:
    """Offloaded to 30 %, greedy and sampled, with a KV cache."""
    config = llama(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=12,
        vocab_size=56_000,
        tie_word_embeddings=True,
        eos_token_id=55_999,
    )
    both = pair(config, device, 0.3)
    assert 95e6 < sum(parameter.numel() for parameter in both.reference.parameters()) < 110e6
    ids = prompt(device)
    for way in ("greedy", "sampled"):
        options = {"input_ids": ids, "max_new_tokens": 200, "min_new_tokens": 200, **WAYS[way]}
        wanted = generated(both.reference, **options)
        assert same(generated(both.model, **options), wanted)
        assert wanted.shape == (1, 207)
        assert len(set(wanted[0].tolist())) > (20 if way == "sampled" else 2)
    both.check()


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("way", WAYS)
def test_generate(device: str, name: str, way: str) -> None:
    both = pair(CAUSAL[name](), device)
    ids = prompt(device)
    for _ in range(2):
        options = {"input_ids": ids, **WAYS[way]}
        assert same(generated(both.model, **options), generated(both.reference, **options))
    with torch.no_grad():
        assert_same(both.model(ids).logits, both.reference(ids).logits)
        assert_same(both.model(ids, return_dict=False)[0], both.reference(ids, return_dict=False)[0])
    both.check()


def test_a_batch_with_padding(device: str) -> None:
    both = pair(llama(), device)
    ids = prompt(device, rows=3)
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    options = {"input_ids": ids, "attention_mask": mask, "do_sample": False}
    assert same(generated(both.model, **options), generated(both.reference, **options))
    both.check()


def test_encoder_and_decoder(device: str) -> None:
    both = pair(t5(), device, 0.6, transformers.AutoModelForSeq2SeqLM)
    ids = prompt(device, rows=2)
    for way in ("greedy", "sampled", "beams"):
        options = {"input_ids": ids, **WAYS[way]}
        assert same(generated(both.model, **options), generated(both.reference, **options))
    both.check()


def test_what_generate_asks_of_a_model_is_answered(device: str) -> None:
    """Device and dtype of an offloaded model are those that it runs on."""
    both = pair(llama(), device)
    assert both.model.device == both.reference.device
    assert both.model.dtype == both.reference.dtype
    assert {p.device for p in both.model.parameters()} == {p.device for p in both.reference.parameters()}
    assert both.model.num_parameters() == both.reference.num_parameters()


def test_in_inference_mode_and_after_it(device: str) -> None:
    both = pair(llama(), device)
    ids = prompt(device)
    with torch.inference_mode():
        assert same(generated(both.model, input_ids=ids), generated(both.reference, input_ids=ids))
    x, y = (model.get_input_embeddings()(ids).detach().requires_grad_() for model in (both.model, both.reference))
    both.model.requires_grad_(False)
    both.reference.requires_grad_(False)
    both.model(inputs_embeds=x).logits.sum().backward()
    both.reference(inputs_embeds=y).logits.sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert same(x.grad, y.grad)
    both.check()


def test_a_saved_model_is_the_resident_one(device: str, tmp_path: Any) -> None:
    both = pair(llama(tie_word_embeddings=True), device)
    both.model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in both.reference.state_dict().items():
        assert same(again.state_dict()[name], tensor.cpu()), name


def test_generate_with_an_adapter(device: str) -> None:
    peft = pytest.importorskip("peft")
    both = pair(llama(), device)
    tuned = []
    for model in (both.model, both.reference):
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
        tuned.append(wrapped.to(device).eval())
    ids = prompt(device)
    found, wanted = (generated(model, input_ids=ids) for model in tuned)
    assert same(found, wanted)
    with tuned[0].disable_adapter(), tuned[1].disable_adapter():
        assert same(generated(tuned[0], input_ids=ids), generated(tuned[1], input_ids=ids))
    both.check()
