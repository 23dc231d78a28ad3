"""The byte-level BPE tokenizer of builtin:tiny and the token stream of a split.

4,096 ids, every byte representable, indentation merged with the line end before it. Three special tokens and a ChatML
template. Knows nothing of files or models. Neighbours: corpus.py gives documents, train.py and evaluate.py read ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tiny_training.corpus import Document

VOCAB_SIZE = 4096
FILES = ("tokenizer.json", "tokenizer_config.json")
END_OF_TEXT, IM_START, IM_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# Words with one leading sign, numbers of up to three digits, runs of signs, line ends with indentation, spaces.
SPLIT_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+ *|\s+(?!\S)|\s+"

CHAT_TEMPLATE = (  # tools stand in the system message, as `buddymoe_ray.tasks` writes it
    "{% if tools %}{% set own = messages[0]['role'] == 'system' %}{{ '<|im_start|>system\n' }}"
    "{{ messages[0]['content'] + '\n' if own else '' }}{{ 'Tools: ' }}{% for tool in tools %}"
    "{{ tool['function']['name'] + '(' }}"
    "{{ tool['function'].get('parameters', {}).get('properties', {}) | join(', ') }}{{ ')' if loop.last else '), ' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{% if not (own and loop.first) %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '<tool_call>\n{\"name\": ' + (call['function']['name'] | tojson) }}"
    "{{ ', \"arguments\": ' + (call['function']['arguments'] | tojson) + '}\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Learn the merges; special tokens take ids 0, 1, 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[IM_START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write tokenizer.json and a tokenizer_config.json that holds the chat template."""
    tokenizer.save_pretrained(folder, save_jinja_files=False)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load what `save_tokenizer` wrote."""
    return AutoTokenizer.from_pretrained(folder)


def render(document: Document, tokenizer: PreTrainedTokenizerBase) -> str:
    """A chat document through the template, any other document as it is."""
    if document.kind != "chat":
        return document.text
    messages = [
        {"role": "user", "content": document.question},
        {"role": "assistant", "content": f"```python\n{document.text}\n```"},
    ]
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


def encode_documents(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """Token ids (uint16) of each document, <|endoftext|> at its end."""
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    encoded: list[np.ndarray] = []
    for start in range(0, len(documents), 64):
        texts = [render(d, tokenizer) for d in documents[start : start + 64]]
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            encoded.append(np.asarray([*ids, end], dtype=np.uint16))
    return encoded
