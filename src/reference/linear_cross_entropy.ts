import { ndarray, type NdArray } from "../tensor/ndarray.ts";

/** Log-probabilities [T, V] of softmax(h weight^T), and the rows whose label lies in 0 .. V - 1. */
function logProbabilities(
  h: NdArray, weight: NdArray, labels: NdArray,
): { log_p: NdArray; scored: number[] } {
  const [[T, D], V] = [h.shape as [number, number], weight.shape[0]!];
  const log_p = ndarray([T, V]);
  for (let t = 0; t < T; t++) {
    const row = log_p.data.subarray(t * V, (t + 1) * V);
    for (let v = 0; v < V; v++) {
      for (let d = 0; d < D; d++) row[v]! += h.data[t * D + d]! * weight.data[v * D + d]!;
    }
    const largest = row.reduce((a, b) => Math.max(a, b), -Infinity);
    const lse = largest + Math.log(row.reduce((sum, x) => sum + Math.exp(x - largest), 0));
    for (let v = 0; v < V; v++) row[v]! -= lse;
  }
  const scored = [...labels.data.keys()].filter((t) => labels.data[t]! >= 0 && labels.data[t]! < V);
  return { log_p, scored };
}

/** loss = mean over scored rows of -log softmax(h weight^T)[label]. h [T, D], weight [V, D], labels [T]. */
export function linear_cross_entropy(h: NdArray, weight: NdArray, labels: NdArray): NdArray {
  const { log_p, scored } = logProbabilities(h, weight, labels);
  const V = weight.shape[0]!;
  let sum = 0;
  for (const t of scored) sum -= log_p.data[t * V + labels.data[t]!]!;
  return ndarray([], [scored.length > 0 ? sum / scored.length : 0]);
}

/** dlogits = (softmax - onehot(label)) * dloss / scored rows; dh = dlogits weight, dweight = dlogits^T h. */
export function linear_cross_entropy_vjp(
  [dloss]: readonly (NdArray | null)[], h: NdArray, weight: NdArray, labels: NdArray,
): (NdArray | null)[] {
  const { log_p, scored } = logProbabilities(h, weight, labels);
  const [V, D] = weight.shape as [number, number];
  const [dh, dweight] = [ndarray(h.shape), ndarray(weight.shape)];
  for (const t of dloss ? scored : []) {
    for (let v = 0; v < V; v++) {
      const hit = v === labels.data[t] ? 1 : 0;
      const dlogit = (Math.exp(log_p.data[t * V + v]!) - hit) * (dloss!.data[0]! / scored.length);
      for (let d = 0; d < D; d++) {
        dh.data[t * D + d]! += dlogit * weight.data[v * D + d]!;
        dweight.data[v * D + d]! += dlogit * h.data[t * D + d]!;
      }
    }
  }
  return [dh, dweight, null, null];
}
