"""From specs, units and a budget to placements: the budget holds, the figure in an error is exact."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlpoffload.errors import PlanError, SpecError
from dlpoffload.planning import (
    CostModel,
    Decision,
    Placement,
    Plan,
    PlanRequest,
    Policy,
    Unit,
    all_mapped,
    all_staged,
    balanced,
    pattern_policy,
    plan,
)
from dlpoffload.spec import TensorSpec, aligned, lay_out

DEVICE, MAPPED, STAGED = Placement.DEVICE, Placement.HOST_MAPPED, Placement.HOST_STAGED
Specs = dict[str, TensorSpec]
Units = dict[str, list[str]]
HALVES = (slice(0, 36), slice(36, None))


def raw(nbytes: int) -> TensorSpec:
    return TensorSpec((nbytes,), "uint8")


def model(sizes: list[list[int]], loose: Mapping[str, int] | None = None) -> tuple[Specs, Units]:
    """Units u0, u1, … of tensors with so many bytes, and loose tensors."""
    specs: Specs = {}
    units: Units = {}
    for i, tensors in enumerate(sizes):
        units[f"u{i}"] = [f"u{i}.t{j}" for j in range(len(tensors))]
        specs.update(zip(units[f"u{i}"], map(raw, tensors), strict=True))
    specs.update({name: raw(nbytes) for name, nbytes in (loose or {}).items()})
    return specs, units


def outcome(planning: Callable[[], Plan]) -> Plan | PlanError:
    try:
        return planning()
    except PlanError as error:
        return error


def counted_on_device(made: Plan) -> int:
    """What residents and ring take, counted from the placements alone."""
    resident = sum(aligned(made.specs[name].nbytes) for name, p in made.placements.items() if p is DEVICE)
    slabs = [
        lay_out({n: made.specs[n] for n in unit.tensors if made.placements[n] is STAGED}).nbytes
        for unit in made.units
        if any(made.placements[n] is STAGED for n in unit.tensors)
    ]
    return resident + made.slots * max((aligned(slab) for slab in slabs), default=0)


def resident_row(made: Plan) -> list[bool]:
    names = {unit.name for unit in made.resident_units}
    return [unit.name in names for unit in made.units]


def gaps(row: list[bool]) -> list[int]:
    """Streamed units between neighbouring residents, round the corner into the next step."""
    at = [i for i, resident in enumerate(row) if resident]
    return [(b - a) % len(row) or len(row) for a, b in itertools.pairwise([*at, at[0]])]


sizes_of_units = st.lists(st.lists(st.integers(0, 3000), min_size=1, max_size=3), max_size=9)
sizes_of_loose = st.dictionaries(st.sampled_from(["a", "b", "c", "embed"]), st.integers(0, 4000))
policies = st.sampled_from([balanced, pattern_policy({"*": "device"}), all_staged, all_mapped])


# ------------------------------------------------------------------------------------------- the budget


@settings(deadline=None)
@given(sizes_of_units, sizes_of_loose, st.integers(0, 40_000), st.integers(1, 4), st.integers(0, 3000))
def test_the_budget_is_never_exceeded(
    sizes: list[list[int]], loose: dict[str, int], budget: int, slots: int, small: int
) -> None:
    specs, units = model(sizes, loose)
    if not specs:
        return
    gathered = [name for name in loose if name == "embed"]
    cost = CostModel(small_nbytes=small)
    made = outcome(lambda: plan(specs, budget, units=units, slots=slots, gathered=gathered, cost=cost))
    if isinstance(made, PlanError):
        assert made.smallest_budget is not None
        assert made.smallest_budget > budget
        return
    assert made.device_nbytes == counted_on_device(made)
    assert made.device_nbytes <= budget
    assert made.placements.keys() == made.reasons.keys() == specs.keys()
    assert sum(made.nbytes(placement) for placement in Placement) == sum(s.nbytes for s in specs.values())
    streamed = {name for unit in made.streamed_units for name in unit.tensors}
    assert streamed == set(made.names(STAGED))
    # as many as fit: not one unit, and nothing loose, would still go in
    for unit in made.streamed_units:
        assert made.device_nbytes + aligned(unit.slab_nbytes(specs)) > budget
    for name in made.names(MAPPED):
        assert made.device_nbytes + aligned(specs[name].nbytes) > budget


@settings(deadline=None)
@given(sizes_of_units, sizes_of_loose, st.integers(1, 4), policies)
def test_the_smallest_budget_that_an_error_names_is_exact(
    sizes: list[list[int]], loose: dict[str, int], slots: int, policy: Policy
) -> None:
    specs, units = model(sizes, loose)
    if not specs:
        return
    error = outcome(lambda: plan(specs, 0, units=units, slots=slots, policy=policy))
    if isinstance(error, PlanError):
        smallest = error.smallest_budget
        assert smallest is not None
        assert f"{smallest} bytes" in str(error)
        assert plan(specs, smallest, units=units, slots=slots, policy=policy).device_nbytes == smallest
        with pytest.raises(PlanError, match=re.escape(f"{smallest} bytes")):
            plan(specs, smallest - 1, units=units, slots=slots, policy=policy)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=7), st.integers(1, 3))
def test_no_choice_of_residents_needs_less_than_the_smallest_budget(sizes: list[int], slots: int) -> None:
    specs, units = model([[nbytes] for nbytes in sizes])
    with pytest.raises(PlanError) as caught:
        plan(specs, 0, units=units, slots=slots)
    slabs = [aligned(nbytes) for nbytes in sizes]
    needs = []
    for keep in itertools.product((False, True), repeat=len(slabs)):
        streamed = [slab for slab, kept in zip(slabs, keep, strict=True) if not kept]
        kept_nbytes = sum(slabs) - sum(streamed)
        needs.append(kept_nbytes + min(slots, len(streamed)) * max(streamed, default=0))
    assert caught.value.smallest_budget == min(needs)


def test_a_budget_that_cannot_hold_the_ring_says_so_in_words() -> None:
    specs, units = model([[1 << 20]] * 4)
    message = (
        r"device_budget=1048576 bytes \(1.00 MiB\) cannot hold 2 slots for units of up to 1048576 bytes "
        r"\(1.00 MiB\); the smallest budget that can is 2097152 bytes \(2.00 MiB\)"
    )
    with pytest.raises(PlanError, match=message):
        plan(specs, "1MiB", units=units)


def test_a_budget_of_nothing_holds_loose_tensors_mapped() -> None:
    made = plan({"table": raw(4096)}, 0, units=[])
    assert made.placements == {"table": MAPPED}
    assert (made.slots, made.slot_nbytes, made.device_nbytes) == (0, 0, 0)


@pytest.mark.parametrize("budget", ["20 parsecs", -1, 1.5, True])
def test_a_budget_that_is_none(budget: object) -> None:
    with pytest.raises(SpecError, match="device_budget"):
        plan({"t": raw(8)}, budget)  # type: ignore[arg-type]


@pytest.mark.parametrize("slots", [0, -2, 1.5, True])
def test_slots_that_are_none(slots: object) -> None:
    with pytest.raises(PlanError, match="slots="):
        plan({"t": raw(8)}, 100, slots=slots)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------- what lives where


def test_when_everything_fits_there_is_no_ring() -> None:
    specs, units = model([[1000, 24], [500]], {"head": 10})
    total = 1024 + 256 + 512 + 256
    made = plan(specs, total, units=units)
    assert set(made.placements.values()) == {DEVICE}
    assert (made.slots, made.ring_nbytes, made.device_nbytes) == (0, 0, total)
    assert set(made.reasons.values()) == {"everything fits"}
    assert plan(specs, total - 1, units=units).nbytes(DEVICE) < made.nbytes(DEVICE)


def test_units_may_all_fit_while_an_embedding_does_not() -> None:
    specs, units = model([[1024]] * 3, {"embed": 10_000, "norm": 10})
    made = plan(specs, 3 * 1024 + 256, units=units, gathered=["embed"])
    assert made.streamed_units == ()
    assert made.names(MAPPED) == ("embed",)


def test_two_units_need_no_ring_of_two_slots() -> None:
    specs, units = model([[1024], [512]])
    assert plan(specs, 1536, units=units).nbytes(DEVICE) == 1536
    with pytest.raises(PlanError, match="1536 bytes"):
        plan(specs, 1535, units=units)


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 4), st.data())
def test_equal_units_are_spread_evenly(count: int, slots: int, data: st.DataObject) -> None:
    nbytes = 1024
    specs, units = model([[nbytes]] * count)
    budget = data.draw(st.integers(min(slots, count) * nbytes, count * nbytes + 500))
    row = resident_row(plan(specs, budget, units=units, slots=slots))
    assert sum(row) == (count if budget >= count * nbytes else budget // nbytes - slots)
    if any(row):
        assert max(gaps(row)) - min(gaps(row)) <= 1


def test_uneven_units_are_spread_by_bytes() -> None:
    sizes = [2048] * 36 + [2304] * 32  # both halves hold the same bytes
    specs, units = model([[nbytes] for nbytes in sizes])
    made = plan(specs, 2 * 2304 + 16 * 2048 + 16 * 2304, units=units)
    row = resident_row(made)
    kept = [sum(n for n, resident in zip(sizes[half], row[half], strict=True) if resident) for half in HALVES]
    assert abs(kept[0] - kept[1]) <= 2 * 2304
    assert max(gaps(row)) <= 3


def test_an_outlier_is_resident_where_that_shrinks_the_ring() -> None:
    specs, units = model([[10_240], *[[1024]] * 20])
    budget = 10_240 + 3 * 1024
    made = plan(specs, budget, units=units)
    assert made.placements["u0.t0"] is DEVICE
    assert (made.slots, made.slot_nbytes) == (2, 1024)
    assert sum(resident_row(made)) == 2
    # 20480 bytes are enough for a ring of the largest as well, and would leave it and all others streamed
    assert plan(specs, 20_480, units=units).nbytes(STAGED) == 30_720 - (20_480 - 2048)


def test_room_that_a_shrunken_ring_leaves_is_given_out() -> None:
    # the largest unit lies in the middle, is picked first, and the ring needs 512 bytes less from then on
    sizes = [2048, 2048, 2304, 2048, 2048, 512]
    specs, units = model([[nbytes] for nbytes in sizes], {"embed": 512})
    made = plan(specs, 2 * 2304 + 2304, units=units, gathered=["embed"])
    assert resident_row(made) == [False, False, True, False, False, True]
    specs, units = model([[nbytes] for nbytes in sizes[:-1]], {"embed": 512})
    made = plan(specs, 2 * 2304 + 2304, units=units, gathered=["embed"])
    assert made.names(DEVICE) == ("u2.t0", "embed")


def test_of_large_loose_tensors_the_larger_is_resident() -> None:
    specs = {"a": raw(1024), "b": raw(1792), "c": raw(256)}
    made = plan(specs, 2048, units=[], cost=CostModel(small_nbytes=0))
    assert made.names(DEVICE) == ("b", "c")


def test_units_of_nearly_one_size_stay_evenly_spread() -> None:
    specs, units = model([[10_240 - 256 * i] for i in range(20)])
    row = resident_row(plan(specs, 2 * 10_240 + 60_000, units=units))
    assert max(gaps(row)) <= 4


def test_who_comes_first_when_room_is_short() -> None:
    specs, units = model([[4096]] * 6, {"embed": 2048, "norm": 100, "head": 3000, "bias": 10})
    cost = CostModel(small_nbytes=1024)
    order = []
    seen: set[str] = set()
    for room in range(0, sum(aligned(s.nbytes) for s in specs.values()), 256):
        made = plan(specs, 2 * 4096 + room, units=units, cost=cost, gathered=["embed"])
        new = set(made.names(DEVICE)) - seen
        if new and not made.resident_units:
            order.append(sorted(new))
            seen |= new
        elif made.resident_units:
            assert {"bias", "norm", "head"} <= set(made.names(DEVICE))
            break
    assert order == [["bias"], ["norm"], ["embed"], ["head"]]
    # the embedding went in only while nothing better fitted in
    assert plan(specs, 3 * 4096 + 3840, units=units, cost=cost, gathered=["embed"]).names(MAPPED) == ("embed",)


def test_gathered_tensors_are_taken_out_of_their_units() -> None:
    specs, units = model([[1024, 100], [1024, 100], [1024, 100]])
    made = plan(specs, 2048, units=units, gathered=["*.t1"])
    assert made.names(MAPPED) == ("u0.t1", "u1.t1", "u2.t1")
    assert made.slot_nbytes == 1024


def test_a_tensor_of_no_bytes_costs_nothing() -> None:
    specs, units = model([[0], [1024], [1024], [1024, 0]], {"empty": 0})
    made = plan(specs, 2048, units=units)
    assert made.placements["u0.t0"] is made.placements["empty"] is DEVICE
    assert [unit.name for unit in made.streamed_units] == ["u1", "u2", "u3"]


@settings(deadline=None)
@given(sizes_of_units, sizes_of_loose, st.integers(0, 40_000))
def test_the_same_request_gives_the_same_plan(sizes: list[list[int]], loose: dict[str, int], budget: int) -> None:
    specs, units = model(sizes, loose)
    if not specs:
        return
    first, second = (str(outcome(lambda: plan(specs, budget, units=units))) for _ in range(2))
    assert first == second


def test_a_plan_keeps_nothing_of_its_arguments() -> None:
    specs, units = model([[1024]] * 3)
    made = plan(specs, 2048, units=units)
    specs.clear()
    units.clear()
    assert made.total_nbytes == 3072
    assert made.link_seconds == 3072 / (made.cost.link_gb_per_s * 1e9)


# --------------------------------------------------------------------------------------------- policies


def fixed_policy(answer: Mapping[str, object]) -> Policy:
    def fixed(request: PlanRequest) -> Mapping[str, Placement | str | Decision]:
        return answer  # type: ignore[return-value]

    return fixed


def test_all_mapped_needs_no_device_memory() -> None:
    specs, units = model([[1024]] * 3, {"head": 100})
    made = plan(specs, 0, units=units, policy=all_mapped)
    assert set(made.placements.values()) == {MAPPED}
    assert made.device_nbytes == 0


def test_all_staged_makes_a_unit_of_a_loose_tensor() -> None:
    specs, units = model([[1024]] * 3, {"head": 4000})
    made = plan(specs, 8192, units=units, policy=all_staged)
    assert [unit.name for unit in made.streamed_units] == ["u0", "u1", "u2", "head"]
    assert made.ring_nbytes == made.device_nbytes == 8192
    with pytest.raises(PlanError, match=r'"all_staged" takes 8192 bytes .* which is 1 bytes more'):
        plan(specs, 8191, units=units, policy=all_staged)


def test_a_policy_of_the_user_sees_the_request_and_gives_strings_or_reasons() -> None:
    specs, units = model([[1024], [2048]], {"head": 100})
    seen: list[PlanRequest] = []

    def mine(request: PlanRequest) -> dict[str, Placement | str | Decision]:
        seen.append(request)
        return {"u0.t0": "host_staged", "u1.t0": Decision(MAPPED, "cold"), "head": DEVICE}

    made = plan(specs, "2KiB", units=units, policy=mine, slots=3)
    (request,) = seen
    assert request.device_budget == 2048
    assert request.units == (Unit("u0", ("u0.t0",)), Unit("u1", ("u1.t0",)))
    assert request.loose == ("head",)
    with pytest.raises(TypeError):
        request.specs["x"] = raw(1)  # type: ignore[index]
    assert made.placements == {"u0.t0": STAGED, "u1.t0": MAPPED, "head": DEVICE}
    assert made.reasons["u1.t0"] == "cold"
    assert made.reasons["head"] == 'chosen by the policy "mine"'
    assert (made.policy, made.slots, made.device_nbytes) == ("mine", 1, 1024 + 256)


def test_a_unit_that_is_staged_in_part_has_a_smaller_slab() -> None:
    specs, units = model([[1000, 24, 1000]] * 3)
    made = plan(specs, 9999, units=units, policy=pattern_policy({"*.t1": "device"}, all_staged))
    assert made.streamed_units[0] == Unit("u0", ("u0.t0", "u0.t2"))
    assert made.slot_nbytes == 2048
    assert made.device_nbytes == 2 * 2048 + 3 * 256


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"a": "device"}, r'leaves tensors unplaced: "b"'),
        ({"a": "device", "b": "device", "z": "device"}, r'places tensors that are not planned: "z"'),
        (
            {"a": "device", "b": "gpu"},
            r"""placement of "b" is 'gpu', which is no placement; use one of "device",""",
        ),
        ({"a": "device", "b": "host_staged"}, r"takes 768 bytes .* is 168 bytes more than device_budget=600"),
    ],
)
def test_what_a_policy_answers_is_checked(answer: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan({"a": raw(256), "b": raw(512)}, 600, units=[], policy=fixed_policy(answer))


def test_patterns_overrule_and_the_rest_is_planned_around_them() -> None:
    specs, units = model([[1024]] * 8, {"embed.weight": 3000, "head": 512})
    policy = pattern_policy({"embed.*": "device", "u3.*": "device", "u4.*": "host_mapped"})
    made = plan(specs, 2048 + 3072 + 1024 + 512 + 1024, units=units, policy=policy)
    assert made.placements["embed.weight"] is made.placements["u3.t0"] is DEVICE
    assert made.placements["u4.t0"] is MAPPED
    assert made.reasons["u4.t0"] == 'the pattern "u4.*"'
    assert len(made.resident_units) == 2
    assert made.device_nbytes == made.device_budget


def test_a_tensor_fixed_as_staged_streams_its_unit_and_counts_in_the_ring() -> None:
    specs, units = model([[1024, 100]] * 4, {"big": 5000})
    policy = pattern_policy({"big": STAGED, "u1.t0": STAGED})
    made = plan(specs, 2 * 5120 + 2 * 1280, units=units, policy=policy)
    assert {unit.name for unit in made.streamed_units} >= {"big", "u1"}
    assert made.placements["u1.t1"] is STAGED
    assert made.slot_nbytes == 5120
    with pytest.raises(PlanError) as caught:
        plan(specs, 0, units=units, policy=policy)
    assert caught.value.smallest_budget == 2 * 5120
    # the only streamed unit needs one slot
    specs, units = model([[2048], [256]])
    assert plan(specs, 2048 + 256, units=units, policy=pattern_policy({"u0.*": STAGED})).slots == 1


@settings(deadline=None)
@given(sizes_of_units, st.lists(st.sampled_from(list(Placement)), min_size=9, max_size=9), st.integers(0, 30_000))
def test_patterns_and_the_budget_hold_together(
    sizes: list[list[int]], placements: list[Placement], budget: int
) -> None:
    specs, units = model(sizes, {"loose": 700})
    fixed = {f"u{i}.t0": placements[i] for i in range(0, len(sizes), 2)}
    made = outcome(lambda: plan(specs, budget, units=units, policy=pattern_policy(fixed)))
    if isinstance(made, PlanError):
        assert made.smallest_budget is not None
        assert made.smallest_budget > budget
        made = plan(specs, made.smallest_budget, units=units, policy=pattern_policy(fixed))
        assert made.device_nbytes == made.device_budget
    assert counted_on_device(made) == made.device_nbytes <= made.device_budget
    assert {name: made.placements[name] for name in fixed} == fixed


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"*.nothing": "device"}, r'"\*.nothing" matches none of the 2 tensors, such as "u0.t0"'),
        ({"u0*": "device", "u0.t0": "host_mapped"}, "1 tensors that patterns before it have placed"),
    ],
)
def test_a_pattern_that_decides_nothing(patterns: dict[str, str], message: str) -> None:
    specs, units = model([[8], [8]])
    with pytest.raises(PlanError, match=message):
        plan(specs, 1024, units=units, policy=pattern_policy(patterns))


def test_a_pattern_with_a_placement_that_is_none() -> None:
    with pytest.raises(PlanError, match="'cuda', which is no placement"):
        pattern_policy({"*": "cuda"})


def test_a_name_with_brackets_matches_itself() -> None:
    specs = {"['a'][0]": raw(8), "b": raw(8)}
    made = plan(specs, 512, units=[], policy=pattern_policy({"['a'][0]": "host_mapped"}))
    assert made.names(MAPPED) == ("['a'][0]",)


# --------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ({"x": ["a", "zzz"]}, r'"x" names the tensor "zzz", which is none of the 2 planned'),
        ({"x": ["a"], "y": ["a"]}, r'"a" is in the units "x" and "y"'),
        ({"x": ["a", "a"]}, r'"a" is in the units "x" and "x"'),
        ({"x": []}, r'"x" names no tensor'),
        ([Unit("x", ("a",)), Unit("x", ("b",))], r'two units are named "x"'),
        ([Unit("x", ("a",)), "b"], "mixes kinds"),
        ("a", "one string"),
    ],
)
def test_units_that_make_no_sense(units: object, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan({"a": raw(8), "b": raw(8)}, 1024, units=units)  # type: ignore[arg-type]


def test_nothing_to_plan() -> None:
    with pytest.raises(PlanError, match="no tensors"):
        plan({}, 1024)


@pytest.mark.parametrize(("gathered", "message"), [(["zzz"], 'gathered names "zzz"'), ("a", "one string")])
def test_gathered_that_matches_nothing(gathered: object, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan({"a": raw(8)}, 1024, gathered=gathered)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"link_gb_per_s": 0.0}, {"mapped_gb_per_s": -1.0}, {"small_nbytes": -1}])
def test_costs_that_are_none(wrong: dict[str, float]) -> None:
    with pytest.raises(PlanError, match=next(iter(wrong))):
        CostModel(**wrong)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------- the table


def test_the_table_says_what_takes_which_bytes_and_why() -> None:
    specs, units = model([[1 << 20]] * 8, {"embed": 8 << 20, "norm": 100})
    made = plan(specs, "5MiB", units=units, gathered=["embed"])
    text = str(made)
    rows = [re.split(r"\s*│\s*", line)[1:-1] for line in text.splitlines() if line.startswith("│")]
    assert rows == [
        ["device", "3", "2.00 MiB", "12.5 %", ""],
        ["", "2", "2.00 MiB", "12.5 %", "unit, resident: spread between the streamed"],
        ["", "1", "100 bytes", "0.0 %", "in no unit, small"],
        ["host_mapped", "1", "8.00 MiB", "50.0 %", "gathered: few of its rows cross the link"],
        ["host_staged", "6", "6.00 MiB", "37.5 %", "unit, streamed through the ring"],
        ["weights", "10", "16.00 MiB", "100.0 %", ""],
        ["ring", "", "2.00 MiB", "", "2 slots of 1.00 MiB"],
        ["on the device", "", "4.00 MiB", "80.0 %", "of the budget of 5.00 MiB; residents and ring"],
    ]
    assert "units  □□■□□□■□  ■ resident □ streamed" in text
    assert "6291456 bytes (6.00 MiB) when every streamed unit runs once: 0.117 ms at 54 GB/s" in text
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "\x1b" not in text


def test_a_long_row_of_units_leaves_its_middle_out() -> None:
    specs, units = model([[1024]] * 500)
    text = str(plan(specs, 2048, units=units))
    strip = next(line for line in text.splitlines() if line.startswith("units"))
    assert f"{'□' * 27} …446… {'□' * 27}" in strip


def test_rich_prints_a_plan_as_it_is() -> None:
    from rich.console import Console

    specs, units = model([[1024]] * 3)
    made = plan(specs, 2048, units=units)
    console = Console(width=100, color_system=None, record=True, file=io.StringIO())
    console.print(made)
    assert [line.rstrip() for line in console.export_text().splitlines()] == str(made).splitlines()


# ------------------------------------------------------------------------------------ memory that is shared


@pytest.mark.parametrize("budget", [0, 1024, 2048, 2500, 1 << 20])
def test_coherent_memory_is_read_in_place(budget: int) -> None:
    specs = {f"{i}.w": raw(512) for i in range(8)} | {"norm": raw(100), "embed": raw(4096)}
    units = {f"{i}": [f"{i}.w"] for i in range(8)}
    made = plan(specs, budget, units=units, gathered=["embed"], cost=CostModel(memory="coherent"))
    assert made.nbytes(STAGED) == made.ring_nbytes == 0
    assert made.device_nbytes <= budget
    resident = [i for i in range(8) if made.placements[f"{i}.w"] is DEVICE]
    assert len(resident) == max(0, min(8, (budget - 256) // 512))
    assert (made.placements["norm"] is DEVICE) == (budget >= 256)
    assert made.placements["embed"] is MAPPED
    if 1 < len(resident) < 8:
        gaps = [b - a for a, b in itertools.pairwise([*resident, resident[0] + 8])]
        assert max(gaps) - min(gaps) <= 1
    assert "coherent memory" in made.reasons["embed"]


def test_unified_memory_needs_no_second_copy() -> None:
    specs = {"a": raw(512), "b": raw(512)}
    made = plan(specs, "1GiB", cost=CostModel(memory="unified"))
    assert set(made.placements.values()) == {MAPPED}
    assert "unified memory" in str(made)


def test_fixed_placements_hold_in_coherent_memory() -> None:
    specs = {f"{i}.w": raw(512) for i in range(4)}
    policy = pattern_policy({"0.*": "device", "1.*": "host_staged"})
    units = {f"{i}": [f"{i}.w"] for i in range(4)}
    for budget, resident in ((1024, 1), (1535, 1), (1536, 2), (2048, 3)):
        made = plan(specs, budget, units=units, policy=policy, cost=CostModel(memory="coherent"))
        assert [made.placements[f"{i}.w"] for i in range(2)] == [DEVICE, STAGED]
        assert len(made.names(DEVICE)) == resident
        assert len(made.names(STAGED)) == 1


def test_memory_of_another_kind() -> None:
    with pytest.raises(PlanError, match="memory='shared'"):
        CostModel(memory="shared")  # type: ignore[arg-type]
