"""What the commands print: notes and errors of one line, and wrong arguments without usage."""
import argparse
import os
import re
import sys
from contextlib import contextmanager

from huggingface_hub.errors import HTTPError

from lorasae.errors import InputError
from lorasae.io.files import first_line

UNITS = {"k": 10**3, "m": 10**6, "b": 10**9}


def note(line):
    """A note to the user, on stderr. With several processes, the first one speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def progress_line(line):
    """A line of progress, on stdout, at once."""
    print(line, flush=True)


class Parser(argparse.ArgumentParser):
    """argparse with line breaks in its help, errors of one line, and no abbreviated options."""

    def __init__(self, **how):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=layout, allow_abbrev=False, **how)

    def error(self, message):
        if re.search(r"invalid .*: '[^']*\w,", message):
            message += "; separate values by spaces"
        message = re.sub("invalid .* value:", "cannot take", message)
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
    except (InputError, OSError, HTTPError) as error:
        sys.exit(f"error: {first_line(error)}")


def count(text):
    """Token counts as people write them: 15M, 4.1M, 1.5e6, 15_000_000, 20k."""
    unit = UNITS.get(text[-1:].lower(), 1)
    tokens = float(text if unit == 1 else text[:-1]) * unit
    if not 1 <= tokens < 10**15:
        raise ValueError(text)
    return round(tokens)


def few(text):
    """A whole number from 1 to 1000."""
    number = int(text)
    if not 1 <= number <= 1000:
        raise ValueError(text)
    return number
