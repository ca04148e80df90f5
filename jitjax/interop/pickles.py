"""Reading a pickle without executing anything that it names.

Unpickling may call whatever the pickle names. Here no name is ever imported: a few (tensors, dictionaries, NumPy scalars
and arrays) have a safe implementation in this project, other classes become an inert `Stray`, which remembers its name
and nothing else, and everything that is not known to be a mere class (os.system, builtins.eval, numpy.load, ...) ends
the reading. The pure-Python unpickler is used since it alone can be limited to a list of opcodes: those left out
(protocol 0 instances, extension codes, bytearrays whose size the file claims) are not needed, and dictionary keys are
checked before they are hashed, which a deep tuple would crash.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jitjax.errors import UserError

# Standard-library classes that people's arguments and logs hold. Only the names matter: none is imported or called.
STANDARD = {
    **dict.fromkeys(("pathlib", "pathlib._local"), "PosixPath WindowsPath PurePosixPath PureWindowsPath Path PurePath"),
    **dict.fromkeys(
        ("builtins", "__builtin__"),
        "set frozenset object complex slice range bytearray list dict tuple int float str bool bytes",
    ),
    "collections": "defaultdict OrderedDict Counter deque",
    "argparse": "Namespace",
    "types": "SimpleNamespace",
    "datetime": "datetime date time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "uuid": "UUID",
    "typing": "Any Union Optional List Dict Tuple",
}
DICTIONARIES = {
    ("collections", "OrderedDict"), ("collections", "defaultdict"), ("collections", "Counter"), ("builtins", "dict"),
    ("__builtin__", "dict"), ("argparse", "Namespace"), ("types", "SimpleNamespace"),
}  # fmt: skip
TORCH = {("torch", "device"), ("torch", "Size"), ("torch.serialization", "_get_layout")}
NUMBERS = re.compile(r"(bool_?|u?int(8|16|32|64)|b?float(8_\w+|16|32|64)|half|double|short|long|complex(32|64|128))")


class BadFile(UserError):
    """A file that is not what it should be; the message says what was expected and found."""


class Stray:
    """Stands for a value that is not read. `name` is what the file calls its class."""

    name = ""

    def __init__(self, *_: Any, **__: Any):
        pass

    def build(self, state: Any) -> None:
        pass

    def __repr__(self) -> str:
        return f"<{self.name}>"


class _Dictionary(dict):
    """What an OrderedDict, defaultdict, Namespace or SimpleNamespace is read as."""

    def __init__(self, *args: Any):
        super().__init__()
        for arg in args:
            if isinstance(arg, Mapping):
                self.build(arg)
            elif isinstance(arg, list | tuple):  # pairs
                self.build({_key(pair[0]): pair[1] for pair in arg})

    def build(self, state: Any) -> None:
        if isinstance(state, Mapping):
            self.update(state)


class _OrderedDictionary(_Dictionary):
    def build(self, state: Any) -> None:
        """A state dict carries `_metadata` as an attribute; it holds module versions, no weights."""


class _Dtype(Stray):
    name = "numpy.dtype"

    def __init__(self, code: Any = "", *_: Any):
        self._code, self._order = code, "<"

    def build(self, state: Any) -> None:
        self._order = ">" if isinstance(state, tuple) and len(state) > 1 and state[1] == ">" else "<"

    def numpy(self) -> np.dtype | None:
        if isinstance(self._code, str) and re.fullmatch(r"[fiub][1248]", self._code):
            return np.dtype(self._order + self._code)
        return None


class _Array(Stray):
    """A NumPy array of numbers, with `shape`, `dtype` and `numpy()` as a tensor has them; of others, a stray value."""

    name = "numpy.ndarray"

    def build(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        dtype = dtype.numpy()
        if dtype is None or not isinstance(data, bytes) or math.prod(shape) * dtype.itemsize != len(data):
            return
        array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
        self._array = array.astype(dtype.newbyteorder("="))
        self.shape, self.dtype = self._array.shape, self._array.dtype

    def numpy(self) -> np.ndarray:
        return np.ascontiguousarray(self._array)


def _scalar(dtype: Any, data: Any) -> Any:
    """A NumPy scalar as a Python number."""
    kind = dtype.numpy() if isinstance(dtype, _Dtype) else None
    if kind is None or not isinstance(data, bytes) or len(data) != kind.itemsize:
        return _class("numpy", "generic")()
    return np.frombuffer(data, kind)[0].item()


def _encode(text: Any, encoding: Any) -> bytes:
    """`_codecs.encode`, with which protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise BadFile("a text that stands for bytes is not in latin1")
    return text.encode("latin1")


