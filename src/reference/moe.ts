import { ndarray, type NdArray } from "../tensor/ndarray.ts";

type Grads = readonly (NdArray | null)[];

/** counts [E] plus the number of choices topk_idx [T, K] of each expert; numbers from E on do not count. */
export function expert_load(counts: NdArray, topk_idx: NdArray): NdArray {
  const sums = ndarray(counts.shape, counts.data.slice());
  for (const e of topk_idx.data) if (e < sums.data.length) sums.data[e]! += 1;
  return sums;
}

/**
 * bias_e + rate * sign(mean(counts) - counts_e): what `update_expert_bias` leaves in bias [E];
 * bias itself where gate [1] is negative.
 */
export function update_expert_bias(
  bias: NdArray, counts: NdArray, rate: number, gate: NdArray | null = null,
): NdArray {
  if (gate && gate.data[0]! < 0) return bias;
  const total = counts.data.reduce((a, b) => a + b, 0);
  // Compared as integers: a quotient could miss the balanced case.
  const sign = (e: number): number => Math.sign(total - counts.data[e]! * bias.data.length);
  return ndarray(bias.shape, bias.data.map((value, e) => value + rate * sign(e)));
}

/** The T * K choices sorted by expert. */
interface Plan {
  /** [E + 1]: expert e owns the sorted slots offsets[e] .. offsets[e + 1]. */
  readonly offsets: NdArray;
  /** [T * K]: sorted slot to choice t * K + k. */
  readonly slot_token: NdArray;
  /** [T * K]: choice to sorted slot. */
  readonly token_slot: NdArray;
}

/** Stable sort of the choices topk_idx [T, K] by expert. */
export function moe_plan(topk_idx: NdArray, E: number): Plan {
  const offsets = ndarray([E + 1]);
  const slot_token = ndarray([topk_idx.data.length]);
  const token_slot = ndarray([topk_idx.data.length]);
  let slot = 0;
  for (let e = 0; e < E; e++) {
    offsets.data[e] = slot;
    topk_idx.data.forEach((expert, choice) => {
      if (expert !== e) return;
      slot_token.data[slot] = choice;
      token_slot.data[choice] = slot++;
    });
  }
  offsets.data[E] = slot;
  return { offsets, slot_token, token_slot };
}

/** Rows of x [T, D] in sorted order: y [T * K, D], y[slot] = x[floor(slot_token[slot] / K)]. */
export function moe_permute(x: NdArray, { slot_token }: Plan, K: number): NdArray {
  const D = x.shape[1]!;
  const y = ndarray([slot_token.data.length, D]);
  slot_token.data.forEach((choice, slot) => {
    const t = Math.floor(choice / K);
    for (let d = 0; d < D; d++) y.data[slot * D + d] = x.data[t * D + d]!;
  });
  return y;
}

/** dx[t] = sum over the K slots of token t of dy[slot]. */
export function moe_permute_vjp(
  [dy]: Grads, x: NdArray, { slot_token }: Plan, K: number,
): (NdArray | null)[] {
  const D = x.shape[1]!;
  const dx = ndarray(x.shape);
  if (dy) {
    slot_token.data.forEach((choice, slot) => {
      const t = Math.floor(choice / K);
      for (let d = 0; d < D; d++) dx.data[t * D + d]! += dy.data[slot * D + d]!;
    });
  }
  return [dx, null, null];
}

/** out[t] = sum_k topk_weight[t, k] * y[token_slot[t * K + k]]; y [T * K, D], topk_weight [T, K]; [T, D]. */
export function moe_unpermute(
  y: NdArray, topk_weight: NdArray, { token_slot }: Plan, base: NdArray | null = null,
): NdArray {
  const [T, K] = topk_weight.shape as [number, number];
  const D = y.shape[1]!;
  const out = ndarray([T, D], base?.data.slice());
  token_slot.data.forEach((slot, choice) => {
    const t = Math.floor(choice / K);
    for (let d = 0; d < D; d++) out.data[t * D + d]! += topk_weight.data[choice]! * y.data[slot * D + d]!;
  });
  return out;
}

/** dy[slot] = topk_weight * dout[t]; dtopk_weight[t, k] = dot(dout[t], y[slot]). */
export function moe_unpermute_vjp(
  [dout]: Grads, y: NdArray, topk_weight: NdArray, { token_slot }: Plan, base: NdArray | null = null,
): (NdArray | null)[] {
  const K = topk_weight.shape[1]!;
  const D = y.shape[1]!;
  const dy = ndarray(y.shape);
  const dweight = ndarray(topk_weight.shape);
  if (dout) {
    token_slot.data.forEach((slot, choice) => {
      const t = Math.floor(choice / K);
      for (let d = 0; d < D; d++) {
        dy.data[slot * D + d] = topk_weight.data[choice]! * dout.data[t * D + d]!;
        dweight.data[choice]! += dout.data[t * D + d]! * y.data[slot * D + d]!;
      }
    });
  }
  return [dy, dweight, null, (base && dout) ?? null];
}
