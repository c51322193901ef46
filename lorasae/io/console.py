"""What the commands print: notes and errors of one line, and wrong arguments without usage."""
import argparse
import os
import re
import sys
from ast import literal_eval
from contextlib import contextmanager
from decimal import Decimal

from huggingface_hub.errors import HTTPError

from lorasae.errors import InputError
from lorasae.io.files import first_line, shown

UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
WANTED = {                              # by argparse's name of the type; the others are numbers
    "int": "a whole number", "local": "a path", "latents": "a number of latents, such as 16k"}
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
        note(f"note: {CLOSED}; the run continues and writes its results to its files")


def mute():
    """Sends standard output nowhere, so that Python does not complain about a closed pipe."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())


class Parser(argparse.ArgumentParser):
    """argparse with line breaks in its help, errors of one line, and no abbreviated options."""

    def __init__(self, **how):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=layout, allow_abbrev=False, **how)
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):          # question marks where its encoding has none
                stream.reconfigure(errors="replace")

    def error(self, message):
        if re.search(r"invalid .*: '[^']*\w,", message):
            message += "; separate values by spaces"
        found = re.fullmatch(r"(argument .*): invalid (\S+) value: (['\"].*['\"])(.*)", message)
        if found:
            wanted, value = WANTED.get(found[2], "a number"), shown(literal_eval(found[3]))
            message = f"{found[1]}: expected {wanted}, not {value}{found[4]}"
        self.exit(2, f"error: {message} (--help lists the options)\n")


@contextmanager
def one_line_errors(interrupted="interrupted"):
    """Ends the command with one line and a status other than 0 for what the user can mend.

    That is an InputError, a file that is missing or unreadable, and a Hub or network error.
    Anything else is a bug and keeps its traceback.
    """
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(interrupted)
    except BrokenPipeError:
        mute()
        sys.exit(f"error: {CLOSED}; what was computed is in its files")
    except (InputError, OSError, HTTPError) as error:
        sys.exit(f"error: {first_line(error)}")


def count(text):
    """Token counts as people write them: 15M, 4.1M, 1.5e6, 15_000_000, 20k."""
    match = re.fullmatch(r"([0-9][0-9_]*(?:\.[0-9]+)?(?:e[0-9]{1,2})?)([kmb]?)", text.lower())
    value = Decimal(match[1]) * UNITS[match[2]] if match else 0
    if 1 <= value < 10**18 and value == int(value):
        return int(value)
    expected = "a positive number of tokens, such as 15M, 1.5e6 or 15_000_000"
    raise argparse.ArgumentTypeError(f"{shown(text)} is not {expected}")


def few(text):
    """A whole number from 1 to 1000."""
    if re.fullmatch("1000|[1-9][0-9]{0,2}", text):
        return int(text)
    raise argparse.ArgumentTypeError(f"{shown(text)}: pass 1 to 1000")
