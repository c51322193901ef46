"""What the commands print: notes and errors of one line, and wrong arguments without usage."""
import argparse
import json
import os
import sys
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation

from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError

from lorasae.errors import InputError
from lorasae.io.files import first_line

UNITS = {"k": 10**3, "m": 10**6, "b": 10**9}
CLOSED = "standard output was closed"


def note(line):
    """A note to the user, on stderr. With several processes, the first one speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def progress_line(line):
    """A line of progress, on stdout. The work goes on if the pipe is closed (`... | head`)."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        mute()
        note(f"note: {CLOSED}; the work goes on and its results will be in its files")


def mute():
    """Sends standard output nowhere, so that Python does not complain about a closed pipe."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())


class Parser(argparse.ArgumentParser):
    """argparse with line breaks in its help, errors of one line, and no abbreviated options."""

    def __init__(self, **how):
        allow_any_encoding()
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=layout, allow_abbrev=False, **how)

    def error(self, message):
        self.exit(2, f"error: {message} (--help lists the options)\n")


def allow_any_encoding():
    """Prints question marks where the terminal's encoding has no such character."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


@contextmanager
def one_line_errors(interrupted="interrupted"):
    """Ends the command with one line and a status other than 0 for what the user can mend.

    That is an InputError, a file that is missing, unreadable or damaged, and a Hub or network
    error. Anything else is a bug and keeps its traceback.
    """
    allow_any_encoding()
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(interrupted)
    except BrokenPipeError:
        mute()
        sys.exit(f"error: {CLOSED}; what was computed is in its files")
    except OSError as error:
        named = f"{error.filename}: {error.strerror}" if error.filename else first_line(error)
        sys.exit(f"error: {InputError(named)}")         # in one line
    except (InputError, SafetensorError, json.JSONDecodeError, HTTPError) as error:
        sys.exit(f"error: {first_line(error)}")


def count(text):
    """Token counts as people write them: 15M, 4.1M, 1.5e6, 15_000_000, 20k."""
    unit = UNITS.get(text[-1:].lower())
    digits = text if unit is None else text[:-1]
    try:
        value = Decimal(digits if digits.isascii() else "none") * (unit or 1)
        if 1 <= value < 10**18 and value == int(value):
            return int(value)
    except InvalidOperation:
        pass
    expected = "a positive number of tokens, such as 15M, 1.5e6 or 15_000_000"
    raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
