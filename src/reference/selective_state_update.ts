import { ndarray, type NdArray } from "../tensor/ndarray.ts";
import { time_step } from "./time_step.ts";

/**
 * One decode step of the recurrence: S <- exp(dt A) S + dt x (outer) B, y = S C + D x. `state` is changed.
 *
 * @param state   [B,H,P,N]
 * @param x       [B,H,P]
 * @param dt_raw  [B,H]
 * @param A_log   [H]; A = -exp(A_log)
 * @param B       [B,G,N]
 * @param C       [B,G,N]
 * @param D       [H]
 * @param dt_bias [H]
 * @returns       y [B,H,P]
 */
export function selective_state_update(
  state: NdArray, x: NdArray, dt_raw: NdArray, A_log: NdArray, B: NdArray, C: NdArray, D: NdArray,
  dt_bias: NdArray, dt_limit: readonly [number, number],
): NdArray {
  const [batch, H, P, N] = state.shape as [number, number, number, number];
  const G = B.shape[1]!;
  const y = ndarray([batch, H, P]);
  for (let b = 0; b < batch; b++) {
    for (let h = 0; h < H; h++) {
      const dt = time_step(dt_raw.data[b * H + h]! + dt_bias.data[h]!, dt_limit);
      const keep = Math.exp(-dt * Math.exp(A_log.data[h]!));
      const row = (b * G + Math.floor(h / (H / G))) * N;
      for (let p = 0; p < P; p++) {
        const xi = (b * H + h) * P + p;
        let v = D.data[h]! * x.data[xi]!;
        for (let n = 0; n < N; n++) {
          state.data[xi * N + n] = keep * state.data[xi * N + n]! + dt * x.data[xi]! * B.data[row + n]!;
          v += state.data[xi * N + n]! * C.data[row + n]!;
        }
        y.data[xi] = v;
      }
    }
  }
  return y;
}