def _class(module: str, name: str) -> type[Stray]:
    return type("Stray", (Stray,), {"name": f"{module}.{name}"[:120]})


class _Function:
    """A callable of ours: the only ones besides the classes above that REDUCE accepts."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


SAFE: dict[tuple[str, str], Any] = {("_codecs", "encode"): _Function(_encode)}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    SAFE[_module, "scalar"], SAFE[_module, "_reconstruct"] = _Function(_scalar), _Function(lambda *_: _Array())
SAFE["numpy", "dtype"], SAFE["numpy", "ndarray"] = _Dtype, _class("numpy", "ndarray")
for _module in ("copy_reg", "copyreg"):
    SAFE[_module, "_reconstructor"] = _Function(lambda cls, *_: cls() if _is_ours(cls) else _class("copyreg", "object")())


def is_stray(value: Any) -> bool:
    """Whether a value is a class that only stands for one of the file's."""
    return isinstance(value, type) and issubclass(value, Stray)


def call(function: Any, args: Any) -> Any:
    """`function(*args)`, where the pickle hands over both.

    Raises:
      BadFile: the function is not one of ours.
    """
    if not isinstance(function, _Function) and not _is_ours(function):
        raise BadFile(f"it calls a {type(function).__name__}")
    return function(*args)


def _is_ours(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Stray | _Dictionary)


def _key(key: Any) -> Any:
    """A dictionary key that is safe to hash: plain values, and flat tuples of them."""
    plain = (str, int, float, bool, bytes, type(None))
    if isinstance(key, plain) or isinstance(key, tuple) and all(isinstance(item, plain) for item in key):
        return key
    if isinstance(key, Stray):
        return repr(key)
    raise BadFile(f"a dictionary has a {type(key).__name__} as a key")


