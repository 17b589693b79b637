import { ndarray, type NdArray } from "../tensor/ndarray.ts";
import { connected } from "./documents.ts";

/**
 * y_i = sum_{j<=i} CB_ij exp(a_i - a_j) dt_j x_j + exp(a_i) (prev_state C_i) + D x_i.
 *
 * Pairs (i,j) of different documents do not count; the entering state counts up to the first document start
 * of the chunk (a start at the chunk's first position included).
 *
 * @param CB          [B,nC,G,Q,Q], read for i >= j only
 * @param x           [B,L,H,P]
 * @param dt          [B,H,nC,Q]
 * @param dA_cumsum   [B,H,nC,Q], not increasing within a chunk
 * @param C           [B,L,G,N]
 * @param prev_states [B,nC,H,P,N]
 * @param D           [H]
 * @param seq_idx     [B,L] or null
 * @returns           y [B,L,H,P]
 */
export function chunk_scan(
  CB: NdArray, x: NdArray, dt: NdArray, dA_cumsum: NdArray, C: NdArray, prev_states: NdArray, D: NdArray,
  seq_idx: NdArray | null,
): NdArray {
  const [batch, L, H, P] = x.shape as [number, number, number, number];
  const [, , G, N] = C.shape as [number, number, number, number];
  const [, , nchunks, Q] = dt.shape as [number, number, number, number];
  const y = ndarray(x.shape);
  for (let b = 0; b < batch; b++) {
    for (let h = 0; h < H; h++) {
      const g = Math.floor(h / (H / G));
      for (let i = 0; i < L; i++) {
        const c = Math.floor(i / Q);
        const chunk = ((b * H + h) * nchunks + c) * Q - c * Q; // + t: position t of the row, in dt and a
        const a = dA_cumsum.data[chunk + i]!;
        const enters = connected(seq_idx, b, c * Q - 1, i) ? Math.exp(a) : 0;
        for (let p = 0; p < P; p++) {
          let v = D.data[h]! * x.data[((b * L + i) * H + h) * P + p]!;
          for (let n = 0; n < N; n++) {
            const S = prev_states.data[(((b * nchunks + c) * H + h) * P + p) * N + n]!;
            v += enters * S * C.data[((b * L + i) * G + g) * N + n]!;
          }
          y.data[((b * L + i) * H + h) * P + p] = v;
        }
        for (let j = c * Q; j <= i; j++) {
          if (!connected(seq_idx, b, j, i)) continue;
          const weight = CB.data[(((b * nchunks + c) * G + g) * Q + (i % Q)) * Q + (j % Q)]! *
            Math.exp(a - dA_cumsum.data[chunk + j]!) * dt.data[chunk + j]!;
          for (let p = 0; p < P; p++) {
            y.data[((b * L + i) * H + h) * P + p]! += weight * x.data[((b * L + j) * H + h) * P + p]!;
          }
        }
      }
    }
  }
  return y;
}

/** Gradients of `chunk_scan` for (CB, x, dt, dA_cumsum, C, prev_states, D, seq_idx). */
export function chunk_scan_vjp(
  [dy]: readonly (NdArray | null)[],
  CB: NdArray, x: NdArray, dt: NdArray, dA_cumsum: NdArray, C: NdArray, prev_states: NdArray, D: NdArray,
  seq_idx: NdArray | null,
): (NdArray | null)[] {
  const [batch, L, H, P] = x.shape as [number, number, number, number];
  const [, , G, N] = C.shape as [number, number, number, number];
  const [, , nchunks, Q] = dt.shape as [number, number, number, number];
  const dCB = ndarray(CB.shape);
  const dx = ndarray(x.shape);
  const ddt = ndarray(dt.shape);
  const dcumsum = ndarray(dt.shape);
  const dC = ndarray(C.shape);
  const dprev = ndarray(prev_states.shape);
  const dD = ndarray([H]);
  for (let b = 0; dy && b < batch; b++) {
    for (let h = 0; h < H; h++) {
      const g = Math.floor(h / (H / G));
      for (let i = 0; i < L; i++) {
        const c = Math.floor(i / Q);
        const chunk = ((b * H + h) * nchunks + c) * Q - c * Q;
        const a = dA_cumsum.data[chunk + i]!;
        const enters = connected(seq_idx, b, c * Q - 1, i) ? Math.exp(a) : 0;
        for (let p = 0; p < P; p++) {
          const xi = ((b * L + i) * H + h) * P + p;
          dD.data[h]! += dy.data[xi]! * x.data[xi]!;
          dx.data[xi]! += D.data[h]! * dy.data[xi]!;
          for (let n = 0; n < N; n++) {
            const Si = (((b * nchunks + c) * H + h) * P + p) * N + n;
            const Ci = ((b * L + i) * G + g) * N + n;
            dC.data[Ci]! += enters * dy.data[xi]! * prev_states.data[Si]!;
            dprev.data[Si]! += enters * dy.data[xi]! * C.data[Ci]!;
            dcumsum.data[chunk + i]! += enters * dy.data[xi]! * prev_states.data[Si]! * C.data[Ci]!;
          }
        }
        for (let j = c * Q; j <= i; j++) {
          if (!connected(seq_idx, b, j, i)) continue;
          const at = (((b * nchunks + c) * G + g) * Q + (i % Q)) * Q + (j % Q);
          const decay = Math.exp(a - dA_cumsum.data[chunk + j]!);
          const step = dt.data[chunk + j]!;
          let U = 0; // dy_i . x_j
          for (let p = 0; p < P; p++) {
            const yi = ((b * L + i) * H + h) * P + p;
            const xj = ((b * L + j) * H + h) * P + p;
            U += dy.data[yi]! * x.data[xj]!;
            dx.data[xj]! += CB.data[at]! * decay * step * dy.data[yi]!;
          }
          dCB.data[at]! += U * decay * step;
          ddt.data[chunk + j]! += U * CB.data[at]! * decay;
          dcumsum.data[chunk + i]! += U * CB.data[at]! * decay * step;
          dcumsum.data[chunk + j]! -= U * CB.data[at]! * decay * step;
        }
      }
    }
  }
  return [dCB, dx, ddt, dcumsum, dC, dprev, dD, null];
}
