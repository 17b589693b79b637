import { e4m3ToF32, f32ToE4m3 } from "../tensor/dtype.ts";
import { ndarray, type NdArray } from "../tensor/ndarray.ts";

/** The values of E4M3 codes, four to a word along the last dimension, times a scale. */
function decoded(words: NdArray, scale: number): NdArray {
  const shape = [...words.shape.slice(0, -1), 4 * words.shape.at(-1)!];
  return ndarray(shape, Float64Array.from({ length: 4 * words.data.length }, (_, i) =>
    Math.fround(e4m3ToF32((words.data[i >> 2]! >>> (8 * (i & 3))) & 0xff) * scale)));
}


/**
 * o = softmax(scale * q K^T) V over positions 0 .. position + t of a cache: few new tokens per sequence.
 *
 * q [B, L, Hq, Dh], caches [B, Hkv, Lmax, Dh], position u32 [1] -> [B, L, Hq, Dh]. Query head h uses
 * key/value head floor(h / (Hq / Hkv)). With scales the caches are [B, Hkv, Lmax, Dh / 4] words of E4M3
 * codes.
 */
export function decode_attention(
  q: NdArray, kWords: NdArray, vWords: NdArray, position: NdArray, scale: number,
  kScale: number | null = null, vScale: number | null = null,
): NdArray {
  const kCache = kScale ? decoded(kWords, kScale) : kWords;
  const vCache = vScale ? decoded(vWords, vScale) : vWords;
  const [B, L, Hq, Dh] = q.shape as [number, number, number, number];
  const [, Hkv, Lmax] = kCache.shape as [number, number, number];
  const out = ndarray(q.shape);
  for (let b = 0; b < B; b++) {
    for (let t = 0; t < L; t++) {
      const count = Math.min(position.data[0]! + t + 1, Lmax);
      for (let h = 0; h < Hq; h++) {
        const row = ((b * L + t) * Hq + h) * Dh;
        const base = (b * Hkv + Math.floor(h / (Hq / Hkv))) * Lmax * Dh;
        const scores = Array.from({ length: count }, (_, j) => {
          let dot = 0;
          for (let d = 0; d < Dh; d++) dot += q.data[row + d]! * kCache.data[base + j * Dh + d]!;
          return dot * scale;
        });
        const top = Math.max(...scores);
        const weights = scores.map((s) => Math.exp(s - top));
        const total = weights.reduce((sum, w) => sum + w, 0);
        for (let j = 0; j < count; j++) {
          for (let d = 0; d < Dh; d++) {
            out.data[row + d]! += weights[j]! / total * vCache.data[base + j * Dh + d]!;
          }
        }
      }
    }
  }
  return out;
}

/**
 * cache[b, h, position + t] = x[b, t, h], in place; rows beyond Lmax are dropped. x [B, L, Hkv, Dh]. With a
 * scale the cache is [B, Hkv, Lmax, Dh / 4] words of the E4M3 codes of x / scale.
 */
export function cache_write(
  cache: NdArray, x: NdArray, position: NdArray, scale: number | null = null,
): NdArray {
  const [B, Hkv, Lmax, width] = cache.shape as [number, number, number, number];
  const [L, Dh] = [x.shape[1]!, x.shape[3]!];
  for (let b = 0; b < B; b++) {
    for (let t = 0; t < L; t++) {
      const at = position.data[0]! + t;
      if (at >= Lmax) continue;
      for (let h = 0; h < Hkv; h++) {
        const to = ((b * Hkv + h) * Lmax + at) * width;
        for (let d = 0; d < Dh; d++) {
          const value = x.data[((b * L + t) * Hkv + h) * Dh + d]!;
          if (!scale) {
            cache.data[to + d] = value;
            continue;
          }
          const code = f32ToE4m3(Math.fround(value / scale));
          if (d % 4 === 0) cache.data[to + d / 4] = 0;
          cache.data[to + (d >> 2)]! += code * 256 ** (d % 4);
        }
      }
    }
  }
  return cache;
}

/**
 * y[b, t, h] = cache[b, h, t] for t < length. cache [B, Hkv, Lmax, Dh] -> [B, length, Hkv, Dh]. With a scale
 * the cache is [B, Hkv, Lmax, Dh / 4] words of E4M3 codes.
 */
export function cache_read(words: NdArray, length: number, scale: number | null = null): NdArray {
  const cache = scale ? decoded(words, scale) : words;
  const [B, Hkv, Lmax, Dh] = cache.shape as [number, number, number, number];
  const y = ndarray([B, length, Hkv, Dh]);
  for (let b = 0; b < B; b++) {
    for (let t = 0; t < length; t++) {
      for (let h = 0; h < Hkv; h++) {
        for (let d = 0; d < Dh; d++) {
          y.data[((b * length + t) * Hkv + h) * Dh + d] = cache.data[((b * Hkv + h) * Lmax + t) * Dh + d]!;
        }
      }
    }
  }
  return y;
}
