/** Draws what the samples of the chunked scan need: time steps with their exponents, and documents. */
import type { Draw, HostTensor } from "./suite.ts";

export interface Sizes {
  readonly B: number;
  readonly L: number;
  readonly H: number;
  readonly P: number;
  readonly G: number;
  readonly N: number;
  readonly Q: number;
}

/** Sizes at the kernels' boundaries: quads or not, tiles that fit or stick out, whole and partial chunks. */
export const sizes: Readonly<Record<string, Sizes>> = {
  "whole tiles and chunks": { B: 2, L: 32, H: 4, P: 8, G: 2, N: 16, Q: 16 },
  "quads that stick out of their tiles": { B: 1, L: 27, H: 2, P: 12, G: 1, N: 20, Q: 20 },
  "odd sizes": { B: 2, L: 23, H: 6, P: 5, G: 3, N: 3, Q: 9 },
  "long chunks": { B: 1, L: 75, H: 3, P: 4, G: 1, N: 4, Q: 40 },
  "a chunk longer than the row": { B: 2, L: 5, H: 2, P: 4, G: 2, N: 4, Q: 64 },
  "one position": { B: 2, L: 1, H: 2, P: 3, G: 1, N: 8, Q: 4 },
  "chunks of one": { B: 1, L: 6, H: 2, P: 8, G: 2, N: 8, Q: 1 },
  "no rows": { B: 0, L: 9, H: 2, P: 4, G: 1, N: 4, Q: 4 },
};

/**
 * dt > 0 and a = cumsum(dt A) by chunks, both [B,H,nC,Q], with dt = 0 after the last position; -A is at most
 * `strongest`.
 */
export function steps(r: Draw, { B, L, H, Q }: Sizes, strongest = 3): [HostTensor, HostTensor] {
  const nchunks = Math.ceil(L / Q);
  const dt = r.uniform([B, H, nchunks, Q], 0.01, 1);
  const A = r.uniform([H], -strongest, -0.05);
  const a = r.uniform(dt.shape);
  let sum = 0;
  dt.data.forEach((_, i) => {
    const t = i % (nchunks * Q);
    if (t >= L) dt.data[i] = 0;
    sum = (t % Q === 0 ? 0 : sum) + dt.data[i]! * A.data[Math.floor(i / (nchunks * Q)) % H]!;
    a.data[i] = Math.fround(sum);
  });
  return [dt, a];
}

/** seq_idx [B,L] of documents of about `length` positions; a value comes back after another document. */
export function documents(r: Draw, { B, L }: Pick<Sizes, "B" | "L">, length: number): HostTensor {
  const seq_idx = r.integers([B, L], 0, 1);
  seq_idx.data.forEach((_, i) => {
    const before = i % L === 0 ? 3 : seq_idx.data[i - 1]!;
    seq_idx.data[i] = r.next() < 1 / length ? (before + 1) % 2 : before;
  });
  return seq_idx;
}
