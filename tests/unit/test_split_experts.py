"""The replay of experts in pieces: what can be told by hand, and the misses that the cache's own rule has."""

from __future__ import annotations

import numpy as np
import pytest
from split_experts import Machine, Piece, Replay, guesses

from buddymoe_ray.residency.routes import served_hits

E, K = 16, 3
MACHINE = Machine(disk=1e9, expert_bytes=3e6, expert=2e-4, layer=1e-3, handling=0.0)


def routes(tokens: int, layers: int = 2) -> np.ndarray:
    rng = np.random.default_rng(0)
    weights_E = np.arange(1, E + 1) ** -1.0
    return np.array(
        [[rng.choice(E, K, replace=False, p=weights_E / weights_E.sum()) for _ in range(layers)] for _ in range(tokens)]
    )


def run(pieces: list[Piece], routes_TLK: np.ndarray, guess_TLK: np.ndarray | None = None, **machine: float):  # type: ignore[no-untyped-def]
    nobody = np.zeros((*routes_TLK.shape[:2], 0), np.int64) if guess_TLK is None else guess_TLK
    made = Machine(**{**vars(MACHINE), **machine})
    return Replay(made, pieces, routes_TLK, nobody, E).run(warm=0)


def test_bytes_are_the_misses_of_the_caches_own_rule() -> None:
    routes_TLK = routes(200)
    counts_LE = np.tile(np.arange(E, 0, -1), (2, 1))  # it begins with the most frequent, this with the first
    hits_L = served_hits(routes_TLK, counts_LE, (6,))[:, 0]
    assert run([Piece(share=1.0, slots=6)], routes_TLK).nbytes == pytest.approx((1 - hits_L).sum() * K * 3e6)


def test_tops_are_computed_while_bottoms_arrive() -> None:
    routes_TLK = np.arange(8, 8 + K)[None, None]
    whole = run([Piece(share=1.0, slots=8)], routes_TLK)
    assert whole.seconds == pytest.approx(1e-3 + K * 3e-3 + 2e-4) and whole.nbytes == K * 3e6
    halves = run([Piece(share=0.5, slots=E), Piece(share=0.5, slots=0)], routes_TLK)
    assert halves.seconds == pytest.approx(1e-3 + K * 1.5e-3 + 1e-4) and halves.nbytes == K * 1.5e6
    assert run([Piece(share=1.0, slots=E)], routes_TLK).seconds == pytest.approx(1e-3 + K * 2e-4)
    handled = run([Piece(share=1.0, slots=8)], routes_TLK, handling=1e-4)
    assert handled.seconds == pytest.approx(whole.seconds + 1e-4), "the last read alone is waited for"


def test_a_right_guess_hides_reads_and_a_wrong_one_is_given_up() -> None:
    routes_TLK = np.array([[[0, 1, 2], [8, 1, 2]]])
    hidden = run([Piece(share=1.0, slots=4)], routes_TLK, routes_TLK)
    assert hidden.seconds == pytest.approx(1e-3 + 3e-3 + 2e-4), "read since the first layer was routed"
    wrong_TLK = np.array([[[0, 1, 2], [9, 1, 2]]])
    given_up = run([Piece(share=1.0, slots=4)], routes_TLK, wrong_TLK)
    assert given_up.nbytes == pytest.approx(2 * 1e6 + 3e6), "two of three parts were begun"
    assert given_up.seconds == pytest.approx(1e-3 + 2e-3 + 3e-3 + 2e-4)


def test_guesses_are_right_as_often_as_they_say() -> None:
    routes_TLK = routes(300)
    right = (guesses(routes_TLK, E) == routes_TLK).mean()
    assert 0.88 < right < 0.93
