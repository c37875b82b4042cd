"""Parts of the sentences of errors: what another library says, and which known name is nearest."""

import difflib
from collections.abc import Iterable

# Least similarity of a name that is worth suggesting.
_ALIKE = 0.5


def did_you_mean(unknown: str, names: Iterable[str], otherwise: str = "") -> str:
    """A question with the known name that is nearest, after a space; `otherwise` if none is near.

    Example:
        >>> did_you_mean("fractal_mx", ["outcome_ppo", "fractal_mix"])
        ' Did you mean `fractal_mix`?'
        >>> did_you_mean("hell", ["easy"], " Choose `easy`.")
        ' Choose `easy`.'
    """
    found = difflib.get_close_matches(unknown, list(names), n=1, cutoff=_ALIKE)
    return f" Did you mean `{found[0]}`?" if found else otherwise


def reason(error: Exception) -> str:
    """The first line of an error's message, as a part of a sentence; the error's name where there is no message.

    Example:
        >>> reason(OSError("No such file.\\nTry another one."))
        'No such file'
    """
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
