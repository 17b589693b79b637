import { ndarray, type NdArray } from "../tensor/ndarray.ts";

/**
 * o = softmax(scale * q K^T) V over positions 0 .. position + t of a cache: few new tokens per sequence.
 *
 * q [B, L, Hq, Dh], caches [B, Hkv, Lmax, Dh], position u32 [1] -> [B, L, Hq, Dh]. Query head h uses
 * key/value head floor(h / (Hq / Hkv)).
 */
export function decode_attention(
  q: NdArray, kCache: NdArray, vCache: NdArray, position: NdArray, scale: number,
): NdArray {
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

/** cache[b, h, position + t] = x[b, t, h], in place; rows beyond Lmax are dropped. x [B, L, Hkv, Dh]. */
export function cache_write(cache: NdArray, x: NdArray, position: NdArray): NdArray {
  const [B, Hkv, Lmax, Dh] = cache.shape as [number, number, number, number];
  const L = x.shape[1]!;
  for (let b = 0; b < B; b++) {
    for (let t = 0; t < L; t++) {
      const at = position.data[0]! + t;
      if (at >= Lmax) continue;
      for (let h = 0; h < Hkv; h++) {
        for (let d = 0; d < Dh; d++) {
          cache.data[((b * Hkv + h) * Lmax + at) * Dh + d] = x.data[((b * L + t) * Hkv + h) * Dh + d]!;
        }
      }
    }
  }
  return cache;
}

/** y[b, t, h] = cache[b, h, t] for t < length. cache [B, Hkv, Lmax, Dh] -> [B, length, Hkv, Dh]. */
export function cache_read(cache: NdArray, length: number): NdArray {
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
