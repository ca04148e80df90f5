"""The one reader of weights: every form that people save a JiT in gives the right values, or one line that says why not."""

import argparse
import collections
import dataclasses
import datetime
import json
import pathlib
import pickle
import shutil
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from conftest import small_settings

from jitjax import checkpoint, cli, convert, model, saving, settings, step
from jitjax.errors import UserError
from jitjax.geometry import make_geometry
from jitjax.interop import diffusers, official, pth, weights
from jitjax.interop.pth import PthFile, write_pth
from jitjax.interop.weights import read_weights, write_folder, write_safetensors

SHAPE = dict(depth=2, width=32, heads=2, bottleneck=8, context_length=2, context_start=1)
G = make_geometry("JiT-nano/4", 16, 3, **SHAPE)


def params(seed, g=G):
    """Random values in the shapes of g; norm weights near 1, as after some training."""
    rng, shapes = np.random.default_rng(seed), official.official_shapes(g)
    tensors = {name: rng.standard_normal(shape, np.float32) / 10 + ("norm" in name) for name, shape in shapes.items()}
    tensors[official.POSITIONS] = model.position_table(g.width, g.grid)[None]
    return official.to_params(tensors, g)


RAW, EMA, EMA2 = params(1), params(2), params(3)


def state(values, prefix="net."):
    return official.to_state_dict(values, G, prefix=prefix)


def mapped(tensors, change):
    return {change(name): value for name, value in tensors.items()}


def same(found, wanted):
    return found.keys() == wanted.keys() and all(np.array_equal(found[k], wanted[k]) for k in wanted)


def read(tmp_path, content, name="a.pth", **options):
    write_pth(tmp_path / name, content)
    return read_weights(tmp_path / name, **{"context_start": 1, **options})


def one(weights):
    (values,) = weights.sets.values()
    return values


# ---------------------------------------------------------------- values that are not weights


class Call:
    """In a pickle: a name, called with `args` (None: the name itself), its state set to `state`."""

    def __init__(self, module, name, args=(), state=None):
        self.name, self.args, self.state = pth._Name(module, name), args, state


def save_call(pickler, call):
    pickler.save(call.name)
    if call.args is not None:
        pickler.save(call.args)
        pickler.write(pickle.REDUCE)
    if call.state is not None:
        pickler.save(call.state)
        pickler.write(pickle.BUILD)


pth._Pickler.dispatch[Call] = save_call  # the writer learns to write what torch's users save; jitjax itself never does

STRAYS = {
    "numpy number": np.float64(4.37),
    "numpy bool": np.bool_(True),
    "path": pathlib.PurePosixPath("/data/imagenet"),
    "windows path": pathlib.PureWindowsPath("C:\\data"),
    "device": Call("torch", "device", ("cuda", 0)),
    "dtype": Call("torch", "bfloat16", None),
    "size": Call("torch", "Size", ([1, 2],)),
    "set": {1, 2},
    "frozenset": frozenset("ab"),
    "namespace": argparse.Namespace(lr=1e-4, out=pathlib.PurePosixPath("x")),
    "simple namespace": types.SimpleNamespace(a=1),
    "defaultdict": collections.defaultdict(list, {"loss": [1.0, 2.0]}),
    "counter": collections.Counter("abba"),
    "deque": collections.deque([1.0]),
    "date": datetime.datetime(2026, 1, 2),
    "complex": 1 + 2j,
    "slice": slice(1, 2),
    "omegaconf": Call("omegaconf.dictconfig", "DictConfig", (), {"_content": {"lr": 0.1}}),
    "own class": Call("__main__", "TrainConfig", (), {"lr": 0.1}),
    "generator": Call("torch", "Generator", ()),
    "sparse tensor": Call("torch._utils", "_rebuild_sparse_tensor", (1, 2)),
    "path as a key": {pathlib.PurePosixPath("a"): 1},
}


@pytest.mark.parametrize("kind", STRAYS)
def test_stray_values_do_not_keep_the_weights_from_being_read(tmp_path, kind):
    content = {"model": state(RAW), "extra": STRAYS[kind], "args": {"lr": 0.1, "stray": STRAYS[kind]}}
    found = read(tmp_path, content, which="model")
    assert same(one(found), RAW) and found.args["lr"] == 0.1
    if not isinstance(STRAYS[kind], np.generic):
        assert any("left out" in note for note in found.notes) and "stray" not in found.args


def test_numpy_scalars_and_arrays_are_numbers(tmp_path):
    content = {"epoch": np.int64(7), "args": {"noise_scale": np.float32(2.0), "P_mean": -0.8, "t_eps": np.float64(0.05)}}
    found = read(tmp_path, {"model": state(RAW), **content})
    assert (found.epoch, found.noise_scale, found.t_eps, found.prediction) == (7, 2.0, 0.05, "x")
    for array in (np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.array([1, 2], np.float16)):
        reduced = array.__reduce__()
        name = pth._Name("numpy._core.multiarray", "_reconstruct")
        call = Call(name.module, name.name, (pth._Name("numpy", "ndarray"), (0,), b"b"))
        dtype = Call("numpy", "dtype", (array.dtype.str[1:], False, True), (3, "<", None, None, None, -1, -1, 0))
        call.state = (1, array.shape, dtype, bool(reduced[2][3]), reduced[2][4])
        write_pth(tmp_path / "b.pth", {"a": call})
        with PthFile(tmp_path / "b.pth") as file:
            assert np.array_equal(file.content["a"].numpy(), array) and file.content["a"].dtype == array.dtype


def archive(path, pickled):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", pickled)
    return path


