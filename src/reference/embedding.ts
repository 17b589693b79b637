import { ndarray, type NdArray } from "../tensor/ndarray.ts";

/**
 * y[t] = weight[ids[t] - begin], zero where that is no row of the table.
 * ids [...], weight [V, D] -> [..., D].
 */
export function embedding(ids: NdArray, weight: NdArray, begin = 0): NdArray {
  const [V, D] = weight.shape as [number, number];
  const y = ndarray([...ids.shape, D]);
  ids.data.forEach((id, t) => {
    const row = id - begin;
    if (row >= 0 && row < V) y.data.set(weight.data.subarray(row * D, (row + 1) * D), t * D);
  });
  return y;
}

/** dweight[v] = sum of dy[t] over the positions with ids[t] = begin + v. */
export function embedding_vjp(
  [dy]: readonly (NdArray | null)[], ids: NdArray, weight: NdArray, begin = 0,
): (NdArray | null)[] {
  const [V, D] = weight.shape as [number, number];
  const dweight = ndarray(weight.shape);
  ids.data.forEach((id, t) => {
    const row = id - begin;
    if (!dy || row < 0 || row >= V) return;
    for (let d = 0; d < D; d++) dweight.data[row * D + d]! += dy.data[t * D + d]!;
  });
  return [null, dweight];
}
