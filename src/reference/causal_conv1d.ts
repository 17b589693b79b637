import { ndarray, type NdArray } from "../tensor/ndarray.ts";
import { connected } from "./documents.ts";

const sigmoid = (v: number): number => 1 / (1 + Math.exp(-v));

/** The input of channel c at time t (t < 0 reads the history) as position `at` of the same row sees it. */
function input(
  x: NdArray, K: number, initial_state: NdArray | null, seq_idx: NdArray | null,
  b: number, t: number, c: number, at: number,
): number {
  const [, L, C] = x.shape as [number, number, number];
  if (!connected(seq_idx, b, Math.max(t, -1), at)) return 0;
  if (t >= 0) return x.data[(b * L + t) * C + c]!;
  return initial_state !== null && t >= -K ? initial_state.data[(b * C + c) * K + K + t]! : 0;
}

/**
 * y[t,c] = silu(bias[c] + sum_j weight[c,j] x[t-K+1+j, c]), and the last K inputs, oldest first, unless
 * `wants_state` is false.
 *
 * @param x             [B,L,C]
 * @param weight        [C,K]; weight[c,K-1] multiplies the current position
 * @param bias          [C] or null
 * @param initial_state [B,C,K] the K inputs before the row (newest last), or null for zeros
 * @param seq_idx       [B,L] or null; inputs of another document count as zero
 * @returns             y [B,L,C] and final_state [B,C,K]
 */
export function causal_conv1d(
  x: NdArray, weight: NdArray, bias: NdArray | null, initial_state: NdArray | null, seq_idx: NdArray | null,
  wants_state = true,
): [NdArray, ...NdArray[]] {
  const [B, L, C] = x.shape as [number, number, number];
  const K = weight.shape[1]!;
  const y = ndarray([B, L, C]);
  const final_state = ndarray([B, C, K]);
  for (let b = 0; b < B; b++) {
    for (let c = 0; c < C; c++) {
      for (let t = 0; t < L; t++) {
        const v = pre_activation(x, weight, bias, initial_state, seq_idx, b, t, c);
        y.data[(b * L + t) * C + c] = v * sigmoid(v);
      }
      for (let k = 0; k < K; k++) {
        final_state.data[(b * C + c) * K + k] = input(x, K, initial_state, seq_idx, b, L - K + k, c, L - 1);
      }
    }
  }
  return wants_state ? [y, final_state] : [y];
}

function pre_activation(
  x: NdArray, weight: NdArray, bias: NdArray | null, initial_state: NdArray | null, seq_idx: NdArray | null,
  b: number, t: number, c: number,
): number {
  const K = weight.shape[1]!;
  let v = bias === null ? 0 : bias.data[c]!;
  for (let j = 0; j < K; j++) {
    v += weight.data[c * K + j]! * input(x, K, initial_state, seq_idx, b, t - K + 1 + j, c, t);
  }
  return v;
}

/** Gradients of `causal_conv1d` for (x, weight, bias, initial_state, seq_idx); none reaches initial_state. */
export function causal_conv1d_vjp(
  [dy, dfinal]: readonly (NdArray | null)[],
  x: NdArray, weight: NdArray, bias: NdArray | null, initial_state: NdArray | null, seq_idx: NdArray | null,
): (NdArray | null)[] {
  const [B, L, C] = x.shape as [number, number, number];
  const K = weight.shape[1]!;
  const dx = ndarray(x.shape);
  const dweight = ndarray(weight.shape);
  const dbias = ndarray([C]);
  for (let b = 0; b < B; b++) {
    for (let t = 0; t < L; t++) {
      for (let c = 0; c < C; c++) {
        const v = pre_activation(x, weight, bias, initial_state, seq_idx, b, t, c);
        const s = sigmoid(v);
        const dv = dy ? dy.data[(b * L + t) * C + c]! * s * (1 + v * (1 - s)) : 0;
        dbias.data[c]! += dv;
        for (let j = 0; j < K; j++) {
          const from = t - K + 1 + j;
          dweight.data[c * K + j]! += dv * input(x, K, initial_state, seq_idx, b, from, c, t);
          if (from >= 0 && connected(seq_idx, b, from, t)) {
            dx.data[(b * L + from) * C + c]! += dv * weight.data[c * K + j]!;
          }
        }
      }
    }
    for (let t = Math.max(0, L - K); dfinal && t < L; t++) {
      if (!connected(seq_idx, b, t, L - 1)) continue;
      for (let c = 0; c < C; c++) dx.data[(b * L + t) * C + c]! += dfinal.data[(b * C + c) * K + t - L + K]!;
    }
  }
  return [dx, dweight, bias === null ? null : dbias, null, null];
}

/**
 * One decode step: shifts xBC [B,C] into `state` [B,C,K] and returns silu(bias + sum_j weight[c,j]
 * state[c,j]) [B,C]. `state` changes in place.
 */
export function causal_conv1d_update(
  state: NdArray, xBC: NdArray, weight: NdArray, bias: NdArray | null,
): NdArray {
  const [B, C, K] = state.shape as [number, number, number];
  const y = ndarray([B, C]);
  for (let b = 0; b < B; b++) {
    for (let c = 0; c < C; c++) {
      const row = (b * C + c) * K;
      let v = bias === null ? 0 : bias.data[c]!;
      for (let k = 0; k < K; k++) {
        state.data[row + k] = k + 1 < K ? state.data[row + k + 1]! : xBC.data[b * C + c]!;
        v += weight.data[c * K + k]! * state.data[row + k]!;
      }
      y.data[b * C + c] = v * sigmoid(v);
    }
  }
  return y;
}