DEEP = 200_000
HOSTILE = {
    "system": Call("os", "system", ("touch executed",)),
    "posix": Call("posix", "system", ("touch executed",)),
    "eval": Call("builtins", "eval", ("open('executed', 'w')",)),
    "getattr": Call("builtins", "getattr", ({}, "keys")),
    "import": Call("importlib", "import_module", ("os",)),
    "popen": Call("subprocess", "Popen", (["touch", "executed"],)),
    "nested name": Call("pathlib", "Path.touch", ("executed",)),
    "torch function": Call("torch.storage", "_load_from_bytes", (b"",)),
    "numpy function": Call("numpy", "load", ("executed",)),
    "pickle in a pickle": Call("pickle", "loads", (b"N.",)),
    "function of a package": Call("setuptools", "setup", ()),
    "calls a value": b"\x80\x02K\x01)R.",
    "attributes of a list": b"\x80\x02]}X\x01\x00\x00\x00aK\x01sb.",
    "attributes of a dtype": b"\x80\x02ctorch\nFloatStorage\n}X\x01\x00\x00\x00aK\x01sb.",
    "key of many tuples": b"\x80\x02}N" + b"\x85" * DEEP + b"Ns.",
    "list of many lists": b"\x80\x02" + b"]" * DEEP + b"a" * (DEEP - 1) + b".",
    "memo of 32 GB": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "bytearray of 8 EB": b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.",
    "text of 2 GB": b"\x80\x02X\xff\xff\xff\x7f.",
    "an extension": b"\x80\x02\x82\x01.",
    "an old instance": b"\x80\x02(ios\nsystem\n.",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickles_are_refused_in_one_line(tmp_path, kind, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pickled = HOSTILE[kind]
    if isinstance(pickled, Call):
        write_pth("a.pth", {"model": state(RAW), "extra": pickled})
    else:
        archive("a.pth", pickled)
    assert cli.guarded(lambda: convert.main(["--from", "a.pth", "--to", "run"])) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.pth"]


def test_a_pickle_of_billions_of_dictionaries_is_refused(tmp_path):
    many = {"last": 1}
    for _ in range(12):
        many = dict.fromkeys("abcdefghijklmnopqrst", many)  # one object twenty times
    for where in ("extra", "ema"):
        with pytest.raises(UserError, match="more than 10000 dictionaries"):
            read(tmp_path, {"model": state(RAW), where: many})


# ---------------------------------------------------------------- names


def wrap_blocks(name):
    return name.replace("blocks.0.", "blocks.0._orig_mod.").replace("blocks.1.", "blocks.1.module._checkpoint_wrapped_module.")


PREFIXES = {
    "none": lambda name: name.removeprefix("net."),
    "DDP": lambda name: f"module.{name}",
    "compiled inside DDP": lambda name: f"module._orig_mod.{name}",
    "DDP inside compiled, twice": lambda name: f"_orig_mod.module._orig_mod.{name}",
    "compiled network": lambda name: name.replace("net.", "net._orig_mod."),
    "compiled blocks": wrap_blocks,
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name}",
    "wrapper of Diffusers": lambda name: name.replace("net.", "transformer.transformer."),
    "model in a model": lambda name: f"model.diffusion.{name}",
}


@pytest.mark.parametrize("kind", PREFIXES)
def test_prefixes_anywhere_are_dropped(tmp_path, kind):
    sets = {"model": mapped(state(RAW), PREFIXES[kind]), "model_ema1": mapped(state(EMA), PREFIXES[kind])}
    found = read(tmp_path, sets)
    assert same(found.sets["model"], RAW) and same(found.sets["model_ema1"], EMA)
    flat = read(tmp_path, mapped(state(RAW), PREFIXES[kind]), "b.ckpt")
    assert same(flat.sets["model"], RAW)
    safetensors.numpy.save_file(mapped(state(RAW), PREFIXES[kind]), tmp_path / "c.safetensors")
    assert same(one(read_weights(tmp_path / "c.safetensors", context_start=1)), RAW)


EMAS = {
    "ema": {"model": state(RAW), "ema": state(EMA)},
    "model_ema": {"model": state(RAW), "model_ema": state(EMA)},
    "ema_model": {"model": state(RAW), "ema_model": state(EMA, "module.net.")},
    "EMA": {"model": state(RAW), "EMA": state(EMA)},
    "shadow": {"model": state(RAW), "ema": {"shadow": state(EMA), "decay": 0.9999}},
    "Lightning": {"state_dict": {**state(RAW, "net."), **state(EMA, "ema_net.")}},
    "ema_pytorch": {"ema": {**state(RAW, "online_model.net."), **state(EMA, "ema_model.net."), "step": np.array(3)}},
    "LitEma": {"state_dict": {**state(RAW), **mapped(state(EMA, ""), lambda n: "model_ema." + n.replace(".", ""))}},
    "swa_utils": {"model": state(RAW), "averaged": {"n_averaged": np.array(3), **state(EMA, "module.net.")}},
    "list": {"model": state(RAW), "ema": list(state(EMA).values())},
    "list without positions": {"model": state(RAW), "ema_params1": [v for k, v in state(EMA).items() if "pos_embed" not in k]},
    "Diffusers": {"model": state(RAW), "ema": {"decay": 0.9999, "shadow_params": list(state(EMA).values())}},
    "one for each decay": {"model": state(RAW), "ema": {0.9999: state(EMA)}},
    "a list of one": {"model": state(RAW), "ema": [state(EMA)]},
    "callback": {"state_dict": state(RAW), "callbacks": {"EMA": {"ema_state_dict": state(EMA)}}},
    "Polyak": {"model": state(RAW), "polyak": state(EMA)},
    "camel case": {"model": state(RAW), "modelEma": state(EMA)},
    "one level down": {"state": {"model": state(RAW), "ema": state(EMA)}, "step": 3},
}


@pytest.mark.parametrize("kind", EMAS)
def test_an_ema_is_found_under_any_name_and_never_replaced(tmp_path, kind):
    found = read(tmp_path, EMAS[kind])
    assert list(found.sets) == ["model", "model_ema1"] and found.decays == (0.9999,)
    assert same(found.sets["model"], RAW) and same(found.sets["model_ema1"], EMA)
    for which, wanted in (("model", RAW), ("model_ema1", EMA), ("ema", EMA), ("0.9999", EMA)):
        assert same(one(read_weights(tmp_path / "a.pth", which=which, context_start=1)), wanted)
    for which in ("model_ema2", "0.999", "best"):
        with pytest.raises(UserError, match=f"which='{which}' is not in the file: use one of model.*, model_ema1"):
            read_weights(tmp_path / "a.pth", which=which, context_start=1)


def test_decays_come_from_names_arguments_and_neighbours(tmp_path):
    three = {"model": state(RAW), "ema_0.9999": state(EMA), "ema_0.99995": state(EMA2)}
    assert read(tmp_path, three).decays == (0.9999, 0.99995)
    assert same(one(read(tmp_path, three, which="0.99995")), EMA2)
    two = {"model": state(RAW), "model_ema2": state(EMA2), "model_ema1": state(EMA)}
    found = read(tmp_path, {**two, "args": {"ema_decay1": 0.9, "ema_decay2": 0.5}})
    assert found.decays == (0.9, 0.5) and same(found.sets["model_ema1"], EMA)
    assert read(tmp_path, {**two, "args": {"ema_decay1": 1.0, "ema_decay2": 0.0}}).decays == (1.0, 0.0)
    assert read(tmp_path, {"model": state(RAW), "ema": state(EMA), "args": {"ema_decay": 0.99}}).decays == (0.99,)
    assert read(tmp_path, {"model": state(RAW), "ema": state(EMA), "args": {"ema": 1}}).decays == (0.9999,)  # a switch
    decay = np.array(0.999, np.float32)  # a tensor, as a buffer of the EMA
    assert read(tmp_path, {"model": state(RAW), "ema": {**state(EMA), "decay": decay}}, which="0.999").decays == (0.999,)
    assert any("0.9999 is assumed" in note for note in read(tmp_path, {"model": state(RAW), "ema": state(EMA)}).notes)


def test_a_file_with_one_set_has_no_choice_and_says_so(tmp_path):
    for content in ({"model": state(RAW)}, state(RAW, ""), {"state_dict": state(RAW)}, {"model": state(RAW), "ema": None}):
        found = read(tmp_path, content, which="model_ema1")
        assert same(one(found), RAW) and any("one set of weights" in note for note in found.notes)
    assert any("ema is None" in note for note in found.notes)
    with pytest.raises(UserError, match="which='best' is not in the file"):
        read(tmp_path, {"model": state(RAW)}, which="best")


def lacking(values, part, prefix="net."):
    return {name: value for name, value in state(values, prefix).items() if part not in name}


UNREAD = {  # content beside "model", and what the error names
    "a list that is short": ({"ema": list(state(EMA).values())[:-3]}, "not read: ema"),
    "a list of something else": ({"ema": [np.zeros(3, np.float32)] * 20}, "not read: ema"),
    "an object": ({"ema": Call("__main__", "EMA", (), {"decay": 0.9})}, "not read: ema"),
    "no embedding": ({"ema": lacking(EMA, "proj1")}, "not read: ema"),
    "no embedding, in the model's dictionary": ({"model": {**state(RAW), **lacking(EMA, "proj1", "ema.")}}, "not read: ema"),
    "by number": ({"ema": {str(k): value for k, value in enumerate(state(EMA).values())}}, "not read: ema"),
    "inside an optimizer": ({"optimizer": {"ema_params": list(state(EMA).values())}}, "not read: optimizer.ema_params"),
    "a second model": ({"teacher": state(EMA)}, "not read: teacher"),
    "a second model under a name that is not read": ({"optimal": state(EMA)}, "not read: optimal"),
    "a second model, not an EMA by its name": ({"cinema": state(EMA)}, "not read: cinema"),
    "too few blocks": ({"ema": lacking(EMA, "blocks.1.")}, "model_ema1 is not complete: model also has"),
}


@pytest.mark.parametrize("kind", UNREAD)
def test_no_other_set_stands_in_for_an_ema_that_cannot_be_read(tmp_path, kind):
    content, message = UNREAD[kind]
    with pytest.raises(UserError, match=message):
        read(tmp_path, {"model": state(RAW), **content}, which="model_ema1")
    assert same(one(read(tmp_path, {"model": state(RAW), **content}, which="model")), RAW)


def test_a_network_under_a_name_that_is_not_read_is_noted(tmp_path):
    content = {
        "model": state(RAW),
        "schedule_free": {"z": state(EMA)},
        "optimizer": {"state": {0: {"exp_avg": next(iter(state(RAW).values()))}}},
        "optim_by_name": {"exp_avg": state(RAW), "exp_avg_sq": state(RAW)},
    }
    noted = [note for note in read(tmp_path, content).notes if "whole network" in note]
    assert noted == ["left out: schedule_free, a whole network: what begins with 'sched' is not read as weights"]


def test_another_model_is_read_under_the_file_s_own_name(tmp_path):
    content = {"model": state(RAW), "best_model": state(EMA2), "ema": state(EMA)}
    for which, wanted in (("best_model", EMA2), ("model", RAW), ("ema", EMA)):
        assert same(one(read(tmp_path, content, which=which)), wanted)
    assert same(one(read(tmp_path, [state(RAW), state(EMA)], which="1")), EMA)


def test_what_lies_beside_the_weights_of_a_folder_is_no_other_set(tmp_path):
    bare = state(RAW, "")
    for number, beside in enumerate(("ema.safetensors", "pytorch_model_ema.bin", "transformer_ema/model.safetensors")):
        folder = tmp_path / str(number)
        (folder / beside).parent.mkdir(parents=True)
        safetensors.numpy.save_file(bare, folder / "model.safetensors")
        safetensors.numpy.save_file(state(EMA, ""), folder / beside)
        name = beside.partition("/")[0]
        with pytest.raises(UserError, match=f"which='model_ema1' is not in the file.*not read: {name}"):
            read_weights(folder, which="model_ema1", context_start=1)
        found = read_weights(folder, which="model", context_start=1)
        assert same(one(found), RAW) and any(f"not read: {name}" in note for note in found.notes)
    (folder / "optimizer.bin").write_bytes(b"")
    safetensors.numpy.save_file(bare, folder / "pytorch_model.bin")  # the same weights once more
    (folder / "transformer_ema/model.safetensors").unlink()
    assert same(one(read_weights(folder, which="model_ema1", context_start=1)), RAW)


# ---------------------------------------------------------------- constants, buffers, types


def without_positions(values, prefix="net."):
    return {k: v for k, v in state(values, prefix).items() if "pos_embed" not in k}


def test_missing_positions_are_filled_in_with_a_note(tmp_path):
    found = read(tmp_path, {"model": without_positions(RAW), "args": {"img_size": 16}})
    assert found.geometry == G and any("no pos_embed" in note for note in found.notes)
    found = read(tmp_path, {"model": {**without_positions(RAW), "net.pos_embed": None}, "model_ema1": state(EMA)})
    assert found.geometry == G and same(found.sets["model"], RAW)
    found = read(tmp_path, {"model": without_positions(RAW)})
    assert found.geometry.image_size == 64 and any("64 is assumed" in note for note in found.notes)


def test_buffers_and_what_is_outside_are_left_out_and_what_is_inside_is_refused(tmp_path):
    zeros = np.zeros((16, 8), np.float32)
    for extra in ("net.feat_rope.freqs_cos", "net.blocks.0.attn.rope.freqs_sin", "net.rope.inv_freq"):
        found = read(tmp_path, {"model": {**state(RAW), extra: zeros}})
        assert same(one(found), RAW) and any("left out: 1 entries" in note for note in found.notes)
    found = read(tmp_path, {"model": {**state(RAW), "net.num_batches_tracked": np.array(7), "repa.0.weight": zeros}})
    assert same(one(found), RAW) and any("repa.0.weight" in note for note in found.notes)
    scale = {"net.blocks.0.attn.logit_scale": np.array(1.5, np.float32)}  # one number, but learned
    with pytest.raises(UserError, match="unknown 1 entries .blocks.0.attn.logit_scale"):
        read(tmp_path, {"model": state(RAW) | scale})
    for extra in ("net.head.weight", "net.blocks.0.attn.bias_table", "net.final_layer.scale"):
        with pytest.raises(UserError, match=f"a.pth: not the weights of a JiT.*unknown 1 entries .{extra[4:]}"):
            read(tmp_path, {"model": {**state(RAW), extra: zeros}})


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("back", [False, True])
def test_half_precision_files_positions_included(tmp_path, dtype, back):
    cast = {k: v.astype(dtype).astype(np.float32) if back else v.astype(dtype) for k, v in state(RAW).items()}
    wanted = {k: v.astype(dtype).astype(np.float32) for k, v in RAW.items()}
    safetensors.numpy.save_file(cast, tmp_path / "b.safetensors")
    for found in (read(tmp_path, {"model": cast}), read_weights(tmp_path / "b.safetensors", context_start=1)):
        assert same(one(found), wanted) and found.geometry == G
        assert any(f"fixed table rounded to {np.dtype(dtype)}" in note for note in found.notes)


def test_a_drifted_table_of_an_ema_may_be_rounded_too_but_not_learned(tmp_path):
    drifted = state(RAW)["net.pos_embed"] * np.float32(1 - 4e-4)
    found = read(tmp_path, {"model": {**state(RAW), "net.pos_embed": drifted.astype(ml_dtypes.bfloat16)}})
    assert same(one(found), RAW)
    learned = state(RAW)["net.pos_embed"] + np.float32(0.01)
    with pytest.raises(UserError, match="pos_embed differs from the fixed sin-cos table"):
        read(tmp_path, {"model": {**state(RAW), "net.pos_embed": learned}})


def test_values_that_are_not_finite_or_not_floats_are_refused(tmp_path):
    for bad in (np.nan, np.inf):
        tensors = {**state(RAW), "net.blocks.1.mlp.w3.bias": np.array([0] * 31 + [bad], np.float32)}
        with pytest.raises(UserError, match="not finite in 1 entries .blocks.1.mlp.w3.bias"):
            read(tmp_path, {"model": tensors})
    tensors = {k: v.astype(np.int8) if "qkv" in k else v for k, v in state(RAW).items()}
    with pytest.raises(UserError, match="qkv.weight int8.*only float32"):
        read(tmp_path, {"model": tensors})


def test_what_looks_off_is_noted(tmp_path):
    zero = {k: v * 0 if "final_layer.linear" in k else v for k, v in state(RAW).items()}
    assert any("untrained" in note for note in read(tmp_path, {"model": zero}).notes)
    large = {k: v * 1000 if "q_norm" in k else v for k, v in state(RAW).items()}
    assert any("usually near 1" in note for note in read(tmp_path, {"model": large}).notes)
    assert any("equals model" in note for note in read(tmp_path, {"model": state(RAW), "ema": state(RAW)}).notes)
    assert not read(tmp_path, {"model": state(RAW), "model_ema1": state(EMA)}).notes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bottleneck": 64}, "bottleneck 64 (published 128)"),
        ({"heads": 16}, "heads 16 (published 12)"),
        ({"mlp_ratio": 3.0}, "mlp_hidden 1536 (published 2048)"),
        ({"context_length": 16}, "context_length 16 (published 32)"),
        ({}, ""),
    ],
)
def test_a_published_size_with_other_shapes_is_noted(change, said):
    found = weights.Weights(dataclasses.replace(make_geometry("JiT-B/16", 256, 1000), **change), {})
    weights._check_values(found, "a.pth")
    assert found.notes == ([f"depth and width are JiT-B's, but not {said}"] if said else [])


