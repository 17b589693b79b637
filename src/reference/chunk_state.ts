import { ndarray, type NdArray } from "../tensor/ndarray.ts";
import { connected } from "./documents.ts";

/**
 * What each chunk adds to the state: S[p,n] = sum_j exp(a_last - a_j) dt_j x_j[p] B_j[n].
 *
 * Only positions in the document of the chunk's last position count.
 *
 * @param B         [B,L,G,N]; head h reads group floor(h / (H/G))
 * @param x         [B,L,H,P]
 * @param dt        [B,H,nC,Q]
 * @param dA_cumsum [B,H,nC,Q], not increasing within a chunk
 * @param seq_idx   [B,L] or null
 * @returns         states [B,nC,H,P,N]
 */
export function chunk_state(
  B: NdArray, x: NdArray, dt: NdArray, dA_cumsum: NdArray, seq_idx: NdArray | null,
): NdArray {
  const [batch, L, G, N] = B.shape as [number, number, number, number];
  const [, , H, P] = x.shape as [number, number, number, number];
  const [, , nchunks, Q] = dt.shape as [number, number, number, number];
  const states = ndarray([batch, nchunks, H, P, N]);
  for (let b = 0; b < batch; b++) {
    for (let h = 0; h < H; h++) {
      const g = Math.floor(h / (H / G));
      for (let t = 0; t < L; t++) {
        const c = Math.floor(t / Q);
        if (!connected(seq_idx, b, t, Math.min((c + 1) * Q, L) - 1)) continue;
        const chunk = ((b * H + h) * nchunks + c) * Q;
        const q = chunk + (t % Q);
        const scale = Math.exp(dA_cumsum.data[chunk + Q - 1]! - dA_cumsum.data[q]!) * dt.data[q]!;
        for (let p = 0; p < P; p++) {
          for (let n = 0; n < N; n++) {
            states.data[(((b * nchunks + c) * H + h) * P + p) * N + n]! +=
              scale * x.data[((b * L + t) * H + h) * P + p]! * B.data[((b * L + t) * G + g) * N + n]!;
          }
        }
      }
    }
  }
  return states;
}

/** Gradients of `chunk_state` for (B, x, dt, dA_cumsum, seq_idx). */
export function chunk_state_vjp(
  [dstates]: readonly (NdArray | null)[],
  B: NdArray, x: NdArray, dt: NdArray, dA_cumsum: NdArray, seq_idx: NdArray | null,
): (NdArray | null)[] {
  const [batch, L, G, N] = B.shape as [number, number, number, number];
  const [, , H, P] = x.shape as [number, number, number, number];
  const [, , nchunks, Q] = dt.shape as [number, number, number, number];
  const dB = ndarray(B.shape);
  const dx = ndarray(x.shape);
  const ddt = ndarray(dt.shape);
  const dcumsum = ndarray(dt.shape);
  for (let b = 0; dstates && b < batch; b++) {
    for (let h = 0; h < H; h++) {
      const g = Math.floor(h / (H / G));
      for (let t = 0; t < L; t++) {
        const c = Math.floor(t / Q);
        if (!connected(seq_idx, b, t, Math.min((c + 1) * Q, L) - 1)) continue;
        const chunk = ((b * H + h) * nchunks + c) * Q;
        const q = chunk + (t % Q);
        const decay = Math.exp(dA_cumsum.data[chunk + Q - 1]! - dA_cumsum.data[q]!);
        const scale = decay * dt.data[q]!;
        let s = 0; // <dS, x (outer) B>
        for (let p = 0; p < P; p++) {
          for (let n = 0; n < N; n++) {
            const dS = dstates.data[(((b * nchunks + c) * H + h) * P + p) * N + n]!;
            const xi = ((b * L + t) * H + h) * P + p;
            const Bi = ((b * L + t) * G + g) * N + n;
            s += dS * x.data[xi]! * B.data[Bi]!;
            dx.data[xi]! += scale * dS * B.data[Bi]!;
            dB.data[Bi]! += scale * dS * x.data[xi]!;
          }
        }
        ddt.data[q]! += decay * s;
        dcumsum.data[q]! -= scale * s;
        dcumsum.data[chunk + Q - 1]! += scale * s;
      }
    }
  }
  return [dB, dx, ddt, dcumsum, null];
}
