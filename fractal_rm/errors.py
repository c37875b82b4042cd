"""Shortens other libraries' error messages for use in this package's messages."""


def reason(error: Exception) -> str:
    """The first line of an error's message, as part of a sentence; the error's name if it has no message.

    Example:
        >>> reason(OSError("No such file.\\nTry another one."))
        'No such file'
    """
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