# ---------------------------------------------------------------- endings and folders


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.pth.tar", "a.ckpt", "a.bin", "a.PTH", "a.Pt", "checkpoint"])
def test_any_ending(tmp_path, name):
    assert same(one(read(tmp_path, state(RAW), name)), RAW)
    if "." in name:
        assert convert.format_of(name) == "pth"


def test_folders_of_a_hub(tmp_path):
    bare, half = state(RAW, ""), len(state(RAW)) // 2
    parts = [dict(list(bare.items())[:half]), dict(list(bare.items())[half:])]
    for name in (
        "model.safetensors",
        "diffusion_pytorch_model.safetensors",
        "transformer/model.safetensors",
        "ema.safetensors",
    ):
        file = tmp_path / name.replace("/", "_").replace(".", "_") / name
        file.parent.mkdir(parents=True)
        safetensors.numpy.save_file(bare, file)
        assert same(one(read_weights(file.parent.parent if "/" in name else file.parent, context_start=1)), RAW)
    sharded = tmp_path / "checkpoints" / "sharded"  # a folder called checkpoints need not be a run of ours
    sharded.mkdir(parents=True)
    weight_map = {}
    for i, part in enumerate(parts, 1):
        safetensors.numpy.save_file(part, sharded / f"model-0000{i}-of-00002.safetensors")
        weight_map |= dict.fromkeys(part, f"model-0000{i}-of-00002.safetensors")
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same(one(read_weights(sharded, context_start=1)), RAW)
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="1 entries .model-00002.* of 2 files are missing"):
        read_weights(sharded)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(UserError, match="names of files in the same folder"):
        read_weights(sharded)


