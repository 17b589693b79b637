import { ndarray, type NdArray } from "../tensor/ndarray.ts";

/**
 * CB[i,j] = C_i . B_j for i >= j within each chunk, 0 above the diagonal.
 *
 * @param C [B,L,G,N]
 * @param B [B,L,G,N]
 * @returns [B,nC,G,Q,Q]; rows and columns after the last position are 0
 */
export function bmm_chunk(C: NdArray, B: NdArray, chunk_size: number): NdArray {
  const [batch, L, G, N] = B.shape as [number, number, number, number];
  const nchunks = Math.ceil(L / chunk_size);
  const CB = ndarray([batch, nchunks, G, chunk_size, chunk_size]);
  for_pairs(batch, L, G, N, chunk_size, (at, Ci, Bj) => {
    CB.data[at]! += C.data[Ci]! * B.data[Bj]!;
  });
  return CB;
}

/** Gradients of `bmm_chunk` for (C, B). */
export function bmm_chunk_vjp(
  [dCB]: readonly (NdArray | null)[], C: NdArray, B: NdArray, chunk_size: number,
): (NdArray | null)[] {
  const [batch, L, G, N] = B.shape as [number, number, number, number];
  const dC = ndarray(C.shape);
  const dB = ndarray(B.shape);
  if (dCB) {
    for_pairs(batch, L, G, N, chunk_size, (at, Ci, Bj) => {
      dC.data[Ci]! += dCB.data[at]! * B.data[Bj]!;
      dB.data[Bj]! += dCB.data[at]! * C.data[Ci]!;
    });
  }
  return [dC, dB, null];
}

/** Calls visit(index of CB[i,j], index of C_i[n], index of B_j[n]) for all i >= j of one chunk, and all n. */
function for_pairs(
  batch: number, L: number, G: number, N: number, Q: number,
  visit: (at: number, Ci: number, Bj: number) => void,
): void {
  const nchunks = Math.ceil(L / Q);
  for (let b = 0; b < batch; b++) {
    for (let i = 0; i < L; i++) {
      const c = Math.floor(i / Q);
      for (let j = c * Q; j <= i; j++) {
        for (let g = 0; g < G; g++) {
          const at = (((b * nchunks + c) * G + g) * Q + (i % Q)) * Q + (j % Q);
          for (let n = 0; n < N; n++) visit(at, ((b * L + i) * G + g) * N + n, ((b * L + j) * G + g) * N + n);
        }
      }
    }
  }
}