class InertUnpickler(pickle._Unpickler):
    """Reads one pickle; see the module's text.

    Args:
      data: the pickle.
      names: functions that the pickle may call, by (module, name).
      values: plain values that stand for a name, e.g. ("torch", "FloatStorage").
      persistent: turns a persistent id (torch's reference to tensor bytes) into a value.
      where: the file's name for messages.

    After `load`, `strays` holds the names of the classes that were replaced, in order of appearance.
    """

    def __init__(self, data: bytes, *, names: Mapping, values: Mapping, persistent: Callable[[Any], Any], where: str):
        super().__init__(io.BytesIO(data))
        self._known = {**SAFE, **values, **{key: _Function(function) for key, function in names.items()}}
        self._persistent, self._where = persistent, where
        self.strays: list[str] = []

    def load(self) -> Any:
        """Raises:
        BadFile: not a pickle, or one that names more than data.
        """
        try:
            return super().load()
        except BadFile as error:
            text = str(error)
            raise BadFile(text if text.startswith(self._where) else f"{self._where}: {text}") from None
        except RecursionError:
            raise BadFile(f"{self._where}: the pickle is nested too deep for a checkpoint") from None
        except MemoryError:
            raise BadFile(f"{self._where}: the pickle asks for more memory than there is") from None
        except Exception as error:  # hostile bytes may raise anything; nothing of the file has run
            detail = " ".join(f"{error}".split())[:80]
            kind = type(error).__name__
            raise BadFile(f"{self._where}: data.pkl is not a checkpoint's pickle ({kind}: {detail})") from None

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in DICTIONARIES:
            return _OrderedDictionary if name == "OrderedDict" else _Dictionary
        if (module, name) in self._known:
            return self._known[module, name]
        if not _is_a_class(module, name):
            raise BadFile(
                f"refused: it names {module[:60]}.{name[:60]}, which is not data; a checkpoint holds tensors, plain values "
                "and objects (nothing was executed)"
            )
        found = self._known[module, name] = _class(module, name)
        self.strays.append(found.name)
        return found

    def persistent_load(self, pid: Any) -> Any:
        return self._persistent(pid)

    # Opcodes that call, set attributes or hash, each limited to what is ours.

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = call(self.stack[-1], args)

    def load_newobj(self) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        if not _is_ours(cls):
            raise BadFile(f"it makes an object of a {type(cls).__name__}")
        self.append(cls(*args))

    def load_newobj_ex(self) -> None:
        self.stack.pop()  # keyword arguments
        self.load_newobj()

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, Stray | _Dictionary):
            raise BadFile(f"it sets attributes of a {type(target).__name__}")
        target.build(state)

    def _set(self, target: Any, items: list) -> None:
        if isinstance(target, dict):
            target.update((_key(items[i]), items[i + 1]) for i in range(0, len(items), 2))
        elif not isinstance(target, Stray):
            raise BadFile(f"it sets entries of a {type(target).__name__}")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._set(self.stack[-1], items)

    def load_dict(self) -> None:
        items, result = self.pop_mark(), {}
        self._set(result, items)
        self.append(result)

    def _extend(self, target: Any, items: list) -> None:
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Stray):
            raise BadFile(f"it appends to a {type(target).__name__}")

    def load_append(self) -> None:
        value = self.stack.pop()
        self._extend(self.stack[-1], [value])

    def load_appends(self) -> None:
        items = self.pop_mark()
        self._extend(self.stack[-1], items)

    def load_empty_set(self) -> None:
        self.append(self.find_class("builtins", "set")())

    def load_frozenset(self) -> None:
        self.pop_mark()
        self.append(self.find_class("builtins", "frozenset")())

    _ours = {
        "REDUCE": load_reduce, "NEWOBJ": load_newobj, "NEWOBJ_EX": load_newobj_ex, "BUILD": load_build,
        "SETITEM": load_setitem, "SETITEMS": load_setitems, "DICT": load_dict, "APPEND": load_append,
        "APPENDS": load_appends, "EMPTY_SET": load_empty_set, "ADDITEMS": load_appends, "FROZENSET": load_frozenset,
    }  # fmt: skip
    _plain = (
        "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT LONG BININT BININT1 BININT2 LONG1 LONG4 FLOAT "
        "BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES "
        "BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST EMPTY_DICT GET BINGET LONG_BINGET PUT BINPUT "
        "LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL BINPERSID"
    ).split()
    dispatch = {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _plain}
    dispatch |= {getattr(pickle, name)[0]: function for name, function in _ours.items()}


def _is_a_class(module: str, name: str) -> bool:
    """Whether a name that a pickle gives is that of a class (or of a dtype), so that an inert object may stand for it."""
    top, last = module.split(".")[0], name.rsplit(".", 1)[-1]
    if module in STANDARD:
        return name in STANDARD[module].split()
    if top in sys.stdlib_module_names or top in ("__builtin__", "copy_reg", "commands"):
        return False
    if top in ("numpy", "ml_dtypes", "torch", "jax", "jaxlib") and NUMBERS.fullmatch(name):
        return True
    if module == "torch.nn.functional" or module.startswith("numpy.random."):  # activations; states of random generators
        return True
    if top == "torch":
        return (module, name) in TORCH or name.startswith("_rebuild_") or last[:1].isupper()
    if top in ("numpy", "jax", "jaxlib"):
        return module == "numpy.dtypes" and last[:1].isupper()
    return last.lstrip("_")[:1].isupper()  # a class by everybody's convention, of another package or of the training script
