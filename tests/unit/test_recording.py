"""Work that is recorded once and replayed on other inputs: the CPU's twin, and a GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from test_device import GPU
from torch import Tensor

from buddymoe_ray.device import Device, launch_on, open_device

Compute = Callable[[Callable[[], None]], None]


@pytest.fixture(params=["interpret", GPU])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    with torch.inference_mode():
        yield open_device(request.param)


def doubled(device: Device) -> tuple[Tensor, Tensor, Compute]:
    """Its input, its output, and work in two pieces of which the second needs what only the first one has."""
    x, out = torch.zeros(4, device=device.torch), torch.zeros(4, device=device.torch)

    def compute(cut: Callable[[], None]) -> None:
        inside = x * 2
        view = inside.view(2, 2)
        cut()
        inside.add_(1)
        launch_on(device.torch, lambda: out.copy_(view.reshape(-1) + x))

    return x, out, compute


def test_a_replay_computes_from_what_its_buffers_hold_by_then(device: Device) -> None:
    x, out, compute = doubled(device)
    recording = device.record(compute)
    for value in (3.0, -5.0):
        x.fill_(value)
        recording.replay(0, 2)
        assert out.tolist() == [3 * value + 1] * 4


def test_pieces_are_replayed_by_themselves(device: Device) -> None:
    x, out, compute = doubled(device)
    recording = device.record(compute)
    x.fill_(1.0)
    recording.replay(0, 1)
    assert out.tolist() != [4.0] * 4
    x.fill_(10.0)
    recording.replay(1, 2)
    assert out.tolist() == [2 * 1.0 + 1 + 10.0] * 4, "of the first piece as it ran, of the buffer as it is"


def test_what_a_piece_hands_on_outlives_pieces_that_ran_in_vain(device: Device) -> None:
    x, out = torch.ones(1 << 16, device=device.torch), torch.zeros(1 << 16, device=device.torch)

    def compute(cut: Callable[[], None]) -> None:
        handed = x + 1
        cut()
        del_me = handed * 0
        for _ in range(8):  # memory that nobody has any more is another's
            del_me = del_me + 1
        out.copy_(handed + del_me)
        del handed
        cut()
        (del_me * 3).add_(1)

    recording = device.record(compute)
    recording.replay(0, 3)
    recording.replay(1, 3)
    assert bool((out == 2 + 8).all())


def test_waiting_for_the_device_is_refused(device: Device) -> None:
    x = torch.ones(3, device=device.torch)
    for wait in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: x[x > 0], lambda: bool(x[0])):
        with pytest.raises(RuntimeError):
            device.record(lambda _, wait=wait: wait())  # type: ignore[misc]


def test_the_twin_sees_what_a_replay_leaves_out() -> None:
    """A value that Python had then, a call that nobody noted, memory that nobody wrote."""
    twin, x = open_device("interpret"), torch.zeros(2)
    outs = [torch.zeros(2) for _ in range(3)]

    def compute(_: object) -> None:
        outs[0].copy_(torch.full((2,), float(x.numpy()[0])))
        made = torch.empty(2)
        made.numpy()[:] = x.numpy() + 1
        outs[1].copy_(made)
        outs[2].copy_(torch.empty(2) * 0)

    with torch.inference_mode():
        recording = twin.record(compute)
        x.fill_(7.0)
        recording.replay(0, 1)
    assert outs[0].tolist() == [0.0, 0.0], "the value is the recording's"
    assert bool(outs[1].isnan().all() and outs[2].isnan().all())
