"""How much text an own vocabulary needs: the length of held-out text in tokens, by the size of the sample.

    python -m experiments.vocabulary --corpus "novels/*.txt.xz" --sizes 8192 16384

Every fortieth chunk of the corpus is held out; a sample is spread evenly over the others. The seconds are those of
learning, without reading the text.
"""

import argparse
import time

from jaxlm.config import join_paths
from jaxlm.data.corpus import open_corpus
from jaxlm.data.encode import sample
from jaxlm.data.vocabulary import learn_tokenizer

SAMPLES = (8, 16, 32, 64, 1000)  # MB
EVERY = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", nargs="+", required=True)
    parser.add_argument("--sizes", nargs="+", type=int, default=[8192])
    args = parser.parse_args()
    texts = [chunk.text for chunk in open_corpus(join_paths(args.corpus)).train()]
    held_out = texts[EVERY // 2 :: EVERY]
    others = [text for number, text in enumerate(texts) if number % EVERY != EVERY // 2]
    held_out_bytes, total = (sum(len(text.encode()) for text in each) for each in (held_out, others))
    print("| tokens in the vocabulary | sample, MB | seconds | bytes per token |\n|---|---|---|---|")
    for size in args.sizes:
        for megabytes in SAMPLES:
            taken = list(sample(others, min(1.0, megabytes * 1e6 / total)))
            started = time.monotonic()
            tokenizer = learn_tokenizer(taken, size)
            seconds = time.monotonic() - started
            tokens = sum(len(tokenizer.encode(text)) for text in held_out)
            learnt = sum(len(text.encode()) for text in taken) / 1e6
            print(f"| {size:,} | {learnt:.0f} | {seconds:.1f} | {held_out_bytes / tokens:.4f} |", flush=True)


if __name__ == "__main__":
    main()
