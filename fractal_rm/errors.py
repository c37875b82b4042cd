"""What errors of other libraries say, for sentences of our own."""


def reason(error: Exception) -> str:
    """The first line of an error's message, as a part of a sentence; the error's name where there is no message.

    Example:
        >>> reason(OSError("No such file.\\nTry another one."))
        'No such file'
    """
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
