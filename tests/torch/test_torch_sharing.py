"""One checkpoint in shared memory under the modules of several processes: the same bits, and a write stays at home."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from models import Tower, same  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from dlpoffload import memory, open_shared, share  # noqa: E402
from dlpoffload.driver import open_driver  # noqa: E402
from dlpoffload.errors import AliasError  # noqa: E402
from dlpoffload.planning import all_mapped, all_staged  # noqa: E402
from dlpoffload.torch import offload_  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sharing needs Linux")

WEIGHT = "layers.2.a.weight"
PLACEMENTS: dict[str, dict[str, Any]] = {
    "staged": {"policy": all_staged, "units": ["layers.*"]},
    "mapped": {"policy": all_mapped},
}


@pytest.fixture(autouse=True)
def mappable(device: str) -> None:
    """The device pins memory that is mapped read-only, or there is nothing to test on it."""
    if not open_driver(device).capabilities().read_only_host_register:
        pytest.skip(f"{device} pins no read-only memory")


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name that no other test uses."""
    return f"{os.getpid()} {request.node.name}"[:60]


def tower(device: str) -> nn.Module:
    torch.manual_seed(3)
    return Tower(4).to(device)


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return Tower(4)


def inputs(device: str) -> Tensor:
    return torch.randn(3, 32, generator=torch.Generator().manual_seed(1)).to(device)


RANK = """
import hashlib, sys, torch
import dlpoffload as dlpo
from models import Tower
from dlpoffload.planning import all_mapped, all_staged
from dlpoffload.torch import offload_

name, device, placement, changes = sys.argv[1:]
options = {"policy": all_staged, "units": ["layers.*"]} if placement == "staged" else {"policy": all_mapped}
torch.set_num_threads(1)
with torch.device("meta"):
    tower = Tower(4)
with dlpo.open_shared(name, timeout_s=60) as checkpoint:
    handle = offload_(tower, "64MiB", device=device, checkpoint=checkpoint, mode="map", **options)
report = handle.report(link=False)
assert (report.mode, report.copied, report.moved) == ("map", (), ()), report
assert report.pinned_nbytes == report.file_nbytes > 0
print("ready", flush=True); sys.stdin.readline()
x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1)).to(device)
if changes == "changes":
    handle.update("layers.2.a.weight", torch.zeros(tower.state_dict()["layers.2.a.weight"].shape))
    assert handle.report(link=False).moved == ("layers.2.a.weight",)
with torch.no_grad():
    print(hashlib.sha256(tower(x).cpu().numpy().tobytes()).hexdigest())
"""


class Rank:
    """A process that maps the same checkpoint."""

    def __init__(self, name: str, device: str, placement: str, changes: str) -> None:
        paths = (Path(__file__).parent, Path(memory.__file__).parents[1])
        self.process = subprocess.Popen(
            [sys.executable, "-c", RANK, name, device, placement, changes],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ready(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n", self.process.communicate()[1]

    def result(self) -> str:
        out, err = self.process.communicate("\n", timeout=120)
        assert self.process.returncode == 0, err
        return out.strip()


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_ranks_compute_the_same_bits_from_one_copy_and_a_write_is_of_one_of_them(
    placement: str, device: str, name: str
) -> None:
    reference = tower(device)
    with share(reference.state_dict(), name):
        ranks = [Rank(name, device, placement, changes) for changes in ("changes", "keeps")]
        for rank in ranks:
            rank.ready()
    # Nobody has the name now, and who has the bytes goes on.
    changed, kept = (rank.result() for rank in ranks)
    with torch.no_grad():
        assert kept == digest(reference(inputs(device)))
        reference.state_dict()[WEIGHT].zero_()
        assert changed == digest(reference(inputs(device)))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_shared_weights_are_guarded_as_those_of_a_mapped_file(placement: str, device: str, name: str) -> None:
    reference, module, other = tower(device), on_meta(), on_meta()
    with share(reference.state_dict(), name) as shared:
        handle = offload_(module, "64MiB", device=device, checkpoint=shared, mode="map", **PLACEMENTS[placement])
        with open_shared(shared.path) as again:
            beside = offload_(other, "64MiB", device=device, checkpoint=again, mode="map", **PLACEMENTS[placement])
    weight = dict(module.named_parameters())[WEIGHT]
    for write in (
        lambda: weight.add_(1),
        lambda: weight.data.zero_(),
        lambda: module.state_dict()[WEIGHT].mul_(2),
        lambda: nn.init.zeros_(weight),
    ):
        with torch.no_grad(), pytest.raises(AliasError, match=WEIGHT):
            write()
    with torch.no_grad():
        assert same(module(inputs(device)), reference(inputs(device)))
        module.load_state_dict({n: t + 1 for n, t in reference.state_dict().items()})
        assert set(handle.report(link=False).moved) == set(reference.state_dict())
        assert same(other(inputs(device)), reference(inputs(device)))
        assert beside.report(link=False).moved == ()
        for tensor in reference.state_dict().values():
            tensor.add_(1)
        assert same(module(inputs(device)), reference(inputs(device)))
    handle.restore_()
    beside.restore_()


def test_a_shared_checkpoint_may_be_copied_too(device: str, name: str) -> None:
    reference, module = tower(device), on_meta()
    with share(reference.state_dict(), name) as shared:
        handle = offload_(module, "64MiB", device=device, checkpoint=shared, policy=all_staged)
        assert handle.report(link=False).mode == "copy"
    with torch.no_grad():
        assert same(module(inputs(device)), reference(inputs(device)))
        module.state_dict()[WEIGHT].zero_()
    handle.restore_()
