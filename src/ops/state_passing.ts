import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { checkSeqIdx, checkShape, documents, documentStart, groups, quads } from "./chunking.ts";
import { defineOp } from "./op.ts";

type Five = [number, number, number, number, number];

/**
 * The state entering each chunk: prev[0] = initial_state, prev[c+1] = exp(a_last[c]) prev[c] + states[c].
 * What would enter a chunk after the last is final_state.
 *
 * @param states        (B, nC, H, P, N) f32, what each chunk adds
 * @param dA_cumsum     (B, H, nC, Q) f32, the exponent a
 * @param initial_state (B, H, P, N) f32 or null for zeros; the first document of a row continues it
 * @param seq_idx       (B, L) i32 or null; a chunk in which a document starts lets no state through
 * @returns             prev_states (B, nC, H, P, N) and final_state (B, H, P, N) f32
 *
 * Throws   ShapeError for shapes that do not fit.
 * Source   Mamba-2 (arXiv 2405.21060) section 6.
 * Tested   test/ops/state_passing.samples.ts against reference/state_passing.ts
 */
export const state_passing = defineOp({
  name: "state_passing",
  forward(ctx, states: Tensor, dA_cumsum: Tensor, initial_state: Tensor | null, seq_idx: Tensor | null) {
    const op = "state_passing";
    check(states.shape.length === 5, op, "states", "[batch, nchunks, nheads, headdim, dstate]", states);
    const [batch, nchunks, nheads, headdim, dstate] = states.shape as Five;
    const chunk_size = dA_cumsum.shape[3] ?? 1;
    checkShape(op, "dA_cumsum", dA_cumsum, [batch, nheads, nchunks, chunk_size]);
    if (initial_state) checkShape(op, "initial_state", initial_state, [batch, nheads, headdim, dstate]);
    checkSeqIdx(op, seq_idx, batch);
    const start = documentStart(seq_idx, chunk_size);
    const fits = start === null || start.shape[1] === nchunks;
    check(fits, op, "seq_idx", `of ${nchunks} chunks of ${chunk_size}`, seq_idx ?? states);
    const conditions = [...documents(start), ...quads(headdim * dstate)];
    const cells = headdim * dstate / (headdim * dstate % 4 === 0 ? 4 : 1);
    const shape = { nheads, cells, nchunks, chunk_size };
    const total = batch * nheads * cells;
    const prev_states = states.device.empty(states.shape);
    const final_state = states.device.empty([batch, nheads, headdim, dstate]);
    launch("mamba2/state_passing", {
      bind: {
        states, dA_cumsum, initial_state: initial_state ?? states, start: start ?? dA_cumsum,
        prev_states, final_state,
      },
      params: { ...shape, total }, conditions: initial_state ? [...conditions, "initial"] : conditions,
      workgroups: groups(total),
    });
    ctx.save({ dA_cumsum, prev_states, hasInitial: initial_state !== null, start, conditions, shape, total });
    return [prev_states, final_state];
  },
  backward({ dA_cumsum, prev_states, hasInitial, start, conditions, shape, total }, [dprev, dfinal]) {
    const { device } = prev_states;
    const [batch, nchunks, nheads, headdim, dstate] = prev_states.shape as Five;
    const dstates = device.empty(prev_states.shape);
    const dinitial = device.empty([batch, nheads, headdim, dstate]);
    launch("mamba2/state_passing_backward", {
      entry: "states",
      bind: {
        dprev: dprev ?? device.zeros(prev_states.shape), dfinal: dfinal ?? device.zeros(dinitial.shape),
        dA_cumsum, start: start ?? dA_cumsum, dstates, dinitial,
      },
      params: { ...shape, total }, conditions, workgroups: groups(total),
    });
    const dcumsum = device.empty(dA_cumsum.shape);
    const chunks = batch * nheads * nchunks;
    launch("mamba2/state_passing_backward", {
      entry: "exponents", bind: { dA_cumsum, start: start ?? dA_cumsum, prev_states, dstates, dcumsum },
      params: { ...shape, total: chunks }, constants: { WG: device.info.isSoftware ? 8 : 64 }, conditions,
      workgroups: [chunks],
    });
    return [dstates, dcumsum, hasInitial ? dinitial : null];
  },
});
