// The worker: loads the model, then writes as long as the page asks for more.

const READ_AT_ONCE = 16; // tokens of the beginning
const SLICE = 50; // milliseconds between two messages

/** Continues a text. Yields new text, or how much is read of what the model reads before. */
function* write({ config, weights, tokenizer }, { text, temperature, topK, tokens }) {
    const { context } = config, cache = emptyCache(config);
    const utf8 = new TextDecoder("utf-8", { ignoreBOM: true }); // keeps the bytes of an unfinished character
    let ids = tokenizer.encode(text.slice(-32 * context)), read = 0, x_D;
    if (!ids.length) ids = [tokenizer.endOfText];
    for (let count = 0; count < tokens; count++) {
        for (; ids.length >= context; read = 0) ids = ids.slice(Math.ceil(context / 2)); // the window slides
        while (read < ids.length) {
            const next = ids.slice(read, read + READ_AT_ONCE);
            x_D = forward(config, weights, cache, next, read);
            read += next.length;
            if (read < ids.length) yield { reading: read / ids.length };
        }
        const token = sample(logits(config, weights, x_D), temperature, topK, Math.random);
        if (token === tokenizer.endOfText) return { text: utf8.decode(), ended: true };
        ids.push(token);
        yield { text: utf8.decode(tokenizer.bytes[token], { stream: true }), tokens: 1 };
    }
    return { text: utf8.decode() };
}

const model = { weights: { blocks: [] } };
let writing;

const HANDLERS = {
    start({ config, vocabulary }) {
        model.config = config;
        model.tokenizer = new Tokenizer(fromBase64(vocabulary));
    },
    tensor({ name, layer, dtype, text }) {
        const { weights } = model, group = layer === undefined ? weights : (weights.blocks[layer] ??= {});
        group[name] = UNPACK[dtype](fromBase64(text));
    },
    write(settings) {
        writing = write(model, settings);
    },
    more() {
        const until = performance.now() + SLICE, total = { text: "", tokens: 0 };
        let step;
        do {
            step = writing.next();
            const { text = "", tokens = 0, reading = 0, ended = false } = step.value;
            Object.assign(total, { text: total.text + text, tokens: total.tokens + tokens, reading, ended });
        } while (!step.done && performance.now() < until);
        return { ...total, done: step.done };
    },
};

onmessage = ({ data: { call, ...rest } }) => {
    try {
        postMessage(HANDLERS[call](rest) ?? {});
    } catch (error) {
        postMessage({ error: error.message });
    }
};
