"""Parts of error messages: what another library says, and the known name closest to an unknown one."""

import difflib
from collections.abc import Iterable

# Minimum similarity of a name worth suggesting.
_ALIKE = 0.5


def did_you_mean(unknown: str, names: Iterable[str], otherwise: str = "") -> str:
    """A question that suggests the closest known name, after a space; `otherwise` if no name is close.

    Example:
        >>> did_you_mean("fractal_mx", ["outcome_ppo", "fractal_mix"])
        ' Did you mean `fractal_mix`?'
        >>> did_you_mean("hell", ["easy"], " Choose `easy`.")
        ' Choose `easy`.'
    """
    found = difflib.get_close_matches(unknown, list(names), n=1, cutoff=_ALIKE)
    return f" Did you mean `{found[0]}`?" if found else otherwise


def wrong_choice(name: str, value: object, choices: Iterable[object]) -> str:
    """The error message for a value that is not among the choices of an option.

    Example:
        >>> wrong_choice("scorer", "tokn", ["likelihood", "token"])
        "`scorer` is 'tokn'. Did you mean `token`? Choose one of likelihood, token."
    """
    known = [str(choice) for choice in choices]
    return f"`{name}` is {value!r}.{did_you_mean(str(value), known)} Choose one of {', '.join(known)}."


def reason(error: BaseException) -> str:
    """The first line of an error's message, as part of a sentence; the error's name if it has no message.

    Example:
        >>> reason(OSError("No such file.\\nTry another one."))
        'No such file'
    """
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
