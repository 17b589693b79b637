/** What the ops of the chunked scan share: chunk arithmetic, document starts, and sums over rows. */
import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import type { Tensor } from "../tensor/tensor.ts";

/** Invocations per workgroup of the kernels of this family. */
export const WG = 64;
const SLICE = 64;
/** Stands for no upper limit: shaders need not know infinities. */
export const LARGEST = 3.4028234663852886e38;

/** Workgroups for `total` invocations. */
export const groups = (total: number): [number] => [Math.ceil(total / WG)];

/** Register tiles of eight that cover `extent`. */
export const tiles = (extent: number): number => Math.ceil(extent / 8);

/** The condition under which kernels read and write quads: every row length is a multiple of four. */
export function quads(...widths: readonly number[]): "vec4"[] {
  return widths.every((width) => width % 4 === 0) ? ["vec4"] : [];
}

/** The first place from `at` on where a kernel may begin to read (`Tensor.range`). */
export const rangeAt = (at: number): number => Math.ceil(at / 64) * 64;

/** The condition `documents`, where there is a tensor of document starts. */
export const documents = (start: Tensor | null): "documents"[] => (start ? ["documents"] : []);

/** Throws ShapeError unless chunks have a whole number of positions, at least one. */
export function checkChunkSize(op: string, chunk_size: number): void {
  const fits = Number.isInteger(chunk_size) && chunk_size > 0;
  check(fits, op, "chunk_size", "a whole number above 0", chunk_size);
}

/** Throws ShapeError unless heads divide into groups and x [B,L,H,P] and B or C [B,L,G,N] belong together. */
export function checkGroups(op: string, x: Tensor, name: string, B: Tensor): void {
  check(x.shape.length === 4, op, "x", "[batch, seqlen, nheads, headdim]", x);
  const [batch, seqlen, nheads] = x.shape as [number, number, number];
  const fits = B.shape.length === 4 && B.shape[0] === batch && B.shape[1] === seqlen;
  const expected = `[${batch}, ${seqlen}, ngroups, dstate] with ngroups dividing ${nheads}`;
  check(fits && nheads % B.shape[2]! === 0, op, name, expected, B);
}

/** Throws ShapeError unless `tensor` is null or [batch, seqlen]. */
export function checkSeqIdx(op: string, seq_idx: Tensor | null, batch: number, seqlen?: number): void {
  if (!seq_idx) return;
  const [rows, length] = seq_idx.shape;
  const fits = seq_idx.shape.length === 2 && rows === batch && length === (seqlen ?? length);
  check(fits, op, "seq_idx", `[${batch}, ${seqlen ?? "seqlen"}]`, seq_idx);
}

/** Throws ShapeError unless `tensor` has exactly this shape. */
export function checkShape(op: string, name: string, tensor: Tensor, shape: readonly number[]): void {
  check(tensor.shape.join() === shape.join(), op, name, `[${shape.join(", ")}]`, tensor);
}

/**
 * Where each position's document begins, as a position of its own chunk, or -1 if before the chunk.
 *
 * @param seq_idx [B,L] i32, or null for one document per row
 * @returns       [B,nC,Q] i32, or null
 */
export function documentStart(seq_idx: Tensor | null, chunk_size: number): Tensor | null {
  if (!seq_idx) return null;
  const [batch, seqlen] = seq_idx.shape as [number, number];
  const nchunks = Math.ceil(seqlen / chunk_size);
  const start = seq_idx.device.empty([batch, nchunks, chunk_size], "i32");
  const total = batch * nchunks;
  launch("mamba2/document_start", {
    bind: { seq_idx, start }, params: { seqlen, nchunks, chunk_size, total }, workgroups: groups(total),
  });
  return start;
}

/** Sums columns offset .. offset + cols of x [rows, stride] over its rows, in a fixed order: [cols]. */
export function sumRows(x: Tensor, cols: number, offset = 0): Tensor {
  const [rows, stride] = x.shape as [number, number];
  const slices = Math.max(1, Math.ceil(rows / SLICE));
  const out = x.device.empty([slices, cols]);
  const total = slices * cols;
  launch("mamba2/sum_rows", {
    bind: { x, out }, params: { rows, stride, offset, cols, total }, constants: { SLICE },
    workgroups: groups(total),
  });
  return slices === 1 ? out.reshape([cols]) : sumRows(out, cols);
}
