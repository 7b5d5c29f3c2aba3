"""Learns the vocabulary of an own tokenizer from text."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from threading import Thread

from jaxlm.data.tokenizer import Tokenizer, make_tokenizer, merged_from, token_of
from jaxlm.errors import UsageError

SAMPLE_BYTES = 32_000_000  # of training text; with 123 MB of novels, text has 0.2 to 0.3% fewer tokens
_LONGEST_TOKEN = 128  # bytes, as in GPT-2's vocabulary; a row of dashes would become longer ones
_LEAST_COUNT = 2  # of a pair that is merged


def learn_tokenizer(texts: Iterable[str], vocab_size: int, size_flag: str = "--vocab_size") -> Tokenizer:
    """The byte-level BPE tokenizer of `vocab_size` tokens for `texts`, whose order does not matter.

    It starts from single bytes, and merges the most frequent pair of tokens inside the words of GPT-2's pattern, again
    and again (Sennrich et al., 2016, arXiv:1508.07909). Of equally frequent pairs it takes that of the lowest ids. So a
    text gives the same vocabulary on every machine. `texts` are cut only where GPT-2's pattern splits them anyway.

    Raises UsageError, which names `size_flag`, if too few pairs occur twice.
    """
    import tokenizers  # only now, because training with GPT-2's vocabulary does not need it

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's pattern
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=_LEAST_COUNT,
        max_token_length=_LONGEST_TOKEN,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    _wait_for(partial(bpe.train_from_iterator, texts, trainer))
    vocab = bpe.get_vocab()
    tokens = _mergeable([token_of(name) for name in sorted(vocab, key=vocab.__getitem__)])
    if len(tokens) < vocab_size - 1:
        raise UsageError(
            f"the training text gives a vocabulary of {len(tokens) + 1} tokens, not of {vocab_size}: use more text or"
            f" {size_flag}={len(tokens) + 1}"
        )
    return make_tokenizer(tokens)


def _wait_for(call: Callable[[], object]) -> None:
    """Calls in another thread, so that Ctrl-C does not wait: the library looks at no signals. Raises what it raises."""
    done: Future[object] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    Thread(target=run, daemon=True).start()
    done.result()


def _mergeable(tokens: list[bytes]) -> list[bytes]:
    """`tokens` without those that are no merge of two before them: text never encodes to such a token."""
    ids: dict[bytes, int] = {}
    for token in tokens:
        if len(token) == 1 or merged_from(token, ids):
            ids[token] = len(ids)
    return list(ids)
