"""Official checkpoints in and out: bit for bit, without executing anything, and in one line when something is wrong."""

import functools
import io
import json
import os
import pickle
import shutil
import struct
import zipfile

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import shared, small_settings

import jitjax
from jitjax import checkpoint, cli, convert, model, saving, settings, step
from jitjax.errors import UserError
from jitjax.geometry import geometry_of, make_geometry
from jitjax.interop import official
from jitjax.interop.pth import BadFile, PthFile, write_pth
from jitjax.interop.weights import read_weights
from jitjax.train import train

SETS = ("model", "model_ema1", "model_ema2")


@pytest.fixture(scope="module")
def tiny():
    """Mini JiT after six steps of the official trainer, as its own saver wrote it."""
    return shared("parity/tiny_checkpoint.pth")


@pytest.fixture(scope="module")
def imported(tiny, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("imported") / "run"
    convert.main(["--from", str(tiny), "--to", str(workdir), "--context_start", "1"])
    return workdir


def plain(content):
    """A loaded .pth with arrays for tensors."""
    if isinstance(content, dict):
        return {key: plain(value) for key, value in content.items()}
    return content.numpy() if hasattr(content, "numpy") else content


def read(path):
    with PthFile(path) as file:
        return plain(file.content)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# ---------------------------------------------------------------- there and back


def test_pth_to_jitjax_to_pth_is_bit_identical(tiny, imported, tmp_path):
    convert.main(["--from", str(imported), "--to", str(tmp_path / "back.pth")])
    before, after = read(tiny), read(tmp_path / "back.pth")
    for name in SETS:
        assert list(before[name]) == list(after[name])  # also the order, and net.
        assert all(same_bits(before[name][key], after[name][key]) for key in before[name])
    # So that the official code can go on: moments and step of every parameter, groups, epoch, arguments.
    assert before["optimizer"]["param_groups"] == after["optimizer"]["param_groups"]
    for index, state in before["optimizer"]["state"].items():
        assert all(same_bits(value, after["optimizer"]["state"][index][key]) for key, value in state.items())
    assert (after["epoch"], after["args"]) == (before["epoch"], before["args"])


def test_the_emas_in_the_fixture_have_a_drifted_position_table(tiny):
    """Else the round trip would not show that the drift is carried along."""
    table = model.position_table(64, 8)[None]
    content = read(tiny)
    assert same_bits(content["model"]["net.pos_embed"], table)
    assert not np.array_equal(content["model_ema1"]["net.pos_embed"], table)


def test_moments_of_adamw_arrive_at_their_parameters(tiny):
    with np.load(shared("parity/tiny_checkpoint_out.npz")) as expected:
        content = read_weights(tiny, context_start=1, moments=True)
        assert content.step == expected["opt_step"] and content.epoch == expected["epoch"]
        for moment, key in (("mu", "exp_avg"), ("nu", "exp_avg_sq")):
            moments = content.moments[moment]
            assert np.array_equal(moments["blocks.1.mlp.w12.kernel"].T, expected[f"{key}/blocks.1.mlp.w12.weight"])
            assert np.array_equal(moments["y_embedder.table"], expected[f"{key}/y_embedder.embedding_table.weight"])
        order = [name for group in official.optimizer_order(content.geometry) for name in group]
        assert order == json.loads(str(expected["optimizer_index_to_name"]))


def test_safetensors_there_and_back(tiny, imported, tmp_path):
    weights = read(tiny)
    for which in SETS:
        file = tmp_path / f"{which}.safetensors"
        convert.main(["--from", str(imported), "--to", str(file), "--which", which])
        convert.main(["--from", str(file), "--to", str(tmp_path / "back.pth")])  # the geometry is in the file
        back = read(tmp_path / "back.pth")["model"]
        assert all(same_bits(back[key], value) for key, value in weights[which].items() if key != "net.pos_embed")
    convert.main(["--from", str(file), "--to", str(tmp_path / "run")])
    loaded = checkpoint.load_weights(tmp_path / "run")
    again = official.to_state_dict(loaded.params, loaded.geometry)
    assert all(same_bits(again[key], value) for key, value in weights[which].items() if key != "net.pos_embed")


def test_a_run_of_ours_to_pth(tmp_path):
    """Our own checkpoint, its EMAs in the configured order, and every weight back bit for bit."""
    config = small_settings(optim__ema_decays=(0.5, 0.9))
    geometry = geometry_of(config.model, config.data.image_size, 5)
    state = jax.jit(functools.partial(step.init_state, geometry, config.optim, config.dtype))(jax.random.key(0))
    ema = {"0.9": jax.tree.map(lambda a: a + 9, state.params), "0.5": jax.tree.map(lambda a: a + 5, state.params)}
    saved = saving.Checkpoints(tmp_path / "run")
    meta = checkpoint.describe(geometry, ema, config=settings.to_dict(config), data={"count": 80}, examples=8)
    saved.save(step.fresh_state(state.params, ema, config.optim, config.dtype), 2, meta)
    saved.close()
    convert.main(["--from", str(tmp_path / "run"), "--to", str(tmp_path / "a.pth")])
    content = read(tmp_path / "a.pth")
    for name, params in zip(SETS, (state.params, ema["0.5"], ema["0.9"]), strict=True):
        found = official.to_params(content[name], geometry)
        assert found.keys() == params.keys()
        assert all(same_bits(found[key], np.asarray(params[key])) for key in params)
    assert content["args"]["ema_decay1"] == 0.5
    loaded = jitjax.load_official(tmp_path / "a.pth", "model_ema2", context_start=geometry.context_start)
    assert loaded.geometry == geometry


def test_weights_and_moments_are_of_one_step_though_the_run_goes_on(tmp_path, monkeypatch):
    run, load = tmp_path / "run", checkpoint.load_weights
    assert train(small_settings(total_steps=2, checkpoint__every_steps=1, checkpoint__keep_last=3), run) == 0
    first, second = (read_weights(run / "checkpoints" / step, moments=True).moments["mu"] for step in "12")

    def before_the_second_was_saved(path):
        (run / "checkpoints" / "2").rename(tmp_path / "2")
        saved = load(path)
        (tmp_path / "2").rename(run / "checkpoints" / "2")
        return saved

    monkeypatch.setattr(checkpoint, "load_weights", before_the_second_was_saved)
    found = read_weights(run, moments=True)
    assert found.step == 1
    chex.assert_trees_all_equal(found.moments["mu"], first)

    def then_deletes_it(path):
        saved = before_the_second_was_saved(path)
        monkeypatch.setattr(checkpoint, "load_weights", load)
        shutil.rmtree(run / "checkpoints" / "1")
        return saved

    monkeypatch.setattr(checkpoint, "load_weights", then_deletes_it)
    found = read_weights(run, moments=True)
    assert found.step == 2
    chex.assert_trees_all_equal(found.moments["mu"], second)


# ---------------------------------------------------------------- geometry


class Shaped:
    """A tensor without values."""

    def __init__(self, shape):
        self.shape = shape


@pytest.mark.parametrize("prefix", ["", "net."])
@pytest.mark.parametrize(
    ("name", "size", "tensors"),
    [("B/16", 256, 183), ("B/32", 512, 183), ("L/16", 256, 351), ("L/32", 512, 351), ("H/16", 256, 463), ("H/32", 512, 463)],
)
def test_geometry_of_the_published_sizes_comes_from_the_shapes(name, size, tensors, prefix):
    wanted = make_geometry(f"JiT-{name}", size, 1000)
    shapes = {prefix + key: Shaped(shape) for key, shape in official.official_shapes(wanted).items()}
    assert len(shapes) == tensors
    assert official.infer_geometry(shapes) == wanted


def test_unusual_geometry_comes_from_the_shapes_but_for_the_context_start(caplog):
    wanted = make_geometry("JiT-B/4", 64, 10, depth=5, width=80, heads=2, mlp_ratio=2.7, context_length=3, context_start=2)
    shapes = {key: Shaped(shape) for key, shape in official.official_shapes(wanted).items()}
    assert official.infer_geometry(shapes).context_start == 1 and "give context_start" in caplog.text
    caplog.clear()
    found = official.infer_geometry(shapes, context_start=2)
    assert official.official_shapes(found) == official.official_shapes(wanted)
    assert (found.heads, found.image_size, found.context_start) == (2, 64, 2) and not caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.1.attn.qkv.bias"), "missing 1 entries .blocks.1.attn.qkv.bias"),
        (lambda t: t.update({"head.weight": Shaped((3, 3))}), "unknown 1 entries .head.weight"),
        (lambda t: t.update({"final_layer.linear.bias": Shaped((7,))}), r"final_layer.linear.bias has shape \(7,\), expected"),
        (lambda t: t.pop("pos_embed"), "expected a tensor pos_embed"),
        (lambda t: t.clear(), "not the weights of a JiT"),
    ],
)
def test_other_weights_are_refused_by_name(change, message):
    geometry = make_geometry("JiT-nano/4", 32, 10)
    tensors = {key: Shaped(shape) for key, shape in official.official_shapes(geometry).items()}
    change(tensors)
    with pytest.raises(UserError, match=message):
        official.infer_geometry(tensors, context_start=1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(args={"attn_dropout": "much"}), "attn_dropout='much' in the arguments of the file: must be a number in"),
        (dict(args={"proj_dropout": 1.5}), "proj_dropout=1.5 in the arguments"),
        (dict(class_start=9), r"class_start=9: must lie in \[0, "),
    ],
)
def test_what_the_tensors_do_not_say_is_checked(given, message):
    geometry = make_geometry("JiT-nano/4", 8, 2)
    tensors = {key: Shaped(shape) for key, shape in official.official_shapes(geometry).items()}
    with pytest.raises(UserError, match=message):
        official.infer_geometry(tensors, context_start=1, **given)
    assert official.infer_geometry(tensors, {"class_start": "text"}, context_start=1).class_start == 0  # no official argument


