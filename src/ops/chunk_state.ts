import { launch } from "../kernel/launch.ts";
import type { Tensor } from "../tensor/tensor.ts";
import {
  checkGroups, checkSeqIdx, checkShape, documents, documentStart, groups, quads, tiles,
} from "./chunking.ts";
import { defineOp } from "./op.ts";

/**
 * What each chunk adds to the state: S[p,n] = sum_j exp(a_last - a_j) dt_j x_j[p] B_j[n].
 *
 * @param B         (B, L, G, N) f32; head h reads group floor(h / (H/G))
 * @param x         (B, L, H, P) f32
 * @param dt        (B, H, nC, Q) f32
 * @param dA_cumsum (B, H, nC, Q) f32, the exponent a, never increasing within a chunk
 * @param seq_idx   (B, L) i32 or null; only positions in the document of the chunk's last position count
 * @returns         states (B, nC, H, P, N) f32
 *
 * Throws   ShapeError for shapes that do not fit.
 * Source   Mamba-2 (arXiv 2405.21060) section 6.
 * Tested   test/ops/chunk_state.samples.ts against reference/chunk_state.ts
 */
export const chunk_state = defineOp({
  name: "chunk_state",
  forward(ctx, B: Tensor, x: Tensor, dt: Tensor, dA_cumsum: Tensor, seq_idx: Tensor | null) {
    const op = "chunk_state";
    checkGroups(op, x, "B", B);
    const [batch, seqlen, nheads, headdim] = x.shape as [number, number, number, number];
    const [, , ngroups, dstate] = B.shape as [number, number, number, number];
    const chunk_size = dt.shape[3] ?? 1;
    const nchunks = Math.ceil(seqlen / chunk_size);
    checkShape(op, "dt", dt, [batch, nheads, nchunks, chunk_size]);
    checkShape(op, "dA_cumsum", dA_cumsum, dt.shape);
    checkSeqIdx(op, seq_idx, batch, seqlen);
    const start = documentStart(seq_idx, chunk_size);
    const decay = x.device.empty(dt.shape);
    const weight = x.device.empty(dt.shape);
    launch("mamba2/chunk_decay", {
      entry: "leaving", bind: { dt, dA_cumsum, start: start ?? dt, weight, decay },
      params: { seqlen, nheads, nchunks, chunk_size, total: dt.size },
      conditions: documents(start), workgroups: groups(dt.size),
    });
    const shape = { seqlen, nheads, headdim, ngroups, dstate, nchunks, chunk_size };
    const states = x.device.empty([batch, nchunks, nheads, headdim, dstate]);
    const total = batch * nchunks * nheads * tiles(headdim) * tiles(dstate);
    launch("mamba2/chunk_state", {
      bind: { v: x, u: B, weight, states }, params: { ...shape, total },
      conditions: quads(headdim, dstate), workgroups: groups(total),
    });
    ctx.save({ B, x, decay, weight, shape });
    return states;
  },
  backward({ B, x, decay, weight, shape }, [dstates]) {
    if (!dstates) return [];
    const { seqlen, nheads, headdim, ngroups, dstate, nchunks, chunk_size } = shape;
    const batch = x.shape[0]!;
    const conditions = quads(headdim, dstate);
    const dx = x.device.empty(x.shape);
    const total = batch * nchunks * tiles(chunk_size) * nheads * tiles(headdim);
    launch("mamba2/apply_state", {
      bind: { states: dstates, u: B, weight, y: dx }, params: { ...shape, total },
      conditions, workgroups: groups(total),
    });
    const ddt = x.device.empty(weight.shape);
    const dcumsum = x.device.empty(weight.shape);
    const rows = { seqlen, nheads, headdim, nchunks, chunk_size };
    launch("mamba2/chunk_state_backward", {
      entry: "positions",
      bind: { x, decay, weight, dx, ddt, dcumsum }, params: { ...rows, total: weight.size },
      conditions: quads(headdim), workgroups: groups(weight.size),
    });
    const chunks = batch * nheads * nchunks;
    launch("mamba2/chunk_state_backward", {
      entry: "last", bind: { dcumsum }, params: { ...rows, total: chunks }, workgroups: groups(chunks),
    });
    const dB = x.device.empty(B.shape);
    const totalB = batch * nchunks * tiles(chunk_size) * ngroups * tiles(dstate);
    launch("mamba2/apply_state_transposed", {
      bind: { states: dstates, v: x, weight, u: dB }, params: { ...shape, total: totalB },
      conditions, workgroups: groups(totalB),
    });
    return [dB, dx, ddt, dcumsum];
  },
});
