"""Converts common row shapes into the shapes that [`~fractal_rm.data.readers.read_row`] reads.

Columns of other names, preferences that hold their prompt, `messages`, ShareGPT turns, step labels as turns (`+`, `-`),
ratings. Ambiguous rows are refused, and the message names the option that resolves the ambiguity.
"""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from decimal import Decimal
from itertools import takewhile
from typing import Any

from fractal_rm.data.prompts import REASONING_KEYS
from fractal_rm.files import parse_json

# Columns that hold lists: JSON, where they are texts.
LISTS = ("steps", "completions", "step_labels", "labels", "teacher_scores")
# NeMo's names for the two responses of a preference.
_SIDES = {"chosen_response": "chosen", "rejected_response": "rejected"}
# Other names of a prompt or a response, read if the names of this package are missing.
_PROMPTS = ("question", "problem", "instruction", "query")
_RESPONSES = ("answer", "output", "solution", "generation")
_OWN_RESPONSES = ("completion", "response", "steps", "completions", "chosen", "rejected")
_CHATS = ("messages", "conversations", "conversation")
_ROLES = {name: name for name in ("user", "assistant", "system", "tool")}
_ROLES |= dict.fromkeys(("human", "prompter"), "user") | dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant")
_KEYS = {"from": "role", "value": "content"}
# Roles inside an answer of several turns, besides the assistant's; a question of the user begins a new answer.
_TOOLS = ("tool", "function", "ipython", "environment", "observation")
_SIGNS = {"+": 1.0, "-": 0.0}
# Parts of a prompt in other columns: a system message, pictures, arguments of the chat template, texts to read.
_SYSTEM = ("system", "system_prompt")
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
TEMPLATE_OPTIONS = ("tools", "chat_template_kwargs")
_BACKGROUND = ("input", "context", "passage", "document", "history")
# Columns that count the responses of a prompt, as RewardBench 2 has them.
_COUNTS = ("num_correct", "num_incorrect", "num_rejected", "total_completions")
# A column that rates one of the two responses of a preference.
_RATING = re.compile(r"chosen.*(score|rating|reward|grade)|(score|rating|reward|grade).*chosen")
# Columns that identify rows of official files, whose labels have another meaning.
_OFFICIAL = {
    "processbench": {"steps", "label", "final_answer_correct"},
    "prm800k": {"question", "label", "labeler"},
    "math_shepherd": {"input", "label", "task"},
    "prmbench": {"original_process", "modified_process"},
}
# A chat inside a text, as JSON or as Python prints it.
_CHAT_TEXT = re.compile(r"\s*(?:\[\s*)?\{\s*[\"'](?:role|content|from|value)[\"']\s*:")
_CHAT_KEYS = (re.compile(r"[\"'](?:role|from)[\"']\s*:"), re.compile(r"[\"'](?:content|value)[\"']\s*:"))
# Where the assistant's turn begins in chats that are written as text.
_TURN = re.compile(
    r"\n\nAssistant:|<\|im_start\|>assistant\n|<\|assistant\|>\n?|\[/INST\]|<start_of_turn>model\n"
    r"|<\|start_header_id\|>assistant<\|end_header_id\|>\n\n|### Response:\n?"
)
_FIRST_STEP = re.compile(r"\bStep 1\s*:")


@dataclass(frozen=True)
class Columns:
    """Names of columns; None: the usual name.

    Args:
        prompt: Text or chat.
        response: Text, or a chat of one assistant message.
        label: Label of the response, or its rating, with `label_scale`.
        chosen: The better response of a preference.
        rejected: The worse one.
        steps: The response as a list of steps.
        step_labels: Labels of the steps.
        label_scale: Lowest and highest rating: labels are mapped to [0, 1] in equal parts.

    Raises:
        ValueError: If the scale is not a pair of numbers, the lower one first, or a name is given twice.

    Example:
        >>> standard_row({"q": "1+1?", "a": "2", "r": 4}, Columns("q", "a", "r", label_scale=(1, 5)))
        {'prompt': '1+1?', 'response': '2', 'label': 0.75}
    """

    prompt: str | None = None
    response: str | None = None
    label: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    steps: str | None = None
    step_labels: str | None = None
    label_scale: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        scale = self.label_scale
        if scale is not None and (len(scale) != 2 or not all(map(math.isfinite, scale)) or scale[0] >= scale[1]):
            raise ValueError(f"`label_scale` is {list(scale)}. Give the lowest and the highest rating: `1 5`.")
        usual: dict[str, str] = {}
        for name, value in self.named.items():
            if (first := usual.setdefault(value, name)) != name:
                raise ValueError(f"`{first}_column` and `{name}_column` are both {value!r}. Give each its own.")

    @property
    def named(self) -> dict[str, str]:
        """The renamed columns, by their usual name."""
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "label_scale"}
        return {name: value for name, value in values.items() if value is not None}


