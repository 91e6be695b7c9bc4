"""Hugging Face in one line: generate tokens with 30 % of the weights on the device, the same tokens as resident.

    python examples/generate.py [cuda:0 | cpu]

The model is made from a configuration, so that nothing is downloaded; `from_pretrained` would do as well.
"""

import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import dlpoffload as dlpo
from dlpoffload.torch import offload_

TOKENS = 64
CONFIG = LlamaConfig(
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=10,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=8192,
    eos_token_id=None,  # go on to the end
    pad_token_id=0,
)

device = sys.argv[1] if len(sys.argv) > 1 else dlpo.default_device()
if device == "cpu":
    torch.set_num_threads(max(torch.get_num_threads() - 1, 1))  # leaves a core to the copies
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(CONFIG).to(device).eval()
weights = model.get_memory_footprint()
prompt = torch.randint(1, CONFIG.vocab_size, (1, 16), device=device)


def generate() -> torch.Tensor:
    started = time.perf_counter()
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=TOKENS, do_sample=False)
    tokens = tokens.cpu()  # waits for the device
    print(f"{TOKENS / (time.perf_counter() - started):.1f} tokens/s")
    return tokens


print(f"resident on {device}: ", end="")
resident = generate()

handle = offload_(model, device_budget=weights * 3 // 10, device=device)  # the one line
print(handle.plan)

print("offloaded: ", end="")
assert torch.equal(generate(), resident), "offloading changed a token"
print(handle.report())
print(f"{TOKENS} tokens, equal to those of the resident model")
