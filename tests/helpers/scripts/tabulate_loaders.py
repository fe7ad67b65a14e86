"""Load frozen and learning models in every way that `tests/helpers/loaders.py` knows, and print what became of their routing.

Usage: `python tests/helpers/scripts/tabulate_loaders.py`. A Markdown table: the share of tokens whose expert is not the one of the
model that was saved (in stage 1: of that model in the same dtype), or the error that says that the routing was not loaded.
"""

import copy
import sys
import tempfile
import warnings
from pathlib import Path

from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from helpers.loaders import KINDS, LOADERS, build, experts_of


def outcome(source, folder: Path, loader) -> str:
    try:
        model = loader(source, folder).eval()
        experts = experts_of(model)
    except ValueError as error:
        return f"refused: {str(error).split(': ')[0][:60]}"
    expected = source if source.routing_stage == 2 else copy.deepcopy(source).to(model.dtype)
    return f"{(experts != experts_of(expected)).float().mean():.0%}"


def main():
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            source = build(kind)
            source.save_pretrained(Path(folder) / kind)
            rows[kind] = {name: outcome(source, Path(folder) / kind, loader) for name, loader in LOADERS.items()}
    print("| loader |", " | ".join(KINDS), "|")
    print("| --- |" + " --- |" * len(KINDS))
    for name in LOADERS:
        print(f"| `{name}` |", " | ".join(rows[kind][name] for kind in KINDS), "|")


if __name__ == "__main__":
    main()
