import { ndarray, type NdArray } from "../tensor/ndarray.ts";
import { time_step, time_step_slope } from "./time_step.ts";

/**
 * dt = clamp(softplus(dt_raw + dt_bias), lo, hi) and a_i = sum_{m<=i} dt_m A by chunks: decay exponents.
 *
 * @param dt_raw  [B,L,H]
 * @param A_log   [H]; A = -exp(A_log)
 * @param dt_bias [H]
 * @returns       dt and dA_cumsum [B,H,nC,Q]; positions after the last have dt = 0, so a stays as it was
 */
export function chunk_cumsum(
  dt_raw: NdArray, A_log: NdArray, dt_bias: NdArray, chunk_size: number, dt_limit: readonly [number, number],
): [NdArray, NdArray] {
  const [B, L, H] = dt_raw.shape as [number, number, number];
  const nchunks = Math.ceil(L / chunk_size);
  const dt = ndarray([B, H, nchunks, chunk_size]);
  const dA_cumsum = ndarray([B, H, nchunks, chunk_size]);
  for (let b = 0; b < B; b++) {
    for (let h = 0; h < H; h++) {
      const A = -Math.exp(A_log.data[h]!);
      for (let c = 0; c < nchunks; c++) {
        let a = 0;
        for (let q = 0; q < chunk_size; q++) {
          const t = c * chunk_size + q;
          const step = t < L ? time_step(dt_raw.data[(b * L + t) * H + h]! + dt_bias.data[h]!, dt_limit) : 0;
          const at = ((b * H + h) * nchunks + c) * chunk_size + q;
          a += step * A;
          dt.data[at] = step;
          dA_cumsum.data[at] = a;
        }
      }
    }
  }
  return [dt, dA_cumsum];
}

/** Gradients of `chunk_cumsum` for (dt_raw, A_log, dt_bias). */
export function chunk_cumsum_vjp(
  [ddt, dcumsum]: readonly (NdArray | null)[],
  dt_raw: NdArray, A_log: NdArray, dt_bias: NdArray, chunk_size: number, dt_limit: readonly [number, number],
): (NdArray | null)[] {
  const [B, L, H] = dt_raw.shape as [number, number, number];
  const nchunks = Math.ceil(L / chunk_size);
  const [dt] = chunk_cumsum(dt_raw, A_log, dt_bias, chunk_size, dt_limit);
  const ddt_raw = ndarray(dt_raw.shape);
  const dA_log = ndarray([H]);
  const ddt_bias = ndarray([H]);
  for (let b = 0; b < B; b++) {
    for (let h = 0; h < H; h++) {
      const A = -Math.exp(A_log.data[h]!);
      for (let c = 0; c < nchunks; c++) {
        let alpha = 0; // the sum of the exponent's gradients from here to the chunk's end
        for (let q = chunk_size - 1; q >= 0; q--) {
          const at = ((b * H + h) * nchunks + c) * chunk_size + q;
          const t = c * chunk_size + q;
          alpha += dcumsum ? dcumsum.data[at]! : 0;
          if (t >= L) continue;
          dA_log.data[h]! += dt.data[at]! * alpha * A;
          const raw = (b * L + t) * H + h;
          const slope = time_step_slope(dt_raw.data[raw]! + dt_bias.data[h]!, dt_limit);
          ddt_raw.data[raw] = ((ddt ? ddt.data[at]! : 0) + A * alpha) * slope;
          ddt_bias.data[h]! += ddt_raw.data[raw]!;
        }
      }
    }
  }
  return [ddt_raw, dA_log, ddt_bias, null, null];
}
