"""The exception for what the user can mend: commands print its line and exit with status 1."""


class InputError(ValueError):
    """Says in one line what is wrong, what was expected and what to do."""

    def __init__(self, message):
        one_line = " ".join(str(message).splitlines())      # a file's name may hold a line break
        super().__init__(one_line)
