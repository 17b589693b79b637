import { ndarray, type NdArray } from "../tensor/ndarray.ts";

/** y[t] = weight[ids[t]], zero where the id is outside the table. ids [...], weight [V, D] -> [..., D]. */
export function embedding(ids: NdArray, weight: NdArray): NdArray {
  const [V, D] = weight.shape as [number, number];
  const y = ndarray([...ids.shape, D]);
  ids.data.forEach((id, t) => {
    if (id >= 0 && id < V) y.data.set(weight.data.subarray(id * D, (id + 1) * D), t * D);
  });
  return y;
}

/** dweight[v] = sum of dy[t] over the positions with ids[t] = v. */
export function embedding_vjp(
  [dy]: readonly (NdArray | null)[], ids: NdArray, weight: NdArray,
): (NdArray | null)[] {
  const [V, D] = weight.shape as [number, number];
  const dweight = ndarray(weight.shape);
  ids.data.forEach((id, t) => {
    if (!dy || id < 0 || id >= V) return;
    for (let d = 0; d < D; d++) dweight.data[id * D + d]! += dy.data[t * D + d]!;
  });
  return [null, dweight];
}
