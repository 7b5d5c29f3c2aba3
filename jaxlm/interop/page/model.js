// The decoder of jaxlm/core/model.py, with a cache. A name ends in the shape of its array: T tokens, S positions so far,
// D width, H heads, K head width, F outputs. Arrays are Float32Array; matrices are [outputs, inputs].

/** x times the matrix transposed: [T, F]. Four tokens share each number that is read. */
function linear(x_TD, w_FD, D) {
    const T = x_TD.length / D, F = w_FD.length / D;
    const out_TF = new Float32Array(T * F), x = new Float64Array(x_TD); // converted once, not for each row
    let t = 0;
    for (; t + 4 <= T; t += 4) {
        const x0 = t * D, x1 = x0 + D, x2 = x1 + D, x3 = x2 + D;
        for (let f = 0; f < F; f++) {
            const w_D = w_FD.subarray(f * D, (f + 1) * D);
            let a = 0, b = 0, c = 0, d = 0;
            for (let i = 0; i < D; i++) {
                a += w_D[i] * x[x0 + i];
                b += w_D[i] * x[x1 + i];
                c += w_D[i] * x[x2 + i];
                d += w_D[i] * x[x3 + i];
            }
            out_TF[t * F + f] = a;
            out_TF[(t + 1) * F + f] = b;
            out_TF[(t + 2) * F + f] = c;
            out_TF[(t + 3) * F + f] = d;
        }
    }
    for (; t < T; t++) {
        const x_D = x.subarray(t * D, (t + 1) * D);
        for (let f = 0; f < F; f++) {
            const w_D = w_FD.subarray(f * D, (f + 1) * D);
            let a = 0, b = 0, c = 0, d = 0, i = 0;
            for (; i + 4 <= D; i += 4) {
                a += w_D[i] * x_D[i];
                b += w_D[i + 1] * x_D[i + 1];
                c += w_D[i + 2] * x_D[i + 2];
                d += w_D[i + 3] * x_D[i + 3];
            }
            for (; i < D; i++) a += w_D[i] * x_D[i];
            out_TF[t * F + f] = a + b + c + d;
        }
    }
    return out_TF;
}

/** RMSNorm of each row; rows are as long as the scale. */
function rmsNorm(x_TD, scale_D, eps) {
    const D = scale_D.length, out_TD = new Float32Array(x_TD.length);
    for (let row = 0; row < x_TD.length; row += D) {
        let sum = 0;
        for (let i = 0; i < D; i++) sum += x_TD[row + i] ** 2;
        const inverse = 1 / Math.sqrt(sum / D + eps);
        for (let i = 0; i < D; i++) out_TD[row + i] = x_TD[row + i] * inverse * scale_D[i];
    }
    return out_TD;
}

/** Rotates the pairs (x[i], x[i + K/2]) of each head in place, by the angles of the positions from `start` on. */
function rope(x_THK, T, K, start, theta) {
    const half = K / 2, perToken = x_THK.length / T;
    const angle = new Float32Array(half), cos = new Float32Array(half), sin = new Float32Array(half);
    for (let t = 0; t < T; t++) {
        for (let i = 0; i < half; i++) {
            angle[i] = (start + t) * Math.fround(theta ** (-2 * i / K)); // rounded as jaxlm rounds it
            cos[i] = Math.cos(angle[i]);
            sin[i] = Math.sin(angle[i]);
        }
        for (let head = t * perToken; head < (t + 1) * perToken; head += K) {
            for (let i = 0; i < half; i++) {
                const a = x_THK[head + i], b = x_THK[head + half + i];
                x_THK[head + i] = a * cos[i] - b * sin[i];
                x_THK[head + half + i] = b * cos[i] + a * sin[i];
            }
        }
    }
}

/** Causal attention of the tokens from `start` on to all positions in the cache: [T, H K]. */
function attention(q_THK, { keys, values }, start, c) {
    const D = c.width, K = D / c.heads, KV = K * c.kv_heads;
    const out_THK = new Float32Array(q_THK.length), weights_S = new Float32Array(start + q_THK.length / D);
    for (let q = 0; q < q_THK.length; q += K) {
        const S = start + Math.floor(q / D) + 1;
        const head = Math.floor((q % D) / K * c.kv_heads / c.heads) * K; // queries share heads of keys and values
        let best = -Infinity, sum = 0;
        for (let s = 0, k = head; s < S; s++, k += KV) {
            let dot = 0;
            for (let i = 0; i < K; i++) dot += q_THK[q + i] * keys[k + i];
            weights_S[s] = dot / Math.sqrt(K);
            if (weights_S[s] > best) best = weights_S[s];
        }
        for (let s = 0; s < S; s++) sum += weights_S[s] = Math.exp(weights_S[s] - best);
        for (let s = 0, v = head; s < S; s++, v += KV) {
            const weight = weights_S[s] / sum;
            for (let i = 0; i < K; i++) out_THK[q + i] += weight * values[v + i];
        }
    }
    return out_THK;
}

/** silu(gate) * up, in place of gate. */
function swiglu(gate_TF, up_TF) {
    for (let i = 0; i < gate_TF.length; i++) gate_TF[i] *= up_TF[i] / (1 + Math.exp(-gate_TF[i]));
    return gate_TF;
}

function addTo(x_TD, y_TD) {
    for (let i = 0; i < x_TD.length; i++) x_TD[i] += y_TD[i];
}

/** A cache with room for the whole context: keys and values of each block. */
function emptyCache(c) {
    const size = c.context * c.kv_heads * c.width / c.heads;
    return Array.from({ length: c.layers }, () => ({ keys: new Float32Array(size), values: new Float32Array(size) }));
}

/** Reads the tokens at the positions from `start` on into the cache; returns the residual stream after the last, [D]. */
function forward(c, weights, cache, ids, start) {
    const T = ids.length, D = c.width, K = D / c.heads;
    const x_TD = new Float32Array(T * D);
    ids.forEach((id, t) => x_TD.set(weights.embedding.subarray(id * D, (id + 1) * D), t * D));
    weights.blocks.forEach((p, layer) => {
        const h_TD = rmsNorm(x_TD, p.attention_norm, c.norm_eps);
        let q = linear(h_TD, p.query, D), k = linear(h_TD, p.key, D);
        if (c.qk_norm) {
            q = rmsNorm(q, p.query_norm, c.norm_eps);
            k = rmsNorm(k, p.key_norm, c.norm_eps);
        }
        rope(q, T, K, start, c.rope_theta);
        rope(k, T, K, start, c.rope_theta);
        cache[layer].keys.set(k, start * K * c.kv_heads);
        cache[layer].values.set(linear(h_TD, p.value, D), start * K * c.kv_heads);
        addTo(x_TD, linear(attention(q, cache[layer], start, c), p.output, D));
        const m_TD = rmsNorm(x_TD, p.mlp_norm, c.norm_eps);
        addTo(x_TD, linear(swiglu(linear(m_TD, p.gate, D), linear(m_TD, p.up, D)), p.down, c.mlp_width));
    });
    return x_TD.subarray((T - 1) * D);
}

/** The logits of the next token, [V]. */
function logits(c, weights, x_D) {
    return linear(rmsNorm(x_D, weights.norm, c.norm_eps), weights.head ?? weights.embedding, c.width);
}
