// From the text of the file to numbers.

function fromBase64(text) {
    const binary = atob(text), bytes = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
    return bytes;
}

/** Every float16 as a float32, by its bits. */
const FLOAT16 = Float32Array.from({ length: 65536 }, (_, bits) => {
    const sign = bits >> 15 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = (bits & 1023) / 1024;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction) : 2 ** -14 * fraction);
});

/** The numbers of a tensor, by the name of how they are stored: [N] Float32Array. */
const UNPACK = {
    f32: bytes => new Float32Array(bytes.buffer),
    f16: bytes => {
        const bits_N = new Uint16Array(bytes.buffer), out_N = new Float32Array(bits_N.length);
        for (let i = 0; i < out_N.length; i++) out_N[i] = FLOAT16[bits_N[i]]; // thirty times as fast as Float32Array.from
        return out_N;
    },
    /** Blocks of a float16 scale and 32 signed bytes, as in a GGUF file. */
    q8_0: bytes => {
        const view = new DataView(bytes.buffer), values = new Int8Array(bytes.buffer);
        const out_N = new Float32Array(bytes.length / 34 * 32);
        for (let block = 0, i = 0; block < bytes.length; block += 34) {
            const scale = FLOAT16[view.getUint16(block, true)];
            for (let j = block + 2; j < block + 34; j++) out_N[i++] = scale * values[j];
        }
        return out_N;
    },
};
