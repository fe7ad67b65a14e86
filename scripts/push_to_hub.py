#!/usr/bin/env python
# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Check a trained StableMoE model, then publish it on the Hugging Face Hub in one commit.

python scripts/push_to_hub.py runs/embedded-cpu user/name --dry_run
python scripts/push_to_hub.py runs/embedded-cpu user/name --private --license apache-2.0

Checked before anything is sent: weights against config and fingerprint; the same logits and experts when loaded by the package
and, in a fresh interpreter without it, by the code files; the tokenizer; the model card's metadata against results.json. Of the
folder go weights (safetensors), config, code, tokenizer, results and figures; never pickles, optimizer states or subfolders
other than that of chat templates. The folder is not changed.
"""

import argparse

from modeling_stablemoe.hub import NETWORK_ERROR, check_name, explain, format_shipment, prepare, require_login, send
from modeling_stablemoe.runs import OptionParser, help_of, quiet_libraries


def parse_arguments(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OptionParser(**help_of(__doc__))
    parser.add_argument("folder", help="a checkpoint, or the output folder of a run")
    parser.add_argument("name", help="repository on the Hub, as in user/name; made if there is none")
    parser.add_argument(
        "--dry_run", action="store_true", help="check and list what would be sent, without the network"
    )
    parser.add_argument("--private", action="store_true", help="only you shall see the repository")
    parser.add_argument("--revision", help="branch to send to, made if there is none; none: the main branch")
    parser.add_argument("--commit_message", default="Upload model", help="title of the commit")
    parser.add_argument("--license", help="license for the card, e.g. apache-2.0; none: what the card says")
    parser.add_argument("--language", nargs="+", help="languages for the card, e.g. en de; none: what the card says")
    return parser.parse_args(argv)


def main(argv=None):
    """Run the script."""
    arguments = parse_arguments(argv)
    quiet_libraries()
    name = arguments.name
    try:
        check_name(name)
        if not arguments.dry_run:
            require_login()  # before the checks, which take a while
        shipment = prepare(arguments.folder, name, arguments.license, arguments.language)
        print(format_shipment(shipment, name, arguments.revision))
        if arguments.dry_run:
            print("All checks passed. Nothing was sent.")
            return
        commit = send(
            shipment,
            name,
            revision=arguments.revision,
            private=arguments.private,
            commit_message=arguments.commit_message,
        )
    except (NETWORK_ERROR, OSError, ValueError) as error:
        raise SystemExit(f"error: {explain(error, name)}") from error
    print(f"All checks passed. Sent: {commit.commit_url}")


if __name__ == "__main__":
    main()
