import { ndarray, type NdArray } from "../tensor/ndarray.ts";
import { time_step } from "./time_step.ts";

/**
 * One decode step of the recurrence: S <- exp(dt A) S + dt x (outer) B, y = S C + D x. `state` is changed.
 *
 * @param state   [B,H,P,N]
 * @param xBC     [B, H P + 2 G N]: x [H,P], B [G,N] and C [G,N] after each other
 * @param dt_raw  [B,H]
 * @param A_log   [H]; A = -exp(A_log)
 * @param D       [H]
 * @param dt_bias [H]
 * @returns       y [B,H,P]
 */
export function selective_state_update(
  state: NdArray, xBC: NdArray, dt_raw: NdArray, A_log: NdArray, D: NdArray, dt_bias: NdArray,
  dt_limit: readonly [number, number],
): NdArray {
  const [batch, H, P, N] = state.shape as [number, number, number, number];
  const width = xBC.shape[1]!;
  const G = (width - H * P) / (2 * N);
  const y = ndarray([batch, H, P]);
  for (let b = 0; b < batch; b++) {
    for (let h = 0; h < H; h++) {
      const dt = time_step(dt_raw.data[b * H + h]! + dt_bias.data[h]!, dt_limit);
      const keep = Math.exp(-dt * Math.exp(A_log.data[h]!));
      const B = b * width + H * P + Math.floor(h / (H / G)) * N;
      const C = B + G * N;
      for (let p = 0; p < P; p++) {
        const xi = (b * H + h) * P + p;
        const x = xBC.data[b * width + h * P + p]!;
        let v = D.data[h]! * x;
        for (let n = 0; n < N; n++) {
          state.data[xi * N + n] = keep * state.data[xi * N + n]! + dt * x * xBC.data[B + n]!;
          v += state.data[xi * N + n]! * xBC.data[C + n]!;
        }
        y.data[xi] = v;
      }
    }
  }
  return y;
}
