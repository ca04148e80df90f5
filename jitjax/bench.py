"""Benchmarks of the real code, each printing one JSON object a line on stdout and everything else on stderr.

    python -m jitjax.bench step --config configs/h200.py --kernels plain,fused --batch_sizes 64,256
    python -m jitjax.bench sample --config configs/imagenet.py:b16 --baseline
    python -m jitjax.bench checkpoint --config configs/imagenet.py:h16 --directory /disk/to/test
    python -m jitjax.bench input --config configs/h200.py --config.data.path=./data/train64
    python -m jitjax.bench kernels --config configs/h200.py:finetune

`--config.field=value` overrides a field as in training. `python -m jitjax.bench step --help` lists a benchmark's flags.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from jitjax import runtime

if runtime.is_worker():
    runtime.hide_accelerators()

from jitjax.errors import UserError, cli  # noqa: E402

BENCHMARKS = ("step", "sample", "checkpoint", "input", "kernels")


def main(argv: Sequence[str]) -> int:
    """Run the benchmark that the first argument names with the rest of them.

    Raises:
      UserError: no such benchmark, or a mistake in its configuration.
    """
    name, *rest = argv or [""]
    if name in ("-h", "--help"):
        print(__doc__)
        return 0
    if name not in BENCHMARKS:
        what = f"{name!r} is no benchmark" if name else "which benchmark?"
        raise UserError(f"{what}: use one of {', '.join(BENCHMARKS)}, e.g. bench step --config=configs/h200.py")
    runtime.set_environment()  # before anything imports JAX
    runtime.start_distributed()
    module = importlib.import_module(f"jitjax.benchmarks.{name}")
    if {"-h", "--help"} & set(rest):
        from absl import flags

        shared = sys.modules.get("jitjax.benchmarks.common")
        print(module.__doc__, *(flags.FLAGS.module_help(m) for m in (module, shared) if m), sep="\n")
        return 0
    return module.main(rest)


if __name__ == "__main__":
    raise SystemExit(cli(lambda: main(sys.argv[1:])))
