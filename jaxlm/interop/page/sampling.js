/** The next token: the most likely one at temperature 0, else a random one of the `topK` most likely (0: of all). */
function sample(logits_V, temperature, topK, random) {
    const best = logits_V.reduce((a, b) => Math.max(a, b));
    if (!Number.isFinite(best)) throw new Error("The model's weights are damaged: its numbers are not finite.");
    if (temperature === 0) return logits_V.indexOf(best);
    const atLeast = topK > 0 && topK < logits_V.length ? logits_V.slice().sort()[logits_V.length - topK] : -Infinity;
    const weights_V = new Float64Array(logits_V).map(x => x < atLeast ? 0 : Math.exp((x - best) / temperature));
    let left = random() * weights_V.reduce((a, b) => a + b);
    const token = weights_V.findIndex(weight => (left -= weight) < 0);
    return token < 0 ? logits_V.indexOf(best) : token; // rounding may leave a little
}
