import { ndarray, type NdArray } from "../tensor/ndarray.ts";

/** d0_t exp(logits_te - largest of t) d1_e, row sums 1 / T and column sums 1 / E; logits [T, E]. */
export function sinkhorn(logits: NdArray): NdArray {
  const [T, E] = logits.shape as [number, number];
  const c = logits.data.map((x, i) => {
    const first = Math.floor(i / E) * E;
    return Math.exp(x - Math.max(...logits.data.subarray(first, first + E)));
  });
  let d0: number[] = [];
  let d1 = Array<number>(E).fill(1);
  const sum = (values: readonly number[]) => values.reduce((a, b) => a + b, 1e-8);
  for (let change = Infinity, round = 0; T > 0 && change > 1e-4 && round < 1000; round++) {
    d0 = Array.from({ length: T }, (_, t) => 1 / (T * sum(d1.map((d, e) => d * c[t * E + e]!))));
    const next = d1.map((_, e) => 1 / (E * sum(d0.map((d, t) => d * c[t * E + e]!))));
    change = next.reduce((total, d, e) => total + Math.abs(d - d1[e]!), 0) / E;
    d1 = next;
  }
  return ndarray([T, E], c.map((value, i) => value * d0[Math.floor(i / E)]! * d1[i % E]!));
}
