"""Networks that turn images into features, against PyTorch's outputs, and what surrounds them."""

from __future__ import annotations

import hashlib
import json
import pickle
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest

from jitjax.errors import UserError
from jitjax.evaluation import efficientnet, extractor, inception, torch_file
from jitjax.interop.pth import write_pth
from tests.conftest import shared

HERE = Path(__file__).parent


def pictures(size: int) -> np.ndarray:
    """Two synthetic pictures, (2, size, size, 3) uint8; the fixtures were computed from the same."""
    y, x = np.mgrid[:size, :size] / size
    shapes = np.stack([np.sin(9 * x) * np.cos(7 * y), (x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.1, np.sin(40 * x * y)], -1)
    noise = np.random.default_rng(size).standard_normal((size, size, 3))
    return np.stack([127.5 + 90 * shapes, 127.5 + 60 * shapes[::-1, :, ::-1] + 20 * noise]).clip(0, 255).astype(np.uint8)


def seeded_inception(seed: int) -> dict[str, np.ndarray]:
    """The state dict of parity/README.md: every tensor drawn from its own name."""
    state = {}
    for name, entry in json.loads(shared("parity/metrics/inception_keys.json").read_text())["keys"].items():
        shape = tuple(entry["shape"])
        if name.endswith("num_batches_tracked"):
            continue
        rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()) + seed))
        r = rng.standard_normal(shape, dtype=np.float32)
        if name.endswith("running_var"):
            value = 1 + np.float32(0.25) * np.abs(r)
        elif name.endswith("running_mean") or name.endswith(".bias"):
            value = np.float32(0.1) * r
        elif name.endswith("bn.weight"):
            value = 1 + np.float32(0.1) * r
        else:
            fan_in = int(np.prod(shape[1:]))
            value = np.float32(np.sqrt((1 if name == "fc.weight" else 2) / fan_in)) * r
        state[name] = value
    return state


def test_inception_equals_torch_fidelity_from_the_pixels_on():
    with np.load(shared("parity/metrics/inception.npz")) as arrays:
        fixture = dict(arrays)
    state = seeded_inception(int(fixture["weight_seed"]))
    for name, check in json.loads(str(fixture["checksums"])).items():
        assert zlib.crc32(state[name].tobytes()) == check["crc32"], name
    names = ("a64", "b256", "c299")
    inputs = [inception.prepare(fixture[f"{name}/image"].transpose(0, 2, 3, 1)) for name in names]
    for name, x in zip(names, inputs, strict=True):
        resized = np.asarray(x[0]).transpose(2, 0, 1) * 128 + 128
        step = 1 if name == "a64" else 4
        expected = fixture[f"{name}/resized" if step == 1 else f"{name}/resized_every4"]
        np.testing.assert_allclose(resized[:, ::step, ::step], expected, atol=1e-4)
    params = inception.params_from_state(state, "seeded")
    run = jax.jit(lambda params, x: inception.network(params, x, jax.lax.Precision.HIGHEST))
    outputs = jax.device_get(run(params, np.concatenate(inputs)))
    for row, name in enumerate(names):
        for output in ("64", "192", "768", "2048", "logits_unbiased", "logits"):
            np.testing.assert_allclose(
                outputs[output][row], fixture[f"{name}/{output}"][0], atol=5e-6, err_msg=f"{name} {output}"
            )
    # ADM's spatial features are 7 of the 192 channels of the first branch in Mixed_6d.
    spatial = outputs["spatial"].reshape(3, 17, 17, 7)
    for row, name in enumerate(names):
        means = fixture[f"{name}/mean/Mixed_6d"][0, :7]
        np.testing.assert_allclose(spatial[row].mean((0, 1)), means, atol=5e-6)