def standard_row(record: Mapping[str, Any], columns: Columns | None = None) -> dict[str, Any]:
    """A row with the columns that `read_row` reads; columns that are null are left out.

    Raises:
        TypeError: If a rating is not a number.
        ValueError: If a named column is missing, it cannot be told which column is which, or a part of the prompt
            stands in a column that cannot be read.
    """
    columns = columns or Columns()
    row = {name: value for name, value in record.items() if value is not None}
    # Parquet files bring numpy arrays.
    row = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in row.items()}
    if not columns.named and (known := next((name for name, has in _OFFICIAL.items() if has <= row.keys()), None)):
        raise ValueError(
            f"the row has the columns of {known}, where labels have another meaning; give `--dataset_format {known}`, "
            "or name the columns of prompt, response and label."
        )
    row = _renamed(row, record, columns)
    if _SIDES.keys() <= row.keys() and not {*_OWN_RESPONSES} & row.keys():
        row = {_SIDES.get(name, name): value for name, value in row.items()}
    for name in ("prompt", *_OWN_RESPONSES, *_CHATS):
        if name in row:
            row[name] = _turns(_chat_of_text(row[name], name))
    for name in LISTS:
        if isinstance(row.get(name), str) and row[name].lstrip().startswith("["):
            with suppress(ValueError):
                row[name] = parse_json(row[name].encode(), repr(name))
    for name in ("step_labels", "labels"):
        if isinstance(row.get(name), list):
            row[name] = [
                _SIGNS[one] if isinstance(one, str) and one in _SIGNS else _as_number(one) for one in row[name]
            ]
    row = _from_chat(row)
    if "steps" in row and isinstance(row.get("labels"), list) and not {"completions", "step_labels"} & row.keys():
        usual = (
            {"labels": "step_labels"} if {"response", "completion", "label"} & row.keys() else {"steps": "completions"}
        )
        row = {usual.get(name, name): value for name, value in row.items()}
    row = _from_alias(row, "prompt", _PROMPTS, ("prompt",))
    row = _from_alias(row, "response", _RESPONSES, _OWN_RESPONSES)
    if "chosen" in row and "rejected" in row and "steps" not in row:
        _check_order(row)
        if columns.chosen is None:
            _check_responses(row)
        row = _without_inner_prompt(row)
    elif columns.response is None and columns.steps is None:
        _check_thoughts(record)
    row = _without_repetition(row)
    if columns.prompt is None:
        row = _whole_prompt(row, record)
    if "label" in row:
        row["label"] = _as_number(row["label"])
    if columns.label_scale is not None and "label" in row:
        row["label"] = _rated(row["label"], *columns.label_scale)
    return row


def prompt_row(record: Mapping[str, Any], column: str | None) -> dict[str, Any]:
    """A row with its prompt in the column `prompt`; other columns are unchanged.

    Raises:
        ValueError: If the named column is missing, two columns may be the prompt, or a part of it stands in a column
            that cannot be read.

    Example:
        >>> prompt_row({"question": "1+1?", "answer": "2"}, None)
        {'prompt': '1+1?', 'answer': '2'}
    """
    if column is not None:
        row = _renamed(dict(record), record, Columns(prompt=column))
    else:
        row = dict(record) if record.get("prompt") is not None else _from_alias(dict(record), "prompt", _PROMPTS, ())
    if "prompt" in row:
        row["prompt"] = _turns(_chat_of_text(row["prompt"], "prompt"))
    return row if column is not None else _whole_prompt(row, record)


def ratings_of(record: Mapping[str, Any]) -> list[str]:
    """Columns of a row that hold a number, and so may be ratings."""
    return [name for name, value in record.items() if isinstance(value, int | float) and name not in ("id", "index")]


