"""What the commands say: notes and errors of one line each, and arguments that are wrong without a page of usage."""
import argparse
import os
import sys
from contextlib import contextmanager

from lorasae.errors import InputError


def note(line):
    """A note to the user, beside the results."""
    print(line, file=sys.stderr, flush=True)


def progress_line(line):
    """A line of progress. Where nobody reads it any more, the work goes on in silence: its results are files."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        mute()
        note("note: nobody reads the output any more; the work goes on, and its results will be in its files")


def mute():
    """Sends standard output nowhere, so that Python does not complain of a reader that left."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())


class Parser(argparse.ArgumentParser):
    """argparse, whose help keeps its line breaks and whose errors are one line."""

    def __init__(self, **how):
        any_terminal()
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **how)

    def error(self, message):
        self.exit(2, f"error: {message} (--help lists the options)\n")


def any_terminal():
    """A terminal that knows no Greek gets question marks in its place."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


@contextmanager
def one_line_errors(interrupted="interrupted"):
    """Ends the command in one line, with a status other than 0, for what the user can mend; anything else is a bug.

    A reader that left (`... | head`) is no error of ours.
    """
    any_terminal()
    try:
        yield
        sys.stdout.flush()
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(interrupted)
    except BrokenPipeError:
        mute()
        sys.exit("error: nobody reads the output any more; what was computed is in its files")


def count(text):
    """Token counts as they are written: 15M, 1.5e6, 15_000_000, 20k."""
    units = {"k": 1e3, "m": 1e6, "b": 1e9}
    unit = units.get(text[-1:].lower())
    digits = text if unit is None else text[:-1]
    try:
        value = float(digits) * (unit or 1) if digits.isascii() else 0
    except ValueError:
        value = 0
    if not 1 <= value < 1e18 or value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of tokens, such as 15M, 1.5e6 or 15_000_000")
    return int(value)
