import { ndarray, type NdArray } from "../tensor/ndarray.ts";
import { time_step, time_step_slope } from "./time_step.ts";

/** What `ssd_scan` takes besides its tensors; chunk_size does not change the result. */
export interface SsdScanOptions {
  readonly chunk_size: number;
  readonly dt_limit: readonly [number, number];
  readonly initial_state: NdArray | null;
  readonly seq_idx: NdArray | null;
}

/**
 * The selective state space recurrence of Mamba-2, one position after the other:
 *   S_t = exp(dt_t A) S_{t-1} + dt_t x_t (outer) B_t,   y_t = S_t C_t + D x_t,
 * with dt = clamp(softplus(dt_raw + dt_bias), lo, hi), A = -exp(A_log), and S forgotten where a document
 * starts.
 *
 * @param x       [B,L,H,P]
 * @param dt_raw  [B,L,H]
 * @param A_log   [H]
 * @param B       [B,L,G,N]; head h reads group floor(h / (H/G))
 * @param C       [B,L,G,N]
 * @param D       [H]
 * @param dt_bias [H]
 * @returns       y [B,L,H,P] and final_state [B,H,P,N]
 */
export function ssd_scan(
  x: NdArray, dt_raw: NdArray, A_log: NdArray, B: NdArray, C: NdArray, D: NdArray, dt_bias: NdArray,
  options: SsdScanOptions,
): [NdArray, NdArray] {
  const [batch, L, H, P] = x.shape as [number, number, number, number];
  const N = B.shape[3]!;
  const y = ndarray(x.shape);
  const final_state = ndarray([batch, H, P, N]);
  for (let b = 0; b < batch; b++) {
    for (let h = 0; h < H; h++) {
      const states = recurrence(x, dt_raw, A_log, B, dt_bias, options, b, h);
      for (let t = 0; t < L; t++) {
        for (let p = 0; p < P; p++) {
          const xi = ((b * L + t) * H + h) * P + p;
          let v = D.data[h]! * x.data[xi]!;
          for (let n = 0; n < N; n++) v += states[t + 1]![p * N + n]! * C.data[group(C, b, t, h, H) + n]!;
          y.data[xi] = v;
        }
      }
      final_state.data.set(states[L]!, (b * H + h) * P * N);
    }
  }
  return [y, final_state];
}

/** Where the row of B or C that head h reads at position t begins. */
function group(B: NdArray, b: number, t: number, h: number, H: number): number {
  const [, L, G, N] = B.shape as [number, number, number, number];
  return ((b * L + t) * G + Math.floor(h / (H / G))) * N;
}

/** exp(dt A), or 0 where a document starts. */
function decay(seq_idx: NdArray | null, b: number, t: number, dt: number, A: number): number {
  if (seq_idx !== null && t > 0) {
    const at = b * seq_idx.shape[1]! + t;
    if (seq_idx.data[at] !== seq_idx.data[at - 1]) return 0;
  }
  return Math.exp(dt * A);
}

/** S_{-1}, S_0, ..., S_{L-1} of one row and head, each [P,N]. */
function recurrence(
  x: NdArray, dt_raw: NdArray, A_log: NdArray, B: NdArray, dt_bias: NdArray,
  options: SsdScanOptions, b: number, h: number,
): Float64Array[] {
  const [, L, H, P] = x.shape as [number, number, number, number];
  const N = B.shape[3]!;
  const A = -Math.exp(A_log.data[h]!);
  const start = (b * H + h) * P * N;
  const states = [options.initial_state?.data.slice(start, start + P * N) ?? new Float64Array(P * N)];
  for (let t = 0; t < L; t++) {
    const dt = time_step(dt_raw.data[(b * L + t) * H + h]! + dt_bias.data[h]!, options.dt_limit);
    const keep = decay(options.seq_idx, b, t, dt, A);
    states.push(states[t]!.map((s, i) => {
      const p = Math.floor(i / N);
      return keep * s + dt * x.data[((b * L + t) * H + h) * P + p]! * B.data[group(B, b, t, h, H) + (i % N)]!;
    }));
  }
  return states;
}

/**
 * Gradients of `ssd_scan` for (x, dt_raw, A_log, B, C, D, dt_bias, initial_state), by the recurrence run
 * backwards: lambda_t = dy_t (outer) C_t + exp(dt_{t+1} A) lambda_{t+1}.
 */
export function ssd_scan_vjp(
  [dy, dfinal]: readonly (NdArray | null)[],
  x: NdArray, dt_raw: NdArray, A_log: NdArray, B: NdArray, C: NdArray, D: NdArray, dt_bias: NdArray,
  options: SsdScanOptions,
): (NdArray | null)[] {
  const [batch, L, H, P] = x.shape as [number, number, number, number];
  const N = B.shape[3]!;
  const dx = ndarray(x.shape);
  const ddt_raw = ndarray(dt_raw.shape);
  const dA_log = ndarray([H]);
  const dB = ndarray(B.shape);
  const dC = ndarray(C.shape);
  const dD = ndarray([H]);
  const ddt_bias = ndarray([H]);
  const dinitial = ndarray([batch, H, P, N]);
  for (let b = 0; b < batch; b++) {
    for (let h = 0; h < H; h++) {
      const A = -Math.exp(A_log.data[h]!);
      const states = recurrence(x, dt_raw, A_log, B, dt_bias, options, b, h);
      const lambda = new Float64Array(P * N);
      if (dfinal) lambda.set(dfinal.data.subarray((b * H + h) * P * N, (b * H + h + 1) * P * N));
      for (let t = L - 1; t >= 0; t--) {
        const raw = (b * L + t) * H + h;
        const dt = time_step(dt_raw.data[raw]! + dt_bias.data[h]!, options.dt_limit);
        const keep = decay(options.seq_idx, b, t, dt, A);
        const row = group(B, b, t, h, H);
        let kept = 0; // <lambda, S_{t-1}>
        let added = 0; // <lambda, x (outer) B>
        for (let p = 0; p < P; p++) {
          const xi = raw * P + p;
          const g = dy ? dy.data[xi]! : 0;
          dD.data[h]! += g * x.data[xi]!;
          dx.data[xi]! += D.data[h]! * g;
          for (let n = 0; n < N; n++) {
            const i = p * N + n;
            dC.data[row + n]! += states[t + 1]![i]! * g;
            lambda[i]! += g * C.data[row + n]!;
            kept += lambda[i]! * states[t]![i]!;
            added += lambda[i]! * x.data[xi]! * B.data[row + n]!;
            dx.data[xi]! += dt * lambda[i]! * B.data[row + n]!;
            dB.data[row + n]! += dt * lambda[i]! * x.data[xi]!;
            lambda[i]! *= keep;
          }
        }
        dA_log.data[h]! += dt * keep * kept * A;
        const slope = time_step_slope(dt_raw.data[raw]! + dt_bias.data[h]!, options.dt_limit);
        ddt_raw.data[raw] = (A * keep * kept + added) * slope;
        ddt_bias.data[h]! += ddt_raw.data[raw]!;
      }
      dinitial.data.set(lambda, (b * H + h) * P * N);
    }
  }
  return [dx, ddt_raw, dA_log, dB, dC, dD, ddt_bias, options.initial_state === null ? null : dinitial];
}
