import { ndarray, type NdArray } from "../tensor/ndarray.ts";
import { connected } from "./documents.ts";

/**
 * The state entering each chunk: prev[0] = initial_state, prev[c+1] = exp(a_last[c]) prev[c] + states[c];
 * prev[nC] is final.
 *
 * A state passes through a chunk only if no document starts inside it or at its first position.
 *
 * @param states        [B,nC,H,P,N] what each chunk adds
 * @param dA_cumsum     [B,H,nC,Q]
 * @param initial_state [B,H,P,N] or null for zeros; the first document of a row continues it
 * @param seq_idx       [B,L] or null
 * @returns             prev_states [B,nC,H,P,N] and final_state [B,H,P,N]
 */
export function state_passing(
  states: NdArray, dA_cumsum: NdArray, initial_state: NdArray | null, seq_idx: NdArray | null,
): [NdArray, NdArray] {
  const [B, nchunks, H, P, N] = states.shape as [number, number, number, number, number];
  const prev_states = ndarray(states.shape);
  const final_state = ndarray([B, H, P, N]);
  for (let b = 0; b < B; b++) {
    for (let h = 0; h < H; h++) {
      for (let i = 0; i < P * N; i++) {
        let S = initial_state === null ? 0 : initial_state.data[(b * H + h) * P * N + i]!;
        for (let c = 0; c < nchunks; c++) {
          const at = ((b * nchunks + c) * H + h) * P * N + i;
          prev_states.data[at] = S;
          S = passes(dA_cumsum, seq_idx, b, h, c) * S + states.data[at]!;
        }
        final_state.data[(b * H + h) * P * N + i] = S;
      }
    }
  }
  return [prev_states, final_state];
}

/** The share of a state that chunk c lets through: exp(a_last), or 0 across a document boundary. */
function passes(dA_cumsum: NdArray, seq_idx: NdArray | null, b: number, h: number, c: number): number {
  const [, H, nchunks, Q] = dA_cumsum.shape as [number, number, number, number];
  const end = Math.min((c + 1) * Q, seq_idx === null ? Infinity : seq_idx.shape[1]!) - 1;
  const a_last = dA_cumsum.data[((b * H + h) * nchunks + c) * Q + Q - 1]!;
  return connected(seq_idx, b, c * Q - 1, end) ? Math.exp(a_last) : 0;
}

/** Gradients of `state_passing` for (states, dA_cumsum, initial_state, seq_idx). */
export function state_passing_vjp(
  [dprev, dfinal]: readonly (NdArray | null)[],
  states: NdArray, dA_cumsum: NdArray, initial_state: NdArray | null, seq_idx: NdArray | null,
): (NdArray | null)[] {
  const [B, nchunks, H, P, N] = states.shape as [number, number, number, number, number];
  const Q = dA_cumsum.shape[3]!;
  const [prev_states] = state_passing(states, dA_cumsum, initial_state, seq_idx);
  const dstates = ndarray(states.shape);
  const dcumsum = ndarray(dA_cumsum.shape);
  const dinitial = ndarray([B, H, P, N]);
  for (let b = 0; b < B; b++) {
    for (let h = 0; h < H; h++) {
      for (let i = 0; i < P * N; i++) {
        let dS = dfinal ? dfinal.data[(b * H + h) * P * N + i]! : 0;
        for (let c = nchunks - 1; c >= 0; c--) {
          const at = ((b * nchunks + c) * H + h) * P * N + i;
          const share = passes(dA_cumsum, seq_idx, b, h, c);
          dstates.data[at] = dS;
          dcumsum.data[((b * H + h) * nchunks + c) * Q + Q - 1]! += share * dS * prev_states.data[at]!;
          dS = share * dS + (dprev ? dprev.data[at]! : 0);
        }
        dinitial.data[(b * H + h) * P * N + i] = dS;
      }
    }
  }
  return [dstates, dcumsum, initial_state === null ? null : dinitial, null];
}
