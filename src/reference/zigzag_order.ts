import { ndarray, type NdArray, sizeOf } from "../tensor/ndarray.ts";

/** Where the stretch at place p of the ranks' stands in the sequence: each rank has one from each end. */
function inSequence(p: number, ranks: number): number {
  return p % 2 === 0 ? p / 2 : 2 * ranks - 1 - (p - 1) / 2;
}

/** x [B, L, ...]: 2 * ranks stretches along L from the ranks' order into that of positions, or back. */
export function zigzag_order(x: NdArray, ranks: number, to: "sequence" | "ranks"): NdArray {
  const [B, L] = x.shape as [number, number];
  const out = ndarray(x.shape);
  const width = (L / (2 * ranks)) * sizeOf(x.shape.slice(2));
  for (let b = 0; b < B; b++) {
    for (let p = 0; p < 2 * ranks; p++) {
      const here = (b * 2 * ranks + p) * width;
      const there = (b * 2 * ranks + inSequence(p, ranks)) * width;
      const [from, at] = to === "sequence" ? [here, there] : [there, here];
      for (let i = 0; i < width; i++) out.data[at + i] = x.data[from + i]!;
    }
  }
  return out;
}

export function zigzag_order_vjp(
  [dy]: readonly (NdArray | null)[], x: NdArray, ranks: number, to: "sequence" | "ranks",
): (NdArray | null)[] {
  return [zigzag_order(dy ?? ndarray(x.shape), ranks, to === "sequence" ? "ranks" : "sequence"), null, null];
}
