// The byte-level BPE tokenizer of jaxlm/data/tokenizer.py.

const WHITE = "\\p{White_Space}"; // JavaScript's own \s differs from it in two characters
const WORDS = new RegExp(
    `'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^${WHITE}\\p{L}\\p{N}]+|${WHITE}+(?!\\P{White_Space})|${WHITE}`, "gu");

class Tokenizer {
    /** `packed`: the 256 bytes that are the first tokens, then for each other token the two that merge into it. */
    constructor(packed) {
        const pairs = new Uint16Array(packed.slice(256).buffer);
        this.bytes = Array.from(packed.subarray(0, 256), byte => Uint8Array.of(byte)); // of each token
        this.idOfByte = new Uint16Array(256);
        this.bytes.forEach(([byte], id) => this.idOfByte[byte] = id);
        this.merged = new Map(); // two tokens -> the token that they make
        for (let i = 0; i < pairs.length; i += 2) {
            this.merged.set(pairs[i] * 65536 + pairs[i + 1], this.bytes.length);
            this.bytes.push(Uint8Array.of(...this.bytes[pairs[i]], ...this.bytes[pairs[i + 1]]));
        }
        this.endOfText = this.bytes.length;
    }

    /** The ids of a text. A lone surrogate, which UTF-8 does not allow, is encoded as "?". */
    encode(text) {
        const utf8 = new TextEncoder();
        const words = text.replace(/\p{Surrogate}/gu, "?").match(WORDS) ?? [];
        return words.flatMap(word => this.merge(Array.from(utf8.encode(word), byte => this.idOfByte[byte])));
    }

    /** Merges the pair that makes the lowest id, the first of them, until no pair makes a token. */
    merge(ids) {
        const made = (left, right) => this.merged.get(left * 65536 + right) ?? Infinity;
        const next = ids.slice(1).map((id, i) => made(ids[i], id)); // what each token and the one after it make
        while (next.length) {
            let first = 0;
            for (let i = 1; i < next.length; i++) if (next[i] < next[first]) first = i;
            if (next[first] === Infinity) break;
            ids.splice(first, 2, next[first]);
            next.splice(first, 1);
            if (first > 0) next[first - 1] = made(ids[first - 1], ids[first]);
            if (first < next.length) next[first] = made(ids[first], ids[first + 1]);
        }
        return ids;
    }
}
