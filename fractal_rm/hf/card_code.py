"""Code for a model card: how to read step scores with nothing but transformers."""

from fractal_rm.scorers.encoding import special_affixes
from fractal_rm.scorers.inputs import Processor
from fractal_rm.scorers.sentence_encoder import SentenceEncoder
from fractal_rm.scorers.settings import FractalSettings

_HEADING = "## Without fractal-rm"

_START = '''import torch
from transformers import {loader}, {tokenizer}

folder = "this-folder"
tokenizer = {tokenizer}.from_pretrained(folder)
model = {loader}.from_pretrained(folder).eval()
settings = model.config.fractal


def score_steps(prompt, pieces):
    """P(step is good) of each step. `pieces`: the response, cut behind each step: ["3*4=12.", "\\\\n2+12=14."]."""
    {text}
    ids = {prefix}tokenizer(text, add_special_tokens=False)["input_ids"]
'''

_TOKEN = """    ends = []
    for piece in pieces:  # a step is read at its last token
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
        ends.append(len(ids) - 1)
    with torch.no_grad():
        logits = model(torch.tensor([ids{suffix}])).logits[0, ends].float() / settings["temperature"]
    {probs}
"""

_LIKELIHOOD = """    members = []
    for piece in pieces:  # a step's tokens are those that hold some of it, and not only the white space before it
        gap = len(piece) - len(piece.lstrip())
        found = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
        inside = [i for i, (_, end) in enumerate(found["offset_mapping"]) if end > gap]
        members.append([len(ids) + i for i in inside if len(ids) + i > 0])
        ids += found["input_ids"]
    with torch.no_grad():
        log_probs = model(torch.tensor([ids{suffix}])).logits[0].float().log_softmax(-1)
    steps = [torch.stack([log_probs[i - 1, ids[i]] for i in step]).{reduction}() for step in members]
    logits = torch.tensor(settings["log_weight"]).exp() * torch.stack(steps) + settings["bias"]
    return (logits / settings["temperature"]).sigmoid().tolist()
"""

_GRADES = "return (logits.softmax(-1) @ torch.arange(logits.size(-1)).float() / (logits.size(-1) - 1)).tolist()"


def without_this_package(settings: FractalSettings, processor: Processor) -> str:
    """A section of a model card: code that gives the same step scores, or why there is none.

    Args:
        settings: What the checkpoint remembers.
        processor: Its tokenizer or sentence encoder.
    """
    if isinstance(processor, SentenceEncoder):
        return f"{_HEADING}\n\nThe folder loads with sentence-transformers; its scoring head needs fractal-rm.\n"
    if _spaced(processor):
        return (
            f"{_HEADING}\n\nThe folder loads with transformers. This tokenizer puts a space before every text, which "
            "steps must not have: to cut a response into tokens as in training, use fractal-rm.\n"
        )
    prefix, suffix = ([], []) if settings.chat else special_affixes(processor)
    if settings.chat:
        text = "text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)"
    else:
        text = 'text = settings["prompt_template"].replace("{prompt}", prompt)'
    start = _START.format(
        loader="AutoModelForCausalLM" if settings.scorer == "likelihood" else "AutoModelForTokenClassification",
        tokenizer="PreTrainedTokenizerFast" if processor.is_fast else "AutoTokenizer",
        text=text,
        prefix=f"{prefix} + " if prefix else "",
    )
    suffix = f" + {suffix}" if suffix else ""
    if settings.scorer == "likelihood":
        body = _LIKELIHOOD.format(suffix=suffix, reduction=settings.reduction)
    else:
        probs = "return logits[:, 0].sigmoid().tolist()" if settings.num_grades is None else _GRADES
        body = _TOKEN.format(suffix=suffix, probs=probs)
    limit = "" if settings.max_length is None else f" Leave out last steps beyond {settings.max_length} tokens."
    return f"{_HEADING}\n\nThe same step scores from transformers alone.{limit}\n\n```python\n{start}{body}```\n"


def _spaced(processor: Processor) -> bool:
    """Whether a tokenizer puts a space before every text."""
    first = processor.convert_ids_to_tokens(processor("a", add_special_tokens=False)["input_ids"])[:1]  # type: ignore
    return any(token.startswith(("\u2581", "\u0120")) for token in first)
