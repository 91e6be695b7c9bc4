"""Benchmark: eight bf16 blocks in JAX, all streamed, against the link and JAX's own ways, each in a fresh process.

    python tests/gpu/bench_jax.py [--hidden 4096] [--ffn 14336] [--blocks 8] [--tokens 1] [--steps 20] [--forms a,b]

Steps follow each other, each on the result of the one before, and the time of all is divided by their number; the best
of three rounds counts. The link is a pinned 1 GiB host-to-device copy by the driver API, median of 20, in the same
process, before and after; the faster of the two is what the share is of. The peak is XLA's own count of device memory
(`peak_bytes_in_use`), less what lay there before. `setup` is the time from a tree of NumPy arrays to a tree that is in
place. Prints one JSON object, and a table last.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

FORMS = {
    "resident": "everything on the device",
    "streamed loop": "dlpoffload: handle.streamed, a Python loop in one jit",
    "streamed scan": "dlpoffload: handle.streamed, lax.scan over a stack",
    "stream_blocks": "dlpoffload: stream_blocks, an eager loop over a jitted block",
    "mapped": "dlpoffload: computing on mapped arrays (UVA)",
    "jax scan": "JAX: pinned_host stack, device_put in the body of lax.scan",
    "jax scan ungraphed": "the same with COMPILER_OPTIONS",
    "jax loop": "JAX: pinned_host list, device_put in one jit",
    "jax eager": "JAX: device_put of each block before a jitted block",
}
OURS = ("streamed loop", "streamed scan", "stream_blocks", "mapped")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name, default in (("hidden", 4096), ("ffn", 14336), ("blocks", 8), ("tokens", 1), ("steps", 20), ("slots", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--form", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda:0", help='"cpu" tries the script out')
    return parser.parse_args()


# ------------------------------------------------------------------------------------- one form, one process


def host_blocks(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Blocks as NumPy arrays; the values are a tile, since making 4 GB of random numbers takes longer than all else."""
    import ml_dtypes
    import numpy as np

    h, f = args.hidden, args.ffn
    shapes = {
        "q": (h, h), "k": (h, h), "v": (h, h), "o": (h, h), "gate": (h, f), "up": (h, f), "down": (f, h),
        "norm1": (h,), "norm2": (h,),
    }  # fmt: skip
    tile = np.random.default_rng(0).standard_normal(1 << 20).astype(ml_dtypes.bfloat16)

    def weight(name: str, shape: tuple[int, ...]) -> Any:
        if name.startswith("norm"):
            return np.ones(shape, ml_dtypes.bfloat16)
        flat = np.resize(tile, (int(np.prod(shape)),)).reshape(shape)
        return (flat.view(np.uint16) - np.uint16(7 << 7)).view(ml_dtypes.bfloat16)  # exponent less 7: over 128

    return [{name: weight(name, shape) for name, shape in shapes.items()} for _ in range(args.blocks)]


def block(layer: dict[str, Any], x: Any) -> Any:
    """A Llama-like block: attention with four square projections, gated feed-forward; as in bench_blocks.py."""
    import jax
    import jax.numpy as jnp

    def norm(x: Any, scale: Any) -> Any:
        wide = x.astype(jnp.float32)
        return (wide * jax.lax.rsqrt((wide**2).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype) * scale

    y = norm(x, layer["norm1"])
    heads = (*y.shape[:-1], y.shape[-1] // 128 or 1, min(128, y.shape[-1]))
    q, k, v = ((y @ layer[name]).reshape(heads) for name in ("q", "k", "v"))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * heads[-1] ** -0.5
    mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores.astype(jnp.float32)).astype(v.dtype), v)
    x = x + mixed.reshape(x.shape) @ layer["o"]
    y = norm(x, layer["norm2"])
    return x + (jax.nn.silu(y @ layer["gate"]) * (y @ layer["up"])) @ layer["down"]


def loop(params: list[dict[str, Any]], x: Any) -> Any:
    for layer in params:
        x = block(layer, x)
    return x


def scan(stack: dict[str, Any], x: Any) -> Any:
    import jax

    return jax.lax.scan(lambda x, layer: (block(layer, x), None), x, stack)[0]


