"""The one exception that means "the user can mend this": train.py and eval.py print its line and exit with status 1."""


class InputError(ValueError):
    """Says in one line what is wrong, what was expected and what to do. Anything else that escapes is a bug."""
