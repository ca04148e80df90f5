"""One HTML file about one or several runs: curves, grids through time, where the time went, settings, environment.

    jitjax report runs/a
    jitjax report runs/a runs/b --out compared.html

It opens without a network, and can be written while the runs go on. Needs `pip install -e '.[report]'`.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workdirs", metavar="WORKDIR", nargs="+", help="folders of runs; several are compared")
    parser.add_argument("--out", metavar="FILE.html", help="file to write; default report.html in the first folder")


def run(args: argparse.Namespace) -> None:
    from jitjax.report import write_report

    print(write_report(args.workdirs, args.out))
