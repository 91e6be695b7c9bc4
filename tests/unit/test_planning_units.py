"""From a module tree, or from names alone, to units; and models of every shape under a tenth."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlpoffload.errors import PlanError
from dlpoffload.planning import (
    CostModel,
    Decision,
    Placement,
    Plan,
    PlanRequest,
    Unit,
    UnitTree,
    all_staged,
    balanced,
    choose_units,
    plan,
    tree_of_names,
)
from dlpoffload.spec import TensorSpec, aligned

DEVICE, MAPPED, STAGED = Placement.DEVICE, Placement.HOST_MAPPED, Placement.HOST_STAGED

# ---------------------------------------------------------------------------- modules, as an adapter sees
# them

Make = Callable[[str], UnitTree]


def weight(*shape: int) -> dict[str, TensorSpec]:
    return {"weight": TensorSpec(shape, "bfloat16")}


def leaf(kind: str, tensors: dict[str, TensorSpec]) -> Make:
    return lambda path: UnitTree(path, {f"{path}.{name}": spec for name, spec in tensors.items()}, kind=kind)


def linear(n: int, m: int) -> Make:
    return leaf("Linear", weight(n, m))


def embedding(n: int, m: int) -> Make:
    return leaf("Embedding", weight(n, m))


def norm(n: int) -> Make:
    return leaf("RMSNorm", weight(n))


def conv(n: int, m: int) -> Make:
    return leaf("Conv2d", weight(n, m, 3, 3) | {"bias": TensorSpec((n,), "bfloat16")})


def module(kind: str, own: dict[str, TensorSpec] | None = None, /, **children: Make) -> Make:
    def make(path: str) -> UnitTree:
        prefix = f"{path}." if path else ""
        return UnitTree(
            path,
            {f"{prefix}{name}": spec for name, spec in (own or {}).items()},
            tuple(child(f"{prefix}{name}") for name, child in children.items()),
            kind=kind,
        )

    return make


def listed(*elements: Make, kind: str = "ModuleList") -> Make:
    return lambda path: UnitTree(
        path,
        children=tuple(element(f"{path}.{i}" if path else str(i)) for i, element in enumerate(elements)),
        repeated=True,
        kind=kind,
        callable=kind == "Sequential",
    )


def attention(d: int, **more: Make) -> Make:
    return module("Attention", q=linear(d, d), k=linear(d, d), v=linear(d, d), o=linear(d, d), **more)


def mlp(d: int, f: int) -> Make:
    return module("MLP", gate=linear(f, d), up=linear(f, d), down=linear(d, f))


def block(d: int, f: int) -> Make:
    return module("Block", ln_1=norm(d), attn=attention(d), ln_2=norm(d), mlp=mlp(d, f))


def gpt(layers: int = 24, d: int = 1024) -> UnitTree:
    """Decoder-only with a tied head: the embedding belongs to the root, where both of its users are below."""
    decoder = module("Model", wpe=embedding(1024, d), h=listed(*[block(d, 4 * d)] * layers), ln_f=norm(d))
    return module("GPT", {"wte": TensorSpec((16_000, d), "bfloat16")}, transformer=decoder)("")


def t5(layers: int = 12, d: int = 768) -> UnitTree:
    def stack(*sublayers: Make) -> Make:
        return module(
            "Stack",
            block=listed(*[module("T5Block", layer=listed(*sublayers))] * layers),
            final_layer_norm=norm(d),
        )

    biased = module(
        "SelfAttention",
        SelfAttention=attention(d, relative_attention_bias=embedding(32, 12)),
        layer_norm=norm(d),
    )
    cross = module("CrossAttention", EncDecAttention=attention(d), layer_norm=norm(d))
    ff = module("FF", wi=linear(4 * d, d), wo=linear(d, 4 * d), layer_norm=norm(d))
    return module(
        "T5",
        shared=embedding(8000, d),
        encoder=stack(biased, ff),
        decoder=stack(biased, cross, ff),
        lm_head=linear(8000, d),
    )("")


def unet() -> UnitTree:
    def resnet(n: int, m: int) -> Make:
        return module("ResnetBlock2D", norm1=norm(n), conv1=conv(m, n), time_emb_proj=linear(m, 1280), conv2=conv(m, m))

    def transformer(n: int, depth: int) -> Make:
        return module(
            "Transformer2DModel",
            norm=norm(n),
            transformer_blocks=listed(*[block(n, 4 * n)] * depth),
            proj=linear(n, n),
        )

    def stage(n: int, m: int, depth: int) -> Make:
        return module(
            "DownBlock",
            resnets=listed(resnet(n, m), resnet(m, m)),
            attentions=listed(transformer(m, depth), transformer(m, depth)),
        )

    return module(
        "UNet",
        conv_in=conv(320, 4),
        time_embedding=module("TimestepEmbedding", linear_1=linear(1280, 320), linear_2=linear(1280, 1280)),
        down_blocks=listed(stage(320, 320, 1), stage(320, 640, 2), stage(640, 1280, 6)),
        mid_block=module("MidBlock", resnets=listed(resnet(1280, 1280)), attentions=listed(transformer(1280, 6))),
        up_blocks=listed(stage(1280, 1280, 6), stage(1280, 640, 2), stage(640, 320, 1)),
        conv_out=conv(4, 320),
    )("")


def llava() -> UnitTree:
    vision = module(
        "CLIP",
        embeddings=module("CLIPEmbeddings", patch_embedding=conv(1024, 3), position_embedding=embedding(577, 1024)),
        encoder=module("Encoder", layers=listed(*[block(1024, 4096)] * 24)),
    )
    language = module(
        "Llama",
        embed_tokens=embedding(32_000, 4096),
        layers=listed(*[block(4096, 11_008)] * 32),
        norm=norm(4096),
    )
    projector = module("Projector", linear_1=linear(4096, 1024), linear_2=linear(4096, 4096))
    return module(
        "Llava",
        vision_tower=vision,
        multi_modal_projector=projector,
        language_model=language,
        lm_head=linear(32_000, 4096),
    )("")


def mixtral(layers: int = 8, experts: int = 8) -> UnitTree:
    moe = module("MoE", gate=linear(experts, 1024), experts=listed(*[mlp(1024, 3584)] * experts))
    layer = module("Layer", self_attn=attention(1024), moe=moe, norm=norm(1024))
    model = module("Model", embed_tokens=embedding(8000, 1024), layers=listed(*[layer] * layers), norm=norm(1024))
    return module("Mixtral", model=model, lm_head=linear(8000, 1024))("")


def sentence_encoder() -> UnitTree:
    """A Sequential of one transformer, which holds all bytes, and of a pooling without any."""
    bert = module(
        "Bert",
        embeddings=module(
            "BertEmbeddings",
            word_embeddings=embedding(30_522, 384),
            position_embeddings=embedding(512, 384),
            LayerNorm=norm(384),
        ),
        encoder=module("Encoder", layer=listed(*[block(384, 1024)] * 6)),
        pooler=module("Pooler", dense=linear(384, 384)),
    )
    return listed(module("Transformer", auto_model=bert), module("Pooling"), kind="Sequential")("")


def no_container() -> UnitTree:
    """Blocks that are attributes, not elements."""
    return module("Net", **{f"block{i}": block(512, 2048) for i in range(12)}, head=linear(1000, 512))("")


def nbytes_of(tree: UnitTree) -> int:
    return sum(spec.nbytes for spec in tree.specs().values())


def names(units: list[Unit] | tuple[Unit, ...]) -> list[str]:
    return [unit.name for unit in units]


def check_units(tree: UnitTree, units: list[Unit]) -> None:
    """What holds for units of any tree."""
    nodes = {node.name: node for node in tree.walk()}
    order = list(nodes)
    taken: set[str] = set()
    for unit in units:
        assert nodes[unit.name].callable
        assert unit.tensors == tuple(nodes[unit.name].specs())
        assert taken.isdisjoint(unit.tensors), "units are nested"
        taken.update(unit.tensors)
        assert unit.slab_nbytes(tree.specs()) > 0
    assert [order.index(unit.name) for unit in units] == sorted(order.index(unit.name) for unit in units)


# --------------------------------------------------------------------- every shape, at a tenth of its bytes


@pytest.mark.parametrize(
    ("tree", "unit", "count"),
    [
        # two blocks are a twelfth of the model
        pytest.param(gpt(), "transformer.h.23", 24, id="decoder-only"),
        # a ring of decoder blocks takes more than a quarter of the budget, and they are nests
        pytest.param(t5(), "decoder.block.11.layer.2", 12 * 4 + 12, id="encoder-decoder"),
        # attentions are lists of blocks inside stages inside a list
        pytest.param(unet(), "down_blocks.2.attentions.0.transformer_blocks.5", None, id="u-net"),
        pytest.param(llava(), "vision_tower.encoder.layers.23", 24 + 32 + 3, id="vision-language"),
        pytest.param(mixtral(), "model.layers.7.moe.experts.7", 8 * 9 + 1, id="mixture"),
        pytest.param(no_container(), "block11.attn", None, id="no-container"),
    ],
)
def test_a_tenth_of_the_bytes_is_enough_and_most_are_staged(tree: UnitTree, unit: str, count: int | None) -> None:
    total = nbytes_of(tree)
    made = plan(tree, total // 10)
    check_units(tree, list(made.units))
    assert made.device_nbytes <= total // 10
    assert unit in names(made.units)
    assert count is None or abs(len(made.units) - count) <= 12
    assert made.nbytes(STAGED) >= 0.75 * total
    # what is mapped are embeddings, and what is read with them
    dense = [n for n in made.names(MAPPED) if "emb" not in n and n not in ("wte", "shared.weight")]
    assert sum(tree.specs()[n].nbytes for n in dense) <= 0.05 * total
    assert made.slot_nbytes == max(aligned(u.slab_nbytes(tree.specs())) for u in made.streamed_units)


@pytest.mark.parametrize("percent", [30, 60, 80])
def test_the_ring_of_a_unet_is_of_its_blocks_at_large_budgets_too(percent: int) -> None:
    tree = unet()
    total = nbytes_of(tree)
    made = plan(tree, total * percent // 100)
    assert made.ring_nbytes <= 0.1 * total
    assert made.nbytes(STAGED) <= total - total * percent // 100 + 0.12 * total


def test_a_sentence_encoder_runs_at_a_quarter() -> None:
    # half of its bytes are the word embeddings
    tree = sentence_encoder()
    made = plan(tree, nbytes_of(tree) // 4)
    blocks = [f"0.auto_model.encoder.layer.{i}" for i in range(6)]
    assert names(made.units) == [*blocks, "0.auto_model.pooler"]
    assert "0.auto_model.embeddings.word_embeddings.weight" in made.names(MAPPED)
    assert "0.auto_model.embeddings.LayerNorm.weight" in made.names(DEVICE)


# -------------------------------------------------------------------------------------------- the rules


def test_elements_of_the_outermost_containers_are_units() -> None:
    tree = gpt()
    units = choose_units(tree, nbytes_of(tree))
    assert names(units) == [f"transformer.h.{i}" for i in range(24)]
    assert units[0].tensors[0] == "transformer.h.0.ln_1.weight"


def test_what_does_not_fit_is_split_and_its_norms_stay_loose() -> None:
    tree = gpt(layers=4)
    block_nbytes = choose_units(tree, nbytes_of(tree))[0].slab_nbytes(tree.specs())
    whole = choose_units(tree, 2 * block_nbytes)
    assert names(whole) == [f"transformer.h.{i}" for i in range(4)]
    parts = choose_units(tree, 2 * block_nbytes - 1)
    assert names(parts) == [f"transformer.h.{i}.{part}" for i in range(4) for part in ("attn", "mlp")]
    matrices = choose_units(tree, 2 * 4096 * 1024 * 2)
    assert "transformer.h.3.mlp.down" in names(matrices)
    assert "transformer.h.3.attn" in names(matrices)
    assert names(choose_units(tree, 3 * block_nbytes, 3)) == names(whole)
    assert names(choose_units(tree, 3 * block_nbytes - 1, 3)) == names(parts)


def test_experts_are_units_one_by_one_however_large_the_budget_is() -> None:
    tree = mixtral(layers=2, experts=4)
    units = choose_units(tree, 10 * nbytes_of(tree))
    layer = ["self_attn", *[f"moe.experts.{i}" for i in range(4)]]
    assert names(units) == [f"model.layers.{i}.{part}" for i in range(2) for part in layer] + ["lm_head"]
    made = plan(tree, nbytes_of(tree) // 2)
    assert made.placements["model.layers.0.moe.gate.weight"] is DEVICE


@pytest.mark.parametrize(
    "experts",
    [
        pytest.param(listed(mlp(256, 512)), id="one is no mixture"),
        pytest.param(listed(mlp(256, 512), mlp(256, 1024)), id="unequal"),
        pytest.param(module("Experts", **{"0": mlp(256, 512), "1": mlp(256, 512)}), id="no list"),
    ],
)
def test_what_only_is_named_like_experts_is_not_split(experts: Make) -> None:
    layer = module("Layer", attn=attention(128), experts=experts)
    tree = module("Model", layers=listed(*[layer] * 6))("")
    assert names(choose_units(tree, 2 * nbytes_of(tree))) == [f"layers.{i}" for i in range(6)]


def test_a_head_larger_than_the_blocks_stays_loose_and_does_not_widen_the_ring() -> None:
    tree = module("LM", embed=embedding(5000, 512), layers=listed(*[block(512, 2048)] * 8), head=linear(20_000, 512))(
        ""
    )
    made = plan(tree, nbytes_of(tree) // 4)
    assert names(made.units) == [f"layers.{i}" for i in range(8)]
    assert made.placements["head.weight"] is MAPPED
    roomy = plan(tree, nbytes_of(tree) // 2)  # two slots of the head's size would fit by now
    assert names(roomy.units) == names(made.units)
    assert roomy.placements["head.weight"] is DEVICE


def test_what_lies_outside_the_containers_is_split_to_fit_their_slot() -> None:
    projector = module("Projector", linear_1=linear(512, 2048), linear_2=linear(2048, 512), linear_3=linear(512, 512))
    tree = module("M", projector=projector, layers=listed(*[mlp(512, 700)] * 20))("")
    units = [*[f"projector.linear_{i}" for i in (1, 2, 3)], *[f"layers.{i}" for i in range(20)]]
    assert names(choose_units(tree, nbytes_of(tree) // 2)) == units


def test_a_small_container_does_not_set_the_slot_for_everything_else() -> None:
    blocks = {f"block{i}": block(512, 2048) for i in range(12)}
    tree = module("Net", **blocks, classifier=listed(linear(1000, 512), linear(1000, 1000), kind="Sequential"))("")
    assert names(choose_units(tree, nbytes_of(tree) // 4)) == [*blocks, "classifier.0", "classifier.1"]


def test_rotary_frequencies_are_no_table_of_which_a_step_reads_a_few_rows() -> None:
    rotary = leaf("LlamaRotaryEmbedding", {"inv_freq": TensorSpec((64,), "float32")})
    layers = listed(*[mlp(512, 2048)] * 8)
    tree = module("Model", embed=embedding(1000, 512), layers=layers, rotary_emb=rotary)("")
    assert tree.gathered() == {"embed.weight"}
    slot = next(node for node in tree.walk() if node.name == "layers.0")
    made = plan(tree, 2 * nbytes_of(slot) + 256)  # the ring, and room for nothing but these
    assert made.placements["rotary_emb.inv_freq"] is DEVICE
    assert made.placements["embed.weight"] is MAPPED


def test_an_embedding_is_never_staged_unless_it_lies_in_a_block() -> None:
    tree = t5(layers=2)
    budget = nbytes_of(tree)
    tables = [name for name in tree.gathered() if "relative" not in name]
    assert tables == ["shared.weight"]
    units = choose_units(tree, budget)
    assert not any("shared.weight" in unit.tensors for unit in units)
    seen: list[PlanRequest] = []

    def spying(request: PlanRequest) -> dict[str, Decision]:
        seen.append(request)
        return balanced(request)

    plan(tree, budget, policy=spying)
    assert seen[0].gathered == {"shared.weight"}
    assert any("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight" in u.tensors for u in units)


def test_a_module_that_is_never_called_is_no_unit() -> None:
    nested = listed(listed(mlp(64, 256), mlp(64, 256)), listed(mlp(64, 256)))
    tree = module("Model", towers=nested)("")
    assert names(choose_units(tree, nbytes_of(tree))) == ["towers.0.0", "towers.0.1", "towers.1.0"]
    parameters = UnitTree("list", {"list.0": TensorSpec((999,), "int8")}, kind="ParameterList", callable=False)
    tree = UnitTree("", children=(parameters, *nested("towers").children))
    assert "list" not in names(choose_units(tree, nbytes_of(tree)))


def test_small_modules_are_units_in_a_small_model_only() -> None:
    def tree(d: int) -> UnitTree:
        return module("M", layers=listed(*[mlp(d, d)] * 4), head=linear(8, d))("")

    assert "head" in names(choose_units(tree(64), 10**9))  # 1/24 of a block
    assert "head" not in names(choose_units(tree(2048), 10**9))  # 32 KiB beside 24 MiB
    assert "head" in names(choose_units(tree(2048), 10**9, cost=CostModel(small_nbytes=0)))


def test_own_tensors_are_not_torn_from_a_module_that_is_mostly_theirs() -> None:
    own = {"in_proj_weight": TensorSpec((768, 256), "bfloat16")}
    fused = module("MultiheadAttention", own, out_proj=linear(256, 256))
    tree = module("M", layers=listed(*[module("Block", attn=fused, lin=linear(256, 256))] * 8))("")
    slab = 4 * 256 * 256 * 2
    assert names(choose_units(tree, 2 * slab))[:2] == ["layers.0.attn", "layers.0.lin"]


def test_a_model_that_is_one_matrix_says_what_it_needs() -> None:
    tree = listed(linear(1024, 1024), linear(1024, 1024), linear(1024, 1024), kind="Sequential")("")
    with pytest.raises(PlanError) as caught:
        plan(tree, nbytes_of(tree) // 10)
    assert caught.value.smallest_budget == 2 * 1024 * 1024 * 2
    assert len(plan(tree, caught.value.smallest_budget).streamed_units) == 3


def test_more_than_half_of_a_model_is_never_left_to_the_mapped_path() -> None:
    # three large matrices and a few small blocks: mapping the former would be a plan, but no offloading
    tree = module("M", layers=listed(*[mlp(64, 64)] * 4), **{f"big{i}": linear(2048, 1024) for i in range(3)})("")
    with pytest.raises(PlanError) as caught:
        plan(tree, 1 << 20)
    assert caught.value.smallest_budget == 2 * 2048 * 1024 * 2


def test_the_smallest_budget_is_that_of_the_units_which_it_leads_to() -> None:
    # Below two slots of the medium matrices, these and the large one are most of the model, so they are units and the
    # least budget for those is large + two medium. With two slots of medium size the large one stays loose.
    large, medium, small = linear(1024, 1200), linear(1024, 400), linear(128, 128)
    layers = listed(*[medium] * 4, *[small] * 75)
    tree = module("M", layers=layers, large=large)("")
    with pytest.raises(PlanError, match="however the units are chosen") as caught:
        plan(tree, 1 << 20)
    assert caught.value.smallest_budget == 2 * 1024 * 400 * 2
    assert plan(tree, caught.value.smallest_budget).names(MAPPED) == ("large.weight",)


@pytest.mark.parametrize(
    "tree",
    [
        UnitTree("", kind="Identity"),
        module("M", act=module("ReLU"), layers=listed(module("ReLU")))(""),
    ],
)
def test_a_module_without_tensors(tree: UnitTree) -> None:
    with pytest.raises(PlanError, match=f"{tree.kind}.* has no tensors"):
        choose_units(tree, 1024)
    with pytest.raises(PlanError, match="no tensors"):
        plan(tree, 1024)


def test_a_tensor_or_a_path_that_stands_twice() -> None:
    spec = {"t": TensorSpec((8,), "int8")}
    with pytest.raises(PlanError, match='tensor "t" stands in the modules "a" and "b"'):
        choose_units(UnitTree("", children=(UnitTree("a", spec), UnitTree("b", spec))), 1024)
    with pytest.raises(PlanError, match='path "a" stands twice'):
        choose_units(UnitTree("", children=(UnitTree("a", spec), UnitTree("a"))), 1024)


# ------------------------------------------------------------------------------------ overriding the units


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        (["transformer.h.*"], ["transformer.h.0", "transformer.h.1"]),
        (["transformer.h.1", "transformer.h.0"], ["transformer.h.0", "transformer.h.1"]),
        (["**.mlp"], ["transformer.h.0.mlp", "transformer.h.1.mlp"]),
        (["transformer.h.[0]", "transformer.h.1.*"], None),
        (["transformer.w*"], ["transformer.wpe"]),
        (["transformer"], ["transformer"]),
        ([""], [""]),
    ],
)
def test_patterns_say_exactly_which_modules_are_units(patterns: list[str], found: list[str] | None) -> None:
    tree = gpt(layers=2)
    units = choose_units(tree, 0, units=patterns)
    check_units(tree, units)
    if found is None:
        found = ["transformer.h.0", *[f"transformer.h.1.{part}" for part in ("ln_1", "attn", "ln_2", "mlp")]]
    assert names(units) == found
    assert names(plan(tree, nbytes_of(tree), units=patterns).units) == found


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["transformer.h.*", "nothing.*"], r'"nothing\.\*" matches none of the 29 modules'),
        (["transformer.h.*", "**.mlp"], r'"transformer.h.0.mlp" and "transformer.h.0", which contains it'),
        (["transformer.h"], r'"transformer.h" \(ModuleList\), whose forward is never .*"transformer.h.\*"'),
        ("transformer.h.*", "one string"),
    ],
)
def test_patterns_that_make_no_units(patterns: list[str], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        choose_units(gpt(layers=2), 10**9, units=patterns)


def test_units_that_were_asked_for_are_not_split_to_fit() -> None:
    tree = gpt(layers=4)
    slab = choose_units(tree, 10**9)[0].slab_nbytes(tree.specs())
    with pytest.raises(PlanError, match=re.escape(f"{2 * slab} bytes")) as caught:
        plan(tree, slab, units=["transformer.h.*"])
    assert caught.value.smallest_budget == 2 * slab


# --------------------------------------------------------------------------------------------- from names


def flat(tree: UnitTree, rename: Callable[[str], str] = str) -> dict[str, TensorSpec]:
    return {rename(name): spec for name, spec in tree.specs().items()}


def keystr(name: str) -> str:
    return "".join(f"[{part}]" if part.isdigit() else f"['{part}']" for part in name.split("."))


@pytest.mark.parametrize(
    ("rename", "unit"),
    [
        (str, "transformer.h.3"),
        (lambda name: name.replace(".", "/"), "transformer/h/3"),
        (lambda name: re.sub(r"h\.(\d+)", r"h_\1", name).replace(".", "/"), "transformer/h_3"),
        (keystr, "['transformer']['h'][3]"),
    ],
)
def test_names_alone_suggest_the_units(rename: Callable[[str], str], unit: str) -> None:
    specs = flat(gpt(layers=24), rename)
    made = plan(specs, sum(spec.nbytes for spec in specs.values()) // 4)
    assert unit in names(made.units)
    assert len(made.units) == 24
    assert unit in names(choose_units(tree_of_names(specs), 10**12))
    assert rename("wte") in made.names(MAPPED)


def test_names_suggest_experts_and_embeddings() -> None:
    specs = flat(mixtral())
    made = plan(specs, sum(spec.nbytes for spec in specs.values()) // 10)
    assert "model.layers.7.moe.experts.7" in names(made.units)
    assert made.names(MAPPED) == ("model.embed_tokens.weight",)
    assert tree_of_names(specs).gathered() == {"model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("name", "shape", "gathered"),
    [
        ("wte.weight", (10, 4), True),
        ("bert.embeddings.word_embeddings.weight", (10, 4), True),
        ("Embed_0/embedding", (10, 4), True),
        ("embed_out.weight", (10, 4), False),
        ("unembed.weight", (10, 4), False),
        ("patch_embed.proj.weight", (10, 4), False),
        ("pos_embed", (1, 10, 4), False),
        ("embeddings.LayerNorm.weight", (4,), False),
    ],
)
def test_what_is_taken_for_an_embedding(name: str, shape: tuple[int, ...], gathered: bool) -> None:
    specs = {name: TensorSpec(shape, "float32"), "x": TensorSpec((1,), "int8")}
    assert tree_of_names(specs).gathered() == ({name} if gathered else set())


def test_names_without_structure_are_units_one_by_one() -> None:
    specs = {f"w{i}": TensorSpec((1000,), "int8") for i in range(5)}
    assert names(plan(specs, 2048).units) == list(specs)


def test_a_name_may_be_the_prefix_of_another() -> None:
    specs = {name: TensorSpec((300,), "int8") for name in ("a", "a.b", "a.b.0", "a.b.1")}
    assert tree_of_names(specs).specs() == specs
    assert set(plan(specs, 10_000).placements) == set(specs)


def test_names_that_make_poor_paths() -> None:
    specs = {name: TensorSpec((300,), "int8") for name in ("a.b", "a/b", "a.b.c", "", ".", "..", "a.")}
    assert dict(sorted(tree_of_names(specs).specs().items())) == dict(sorted(specs.items()))
    assert set(plan(specs, 1024).placements) == set(specs)


# ------------------------------------------------------------------------------------------ any tree at all


@st.composite
def trees(draw: st.DrawFn) -> UnitTree:
    counter = iter(range(10_000))

    def node(path: str, depth: int) -> UnitTree:
        own = draw(st.lists(st.integers(0, 4000), max_size=2))
        tensors = {f"t{next(counter)}": TensorSpec((n,), "int8") for n in own}
        width = draw(st.integers(0, 3)) if depth else 0
        repeated = bool(width) and draw(st.booleans())
        children = tuple(node(f"{path}.{i}" if path else str(i), depth - 1) for i in range(width))
        kind = draw(st.sampled_from(["Block", "Embedding"]))
        return UnitTree(path, tensors, children, repeated, kind, callable=draw(st.sampled_from([True, True, False])))

    return node("", 3)


@settings(max_examples=150, deadline=None)
@given(trees(), st.integers(0, 60_000), st.integers(1, 3))
def test_any_tree_has_units_and_the_smallest_budget_named_is_exact(tree: UnitTree, budget: int, slots: int) -> None:
    if not tree.specs():
        return

    def made_at(nbytes: int) -> Plan:
        check_units(tree, choose_units(tree, nbytes, slots))
        made = plan(tree, nbytes, slots=slots)
        assert made.device_nbytes <= nbytes
        return made

    smallest = None
    try:
        made_at(budget)
    except PlanError as error:
        smallest = error.smallest_budget
        if smallest is None or smallest <= budget:
            raise
    if smallest is not None:
        made_at(smallest)
        with pytest.raises(PlanError, match=f"{smallest} bytes"):
            made_at(smallest - 1)


def test_the_smallest_budget_holds_for_other_policies_as_well() -> None:
    tree = gpt(layers=4)
    with pytest.raises(PlanError) as caught:
        plan(tree, 1000, policy=all_staged)
    smallest = caught.value.smallest_budget
    assert smallest is not None
    assert plan(tree, smallest, policy=all_staged).device_nbytes == smallest
    with pytest.raises(PlanError):
        plan(tree, smallest - 1, policy=all_staged)


def test_a_mixture_of_thousands_of_experts() -> None:
    tree = mixtral(layers=32, experts=64)
    made = plan(tree, nbytes_of(tree) // 10)
    assert len(made.units) == 32 * 65 + 1
    row = [unit.name in set(names(made.resident_units)) for unit in made.units]
    quarters: Iterator[int] = (sum(row[i : i + 520]) for i in range(0, 2080, 520))
    assert max(spread := list(quarters)) - min(spread) <= 2