def test_a_learned_position_table_is_refused():
    geometry = make_geometry("JiT-nano/4", 8, 2)
    tensors = {key: np.zeros(shape, np.float32) for key, shape in official.official_shapes(geometry).items()}
    with pytest.raises(UserError, match="pos_embed differs from the fixed sin-cos table"):
        official.to_params(tensors, geometry)


# ---------------------------------------------------------------- hostile and damaged files


def archive(path, pickled, extra=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("x/data.pkl", pickled)
        for name, data in extra:
            file.writestr(f"x/{name}", data)
    return path


def tensor_pickle(numel, offset, shape, strides):
    """A pickle of one tensor as torch writes it, with any numbers in it."""

    class Pickler(pickle._Pickler):
        dispatch = dict(pickle._Pickler.dispatch)

        def save_global_name(self, obj):
            self.write(pickle.GLOBAL + b"\n".join([*obj.encode().rsplit(b".", 1), b""]))

        def save_str(self, obj):
            self.save_global_name(obj) if obj.startswith("torch") else pickle._Pickler.save_str(self, obj)

        dispatch[str] = save_str

        def persistent_id(self, obj):
            return tuple(obj[1:]) if isinstance(obj, list) and obj[0] == "pid" else None

    out = io.BytesIO()
    pickler = Pickler(out, 2)
    out.write(pickle.PROTO + b"\x02")
    pickler.save("torch._utils._rebuild_tensor_v2")
    pickler.save((["pid", "storage", "torch.FloatStorage", "0", "cpu", numel], offset, shape, strides, False, None))
    out.write(pickle.REDUCE + pickle.STOP)
    return out.getvalue()


class Run:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


ONE_FLOAT = [("data/0", struct.pack("<f", 1.0))]


def files(tmp_path, tiny):
    """{kind: path} of files that must be refused."""
    marker, good = tmp_path / "executed", tiny.read_bytes()
    flipped = bytearray(good)
    with zipfile.ZipFile(tiny) as whole:
        info = whole.getinfo("checkpoint-last/data/2")
    flipped[info.header_offset + 4096] ^= 1
    made = {
        "os.system": archive(tmp_path / "a.pth", pickle.dumps(Run(os.system, f"touch {marker}"), 2)),
        "builtins.eval": archive(tmp_path / "b.pth", pickle.dumps(Run(eval, f"open({str(marker)!r}, 'w')"), 2)),
        "attribute of numpy": archive(tmp_path / "c.pth", pickle.dumps(Run(np.load, str(marker)), 4)),
        "stack global": archive(tmp_path / "d.pth", pickle.dumps({"model": Run(os.mkdir, str(marker))}, 4)),
        "class attribute": archive(tmp_path / "e.pth", b"\x80\x02cargparse\nNamespace\n}X\x01\x00\x00\x00aK\x01s\x86b."),
        "garbage pickle": archive(tmp_path / "f.pth", b"\x80\x02this is not a pickle"),
        "empty pickle": archive(tmp_path / "g.pth", b""),
        "deep pickle": archive(tmp_path / "h.pth", b"\x80\x02" + b"]" * 10**6 + b"a" * (10**6 - 1) + b"."),
        "bomb": archive(tmp_path / "i.pth", b"\x80\x02}.", [("data/0", bytes(10**7))], zipfile.ZIP_DEFLATED),
        "TorchScript": archive(tmp_path / "j.pth", b"\x80\x02}.", [("constants.pkl", b"")]),
        "big endian": archive(tmp_path / "k.pth", b"\x80\x02}.", [("byteorder", b"big")]),
        "beyond the end": archive(tmp_path / "l.pth", tensor_pickle(1, 0, (2,), (1,)), ONE_FLOAT),
        "behind an offset": archive(tmp_path / "m.pth", tensor_pickle(1, 5, (1,), (1,)), ONE_FLOAT),
        "before the beginning": archive(tmp_path / "n.pth", tensor_pickle(1, -1, (1,), (1,)), ONE_FLOAT),
        "repeated a billion times": archive(tmp_path / "o.pth", tensor_pickle(1, 0, (10**9, 10**9), (0, 0)), ONE_FLOAT),
        "more than is stored": archive(tmp_path / "p.pth", tensor_pickle(2, 0, (2,), (1,)), ONE_FLOAT),
        "no bytes": archive(tmp_path / "q.pth", tensor_pickle(1, 0, (1,), (1,))),
        "not weights": archive(tmp_path / "r.pth", pickle.dumps({"lr": 0.1, "epoch": 3}, 2)),
        "not a dictionary": archive(tmp_path / "s.pth", pickle.dumps([1, 2], 2)),
        "model is a list": archive(tmp_path / "t.pth", pickle.dumps({"model": [1]}, 2)),
        "no pickle": archive(tmp_path / "u.pth", b"", []),
    }
    with zipfile.ZipFile(tmp_path / "u.pth", "w") as empty:
        empty.writestr("readme.txt", "nothing here")
    raw = {
        "truncated": good[: len(good) // 2],
        "last byte missing": good[:-1],
        "only the beginning": good[:100],
        "empty": b"",
        "text": b"<!DOCTYPE html><title>404</title>",
        "legacy torch": b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03.",
        "bare pickle": pickle.dumps(Run(os.system, f"touch {marker}"), 2),
        "one bit flipped": bytes(flipped),
    }
    for number, (kind, data) in enumerate(raw.items()):
        made[kind] = tmp_path / f"raw{number}.pth"
        made[kind].write_bytes(data)
    made["missing"], made["a folder"] = tmp_path / "missing.pth", tmp_path / "folder.pth"
    made["a folder"].mkdir()
    return made, marker


def test_hostile_and_damaged_files_cost_one_line_and_run_nothing(tmp_path, tiny, capsys):
    made, marker = files(tmp_path, tiny)
    for kind, path in made.items():
        command = ["--from", str(path), "--to", str(tmp_path / "out"), "--context_start", "1"]
        code = cli.guarded(lambda command=command: convert.main(command))
        lines = capsys.readouterr().err.splitlines()
        assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (kind, code, lines)
        assert len(lines[0]) < 400, (kind, lines)
        assert not marker.exists(), kind
        assert not (tmp_path / "out").exists(), kind


def test_the_line_names_what_was_found(tmp_path, tiny):
    made, _ = files(tmp_path, tiny)
    for kind, message in {
        "os.system": "refused: it names (posix|nt).system",
        "builtins.eval": "refused: it names (__builtin__|builtins).eval",
        "truncated": "truncated or damaged zip",
        "legacy torch": "torch < 1.6",
        "text": "begins with b'<!DOCTYP",
        "bomb": "compressed",
        "missing": "No such file",
    }.items():
        with pytest.raises(BadFile, match=message):
            PthFile(made[kind])
    with PthFile(made["one bit flipped"]) as file, pytest.raises(BadFile, match="damaged"):
        plain(file.content)


def test_an_ema_that_is_not_in_the_file_is_named(tiny):
    with pytest.raises(UserError, match="which='ema' is not in the file: use one of model, model_ema1, model_ema2"):
        jitjax.load_official(tiny, "ema", context_start=1)


def test_convert_overwrites_no_checkpoint(tiny, imported, capsys):
    arguments = ["--from", str(tiny), "--to", str(imported), "--context_start", "1"]
    assert cli.guarded(lambda: convert.main(arguments)) == 2
    assert "has checkpoints already" in capsys.readouterr().err


# ---------------------------------------------------------------- dtypes, PyTorch itself


def test_every_dtype_and_shape_comes_back(tmp_path):
    rng = np.random.default_rng(0)
    dtypes = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int64, np.int32, np.uint8, np.bool_]
    arrays = {np.dtype(d).name: (rng.standard_normal((3, 5)) * 9).astype(d) for d in dtypes}
    arrays |= {
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "transposed": np.arange(12.0).reshape(3, 4).T,
    }
    values = {"none": None, "flag": True, "big": 2**40, "text": "ü", "pair": (0.9, 0.95), "list": [1, 2]}
    write_pth(tmp_path / "a.pth", {**arrays, **values})
    found = read(tmp_path / "a.pth")
    assert all(same_bits(found[key], np.ascontiguousarray(value).reshape(value.shape)) for key, value in arrays.items())
    assert {key: found[key] for key in values} == values


def test_half_precision_weights_become_float32(tmp_path):
    geometry = make_geometry("JiT-nano/4", 8, 2, depth=1, context_start=0)
    params = jit_params(geometry)
    half = {k: v.astype(ml_dtypes.bfloat16) for k, v in official.to_state_dict(params, geometry).items() if "pos" not in k}
    whole = {k: v for k, v in official.to_state_dict(params, geometry).items() if "pos" in k}
    write_pth(tmp_path / "half.pth", {"model": {**half, **whole}})
    loaded = model.split(jitjax.load_official(tmp_path / "half.pth", "model", context_start=0))[1]
    for name, value in loaded.items():
        wanted = params[name] if name == "in_context_pos" else params[name].astype(ml_dtypes.bfloat16)
        assert value.dtype == jnp.float32 and np.array_equal(np.asarray(value), np.asarray(wanted, np.float32)), name


def jit_params(geometry):
    return {name: np.asarray(value) for name, value in jax.jit(model.init_fn(geometry))(jax.random.key(0)).items()}


def test_pytorch_reads_ours_and_we_read_any_strides_of_its(tmp_path, tiny, imported):
    torch = pytest.importorskip("torch", reason="PyTorch is not needed by jitjax; here it only checks the files")
    convert.main(["--from", str(imported), "--to", str(tmp_path / "back.pth")])
    theirs = torch.load(tiny, weights_only=False)
    ours = torch.load(tmp_path / "back.pth", weights_only=True)
    for name in SETS:
        assert all(torch.equal(theirs[name][key], ours[name][key]) for key in theirs[name])
    base = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
    views = {"t": base.permute(2, 0, 1), "s": base[1:, ::2, 1:], "b": base.bfloat16()[0].T, "p": torch.nn.Parameter(base)}
    torch.save(views, tmp_path / "views.pth")
    found = read(tmp_path / "views.pth")
    assert all(np.array_equal(found[k].astype(np.float32), v.detach().float().numpy()) for k, v in views.items())


# ---------------------------------------------------------------- the public surface


def test_importing_jitjax_imports_no_jax():
    import subprocess
    import sys

    code = "import sys, jitjax, jitjax.data; assert 'jax' not in sys.modules; assert 'create_model' in dir(jitjax)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_documented_way_from_a_file_to_pixels(tiny):
    m = jitjax.load_official(tiny, context_start=1)
    noise = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    images = jitjax.sample(m, noise, jnp.array([3, 7]), steps=2, method="euler", cfg_scale=2.0, interval=(0.1, 1.0))
    pixels = jitjax.to_uint8(images)
    assert images.dtype == jnp.float32 and pixels.shape == (2, 32, 32, 3) and pixels.dtype == jnp.uint8
    fresh = jitjax.create_model("JiT-nano/4", image_size=32, num_classes=10, depth=2)
    z, t, y = noise, jnp.array([0.2, 0.9]), jnp.array([10, 0])
    assert jnp.all(fresh(z, t, y) == 0)  # adaLN-Zero and a zero last layer
    chex.assert_trees_all_equal(model.split(fresh)[1], model.init_fn(fresh.geometry)(jax.random.key(0)))  # as a run begins


def test_a_model_differentiates_forward_as_backward(tiny):
    """An objective with a derivative along the path needs forward mode."""
    m = jitjax.load_official(tiny, context_start=1)
    z, direction, cotangent = jax.random.normal(jax.random.key(0), (3, 2, 32, 32, 3))
    t, y = jnp.array([0.2, 0.9]), jnp.array([3, 0])

    def answer(z):
        return m(z, t, y)

    along = jnp.vdot(jax.jvp(answer, (z,), (direction,))[1], cotangent)
    (back,) = jax.vjp(answer, z)[1](cotangent)
    np.testing.assert_allclose(along, jnp.vdot(direction, back), rtol=1e-3)
    assert abs(along) > 1e-3
