"""Profiles: written and read back to the bit, small, bound to their model; whatever is wrong is named."""

from __future__ import annotations

import contextlib
import hashlib
import zlib
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import MODEL_HASH, arrays_of, make_profile

from buddymoe_ray.errors import ProfileError
from buddymoe_ray.models.profile import (
    ComparisonRow,
    Profile,
    default_profile_path,
    load_profile,
    save_profile,
)
from buddymoe_ray.models.profile_fields import ARRAYS


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "m.profile"
    save_profile(make_profile(tokens=64), path)
    return path


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Change the body and seal it again: a file that only its content betrays."""
    whole = msgpack.unpackb(path.read_bytes())
    body = msgpack.unpackb(zlib.decompress(whole["body"]))
    change(body)
    return seal(path, msgpack.packb(body))


def seal(path: Path, plain: bytes, **outer: Any) -> Path:
    body = zlib.compress(plain)
    sha = hashlib.sha256(body).hexdigest()
    path.write_bytes(msgpack.packb({"magic": "buddymoe-profile", "version": 2, "sha256": sha, "body": body} | outer))
    return path


def refused(path: Path, model_hash: str = MODEL_HASH) -> str:
    with pytest.raises(ProfileError) as caught:
        load_profile(path, model_hash=model_hash)
    text = str(caught.value)
    assert str(path) in text and (" is " in text or "cannot be read" in text), text
    assert "must be" in text and "hint:" in text, text
    return text


@pytest.mark.parametrize(
    ("layers", "experts", "top_k"), [(1, 1, 1), (1, 2, 1), (4, 32, 4), (2, 256, 8), (2, 300, 8), (3, 60, 60)]
)
def test_what_was_saved_is_loaded(layers: int, experts: int, top_k: int, tmp_path: Path) -> None:
    profile = make_profile(layers=layers, experts=experts, top_k=top_k, tokens=40)
    save_profile(profile, tmp_path / "p")
    found = load_profile(tmp_path / "p", model_hash=MODEL_HASH)
    before, after = arrays_of(profile), arrays_of(found)
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert after[name].dtype == array.dtype and after[name].shape == array.shape, name
        assert after[name].tobytes() == array.tobytes(), name
        assert not after[name].flags.writeable
    for field in fields(Profile):
        if field.name not in before and field.name != "errors":
            assert getattr(found, field.name) == getattr(profile, field.name), field.name
    assert list(tmp_path.iterdir()) == [tmp_path / "p"]


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_profile(make_profile(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_shipped_size_stays_small(tmp_path: Path) -> None:
    """4 layers x 32 experts with all tables and 4,096 sampled tokens of top-4, as `builtin:tiny` ships it."""
    save_profile(make_profile(tokens=4096), tmp_path / "p")
    assert (tmp_path / "p").stat().st_size < 200_000


def test_every_array_has_its_dtype() -> None:
    kinds = {name: array.dtype.str for name, array in arrays_of(make_profile()).items()}
    assert kinds["counts_LE"] == kinds["coactivation_LEE"] == "<u4"
    assert kinds["routes_TLK"] == "|u1" and kinds["route_weights_TLK"] == "<f2"
    rest = {v for k, v in kinds.items() if k.partition("_")[0] not in ("counts", "coactivation", "routes", "route")}
    assert rest == {"<f4"}
    assert make_profile(layers=1, experts=257, tokens=8).routes_TLK.dtype == np.uint16
    assert set(ARRAYS) <= set(kinds) and {f.name for f in fields(Profile)} >= set(ARRAYS)


def test_numbers_of_other_types_are_brought_to_form() -> None:
    profile = make_profile()
    ints = profile.counts_LE.astype(np.int64)
    row = ComparisonRow(
        standin="drop",
        memory_percent=50,
        dppl_percent=np.float32(2.5),  # type: ignore[arg-type]
        dppl_se=float("nan"),
        kl=0,
        top1_agreement=np.float64(50),
        miss_rate=1,
        tokens=np.int64(7),  # type: ignore[arg-type]
    )
    changes: dict[str, Any] = {"layers": np.int64(4), "norm_topk": np.bool_(False), "comparison": [row]}
    made = replace(profile, counts_LE=ints[:, ::-1], **changes)
    assert made.counts_LE.dtype == np.uint32 and made.counts_LE.flags.c_contiguous
    assert (made.counts_LE == ints[:, ::-1]).all()
    assert type(made.layers) is int and made.norm_topk is False
    kept = made.comparison[0]
    assert [type(getattr(kept, f.name)) for f in fields(kept)] == [str, *[float] * 6, int]


def test_losses_are_scaled_errors() -> None:
    profile = make_profile()
    loss_LE = profile.loss_LE("lowbit3")
    wanted = profile.errors["lowbit3"] * profile.sensitivity_L[:, None] * 1.1
    assert profile.measured and loss_LE.dtype == np.float32 and np.allclose(loss_LE, wanted)
    assert np.allclose(profile.loss_LE("mean"), profile.errors["mean"] * profile.sensitivity_L[:, None])
    pair = profile.pair_loss_LEE()
    assert pair.shape == (4, 32, 32)
    assert np.allclose(pair, profile.pair_error_LEE * profile.sensitivity_L[:, None, None])


def test_without_sensitivities_losses_are_errors() -> None:
    profile = make_profile(sensitivity_L=np.full(4, np.nan))
    assert not profile.measured
    assert np.allclose(profile.loss_LE("drop"), profile.errors["drop"] * 0.4)
    assert not make_profile(sensitivity_L=np.array([1, 1, np.nan, 1.0])).measured


def test_a_kind_that_was_not_profiled_is_named() -> None:
    with pytest.raises(ProfileError, match=r"'lowbit8', must be one of drop, lowbit2.*hint: run buddymoe profile"):
        make_profile().loss_LE("lowbit8")
    bare = make_profile(pair_error_LEE=np.zeros(0), pair_scale_LEE=np.zeros(0))
    with pytest.raises(ProfileError, match="no pair errors, must have them"):
        bare.pair_loss_LEE()


def test_routes_may_be_left_out(tmp_path: Path) -> None:
    none = np.zeros((0, 4, 4))
    save_profile(make_profile(routes_TLK=none, route_weights_TLK=none), tmp_path / "p")
    found = load_profile(tmp_path / "p", model_hash=MODEL_HASH)
    assert found.routes_TLK.shape == (0, 4, 4) and found.routes_TLK.dtype == np.uint8


def test_pairs_may_be_left_out(tmp_path: Path) -> None:
    save_profile(make_profile(pair_error_LEE=np.zeros(0), pair_scale_LEE=np.zeros((0, 3))), tmp_path / "p")
    assert load_profile(tmp_path / "p", model_hash=MODEL_HASH).pair_scale_LEE.shape == (0,)


def with_one(array: np.ndarray, value: float) -> np.ndarray:
    changed = array.astype(np.float64)
    changed.flat[-1] = value
    return changed


@pytest.mark.parametrize("name", sorted(ARRAYS))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0, 1e39, 0.5])
def test_numbers_out_of_range_are_refused(name: str, value: float) -> None:
    profile, spec = make_profile(tokens=16), ARRAYS[name]
    fine = (np.isnan(value) and spec.nan) or (value == -1.0 and spec.signed)
    fine = fine or (value == 0.5 and spec.dtype.startswith("<f"))
    changes = {name: with_one(getattr(profile, name), value)}
    if fine:
        assert replace(profile, **changes) is not None
        return
    with pytest.raises(ProfileError, match=rf"^{name} is .*, must be .*hint: "):
        replace(profile, **changes)


@pytest.mark.parametrize("name", sorted(ARRAYS))
def test_shapes_are_held(name: str) -> None:
    profile = make_profile(tokens=16)
    array = getattr(profile, name)
    for other in (array[None], array[..., :-1], array.astype("U4"), array.tolist(), None, array.astype(complex)):
        with pytest.raises(ProfileError, match=name if "route" not in name else "route"):
            replace(profile, **{name: other})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers is 0, must be at least 1"),
        ({"layers": True}, "layers is True, must be a whole number"),
        ({"layers": 4.0}, "layers is 4.0, must be a whole number"),
        ({"layers": 5}, r"counts_LE is of shape \[4, 32\], must be of shape \[5, 32\]"),
        ({"top_k": 33}, "top_k is 33, must be at most 32"),
        ({"calibration_tokens": 0}, "calibration_tokens is 0"),
        ({"norm_topk": 1}, "norm_topk is 1, must be true or false"),
        ({"model_hash": ""}, "model_hash is '', must be a text"),
        ({"model": None}, "model is None, must be a text"),
        ({"recommended": ""}, "recommended is '', must be a text"),
        ({"reason": 3}, "reason is 3, must be a text"),
        ({"errors": []}, "errors is list, must be a table"),
        ({"errors": {3: np.zeros((4, 32))}}, "a kind in errors is 3"),
        ({"errors": {"Low Bit": np.zeros((4, 32))}}, "a kind in errors is 'Low Bit'"),
        ({"errors": {"mean": np.zeros((4, 31))}}, r"errors\[mean\] is of shape \[4, 31\]"),
        ({"errors": {"mean": np.full((4, 32), np.nan)}}, r"errors\[mean\] is nan in one place, must be finite"),
        ({"record_bytes": {"mean": 0}}, r"record_bytes\[mean\] is 0, must be at least 1"),
        ({"record_bytes": {"mean": 1.5}}, r"record_bytes\[mean\] is 1.5, must be a whole number"),
        ({"kind_scale": {"mean": np.nan}}, r"kind_scale\[mean\] is nan, must be at least 0"),
        ({"kind_scale": {"mean": -1.0}}, r"kind_scale\[mean\] is -1.0, must be at least 0"),
        ({"comparison": 3}, "comparison is int, must be rows"),
        ({"comparison": (3,)}, "a row of comparison is int, must be ComparisonRow"),
        ({"pair_scale_LEE": np.zeros(0)}, "pair_scale_LEE is of another shape"),
        ({"routes_TLK": np.full((512, 4, 4), 32)}, "routes_TLK is up to 32, must be below 32"),
        ({"routes_TLK": np.full((512, 4, 4), 300)}, "routes_TLK is up to 300, must be whole numbers up to 255"),
        ({"route_weights_TLK": np.zeros((9, 4, 4))}, r"route_weights_TLK is of shape \[9, 4, 4\]"),
    ],
)
def test_wrong_fields_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        replace(make_profile(), **changes)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dppl_percent", float("nan"), "dppl_percent of a row of comparison is nan"),
        ("kl", "0.1", "kl of a row of comparison is '0.1', must be a number"),
        ("tokens", 1.5, "tokens of a row of comparison is 1.5, must be a whole number"),
        ("tokens", -1, "tokens of a row of comparison is -1, must be at least 0"),
        ("standin", "", "standin of a row of comparison is '', must be a text"),
        ("miss_rate", True, "miss_rate of a row of comparison is True"),
    ],
)
def test_wrong_rows_are_named(name: str, value: Any, message: str) -> None:
    row = replace(make_profile().comparison[0], **{name: value})
    with pytest.raises(ProfileError, match=message):
        make_profile(comparison=(row,))


def test_another_models_profile_is_refused(saved: Path) -> None:
    text = refused(saved, "f" * 64)
    assert "is of builtin:tiny (hash 0123456789ab), must be of this checkpoint (hash ffffffffffff)" in text


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "none.profile")
    assert "directory" in refused(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x80", "another kind of file"),
        (b"\x93\x01\x02", "truncated or no profile"),
        (b"{}", "truncated or no profile"),
        (b"\x81\x01\x02", "truncated or no profile"),
        (b"\xc1" * 50, "truncated or no profile"),
        (b"\x91" * 5000, "truncated or no profile"),
        (b"\xdf\xff\xff\xff\xff", "truncated or no profile"),
        (b"\x80\x04}\x94.", "truncated or no profile"),  # a pickle of {}
        (msgpack.packb({"magic": "buddymoe-profile"}), "of version None, must be of version 2"),
        (msgpack.packb({"magic": "buddymoe-profile", "version": 2}), "corrupt"),
        (msgpack.packb({"magic": "buddymoe-profile", "version": 2, "body": 3, "sha256": 3}), "corrupt"),
    ],
)
def test_other_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.profile"
    path.write_bytes(content)
    assert message in refused(path)


def test_other_versions_are_refused(saved: Path) -> None:
    assert "of version 1, must be of version 2" in refused(seal(saved, b"", version=1))


def test_every_truncation_is_refused(saved: Path) -> None:
    whole = saved.read_bytes()
    for end in [0, 1, 2, 10, 60, len(whole) // 2, len(whole) - 1]:
        saved.write_bytes(whole[:end])
        refused(saved)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_flipped_bit_is_noticed(saved: Path, share: float) -> None:
    whole = bytearray(saved.read_bytes())
    whole[int(share * len(whole))] ^= 1
    saved.write_bytes(whole)
    refused(saved)


def test_a_body_that_does_not_inflate_is_refused(saved: Path) -> None:
    for body in (b"plain", zlib.compress(b"x")[:-1], zlib.compress(b"\x80") + b"more"):
        seal(saved, b"", body=body, sha256=hashlib.sha256(body).hexdigest())
        refused(saved)
    assert "damaged inside" in refused(seal(saved, b"\xc1"))
    assert "damaged inside" in refused(seal(saved, msgpack.packb([1])))


@pytest.mark.parametrize("field", [field.name for field in fields(Profile)])
def test_a_missing_field_is_named(saved: Path, field: str) -> None:
    assert f"{field} is missing, must be there" in refused(rewrite(saved, lambda body: body.pop(field)))


@pytest.mark.parametrize("field", [field.name for field in fields(Profile)])
@pytest.mark.parametrize("value", [[], {"a": {}}, -7, "\0", b"\0", {"dtype": "|O", "shape": [1], "bytes": b"12345678"}])
def test_a_field_of_another_type_is_named(saved: Path, field: str, value: Any) -> None:
    if field in ("comparison", "budget_curve") and value == []:
        return
    if isinstance(value, str) and field in ("model", "corpus_sha", "created_by", "reason", "recommended", "model_hash"):
        return
    # a count that is wrong shows in the arrays that depend on it
    text = refused(rewrite(saved, lambda body: body.__setitem__(field, value)))
    assert field in text or field == "errors", text


def test_an_unknown_field_is_named(saved: Path) -> None:
    assert "a field is 'colour'" in refused(rewrite(saved, lambda body: body.__setitem__("colour", 1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "<f8"}, "counts_LE is of dtype '<f8', must be of dtype '<u4'"),
        ({"dtype": ">u4"}, "counts_LE is of dtype '>u4'"),
        ({"dtype": "O"}, "counts_LE is of dtype 'O'"),
        ({"dtype": None}, "counts_LE is of dtype None"),
        ({"shape": [4, 31]}, r"counts_LE is 512 bytes"),
        ({"shape": [-1, 32]}, "counts_LE is 512 bytes"),
        ({"shape": [32, 4]}, "counts_LE is of shape [32, 4], must be of shape [4, 32]"),
        ({"shape": [128]}, "counts_LE is of shape [128]"),
        ({"shape": "4"}, "counts_LE is 512 bytes"),
        ({"shape": [1 << 62, 1 << 62]}, "counts_LE is 512 bytes"),
        ({"bytes": b""}, "counts_LE is 0 bytes"),
        ({"bytes": "text"}, "counts_LE is no bytes"),
    ],
)
def test_a_broken_array_is_named(saved: Path, change: dict[str, Any], message: str) -> None:
    assert message in refused(rewrite(saved, lambda body: body["counts_LE"].update(change)))


def test_a_nan_in_the_file_is_named(saved: Path) -> None:
    def poison(body: dict[str, Any]) -> None:
        planes = np.frombuffer(body["errors"]["lowbit3"]["bytes"], np.uint8).copy().reshape(4, -1)
        planes[:, 5] = np.frombuffer(np.float32(np.nan).tobytes(), np.uint8)
        body["errors"]["lowbit3"]["bytes"] = planes.tobytes()

    assert "errors[lowbit3] is nan in one place, must be finite" in refused(rewrite(saved, poison))


def test_rows_of_other_columns_are_named(saved: Path) -> None:
    assert "budget_curve is otherwise" in refused(rewrite(saved, lambda body: body["budget_curve"].append(1)))
    assert "comparison is otherwise" in refused(rewrite(saved, lambda body: body["comparison"][0].pop("kl")))


@settings(max_examples=60)
@given(data=st.data())
def test_random_damage_is_a_profile_error_or_harmless(data: st.DataObject, tmp_path_factory: Any) -> None:
    """Whatever bytes change inside a sealed body, loading either refuses cleanly or gives a valid profile."""
    path = tmp_path_factory.mktemp("damage") / "p"
    save_profile(make_profile(layers=1, experts=3, top_k=2, tokens=4), path)
    plain = bytearray(zlib.decompress(msgpack.unpackb(path.read_bytes())["body"]))
    for _ in range(data.draw(st.integers(1, 4))):
        plain[data.draw(st.integers(0, len(plain) - 1))] = data.draw(st.integers(0, 255))
    seal(path, bytes(plain))
    with contextlib.suppress(ProfileError):
        assert isinstance(load_profile(path, model_hash=MODEL_HASH), Profile)


def test_a_failed_save_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ProfileError, match=r"cannot be written \(No space left on device\).*hint: "):
        save_profile(make_profile(tokens=8), saved)
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]


def test_a_folder_that_is_not_there_cannot_be_saved_to(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="cannot be written"):
        save_profile(make_profile(tokens=8), tmp_path / "no" / "p")


def test_the_profile_beside_a_checkpoint_is_found(tmp_path: Path) -> None:
    assert default_profile_path(tmp_path) is None
    (tmp_path / "buddymoe.profile").mkdir()
    assert default_profile_path(tmp_path) is None
    (tmp_path / "buddymoe.profile").rmdir()
    (tmp_path / "buddymoe.profile").touch()
    assert default_profile_path(tmp_path) == tmp_path / "buddymoe.profile"
