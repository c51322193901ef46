"""The one exception that means "the user can mend this": the commands print its line and exit with status 1."""


class InputError(ValueError):
    """Says in one line what is wrong, what was expected and what to do. Anything else that escapes is a bug."""

    def __init__(self, message):
        super().__init__(" ".join(str(message).splitlines()))           # the name of a file may hold a line break
