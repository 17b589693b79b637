import { ndarray, type NdArray } from "../tensor/ndarray.ts";

const descending = (values: Iterable<number>): number[] => [...values].sort((a, b) => b - a);

/** Per expert the (T * K / E + 1)-th largest of logits - alpha, alpha the (K + 1)-th of logits + bias. */
export function router_quantile(logits: NdArray, bias: NdArray, { topk }: { topk: number }): NdArray {
  const [T, E] = logits.shape as [number, number];
  const alpha = Array.from({ length: T }, (_, t) =>
    descending(logits.data.subarray(t * E, (t + 1) * E).map((x, e) => x + bias.data[e]!))[topk]!);
  return ndarray([E], Array.from({ length: E }, (_, e) =>
    descending(alpha.map((a, t) => logits.data[t * E + e]! - a))[(T * topk) / E]!));
}

/** -beta with beta = (1 - rate) * -bias + rate * estimate, less its mean; bias itself for a negative gate. */
export function update_quantile_bias(
  bias: NdArray, estimate: NdArray, rate: number, gate: NdArray | null = null,
): NdArray {
  if (gate && gate.data[0]! < 0) return bias;
  const moved = bias.data.map((b, e) => (1 - rate) * b - rate * estimate.data[e]!);
  const mean = moved.reduce((a, b) => a + b, 0) / moved.length;
  return ndarray(bias.shape, moved.map((b) => b - mean));
}
