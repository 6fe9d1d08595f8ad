"""The command line: gpkernels train | sample | evaluate | report | prepare | presets | losses | doctor.

What a person can put right ends in one line on stderr and exit code 2, without a traceback.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from gpkernels._version import __version__
from gpkernels.errors import UserError
from gpkernels.losses.command import add_command as add_losses
from gpkernels.metrics.command import add_command as add_evaluate
from gpkernels.training.command import add_commands as add_training
from gpkernels.training.prepare import add_command as add_prepare

_AGAIN = {"prepare": "goes on", "train": "goes on, with --resume if it has begun to train"}
"""What a command that was stopped does when it is given once more."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def main(argv: Sequence[str] | None = None) -> int:
    command = ""
    try:
        options = _parser().parse_args(argv)
        command = options.command
        return options.run(options)
    except UserError as error:
        return _complain(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}")
    except KeyboardInterrupt:
        print(f"gpkernels: stopped; the same command {_AGAIN.get(command, 'starts again')}", file=sys.stderr)
        return 130  # as shells say of SIGINT


def _complain(message: str) -> int:
    print("gpkernels: error: " + " ".join(message.split()), file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gpkernels", description="Exact gradient penalties for GAN training.")
    parser.add_argument("--version", action="version", version=f"gpkernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    add_training(commands)
    add_evaluate(commands)
    add_prepare(commands)
    add_losses(commands)
    doctor = commands.add_parser("doctor", help="say what is built, which backend each op uses and why; check each op")
    doctor.set_defaults(run=_doctor)
    return parser


def _doctor(options: argparse.Namespace) -> int:
    from gpkernels import doctor

    return doctor.report()
