"""The miniature's tokenizer: byte-level BPE with Qwen2's split pattern and chat template, some 450 tokens.

Learnt from captions without their words, so that no merge ever joins two capitals and every letter of a word stays a
token of its own; the frames of the JSON schema are added tokens, which makes a caption about thirty tokens long.
Qwen's own has 151 936 tokens and the same special tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ideogram_app.generation.captions import wrap_plain
from training.miniature import scenes

# Qwen2's split pattern (tokenizer.json of Qwen/Qwen2-7B, Apache-2.0): contractions, words, single digits, punctuation.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
FRAMES = (
    '{"compositional_deconstruction":{"background":"',
    '","elements":[',
    '{"type":"obj","desc":"',
    '{"type":"text","text":"',
    '","desc":"',
    '"},',
    '"}]}}',
    wrap_plain("|").split("|")[0].split('{"compositional_deconstruction":{"background":"","elements":[')[1],
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(captions: int = 4000, vocabulary: int = 460) -> PreTrainedTokenizerFast:
    """Learn the tokenizer from generated captions; the same result on every run."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(captions), trainer)
    tokenizer.add_tokens([AddedToken(frame, normalized=False) for frame in FRAMES])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
    )


def _corpus(captions: int) -> Iterator[str]:
    rng = random.Random(0)
    names = (*scenes.COLOURS, *scenes.BACKGROUNDS, *scenes.RADII, *scenes.SHAPES)  # as JSON has them, without a space
    for _ in range(captions):
        scene = replace(scenes.sample_scene(rng), word=None)
        yield scenes.to_plain(scenes.blur(scene, rng) if scene.things else scene)
        yield f"{rng.choice(names)}\nuser\nassistant\n the word in white letters black letters capital letters"
