import { launch } from "../kernel/launch.ts";
import type { Tensor } from "../tensor/tensor.ts";
import {
  checkGroups, checkSeqIdx, checkShape, documents, documentStart, groups, quads, sumRows, tiles,
} from "./chunking.ts";
import { defineOp } from "./op.ts";

/**
 * y_i = sum_{j<=i} CB_ij exp(a_i - a_j) dt_j x_j + exp(a_i) (prev_state C_i) + D x_i within each chunk.
 *
 * @param CB          (B, nC, G, Q, Q) f32, read for i >= j only
 * @param x           (B, L, H, P) f32; head h reads group floor(h / (H/G))
 * @param dt          (B, H, nC, Q) f32
 * @param dA_cumsum   (B, H, nC, Q) f32, the exponent a, never increasing within a chunk
 * @param C           (B, L, G, N) f32
 * @param prev_states (B, nC, H, P, N) f32, the state entering each chunk
 * @param D           (H) f32
 * @param seq_idx     (B, L) i32 or null; pairs of different documents, and a state entering another document,
 *                    do not count
 * @returns           y (B, L, H, P) f32
 *
 * Throws   ShapeError for shapes that do not fit.
 * Source   Mamba-2 (arXiv 2405.21060) section 6.
 * Tested   test/ops/chunk_scan.samples.ts against reference/chunk_scan.ts
 */
export const chunk_scan = defineOp({
  name: "chunk_scan",
  forward(
    ctx, CB: Tensor, x: Tensor, dt: Tensor, dA_cumsum: Tensor, C: Tensor, prev_states: Tensor, D: Tensor,
    seq_idx: Tensor | null,
  ) {
    const op = "chunk_scan";
    checkGroups(op, x, "C", C);
    const [batch, seqlen, nheads, headdim] = x.shape as [number, number, number, number];
    const [, , ngroups, dstate] = C.shape as [number, number, number, number];
    const chunk_size = dt.shape[3] ?? 1;
    const nchunks = Math.ceil(seqlen / chunk_size);
    checkShape(op, "dt", dt, [batch, nheads, nchunks, chunk_size]);
    checkShape(op, "dA_cumsum", dA_cumsum, dt.shape);
    checkShape(op, "CB", CB, [batch, nchunks, ngroups, chunk_size, chunk_size]);
    checkShape(op, "prev_states", prev_states, [batch, nchunks, nheads, headdim, dstate]);
    checkShape(op, "D", D, [nheads]);
    checkSeqIdx(op, seq_idx, batch, seqlen);
    const start = documentStart(seq_idx, chunk_size);
    const weight = x.device.empty(dt.shape);
    launch("mamba2/chunk_decay", {
      entry: "entering", bind: { dA_cumsum, start: start ?? dt, weight },
      params: { seqlen, nheads, nchunks, chunk_size, total: dt.size },
      conditions: documents(start), workgroups: groups(dt.size),
    });
    const shape = { seqlen, nheads, headdim, ngroups, dstate, nchunks, chunk_size };
    const { dstate: _, ...pairs } = shape;
    const total = batch * nchunks * tiles(chunk_size) * nheads * tiles(headdim);
    const off = x.device.empty(x.shape);
    launch("mamba2/apply_state", {
      bind: { states: prev_states, u: C, weight, y: off }, params: { ...shape, total },
      conditions: [...quads(headdim, dstate), "weighted"], workgroups: groups(total),
    });
    const y = x.device.empty(x.shape);
    launch("mamba2/chunk_scan", {
      bind: { CB, x, dt, dA_cumsum, D, start: start ?? dt, off, y }, params: { ...pairs, total },
      conditions: [...documents(start), ...quads(headdim, chunk_size)], workgroups: groups(total),
    });
    ctx.save({ CB, x, dt, dA_cumsum, C, prev_states, D, start, weight, off, shape, pairs, total });
    return y;
  },
  backward({ CB, x, dt, dA_cumsum, C, prev_states, D, start, weight, off, shape, pairs, total }, [dy]) {
    if (!dy) return [];
    const { device } = x;
    const batch = x.shape[0]!;
    const { seqlen, nheads, headdim, ngroups, dstate, nchunks, chunk_size } = shape;
    const conditions = [...documents(start), ...quads(headdim, chunk_size)];
    const dx = device.empty(x.shape);
    launch("mamba2/chunk_scan_transposed", {
      bind: { CB, dy, dA_cumsum, start: start ?? dt, z: dx }, params: { ...pairs, total },
      conditions, workgroups: groups(total),
    });
    const ddt = device.empty(dt.shape);
    const dcumsum = device.empty(dt.shape);
    const skip = device.empty([batch * seqlen, nheads]);
    const positions = {
      params: { ...pairs, total: dt.size }, conditions: quads(headdim), workgroups: groups(dt.size),
    };
    launch("mamba2/chunk_scan_backward", {
      entry: "inputs", bind: { CB, x, dt, D, dy, dx, ddt, dcumsum }, ...positions,
    });
    launch("mamba2/chunk_scan_backward", {
      entry: "exponents", bind: { x, dy, off, dcumsum, skip }, ...positions,
    });

    const dCB = device.empty(CB.shape);
    const T = tiles(chunk_size);
    const matrices = batch * nchunks * ngroups;
    const pairBind = { dy, x, dt, dA_cumsum, start: start ?? dt, dCB };
    launch("mamba2/chunk_scan_pairs", {
      entry: "below_diagonal", bind: pairBind, params: { ...pairs, total: matrices * T * (T - 1) },
      conditions, workgroups: groups(matrices * T * (T - 1)),
    });
    launch("mamba2/chunk_scan_pairs", {
      entry: "diagonal", bind: pairBind, params: { ...pairs, total: matrices * 4 * T },
      conditions, workgroups: groups(matrices * 4 * T),
    });

    const dC = device.empty(C.shape);
    const totalC = batch * nchunks * T * ngroups * tiles(dstate);
    launch("mamba2/apply_state_transposed", {
      bind: { states: prev_states, v: dy, weight, u: dC }, params: { ...shape, total: totalC },
      conditions: quads(headdim, dstate), workgroups: groups(totalC),
    });
    const dprev = device.empty(prev_states.shape);
    const totalS = batch * nchunks * nheads * tiles(headdim) * tiles(dstate);
    launch("mamba2/chunk_state", {
      bind: { v: dy, u: C, weight, states: dprev }, params: { ...shape, total: totalS },
      conditions: quads(headdim, dstate), workgroups: groups(totalS),
    });
    return [dCB, dx, ddt, dcumsum, dC, dprev, sumRows(skip, nheads)];
  },
});