def _renamed(row: dict[str, Any], record: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """The row with named columns under their usual names; columns they replace are removed."""
    named = columns.named
    if not named:
        return row
    for usual, name in named.items():
        if name not in row:
            found = ", ".join(map(repr, record)) or "no columns"
            what = "is null" if name in record else f"is missing (found: {found})"
            raise ValueError(f"column {name!r} {what}; fill it in, or give another --{usual}_column.")
    replaced = set(named.values()) | set(named)
    if "response" in named or "steps" in named:
        replaced |= {*_OWN_RESPONSES, *_CHATS} - named.keys()
    rest = {name: value for name, value in row.items() if name not in replaced}
    return {usual: row[name] for usual, name in named.items()} | rest


def _turns(value: Any) -> Any:
    """A chat with the usual keys and roles, where it had the keys of ShareGPT; a message alone is a chat of one."""
    if isinstance(value, Mapping) and ("role" in value or "from" in value):
        value = [value]
    return list(map(_turn, value)) if isinstance(value, list) else value


def _turn(message: Any) -> Any:
    if not isinstance(message, Mapping):
        return message
    if "role" not in message:
        message = {_KEYS.get(key, key): part for key, part in message.items()} if "from" in message else message
    role = message.get("role")
    usual = _ROLES.get(role.lower(), role) if isinstance(role, str) else role
    return message if usual == role else {**message, "role": usual}


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, Mapping) and "role" in one for one in value)


def _from_chat(row: dict[str, Any]) -> dict[str, Any]:
    """Prompt and response of a row whose only text is a chat: its last answer, or the steps between signs.

    The last answer is the last message, with the calls and outputs of tools that led to it.
    """
    names = [name for name in _CHATS if name in row]
    if names and not _is_chat(row[names[0]]) and not {*_OWN_RESPONSES, *_RESPONSES} & row.keys():
        raise ValueError(
            f"{names[0]!r} is not a list of messages with 'role' and 'content' (or 'from' and 'value'); write it so, "
            "or name prompt and response with --prompt_column and --response_column."
        )
    if not names or not _is_chat(row[names[0]]):
        return row
    if any(name in row for name in _OWN_RESPONSES):
        if row[names[0]][-1]["role"] == "assistant" or any(name in row for name in ("prompt", *_PROMPTS)):
            return row
        return {"prompt" if name == names[0] else name: value for name, value in row.items()}
    if len(names) > 1:
        raise ValueError(f"there are both {names[0]!r} and {names[1]!r}; drop one of the columns.")
    chat = row[names[0]]
    rest = {name: value for name, value in row.items() if name not in (names[0], "prompt")}
    answers = [message.get("content") for message in chat if message["role"] == "assistant"]
    if answers and all(isinstance(text, str) and text.strip() in _SIGNS for text in answers):
        return _from_signs(chat) | rest
    if chat[-1]["role"] != "assistant" or len(chat) < 2:
        raise ValueError(
            f"{names[0]!r} has no message of the assistant behind the prompt; add one, or name the response with "
            "--response_column."
        )
    begin = len(chat) - 1
    while begin > 1 and (chat[begin]["role"] in _TOOLS or chat[begin - 1]["role"] in _TOOLS):
        begin -= 1
    _check_inside(row.get("prompt"), chat[:begin], repr(names[0]))
    return {"prompt": chat[:begin], "response": chat[begin:]} | rest


def _check_inside(given: Any, prompt: Sequence[Mapping[str, Any]], where: str) -> None:
    """Raise if a prompt beside chats is neither the one inside them nor one of its messages."""
    asked = [str(message.get("content")).strip() for message in prompt]
    if given is not None and given != prompt and not (isinstance(given, str) and given.strip() in asked):
        raise ValueError(f"the prompt is not the one inside {where}; drop one of them.")


