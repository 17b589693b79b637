import { bucket, choose, defineTunable } from "../kernel/tuner.ts";
import type { Device } from "../tensor/device.ts";
import { scope } from "../tensor/scope.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { randomTensor, trial } from "../tensor/trial.ts";
import { bmm_chunk } from "./bmm_chunk.ts";
import { chunk_cumsum } from "./chunk_cumsum.ts";
import { chunk_scan } from "./chunk_scan.ts";
import { chunk_state } from "./chunk_state.ts";
import { canWalk, ssd_walk } from "./ssd_walk.ts";
import { withGradients } from "./gradient_trial.ts";
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
 * Arrangements: `chunks` computes all chunks at once and passes states between them (GPUs, which want many
 * invocations); `walk` takes the tokens one after the other with the state in registers (software adapters,
 * where loads and barriers are dear and invocations few).
 */
type Arrangement = "walk" | "chunks";

/** How this device scans. `seqlen` and `heads` are those of one call. */
export function scanArrangement(device: Device, shape: ScanShape): Arrangement {
  return choose(device, scanTuning, shape);
}

/** `heads`: of all rows; `training`: the backward pass counts, too. */
type ScanShape = Readonly<Record<"heads" | "seqlen" | "headdim" | "dstate" | "chunk_size", number>> & {
  readonly training: boolean;
};

const scanTuning = defineTunable({
  name: "mamba2/ssd_scan",
  classOf: ({ heads, seqlen, headdim, dstate, chunk_size, training }: ScanShape) => ({
    heads: bucket(heads, 256), seqlen: bucket(seqlen, 1024), headdim, dstate, chunk_size, training,
  }),
  candidates: (device: Device, { headdim, dstate }): Arrangement[] =>
    canWalk(device, headdim, dstate) ? ["walk", "chunks"] : ["chunks"],
  fallback: (device, { headdim, dstate }) =>
    device.info.isSoftware && canWalk(device, headdim, dstate) ? "walk" : "chunks",
  trial: (device, { heads, seqlen, headdim, dstate, chunk_size, training }) => trial(() => ({
    x: randomTensor(device, [1, seqlen, heads, headdim]), dt_raw: randomTensor(device, [1, seqlen, heads], 1),
    A_log: randomTensor(device, [heads], 2), B: randomTensor(device, [1, seqlen, 1, dstate], 3),
    C: randomTensor(device, [1, seqlen, 1, dstate], 4), D: randomTensor(device, [heads], 5),
    dt_bias: randomTensor(device, [heads], 6), dy: randomTensor(device, [1, seqlen, heads, headdim], 7),
  }), ({ x, dt_raw, A_log, B, C, D, dt_bias, dy }, arrangement: Arrangement) => {
    const options = { chunk_size, dt_limit: [0, Infinity] as const, initial_state: null, seq_idx: null };
    const run = () => ARRANGEMENTS[arrangement](x, dt_raw, A_log, B, C, D, dt_bias, options);
    return training ? withGradients([x, dt_raw, A_log, B, C, D, dt_bias], [dy], () => [run()[0]]) : run();
  }),
  tolerance: ({ seqlen, dstate, training }) =>
    (training ? 4 : 1) * 8 * Math.sqrt(seqlen + dstate) * 2 ** -24,
});

/**
 * The selective scan of Mamba-2: S_t = exp(dt_t A) S_{t-1} + dt_t x_t (outer) B_t, y_t = S_t C_t + D x_t.
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
 * Cost      by chunks about B L H (Q (P + N G/H) + 4 P N) multiply-adds in nine launches; see also
 *            `ssd_walk`.
 * Throws    ShapeError for shapes that do not fit.
 * Source    Dao & Gu 2024 (arXiv 2405.21060) section 6.
 * Tested    test/ops/ssd_scan.samples.ts against reference/ssd_scan.ts
 */
export function ssd_scan(
  x: Tensor, dt_raw: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,
  options: SsdScanOptions,
): [Tensor, Tensor] {
  const [batch = 0, seqlen = 0, nheads = 0, headdim = 0] = x.shape;
  const { chunk_size } = options;
  const shape = {
    // What is trained decides, not whether this call is recorded: a block that runs a second time for its
    // gradients must compute the same as the first time.
    heads: batch * nheads, seqlen, headdim, dstate: B.shape[3] ?? 0, chunk_size, training: A_log.requiresGrad,
  };
  return ARRANGEMENTS[scanArrangement(x.device, shape)](x, dt_raw, A_log, B, C, D, dt_bias, options);
}

const ARRANGEMENTS: Readonly<Record<Arrangement, typeof ssd_scan>> = {
  walk(x, dt_raw, A_log, B, C, D, dt_bias, { initial_state, seq_idx, dt_limit }) {
    const walked = ssd_walk(x, dt_raw, A_log, B, C, D, dt_bias, initial_state, seq_idx, dt_limit);
    return walked as [Tensor, Tensor];
  },
  chunks(x, dt_raw, A_log, B, C, D, dt_bias, { chunk_size, dt_limit, initial_state, seq_idx }) {
    return scope(() => {
      const [dt, dA_cumsum] = chunk_cumsum(dt_raw, A_log, dt_bias, chunk_size, dt_limit) as [Tensor, Tensor];
      const states = chunk_state(B, x, dt, dA_cumsum, seq_idx);
      const passed = state_passing(states, dA_cumsum, initial_state, seq_idx);
      const [prev_states, final_state] = passed as [Tensor, Tensor];
      const CB = bmm_chunk(C, B, chunk_size);
      return [chunk_scan(CB, x, dt, dA_cumsum, C, prev_states, D, seq_idx), final_state];
    });
  },
};
