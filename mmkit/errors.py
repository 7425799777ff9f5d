"""The errors that a reader can mend: each message says what is wrong, where, and what to do."""


class MmkitError(ValueError):
    """Bad input. The message names the file or field at fault and the remedy."""


class MissingFile(MmkitError, FileNotFoundError):
    """A file, folder or package of weights that should be there is not."""

    def __str__(self) -> str:  # FileNotFoundError would print an errno tuple
        return str(self.args[0])
