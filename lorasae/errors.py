"""The exception for mistakes a user can fix: commands print its message and exit with status 1."""


class InputError(ValueError):
    """Says in one line what is wrong, what was expected and what to do."""

    def __init__(self, message):
        one_line = " ".join(str(message).splitlines())      # a file name may contain a line break
        super().__init__(one_line)
