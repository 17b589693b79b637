import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { checkChunkSize, checkShape, groups, quads, tiles } from "./chunking.ts";
import { defineOp } from "./op.ts";

/**
 * CB[i,j] = C_i . B_j for i >= j within each chunk, 0 above the diagonal.
 *
 * @param C          (B, L, G, N) f32
 * @param B          (B, L, G, N) f32
 * @param chunk_size Q
 * @returns          (B, nC, G, Q, Q) f32; rows and columns after the last position are 0
 *
 * Throws   ShapeError for shapes that do not fit.
 * Source   Mamba-2 (arXiv 2405.21060) section 6.
 * Tested   test/ops/bmm_chunk.samples.ts against reference/bmm_chunk.ts
 */
export const bmm_chunk = defineOp({
  name: "bmm_chunk",
  forward(ctx, C: Tensor, B: Tensor, chunk_size: number) {
    const op = "bmm_chunk";
    check(C.shape.length === 4, op, "C", "[batch, seqlen, ngroups, dstate]", C);
    checkShape(op, "B", B, C.shape);
    checkChunkSize(op, chunk_size);
    const [batch, seqlen, ngroups, dstate] = C.shape as [number, number, number, number];
    const nchunks = Math.ceil(seqlen / chunk_size);
    const CB = C.device.empty([batch, nchunks, ngroups, chunk_size, chunk_size]);
    const shape = { seqlen, ngroups, dstate, nchunks, chunk_size };
    const total = batch * nchunks * ngroups * tiles(chunk_size) ** 2;
    launch("mamba2/bmm_chunk", {
      bind: { C, B, CB }, params: { ...shape, total },
      conditions: quads(dstate, chunk_size), workgroups: groups(total),
    });
    ctx.save({ C, B, shape });
    return CB;
  },
  backward({ C, B, shape }, [dCB]) {
    if (!dCB) return [];
    const dC = C.device.empty(C.shape);
    const dB = B.device.empty(B.shape);
    const { ngroups, dstate, nchunks, chunk_size } = shape;
    const total = C.shape[0]! * nchunks * tiles(chunk_size) * ngroups * tiles(dstate);
    const options = { params: { ...shape, total }, conditions: quads(dstate), workgroups: groups(total) };
    launch("mamba2/bmm_chunk_backward", { entry: "rows", bind: { dCB, x: B, out: dC }, ...options });
    launch("mamba2/bmm_chunk_backward", { entry: "columns", bind: { dCB, x: C, out: dB }, ...options });
    return [dC, dB];
  },
});