def test_depthwise_convolution_equals_xlas():
    from jitjax.evaluation import layers

    rng = np.random.default_rng(0)
    x, kernel, bias = (rng.standard_normal(s).astype(np.float32) for s in ((2, 9, 9, 4), (5, 5, 1, 4), (4,)))
    for stride in (1, 2):
        expected = jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4
        )
        np.testing.assert_allclose(layers.convolve_depthwise(x, (kernel, bias), stride), expected + bias, atol=1e-5)


def needs_efficientnet() -> None:
    if efficientnet.find_weights() is None:
        pytest.skip(f"needs the optional package {efficientnet.PACKAGE}")


def test_efficientnet_equals_the_pytorch_port_from_the_pixels_on():
    """tests/efficientnet_lite0.npz: outputs of efficientnet-lite-pytorch 0.1.0 in torch 2.13 on CPU, resized by torch."""
    needs_efficientnet()
    made = extractor.efficientnet_extractor(batch_size=8)
    with np.load(HERE / "efficientnet_lite0.npz") as fixture:
        for size in (64, 256):
            outputs = made(pictures(size))
            np.testing.assert_allclose(outputs["features"], fixture[f"features{size}"], atol=1e-4)
            np.testing.assert_allclose(outputs["logits"], fixture[f"logits{size}"], atol=3e-4)


def test_auto_without_inception_says_loudly_that_it_is_not_fid(monkeypatch, tmp_path):
    needs_efficientnet()
    no_inception(monkeypatch, tmp_path)
    made = extractor.open_extractor("auto")
    assert made.distance == "FD-EfficientNet-Lite0"
    assert made.notices[0].startswith("NOT FID") and inception.URL in made.notices[0]


def no_inception(monkeypatch, folder: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.delenv("TORCH_HOME", raising=False)
    monkeypatch.delenv(inception.VARIABLE, raising=False)


@pytest.fixture
def toy() -> extractor.Extractor:
    """A network of one matrix over two devices in runs of 4: enough to see batching, padding and sharding."""
    matrix = np.random.default_rng(0).standard_normal((192, 5)).astype(np.float32)

    def forward(params, images):
        return {"features": images.reshape(len(images), -1) / np.float32(255) @ params["matrix"]}

    run, batch_size = extractor._on_devices(forward, {"matrix": matrix}, 3, jax.devices()[:2])
    assert batch_size == 4  # rounded up to the devices
    return extractor.Extractor("toy", "FD-toy", "none", 5, ("features",), batch_size, run)


def test_batches_of_any_size_give_the_same_features_on_several_devices(toy):
    images = np.random.default_rng(1).integers(0, 256, (11, 8, 8, 3), np.uint8)
    one_by_one = np.concatenate([toy(image[None])["features"] for image in images])
    uneven = [images[:1], images[1:1], images[1:8], images[8:]]
    streamed = [part["features"] for part in toy.stream(uneven)]
    assert [len(part) for part in streamed] == [4, 4, 3]
    np.testing.assert_array_equal(np.concatenate(streamed), toy(images)["features"])
    np.testing.assert_allclose(np.concatenate(streamed), one_by_one, rtol=1e-5)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([np.zeros((2, 8, 8, 3), np.float32)], "float32"),
        ([np.zeros((8, 8, 3), np.uint8)], "uint8 of shape"),
        ([np.zeros((2, 8, 9, 3), np.uint8)], "uint8 of shape"),
        ([np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 4, 4, 3), np.uint8)], "8 px and 4 px"),
    ],
)
def test_what_is_no_image_is_refused(toy, batches, message):
    with pytest.raises(UserError, match=message):
        list(toy.stream(batches))


# ---------------------------------------------------------------- weights files


