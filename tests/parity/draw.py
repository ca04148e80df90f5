"""How these files were drawn from the large reference files (see README.md): `python tests/parity/draw.py LARGE_FOLDER`."""

from __future__ import annotations

import io
import json
import lzma
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
SMALL_ENOUGH = 512  # values of an array that is stored whole
PERIOD = 251  # values of a tensor of the thinned checkpoint
PHOTOGRAPHS = [  # colour and grey; wide, high and square; enlarged and reduced to 256 px
    "caltech__BACKGROUND_Google__image_0003.jpg",
    "caltech__BACKGROUND_Google__image_0031.jpg",
    "caltech__BACKGROUND_Google__image_0056.jpg",
    "caltech__Faces__image_0261.jpg",
    "caltech__Motorbikes__image_0512.jpg",
    "caltech__airplanes__image_0433.jpg",
    "caltech__bass__image_0035.jpg",
    "caltech__flamingo__image_0002.jpg",
    "caltech__minaret__image_0054.jpg",
    "caltech__scissors__image_0003.jpg",
]


def save(name: str, arrays: dict[str, np.ndarray], strides: dict[str, int]) -> None:
    """Arrays whose names begin with a key of `strides` are stored as every stride-th value, if they are large."""
    samples, stored = {}, {}
    for key, value in arrays.items():
        stride = next((stride for prefix, stride in strides.items() if key.startswith(prefix)), 1)
        if stride > 1 and value.size > SMALL_ENOUGH:
            samples[key] = [stride, list(value.shape), float(np.abs(value).max())]
            value = value.reshape(-1)[::stride]
        stored[key] = value
    np.savez_compressed(HERE / name, **stored, **({"samples": json.dumps(samples)} if samples else {}))


def thinned_checkpoint(source: Path) -> tuple[bytes, dict[bytes, bytes]]:
    """The official file with its pickle as it is and, in each storage, the first values over and over. The tables of positions
    stay whole. Returns the file and what each storage became."""
    buffer, became = io.BytesIO(), {}
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(buffer, "w") as thinned:
        for entry in archive.infolist():
            content = archive.read(entry)
            positions = entry.filename.split("/")[-2] == "data" and len(content) == 64 * 64 * 4 and is_positions(content)
            if "/data/" in entry.filename and len(content) > 4 * PERIOD and not positions:
                values = np.frombuffer(content, np.uint32)
                became[content] = np.resize(values[:PERIOD], values.shape).tobytes()
                content = became[content]
            thinned.writestr(zipfile.ZipInfo(entry.filename, (1980, 1, 1, 0, 0, 0)), content)
    return buffer.getvalue(), became


def is_positions(content: bytes) -> bool:
    """Whether these (64, 64) values are sines and cosines: the first position has 0 and 1."""
    first = np.frombuffer(content, np.float32)[:64]
    return bool(np.all((np.abs(first) < 1e-5) | (np.abs(first - 1) < 1e-5)))


def main(large: Path) -> None:
    def arrays(name: str) -> dict[str, np.ndarray]:
        with np.load(large / name) as file:
            return {key: file[key] for key in file.files}

    shutil.copy(large / "lr_schedule.json", HERE)
    shutil.copy(large / "forward_JiT-B-4_64.npz", HERE)
    save("tiny_forward.npz", arrays("tiny_forward.npz"), {"sd/": 197, "act/": 37})
    modules, rope = arrays("modules.npz"), "rope_hd64_grid16_ctx32"
    modules |= {f"{rope}/{key}": modules[f"{rope}/{key}"][:, :1, ::4] for key in ("x", "out")}
    modules |= {f"{rope}/{key}": modules[f"{rope}/{key}"][::4] for key in ("cos", "sin")}
    save("modules.npz", modules, {"block/attn": 5, "block/mlp": 5, "block/out": 5, "final/out": 5, "attn_small/out": 5})
    groups = {f"{group}/conv/": 5 for group in json.loads(str(arrays("prediction_loss.npz")["groups"]))}
    save("prediction_loss.npz", arrays("prediction_loss.npz"), groups)
    save("tiny_grads.npz", arrays("tiny_grads.npz"), {"grad/": 43})
    sampler = arrays("sampler.npz")
    whole = {str(sampler["uint8_of"]): 1}
    save("sampler.npz", sampler, whole | {"out/": 5})

    train = arrays("tiny_train.npz")
    for i in range(3):
        piece = {key: train[key][10 * i : 10 * i + 10] for key in ("x_uint8", "e")}
        np.savez_compressed(HERE / f"tiny_train.{i}.npz", **piece)
    rest = {key: value for key, value in train.items() if key not in ("x_uint8", "e") and not key.startswith("init/")}
    save("tiny_train.npz", rest, {"final/": 97, "ema": 97})
    constant = arrays("tiny_train_wd0.npz")
    per_step = ("x_uint8", "e", "t", "y", "lr", "losses")
    first = {key: value[:3] if key in per_step else value for key, value in constant.items()}
    first = {key: value for key, value in first.items() if not key.startswith(("init/", "final/", "ema"))}
    save("tiny_train_wd0.npz", first, {})

    (HERE / "preprocess").mkdir(exist_ok=True)
    shutil.copy(large / "preprocess.json", HERE)
    for name in PHOTOGRAPHS:
        shutil.copy(large / "preprocess" / name, HERE / "preprocess")
    pixels = {key: value for key, value in arrays("preprocess.npz").items() if key.split("/")[0] in PHOTOGRAPHS}
    save("preprocess.npz", pixels, {key: 11 for key in pixels if key.endswith("/256")})

    checkpoint, became = thinned_checkpoint(large / "tiny_checkpoint.pth")
    (HERE / "tiny_checkpoint.pth.xz").write_bytes(lzma.compress(checkpoint, preset=9 | lzma.PRESET_EXTREME))
    out = {
        key: value
        for key, value in arrays("tiny_checkpoint_out.npz").items()
        if not key.startswith("out/") and key not in "xty"
    }
    for key, value in out.items():
        if key.startswith("exp_avg"):
            out[key] = np.frombuffer(became[value.tobytes()], value.dtype).reshape(value.shape)
    save("tiny_checkpoint_out.npz", out, {})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
