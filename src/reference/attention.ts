import { ndarray, type NdArray } from "../tensor/ndarray.ts";

export interface AttentionOptions {
  readonly scale: number;
  /** i32 [B, L]: a query sees only keys of its own value. */
  readonly seq_idx?: NdArray | null;
  /** i32 [B, Lk]: the values of keys, by default those of queries (then Lk = L). */
  readonly kv_seq_idx?: NdArray | null;
  /** Default true; false shows every query all keys. */
  readonly causal?: boolean;
  /** Positions of the first query of each half, by default of the last L positions. */
  readonly starts?: readonly [number, number];
}

interface Row {
  /** Offset of the query row in q and in the output. */
  readonly q: number;
  /** Offset of key and value row j. */
  kv(j: number): number;
  /** Keys the query may see, ascending. */
  readonly keys: readonly number[];
  /** Softmax over `keys`; empty when there are none. */
  readonly p: readonly number[];
}

/** Visits every query row (batch, position, head) with its probabilities. */
function forEachRow(q: NdArray, k: NdArray, options: AttentionOptions, visit: (row: Row) => void): void {
  const [B, L, Hq, Dh] = q.shape as [number, number, number, number];
  const [, Lk, Hkv] = k.shape as [number, number, number];
  const seq = options.seq_idx?.data;
  const kvSeq = (options.kv_seq_idx ?? options.seq_idx)?.data;
  const [first, second] = options.starts ?? [Lk - L, Lk - L + L / 2];
  const causal = options.causal ?? true;
  for (let b = 0; b < B; b++) {
    for (let t = 0; t < L; t++) {
      for (let h = 0; h < Hq; h++) {
        const row = ((b * L + t) * Hq + h) * Dh;
        const hkv = Math.floor(h / (Hq / Hkv));
        const kv = (j: number): number => ((b * Lk + j) * Hkv + hkv) * Dh;
        const keys: number[] = [];
        const position = t < L / 2 ? first + t : second + t - L / 2;
        const end = causal ? position + 1 : Lk;
        for (let j = 0; j < end; j++) if (!seq || seq[b * L + t] === kvSeq![b * Lk + j]) keys.push(j);
        const scores = keys.map((j) => {
          let dot = 0;
          for (let d = 0; d < Dh; d++) dot += q.data[row + d]! * k.data[kv(j) + d]!;
          return dot * options.scale;
        });
        const top = Math.max(...scores);
        const weights = scores.map((s) => Math.exp(s - top));
        const total = weights.reduce((sum, w) => sum + w, 0);
        visit({ q: row, kv, keys, p: weights.map((w) => w / total) });
      }
    }
  }
}

/**
 * O = softmax(scale * Q K^T, causal or not) V, with grouped key and value heads.
 *
 * q [B, L, Hq, Dh], k and v [B, Lk, Hkv, Dh], Hq a multiple of Hkv -> [B, L, Hq, Dh]. Query head h uses
 * key/value head floor(h / (Hq / Hkv)). Query t is at absolute position t + (Lk - L), or where `starts` says;
 * where causal it sees keys up to there and Lk >= L.
 */
export function attention(q: NdArray, k: NdArray, v: NdArray, options: AttentionOptions): NdArray {
  const Dh = q.shape[3]!;
  const out = ndarray(q.shape);
  forEachRow(q, k, options, (row) => {
    row.keys.forEach((j, n) => {
      for (let d = 0; d < Dh; d++) out.data[row.q + d]! += row.p[n]! * v.data[row.kv(j) + d]!;
    });
  });
  return out;
}

/**
 * dV = P^T dO, dQ = scale * dS K, dK = scale * dS^T Q, where dS = P * (dO V^T - delta), delta_i = dO_i . O_i.
 */
export function attention_vjp(
  [dout]: readonly (NdArray | null)[], q: NdArray, k: NdArray, v: NdArray, options: AttentionOptions,
): (NdArray | null)[] {
  const Dh = q.shape[3]!;
  const [dq, dk, dv] = [ndarray(q.shape), ndarray(k.shape), ndarray(v.shape)];
  if (!dout) return [dq, dk, dv, null];
  forEachRow(q, k, options, (row) => {
    const dp = row.keys.map((j) => {
      let dot = 0;
      for (let d = 0; d < Dh; d++) dot += dout.data[row.q + d]! * v.data[row.kv(j) + d]!;
      return dot;
    });
    const delta = dp.reduce((sum, x, n) => sum + x * row.p[n]!, 0);
    row.keys.forEach((j, n) => {
      const ds = row.p[n]! * (dp[n]! - delta) * options.scale;
      for (let d = 0; d < Dh; d++) {
        const [iq, ikv] = [row.q + d, row.kv(j) + d];
        dv.data[ikv]! += row.p[n]! * dout.data[iq]!;
        dq.data[iq]! += ds * k.data[ikv]!;
        dk.data[ikv]! += ds * q.data[iq]!;
      }
    });
  });
  return [dq, dk, dv, null];
}