def legacy(state: dict[str, np.ndarray], damage: bytes = b"") -> bytes:
    """A state dict as torch < 1.6 saved it. `damage` is written in place of the tensors' bytes."""

    class Named:
        def __init__(self, module, name):
            self.module, self.name = module, name

    class Pickler(pickle._Pickler):
        dispatch = dict(pickle._Pickler.dispatch)

        def persistent_id(self, obj):
            return ("storage", Named("torch", "FloatStorage"), obj[1], "cpu", obj[2], None) if isinstance(obj, list) else None

        def save_name(self, obj):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())

        def save_array(self, array):
            self.save(Named("torch._utils", "_rebuild_tensor_v2"))
            key = next(name for name, value in state.items() if value is array)
            strides = tuple(step // array.itemsize for step in array.strides)
            self.save((["s", key, array.size], 0, array.shape, strides, False, {}))
            self.write(pickle.REDUCE)

    Pickler.dispatch[Named] = Pickler.save_name
    Pickler.dispatch[np.ndarray] = Pickler.save_array
    import io

    out = io.BytesIO()
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    for header in (0x1950A86A20F9469CFC6C, 1001, system):
        out.write(pickle.dumps(header, 2))
    Pickler(out, 2).dump(state)
    out.write(pickle.dumps(list(state), 2))
    for array in state.values():
        out.write(array.size.to_bytes(8, "little") + (damage or array.tobytes("A")))
    return out.getvalue()


def test_state_dicts_of_old_and_new_torch_are_read(tmp_path):
    state = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(6, dtype=np.float32).reshape(3, 2).T}
    (tmp_path / "old.pth").write_bytes(legacy(state))
    write_pth(tmp_path / "new.pth", {name: np.ascontiguousarray(value) for name, value in state.items()})
    for file in ("old.pth", "new.pth"):
        found = torch_file.read_state_dict(tmp_path / file)
        assert list(found) == list(state)
        for name, value in state.items():
            np.testing.assert_array_equal(found[name], value)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.mkdir, (self.path,)


@pytest.mark.parametrize("what", ["cut", "call", "text", "empty", "list"])
def test_damaged_and_hostile_weights_files_are_refused(tmp_path, what):
    good = legacy({"a": np.arange(6, dtype=np.float32)})
    header = good[: good.index(b"\x80\x02}", 60)] if what == "call" else b""
    content = {
        "cut": good[:-5],
        "call": header + pickle.dumps({"a": Hostile(str(tmp_path / "made"))}, 2),
        "text": b"no weights",
        "empty": b"",
        "list": b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, [1, 2])),
    }[what]
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UserError, match="a.pth") as error:
        torch_file.read_state_dict(tmp_path / "a.pth")
    assert "\n" not in str(error.value) and not (tmp_path / "made").exists()


def test_only_the_published_inception_is_taken_for_fids(monkeypatch, tmp_path):
    no_inception(monkeypatch, tmp_path)
    other = tmp_path / inception.NAMES[0]
    write_pth(other, {"fc.bias": np.zeros(1008, np.float32)})
    found = hashlib.sha256(other.read_bytes()).hexdigest()[:16]
    with pytest.raises(UserError, match=f"damaged or another file: SHA-256 is {found}"):
        extractor.open_extractor("inception", weights=other)
    with pytest.raises(UserError, match="fc.weight is missing"):
        inception.params_from_state(torch_file.read_state_dict(other), "a")
    with pytest.raises(UserError, match=f"not found; get {inception.URL}"):
        extractor.open_extractor("inception")
    monkeypatch.setenv(inception.VARIABLE, str(tmp_path / "nowhere.pth"))
    with pytest.raises(UserError, match="no such file"):
        extractor.open_extractor("auto")
    monkeypatch.delenv(inception.VARIABLE)
    cached = tmp_path / "jitjax" / inception.NAMES[1]
    cached.parent.mkdir()
    cached.touch()
    assert inception.find_weights() == cached


@pytest.mark.parametrize(
    ("which", "weights", "message"),
    [("resnet", None, "choose auto, inception"), ("efficientnet-lite0", "a.pth", "is for the extractor inception")],
)
def test_unknown_extractors_are_refused(which, weights, message):
    with pytest.raises(UserError, match=message):
        extractor.open_extractor(which, weights=weights)