def test_folders_that_leave_a_choice_or_none_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="expected model.safetensors.*found no file of weights"):
        read_weights(tmp_path)
    for name in ("JiT-B-16", "JiT-B-32"):
        (tmp_path / name / "transformer").mkdir(parents=True)
    with pytest.raises(UserError, match="give one of its folders JiT-B-16, JiT-B-32"):
        read_weights(tmp_path)
    for name in ("x.pth", "y.pth"):
        write_pth(tmp_path / name, state(RAW))
    with pytest.raises(UserError, match="2 files of weights .x.pth, y.pth"):
        read_weights(tmp_path)
    (tmp_path / "z.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match="Git LFS pointer"):
        read_weights(tmp_path / "z.safetensors")
    with pytest.raises(UserError, match="No such file"):
        read_weights(tmp_path / "missing.safetensors")


# ---------------------------------------------------------------- Diffusers


def test_diffusers_folder_there_and_back(tmp_path):
    facts = {"prediction": "x", "noise_scale": 2.0, "t_eps": 0.05, "class_names": ["cat", "dog", "Käfer"]}
    diffusers.write_folder(tmp_path / "out", EMA, G, facts=facts)
    for path in ("out", "out/transformer", "out/transformer/diffusion_pytorch_model.safetensors"):
        found = read_weights(tmp_path / path)
        assert same(one(found), EMA) and found.geometry == G and not found.notes
        assert found.facts == {**facts, "class_names": tuple(facts["class_names"])}
    assert json.loads((tmp_path / "out/model_index.json").read_text())["id2label"]["2"] == "Käfer"
    with pytest.raises(UserError, match="is not an empty folder"):
        diffusers.write_folder(tmp_path / "out", EMA, G)


def test_names_of_the_class_in_diffusers():
    """Names and shapes that JiTTransformer2DModel of pull request 13098 has for these numbers, read off its source."""
    w, names = G.width, {name: value.shape for name, value in diffusers.to_state_dict(RAW, G).items()}
    linear = {
        "t_embedder.mlp.0": (w, 256), "t_embedder.mlp.2": (w, w), "linear_final": (48, w), "adaLN_modulation_final": (2 * w, w)
    }  # fmt: skip
    wanted = {
        "pos_embed": (1, 16, w), "in_context_posemb": (1, 2, w), "y_embedder.embedding_table.weight": (4, w),
        "x_embedder.proj1.weight": (8, 3, 4, 4), "x_embedder.proj2.weight": (w, 8, 1, 1), "x_embedder.proj2.bias": (w,),
        "norm_final.weight": (w,),
    }  # fmt: skip
    for i in range(2):
        block = f"blocks.{i}."
        linear |= {f"{block}attn.{part}": (w, w) for part in ("to_q", "to_k", "to_v", "to_out.0")}
        linear |= {
            f"{block}mlp.w12": (2 * G.mlp_hidden, w),
            f"{block}mlp.w3": (w, G.mlp_hidden),
            f"{block}adaLN_modulation": (6 * w, w),
        }
        wanted |= {f"{block}norm1.weight": (w,), f"{block}norm2.weight": (w,)}
        wanted |= {f"{block}attn.norm_{part}.weight": (G.head_dim,) for part in "qk"}
    for name, shape in linear.items():
        wanted |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    assert names == wanted


def fused(tensors):
    """The class's earlier state, which the hub folder follows: q, k and v joined, the official names of attention."""
    result = {k: v for k, v in tensors.items() if ".attn." not in k}
    return result | {k: v for k, v in state(EMA, "").items() if ".attn." in k}


CONFIG = dict(
    sample_size=16, patch_size=4, in_channels=3, hidden_size=32, num_layers=2, num_attention_heads=2, mlp_ratio=4.0,
    attention_dropout=0.0, dropout=0.0, num_classes=3, bottleneck_dim=8, in_context_len=2, in_context_start=1, norm_eps=1e-6,
)  # fmt: skip


def hub(folder, tensors, config):
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_other_states_of_the_diffusers_class_are_read(tmp_path):
    apart = diffusers.to_state_dict(EMA, G)
    no_table = {k: v for k, v in apart.items() if k != "pos_embed"}
    old = mapped(state(EMA, ""), lambda name: "transformer." + name)  # around the official network
    preset = {"_class_name": "JiTTransformer2DModel", "model_type": "JiT-custom/4", "sample_size": 16, "num_class_embeds": 3}
    for number, (tensors, config) in enumerate(((fused(apart), CONFIG), (no_table, CONFIG), (apart, CONFIG), (old, preset))):
        found = read_weights(hub(tmp_path / str(number), tensors, config), context_start=1)
        assert same(one(found), EMA) and found.geometry == G and found.prediction == "x", number
    two = {k: v for k, v in apart.items() if "blocks.1.attn.to_v" not in k}
    with pytest.raises(UserError, match="not made of one q, one k and one v"):
        read_weights(hub(tmp_path / "two", two, CONFIG))


def test_a_config_json_that_does_not_fit_is_refused(tmp_path):
    tensors = diffusers.to_state_dict(EMA, G)
    for number, (change, message) in enumerate((
        ({"hidden_size": 64}, "width is 64, the tensors' 32"),
        ({"num_classes": 1000}, "num_classes is 1000, the tensors' 3"),
        ({"norm_eps": 1e-5}, "norm_eps=1e-05: a JiT here has 1e-06"),
        ({"in_channels": 4}, "in_channels=4"),
    )):  # fmt: skip
        with pytest.raises(UserError, match=message):
            read_weights(hub(tmp_path / str(number), tensors, CONFIG | change))


# ---------------------------------------------------------------- what a model knows of itself


@pytest.mark.parametrize("prediction", ["x", "epsilon", "v"])
def test_safetensors_keep_what_is_known(tmp_path, prediction):
    facts = {"prediction": prediction, "noise_scale": 4.0, "t_eps": 0.02, "class_names": ("a", "b", "ü")}
    write_safetensors(tmp_path / "a.safetensors", EMA, G, facts)
    found = read_weights(tmp_path / "a.safetensors")
    assert same(one(found), EMA) and found.geometry == G and found.facts == facts and not found.notes
    write_safetensors(tmp_path / "b.safetensors", EMA, G)
    assert read_weights(tmp_path / "b.safetensors").facts == {}


def test_an_exported_folder_keeps_every_set(tmp_path):
    facts = {"prediction": "v", "noise_scale": 1.0, "t_eps": 0.05, "class_names": ("a", "b", "c")}
    write_folder(tmp_path / "out", {"model": RAW, "0.9999": EMA, "0.5": EMA2}, G, facts)
    found = read_weights(tmp_path / "out")
    assert found.decays == (0.9999, 0.5) and found.geometry == G and found.facts == facts and not found.notes
    assert [same(found.sets[n], p) for n, p in (("model", RAW), ("model_ema1", EMA), ("model_ema2", EMA2))] == [True] * 3
    assert same(one(read_weights(tmp_path / "out", which="0.5")), EMA2)
    config = tmp_path / "out" / "config.json"
    config.write_text(config.read_text().replace('"b"', '"bee"'))  # class names may be corrected there
    found = read_weights(tmp_path / "out")
    assert found.class_names == ("a", "bee", "c") and any("config.json's is used" in note for note in found.notes)
    with pytest.raises(UserError, match="called 'model' or by its decay"):
        write_folder(tmp_path / "other", {"best": RAW}, G)


def test_an_exported_folder_keeps_every_decay_that_a_run_may_have(tmp_path):
    names = settings.Optimizer(ema_decays=(1.0, 1e-5, 0.0), power_emas=(1e-6, 0.1)).emas
    write_folder(tmp_path / "out", {"model": RAW, **{name: params(i + 2) for i, name in enumerate(names)}}, G)
    found = read_weights(tmp_path / "out")
    assert tuple(map(str, found.decays)) == names and not found.notes
    assert all(same(found.sets[f"model_ema{i + 1}"], params(i + 2)) for i in range(len(names)))


def test_an_unconditional_model_becomes_a_workdir(tmp_path):
    g = dataclasses.replace(G, num_classes=0)
    write_safetensors(tmp_path / "a.safetensors", params(1, g), g)
    convert.main(["--from", str(tmp_path / "a.safetensors"), "--to", str(tmp_path / "run")])
    found = read_weights(tmp_path / "run")
    assert same(found.sets["model"], params(1, g)) and found.geometry == g


def run_of(workdir, emas, **overrides):
    """A workdir of ours with these EMAs."""
    import jax

    config = small_settings(data__image_size=16, **overrides)
    device, ema = jax.tree.map(jax.numpy.asarray, (RAW, emas))
    saved = saving.Checkpoints(workdir)
    meta = checkpoint.describe(G, ema, config=settings.to_dict(config), class_names=["a", "b", "c"])
    saved.save(step.fresh_state(device, ema, config.optim, config.dtype), 5, meta)
    saved.close()
    return workdir


@pytest.fixture(scope="module")
def epsilon_run(tmp_path_factory):
    """A workdir whose network predicts the noise."""
    how = dict(prediction="epsilon", diffusion__noise_scale=2.0, preview__t_eps=0.02, optim__ema_decays=(0.9,))
    return run_of(tmp_path_factory.mktemp("epsilon") / "run", {"0.9": EMA}, **how)


def test_an_ema_of_a_power_function_is_written_where_one_set_is(tmp_path, capsys):
    emas = dict(optim__ema_decays=(0.9,), optim__power_emas=(0.1,))
    run = run_of(tmp_path / "run", {"power:0.1": EMA2, "0.9": EMA}, **emas)
    for target, *options in (["a.safetensors"], ["diffusers", "--format", "diffusers"]):
        convert.main(["--from", str(run), "--to", str(tmp_path / target), *options, "--which", "power:0.1"])
        assert same(one(read_weights(tmp_path / target)), EMA2)
    capsys.readouterr()
    convert.main(["--from", str(run), "--to", str(tmp_path / "b.safetensors")])
    said = "written is model_ema1 (0.9); not written: model, model_ema2 (power:0.1), optimizer state"
    assert same(one(read_weights(tmp_path / "b.safetensors")), EMA) and said in capsys.readouterr().out
    convert.main(["--from", str(run), "--to", str(tmp_path / "a.pth")])
    assert "power-function EMAs have no place in other formats: power:0.1 left out" in capsys.readouterr().out
    found = read_weights(tmp_path / "a.pth", context_start=1)
    assert same(found.sets["model_ema1"], EMA) and found.decays[0] == 0.9


def test_an_epsilon_run_is_not_written_as_what_others_sample_as_x(tmp_path, epsilon_run):
    for target in ("a.pth", "a.ckpt"):
        with pytest.raises(UserError, match="predicts epsilon.*samples it as a prediction of x: write a .safetensors"):
            convert.main(["--from", str(epsilon_run), "--to", str(tmp_path / target)])
    with pytest.raises(UserError, match="predicts epsilon"):
        convert.main(["--from", str(epsilon_run), "--to", str(tmp_path / "folder"), "--format", "diffusers"])
    assert not list(tmp_path.iterdir())
    convert.main(["--from", str(epsilon_run), "--to", str(tmp_path / "a.safetensors")])
    with pytest.raises(UserError, match="predicts epsilon"):
        convert.main(["--from", str(tmp_path / "a.safetensors"), "--to", str(tmp_path / "b.pth")])
    convert.main(["--from", str(tmp_path / "a.safetensors"), "--to", str(tmp_path / "again")])
    first, again = read_weights(epsilon_run), read_weights(tmp_path / "again")
    assert first.facts == again.facts and again.prediction == "epsilon" and again.noise_scale == 2.0
    assert same(again.sets["model"], first.sets["model_ema1"]) and same(first.sets["model_ema1"], EMA)


def test_a_workdir_is_read_like_a_file(epsilon_run):
    for which, wanted in (("model", RAW), ("params", RAW), ("model_ema1", EMA), ("0.9", EMA), ("ema", EMA)):
        assert same(one(read_weights(epsilon_run, which=which)), wanted)
    with pytest.raises(UserError, match="which='model_ema2' is not in the file: use one of model, model_ema1"):
        read_weights(epsilon_run, which="model_ema2")
    assert read_weights(epsilon_run / "checkpoints" / "5").step == 5
    with pytest.raises(UserError, match="--context_start=2: .* is a workdir, which records where.*leave --context_start out"):
        convert.main(["--from", str(epsilon_run), "--to", "x.safetensors", "--context_start", "2"])


def test_folders_called_best_are_those_folders(tmp_path, epsilon_run):
    from jitjax import pipeline

    run = shutil.copytree(epsilon_run, tmp_path / "runs" / "best")
    assert same(pipeline.load(run).weights["model"], RAW)
    write_folder(tmp_path / "best", {"model": EMA}, G, {"prediction": "x", "noise_scale": 1.0})
    assert same(pipeline.load(tmp_path / "best").weights["model"], EMA)


def test_converting_both_ways_to_diffusers_is_exact(tmp_path):
    args = {"P_mean": -0.8, "noise_scale": 1.0, "t_eps": 0.05, "img_size": 16, "class_num": 3}
    write_pth(tmp_path / "a.pth", {"model": state(RAW), "model_ema1": state(EMA), "args": args})
    common = ["--from", str(tmp_path / "a.pth"), "--context_start", "1"]
    convert.main([*common, "--to", str(tmp_path / "d"), "--format", "diffusers"])
    convert.main(["--from", str(tmp_path / "d"), "--to", str(tmp_path / "b.pth")])
    with PthFile(tmp_path / "b.pth") as file:
        back = {k: v.numpy() for k, v in file.content["model"].items()}
        assert all(np.array_equal(back[k], v) for k, v in state(EMA).items()) and list(back) == list(state(EMA))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "x.pth", "--which", "model"], "a pth holds every set"),
        (["--to", "no/such/folder/x.pth"], "--to=no/such/folder/x.pth: there is no folder .*: make it"),
        (["--from", "missing.pth", "--to", "x"], "no such file or folder"),
        (["--to", "x.safetensors", "--which", "best"], "which='best' is not in the file"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_pth("a.pth", {"model": state(RAW), "model_ema1": state(EMA)})
    with pytest.raises(UserError, match=message):
        convert.main(["--from", "a.pth", *arguments])
    assert [f.name for f in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.parametrize("flags", [["x.pth"], ["x.safetensors"], ["x"], ["x", "--format=diffusers"], ["x", "--format=folder"]])
@pytest.mark.parametrize("where", ["/proc", "full"])
def test_a_target_that_cannot_be_written_is_named_with_its_flag(tmp_path, monkeypatch, small_disk, where, flags):
    monkeypatch.chdir(tmp_path)
    write_pth("a.pth", {"model": state(RAW), "model_ema1": state(EMA)})
    small_disk.fill()
    target = pathlib.Path("/proc" if where == "/proc" else small_disk.folder, flags[0])
    with pytest.raises(UserError, match=rf"^--to={target}: .*(cannot be written|no space left)"):
        convert.main(["--from", "a.pth", "--to", str(target), *flags[1:]])


@pytest.mark.parametrize(("text", "prediction"), [("velocity", "v"), ("epsilon", "epsilon"), ("flow", None)])
def test_the_prediction_type_may_stand_in_config_json_or_args(tmp_path, text, prediction):
    folder = hub(tmp_path / "d", state(RAW, ""), {"prediction_type": text})
    write_pth(tmp_path / "a.pth", {"model": state(RAW), "args": {"prediction": text}})
    for path in (folder, tmp_path / "a.pth"):
        found = read_weights(path, context_start=1)
        assert found.prediction == prediction and any("is none of x" in note for note in found.notes) == (prediction is None)


def test_a_description_that_cannot_be_used_is_noted_or_refused(tmp_path):
    folder = hub(tmp_path / "d", state(RAW, ""), {})
    for text, message in (
        ('{"a":', "cannot be read as JSON"),
        ('{"in_context_start": 99}', "context_start=99: must lie in"),
        ('{"format": "jitjax", "facts": {"prediction": "score"}}', "prediction='score': expected one of x"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read_weights(folder)
    for facts in ({"noise_scale": "2"}, {"t_eps": -1}, {"sample_t_eps": "a"}, {"class_conditional": "no"},
                  {"class_names": ["a"]}, {"class_names": 3}):  # fmt: skip
        (folder / "config.json").write_text(json.dumps({"format": "jitjax", "facts": facts}))
        found = read_weights(folder, context_start=1)
        assert found.facts == {} and any("left out" in note for note in found.notes)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("geometry", '{"depth": 2', "its metadata is damaged: geometry is no JSON .*; write the file again"),
        ("geometry", "[2]", "its metadata is damaged: geometry is not an object; write"),
        ("geometry", '{"context_start": "1"}', "its metadata gives context_start='1': expected a whole number"),
        ("geometry", '{"mlp_ratio": null}', "its metadata gives mlp_ratio=None: expected a number"),
        ("facts", "prediction=v", "its metadata is damaged: facts is no JSON"),
        ("facts", "null", "its metadata is damaged: facts is not an object"),
        ("sets", '"model"', "its metadata is damaged: sets is not a list"),
    ],
)
def test_metadata_of_ours_that_is_damaged_is_refused(tmp_path, key, text, message):
    write_safetensors(tmp_path / "ours.safetensors", EMA, G, {"prediction": "v"})
    with safetensors.safe_open(tmp_path / "ours.safetensors", "numpy") as file:
        metadata = file.metadata() | {key: text}
    safetensors.numpy.save_file(state(EMA), tmp_path / "a.safetensors", metadata)
    with pytest.raises(UserError, match=f"a.safetensors: {message}"):
        read_weights(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "metadata", [{"geometry": "spherical"}, {"facts": "[]"}, {"sets": "train+val"}, {"geometry": "[" * 10**5}]
)
def test_metadata_of_others_with_words_of_ours_is_left_out(tmp_path, metadata):
    safetensors.numpy.save_file(state(EMA), tmp_path / "a.safetensors", {"format": "pt"} | metadata)
    assert read_weights(tmp_path / "a.safetensors", context_start=G.context_start).geometry == G


def test_the_first_bytes_decide_not_the_ending(tmp_path):
    safetensors.numpy.save_file(state(RAW), tmp_path / "a.pth")
    write_pth(tmp_path / "b.safetensors", state(RAW))
    for name in ("a.pth", "b.safetensors"):
        assert same(one(read_weights(tmp_path / name, context_start=1)), RAW)


def test_a_run_starts_from_every_form(tmp_path):
    """--config.init_from: the model's weights and, where the form holds one, the EMA of the same decay."""
    import jax

    from jitjax import pipeline, transfer

    facts = {"prediction": "x", "noise_scale": 1.0}
    forms = {
        "official.pth": {"model": state(RAW), "model_ema1": state(EMA), "model_ema2": state(EMA2)},
        "wrapped.pth.tar": {"model": state(RAW, "module._orig_mod.net."), "ema": list(state(EMA).values())},
        "strays.ckpt": {"state_dict": {**state(RAW), **state(EMA, "ema_net.")}, "best": np.float64(3), "path": STRAYS["path"]},
    }
    for name, content in forms.items():
        write_pth(tmp_path / name, content)
    safetensors.numpy.save_file(state(RAW, ""), tmp_path / "hub.safetensors")
    write_safetensors(tmp_path / "ours.safetensors", RAW, G, facts)
    hub(tmp_path / "hub", state(RAW, ""), CONFIG)
    diffusers.write_folder(tmp_path / "diffusers", RAW, G, facts=facts)
    write_folder(tmp_path / "exported", {"model": RAW, "0.9999": EMA}, G, facts)
    for path in sorted(tmp_path.iterdir()):
        found = pipeline.load(path).weights
        assert same(found["model"], RAW), path
        assert ("0.9999" in found) == (path.name in {*forms, "exported"}) and same(found.get("0.9999", EMA), EMA), path
    config = small_settings(data__image_size=16, optim__ema_decays=(0.9999, 0.5))
    fresh = step.init_state(G, config.optim, config.dtype, jax.random.key(0))
    process = pipeline.load(tmp_path / "wrapped.pth.tar").diffusion
    other = dataclasses.replace(G, image_size=32, context_start=1)
    begun, report = transfer.initialise_from(
        str(tmp_path / "wrapped.pth.tar"), fresh, other, process, (), config.optim, config.dtype
    )
    assert report.notes[:2] == ["trained at 16 pixels, now at 32", "context tokens began at block 0, now at block 1"]
    assert same(begun.params, RAW) and same(begun.ema["0.9999"], EMA) and same(begun.ema["0.5"], RAW)
    assert report.fresh == ["EMA 0.5 (from the weights)"]