def _from_signs(chat: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Prompt, steps and step labels of a chat in which each step of the user is answered by a sign."""
    system = [message for message in chat if message["role"] == "system"]
    turns = [message for message in chat if message["role"] != "system"]
    said, signs = turns[::2], turns[1::2]
    if len(said) != len(signs) or any(one["role"] != "user" for one in said):
        raise ValueError("the signs do not follow a step each; give turns of the user and of the assistant in turn.")
    texts: list[Any] = [message.get("content") for message in said]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("a step between the signs has no text; drop the row or write the step.")
    begin = _FIRST_STEP.search(texts[0])
    cut = begin.start() if begin else texts[0].rfind("\n\n")
    if cut <= 0 or not texts[0][:cut].strip():
        raise ValueError(
            "the first turn does not show where the problem ends and the first step begins; write 'Step 1:' or an "
            "empty line between them."
        )
    problem: Any = texts[0][:cut].strip()
    steps = [texts[0][cut:].strip(), *(text.strip() for text in texts[1:])]
    prompt = [*system, {"role": "user", "content": problem}] if system else problem
    return {"prompt": prompt, "completions": steps, "labels": [_SIGNS[one["content"].strip()] for one in signs]}


def _from_alias(row: dict[str, Any], usual: str, others: Sequence[str], present: Sequence[str]) -> dict[str, Any]:
    """The row with a usual name for another one, if exactly one of the others is there and none that is present."""
    found = [name for name in others if name in row]
    if not found or any(name in row for name in present):
        return row
    if usual == "prompt":
        found += [name for name in _BACKGROUND if _holds(row.get(name)) and (name != "input" or "instruction" in found)]
    if len(found) > 1:
        raise ValueError(
            f"the {usual} may be {' or '.join(map(repr, found))}; name its column with --{usual}_column, or join them."
        )
    return {usual if name == found[0] else name: value for name, value in row.items()}


def _holds(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else value not in (None, [], {})


def _chat_of_text(value: Any, name: str) -> Any:
    """A chat, or a message, that a text holds as JSON; other values as they are."""
    if not isinstance(value, str) or not _CHAT_TEXT.match(value) or not all(key.search(value) for key in _CHAT_KEYS):
        return value
    with suppress(ValueError):
        found = parse_json(value.encode(errors="replace"), "the text")
        return found if _is_chat(_turns(found)) else value
    raise ValueError(f"{name!r} is a text that holds a chat, but not as JSON; write it with `json.dumps`.")


def _check_order(row: Mapping[str, Any]) -> None:
    """Raise if a preference says that the rejected response is the better one."""
    for better in (name for name in row if isinstance(name, str) and _RATING.search(name)):
        worse = better.replace("chosen", "rejected")
        high, low = _as_number(row[better]), _as_number(row.get(worse))
        if isinstance(high, int | float) and isinstance(low, int | float) and high < low:
            raise ValueError(
                f"{better!r} is {high:g} and {worse!r} is {low:g}, so the rejected response is the better one; swap "
                "the two responses, or drop the row."
            )
    label = _as_number(row.get("label"))
    if isinstance(label, int | float) and label < 1:
        raise ValueError(
            f"the label of this preference is {label:g}, which may mean that 'rejected' is as good or better; swap the "
            "two responses or drop the row if it does, and drop the column."
        )


def _check_responses(row: Mapping[str, Any]) -> None:
    """Raise if there is a response beside a preference, or its lists hold several responses, not steps."""
    more = next((name for name in ("completion", "response") if name in row), None)
    if more is not None:
        raise ValueError(
            f"there are {more!r} and 'chosen' and 'rejected'; name the response with --response_column {more}, or the "
            "preference with --chosen_column chosen."
        )
    count = next((name for name in _COUNTS if name in row), None)
    sides = [row["chosen"], row["rejected"]]
    if {type(side) for side in sides} == {str, list} and not any(map(_is_chat, sides)):
        raise ValueError(
            "'chosen' and 'rejected' are a text and a list of texts; give a row for each pair of responses, or both as "
            "lists of steps."
        )
    if count is not None and all(
        isinstance(side, list) and all(isinstance(one, str) for one in side) for side in sides
    ):
        raise ValueError(
            f"'chosen' and 'rejected' are lists of texts, and {count!r} counts responses; give a row for each pair of "
            "responses, or drop that column if the texts are steps."
        )


def _check_thoughts(record: Mapping[str, Any]) -> None:
    """Raise if a column beside the response may hold its beginning."""
    lost = next((name for name in REASONING_KEYS if isinstance(record.get(name), str) and _holds(record[name])), None)
    name = next((name for name in (*_OWN_RESPONSES, *_RESPONSES) if record.get(name) is not None), None)
    if lost is not None and name is not None:
        option = "steps" if name in ("steps", "completions") else "response"
        raise ValueError(
            f"column {lost!r} may be a part of the response; write it there as the policy does "
            f"(<think>...</think>), drop the column, or give `--{option}_column {name}`, which leaves it out."
        )


def _whole_prompt(row: dict[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """The row with the system message of a column of its own in the chat; refused where a part would get lost."""
    prompt, name = row.get("prompt"), next((name for name in ("prompt", *_PROMPTS) if name in record), None)
    leave = f"; or give `--prompt_column {name}`, which leaves the column out" if name else ""
    lost = next((name for name in _MEDIA if _holds(row.get(name))), None)
    if lost is not None:
        raise ValueError(f"column {lost!r} holds what reward models cannot read; drop the row{leave}.")
    if _is_chat(prompt) and (lost := next((name for name in TEMPLATE_OPTIONS if _holds(row.get(name))), None)):
        option = '{"tools": [...]}' if lost == "tools" else "{...}"
        raise ValueError(
            f"column {lost!r} reaches no chat template; give what all rows share as `chat_template_kwargs` ({option}) "
            f"and drop the column{leave}."
        )
    name = next((name for name in _SYSTEM if isinstance(row.get(name), str) and _holds(row[name])), None)
    if name is None or prompt is None:
        return row
    if not isinstance(prompt, list) or not _is_chat(prompt):
        raise ValueError(
            f"column {name!r} is a system message beside a prompt that is a text; give the prompt as a chat, or join "
            f"the two{leave}."
        )
    message = {"role": "system", "content": row[name]}
    if prompt[0]["role"] != "system":
        return row | {"prompt": [message, *prompt]}
    if prompt[0].get("content") != row[name]:
        raise ValueError(f"the prompt begins with another system message than column {name!r}; drop one of them.")
    return row


def _without_inner_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """A preference whose responses do not repeat the prompt: what both begin with is the prompt."""
    chosen, rejected = row["chosen"], row["rejected"]
    sides = [side for side in (chosen, rejected) if _is_chat(side)]
    if "prompt" in row and any(side[0]["role"] == "assistant" for side in sides):
        return row  # answers of several turns
    if _is_chat(chosen) and _is_chat(rejected) and ("prompt" not in row or max(len(chosen), len(rejected)) > 1):
        most = min(len(chosen), len(rejected)) - 1
        shared = [one for one, _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False))]
        prompt = shared[:most]
        # A tool's output belongs to the answer that called it.
        while prompt and any(
            side[place]["role"] in _TOOLS for side in (chosen, rejected) for place in (len(prompt) - 1, len(prompt))
        ):
            prompt = prompt[:-1]
        begins = [side[len(prompt)]["role"] for side in (chosen, rejected)]
        whole = all(
            len(side) == len(prompt) + 1 or any(one["role"] in _TOOLS for one in side[len(prompt) :])
            for side in (chosen, rejected)
        )
        if not prompt or not whole or begins != ["assistant", "assistant"]:
            raise ValueError(
                f"'chosen' and 'rejected' ({len(chosen)} and {len(rejected)} messages) share their first "
                f"{len(prompt)}; give both one answer of the assistant behind the same prompt."
            )
        _check_inside(row.get("prompt"), prompt, "'chosen' and 'rejected'")
        return row | {"prompt": prompt, "chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}
    if "prompt" not in row and isinstance(chosen, str) and isinstance(rejected, str):
        place = _end_of_prompt(chosen, rejected)
        more = next((side for side in ("chosen", "rejected") if _TURN.search(row[side], place)), None)
        if more is not None:
            raise ValueError(
                f"{more!r} has another turn behind what both begin with; give both one answer to the same prompt."
            )
        return row | {"prompt": chosen[:place], "chosen": chosen[place:], "rejected": rejected[place:]}
    return row


def _without_repetition(row: dict[str, Any]) -> dict[str, Any]:
    """The row with texts that do not begin with its prompt, if the prompt is a chat written as text."""
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not _TURN.search(prompt):
        return row
    texts = {name: row[name] for name in ("completion", "response", "chosen", "rejected") if name in row}
    if not texts or not all(isinstance(text, str) and text.startswith(prompt) for text in texts.values()):
        return row
    return row | {name: text[len(prompt) :] for name, text in texts.items()}


def _end_of_prompt(chosen: str, rejected: str) -> int:
    """Where the shared prompt of two texts ends: after the last mark of a turn, else before the word that differs."""
    pairs = zip(chosen, rejected, strict=False)
    shared = chosen[: sum(1 for _ in takewhile(lambda both: both[0] == both[1], pairs))]
    turns = list(_TURN.finditer(shared))
    if turns:
        return turns[-1].end()
    place = max((i for i, sign in enumerate(shared) if sign.isspace()), default=-1)
    if not shared[: place + 1].strip():
        raise ValueError(
            "there is no prompt, and 'chosen' and 'rejected' do not begin with one; add a column 'prompt', or name it "
            "with --prompt_column."
        )
    return place


def _as_number(value: Any) -> Any:
    """A text that is a number or a boolean as that, as in CSV cells, and decimals of tables; others are unchanged."""
    if isinstance(value, Decimal):
        return float(value)
    if not isinstance(value, str) or "_" in value:
        return value
    if value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    try:
        return float(value)
    except ValueError:
        return value


def _rated(value: Any, low: float, high: float) -> float:
    """A rating on a scale, as a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"the rating is {value!r} ({type(value).__name__}), not a number; fix it or drop the row.")
    if not low <= value <= high:  # NaN too
        raise ValueError(f"the rating is {value:g}, outside the scale {low:g} to {high:g}; give another --label_scale.")
    return (value - low) / (high - low)
