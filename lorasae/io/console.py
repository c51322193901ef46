"""What the commands print: one-line notes and errors, and argument errors without usage text."""
import argparse
import os
import re
import sys
from ast import literal_eval
from contextlib import contextmanager
from decimal import Decimal

from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError

from lorasae.errors import InputError
from lorasae.io.files import first_line, shown

UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
WANTED = {                              # by argparse's name for the type; all others are numbers
    "int": "a whole number", "local": "a path", "latents": "a number of latents, such as 16k"}
CLOSED = "standard output was closed"


def note(line):
    """Prints a note to the user on stderr. With several processes, only the first one prints."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def progress_line(line):
    """Prints a progress line on stdout. The work goes on if the pipe is closed (`... | head`)."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        mute()
        note(f"note: {CLOSED}; the run continues and writes its results to its files")


def mute():
    """Redirects stdout to the null device, so that Python does not complain about a closed pipe."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())


class Parser(argparse.ArgumentParser):
    """argparse with line breaks in its help, one-line errors, and no abbreviated options."""

    def __init__(self, **how):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=layout, allow_abbrev=False, **how)
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):          # print ? for what it cannot encode
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
    """Exits with one line and a non-zero status for errors that the user can fix.

    These are InputErrors, bad files, Hub errors and lack of memory. A bug keeps its traceback.
    """
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(interrupted)
    except BrokenPipeError:
        mute()
        sys.exit(f"error: {CLOSED}; the results so far are in the output files")
    except (InputError, OSError, HTTPError, SafetensorError) as error:
        sys.exit(f"error: {first_line(error)}")
    except RuntimeError as error:
        if not re.search("out of memory|can't allocate memory", str(error)):
            raise
        sys.exit(f"error: {first_line(error)} (lower --micro-batch, --ahead, --context or --width)")


def count(text):
    """Parses a token count as people write it: 15M, 4.1M, 1.5e6, 15_000_000, 20k."""
    match = re.fullmatch(r"([0-9][0-9_]*(?:\.[0-9]+)?(?:e[0-9]{1,2})?)([kmb]?)", text.lower())
    value = Decimal(match[1]) * UNITS[match[2]] if match else 0
    if 1 <= value < 10**18 and value == int(value):
        return int(value)
    expected = "a positive number of tokens, such as 15M, 1.5e6 or 15_000_000"
    raise argparse.ArgumentTypeError(f"{shown(text)} is not {expected}")


def few(text):
    """Parses a whole number from 1 to 1000."""
    if re.fullmatch("1000|[1-9][0-9]{0,2}", text):
        return int(text)
    raise argparse.ArgumentTypeError(f"{shown(text)}: pass 1 to 1000")
