import type { NdArray } from "../tensor/ndarray.ts";

/**
 * Whether positions `from` and `to` (from <= to) of batch row `b` lie in one document of seq_idx [B,L].
 *
 * Any change of value between neighbours starts a new document, so equal values with another document between
 * them are not connected. Position -1 stands for what came before the row (an initial state), which the first
 * document continues.
 */
export function connected(seq_idx: NdArray | null, b: number, from: number, to: number): boolean {
  if (seq_idx === null) return true;
  const row = b * seq_idx.shape[1]!;
  for (let t = Math.max(from, 0) + 1; t <= to; t++) {
    if (seq_idx.data[row + t] !== seq_idx.data[row + t - 1]) return false;
  }
  return true;
}