def made(form: str, args: argparse.Namespace, at: Any) -> tuple[Callable[[Any], Any], dict[str, Any]]:
    """The step of one form, and figures of making it. The host tree is gone afterwards."""
    import jax
    import numpy as np

    from dlpoffload.jax import COMPILER_OPTIONS, inspect_compiled, offload, stream_blocks
    from dlpoffload.planning import all_mapped, all_staged

    host: Any = host_blocks(args)
    scanned = "scan" in form
    if scanned:
        host = {name: np.stack([layer[name] for layer in host]) for name in host[0]}
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(host))
    slot = -(-nbytes // args.blocks // 256 + 16) * 256 + 65536
    on_host = jax.sharding.SingleDeviceSharding(at, memory_kind="pinned_host")
    on_device = jax.sharding.SingleDeviceSharding(at, memory_kind="device")
    x = jax.device_put(
        np.ones((1, args.tokens, args.hidden), host["q"].dtype if scanned else host[0]["q"].dtype), on_device
    )
    handle = None
    start = time.perf_counter()
    if form in OURS:
        staged = form != "mapped"
        more: dict[str, Any] = {"stacked": ["layers"]} if scanned else {"units": ["layers.*"]} if staged else {}
        more |= {"slots": args.slots} if staged else {}
        policy = all_staged if staged else all_mapped
        tree, handle = offload({"layers": host}, args.slots * slot, device=args.device, policy=policy, **more)
        tree = tree["layers"]
    else:
        tree = jax.device_put(host, on_device if form == "resident" else on_host)
        jax.block_until_ready(tree)
    figures: dict[str, Any] = {"setup_s": round(time.perf_counter() - start, 3), "weights_nbytes": nbytes}
    if handle is not None:
        figures["budget_nbytes"] = handle.plan.device_nbytes
    del host

    put = lambda layer: jax.device_put(layer, jax.memory.Space.Device)  # noqa: E731
    if handle is not None and form in OURS[:2]:
        body = scan if scanned else loop
        streamed = handle.streamed(lambda tree, x: body(tree["layers"], x))
        fun = jax.jit(streamed, compiler_options=dict(COMPILER_OPTIONS))
        whole = {"layers": tree}
        compiled = fun.lower(whole, x).compile()
        step: Callable[[Any], Any] = lambda x: compiled(whole, x)  # noqa: E731
    elif form in ("stream_blocks", "jax eager"):
        # Before weights are on the device: what XLA tries out while it compiles takes device memory, too.
        layer = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree[0])
        one = jax.jit(block).lower(layer, x).compile()
        if form == "stream_blocks":
            return (lambda x: stream_blocks(one, tree, x, slots=args.slots)), figures | {"x": x, "keep": handle}

        def eager(x: Any) -> Any:
            for layer in tree:
                x = one(jax.device_put(layer, on_device), x)
            return x

        return eager, figures | {"x": x}
    else:
        if form.startswith("jax scan"):

            def fun(tree: Any, x: Any) -> Any:
                return jax.lax.scan(lambda x, layer: (block(put(layer), x), None), x, tree)[0]

        elif form == "jax loop":

            def fun(tree: Any, x: Any) -> Any:
                return loop([put(layer) for layer in tree], x)

        else:
            fun = loop
        options = dict(COMPILER_OPTIONS) if form == "jax scan ungraphed" else None
        compiled = jax.jit(fun, compiler_options=options).lower(tree, x).compile()
        step = lambda x: compiled(tree, x)  # noqa: E731
    report = inspect_compiled(compiled)
    figures["xla_temporary_nbytes"] = report.temporary_nbytes
    figures["host_computations"] = len(report.host_computations)
    return step, figures | {"x": x, "keep": handle}


def measure(form: str, args: argparse.Namespace) -> dict[str, Any]:
    import jax
    import numpy as np

    import dlpoffload as dlpo
    from dlpoffload.jax.arrays import jax_device
    from dlpoffload.transfer import measure_link

    driver = dlpo.open_driver(args.device)
    at = jax_device(driver)
    nbytes = "1GiB" if driver.platform == "cuda" else "16MiB"
    links = [measure_link(driver, nbytes=nbytes).host_to_device]
    step, figures = made(form, args, at)
    x = figures.pop("x")
    keep = figures.pop("keep", None)
    result = step(x).block_until_ready()
    rounds = []
    for _ in range(3):
        start = time.perf_counter()
        y = x
        for _ in range(args.steps):
            y = step(y)
        y.block_until_ready()
        rounds.append((time.perf_counter() - start) / args.steps * 1e3)
    links.append(measure_link(driver, nbytes=nbytes).host_to_device)
    stats = at.memory_stats() or {}
    del keep
    return figures | {
        "ms": round(min(rounds), 3),
        "rounds_ms": [round(ms, 3) for ms in rounds],
        "link_gb_per_s": round(max(links), 2),
        "peak_nbytes": stats.get("peak_bytes_in_use"),
        "result": float(np.abs(np.asarray(result, np.float32)).mean()),
        "gpu": driver.description,
        "jax": jax.__version__,
    }


# ------------------------------------------------------------------------------------------------ the table


def main() -> None:
    args = arguments()
    if args.form:
        print(json.dumps(measure(args.form, args)))
        return
    from rich.console import Console
    from rich.table import Table

    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "true"}  # a pool that grows in steps counts them
    results: dict[str, dict[str, Any]] = {}
    for form in args.forms.split(","):
        run = subprocess.run(
            [sys.executable, "-P", __file__, *sys.argv[1:], "--form", form],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        lines = run.stdout.strip().splitlines()
        if run.returncode or not lines:
            said = [line for line in run.stderr.splitlines() if "Error" in line]
            results[form] = {"failed": said[-1] if said else f"exit {run.returncode}: {run.stderr[-300:]}"}
        else:
            results[form] = json.loads(lines[-1])
        print(form, results[form], flush=True)
    table = Table(
        title=f"{args.blocks} blocks, {args.tokens} token(s) a step, all weights streamed", title_justify="left"
    )
    for column in (
        "form",
        "what",
        "ms",
        "of the link",
        "peak MiB",
        "of the budget",
        "XLA temp MiB",
        "setup s",
        "host compute",
    ):
        table.add_column(column, justify="left" if column in ("form", "what") else "right")
    for form, row in results.items():
        if "failed" in row:
            table.add_row(form, row["failed"], *[""] * 7)
            continue
        floor = row["weights_nbytes"] / row["link_gb_per_s"] / 1e6
        row["link_share"] = None if form == "resident" else round(floor / row["ms"], 4)
        peak, budget = row["peak_nbytes"], row.get("budget_nbytes")
        table.add_row(
            form,
            FORMS[form],
            f"{row['ms']:.2f}",
            "–" if row["link_share"] is None else f"{row['link_share']:.1%}",
            "–" if peak is None else f"{peak / 2**20:.0f}",
            f"{peak / budget:.3f}" if peak and budget else "–",
            f"{row['xla_temporary_nbytes'] / 2**20:.0f}" if "xla_temporary_nbytes" in row else "–",
            f"{row['setup_s']:.2f}",
            str(row.get("host_computations", "–")),
        )
    print(json.dumps({"arguments": vars(args), "results": results}))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
