import { scope } from "../tensor/scope.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { bmm_chunk } from "./bmm_chunk.ts";
import { chunk_cumsum } from "./chunk_cumsum.ts";
import { chunk_scan } from "./chunk_scan.ts";
import { chunk_state } from "./chunk_state.ts";
import { canWalk, ssd_walk } from "./ssd_walk.ts";
import { state_passing } from "./state_passing.ts";

export interface SsdScanOptions {
  /** Positions per chunk; changes cost, not the result. */
  readonly chunk_size: number;
  /** Clamp of the time step; hi may be Infinity. */
  readonly dt_limit: readonly [number, number];
  /** (B, H, P, N) or null for zeros; the first document of a row continues it. */
  readonly initial_state: Tensor | null;
  /** (B, L) i32 or null; a change of value starts a document with an empty state. */
  readonly seq_idx: Tensor | null;
}

/**
 * The chunked selective scan of Mamba-2: S_t = exp(dt_t A) S_{t-1} + dt_t x_t (outer) B_t, y_t = S_t C_t + D
 * x_t.
 *
 * @param x       (B, L, H, P) f32
 * @param dt_raw  (B, L, H) f32; dt = clamp(softplus(dt_raw + dt_bias), lo, hi)
 * @param A_log   (H) f32; A = -exp(A_log)
 * @param B,C     (B, L, G, N) f32; head h reads group floor(h / (H/G))
 * @param D       (H) f32
 * @param dt_bias (H) f32
 * @returns       y (B, L, H, P) and final_state (B, H, P, N) f32
 *
 * Numerics  exponents and states in f32; exp only of values <= 0.
 * GPUs run it by chunks, which keep many invocations busy; software adapters, where loads and barriers are
 * dear and invocations few, walk the tokens with the state in registers (ssd_walk).
 *
 * Cost      by chunks about B L H (Q (P + N G/H) + 4 P N) multiply-adds; nine launches.
 * Throws    ShapeError for shapes that do not fit.
 * Source    Dao & Gu 2024 (arXiv 2405.21060) section 6.
 * Tested    test/ops/ssd_scan.samples.ts against reference/ssd_scan.ts
 */
export function ssd_scan(
  x: Tensor, dt_raw: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,
  options: SsdScanOptions,
): [Tensor, Tensor] {
  const { chunk_size, dt_limit, initial_state, seq_idx } = options;
  if (x.device.info.isSoftware && canWalk(x, B)) {
    return ssd_walk(
      x, dt_raw, A_log, B, C, D, dt_bias, initial_state, seq_idx, dt_limit) as [Tensor, Tensor];
  }
  return scope(() => {
    const [dt, dA_cumsum] = chunk_cumsum(dt_raw, A_log, dt_bias, chunk_size, dt_limit) as [Tensor, Tensor];
    const states = chunk_state(B, x, dt, dA_cumsum, seq_idx);
    const passed = state_passing(states, dA_cumsum, initial_state, seq_idx);
    const [prev_states, final_state] = passed as [Tensor, Tensor];
    const CB = bmm_chunk(C, B, chunk_size);
    return [chunk_scan(CB, x, dt, dA_cumsum, C, prev_states, D, seq_idx), final_state];
  });
}
